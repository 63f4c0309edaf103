#!/usr/bin/env bash
# Baseline against adapted: loss and perplexity, and does the model know the slang?
#
#   ./evaluate.sh
#   ./evaluate.sh --note "prompt changed"    a remark for the log
#   ./evaluate.sh --fail-if-worse            exit with 3 when the adapter does harm
#   ./evaluate.sh --quick                    recompute mlx_lm.lora's figure, in half the time
#   ./evaluate.sh --sample 50                50 slangs, drawn by the seed; quick too
#   ./evaluate.sh --compare 20251004-A 20251004-C   two runs side by side, nothing is run
#   ./evaluate.sh --page 20251004-A          make the page of a run again, nothing is run
#   MODEL=models/tiny-gemma3 ADAPTER_PATH=adapters/tiny ./evaluate.sh
#
# Flags go to python -m slang.evaluate. Writes $RESULTS/<label>.json with every figure and answer,
# <label>.html to look at, and in $RESULTS/LOG.md a row of the table and a line under each heading.

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

ask=( # asked of both models, for you to read
  "musica de plancha"
  "devolverse los peluches"
  "pura vida"
)

refuse --model "set MODEL in its place" "$@"
refuse --adapter-path "set ADAPTER_PATH in its place" "$@"
refuse --data "set DATA in its place" "$@"
refuse --results "set RESULTS in its place" "$@"
refuse --cache "set CACHE in its place" "$@"

need_venv
run_last python -m slang.evaluate --ask ${ask[@]+"${ask[@]}"} --model "$MODEL" \
  --adapter-path "$ADAPTER_PATH" --data "$DATA" --results "$RESULTS" --cache "$CACHE" "$@"

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

# shellcheck source=config.sh
. "$(dirname "$(readlink -f "$0")")/config.sh"

ask=( # asked of both models, for you to read
  "musica de plancha"
  "devolverse los peluches"
  "pura vida"
)

for argument in "$@"; do
  case "$argument" in
    --model | --model=*) usage "$argument: set MODEL in its place" ;;
    --adapter-path | --adapter-path=*) usage "$argument: set ADAPTER_PATH in its place" ;;
    --data | --data=*) usage "$argument: set DATA in its place" ;;
    --results | --results=*) usage "$argument: set RESULTS in its place" ;;
    --cache | --cache=*) usage "$argument: set CACHE in its place" ;;
  esac
done

need_venv
flags=(
  --ask "${ask[@]}"
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --data "$DATA"
  --results "$RESULTS"
  --cache "$CACHE"
  "$@"
)
run python -m slang.evaluate "${flags[@]}"

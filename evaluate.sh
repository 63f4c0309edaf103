#!/usr/bin/env bash
# Baseline against adapted: loss and perplexity on test.jsonl, and whether the model knows the slang.
#
#   ./evaluate.sh
#   ./evaluate.sh --note "prompt changed"    a remark for the log; other flags go to python -m slang.evaluate
#   ./evaluate.sh --fail-if-worse            exit with 3 when the adapter does harm
#   ./evaluate.sh --compare 20251004A 20251004C   two runs side by side, nothing is run
#   ./evaluate.sh --quick                    leave mlx_lm.lora --test out: its figure is recomputed, in half the time
#   ./evaluate.sh --sample 50                50 slangs, drawn by the seed, and as many rows of each file; quick too
#   MODEL=models/tiny-gemma3 ADAPTER_PATH=adapters/tiny ./evaluate.sh
#
# Writes $RESULTS/<label>.json with every figure and answer, <label>.html to look at, and in $RESULTS/LOG.md a row of the
# table and a line under each heading.

# shellcheck source=config.sh
. "$(dirname "$(readlink -f "$0")")/config.sh"

ask=( # asked of both models, for you to read
  "musica de plancha"
  "devolverse los peluches"
  "pura vida"
)
flags=( # of mlx_lm.lora --test
  --data "$DATA"
  --batch-size 1    # every row counts: mlx_lm drops the last batch when it is not full
  --test-batches -1 # all of them
  --mask-prompt     # the loss of the answer, not of the question
)

need_venv
quick=
rest=()
for argument in "$@"; do
  case "$argument" in
    --compare) exec python -m slang.evaluate --results "$RESULTS" "$@" ;;
    --quick) quick=yes ;;
    --sample | --sample=*) # mlx_lm.lora --test would take its minutes for all rows
      quick=yes
      rest+=("$argument")
      ;;
    *) rest+=("$argument") ;;
  esac
done

for split in train valid test eval; do
  need_file "$DATA/$split.jsonl" "run python make_jsonl.py and python split_jsonl.py first"
done
need_adapter
python -m slang.prompt check "$ADAPTER_PATH/prompt.toml" "$DATA/test.jsonl"
need_writable RESULTS "$RESULTS"

# test_loss ADAPTER_PATH: what mlx_lm.lora --test says; an empty path is the base model.
test_loss() {
  local output
  output="$(run mlx_lm.lora --test --model "$MODEL" "${flags[@]}" --adapter-path "$1")" || die "mlx_lm.lora --test failed, see above"
  printf '%s\n' "$output" | grep -o 'Test loss [^ ]*, Test ppl [^ ]*' || die "mlx_lm.lora --test printed no loss: $output"
}

if [ -z "$quick" ]; then
  baseline="$(test_loss "")"
  adapted="$(test_loss "$ADAPTER_PATH")"
  rest+=(--test-lines "$baseline" "$adapted")
fi
run python -m slang.evaluate --model "$MODEL" --adapter-path "$ADAPTER_PATH" --data "$DATA" --results "$RESULTS" \
  --ask "${ask[@]}" ${rest[@]+"${rest[@]}"}

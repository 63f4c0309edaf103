#!/usr/bin/env bash
# The whole pipeline in minutes: from the dictionary to a GGUF file that knows slang.
#
#   ./demo.sh           on a real Gemma 3 of 270 million parameters, fetched on first use (238 MB)
#   ./demo.sh --tiny    on the tiny one of this repository: every step works, and no more is shown
#
# Needs python3 (3.11 or newer), a network for the first installation and 4 GB of disk. Writes
# data/demo, adapters/demo, fused_model_demo and results/demo; nothing of yours is touched.

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

export MODEL=gemma-3-270m DATA=data/demo ADAPTER_PATH=adapters/demo FUSED_PATH=fused_model_demo
export RESULTS=results/demo

train=(--steps-per-eval 1000) # the valid loss at the start and at the end only

# The tiny model learns with other settings, and forgets nothing that would be missed.
use_tiny() {
  export MODEL=models/tiny-gemma3
  export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" # its matrices are too small to share
  train=(-c models/tiny-gemma3/lora.yaml --learning-rate 1e-3 --batch-size 16 --iters 300
    --everyday "" --steps-per-report 50 --steps-per-eval 150 --save-every 150)
}

stage() {
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" >&2
}

# step COMMAND ...: run it, and hand on to it the signals that end this script.
step() {
  local child='' status=0
  trap 'kill -TERM $child 2>/dev/null || true' TERM
  trap 'kill -HUP $child 2>/dev/null || true' HUP
  trap : INT # a terminal sends it to both
  "$@" &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting
    status=0
    wait "$child" || status=$?
  done
  trap - TERM HUP INT
  return "$status"
}

case "$*" in
  "" | --tiny) ;;
  *) usage "$*: there is --tiny, and no other flag" ;;
esac
need_venv
SECONDS=0 # installation is not counted

if [ "$*" = --tiny ]; then
  use_tiny
elif ! (need_model); then
  printf '%s\n' "Going on with models/tiny-gemma3: every step works, its words prove nothing." >&2
  use_tiny
fi

stage "1/5 make_jsonl.py: a part of the dictionary to chat rows"
step run_last python make_jsonl.py --input data/demo.txt

stage "2/5 split_jsonl.py: train, valid, test, eval"
step run_last python split_jsonl.py

stage "3/5 train.sh: a LoRA adapter"
step ./train.sh "${train[@]}"

stage "4/5 evaluate.sh: baseline against adapted"
step ./evaluate.sh --quick --note demo

stage "5/5 fuse.sh and chat.sh: a model, and a file for llama.cpp, which answers"
step ./fuse.sh --type q4_k_m
for file in "$FUSED_PATH"/*-Q4_K_M.gguf; do
  step ./chat.sh --gguf "$file" "pura vida"
done

stage "Done"
printf '%s\n' "Now the 1B model, on a Mac with Apple Silicon:" \
  "  source .venv/bin/activate; python make_jsonl.py; python split_jsonl.py" \
  "  ./train.sh; ./evaluate.sh; ./chat.sh" >&2

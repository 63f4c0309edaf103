#!/usr/bin/env bash
# The whole pipeline on the tiny Gemma 3 of this repository: from the dictionary to an adapter that knows slang, in minutes.
#
#   ./demo.sh
#
# Needs python3 (3.11 or newer) and a network for the first installation. What it makes is in data/demo, adapters/demo,
# fused_model_demo and results/demo; nothing of yours is touched.

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

export MODEL=models/tiny-gemma3 DICTIONARY=data/demo.txt DATA=data/demo ADAPTER_PATH=adapters/demo FUSED_PATH=fused_model_demo RESULTS=results/demo

stage() {
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" >&2
}

need_venv
SECONDS=0 # installation is not counted
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" # the tiny model's matrices are too small to share

stage "1/5 make_jsonl.py: a part of the dictionary to chat rows, each wording in every question form"
mkdir -p "$DATA"
python make_jsonl.py --input "$DICTIONARY" --output "$DATA/source.jsonl" --forms all

stage "2/5 split_jsonl.py: train, valid, test, eval"
python split_jsonl.py --input "$DATA/source.jsonl" \
  --train "$DATA/train.jsonl" --valid "$DATA/valid.jsonl" --test "$DATA/test.jsonl" --eval "$DATA/eval.jsonl"

stage "3/5 train.sh: a LoRA adapter, with the rank and learning rate that suit the tiny model"
# The last adapter, not the one with the lowest valid loss: so small a model learns wordings by heart, and finds others unlikely.
./train.sh -c models/tiny-gemma3/lora.yaml --learning-rate 1e-3 --batch-size 16 --iters 300 --keep last \
  --steps-per-report 50 --steps-per-eval 150 --save-every 150

stage "4/5 evaluate.sh: baseline against adapted"
./evaluate.sh --note demo

stage "5/5 fuse.sh and chat.sh: the adapter becomes a model, and answers"
./fuse.sh
MODEL="$FUSED_PATH" ADAPTER_PATH="" ./chat.sh "pura vida"

stage "Done"
printf '%s\n' "Now the real model, on a Mac with Apple Silicon: source .venv/bin/activate; python make_jsonl.py; python split_jsonl.py; ./train.sh; ./evaluate.sh; ./chat.sh"

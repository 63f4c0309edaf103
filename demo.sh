#!/usr/bin/env bash
# The whole pipeline on the tiny Gemma 3 of this repository: from the dictionary to an adapter that knows slang, in minutes.
#
#   ./demo.sh
#
# Needs python3 (3.11 or newer) and a network for the first installation. What it makes is in data/demo, adapters/demo,
# fused_model_demo and results/demo; nothing of yours is touched.

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

export MODEL=models/tiny-gemma3 DATA=data/demo ADAPTER_PATH=adapters/demo FUSED_PATH=fused_model_demo RESULTS=results/demo

stage() {
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" >&2
}

need_venv
SECONDS=0 # installation is not counted

stage "1/6 A part of the dictionary: every sixth slang and three to ask about"
mkdir -p "$DATA"
awk -F '::' '
  /^#/ || NF < 2 { next }
  !($1 in number) { number[$1] = n++ }
  number[$1] % 6 == 0 || $1 ~ /^(música de plancha|devolverse los peluches|pura vida)$/
' data/source_augmented.txt >"$DATA/source.txt"

stage "2/6 make_jsonl.py: dictionary to chat rows, each wording in two question forms"
python make_jsonl.py --input "$DATA/source.txt" --output "$DATA/source.jsonl" --forms 2

stage "3/6 split_jsonl.py: train, valid, test, eval"
python split_jsonl.py --input "$DATA/source.jsonl" \
  --train "$DATA/train.jsonl" --valid "$DATA/valid.jsonl" --test "$DATA/test.jsonl" --eval "$DATA/eval.jsonl"

stage "4/6 train.sh: a LoRA adapter (the tiny model wants a higher learning rate than the real one)"
./train.sh --batch-size 16 --iters 500 --learning-rate 3e-3 --steps-per-report 50 --steps-per-eval 250 --save-every 250

stage "5/6 evaluate.sh: baseline against adapted"
./evaluate.sh --note demo

stage "6/6 fuse.sh and chat.sh: the adapter becomes a model, and answers"
./fuse.sh
MODEL="$FUSED_PATH" ADAPTER_PATH="" ./chat.sh "pura vida"

stage "Done"
printf '%s\n' "Now the real model, on a Mac with Apple Silicon: source .venv/bin/activate; python make_jsonl.py; python split_jsonl.py; ./train.sh; ./evaluate.sh; ./chat.sh"

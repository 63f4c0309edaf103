#!/usr/bin/env bash
# The whole pipeline on a real Gemma 3 of 270 million parameters: from the dictionary to a GGUF file that knows slang, in minutes.
#
#   ./demo.sh           fetches the model on first use, 238 MB
#   ./demo.sh --tiny    the tiny Gemma 3 of this repository: nothing is fetched, it shows that every step works and no more
#
# Needs python3 (3.11 or newer), a network for the first installation and 4 GB of disk. What it makes is in data/demo,
# adapters/demo, fused_model_demo and results/demo; nothing of yours is touched.

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

export MODEL=gemma-3-270m DICTIONARY=data/demo.txt DATA=data/demo ADAPTER_PATH=adapters/demo FUSED_PATH=fused_model_demo
export RESULTS=results/demo CACHE

tiny=
for argument in "$@"; do
  case "$argument" in
    --tiny) tiny=yes ;;
    *) usage "$argument: there is --tiny, and no other flag" ;;
  esac
done

stage() {
  printf '\n== %s (%d s)\n' "$1" "$SECONDS" >&2
}

need_venv
SECONDS=0 # installation is not counted

if [ -z "$tiny" ] && ! (need_model); then
  printf '%s\n' "Going on with models/tiny-gemma3, which shows that every step works; what it says proves nothing." >&2
  tiny=yes
fi
if [ -n "$tiny" ]; then
  export MODEL=models/tiny-gemma3
  export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" # its matrices are too small to share
  forms=all
  train=(-c models/tiny-gemma3/lora.yaml --learning-rate 1e-3 --batch-size 16 --iters 300 --everyday ""
    --steps-per-report 50 --steps-per-eval 150 --save-every 150)
else
  forms=3
  train=(--iters 130 --steps-per-eval 130 --save-every 50)
fi

stage "1/5 make_jsonl.py: a part of the dictionary to chat rows"
mkdir -p "$DATA"
python make_jsonl.py --input "$DICTIONARY" --output "$DATA/source.jsonl" --forms "$forms"

stage "2/5 split_jsonl.py: train, valid, test, eval"
python split_jsonl.py --input "$DATA/source.jsonl" \
  --train "$DATA/train.jsonl" --valid "$DATA/valid.jsonl" --test "$DATA/test.jsonl" --eval "$DATA/eval.jsonl"

stage "3/5 train.sh: a LoRA adapter"
./train.sh "${train[@]}"

stage "4/5 evaluate.sh: baseline against adapted"
./evaluate.sh --quick --note demo

stage "5/5 fuse.sh and chat.sh: the adapter becomes a model, and a file for llama.cpp, which answers"
rm -f "$FUSED_PATH"/*.gguf # an earlier demo's, of the other model
./fuse.sh --type q4_k_m
for file in "$FUSED_PATH"/*-Q4_K_M.gguf; do
  ./chat.sh --gguf "$file" "pura vida"
done

stage "Done"
printf '%s\n' "Now the 1B model, on a Mac with Apple Silicon: source .venv/bin/activate; python make_jsonl.py; python split_jsonl.py; ./train.sh; ./evaluate.sh; ./chat.sh"

#!/usr/bin/env bash
# Train a LoRA adapter on train.jsonl, as mlx_lm.lora does it but in less time (slang/train).
#
#   ./train.sh                                   the model and paths of config.sh
#   ./train.sh --resume                          go on where Ctrl-C, a power cut or kill ended it
#   ./train.sh --iters 100 --learning-rate 5e-5  any flag of mlx_lm.lora, over the flags below
#   ./train.sh -c lora.yaml                      the same in a file; what is typed wins over it
#   ./train.sh --early-stop 0.2                  until the training loss is below; also --keep best
#   MODEL=models/tiny-gemma3 ADAPTER_PATH=adapters/tiny ./train.sh
#   ENGINE=mlx_lm ./train.sh                     with mlx_lm.lora itself, to compare
#   HOSTFILE=hosts.json ./train.sh               on several machines, see mlx.launch --help
#
# Writes into $ADAPTER_PATH what mlx_lm.lora writes: adapters.safetensors (the last one), and a
# checkpoint every --save-every steps; beside them adapters_best.safetensors (by validation loss),
# prompt.toml, log.jsonl, loss.svg, and resume.safetensors for --resume.

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

ENGINE="${ENGINE:-slang}" # slang, or mlx_lm
HOSTFILE="${HOSTFILE:-}"  # machines to train on together; MODEL has the same path on all

flags=(
  --batch-size 16       # rows per step; 4, 2 or 1 on a Mac with 8 GB
  --num-layers -1       # layers with an adapter, from the last; -1 is all (26 in the 1B model)
  --mask-prompt         # learn the answer, not the question
  --steps-per-report 10 # print the training loss this often
  --steps-per-eval 200  # and the loss on valid.jsonl this often
  --val-batches -1      # over all of it
  --save-every 100      # keep a checkpoint, and the state for --resume, this often
  --seed 42
  # --grad-checkpoint   # less memory, a third more time
  # --fine-tune-type dora
)
case "$ENGINE" in
  slang)
    flags+=(
      --learning-rate 7e-4           # mlx_lm's 1e-5 is too timid for new facts
      --epochs 3.5                   # passes over the rows; --iters counts steps in their place
      --decay                        # the learning rate rises at the start and falls until the end
      --bias-correction              # Adam as published; without it the first steps are too large
      --everyday data/everyday.jsonl # everyday Spanish, a row for ten; "" leaves it out
    )
    ;;
  mlx_lm)
    flags+=(
      --learning-rate 2e-4 # without bias correction, 3e-4 tore Gemma 3 270M apart
      --iters 1000         # it knows no epochs
    )
    ;;
  *) usage "ENGINE=$ENGINE: there are slang and mlx_lm" ;;
esac

refuse --model "set MODEL in its place" "$@"
refuse --data "set DATA in its place" "$@"
refuse --adapter-path "set ADAPTER_PATH in its place" "$@"
refuse --prompt "edit prompt.toml in its place" "$@"
refuse --engine "set ENGINE in its place" "$@"

need_venv
for split in train valid; do
  need_file "$DATA/$split.jsonl" "run python make_jsonl.py and python split_jsonl.py first"
done
python -m slang.prompt prompt.toml "$DATA/train.jsonl" "$DATA/valid.jsonl"
need_writable ADAPTER_PATH "$ADAPTER_PATH"
need_model

command=(python -m slang.train --train --engine "$ENGINE")
if [ -n "$HOSTFILE" ]; then
  need_file "$HOSTFILE" "mlx.distributed_config writes one"
  command=(python -m slang.train.hosts "$HOSTFILE" "${command[@]}")
fi
run_last "${command[@]}" --model "$MODEL" --adapter-path "$ADAPTER_PATH" --data "$DATA" \
  --prompt prompt.toml "${flags[@]}" --typed "$@"

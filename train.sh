#!/usr/bin/env bash
# Train a LoRA adapter on data/train.jsonl, as mlx_lm.lora does it but in a third of the time (slang/lora.py).
#
#   ./train.sh                                   the model and paths of config.sh
#   ./train.sh --resume                          go on where Ctrl-C, a power cut or kill ended it
#   ./train.sh --iters 100 --learning-rate 5e-5  any flag of mlx_lm.lora; the last one wins
#   ./train.sh --early-stop 5                    until 5 validations in a row brought nothing; --keep last, --stock-loss
#   MODEL=models/tiny-gemma3 ADAPTER_PATH=adapters/tiny ./train.sh
#   ENGINE=mlx_lm ./train.sh                     with mlx_lm.lora itself, to compare
#   HOSTFILE=hosts.json ./train.sh               on several machines, see mlx.launch --help
#
# Writes into $ADAPTER_PATH what mlx_lm.lora writes: adapters.safetensors (the best by validation loss), a checkpoint every
# --save-every steps; and adapters_last.safetensors, prompt.toml, log.jsonl, loss.svg, and resume.safetensors for --resume.

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

ENGINE="${ENGINE:-slang}" # slang, or mlx_lm
HOSTFILE="${HOSTFILE:-}"  # machines to train on together; the folder and MODEL have to be there under the same path

case "$ENGINE" in
  slang) engine=(python -m slang.lora --prompt prompt.toml) ;;
  mlx_lm) engine=(mlx_lm.lora) ;;
  *) die "ENGINE=$ENGINE: there are slang and mlx_lm" ;;
esac
for flag in "$@"; do
  case "$ENGINE $flag" in # mlx_lm.lora would take --resume for --resume-adapter-file
    "mlx_lm --resume" | "mlx_lm --keep"* | "mlx_lm --early-stop"* | "mlx_lm --stock-loss" | "mlx_lm --prompt"*)
      die "$flag: mlx_lm.lora has no such flag; leave out the flag, or ENGINE=mlx_lm"
      ;;
  esac
done

need_venv
for split in train valid; do
  need_file "$DATA/$split.jsonl" "run python make_jsonl.py and python split_jsonl.py first"
done
python -m slang.prompt check prompt.toml "$DATA/train.jsonl" "$DATA/valid.jsonl"
need_model
need_writable ADAPTER_PATH "$ADAPTER_PATH"

rows="$(grep -c . "$DATA/train.jsonl")"
flags=(
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --data "$DATA"
  --batch-size 4            # rows per step; 2 or 1 on a Mac with 8 GB
  --iters $((rows * 5 / 4)) # steps; this is about five passes over train.jsonl (rows / batch size is one)
  --learning-rate 1e-4      # mlx_lm's 1e-5 is too timid for new facts; lower it when the valid loss jumps about
  --num-layers -1           # layers that get an adapter, counted from the last; -1 is all (26 in the 1B model), 16 is cheaper
  --mask-prompt             # learn the answer, not the question
  --steps-per-report 10     # print the training loss this often
  --steps-per-eval 40       # and the loss on valid.jsonl this often
  --val-batches -1          # over all of it
  --save-every 50           # keep a checkpoint, and the state for --resume, this often
  --seed 42
  # --grad-checkpoint       # less memory, a third more time
  # --fine-tune-type dora
  # -c lora.yaml            # rank, dropout and scale, see mlx_lm.lora's LORA.md
)
flags+=("$@")

batch_size=4
iters=0
previous=
for flag in "${flags[@]}"; do
  case "$previous" in
    --batch-size) batch_size="$flag" ;;
    --iters) iters="$flag" ;;
  esac
  case "$flag" in
    --batch-size=*) batch_size="${flag#*=}" ;;
    --iters=*) iters="${flag#*=}" ;;
  esac
  previous="$flag"
done
awk -v i="$iters" -v b="$batch_size" -v r="$rows" \
  'BEGIN { printf "%d steps of %d rows: %.1f epochs of the %d rows in train.jsonl\n", i, b, i * b / r, r }' >&2

if [ -n "$HOSTFILE" ]; then
  need_file "$HOSTFILE" "mlx.distributed_config writes one"
  engine=(mlx.launch --hostfile "$HOSTFILE" "${engine[@]}")
fi
if [ "$ENGINE" = mlx_lm ]; then
  mkdir -p "$ADAPTER_PATH"
  cp prompt.toml "$ADAPTER_PATH/prompt.toml"
fi
run "${engine[@]}" --train "${flags[@]}"

#!/usr/bin/env bash
# Train a LoRA adapter on data/train.jsonl, as mlx_lm.lora does it but in less time (slang/lora.py).
#
#   ./train.sh                                   the model and paths of config.sh
#   ./train.sh --resume                          go on where Ctrl-C, a power cut or kill ended it
#   ./train.sh --iters 100 --learning-rate 5e-5  any flag of mlx_lm.lora; the last one wins
#   ./train.sh --early-stop 5                    until 5 validations in a row brought nothing; --keep best, --stock-loss
#   MODEL=models/tiny-gemma3 ADAPTER_PATH=adapters/tiny ./train.sh
#   ENGINE=mlx_lm ./train.sh                     with mlx_lm.lora itself, to compare
#   HOSTFILE=hosts.json ./train.sh               on several machines, see mlx.launch --help
#
# Writes into $ADAPTER_PATH what mlx_lm.lora writes: adapters.safetensors (the last one), a checkpoint every
# --save-every steps; and adapters_best.safetensors (by validation loss), prompt.toml, log.jsonl, loss.svg, and resume.safetensors for --resume.

# shellcheck source=config.sh
. "$(dirname "$(readlink -f "$0")")/config.sh"

ENGINE="${ENGINE:-slang}" # slang, or mlx_lm
HOSTFILE="${HOSTFILE:-}"  # machines to train on together; the folder and MODEL have to be there under the same path

case "$ENGINE" in
  slang)
    engine=(python -m slang.lora --prompt prompt.toml)
    length=(
      --epochs 5                     # passes over the rows; --iters counts steps in their place
      --decay                        # the learning rate rises at the start and falls until the end
      --everyday data/everyday.jsonl # everyday Spanish, trained beside the slang so that it stays; "" leaves it out
    )
    ;;
  mlx_lm)
    engine=(mlx_lm.lora)
    length=() # mlx_lm.lora counts in steps: --iters, 1000 where it is left out
    ;;
  *) die "ENGINE=$ENGINE: there are slang and mlx_lm" ;;
esac
for flag in "$@"; do
  case "$ENGINE $flag" in # mlx_lm.lora would take --resume for --resume-adapter-file
    "mlx_lm --resume" | "mlx_lm --keep"* | "mlx_lm --early-stop"* | "mlx_lm --stock-loss" | "mlx_lm --prompt"* | "mlx_lm --ep"* | "mlx_lm --everyday"* | "mlx_lm --decay")
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

flags=(
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --data "$DATA"
  --batch-size 16           # rows per step; 4, 2 or 1 on a Mac with 8 GB
  --learning-rate 2e-4      # mlx_lm's 1e-5 is too timid for new facts; 3e-4 tore Gemma 3 270M apart
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
flags+=(${length[@]+"${length[@]}"} "$@")

if [ -n "$HOSTFILE" ]; then
  need_file "$HOSTFILE" "mlx.distributed_config writes one"
  engine=(mlx.launch --hostfile "$HOSTFILE" "${engine[@]}")
fi
if [ "$ENGINE" = mlx_lm ]; then
  mkdir -p "$ADAPTER_PATH"
  cp prompt.toml "$ADAPTER_PATH/prompt.toml"
fi
run "${engine[@]}" --train "${flags[@]}"

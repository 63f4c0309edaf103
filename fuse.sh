#!/usr/bin/env bash
# Fuse the adapter into the base model, and export it to GGUF for llama.cpp, Ollama and LM Studio.
#
#   ./fuse.sh                          $FUSED_PATH and two GGUF files in it: BF16 and Q4_K_M
#   ./fuse.sh --type q8_0 q6_k         others: f32 f16 bf16 q8_0 q4_0 q4_k_m q5_k_m q6_k
#   ./fuse.sh --no-gguf                the MLX model only
#   ./fuse.sh --dequantize             for a 4-bit or 8-bit MODEL
#   ./chat.sh --gguf fused_model/gemma-3-1b-it-slang-Q4_K_M.gguf "pura vida"
#
# Writes $FUSED_PATH: the fused model with the prompt.toml that the adapter was trained with,
# <name>-<TYPE>.gguf, and a Modelfile for Ollama. Each file is compared in llama.cpp with the model
# in MLX, on questions about the slangs of $DATA/train.jsonl. When all agree, the new folder takes
# the place of the old one; else the old one stays as it was. What you put into that folder yourself
# is not lost: fuse.sh names it and does nothing.

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

refuse --model "set MODEL in its place" "$@"
refuse --adapter-path "set ADAPTER_PATH in its place" "$@"
refuse --fused-path "set FUSED_PATH in its place" "$@"
refuse --data "set DATA in its place" "$@"
refuse --cache "set CACHE in its place" "$@"

flags=(
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --fused-path "$FUSED_PATH"
  --data "$DATA"
  --cache "$CACHE"
  --type bf16 q4_k_m # the Modelfile is for the last one
  --questions 200    # cut into tokens by both
  --answers 12       # of them answered by both; each adds seconds with a real model
  # --dequantize     # when MODEL is a 4-bit or 8-bit one
)

need_venv
run_last python -m slang.export "${flags[@]}" "$@"

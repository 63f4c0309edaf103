#!/usr/bin/env bash
# Fuse the adapter into the base model: one folder that needs no adapter.
#
#   ./fuse.sh                                any flag of mlx_lm.fuse may follow
#   MODEL=fused_model ADAPTER_PATH= ./chat.sh "pura vida"
#
# Writes $FUSED_PATH, with the prompt.toml that the adapter was trained with.

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

need_venv
need_model "$MODEL"
need_adapter
[ ! -d "$FUSED_PATH" ] || [ -f "$FUSED_PATH/config.json" ] || [ -z "$(ls -A "$FUSED_PATH")" ] ||
  die "$FUSED_PATH: holds something that is not a model; set FUSED_PATH to another folder"

flags=(
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --save-path "$FUSED_PATH"
  # --dequantize # when MODEL is a 4-bit or 8-bit one and the result is to be exported
)

run mlx_lm.fuse "${flags[@]}" "$@"
cp "$ADAPTER_PATH/prompt.toml" "$FUSED_PATH/prompt.toml"
printf 'Fused into %s. Talk to it: MODEL=%s ADAPTER_PATH= ./chat.sh "pura vida"\n' "$FUSED_PATH" "$FUSED_PATH" >&2

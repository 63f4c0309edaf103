#!/usr/bin/env bash
# Fuse the adapter into the base model, and export it to GGUF for llama.cpp, Ollama and LM Studio.
#
#   ./fuse.sh                          $FUSED_PATH and two GGUF files in it: BF16 and Q4_K_M
#   ./fuse.sh --type q8_0 q6_k         others: f32 f16 bf16 q8_0 q4_0 q4_k_m q5_k_m q6_k
#   ./fuse.sh --no-gguf                the MLX model only
#   ./fuse.sh --dequantize             for a 4-bit or 8-bit MODEL; any other flag of mlx_lm.fuse may follow too
#   ./chat.sh --gguf fused_model/gemma-3-1b-it-slang-Q4_K_M.gguf "pura vida"
#
# Writes $FUSED_PATH with the prompt.toml that the adapter was trained with, <name>-<TYPE>.gguf and a Modelfile for Ollama, then
# compares each file in llama.cpp with the fused model in MLX and fails where they differ.

# shellcheck source=config.sh
. "$(dirname "$(readlink -f "$0")")/config.sh"

types=(bf16 q4_k_m) # the Modelfile is for the last one
known="f32 f16 bf16 q8_0 q4_0 q4_k_m q5_k_m q6_k"
check=(
  --dictionary "$DICTIONARY"
  --questions 200 # cut into tokens by both
  --answers 12    # of them answered by both; each adds seconds with a real model
)

gguf=yes
more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --no-gguf) gguf= ;;
    --type)
      types=()
      while [ $# -gt 1 ] && [ "${2#-}" = "$2" ]; do
        types+=("$2")
        shift
      done
      ;;
    --model* | --adapter-path* | --save-path*) usage "$1: set MODEL, ADAPTER_PATH or FUSED_PATH in its place" ;;
    *) more+=("$1") ;;
  esac
  shift
done

# Now, not after a minute of fusing.
for type in "${types[@]-}"; do
  case " $known " in
    *" ${type:- } "*) ;;
    *)
      printf '%s\n' "--type $type: not one of $known" >&2
      exit 2
      ;;
  esac
done

need_venv
need_adapter
need_writable FUSED_PATH "$FUSED_PATH"
mkdir -p "$FUSED_PATH"
part="$FUSED_PATH/.part" # moved up when it is whole: an earlier model stays as it was when this one fails
trap 'rm -rf "$part"' EXIT
rm -rf "$part"
[ -f "$FUSED_PATH/config.json" ] || [ -z "$(ls -A "$FUSED_PATH")" ] ||
  die "$FUSED_PATH: holds something that is not a model; set FUSED_PATH to another folder"

flags=(
  --model "$MODEL"
  --adapter-path "$ADAPTER_PATH"
  --save-path "$part"
  # --dequantize # when MODEL is a 4-bit or 8-bit one
  ${more[@]+"${more[@]}"}
)
kilobytes="$(find -L "$model_folder" -name 'model*.safetensors' -exec du -Lk {} + | awk '{ sum += $1 } END { print sum + 0 }')"
free="$(df -Pk "$FUSED_PATH" | awk 'NR == 2 { print $4 }')"
[ "$kilobytes" -le "$free" ] || die "$FUSED_PATH: $((kilobytes / 1000)) MB needed, $((free / 1000)) MB free; make room"
run mlx_lm.fuse "${flags[@]}" || die "mlx_lm.fuse failed, see above; $FUSED_PATH is as it was"
cp "$ADAPTER_PATH/prompt.toml" "$part/prompt.toml"
for file in tokenizer.model origin.json; do # the tokens' scores; licence and name of a model that came as GGUF
  [ ! -f "$model_folder/$file" ] || cp "$model_folder/$file" "$part/$file"
done
rm -f "$FUSED_PATH"/model*.safetensors # of another model, in another number of files
mv "$part"/* "$FUSED_PATH"
printf 'Fused into %s. Talk to it: MODEL=%s ADAPTER_PATH= ./chat.sh "pura vida"\n' "$FUSED_PATH" "$FUSED_PATH" >&2
[ -n "$gguf" ] || exit 0

# mlx-community/gemma-3-1b-it-bf16, or gemma-3-1b-it-Q4_K_M of a .gguf file -> gemma-3-1b-it-slang
name="$(basename "$MODEL" | sed -E 's/[-.]([bB]?[fF](16|32)|fp16|[0-9]+bit.*|[qQ][0-9]_[0-9a-zA-Z_]+)$//')-slang"
run python -m slang.gguf "$FUSED_PATH" --name "$name" --type "${types[@]}"
files=()
for type in "${types[@]}"; do
  files+=("$FUSED_PATH/$name-$(printf '%s' "$type" | tr '[:lower:]' '[:upper:]').gguf")
done
run python -m slang.gguf --check "${files[@]}" "${check[@]}"

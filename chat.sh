#!/usr/bin/env bash
# Talk to the adapted model, with the system prompt that it was trained with.
#
#   ./chat.sh                                            a conversation (mlx_lm.chat): r starts anew, q or Ctrl-D leaves
#   ./chat.sh "pura vida"                                one answer on stdout; a bare slang is asked in the first question form
#   ./chat.sh 'Qué significa en Costa Rica "pura vida"?' one answer; a question is asked as it stands
#   ./chat.sh --baseline [...]                           the base model, for comparison
#   MODEL=fused_model ADAPTER_PATH= ./chat.sh            a fused model, which has the adapter in it
#   ./chat.sh --gguf fused_model/NAME-Q4_K_M.gguf "pura vida"  one answer of an exported file, in llama.cpp
#
# Any other flag goes to mlx_lm.chat, or with a question to mlx_lm.generate: ./chat.sh --temp 0.7

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

flags=(
  --max-tokens 100 # an answer is one sentence; this ends one that never stops
  --temp 0.0       # always the likeliest word; 0.7 for variety
)

baseline=
gguf=
question=
while [ $# -gt 0 ]; do
  case "$1" in
    --baseline) baseline=yes ;;
    --gguf)
      [ $# -gt 1 ] || usage "--gguf needs a file, such as fused_model/NAME-Q4_K_M.gguf"
      gguf="$2"
      shift
      ;;
    -*)
      flags+=("$1")
      if [ $# -gt 1 ] && [ "${1#*=}" = "$1" ]; then
        flags+=("$2")
        shift
      fi
      ;;
    *)
      [ -n "${1//[[:space:]]/}" ] || usage "the question is empty; leave it out for a conversation"
      [ -z "$question" ] || usage "one question at a time; put it in quotes"
      question="$1"
      ;;
  esac
  shift
done

need_venv
if [ -n "$gguf" ]; then
  need_file "$gguf" "run ./fuse.sh, which writes it"
  [ -n "$question" ] || usage "--gguf answers one question; for a conversation: llama-cli -m $gguf"
  # The file brings its system prompt along; prompt.toml beside it has the question forms.
  prompt="$(dirname "$gguf")/prompt.toml"
  [ -f "$prompt" ] || prompt=prompt.toml
  asked="$(python -m slang.prompt question "$prompt" "$question")"
  run python -m slang.export --ask "$gguf" "$asked"
  exit
fi
prompt=prompt.toml
if [ -n "$baseline" ] || [ -z "$ADAPTER_PATH" ]; then
  need_model
else
  need_adapter
  flags+=(--adapter-path "$ADAPTER_PATH")
fi
if [ -n "$ADAPTER_PATH" ] && [ -f "$ADAPTER_PATH/prompt.toml" ]; then
  prompt="$ADAPTER_PATH/prompt.toml"
elif [ -f "$MODEL/prompt.toml" ]; then
  prompt="$MODEL/prompt.toml"
fi
system="$(python -m slang.prompt system "$prompt")"
flags=(--model "$MODEL" "--system-prompt=$system" "${flags[@]}") # one word, for a prompt that begins with a dash

if [ -z "$question" ]; then
  run python -m slang.chat "${flags[@]}"
else
  asked="$(python -m slang.prompt question "$prompt" "$question")"
  # Through stdin: given as an argument, mlx_lm.generate would read a \n in the question as a line break.
  printf '%s' "$asked" | run mlx_lm.generate "${flags[@]}" --verbose False --prompt -
fi

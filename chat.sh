#!/usr/bin/env bash
# Talk to the adapted model, with the system prompt that it was trained with.
#
#   ./chat.sh                             a conversation: r starts anew, q or Ctrl-D leaves
#   ./chat.sh 'Qué es "pura vida"?'       what has ?, ¿ or quotation marks is asked as it stands,
#                                         and so is what has a question form of prompt.toml
#   ./chat.sh "pura vida"                 all else is a slang, asked in the first question form
#   ./chat.sh --baseline [...]            the base model, for comparison
#   ./chat.sh <slangs.txt >answers.txt    each line for itself, an answer a line
#   ./chat.sh --gguf FILE.gguf [...]      an exported file, in llama.cpp
#   MODEL=fused_model ADAPTER_PATH= ./chat.sh    a fused model, which has the adapter in it
#
# What is typed wins over the flags below. There are also --top-p, --min-p, --top-k and --seed.

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

flags=(
  --max-tokens 100 # an answer is one sentence; this ends one that never stops
  --temp 0.0       # always the likeliest word; 0.7 for variety
)

refuse --model "set MODEL in its place" "$@"
refuse --adapter-path "set ADAPTER_PATH in its place" "$@"
refuse --cache "set CACHE in its place" "$@"
refuse --system-prompt "it is that of training; edit prompt.toml and train again" "$@"

[ "$started_in" = "$PWD" ] || flags+=(--relative-to "$started_in")

need_venv
run_last python -m slang.chat --model "$MODEL" --adapter-path "$ADAPTER_PATH" --cache "$CACHE" \
  "${flags[@]}" "$@"

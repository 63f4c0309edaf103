# shellcheck shell=bash
# Sourced by every wrapper: where things are, and a .venv that has what requirements.txt asks for.
# Set a variable for one command (MODEL=models/tiny-gemma3 ./train.sh) or edit its default here.
# Relative paths start at the folder of this file.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The base model: a Hugging Face repo, a folder (models/tiny-gemma3 is here), a .gguf file, or gemma-3-270m.
MODEL="${MODEL:-mlx-community/gemma-3-1b-it-bf16}"
DATA="${DATA:-data}"                                # folder with train.jsonl, valid.jsonl, test.jsonl, eval.jsonl
ADAPTER_PATH="${ADAPTER_PATH-adapters}"             # where train.sh puts the adapter and its prompt.toml
FUSED_PATH="${FUSED_PATH:-fused_model}"             # where fuse.sh puts base model and adapter in one
DICTIONARY="${DICTIONARY:-data/source_augmented.txt}" # what fuse.sh asks the exported file about
RESULTS="${RESULTS:-results}"                       # where evaluate.sh keeps its log
CACHE="${CACHE:-.cache}"                            # where a .gguf file becomes a folder that MLX can load
PYTHON="${PYTHON:-python3}"                         # makes the .venv; 3.11 or newer
VENV="${VENV:-$PWD/.venv}"                          # made on first use, made again when requirements.txt changes

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

usage() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment at the top of a wrapper is its help.
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
  esac
done

# run COMMAND [ARGUMENT ...]: show the command on stderr, then run it with the project's packages (and BLAS, on Linux).
run() {
  {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  } >&2
  project "$@"
}

project() {
  if [ -f "$VENV/lib/libcblas-openblas.so" ]; then
    LD_PRELOAD="$VENV/lib/libcblas-openblas.so${LD_PRELOAD:+:$LD_PRELOAD}" "$@"
  else
    "$@"
  fi
}

# need_file FILE REMEDY ...: stop unless the file is there.
need_file() {
  local file="$1"
  shift
  [ -f "$file" ] || die "$file: not there; $*"
}

# need_model: stop unless MODEL can be used. A .gguf file becomes a folder, and MODEL that folder: mlx_lm loads no other.
# shellcheck disable=SC2034  # fuse.sh reads model_folder
need_model() {
  local found
  found="$(python -m slang.models "$MODEL" "$@" --cache "$CACHE")" || return
  MODEL="${found%%$'\n'*}"
  model_folder="${found#*$'\n'}"
}

# need_adapter: the same, and stop unless the adapter's files are whole and fit it.
need_adapter() {
  need_model "$ADAPTER_PATH"
}

# need_writable VARIABLE FOLDER: stop unless files can be put there, now and not after the minutes that they take to make.
need_writable() {
  local there="$2" # or where it will be made
  [ -n "$there" ] || die "$1 is empty; set it to a folder"
  while [ ! -e "$there" ]; do
    there="$(dirname "$there")"
  done
  { [ -d "$there" ] && [ -w "$there" ]; } || die "$2: not a folder that can be written; set $1 to another"
}

# need_venv [REQUIREMENTS]: a .venv that holds what the file asks for, made now if it is missing or the file has changed.
need_venv() {
  local requirements="${1:-requirements.txt}" stamp="$VENV/installed-for.txt" wanted
  wanted="$(cat requirements.txt "$requirements" | sort -u)"
  export PATH="$VENV/bin:$PATH"
  # What is installed for the tests serves the wrappers too, as long as requirements.txt is in it.
  # Its python is a link, to nothing once that Python is uninstalled or updated away.
  if [ -f "$stamp" ] && [ -x "$VENV/bin/python" ] && [ -z "$(printf '%s\n' "$wanted" | sort -u | comm -23 - "$stamp")" ]; then
    return
  fi
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$PYTHON: Python 3.11 or newer is needed; install it and set PYTHON, for instance PYTHON=python3.12 $0"
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$PYTHON: its venv module is missing; on Debian or Ubuntu: apt install python3-venv"
  printf 'Setting up %s for %s (once; a minute or two) ...\n' "${VENV#"$PWD/"}" "$requirements" >&2
  # Made anew is only what was made here: an environment of your own just gets what it lacks.
  if [ ! -e "$VENV" ] || [ -f "$VENV/made-by-config.sh" ]; then
    local base # PYTHON may be the one in $VENV, where that is activated
    base="$("$PYTHON" -c 'import sys; print(f"{sys.base_prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}")')"
    [ -x "$base" ] || base="$PYTHON"
    rm -rf "$VENV"
    mkdir -p "$VENV"
    : >"$VENV/made-by-config.sh" # before anything else, so that what Ctrl-C leaves half made is made anew too
    "$base" -m venv "$VENV"
  fi
  rm -f "$stamp"
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r "$requirements" >&2 ||
    die "pip could not install $requirements; see its message above, check the connection and run this again"
  use_openblas
  printf '%s\n' "$wanted" >"$stamp"
}

# MLX's Linux wheel calls a reference BLAS: 269 ms for a 1024 x 1024 float32 product that OpenBLAS does in 17. A copy of
# OpenBLAS, its symbols given the plain names that MLX looks up, is preloaded by `project`.
use_openblas() {
  [ "$(uname -s)" = Linux ] || return 0
  local library name
  library="$(python -c 'import scipy_openblas32 as o, os; print(os.path.join(o.get_lib_dir(), o.get_library(fullname=True)))')"
  for name in sgemm dgemm cgemm; do
    printf 'scipy_cblas_%s cblas_%s\n' "$name" "$name"
  done >"$VENV/blas-names.txt"
  cp "$library" "$VENV/lib/libcblas-openblas.so.part"
  patchelf --rename-dynamic-symbols "$VENV/blas-names.txt" "$VENV/lib/libcblas-openblas.so.part"
  mv "$VENV/lib/libcblas-openblas.so.part" "$VENV/lib/libcblas-openblas.so"
}

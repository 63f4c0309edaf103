# shellcheck shell=bash
# Sourced by every wrapper: where things are, and a .venv that has what requirements.txt asks for.
# Set a variable for one command (MODEL=models/tiny-gemma3 ./train.sh) or edit its default here.
# Relative paths start at the folder of this file.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL="${MODEL:-mlx-community/gemma-3-1b-it-bf16}"  # base model: a Hugging Face repo or a folder; models/tiny-gemma3 is here
DATA="${DATA:-data}"                                # folder with train.jsonl, valid.jsonl, test.jsonl, eval.jsonl
ADAPTER_PATH="${ADAPTER_PATH-adapters}"             # where train.sh puts the adapter and its prompt.toml
FUSED_PATH="${FUSED_PATH:-fused_model}"             # where fuse.sh puts base model and adapter in one
DICTIONARY="${DICTIONARY:-data/source_augmented.txt}" # what fuse.sh asks the exported file about
RESULTS="${RESULTS:-results}"                       # where evaluate.sh keeps its log
PYTHON="${PYTHON:-python3}"                         # makes the .venv; 3.11 or newer
VENV="${VENV:-$PWD/.venv}"                          # made on first use, made again when requirements.txt changes

die() {
  printf '%s\n' "$*" >&2
  exit 1
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

need_adapter() {
  need_file "$ADAPTER_PATH/adapters.safetensors" "run ./train.sh first, or set ADAPTER_PATH to an adapter's folder"
  need_file "$ADAPTER_PATH/adapter_config.json" "run ./train.sh again: the adapter's folder is not whole"
  need_file "$ADAPTER_PATH/prompt.toml" "copy the prompt.toml that the adapter was trained with into its folder"
}

# need_model MODEL: stop unless it is a model's folder, or in the Hugging Face cache, or to be had from the hub.
need_model() {
  if [ -e "$1" ]; then
    need_file "$1/config.json" "MODEL has to name a model's folder"
    ls "$1"/model*.safetensors >/dev/null 2>&1 || die "$1: no model*.safetensors; the folder holds no weights"
    return
  fi
  case "$1" in
    /* | .* | ~* | models/* | */*/* | *[!A-Za-z0-9._/-]*) die "$1: no such folder; MODEL=models/tiny-gemma3 is the one in this repository" ;;
  esac
  local found
  found="$(python - "$1" <<'PYTHON'
import os, sys
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars, logging
disable_progress_bars()
logging.set_verbosity_error()
for only_local in (True, False):
    try:
        snapshot_download(sys.argv[1], allow_patterns=["config.json"], local_files_only=only_local)
        sys.exit()
    except Exception as error:
        reason = type(error).__name__
print(reason)
PYTHON
)"
  [ -z "$found" ] || die "$1: no folder here, not downloaded yet, and Hugging Face did not give it ($found);" \
    "check the name and the connection, or try MODEL=models/tiny-gemma3"
}

# need_venv [REQUIREMENTS]: a .venv that holds what the file asks for, made now if it is missing or the file has changed.
need_venv() {
  local requirements="${1:-requirements.txt}" stamp="$VENV/installed-for.txt" wanted
  wanted="$(cat requirements.txt "$requirements" | sort -u)"
  export PATH="$VENV/bin:$PATH"
  # What is installed for the tests serves the wrappers too, as long as requirements.txt is in it.
  if [ -f "$stamp" ] && [ -z "$(printf '%s\n' "$wanted" | sort -u | comm -23 - "$stamp")" ]; then
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

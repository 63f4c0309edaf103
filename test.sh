#!/usr/bin/env bash
# Every check that CI runs: style, types, shell, and the tests with the real mlx_lm.
# Needs python3, and a network for the first run.
#
#   ./test.sh                        all; Gemma 3 270M is fetched once, 238 MB
#   ./test.sh --quick                under a minute on two cores: no training, no real model
#   ./test.sh tests/test_prompt.py   arguments go to pytest

# Found through links too: BSD's readlink follows one at a time.
self="$0"
while [ -L "$self" ]; do
  link="$(readlink "$self")"
  [ "${link#/}" != "$link" ] || link="$(dirname "$self")/$link"
  self="$link"
done
# shellcheck source=config.sh
. "$(dirname "$self")/config.sh"

if [ "${1:-}" = --quick ]; then
  shift
  set -- -m "not slow and not real" "$@"
fi

need_venv tests/requirements.txt
run python -m ruff check .
run python -m ruff format --check .
run python -m mypy
run "$VENV/bin/shellcheck" -x config.sh ./*.sh .ci/run
export OPENBLAS_NUM_THREADS=1 # a thread for each of the two test processes
run python -m pytest -n 2 --dist loadgroup "$@"

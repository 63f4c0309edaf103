#!/usr/bin/env bash
# Every check that CI runs: ruff, shellcheck, pytest with the real mlx_lm on models/tiny-gemma3 and on Gemma 3 270M.
# Needs python3, and a network for the first run.
#
#   ./test.sh                        all; 238 MB are fetched once for Gemma 3 270M
#   ./test.sh --quick                what takes a minute on two cores: no training, no real model
#   ./test.sh tests/test_prompt.py   arguments go to pytest

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

if [ "${1:-}" = --quick ]; then
  shift
  set -- -m "not slow and not real" "$@"
fi

need_venv tests/requirements.txt
export OPENBLAS_NUM_THREADS=1 # two test processes with a thread each, not two that wait for one another
run ruff check .
run ruff format --check .
run shellcheck -x config.sh ./*.sh .ci/run
run python -m pytest -n 2 --dist loadgroup "$@"

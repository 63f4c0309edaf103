#!/usr/bin/env bash
# Every check that CI runs: ruff, shellcheck, pytest with the real mlx_lm on models/tiny-gemma3. Needs python3 only.
#
#   ./test.sh                        all
#   ./test.sh tests/test_prompt.py   arguments go to pytest

# shellcheck source=config.sh
. "$(dirname "$0")/config.sh"

need_venv tests/requirements.txt
export OPENBLAS_NUM_THREADS=1 # two test processes with a thread each, not two that wait for one another
run ruff check .
run ruff format --check .
run shellcheck -x config.sh ./*.sh .ci/run
run python -m pytest -n 2 --dist loadgroup "$@"

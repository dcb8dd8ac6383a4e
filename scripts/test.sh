#!/usr/bin/env bash
# Checks the style, then runs the tests on one process per core, at most four.
# A test uses one thread. Arguments are passed to pytest: bash scripts/test.sh -k resume -n 0
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if ! cmp -s requirements-extras.txt .venv/installed-extras.txt; then
    echo "installing requirements-extras.txt into .venv"
    pip install --quiet -r requirements-extras.txt &&
        cp requirements-extras.txt .venv/installed-extras.txt ||
        echo "not installed: tests that need these packages are skipped"
fi
# The tests also compile the kernels with the Triton version of PyTorch 2.13 for CUDA.
if [ "$(uname -s)" = Linux ] && [ ! -d data/triton-3.7 ]; then
    echo "installing triton 3.7 into data/triton-3.7"
    pip install --quiet --upgrade --no-deps --target data/triton-3.7.tmp 'triton==3.7.*' &&
        mv data/triton-3.7.tmp data/triton-3.7 ||
        echo "not installed: the tests compile the kernels only with the installed Triton"
fi
ruff check .
ruff format --check --quiet . || { echo "not formatted: run ruff format ."; exit 1; }
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

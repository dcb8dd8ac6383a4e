#!/usr/bin/env bash
# Checks the style, then runs the tests, a file at a time on each core, on at most four of them: a
# test computes with one thread. Arguments go to pytest: bash scripts/test.sh -k resume -n 0
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if ! cmp -s requirements-extras.txt .venv/installed-extras.txt; then
    echo "installing requirements-extras.txt into .venv"
    pip install --quiet -r requirements-extras.txt &&
        cp requirements-extras.txt .venv/installed-extras.txt ||
        echo "not installed: the tests of what needs them are skipped"
fi
# Kernels are also compiled by the Triton that PyTorch 2.13 for CUDA brings.
if [ "$(uname -s)" = Linux ] && [ ! -d data/triton-3.7 ]; then
    echo "installing triton 3.7 into data/triton-3.7"
    pip install --quiet --upgrade --no-deps --target data/triton-3.7.tmp 'triton==3.7.*' &&
        mv data/triton-3.7.tmp data/triton-3.7 ||
        echo "not installed: kernels are compiled by the installed Triton only"
fi
ruff check .
ruff format --check --quiet . || { echo "not formatted: run ruff format ."; exit 1; }
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Checks the style, then runs the tests on one process per core, at most four.
#
#     bash scripts/test.sh                  # all tests
#     bash scripts/test.sh core             # those of the core that take a minute
#     bash scripts/test.sh -k resume -n 0   # arguments for pytest
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if ! cmp -s requirements-extras.txt .venv/installed-extras.txt; then
    echo "installing requirements-extras.txt into .venv"
    pip install --quiet -r requirements-extras.txt &&
        cp requirements-extras.txt .venv/installed-extras.txt ||
        echo "not installed: tests that need these packages are skipped"
fi
ruff check .
ruff format --check --quiet . || { echo "not formatted: run ruff format ."; exit 1; }
[ "${1:-}" != core ] || set -- tests --core "${@:2}"
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

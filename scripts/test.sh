#!/usr/bin/env bash
# Checks the style, then runs the tests. Arguments go to pytest: bash scripts/test.sh -k resume
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check --quiet . || { echo "not formatted: run ruff format ."; exit 1; }
exec python -m pytest "$@"

"""The tests of all folders share the fixtures of tests/helpers.py."""

import os
import sys

# Without a GPU, Triton interprets its kernels. It reads this when it is imported, as helpers does;
# workers of pytest-xdist inherit it.
if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["helpers"]

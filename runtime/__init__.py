"""Processes, errors and files: what every script stands on."""

import os

# Threads that wait for each other try this many times before they sleep. GNU OpenMP's default, some
# milliseconds, doubles a step's time beside another program. It is read as torch is loaded, so this
# acts where torch is imported later: in training, sampling and expert_data.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

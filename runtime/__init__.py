"""Processes, errors and files: what every script stands on, and imports before torch."""

import os

# Threads that wait for each other try this many times before they sleep (GNU OpenMP, which reads it
# as torch is loaded). Its default, some milliseconds, doubles a step's time beside another program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

"""The checks of check_gpu.py: numbers, speed, memory and whole runs, each against a threshold."""

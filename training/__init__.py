"""A run: its config, start, loop, optimizers, averages, log and checkpoints."""

"""Training runs: config, start, loop, optimizers, EMAs, logs and checkpoints."""

"""What the entry scripts share: processes, data, autoencoder, checkpoints, the training loop."""

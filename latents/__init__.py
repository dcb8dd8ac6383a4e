"""From images to latents: image sources, reading order, autoencoder, cache."""

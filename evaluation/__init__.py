"""Evaluation: image sets, features, metrics, generated images, and the held-out loss."""

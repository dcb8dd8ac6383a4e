"""Metrics and references: image sets, features, scores, drawn images, and the held-out loss."""

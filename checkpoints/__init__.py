"""Weights in and out: our files, published layouts, diffusers, the hub, upcycling."""

from checkpoints.checkpoint import load_model

__all__ = ["load_model"]

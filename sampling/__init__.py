"""From a checkpoint and flags to images: pipeline, generation, grids, export."""

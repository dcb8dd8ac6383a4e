"""SHA-256 of files and of weights: what decided a result, by content and not by name."""

import hashlib

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights, whatever file they came from."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

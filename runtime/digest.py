"""SHA-256 of files and of weights: what decided a result, by content and not by name."""

import hashlib
from pathlib import Path

import torch
from torch import nn


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights, whatever file they came from."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

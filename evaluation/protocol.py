"""What decides a number besides the images: versions, the commit, the device.

For results.json, so that two numbers can be compared, or known not to be comparable.
"""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "torch", "torchvision", "diffusers", "timm", "torch-fidelity", "numpy", "pillow",
    "safetensors",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """The versions of Python and of the packages that touch an image or a metric."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


def commit() -> str | None:
    """The git commit of this code, "-dirty" added if files differ from it; None outside git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

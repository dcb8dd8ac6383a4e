"""Weights by hub id, OWNER/NAME[@REVISION][:FILE], through huggingface_hub."""

import re
from pathlib import Path

from runtime.errors import reported_as

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w./-]+))?")
WHOLE_MODEL = (
    "model.safetensors", "model.pt", "config.json", "diffusion_pytorch_model*", "transformer/*",
    "vae/*",
)  # fmt: skip


def fetch(path: str | Path) -> tuple[Path, dict | None]:
    """Downloads what a hub id names, a file or a model, unless the hub's cache holds it.

    Returns its path and {"hub", "revision": the commit}; or the path given and None if it is there,
    or is no hub id. UserError when it cannot be had.
    """
    match = HUB_ID.fullmatch(str(path))
    if match is None or Path(path).exists():
        return Path(path), None
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import

    repo, revision, file = match.groups()
    message = (
        f"{path}: got no such path and nothing from the hub, expected a local copy or a hub id"
    )
    with reported_as(message, Exception):  # huggingface_hub and its transport each raise their own
        if file:
            local = hf_hub_download(repo, file, revision=revision)
        else:
            local = snapshot_download(repo, revision=revision, allow_patterns=list(WHOLE_MODEL))
    parts = Path(local).parts
    return Path(local), {"hub": str(path), "revision": parts[parts.index("snapshots") + 1]}

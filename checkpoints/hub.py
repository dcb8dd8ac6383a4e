"""Weights by hub id, OWNER/NAME[@REVISION][:FILE], through huggingface_hub."""

import re
from pathlib import Path

from runtime.errors import UserError

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
    try:
        if file:
            local = hf_hub_download(repo, file, revision=revision)
        else:
            local = snapshot_download(repo, revision=revision, allow_patterns=list(WHOLE_MODEL))
    except Exception as error:  # huggingface_hub, its transport and the system each raise their own
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
        raise UserError(
            f"{path}: got no such file or folder here, nor from the hub ({reason}), expected one: "
            "give the path of a local copy"
        ) from None
    parts = Path(local).parts
    return Path(local), {"hub": str(path), "revision": parts[parts.index("snapshots") + 1]}

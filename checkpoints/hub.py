"""Weights by hub id, OWNER/NAME[@REVISION][:FILE], through huggingface_hub.

path, source = fetch("feizhengcong/DiT-MoE:dit_moe_s_8E2A.pt")
"""

import re
from pathlib import Path

from runtime.errors import UserError
from runtime.files import file_digest

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w./-]+))?")
WHOLE_MODEL = [
    "model.safetensors", "model.pt", "config.json", "transformer/*.json",
    "transformer/*.safetensors", "vae/*.json", "vae/*.safetensors",
]  # fmt: skip


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is nothing on this machine reads as a hub id."""
    path = str(path)
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def fetch(hub_id: str) -> tuple[Path, dict]:
    """Downloads a file, or the weights of a whole model, unless the hub's cache holds them.

    Returns the local path and where it came from: {"hub", "revision": the commit, "sha256": of the
    file, absent for a whole model}. UserError when it cannot be had.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import

    repo, revision, file = HUB_ID.fullmatch(hub_id).groups()
    try:
        if file:
            path = Path(hf_hub_download(repo, file, revision=revision))
        else:
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=WHOLE_MODEL))
    except Exception as error:  # huggingface_hub, its transport and the system each raise their own
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{hub_id}: got no such file or folder here, nor from the hub "
            f"({type(error).__name__}: {reason}): give the path of a local copy instead"
        ) from None
    parts = path.parts
    source = {"hub": hub_id, "revision": parts[parts.index("snapshots") + 1]}
    return path, {**source, "sha256": file_digest(path)} if file else source

"""Weights by hub id, OWNER/NAME[@REVISION][:FILE], through huggingface_hub.

path, source = fetch("feizhengcong/DiT-MoE:dit_moe_s_8E2A.pt")
"""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from runtime.errors import UserError
from runtime.files import file_digest

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w./-]+))?")
WHOLE_MODEL = [
    "model.safetensors",
    "config.json",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
]


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is nothing on this machine reads as a hub id."""
    path = str(path)
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def fetch(hub_id: str) -> tuple[Path, dict]:
    """Downloads a file, or the weights of a whole model, unless the hub's cache holds them.

    Returns the local path and where it came from: {"hub", "revision": the commit, "sha256": of the
    file, absent for a whole model}. UserError when it cannot be had.
    """
    repo, revision, file = HUB_ID.fullmatch(str(hub_id)).groups()
    try:
        if file:
            path = Path(hf_hub_download(repo, file, revision=revision))
        else:
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=WHOLE_MODEL))
    except Exception as error:  # huggingface_hub, its transport and the system each raise their own
        reason = " ".join(str(error).split())[:160]
        local = f"a local copy of {file}" if file else "a local folder"
        raise UserError(
            f"{hub_id}: no such file or folder here, and the hub cannot be reached or has none "
            f"({type(error).__name__}: {reason}): give the path of {local} instead"
        ) from None
    parts = path.parts
    source = {"hub": str(hub_id), "revision": parts[parts.index("snapshots") + 1]}
    return path, {**source, "sha256": checksum(path)} if file else source


def checksum(path: Path) -> str:
    """The SHA-256 of a file; the cache names large files by it, so those are not read again."""
    name = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return name
    return file_digest(path)

"""Where a script is to write: looked at before any work is done."""

import tempfile
from pathlib import Path

from runtime.errors import UserError


def prepare_output(flag: str, path: Path) -> None:
    """Makes the folder of a file and checks that the file can be written; UserError if not."""
    if path.is_dir():
        raise UserError(f"{flag}: got the folder {path}, expected a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path} ({error.strerror})") from None


def check_new_folder(flag: str, path: Path) -> None:
    """Raises UserError unless a path is a folder that is empty or not there yet."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}: got {path}, expected a new or empty folder")

"""Components of one's own: the Python files of --plugin, which are imported before they are needed.

Only files that the user names are imported, never files that a checkpoint or a recipe names.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable

from runtime.errors import UserError

PLUGIN = "plugin:"  # begins the names of the modules


def import_plugins(paths: Iterable[str | os.PathLike]) -> None:
    """Imports Python files, each once."""
    for path in map(os.path.realpath, paths):
        name = f"{PLUGIN}{path}"
        if not path.endswith(".py") or not os.path.isfile(path):
            raise UserError(f"--plugin: got {path}, expected a Python file")
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise

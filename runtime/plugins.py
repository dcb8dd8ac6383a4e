"""Components of one's own: the Python files of --plugin, which are imported before they are needed.

Only files that the user names are imported, never files that a checkpoint or a recipe names.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile

from runtime.errors import UserError


def named_plugins(arguments: Sequence[str] | None = None) -> list[str]:
    """Returns the files of --plugin in a command, by default sys.argv, without parsing the rest.

    The options of a component are flags only after the component was imported.
    """
    words, found = sys.argv[1:] if arguments is None else arguments, []
    for place, word in enumerate(words):
        if word == "--plugin":
            found += takewhile(lambda word: not word.startswith("--"), words[place + 1 :])
        elif word.startswith("--plugin="):
            found.append(word.removeprefix("--plugin="))
    return found


def import_plugins(paths: Iterable[str | os.PathLike]) -> None:
    """Imports Python files, each once."""
    for path in map(os.path.realpath, paths):
        name = f"plugin:{path}"
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

"""A user's mistake ends a script with one clear line and exit code 2, without a traceback."""

import functools
import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right; the message is one line with what was got and expected."""


MAX_LINE = 2000  # characters


def printable(text: str) -> str:
    """One line of text that a terminal only shows: what a file's names say commands nothing."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ..."


def exit_on_user_error(main: Callable) -> Callable:
    """Decorates a script's `main`: a UserError prints `error: ...` and exits with code 2.

    In a distributed run every rank meets the same mistake, so only rank 0 speaks at once. Another
    rank waits for the launcher to end it and speaks only if rank 0 met no mistake.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            rank = int(os.environ.get("RANK", 0))
            if rank:
                time.sleep(3)
            line = printable(str(error))
            print(f"error: {line}" + (f" (rank {rank})" if rank else ""), file=sys.stderr)
            sys.exit(2)

    return wrapped

"""A user's mistake ends a script with one clear line and exit code 2, without a traceback."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn, TextIO

USER_ERROR = 2  # exit code
INTERRUPTED = 128 + signal.SIGINT
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be started again, as schedulers read it
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can put right; the message is one line with what was got and expected."""


@contextmanager
def reported_as(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what is raised meanwhile, if it is of these kinds, into a UserError: MESSAGE (why)."""
    try:
        yield
    except kinds as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError) and " " not in reason:  # a name alone says nothing
            reason = f"got no {reason}"
        raise UserError(f"{message} ({printable(reason)[:300]})") from None


def check_same(message: str, got: dict, expected: dict) -> None:
    """Raises UserError unless two dicts are equal: MESSAGE: NAME: got A, expected B; ..."""
    differing = [
        f"{name}: got {got.get(name)!s:.300}, expected {expected.get(name)!s:.300}"
        for name in sorted(got.keys() | expected.keys())
        if got.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(f"{message}: {'; '.join(differing)}")


def counted(number: int, noun: str) -> str:
    """Such as "1 class" or "1,200 images"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def printable(text: str) -> str:
    """Makes text one line without control characters, which could command a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line; a full disk, or nobody at the other end of the pipe, stops nothing."""
    with suppress(OSError):
        print(line, file=file, flush=True)


earlier_hook = sys.excepthook  # of the program that imports this


def say_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """sys.excepthook: Ctrl-C while a script still imports is one line, as in `run_main`."""
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted", file=sys.stderr)
    else:
        earlier_hook(kind, error, trace)


def run_main(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Calls a script's `main` and exits with the code that it returns, or after a UserError with 2.

    The error is one line, `error: ...`; so are a full disk and Ctrl-C, which says `interrupted`. In
    a distributed run every rank meets the same mistake, so only rank 0 speaks at once. Another rank
    waits for the launcher to end it and speaks only if rank 0 met no mistake.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_IS_FULL:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run that was stopped ignores it
            time.sleep(3)
        line = f"error: {printable(str(error))}" + (f" (rank {rank})" if rank else "")
        say(line, file=sys.stderr)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends its own words with it
            with suppress(OSError), open(path, "w") as file:
                json.dump({"message": line, "timestamp": int(time.time())}, file)
        sys.exit(USER_ERROR)

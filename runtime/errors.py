"""Errors for the user: one clear line and exit code 2 in place of a traceback."""

import difflib
import errno
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO

USER_ERROR = 2  # exit code
INTERRUPTED = 128 + signal.SIGINT
STOPPED = 75  # EX_TEMPFAIL in sysexits.h, which schedulers read as "start this again"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what was got and expected."""


@contextmanager
def reported_as(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds, raised in the block, into a UserError: MESSAGE (reason)."""
    try:
        yield
    except kinds as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError) and " " not in reason:  # the message is only the key
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


def pluralize(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 class" or "1,200 images"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def did_you_mean(word: str, known: Mapping[str, str]) -> str:
    """Returns "; did you mean TEXT?" for the name most similar to a word; "" if none is similar.

    known: the text to show for each name
    """
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {known[close[0]]}?" if close else ""


def printable(text: str) -> str:
    """Joins text into one line and replaces control characters, which a terminal would obey."""
    line = re.sub(r"\s*[\r\n]\s*", " ", text.lstrip("\r\n").rstrip().expandtabs(1))
    return "".join(c if c.isprintable() else "?" for c in line)


def print_safely(line: str, file: TextIO | None = None) -> None:
    """Prints a line, `printable`, ignoring write errors such as a full disk or a closed pipe."""
    with suppress(OSError):
        print(printable(line), file=file, flush=True)


def end_while_importing(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: ends a process that imports packages, which would turn a KeyboardInterrupt
    into other exceptions; otherwise raises KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            print_safely("interrupted", file=sys.stderr)
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run_main(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Calls a script's `main` and exits with the code that `main` returns, or with 2 after a
    UserError.

    A UserError and a full disk are printed as one line, `error: ...`; Ctrl-C prints `interrupted`.
    In a distributed run, rank 0 prints at once. The other ranks, which usually meet the same
    mistake, print only if the launcher has not stopped them after three seconds.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print_safely(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not drop_unread_output():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_IS_FULL:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a stopped run ignores this signal
            time.sleep(3)
        line = f"error: {printable(str(error))}" + (f" (rank {rank})" if rank else "")
        print_safely(line, file=sys.stderr)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints this message
            with suppress(OSError), open(path, "w") as file:
                json.dump({"message": line, "timestamp": int(time.time())}, file)
        sys.exit(USER_ERROR)
    finally:
        drop_unread_output()


def drop_unread_output() -> bool:
    """Discards further output if its reader has ended, as `head` does; returns whether it has."""
    with suppress(OSError):  # such as a full disk, which the interpreter reports
        sys.stdout.flush()
    poll = select.poll()
    with suppress(OSError, ValueError):  # no file, as in a notebook
        poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True

"""Standard input, output and error of a command, whatever it was started with."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

_UNLIMITED: Final = ("utf-8", "utf-16", "utf-32")


def prepare() -> None:
    """Make the standard streams fit to be used.

    One that was closed (`<&-`) becomes /dev/null: else the next file that is opened would take its place.
    Arguments and output are UTF-8, also where the locale knows no such character.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.encoding.lower().startswith(_UNLIMITED):
            stream.reconfigure(encoding="utf-8")
    sys.argv = [os.fsencode(argument).decode("utf-8", "replace") for argument in sys.argv]


class NobodyReads(Exception):
    """The other end of standard output is closed; no OSError, since click ends at that with code 1."""


def is_theirs(error: Exception) -> bool:
    """Whether an error is one of writing a stream; files are named by their users."""
    codes = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
    is_full = isinstance(error, OSError) and error.filename is None and error.errno in codes
    return is_full or isinstance(error, NobodyReads)


def flush() -> None:
    """Write what waits in standard output and error; they are not used any more.

    Raises:
        OSError: They cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def abandon(*, but_errors: bool = False) -> None:
    """Throw away what waits in the streams: at the exit of the process it would fail again.

    Args:
        but_errors: Standard error is still used.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1,) if but_errors else (1, 2):
        os.dup2(null, descriptor)

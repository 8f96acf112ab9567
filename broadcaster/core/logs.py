"""Logging setup of a process: one line per message, flushed at once."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any, Final, TextIO

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.redaction import scrub
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.core.text import escaped

_CAUSES: Final = 256
"""So many are known at a time."""


class ThrottledLog:
    """A log in which each cause has one line in a while; the next one says how many were left out."""

    def __init__(self, logger: logging.Logger, every_s: float = 60.0, *, clock: Clock = CLOCK) -> None:
        self._logger = logger
        self._every_s = every_s
        self._clock = clock
        self._causes = BoundedDict[str, tuple[float, int]](_CAUSES)  # when it was logged, and how many came since

    def log(self, level: int, cause: str, message: str, *arguments: object) -> bool:
        """Log a message unless one of the same cause was logged a short while ago; return whether it was."""
        now = self._clock.loop_s()
        at, left_out = self._causes.get(cause, (-math.inf, 0))
        if now - at < self._every_s:
            self._causes[cause] = at, left_out + 1
            return False
        self._causes[cause] = now, 0
        more = f" ({left_out} more like this since the last one)" if left_out else ""
        self._logger.log(level, message + more, *arguments)
        return True


class _SafeFormatter(logging.Formatter):
    """Shows no secret, also of tracebacks; and no control character, as a message may quote a peer."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(scrub(super().format(record)))


class Scrubbed:
    """A text stream that writes no secret: for whatever a library or the interpreter writes to stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def configure_logging(stream: TextIO | None = None) -> None:
    """Log bare messages to stdout, or to `stream`; flush every line, as stdout is a pipe under honcho."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(line_buffering=True, errors="backslashreplace")
    logging.raiseExceptions = False  # where nobody reads the log, or its disk is full, the work goes on
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("sanic", "websockets", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

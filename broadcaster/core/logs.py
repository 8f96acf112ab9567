"""Logging setup of a process: one line per message, flushed at once."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from broadcaster.core.text import escaped


class _EscapingFormatter(logging.Formatter):
    """Escapes control characters: a message may quote a peer, and must not control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def configure_logging(stream: TextIO | None = None) -> None:
    """Log bare messages to stdout, or to `stream`; flush every line, as stdout is a pipe under honcho."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(line_buffering=True, errors="backslashreplace")
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_EscapingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("sanic", "websockets", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

"""Disposal of the library's sans-I/O protocols without garbage, and the logger that keeps them silent."""

from __future__ import annotations

import logging
from typing import Final

from websockets.protocol import Protocol

QUIET: Final = logging.getLogger("broadcaster.wire")
QUIET.setLevel(logging.CRITICAL)  # errors of a peer are counted, not logged


def dispose(protocol: Protocol) -> None:
    """Break the reference cycles of protocol and parser: thousands would wait for the garbage collector."""
    protocol.parser.close()
    del protocol.parser
    for error in (protocol.handshake_exc, protocol.parser_exc):
        _clear_tracebacks(error)


def _clear_tracebacks(error: BaseException | None) -> None:
    """Clear the tracebacks of an error and its causes: they hold stack frames, and these hold the protocol."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__

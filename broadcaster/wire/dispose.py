"""What all users of the sans-I/O protocols do: log nothing, and leave no garbage."""

from __future__ import annotations

import logging
from typing import Final

from websockets.protocol import Protocol

QUIET: Final = logging.getLogger("broadcaster.wire")
QUIET.setLevel(logging.CRITICAL)  # a peer's mistake is the peer's; it is counted, not logged


def dispose(protocol: Protocol) -> None:
    """Break the cycles of protocol and parser: thousands of them would wait for the garbage collector."""
    protocol.parser.close()
    del protocol.parser
    for error in (protocol.handshake_exc, protocol.parser_exc):
        _let_go_of_frames(error)


def _let_go_of_frames(error: BaseException | None) -> None:
    """An error's traceback holds the frames it went through, and they hold the protocol."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__

"""What all users of the sans-I/O protocols do: log nothing, and leave no garbage."""

from __future__ import annotations

import logging
from typing import Final

from websockets.protocol import Protocol

QUIET: Final = logging.getLogger("broadcaster.wire")
QUIET.setLevel(logging.CRITICAL)  # a peer's mistake is the peer's; it is counted, not logged


def let_go(protocol: Protocol) -> None:
    """Break the cycle of protocol and parser: thousands of them would wait for the garbage collector."""
    protocol.parser.close()
    del protocol.parser

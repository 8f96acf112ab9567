"""WebSocket frames as the hub writes them: text, ping and close, and the close codes."""

from __future__ import annotations

import enum
from typing import Final

from websockets.frames import Close, Frame, Opcode

PLAIN: Final = "broadcaster.plain"
"""Subprotocol of a client that wants one text frame per event and nothing else; also the default."""

V1: Final = "broadcaster.v1"
"""Subprotocol of a client that also wants the control frames."""

PING: Final = Frame(Opcode.PING, b"").serialize(mask=False)


class CloseCode(enum.IntEnum):
    """The close codes of the hub; docs/contract.md says for each whether a client should reconnect."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    INVALID_TEXT = 1007
    POLICY = 1008
    MESSAGE_TOO_BIG = 1009
    PING_TIMEOUT = 1011
    RESTART = 1012
    EXPIRED = 4001
    SLOW = 4008
    GAP = 4009
    UNAVAILABLE = 4010


TRY_LATER: Final = 1013
"""Close code of other servers that cannot serve now (a hub refuses the handshake)."""


def text_frame(payload: bytes) -> bytes:
    """One event as one unmasked text frame (RFC 6455 5.2): as `Frame.serialize`, in a tenth of the time."""
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def payload_of(frame: bytes) -> bytes:
    """What a whole unmasked frame carries."""
    return frame[{126: 4, 127: 10}.get(frame[1], 2) :]


def close_frame(code: CloseCode, reason: str) -> bytes:
    """A close frame; `reason` is cut to the 123 bytes the protocol allows."""
    fitting = reason.encode()[:123].decode(errors="ignore")
    return Frame(Opcode.CLOSE, Close(code, fitting).serialize()).serialize(mask=False)


def is_whole_control_frame(data: bytes) -> bool:
    """Whether `data` is exactly one masked control frame.

    Such data leaves no state behind, so the parser that reads it need not be kept: most subscribers never send
    anything else.
    """
    return len(data) >= 6 and data[0] in (0x88, 0x89, 0x8A) and data[1] == 0x80 + len(data) - 6 < 0xFE


def is_close(data: bytes) -> bool:
    """Whether a whole control frame is a close."""
    return data[0] == 0x88


def is_pong(data: bytes) -> bool:
    """Whether a whole control frame is a pong."""
    return data[0] == 0x8A


def is_final_refusal(status: int) -> bool:
    """Whether a handshake refused with this HTTP status would be refused again (4xx, except 408 and 429)."""
    return status in range(400, 500) and status not in (408, 429)

"""The WebSocket wire: handshake, frames, control frames, close codes. Bytes in, bytes out; no sockets.

Sole home of the `websockets` package. The hub offers no extensions, so a frame is the same for every
subscriber and is built once per event.
"""

from __future__ import annotations

import codecs
import enum
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

PLAIN: Final = "broadcaster.plain"
"""Subprotocol of a client that wants one text frame per event and nothing else; also the default."""

V1: Final = "broadcaster.v1"
"""Subprotocol of a client that also wants the control frames."""

PING: Final = Frame(Opcode.PING, b"").serialize(mask=False)
HEAD_END: Final = b"\r\n\r\n"

_QUIET: Final = logging.getLogger("broadcaster.wire")
_QUIET.setLevel(logging.CRITICAL)  # a peer's mistake is the peer's; it is counted, not logged


class CloseCode(enum.IntEnum):
    """Why a connection ended, and whether to come back (`come_back`)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    INVALID_TEXT = 1007
    MESSAGE_TOO_BIG = 1009
    PING_TIMEOUT = 1011
    RESTART = 1012
    SLOW = 4008
    HOLE = 4009

    @property
    def come_back(self) -> str:
        """Advice for the client's author."""
        return _COME_BACK[self]


_COME_BACK: Final = {
    CloseCode.NORMAL: "as you like",
    CloseCode.PROTOCOL_ERROR: "no: mend the client",
    CloseCode.INVALID_TEXT: "no: mend the client",
    CloseCode.MESSAGE_TOO_BIG: "no: send less",
    CloseCode.PING_TIMEOUT: "yes",
    CloseCode.RESTART: "yes, after a random delay",
    CloseCode.SLOW: "yes; events were missed",
    CloseCode.HOLE: "yes; events may have been missed",
}


def text_frame(payload: bytes) -> bytes:
    """One event as one unmasked text frame (RFC 6455 5.2): as `Frame.serialize`, in a tenth of the time."""
    size = len(payload)
    if size < 126:
        return b"\x81" + size.to_bytes(1) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def control_frame(control: str, channel: str, **fields: object) -> bytes:
    """A small JSON frame for `broadcaster.v1`: `{"control": control, "channel": channel, ...}`."""
    return text_frame(json.dumps({"control": control, "channel": channel, **fields}).encode())


def close_frame(code: CloseCode, reason: str) -> bytes:
    """A close frame; `reason` is cut to the 123 bytes the protocol allows."""
    return Frame(Opcode.CLOSE, Close(code, reason[:120]).serialize()).serialize(mask=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer other than 101."""

    status: int
    reason: str
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a client asks for in its request line."""

    path: str
    query: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, path: str) -> Target:
        parts = urlsplit(path)
        return cls(parts.path, tuple(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=64)))


@dataclass(frozen=True, slots=True)
class Answer:
    """The hub's answer to an upgrade request.

    Attributes:
        response: Bytes to write.
        accepted: Whether the connection is a WebSocket now; otherwise write and close.
        subprotocol: The selected one, or None.
    """

    response: bytes
    accepted: bool
    subprotocol: str | None = None


def answer_upgrade(head: bytes, admit: Callable[[Target], Refusal | None]) -> Answer:
    """Check a complete request head as RFC 6455 says, ask `admit`, and build the answer.

    Args:
        head: The request up to and including its empty line.
        admit: Called with the target of a well-formed request; a refusal is sent instead of the 101.
    """
    protocol = _Handshake(logger=_QUIET)
    protocol.receive_data(head)
    accepted = False
    for request in protocol.events_received():  # none if malformed: the protocol has written its refusal
        assert isinstance(request, Request)
        response = protocol.accept(request)
        if response.status_code == 101 and (refusal := _ask(admit, request.path)):
            response = protocol.reject(refusal.status, refusal.reason + "\n")
            if refusal.retry_after_s is not None:
                response.headers["Retry-After"] = str(refusal.retry_after_s)
        protocol.send_response(response)
        accepted = response.status_code == 101
    answer = Answer(b"".join(protocol.data_to_send()), accepted, protocol.subprotocol if accepted else None)
    _let_go(protocol)
    return answer


def plain_response(status: int, phrase: str) -> bytes:
    """A complete HTTP response that ends the connection, for requests too broken to be parsed."""
    body = f"{phrase}\n".encode()
    head = f"HTTP/1.1 {status} {phrase}\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _ask(admit: Callable[[Target], Refusal | None], path: str) -> Refusal | None:
    try:
        target = Target.parse(path)
    except ValueError as error:
        return Refusal(400, f"bad request target: {error}")
    return admit(target)


class _Handshake(ServerProtocol):
    """The library's handshake, but for the choice of a subprotocol: ours, or none, and nobody is refused."""

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        return next((Subprotocol(ours) for ours in (V1, PLAIN) if ours in subprotocols), None)


def _let_go(protocol: ServerProtocol) -> None:
    """Break the cycle of protocol and parser: thousands of them would wait for the garbage collector."""
    protocol.parser.close()
    del protocol.parser


def is_whole_control_frame(data: bytes) -> bool:
    """Whether `data` is one masked control frame, no more and no less.

    Such a chunk leaves no state behind, so the parser that reads it need not be kept: this is all that most
    subscribers ever send.
    """
    return len(data) >= 6 and data[0] in (0x88, 0x89, 0x8A) and data[1] == 0x80 + len(data) - 6 < 0xFE


def is_pong(data: bytes) -> bool:
    """Whether a whole control frame is a pong."""
    return data[0] == 0x8A


class Inbound:
    """Reads what a subscriber sends, answers what the protocol demands, drops the rest.

    Made only when a subscriber talks (see `is_whole_control_frame`): silent connections do not pay for it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._protocol = ServerProtocol(state=OPEN, max_size=max_bytes, logger=_QUIET)
        self._text: codecs.IncrementalDecoder | None = None
        self.messages = 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the client; return what is to be written back (pongs, a close frame)."""
        protocol = self._protocol
        protocol.receive_data(data)
        for frame in protocol.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._check_text(frame)
        return b"".join(protocol.data_to_send())

    def let_go(self) -> None:
        """Free the memory now; nothing can be fed any more."""
        _let_go(self._protocol)

    @property
    def ended(self) -> bool:
        """Whether the conversation is over: the client closed, or broke the protocol."""
        return self._protocol.state is not OPEN

    @property
    def closed_by_client(self) -> bool:
        return self._protocol.close_rcvd is not None

    def _check_text(self, frame: Frame) -> None:
        """Text must be UTF-8, also when a character is split between two fragments (RFC 6455 8.1)."""
        if frame.opcode is Opcode.TEXT:
            self._text = codecs.getincrementaldecoder("utf-8")()
        elif frame.opcode is Opcode.BINARY:
            self._text = None
        try:
            if self._text is not None:
                self._text.decode(bytes(frame.data), final=frame.fin)
        except UnicodeDecodeError:
            if self._protocol.state is OPEN:
                self._protocol.fail(CloseCode.INVALID_TEXT, "text is not UTF-8")
        if frame.fin:
            self.messages += 1


class Outbound:
    """The client's side of one connection, for those who stamp first and parse later (the fleet)."""

    def __init__(self, url: str, subprotocol: str = PLAIN) -> None:
        self._protocol = ClientProtocol(
            parse_uri(url), subprotocols=[Subprotocol(subprotocol)], max_size=None, logger=_QUIET
        )
        self._fragments: list[bytes] = []
        self.connected = False
        self.failure: str | None = None

    def request(self) -> bytes:
        """The upgrade request."""
        self._protocol.send_request(self._protocol.connect())
        return b"".join(self._protocol.data_to_send())

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes from the hub; return the messages that they complete."""
        protocol = self._protocol
        protocol.receive_data(data)
        messages = []
        for event in protocol.events_received():
            if isinstance(event, Response):
                self.connected = protocol.state is OPEN
                if not self.connected:
                    self.failure = f"refused: {event.status_code} {event.reason_phrase}"
            elif isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._fragments.append(bytes(event.data))
                if event.fin:
                    messages.append(b"".join(self._fragments))
                    self._fragments.clear()
        if protocol.handshake_exc and not self.failure:
            self.failure = str(protocol.handshake_exc)
        return messages

    def pong(self) -> bytes:
        """An answer to an empty ping, given before the ping is parsed."""
        if self._protocol.state not in (State.OPEN, State.CLOSING):
            return b""
        self._protocol.send_pong(b"")
        return self.to_send()

    def close(self) -> bytes:
        """A close frame (1000), once."""
        if self._protocol.state is OPEN:
            self._protocol.send_close(CloseCode.NORMAL)
        return self.to_send()

    def to_send(self) -> bytes:
        """What the protocol wants written: pongs, the answer to a close."""
        return b"".join(self._protocol.data_to_send())

    @property
    def close_code(self) -> int | None:
        """The code the hub closed with, if it did."""
        close = self._protocol.close_rcvd
        return close.code if close else None


def open_connection(url: str, *, timeout_s: float, max_queue: int) -> connect:
    """A subscriber's connection to a hub: `async with open_connection(...) as connection`.

    No compression (the hub offers none), no proxy (it is asked for by the environment even for localhost).
    """
    return connect(
        url,
        subprotocols=[Subprotocol(V1)],
        compression=None,
        proxy=None,
        open_timeout=timeout_s,
        close_timeout=timeout_s,
        max_queue=max_queue,
        max_size=None,
    )


def refused_for_good(error: InvalidHandshake) -> str | None:
    """What the hub said if its refusal will be the same next time (4xx, but for 408 and 429); else None."""
    if not isinstance(error, InvalidStatus):
        return None
    response = error.response
    if response.status_code not in range(400, 500) or response.status_code in (408, 429):
        return None
    return f"{response.status_code} {bytes(response.body or b'').decode(errors='replace').strip()[:200]}"


def read_control(message: bytes) -> dict[str, Any] | None:
    """The fields of a control frame; None if the message is anything else.

    A foreign event may have a field `control`, too; it has an `event_id`, which no control frame has.
    """
    if not message.startswith(_CONTROL):
        return None
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        return None
    return None if not isinstance(fields, dict) or "event_id" in fields else fields


_CONTROL: Final = b'{"control": '

__all__ = [
    "HEAD_END",
    "PING",
    "PLAIN",
    "V1",
    "Answer",
    "ClientConnection",
    "CloseCode",
    "ConnectionClosed",
    "Inbound",
    "InvalidHandshake",
    "Outbound",
    "Refusal",
    "Target",
    "answer_upgrade",
    "close_frame",
    "control_frame",
    "is_pong",
    "is_whole_control_frame",
    "open_connection",
    "plain_response",
    "read_control",
    "refused_for_good",
    "text_frame",
]

"""The first bytes of a connection: a WebSocket upgrade is answered here, everything else is Sanic's.

Sanic's own WebSocket route keeps 5 tasks and 26 KB per connection and waits for each client's socket.
Given to Sanic as its protocol, this one looks at the request head; a WebSocket's transport goes to
`Connection`, any other goes with the bytes read so far to Sanic's `HttpProtocol`.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any, Final

from httptools import parse_url
from httptools.parser.errors import HttpParserInvalidURLError
from sanic.server import HttpProtocol

from broadcaster import wire
from broadcaster.hub.connection import Connection
from broadcaster.hub.gate import Gate
from broadcaster.hub.pacer import Pacer
from broadcaster.hub.roster import Roster

_REQUEST_LINE: Final = re.compile(rb"[A-Z]{1,16} (\S+) HTTP/1\.[01]\r\n")
_WEBSOCKET_PATH: Final = re.compile(rb"/ws(\?|$)")
UNSENT_BYTES: Final = 65_536
"""Bytes that wait for one socket; beyond them a subscriber is fed from the ring."""

_RETRY: Final = "Retry-After: 1\r\n"


class Front(asyncio.Protocol):
    """Reads one request head: at most `header_max_bytes` of it, for at most the gate's deadline.

    Made by Sanic's server with the arguments of `HttpProtocol`, which are handed on when it is not for us.
    """

    __slots__ = ("_head", "_sanic_arguments", "_transport", "_waiting", "deadline")

    gate: Gate
    roster: Roster
    pacer: Pacer
    header_max_bytes: int

    def __init__(self, **sanic_arguments: Any) -> None:
        self._sanic_arguments = sanic_arguments
        self._head = b""
        self._transport: asyncio.Transport | None = None
        self._waiting = False
        self.deadline = 0.0

    @classmethod
    def bound(cls, gate: Gate, roster: Roster, pacer: Pacer, header_max_bytes: int) -> type[Front]:
        """A class of its own for one hub: Sanic takes a class, not a factory."""
        members = {"gate": gate, "roster": roster, "pacer": pacer, "header_max_bytes": header_max_bytes}
        return type("BoundFront", (cls,), {"__slots__": (), **members})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(UNSENT_BYTES)  # type: ignore[attr-defined] # with TLS it would be 512 KiB
        self.gate.watch(self)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return  # it was refused, and goes on talking
        head = self._head = self._head + data if self._head else data
        if self._waiting:
            # A client may not talk before the 101; whoever does may be smuggling a second request.
            self._refuse(400, "Bad Request: bytes after the request")
            return
        end = head.find(wire.HEAD_END)
        length = len(head) if end < 0 else end + len(wire.HEAD_END)
        if length > self.header_max_bytes:
            self._refuse(431, "Request Header Fields Too Large")
        elif end >= 0:
            self._on_head(head, length)

    def _on_head(self, head: bytes, length: int) -> None:
        """The head is complete; `head` may be longer than it is."""
        request_line = _REQUEST_LINE.match(head)
        if request_line is None or not _is_url(request_line[1]):
            self._refuse(400, "Bad Request")
        elif not _WEBSOCKET_PATH.match(request_line[1]):
            if self.gate.may_ask():  # at once: who looks after the hub must get his answer also in a storm
                self._hand_to_sanic()
            else:
                self._refuse(503, "Service Unavailable: too many requests", _RETRY)
        elif len(head) > length:
            self._refuse(400, "Bad Request: bytes after the request")
        elif self.gate.may_shake_hands():
            self.gate.forget(self)  # it has done its part in time
            self._waiting = True
            self.pacer.add(self._upgrade)
        else:
            self._refuse(503, "Service Unavailable: too many handshakes", _RETRY)

    def _upgrade(self) -> bool:
        """For the pacer: answer the request. However many come at once, the events go on meanwhile."""
        head, transport = self._head, self._transport
        if transport is None or transport.is_closing():
            return False
        self._let_go()
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        try:
            answer = wire.answer_upgrade(head, lambda target: self.gate.admit(target, address))
        except BaseException:
            transport.abort()  # a bug, but nobody is left waiting for an answer
            raise
        transport.write(answer.response)
        if answer.malformed:
            self.gate.refused["malformed"] += 1
        if answer.admitted is None:
            transport.close()
            return False
        connection = Connection(transport, self.roster, wants_control=answer.subprotocol == wire.V1)
        transport.set_protocol(connection)
        self.roster.add(connection, answer.admitted)
        return False

    def _hand_to_sanic(self) -> None:
        """From here on it is Sanic's, which is held to the deadline as well."""
        transport, head = self._transport, self._head
        assert transport is not None
        self._head = b""
        self.gate.watch(self)
        protocol = _Page(self, self._sanic_arguments)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)  # type: ignore[no-untyped-call]
        protocol.data_received(head)

    def _refuse(self, status: int, phrase: str, header: str = "") -> None:
        transport = self._transport
        self._let_go()
        if status == 400:
            self.gate.refused["malformed"] += 1
        assert transport is not None
        transport.write(wire.plain_response(status, phrase, header))
        transport.close()

    def expire(self) -> None:
        """The deadline has passed, and the request is not complete or not answered."""
        self._refuse(408, "Request Timeout")

    def _let_go(self) -> None:
        """The transport is somebody else's, or gone."""
        self.gate.forget(self)
        self._transport = None
        self._waiting = False
        self._head = b""

    def connection_lost(self, error: Exception | None) -> None:
        self._let_go()


def _is_url(path: bytes) -> bool:
    """Whether Sanic can read it: of what is none it says nothing, but for a traceback in the log."""
    with suppress(HttpParserInvalidURLError):
        parse_url(path)
        return path.isascii()
    return False


class _Page(HttpProtocol):
    """A connection of Sanic's whose end is told to the front."""

    __slots__ = ("_front",)

    def __init__(self, front: Front, arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)
        self._front = front

    def connection_lost(self, error: Exception | None) -> None:
        self._front.connection_lost(error)
        super().connection_lost(error)  # type: ignore[no-untyped-call]

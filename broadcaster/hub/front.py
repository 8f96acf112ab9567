"""The first bytes of a connection: a WebSocket upgrade is answered here, everything else is Sanic's.

Sanic's own WebSocket route keeps 5 tasks and 26 KB per connection and waits for each client's socket.
Given to Sanic as its protocol, this one looks at the request head; a WebSocket's transport goes to
`Connection`, any other goes with the bytes read so far to Sanic's `HttpProtocol`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

from sanic.server import HttpProtocol

from broadcaster import wire
from broadcaster.hub.connection import Connection
from broadcaster.hub.request import Ask
from broadcaster.hub.roster import Roster

_REQUEST_LINE: Final = re.compile(rb"[A-Z]{1,16} (\S+) HTTP/1\.[01]\r\n")
_WEBSOCKET_PATH: Final = re.compile(rb"/ws(\?|$)")

Admit = Callable[[wire.Target], Ask | wire.Refusal]


class Front(asyncio.Protocol):
    """Reads one request head: at most `header_max_bytes` of it, for at most the handshake's deadline.

    Made by Sanic's server with the arguments of `HttpProtocol`, which are handed on when it is not for us.
    """

    __slots__ = ("_head", "_sanic_arguments", "_transport", "deadline")

    roster: Roster
    admit: Admit
    header_max_bytes: int

    def __init__(self, **sanic_arguments: Any) -> None:
        self._sanic_arguments = sanic_arguments
        self._head = b""
        self._transport: asyncio.Transport | None = None
        self.deadline = 0.0

    @classmethod
    def bound(cls, roster: Roster, admit: Admit, header_max_bytes: int) -> type[Front]:
        """A class of its own for one hub: Sanic takes a class, not a factory."""
        members = {"roster": roster, "admit": staticmethod(admit), "header_max_bytes": header_max_bytes}
        return type("BoundFront", (cls,), {"__slots__": (), **members})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.roster.watch_handshake(self, watch=True)

    def data_received(self, data: bytes) -> None:
        head = self._head = self._head + data if self._head else data
        end = head.find(wire.HEAD_END)
        if end < 0:
            if len(head) > self.header_max_bytes:
                self._refuse(431, "Request Header Fields Too Large")
            return
        if end + len(wire.HEAD_END) > self.header_max_bytes:
            self._refuse(431, "Request Header Fields Too Large")
            return
        request_line = _REQUEST_LINE.match(head)
        if request_line is None:
            self._refuse(400, "Bad Request")
        elif not _WEBSOCKET_PATH.match(request_line[1]):
            self._hand_to_sanic(head)
        elif len(head) > end + len(wire.HEAD_END):
            # A client may not talk before the 101; whoever does may be smuggling a second request.
            self._refuse(400, "Bad Request: bytes after the request")
        else:
            self._upgrade(head)

    def _upgrade(self, head: bytes) -> None:
        transport = self._let_go()
        answer = wire.answer_upgrade(head, self.admit)
        transport.write(answer.response)
        if answer.admitted is None:
            transport.close()
            return
        connection = Connection(transport, self.roster, wants_control=answer.subprotocol == wire.V1)
        transport.set_protocol(connection)
        self.roster.add(connection, answer.admitted)

    def _hand_to_sanic(self, head: bytes) -> None:
        transport = self._let_go()
        protocol = HttpProtocol(**self._sanic_arguments)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)  # type: ignore[no-untyped-call]
        protocol.data_received(head)

    def _refuse(self, status: int, phrase: str) -> None:
        transport = self._let_go()
        transport.write(wire.plain_response(status, phrase))
        transport.close()

    def expire(self) -> None:
        """The deadline has passed and the request is not complete."""
        self._refuse(408, "Request Timeout")

    def _let_go(self) -> asyncio.Transport:
        """The transport, which from here on is somebody else's."""
        transport, self._transport = self._transport, None
        self.roster.watch_handshake(self, watch=False)
        self._head = b""
        assert transport is not None
        return transport

    def connection_lost(self, error: Exception | None) -> None:
        self.roster.watch_handshake(self, watch=False)
        self._transport = None

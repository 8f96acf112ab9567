"""The handshake of a connection: a WebSocket upgrade is answered here, everything else is handed to Sanic.

Sanic's own WebSocket route keeps 5 tasks and 26 KB per connection and waits for each client's socket.
Given to Sanic as its protocol, this one reads the request head; a WebSocket's transport goes to `Connection`, any
other goes with the bytes read so far to Sanic's `HttpProtocol`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from httptools import parse_url
from httptools.parser.errors import HttpParserInvalidURLError
from sanic.server import HttpProtocol

from broadcaster import wire
from broadcaster.core.event import LARGEST_BYTES
from broadcaster.hub.channels.channels import Channels
from broadcaster.hub.connections.admission import AdmissionControl, Admitted
from broadcaster.hub.connections.connection import Connection, ConnectionContext
from broadcaster.hub.connections.event_stream import EventStream, answer_stream_request
from broadcaster.hub.fanout.format import PLAIN

log = logging.getLogger("broadcaster.hub")

_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,16}) (\S+) HTTP/1\.[01]\r\n")
_WEBSOCKET_PATHS: Final = ("/ws", "/ws/")
_STREAM_PATHS: Final = ("/sse", "/sse/")
_RETRY: Final = "Retry-After: 1\r\n"
_HAS_BODY: Final = re.compile(rb"\r\n(Content-Length:\s*[1-9]|Transfer-Encoding:)", re.IGNORECASE).search
_LINGER_BYTES: Final = LARGEST_BYTES
"""So many bytes of a body that nobody wants are read and dropped: as many as the largest event may have."""


_Answer = Callable[[bytes, asyncio.Transport, str], None]
"""Answers a request: its head, where to, and the address of who asks."""


class HandshakeProtocol(asyncio.Protocol):
    """Reads one request head: at most `hub.header_max_bytes` of it, until the deadline of `AdmissionControl`.

    Made by Sanic's server with the arguments of `HttpProtocol`, which are handed on when it is not for us.

    Attributes:
        admission: Decides who is admitted.
        context: Of the connections.
        channels: Where they subscribe.
        answer_at_once: The response to a method, a path and a head that are answered without Sanic and before any
            limit: health checks, and files; None to all others.
        deadline: Loop time at which the request must be complete and answered.
    """

    __slots__ = ("_head", "_publishes", "_sanic_arguments", "_transport", "_unsent", "_waiting", "deadline")

    admission: AdmissionControl
    context: ConnectionContext
    channels: Channels
    answer_at_once: Callable[[str, str, bytes], bytes | None]

    def __init__(self, **sanic_arguments: Any) -> None:
        self._sanic_arguments = sanic_arguments
        self._head = b""
        self._transport: asyncio.Transport | None = None
        self._unsent: asyncio.Transport | None = None  # of an answer that the client is slow to take
        self._waiting = False
        self._publishes = False  # what the client asks for; whether it is done is not known until it is answered
        self.deadline = 0.0

    @classmethod
    def bound(
        cls,
        admission: AdmissionControl,
        context: ConnectionContext,
        channels: Channels,
        answer_at_once: Callable[[str, str, bytes], bytes | None] = lambda method, path, head: None,
    ) -> type[HandshakeProtocol]:
        """A class of its own for one hub: Sanic takes a class, not a factory."""
        members = {
            "admission": admission,
            "context": context,
            "channels": channels,
            "answer_at_once": staticmethod(answer_at_once),
        }
        return type("BoundHandshakeProtocol", (cls,), {"__slots__": (), **members})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        # With TLS it would be 512 KiB.
        transport.set_write_buffer_limits(self.context.runtime.limits.unsent_bytes)  # type: ignore[attr-defined]
        self.admission.watch(self)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return  # it was refused, and continues to send
        head = self._head = self._head + data if self._head else data
        if self._waiting:
            # A client may not send anything before the 101: it may be smuggling a second request.
            self._refuse(400, "there are bytes after the request")
            return
        end = head.find(wire.HEAD_END)
        length = len(head) if end < 0 else end + len(wire.HEAD_END)
        if length > self.context.settings.header_max_bytes:
            self._refuse(
                431, f"the head of the request has more than {self.context.settings.header_max_bytes} bytes"
            )
        elif end >= 0:
            self._on_head(head, length)

    def _on_head(self, head: bytes, length: int) -> None:
        """The head is complete; `head` may be longer than it is."""
        request_line = _REQUEST_LINE.match(head)
        if request_line is None or (path := _path_of(request_line[2])) is None:
            self._refuse(400, "this is no HTTP request")
        elif path not in _WEBSOCKET_PATHS + _STREAM_PATHS:
            self._on_plain_request(request_line[1].decode(), path)
        elif len(head) > length:
            self._refuse(400, "there are bytes after the request")
        elif self.admission.allows_handshake():
            self.admission.forget(self)  # it has done its part in time
            self._waiting = True
            self.admission.answering += 1
            answer = self._upgrade if path in _WEBSOCKET_PATHS else self._stream
            self.context.scheduler.add(partial(self._take_turn, answer))
        else:
            self._refuse(503, "too many handshakes at once", _RETRY)

    def _on_plain_request(self, method: str, path: str) -> None:
        """Answer it, or hand it on. Health checks are never limited: who asks may end a hub that is only busy."""
        if (answer := self.answer_at_once(method, path, self._head)) is not None:
            self._end(answer)
        elif self.admission.allows_request(self._address()):
            self._hand_to_sanic()
        else:
            self._refuse(429, "too many requests", _RETRY)

    def _address(self) -> str:
        assert self._transport is not None
        peer = self._transport.get_extra_info("peername")
        return peer[0] if isinstance(peer, tuple) else ""

    def _take_turn(self, answer: _Answer) -> bool:
        """For the scheduler: answer the request. However many arrive at once, events are delivered meanwhile."""
        self.admission.answering -= 1
        head, transport = self._head, self._transport
        if transport is not None and not transport.is_closing():
            address = self._address()
            self._release()
            try:
                answer(head, transport, address)
            except BaseException:
                transport.abort()  # a bug, but the client is not left waiting for an answer
                raise
        return False

    def _upgrade(self, head: bytes, transport: asyncio.Transport, address: str) -> None:
        """Answer a request for a WebSocket."""
        compress = self.context.settings.compress
        answer = wire.answer_upgrade(head, lambda target: self.admission.admit(target, address), compress=compress)
        transport.write(answer.response)
        if answer.malformed:
            self.admission.refused["malformed"] += 1
            self.admission.note_refused(address, "malformed", 400, "the upgrade request is malformed")
        if answer.admitted is None:
            self._close(head, transport)
        else:
            admitted = answer.admitted
            connection = Connection(
                transport,
                self.context,
                wants_control=answer.subprotocol == wire.V1,
                address=sys.intern(admitted.address),
                grant=admitted.grant,
                form=self.context.formats.deflate if answer.compressed else PLAIN,
            )
            self._open(transport, connection, admitted)

    def _stream(self, head: bytes, transport: asyncio.Transport, address: str) -> None:
        """Answer a request for an event stream."""
        answer = answer_stream_request(head, address, self.admission, self.context)
        transport.write(answer.response)
        if answer.admitted is None:
            self._close(head, transport)
        else:
            self._open(transport, EventStream(transport, self.context, answer.admitted), answer.admitted)

    def _open(self, transport: asyncio.Transport, connection: Connection, admitted: Admitted) -> None:
        """From here on the transport is a `Connection`'s."""
        transport.set_protocol(connection)
        request = admitted.request
        if log.isEnabledFor(logging.DEBUG):
            log.debug("connected: %s", connection.name)
        names, begins = zip(*request.channels, strict=True)
        channels = self.channels.get(*names, address=admitted.address)
        connection.open(zip(channels, begins, strict=True), request.filter)

    def _hand_to_sanic(self) -> None:
        """From here on the connection is Sanic's, which is held to the deadline as well."""
        transport, head = self._transport, self._head
        assert transport is not None
        self._head = b""
        self.admission.watch(self)
        protocol = SanicProtocol(self, self._sanic_arguments)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)  # type: ignore[no-untyped-call]
        protocol.data_received(head)

    def on_publish(self) -> None:
        """The request is complete, and its event is going to be published: that has a deadline of its own."""
        if self._transport is not None:  # else the client has gone
            self._publishes = True
            self.admission.watch(self)

    def _refuse(self, status: int, reason: str, header: str = "") -> None:
        if status in (400, 431):
            self.admission.refused["malformed"] += 1
        self.admission.note_refused(self._address(), str(status), status, reason)
        self._end(wire.refusal(status, reason, header))

    def _end(self, response: bytes) -> None:
        head, transport = self._head, self._transport
        self._release()
        assert transport is not None
        transport.write(response)
        self._close(head, transport)

    def _close(self, head: bytes, transport: asyncio.Transport) -> None:
        """The request is answered, and a body that may come behind its head not wanted."""
        if _HAS_BODY(head):
            self.linger(transport)
            return
        if transport.get_write_buffer_size():  # the rest has to be taken in time, too
            self._unsent = transport
            self.admission.watch(self)
        transport.close()

    def linger(self, transport: asyncio.Transport) -> None:
        """The answer is written, and the client goes on sending: let it read the answer (lingering close).

        What it sends is read and dropped, until it has ended or the deadline passes. To close now would reset the
        connection, and a reset overtakes the answer (RFC 9112, 9.6).
        """
        self._unsent = transport
        self.admission.watch(self)
        transport.set_protocol(_Lingering(self, transport))
        transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    def expire(self) -> bool:
        """The deadline has passed, and the request is not complete, not answered, or its answer not taken.

        Whether it is refused by that: it was not answered.
        """
        if self._unsent is not None:
            self._unsent.abort()
            return False
        assert self._transport is not None
        if self._transport.is_closing():  # Sanic has answered
            self._transport.abort()
            return False
        if self._publishes:
            self._refuse(503, "it is not known whether the event was published", _RETRY)
        else:
            self._refuse(408, "the request did not come in time")
        return True

    def _release(self) -> None:
        """The transport belongs to another protocol now, or is gone."""
        self.admission.forget(self)
        self._transport = self._unsent = None
        self._waiting = self._publishes = False
        self._head = b""

    def connection_lost(self, error: Exception | None) -> None:
        self._release()


def _path_of(url: bytes) -> str | None:
    """The path of a URL; None if Sanic cannot read it: it would answer with nothing but a traceback in the log."""
    with suppress(HttpParserInvalidURLError):
        path = parse_url(url).path or b"/"
        if url.isascii():
            return path.decode()
    return None


class _Lingering(asyncio.Protocol):
    """Reads what a client sends behind its answer, and drops it: for a while, and so much."""

    __slots__ = ("_handshake", "_left_bytes", "_transport")

    def __init__(self, handshake: HandshakeProtocol, transport: asyncio.Transport) -> None:
        self._handshake = handshake
        self._transport = transport
        self._left_bytes = _LINGER_BYTES

    def data_received(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._handshake.connection_lost(error)


class SanicProtocol(HttpProtocol):
    """A connection of Sanic's whose end is told to the handshake: it still counts as pending."""

    __slots__ = ("_handshake", "_served")

    def __init__(self, handshake: HandshakeProtocol, arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)
        self._handshake = handshake
        self._served: Any = None  # Sanic forgets its request before it closes

    def _setup_connection(self, *args: Any, **options: Any) -> None:
        super()._setup_connection(*args, **options)  # type: ignore[no-untyped-call]
        self._served = self._http

    def on_publish(self) -> None:
        """See `HandshakeProtocol`."""
        self._handshake.on_publish()

    def close(self, timeout: float | None = None) -> None:
        """End the connection: at once, or when the client has done with a body that was not taken."""
        served, transport, self._served = self._served, self.transport, None
        if served is None or not served.request_body or transport is None or transport.is_closing():
            super().close(timeout)
            return
        super().connection_lost(None)  # type: ignore[no-untyped-call]
        self.transport = None  # for Sanic this is its end
        self._handshake.linger(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._handshake.connection_lost(error)
        super().connection_lost(error)  # type: ignore[no-untyped-call]

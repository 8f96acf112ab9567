"""A connection whose client listens over plain HTTP (Server-Sent Events), and the request for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Final

from broadcaster import wire
from broadcaster.hub.connections.admission import AdmissionControl, Admitted
from broadcaster.hub.connections.connection import Connection, ConnectionContext

_ALLOW: Final = f"Allow: {', '.join(wire.STREAM_METHODS)}\r\n"
_NO_STORE: Final = "Cache-Control: no-store\r\n"
_LONGEST_MS: Final = 2**31 - 1
"""More than the system's int cannot be said to it."""


class EventStream(Connection):
    """As a WebSocket that speaks `broadcaster.v1`, but that its client cannot say anything."""

    __slots__ = ()

    def __init__(self, transport: asyncio.Transport, context: ConnectionContext, admitted: Admitted) -> None:
        super().__init__(
            transport,
            context,
            wants_control=True,
            address=sys.intern(admitted.address),
            grant=admitted.grant,
            form=context.formats.sse,
        )
        self._notice_silence()

    def _notice_silence(self) -> None:
        """It answers no pings: the system gives up a connection on which nothing is acknowledged any more.

        A window that stays closed counts, too, so that what a slow client is allowed is the least.
        """
        connection = self.transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            with contextlib.suppress(OSError, AttributeError):  # Linux has it
                settings = self._context.settings
                within_ms = max(round(2000 * settings.ping_interval_s), 2 * settings.behind_max_ms)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(within_ms, _LONGEST_MS))

    def data_received(self, data: bytes) -> None:
        if data.strip(b"\r\n"):
            self.close(wire.CloseCode.POLICY, "nothing may follow the request for a stream")

    def say_goodbye(self, code: wire.CloseCode, reason: str) -> None:
        self.write(wire.sse_close(code, reason, retry_ms(self._context)))
        self.transport.close()  # once it has flushed; the close deadline holds it to that


def retry_ms(context: ConnectionContext) -> int:
    """A random time after which a client comes back, and again after it: all those of a hub lose it at once."""
    return round(1000 * context.runtime.chance.uniform(1, 5))


class StreamAnswer:
    """The hub's answer to a request for a stream.

    Attributes:
        response: Bytes to write.
        admitted: What the stream is for; None: write `response` and close.
    """

    __slots__ = ("admitted", "response")

    def __init__(self, response: bytes, admitted: Admitted | None = None) -> None:
        self.response = response
        self.admitted = admitted


def answer_stream_request(
    head: bytes, address: str, admission: AdmissionControl, context: ConnectionContext
) -> StreamAnswer:
    """Check a complete request head, and admit its client."""
    request = wire.read_stream_request(head)
    if isinstance(request, wire.Refusal):
        admission.refused["malformed"] += 1
        admission.note_refused(address, f"stream {request.status}", request.status, request.reason)
        return StreamAnswer(wire.refusal(request.status, request.reason, _ALLOW if request.status == 405 else ""))
    target = request.target
    allow = _allow_origin(target) if admission.allows_origin(target) else ""
    if request.method == "OPTIONS":
        return StreamAnswer(_preflight(target, allow))
    if request.told_to_stay_away:
        return StreamAnswer(wire.response_head(204, 0, allow + _NO_STORE))
    decision = admission.admit(target, address, is_stream=True)
    if isinstance(decision, wire.Refusal):
        headers = allow + _NO_STORE
        if decision.retry_after_s is not None:
            headers += f"Retry-After: {decision.retry_after_s}\r\n"
        if decision.status == 401:
            headers += "WWW-Authenticate: Bearer\r\n"
        return StreamAnswer(wire.refusal(decision.status, decision.reason, headers))
    answer = f"{wire.STREAM_HEAD}{allow}\r\n".encode()
    if request.method == "HEAD":
        return StreamAnswer(answer)
    return StreamAnswer(answer + wire.sse_retry(retry_ms(context)) + b"\n", decision)


def _allow_origin(target: wire.Target) -> str:
    """What lets the page of another site read the answer; that it may connect is known."""
    if target.origin is None or not target.origin.isascii():
        return ""
    exposed = "Access-Control-Expose-Headers: Retry-After"
    return f"Access-Control-Allow-Origin: {target.origin}\r\n{exposed}\r\nVary: Origin\r\n"


def _preflight(target: wire.Target, allow: str) -> bytes:
    """The answer to a page that wants to send a token, or where it has been (CORS asks before it does)."""
    if target.origin is None:
        return wire.response_head(204, 0, _ALLOW)
    if not allow:
        return wire.refusal(403, "this origin is not allowed")
    headers = "Authorization, Last-Event-ID, Cache-Control, Accept"
    return wire.response_head(
        204,
        0,
        f"{allow}{_ALLOW}Access-Control-Allow-Methods: GET, HEAD\r\n"
        f"Access-Control-Allow-Headers: {headers}\r\nAccess-Control-Max-Age: 600\r\n",
    )

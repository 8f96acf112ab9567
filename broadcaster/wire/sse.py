"""Server-Sent Events (WHATWG HTML 9.2): a stream of events as the answer to a plain HTTP request.

An event carries what a WebSocket client would get, byte for byte but for line breaks between its JSON tokens; its
id is the position, which a browser brings along (`Last-Event-ID`) when it connects again by itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Final

from websockets.datastructures import Headers, MultipleValuesError
from websockets.exceptions import HeaderLineTooLong, RequestLineTooLong, TooManyHeaders
from websockets.http11 import Request
from websockets.server import ServerProtocol

from broadcaster.core.position import Position
from broadcaster.wire.dispose import QUIET, dispose
from broadcaster.wire.frames import CloseCode, payload_of
from broadcaster.wire.handshake import Refusal, Target

COMMENT: Final = b":\n\n"
"""Says nothing; it keeps proxies from taking a silent stream for a dead one."""

STREAM_METHODS: Final = ("GET", "HEAD", "OPTIONS")

_TYPE: Final = "text/event-stream"
_LINE_BREAK: Final = re.compile(rb"\r\n|\r|\n")

_STAY_AWAY: Final = "!"
"""How the id of a close begins after which a client must not come back: a browser does, with this id."""

_FOR_GOOD: Final = frozenset({CloseCode.POLICY})

STREAM_HEAD: Final = (
    f"HTTP/1.1 200 OK\r\nContent-Type: {_TYPE}\r\nCache-Control: no-store, no-transform\r\n"
    "X-Accel-Buffering: no\r\nConnection: close\r\n"
)
"""The head of the answer, which ends with the connection; further headers and an empty line follow."""


def sse_event(frame: bytes, position: Position | None) -> bytes:
    """The event of a plain text frame; `position` is where it is stored, None if it is not."""
    return _message(payload_of(frame), "" if position is None else str(position))


def sse_control(frame: bytes) -> bytes:
    """A control frame: its name is the type of the event, and its position, if there is one, the id.

    But for a `welcome` after which a gap follows: who is cut between the two has to come back for the gap.
    """
    payload = payload_of(frame)
    fields = json.loads(payload)
    reached = None if fields.get("recovered") is False else fields.get("position")
    return _message(payload, reached or "", fields["control"])


def sse_close(code: CloseCode, reason: str, retry_ms: int) -> bytes:
    """What stands for a close frame, after which the stream ends.

    Args:
        code: As of a WebSocket.
        reason: Why.
        retry_ms: So many milliseconds later the client may come back; if it must not, its next request is answered
            with 204, which browsers take as the end.
    """
    payload = json.dumps({"control": "close", "code": code, "reason": reason}).encode()
    event_id = f"{_STAY_AWAY}{code:d}" if code in _FOR_GOOD else ""
    return sse_retry(retry_ms) + _message(payload, event_id, "close")


def sse_retry(ms: int) -> bytes:
    """So many milliseconds after the end of the stream the client may come back."""
    return b"retry: %d\n" % ms


def _message(payload: bytes, event_id: str = "", kind: str = "") -> bytes:
    if b"\n" in payload or b"\r" in payload:
        payload = b"\ndata: ".join(_LINE_BREAK.split(payload))
    front = f"event: {kind}\n" if kind else ""
    if event_id:
        front += f"id: {event_id}\n"
    return b"%bdata: %b\n\n" % (front.encode(), payload)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """A request for a stream.

    Attributes:
        method: Of HTTP.
        target: What is asked for; `Last-Event-ID` stands in its query as `since`, in the place of where it began.
        told_to_stay_away: Whether the client was closed for good, and comes back all the same.
    """

    method: str
    target: Target
    told_to_stay_away: bool = False


def read_stream_request(head: bytes) -> StreamRequest | Refusal:
    """Read a complete request head; a refusal if it is none, or asks for something else than a stream."""
    method, _, rest = head.partition(b" ")
    if method.decode() not in STREAM_METHODS:
        return Refusal(405, f"/sse takes {', '.join(STREAM_METHODS)}")
    url, _, rest = rest.partition(b" ")
    # The library reads requests of WebSockets only: GET, HTTP/1.1. A proxy may speak HTTP/1.0.
    protocol = ServerProtocol(logger=QUIET)
    protocol.receive_data(b"GET %b HTTP/1.1\r\n%b" % (url, rest.partition(b"\r\n")[2]))
    events, error = protocol.events_received(), protocol.handshake_exc
    dispose(protocol)
    if not events:
        if isinstance(error, RequestLineTooLong):
            return Refusal(414, "the URL is too long")
        if isinstance(error, (HeaderLineTooLong, TooManyHeaders)):
            return Refusal(431, "the head of the request has too many headers, or too long ones")
        return Refusal(400, "this is no HTTP request, or one with a body")
    [request] = events
    assert isinstance(request, Request)
    return _read(method.decode(), request)


def _read(method: str, request: Request) -> StreamRequest | Refusal:
    headers, target = request.headers, Target.of(request)
    if method == "OPTIONS":
        return StreamRequest(method, target)
    if "Upgrade" in headers:
        return Refusal(400, "this is a stream of Server-Sent Events: a WebSocket is at /ws")
    if not _accepts(headers.get_all("Accept")):
        return Refusal(406, f"this is {_TYPE}, which Accept does not have")
    try:
        last = _last_event_id(headers)
    except ValueError as error:
        return StreamRequest(method, replace(target, fault=target.fault or str(error)))
    if last.startswith(_STAY_AWAY):
        return StreamRequest(method, target, told_to_stay_away=True)
    if last:
        query = [(key, value) for key, value in target.query if key not in ("since", "last")]
        target = replace(target, query=(*query, ("since", last)))
    return StreamRequest(method, target)


def _last_event_id(headers: Headers) -> str:
    """Where a browser that comes back has been; it stands above `since` and `last` of the URL, which are old.

    Raises:
        ValueError: It is no position.
    """
    try:
        last = headers.get("Last-Event-ID", "").strip()
    except MultipleValuesError:
        raise ValueError("Last-Event-ID is given twice") from None
    if last and not last.startswith(_STAY_AWAY):
        try:
            Position.parse(last)
        except ValueError as error:
            raise ValueError(f"Last-Event-ID: {error}") from None
    return last


def _accepts(lines: list[str]) -> bool:
    """Whether an `Accept` header (RFC 9110 12.5.1) has the type of a stream; without one, anything is accepted."""
    kinds = [part for line in lines for part in line.lower().split(",") if part.strip()]
    found: dict[str, bool] = {}
    for kind in kinds:
        name, *parameters = (part.strip() for part in kind.split(";"))
        refused = any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
        found[name] = not refused
    return not kinds or next((found[name] for name in (_TYPE, "text/*", "*/*") if name in found), False)

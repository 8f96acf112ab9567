"""The server side of the opening handshake: from a request head to the response."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final, Generic, TypeVar
from urllib.parse import parse_qsl, urlsplit

from websockets.datastructures import Headers, MultipleValuesError
from websockets.extensions import Extension
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from broadcaster.wire.bearer import token_of
from broadcaster.wire.deflate import COMPRESSION
from broadcaster.wire.dispose import QUIET, dispose
from broadcaster.wire.frames import PLAIN, V1

HEAD_END: Final = b"\r\n\r\n"

_NO_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")

MAX_PARAMETERS: Final = 256
"""Limit of a query: more than all channels, positions and filter values that the hub allows by default."""

LONGEST_OFFER: Final = 1024
"""Bytes of what a client offers as extensions; more of it is not worth reading, and nothing of it is accepted."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A response other than 101."""

    status: int
    reason: str
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a client requests, and the credentials it sends.

    Attributes:
        path: Path of the URL.
        query: Parameters of the URL, in order.
        host: The host and port of the URL, or else the `Host` header; empty if there is neither.
        origin: The `Origin` header, the site of a browser's page; None without a browser.
        token: The bearer token; None if there is none. Never in a log.
        fault: What is wrong with the request; empty if nothing.
    """

    path: str
    query: tuple[tuple[str, str], ...]
    host: str = ""
    origin: str | None = None
    token: str | None = field(default=None, repr=False)
    fault: str = ""

    @classmethod
    def parse(cls, path: str) -> Target:
        """Read the path and query of a request line.

        Raises:
            ValueError: They cannot be parsed.
        """
        parts = urlsplit(path)
        if _NO_ESCAPE.search(parts.query):
            raise ValueError("a % in the query is not followed by two hexadecimal digits")
        try:
            query = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS, errors="strict")
        except UnicodeDecodeError:
            raise ValueError("the query is not UTF-8") from None
        return cls(parts.path, tuple(query), parts.netloc)

    @classmethod
    def of(cls, request: Request) -> Target:
        """Read a request; an error becomes its `fault`."""
        headers = request.headers
        try:
            if not (host := headers.get("Host", "")):
                raise ValueError("no Host")
            target = cls.parse(request.path)  # a whole URL comes before the Host header (RFC 9112 3.2.2)
            origin, token = headers.get("Origin"), token_of(headers)
            return replace(target, host=target.host or host, origin=origin, token=token)
        except (ValueError, MultipleValuesError) as error:
            return cls("", (), fault=str(error))


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """The hub's answer to an upgrade request.

    Attributes:
        response: Bytes to write.
        admitted: What `admit` returned: the connection is a WebSocket now; None: write `response` and close.
        subprotocol: The selected one, or None.
        compressed: Whether both sides may compress messages.
        malformed: Whether it is no upgrade request that could be admitted: `admit` was not called.
    """

    response: bytes
    admitted: T | None
    subprotocol: str | None = None
    compressed: bool = False
    malformed: bool = False


def answer_upgrade(head: bytes, admit: Callable[[Target], T | Refusal], *, compress: bool = False) -> Answer[T]:
    """Check a complete request head by RFC 6455, call `admit`, and build the answer.

    Args:
        head: The request up to and including its empty line.
        admit: Called with the target of a well-formed request: returns what is admitted, or a refusal,
            which is sent instead of the 101.
        compress: Whether compression is accepted.
    """
    protocol = _Handshake(extensions=[COMPRESSION] if compress else None, logger=QUIET)
    protocol.receive_data(head)
    admitted: T | None = None
    malformed = True
    for request in protocol.events_received():  # none if malformed
        assert isinstance(request, Request)
        response = protocol.accept(request)
        if response.status_code == 101:
            malformed = False
            decision = admit(Target.of(request))
            if not isinstance(decision, Refusal):
                admitted = decision
            else:
                response = protocol.reject(decision.status, decision.reason)
                if decision.retry_after_s is not None:
                    response.headers["Retry-After"] = str(decision.retry_after_s)
                if decision.status == 401:
                    response.headers["WWW-Authenticate"] = "Bearer"
        if response.status_code != 101:
            _say_in_json(response)
        if response.status_code == 400 and request.headers.get_all("Sec-WebSocket-Version") != ["13"]:
            response.headers["Sec-WebSocket-Version"] = "13"  # the supported one (RFC 6455 4.4)
        protocol.send_response(response)
    # Some malformed requests the protocol answers itself; for others it has no response.
    response_bytes = b"".join(protocol.data_to_send()) or refusal(400, "this is no HTTP request")
    dispose(protocol)
    if admitted is None:
        return Answer(response_bytes, None, malformed=malformed)
    return Answer(response_bytes, admitted, protocol.subprotocol, compressed=bool(protocol.extensions))


def refusal(status: int, reason: str, headers: str = "") -> bytes:
    """A complete HTTP response that ends the connection and says why, for requests that are not parsed."""
    body = _reason_in_json(reason)
    return response_head(status, len(body), headers) + body


def response_head(status: int, length: int, headers: str = "") -> bytes:
    """The head of an HTTP response that ends the connection, for a body of `length` bytes of JSON."""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n{headers}"
    if status != HTTPStatus.NO_CONTENT:
        head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    return f"{head}\r\n".encode()


def _reason_in_json(reason: str) -> bytes:
    return json.dumps({"error": reason}).encode()


def _say_in_json(response: Response) -> None:
    """The library says what is wrong as plain text."""
    response.body = _reason_in_json(bytes(response.body or b"").decode().strip())
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(response.body)))):
        del response.headers[name]
        response.headers[name] = value


class _Handshake(ServerProtocol):
    """The library's handshake with another choice of subprotocol: V1, PLAIN or none; it refuses no client."""

    def process_extensions(self, headers: Headers) -> tuple[str | None, list[Extension]]:
        if sum(map(len, headers.get_all("Sec-WebSocket-Extensions"))) > LONGEST_OFFER:
            return None, []
        return super().process_extensions(headers)

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        return next((Subprotocol(name) for name in (V1, PLAIN) if name in subprotocols), None)

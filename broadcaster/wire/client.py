"""The client side of a connection, with a socket: the library's client, configured for a hub."""

from __future__ import annotations

import json
import ssl
from contextlib import suppress
from functools import partial
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from broadcaster.core import dialing
from broadcaster.core.errors import ConfigurationError
from broadcaster.core.event import LARGEST_BYTES
from broadcaster.core.redaction import redact, scrub
from broadcaster.wire import retry_after
from broadcaster.wire.bearer import authorization
from broadcaster.wire.frames import TRY_LATER, V1, CloseCode, is_final_refusal

__all__ = [
    "ClientConnection",
    "ConnectionClosed",
    "InvalidHandshake",
    "asks_to_try_later",
    "can_beat",
    "cannot_resume",
    "close_reason",
    "final_refusal",
    "open_connection",
    "retry_after_s",
]


_MESSAGE_MAX_BYTES: Final = LARGEST_BYTES + 2**16
"""No hub sends more in a message; of one that does the connection is closed (1009) before it takes the memory."""


async def open_connection(
    url: str, *, close_timeout_s: float, max_queue: int, token: str = "", tls: ssl.SSLContext | None = None
) -> ClientConnection:
    """Open a subscriber's connection to a hub.

    No compression (the hub offers none), no proxy (that of the environment would be used even for localhost).

    Args:
        url: ws:// or wss://.
        close_timeout_s: For the closing handshake; who opens has a deadline of its own.
        max_queue: Messages that may wait; then reading stops.
        token: Sent as bearer token; empty: none.
        tls: TLS context for wss://.

    Raises:
        ConfigurationError: No header can carry the token, or nothing can connect to such a URL.
        OSError: There is no connection, or it has ended.
        InvalidHandshake: The hub refuses, or there is another server.
    """
    opened = partial(
        connect,
        url,
        subprotocols=[Subprotocol(V1)],
        compression=None,
        proxy=None,
        open_timeout=None,
        close_timeout=close_timeout_s,
        max_queue=max_queue,
        max_size=_MESSAGE_MAX_BYTES,
        additional_headers=authorization(token),
        ssl=tls,
    )
    try:
        hub = parse_uri(url)
        return await opened(sock=await dialing.connected_socket(hub.host, hub.port))
    except InvalidURI:  # its message has the whole URL
        raise ConfigurationError(f"{redact(url)} is no URL of a WebSocket") from None
    except ValueError as error:
        if not isinstance(error.__cause__, InvalidStatus):
            raise
        return await opened()  # a redirect, which the library follows only if all connections are its own
    except (ConnectionClosed, AssertionError) as error:
        # So the library fails if the hub hangs up, or refuses, before the request is sent (with uvloop).
        raise ConnectionAbortedError("the hub has hung up") from error


def final_refusal(error: InvalidHandshake) -> str | None:
    """Status and text of a refusal that is final (4xx, except 408 and 429); None for any other error."""
    if not isinstance(error, InvalidStatus):
        return None
    response = error.response
    if not is_final_refusal(response.status_code):
        return None
    said = scrub(_reason(bytes(response.body or b"")))  # a server may quote the request
    return f"{response.status_code} {said[:200]}"


def _reason(body: bytes) -> str:
    """The reason in the body of a refusal: `error` of a JSON object (a hub's), or else the text (a proxy's)."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(body)["error"])
    return body.decode(errors="replace").strip()


def retry_after_s(error: InvalidHandshake) -> float:
    """Seconds that the hub asks a client to stay away (`Retry-After`); 0 if it does not say."""
    if not isinstance(error, InvalidStatus):
        return 0.0
    return retry_after.retry_after_s(error.response.headers.get("Retry-After", ""))


def asks_to_try_later(error: ConnectionClosed) -> bool:
    """Whether the server closed because it cannot serve now (1013)."""
    return error.rcvd is not None and error.rcvd.code == TRY_LATER


def cannot_resume(error: ConnectionClosed) -> bool:
    """Whether the hub closed because it cannot deliver what follows the client's position (4009)."""
    return error.rcvd is not None and error.rcvd.code == CloseCode.GAP


def close_reason(error: ConnectionClosed) -> str:
    """Code and reason with which a connection was closed, such as `1012 the hub is restarting`."""
    if error.rcvd is not None:
        return f"{error.rcvd.code} {error.rcvd.reason}".strip()
    if error.sent is not None and error.sent.reason:  # this side found that the other one was gone
        return f"{error.sent.code} {error.sent.reason}"
    return "it was lost"


def can_beat(connection: ClientConnection) -> bool:
    """Whether the hub speaks `broadcaster.v1` and so sends heartbeats; others send events only."""
    return connection.subprotocol == V1

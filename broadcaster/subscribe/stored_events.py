"""Stored events of a channel, read through a hub (`GET /events`) page by page."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple
from urllib.parse import urlencode

from broadcaster.core.backoff import LONGEST_HINT_S
from broadcaster.core.errors import HubRefused, HubUnavailable
from broadcaster.core.event import read_answer
from broadcaster.core.redaction import redact, scrub
from broadcaster.subscribe.hub_status import connect_to
from broadcaster.wire import tls
from broadcaster.wire.frames import is_final_refusal
from broadcaster.wire.retry_after import retry_after_s

_MOST_EVENTS: Final = 1000
_ATTEMPTS: Final = 5
_TIMEOUT_S: Final = 10.0
"""Without a byte that comes."""

_WHOLE_S: Final = 60.0
"""Until an answer is complete: it may come over a slow link, but not for ever."""

Answer = tuple[int, float, bytes]
"""Status, `Retry-After` in seconds, and body."""


class StoredPage(NamedTuple):
    """Some events as they are stored, oldest first, and whether nothing is missing before and between them."""

    payloads: list[bytes]
    complete: bool


async def stored_pages(
    url: str,
    channel: str,
    since: str,
    filters: Sequence[tuple[str, str]] = (),
    *,
    most: int = _MOST_EVENTS,
    tls_ca: str = "",
    token: str = "",
) -> AsyncIterator[StoredPage]:
    """All events from `since` on, until there are no more.

    Args:
        url: `http://host:port` of the hub, or https.
        channel: Whose events.
        since: As in the query of `/events`.
        filters: Pairs of `type`, `source` or `severity` and a wanted value.
        most: Events of one page.
        tls_ca: As `subscriber.tls_ca`.
        token: Good for subscribing to the channel; empty: none.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        HubRefused: The hub refuses, and a retry would not help.
        HubUnavailable: It did not answer, or not as a hub.
    """
    context = tls.client_context(url, tls_ca)
    place: str | None = since
    while place is not None:
        query = urlencode([("channel", channel), ("since", place), ("limit", str(most)), *filters])
        body = await _ask(f"{url.rstrip('/')}/events?{query}", redact(url), context, token)
        try:
            payloads, place, complete = read_answer(body)
        except ValueError:
            raise HubUnavailable(f"{redact(url)}: what answers there is no hub with stored events") from None
        yield StoredPage(payloads, complete)


async def _ask(url: str, where: str, context: ssl.SSLContext | None, token: str) -> bytes:
    """The answer; where the hub is too busy it is asked again, when it says so."""
    for attempt in range(1, _ATTEMPTS + 1):
        status, wait_s, body = await _exchange(url, where, context, token)
        if status == 200:
            return body
        why = f"{where}: {status} {scrub(_reason(body))[:200]}"
        if is_final_refusal(status):
            raise HubRefused(why)
        if attempt < _ATTEMPTS:
            await asyncio.sleep(min(max(wait_s, 0.2), LONGEST_HINT_S))
    raise HubUnavailable(why)


async def _exchange(url: str, where: str, context: ssl.SSLContext | None, token: str) -> Answer:
    """What the hub answers.

    Raises:
        HubUnavailable: There is no answer, or it does not get complete.
    """
    # A thread asks, which is left behind when this is cancelled: for one of `asyncio.to_thread` the end of the
    # event loop would wait until it has given up by itself.
    asked, opened = Future[Answer](), list[socket.socket]()

    def ask() -> None:
        asked.set_running_or_notify_cancel()
        try:
            asked.set_result(_request(url, where, context, token, opened))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        async with asyncio.timeout(_WHOLE_S):
            return await asyncio.wrap_future(asked)
    except TimeoutError:
        raise HubUnavailable(f"{where}: no answer (it was not complete after {_WHOLE_S:g} s)") from None
    finally:
        for connection in opened:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _request(
    url: str, where: str, context: ssl.SSLContext | None, token: str, opened: list[socket.socket]
) -> Answer:
    """The same in this thread; its socket is put into `opened`."""
    try:
        connection, target, headers = connect_to(url, _TIMEOUT_S, context, token)
        with contextlib.closing(connection):
            opened.append(connection.sock)
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            return response.status, retry_after_s(response.headers.get("Retry-After", "")), response.read()
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise HubUnavailable(f"{where}: no answer ({tls.why_not_connected(error)})") from None


def _reason(body: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(body)["error"])
    return body.decode(errors="replace").strip()

"""Clients of the simulated hubs that share no code with the product: raw WebSocket clients, and health checks."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlencode

from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from tests.simulation.books import Beaten, Blind, Book, Closed, Connected, Given, Place, Refused, Told, Welcomed
from tests.simulation.loop import VirtualLoop
from tests.support.event_stream import Reader

HOST: Final = "127.0.0.1"
GIVEN_UP: Final = "given up"
_HANDSHAKE_S: Final = 6.0


class Wire(asyncio.Protocol):
    """One WebSocket connection, from its handshake to its end.

    Attributes:
        ended: Its close code (1006: none was received); or less than 1000: the status of a refusal, 0: none.
        heard_at: Loop time of the last bytes.
    """

    def __init__(
        self,
        url: str,
        subprotocol: str | None,
        token: str,
        on_text: Callable[[dict[str, Any]], None],
        *,
        deflate: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        wanted = [Subprotocol(subprotocol)] if subprotocol else None
        offers = [ClientPerMessageDeflateFactory()] if deflate else None
        self._loop = loop
        self._protocol = ClientProtocol(parse_uri(url), subprotocols=wanted, extensions=offers, max_size=None)
        self._on_text = on_text
        self._token = token
        self._open = False
        self.transport: Any = None
        self.ended: asyncio.Future[tuple[int, str]] = loop.create_future()
        self.heard_at = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        request = self._protocol.connect()
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        self._protocol.send_request(request)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                self._on_response(event)
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._on_text(json.loads(bytes(event.data)))
        self._flush()

    def _on_response(self, response: Response) -> None:
        if self._protocol.handshake_exc is None:
            self._open = True
        else:
            self._end(response.status_code, str(self._protocol.handshake_exc))

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        if self._protocol.state is not State.CLOSED:
            self._protocol.receive_eof()
        if self._open:
            self._end(self._protocol.close_code or 1006, self._protocol.close_reason or "")
        else:
            self._end(0, "no answer")

    def _end(self, code: int, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result((code, reason))

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self.transport.write(data)
            else:
                self.transport.write_eof()

    def ping(self) -> None:
        """Have the hub answer."""
        if self._open and self._protocol.state is State.OPEN:
            self._protocol.send_ping(b"")
            self._flush()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        if not self.ended.done():
            self._end(1006 if self._open else 0, GIVEN_UP)


class Stream(asyncio.Protocol):
    """One event stream, as a browser reads it; the same attributes as those of a `Wire`.

    Attributes:
        last_id: What it would bring along now.
    """

    def __init__(self, url: str, last_id: str, token: str, on_text: Callable[[dict[str, Any]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        path = url.partition(HOST)[2].partition("/")[2]
        lines = [f"GET /{path} HTTP/1.1", f"Host: {HOST}", "Accept: text/event-stream"]
        lines += [f"Last-Event-ID: {last_id}"] if last_id else []
        lines += [f"Authorization: Bearer {token}"] if token else []
        self._request = "\r\n".join([*lines, "", ""]).encode()
        self._on_text = on_text
        self._head: bytes | None = b""
        self._reader = Reader()
        self._reader.last_id = self._reader._id = last_id
        self._status = 0
        self._close: tuple[int, str] | None = None
        self.transport: Any = None
        self.ended: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        self.heard_at = self._loop.time()

    @property
    def last_id(self) -> str:
        return self._reader.last_id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._head, self._status = None, int(head.split()[1])
        if self._status == 200:
            self._reader.feed(data)
            for sent in self._reader.events:
                if sent.kind == "close":
                    self._close = sent.fields["code"], sent.fields["reason"]
                else:
                    self._on_text(sent.fields)
            self._reader.events.clear()

    def connection_lost(self, error: Exception | None) -> None:
        if self._status != 200:
            self._end(self._status, "refused")
        else:
            self._end(*(self._close or (1006, "")))

    def _end(self, code: int, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result((code, reason))

    def ping(self) -> None:
        """It cannot."""

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self._end(1006 if self._status == 200 else 0, GIVEN_UP)


class RawClient:
    """Connects again and again, and goes on where it was, by nothing but the contract.

    Args:
        loop: Of the simulation.
        book: Where everything is noted.
        hubs: Ports of the hubs; one is drawn for each connection.
        chance: Draws hubs and waits.
        beat_s: Seconds between heartbeats, by the settings of the hubs.
        token: For the hubs; empty: none.
        naps: Longest time for which it does not read every now and then, in seconds; 0: never.
        naps_until: Loop time after which it does not.
        form: How it is given events: `ws`, `deflate`, or `sse`.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        book: Book,
        hubs: list[int],
        chance: random.Random,
        beat_s: float,
        token: str = "",
        naps: float = 0.0,
        naps_until: float = 0.0,
        form: str = "ws",
    ) -> None:
        self._loop = loop
        self._book = book
        self._hubs = hubs
        self._chance = chance
        self._beat_s = beat_s
        self._token = token
        self._naps = naps
        self._naps_until = naps_until
        self._form = form
        self._last_id = str(next(iter(book.at.values()), None) or "")  # what it has kept of an earlier life
        self._beat_at = 0.0
        self._forgotten = False

    async def run(self) -> None:
        """Never ends."""
        while True:
            delay_s = await self._connect_once()
            await asyncio.sleep(delay_s + self._chance.uniform(0.01, 0.4))

    def _url(self, port: int) -> tuple[str, dict[str, Place | None]]:
        book, query = self._book, list[tuple[str, str]]()
        since: dict[str, Place | None] = {}
        for channel, first in book.channels.items():
            if self._form == "sse":  # its URL stays the same: what it brings along stands above it
                since[channel] = Place.read(self._last_id) if self._last_id else first
                query += [
                    ("channel", channel),
                    *([("since", str(first or book.time))] if first or book.time else []),
                ]
                continue
            where = book.at.get(channel, None if self._forgotten else first)
            since[channel] = where
            query.append(("channel", channel))
            if begins := where or self._time:
                query.append(("since", str(begins)))
        if book.wanted is not None:
            query.append(("type", book.wanted))
        return f"ws://{HOST}:{port}/{'sse' if self._form == 'sse' else 'ws'}?{urlencode(query)}", since

    @property
    def _time(self) -> str | None:
        return None if self._forgotten else self._book.time

    async def _connect_once(self) -> float:
        book, loop = self._book, self._loop
        port = self._chance.choice(self._hubs)
        url, since = self._url(port)
        book.note(loop.now, Connected(f"hub-{port}", since, self._time))

        def made() -> Wire | Stream:
            if self._form == "sse":
                return Stream(url, self._last_id, self._token, self._on_message)
            subprotocol = "broadcaster.v1" if book.kind == "v1" else None
            return Wire(url, subprotocol, self._token, self._on_message, deflate=self._form == "deflate")

        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                _, wire = await loop.create_connection(made, HOST, port)
        except (OSError, TimeoutError):
            book.note(loop.now, Refused(0))
            return 0.2
        assert isinstance(wire, Wire | Stream)
        try:
            self._beat_at = loop.now
            await self._watch(wire)
        finally:
            wire.abort()
            if isinstance(wire, Stream):
                self._last_id = wire.last_id
        code, reason = wire.ended.result()
        if code < 1000:
            book.note(loop.now, Refused(code))
            return 0.5
        book.note(loop.now, Closed(code, reason, reason == GIVEN_UP))
        if code == 4009:
            book.at.clear()
            self._forgotten = True
        return 0.0

    async def _watch(self, wire: Wire | Stream) -> None:
        """Wait for the end of a connection; end it if it seems dead."""
        loop, patience_s = self._loop, 3 * self._beat_s + 0.5
        while not wire.ended.done():
            if self._naps and loop.now + self._naps < self._naps_until and self._chance.random() < 0.3:
                wire.transport.pause_reading()
                await asyncio.sleep(self._chance.uniform(0, self._naps))
                wire.transport.resume_reading()
                self._beat_at = wire.heard_at = loop.now
            await asyncio.wait([wire.ended], timeout=self._beat_s)
            silent_s = loop.now - (self._beat_at if self._book.kind == "v1" else wire.heard_at)
            if self._book.kind == "v1" and silent_s > patience_s:
                self._book.note(loop.now, Blind(True))
                return
            if self._book.kind == "plain":  # only pings tell it that there is somebody
                if silent_s > patience_s:
                    return
                wire.ping()

    def _on_message(self, message: dict[str, Any]) -> None:
        book, now = self._book, self._loop.now
        channel = message.get("channel") or next(iter(book.channels))
        kind = message.get("control") if "event_id" not in message else None
        if kind is None:
            place = Place(message["epoch"], message["offset"]) if "offset" in message else None
            book.note(now, Given(channel, place, message["event_id"]))
            book.at[channel] = place
            return
        position = Place.read(message.get("position"))
        if kind in ("welcome", "beat"):
            self._beat_at = now
        if kind == "welcome":
            book.note(now, Welcomed(channel, position, message["recovered"]))
        elif kind == "gap":
            gap = Told(channel, message["cause"], message["epoch"], message["first"], message["last"], position)
            book.note(now, gap)
        elif kind == "beat":
            book.note(now, Beaten(channel, position))
        # Until the gap that `recovered: false` announces has come, it stays where it was.
        if kind in ("gap", "beat") or (kind == "welcome" and message["recovered"] is not False):
            book.at[channel] = position


async def ask(
    loop: VirtualLoop, port: int, request: str, *headers: str, body: bytes = b"", timeout_s: float = 2.0
) -> tuple[int, bytes]:
    """Status and body of the answer to an HTTP request such as `GET /stats`; status 0: no answer."""
    lines = f"{request} HTTP/1.1", "Host: hub", "Connection: close", f"Content-Length: {len(body)}", *headers

    class Asking(asyncio.Protocol):
        def __init__(self) -> None:
            self.data = b""
            self.ended: asyncio.Future[None] = loop.create_future()

        def connection_made(self, transport: Any) -> None:
            transport.write("\r\n".join([*lines, "\r\n"]).encode() + body)

        def data_received(self, data: bytes) -> None:
            self.data += data

        def connection_lost(self, error: Exception | None) -> None:
            if not self.ended.done():
                self.ended.set_result(None)

    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, asking = await loop.create_connection(Asking, HOST, port)
            assert isinstance(asking, Asking)
            await asking.ended
    except (OSError, TimeoutError):
        return 0, b""
    finally:
        if transport is not None:
            transport.abort()
    head, _, answer = asking.data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    if not head or (length and len(answer) < int(length[1])):
        return 0, b""  # the hub has ended in the middle of it
    return int(head.split()[1]), answer

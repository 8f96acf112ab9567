"""A TCP proxy in which things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, cast

import hiredis

from tests.certificates import Certificates
from tests.support.ports import free_port
from tests.support.timing import UNIT_S

_HELD_BYTES: Final = 65_536
"""So much of one connection and direction is held at most; then its sender has to wait."""

_SPLIT_S: Final = 0.0002
"""Seconds between two pieces of what is split."""


@dataclass
class Way:
    """What happens to the bytes of one direction; none are lost.

    Attributes:
        blocked: Nothing arrives as long as it is set (a black hole), no end of a connection either.
        bytes_per_s: How much arrives, of each connection.
        delay_s: Seconds until something arrives.
        split: The most bytes that arrive in one piece; 0: as many as there are.
    """

    blocked: bool = False
    bytes_per_s: float = math.inf
    delay_s: float = 0.0
    split: int = 0

    @property
    def clear(self) -> bool:
        return self == Way()


class Proxy:
    """Passes bytes on to a port of this host, until told otherwise; an event loop in a thread of its own.

    Attributes:
        port: Where it listens on 127.0.0.1.
        target_port: Where the next connections go.
        deaf: While it is set, what the target says is lost.
        refuses: Whether new connections are reset.
        requests: What happens to what clients say; changed by `change`.
        answers: What happens to what the target says.
    """

    def __init__(
        self, target_port: int, certificates: Certificates | None = None, *, beside: Proxy | None = None
    ) -> None:
        """`beside`: another one, in whose thread it is; that one ends later."""
        self.port = free_port()
        self.target_port = target_port
        self.deaf = threading.Event()
        self.refuses = False
        self.requests = Way()
        self.answers = Way()
        self.links: dict[_Link, None] = {}
        self._tls: ssl.SSLContext | None = None
        if certificates is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(certificates.certificate, certificates.key)
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._server: asyncio.Server
        self._beside = beside
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name=f"proxy-{self.port}")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda loop, what: None)  # a client that breaks off is none of its cares
        await self._open()
        self._listening.set()
        await self._stop.wait()
        await self._close()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self).client, "127.0.0.1", self.port, ssl=self._tls)

    async def _close(self) -> None:
        self._server.close()
        for link in list(self.links):
            await link.end()

    def _do(self, work: Callable[[], object]) -> None:
        """Do something in the proxy's thread, and wait until it is done."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        done.result(10 * UNIT_S)

    def _each(self, do: Callable[[_Link], None]) -> None:
        for link in list(self.links):
            do(link)

    def cut(self) -> None:
        """End all connections there are, on both sides, with a RST; what was withheld is lost."""
        self._do(lambda: self._each(_Link.cut))

    def swallow(self) -> None:
        """From now on the connections there are take everything and pass nothing on; new ones work."""
        self._do(lambda: self._each(_Link.swallow))

    def half_open(self, *, at_client: bool) -> None:
        """End the connections there are with a RST at one side; the other one never learns of it."""
        self._do(lambda: self._each(lambda link: link.half_open(at_client=at_client)))

    def change(self, *ways: Way, **conditions: float) -> None:
        """Change what happens to the bytes of `requests`, `answers` or both, those that are held included."""

        def change() -> None:
            for way in ways:
                for name, value in conditions.items():
                    setattr(way, name, value)
            self._each(_Link.pump)

        self._do(change)

    def withhold(self) -> None:
        """From now on answers do not arrive; requests do."""
        self.change(self.answers, blocked=True)

    def let_through(self) -> None:
        """Answers arrive again, also those that were withheld."""
        self.change(self.answers, blocked=False)

    def inject(self, *words: str) -> None:
        """Say something to Redis on every connection, as if the client had."""
        command = hiredis.pack_command(cast(Any, words))
        self._do(lambda: self._each(lambda link: link.target.write(command)))

    def __enter__(self) -> Self:
        if self._beside is not None:
            self._loop = self._beside._loop
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10 * UNIT_S)
        else:
            self._thread.start()
            assert self._listening.wait(10 * UNIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._beside is not None:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10 * UNIT_S)
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10 * UNIT_S)
        assert not self._thread.is_alive()


class _Link:
    """A connection of the proxy and its way on."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.swallows = False
        self.client, self.target = _End(self), _End(self)
        self.client.other, self.target.other = self.target, self.client
        self._requests = _Pipe(self.client, self.target, proxy.requests)
        self._answers = _Pipe(self.target, self.client, proxy.answers)
        self._connecting: asyncio.Task[None] | None = None

    def on_made(self, end: _End) -> None:
        if end is self.client:
            self.proxy.links[self] = None
            if self.proxy.refuses:
                end.reset()
                return
            end.hold("connecting")
            self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self.target, "127.0.0.1", self.proxy.target_port)
        except OSError:
            self.target.lost = True
            self._answers.put(b"")
        else:
            if self.client.lost:
                self.target.transport.abort()
            else:
                self.client.release("connecting")
                self._requests.pump()  # some versions of asyncio have read already, although they may not

    def pass_on(self, end: _End, data: bytes) -> None:
        if self.swallows:
            return
        if end is self.client:
            self._requests.put(data)
        elif not self.proxy.deaf.is_set():
            self._answers.put(data)

    def pump(self) -> None:
        self._requests.pump()
        self._answers.pump()

    def swallow(self) -> None:
        self.swallows = True
        self._drop()

    def half_open(self, *, at_client: bool) -> None:
        self.swallow()
        (self.client if at_client else self.target).reset()

    def _drop(self) -> None:
        self._requests.drop()
        self._answers.drop()

    def on_lost(self, end: _End) -> None:
        if end.other.lost:
            self.proxy.links.pop(self, None)
            self._drop()
        elif not self.swallows:
            (self._requests if end is self.client else self._answers).put(b"")

    def cut(self) -> None:
        self._drop()
        for end in (self.client, self.target):
            end.reset()

    async def end(self) -> None:
        self.cut()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self.cut()


class _Pipe:
    """One direction of a connection: holds what may not arrive yet."""

    def __init__(self, source: _End, sink: _End, way: Way) -> None:
        self._source = source
        self._sink = sink
        self._way = way
        self._held: deque[tuple[float, bytes]] = deque()  # when it was sent; nothing: the end
        self._size = 0
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, data: bytes) -> None:
        """Something was sent; nothing: the end."""
        if not self._held and self._way.clear and self._sink.met:
            self._give(data)
            return
        self._held.append((asyncio.get_running_loop().time(), data))
        self._size += len(data)
        if self._size > _HELD_BYTES:
            self._source.hold("held")
        self.pump()

    def pump(self) -> None:
        """Pass on what may arrive now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop, way = asyncio.get_running_loop(), self._way
        while self._held and not way.blocked and self._sink.met:
            sent_at, data = self._held[0]
            if (at := max(sent_at + way.delay_s, self._free_at)) > loop.time():
                self._timer = loop.call_at(at, self.pump)
                return
            most = min(way.bytes_per_s * 0.02, random.randint(1, way.split) if way.split else math.inf)
            piece = data[: max(1, int(most))] if most < len(data) else data
            self._held.popleft()
            if len(piece) < len(data):
                self._held.appendleft((sent_at, data[len(piece) :]))
            self._size -= len(piece)
            self._free_at = loop.time() + len(piece) / way.bytes_per_s + (_SPLIT_S if way.split else 0.0)
            self._give(piece)
        if self._size <= _HELD_BYTES:
            self._source.release("held")

    def _give(self, data: bytes) -> None:
        if data:
            self._sink.write(data)
        elif self._sink.open:
            self._sink.transport.close()

    def drop(self) -> None:
        self._held.clear()
        self._size = 0
        if self._timer is not None:
            self._timer.cancel()
        self._source.release("held")


class _End(asyncio.Protocol):
    """One side of a connection; it reads no faster than the other one takes."""

    other: _End

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.transport: asyncio.Transport
        self.open = False
        self.lost = False
        self._holds: set[str] = set()

    @property
    def met(self) -> bool:
        """Whether it is there, or was."""
        return self.open or self.lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = cast(asyncio.Transport, transport), True
        self._link.on_made(self)

    def data_received(self, data: bytes) -> None:
        self._link.pass_on(self, data)

    def write(self, data: bytes) -> None:
        if self.open and data:
            self.transport.write(data)

    def hold(self, why: str) -> None:
        """Read nothing as long as there is a reason."""
        self._holds.add(why)
        if self.open:
            self.transport.pause_reading()

    def release(self, why: str) -> None:
        self._holds.discard(why)
        if self.open and not self._holds and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.other.hold("full")

    def resume_writing(self) -> None:
        self.other.release("full")

    def connection_lost(self, error: Exception | None) -> None:
        self.open, self.lost = False, True
        self._link.on_lost(self)

    def reset(self) -> None:
        if self.open:
            with contextlib.suppress(OSError, AttributeError):
                ending = self.transport.get_extra_info("socket")
                ending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

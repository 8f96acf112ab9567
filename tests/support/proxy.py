"""A TCP proxy in which things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, cast

import hiredis

from tests.certificates import Certificates
from tests.support.ports import free_port
from tests.support.timing import UNIT_S


class Proxy:
    """Passes bytes on to a port of this host, until told otherwise; an event loop in a thread of its own.

    Attributes:
        port: Where it listens on 127.0.0.1.
        target_port: Where the next connections go.
        deaf: While it is set, what the target says is lost.
    """

    def __init__(self, target_port: int, certificates: Certificates | None = None) -> None:
        self.port = free_port()
        self.target_port = target_port
        self.deaf = threading.Event()
        self.withheld = False
        self.links: dict[_Link, None] = {}
        self._tls: ssl.SSLContext | None = None
        if certificates is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(certificates.certificate, certificates.key)
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name=f"proxy-{self.port}")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda loop, what: None)  # a client that breaks off is none of its cares
        server = await self._loop.create_server(lambda: _Link(self).client, "127.0.0.1", self.port, ssl=self._tls)
        self._listening.set()
        await self._stop.wait()
        server.close()
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

    def withhold(self) -> None:
        """From now on answers do not arrive; requests do."""
        self._do(lambda: setattr(self, "withheld", True))

    def let_through(self) -> None:
        """Answers arrive again, also those that were withheld."""

        def release() -> None:
            self.withheld = False
            self._each(_Link.release)

        self._do(release)

    def inject(self, *words: str) -> None:
        """Say something to Redis on the newest connection, as if the client had."""
        command = hiredis.pack_command(cast(Any, words))
        self._do(lambda: next(reversed(self.links)).target.write(command))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10 * UNIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._held: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None

    def on_made(self, end: _End) -> None:
        if end is self.client:
            self.proxy.links[self] = None
            end.transport.pause_reading()
            self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self.target, "127.0.0.1", self.proxy.target_port)
        except OSError:
            self.client.transport.abort()
        else:
            if self.client.lost:
                self.target.transport.abort()
            else:
                self.client.transport.resume_reading()

    def pass_on(self, end: _End, data: bytes) -> None:
        if self.swallows:
            return
        if end is self.client:
            self.target.write(data)
        elif self.proxy.withheld:
            self._held.append(data)
        elif not self.proxy.deaf.is_set():
            self.client.write(data)

    def release(self) -> None:
        self.client.write(b"".join(self._held))
        self._held.clear()

    def swallow(self) -> None:
        self.swallows = True

    def on_lost(self, end: _End) -> None:
        if end.other.lost:
            self.proxy.links.pop(self, None)
        elif not self.swallows and end.other.open:
            end.other.transport.close()

    def cut(self) -> None:
        self._held.clear()
        for end in (self.client, self.target):
            end.reset()

    async def end(self) -> None:
        self.cut()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self.cut()


class _End(asyncio.Protocol):
    """One side of a connection; it reads no faster than the other one takes."""

    other: _End

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.transport: asyncio.Transport
        self.open = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = cast(asyncio.Transport, transport), True
        self._link.on_made(self)

    def data_received(self, data: bytes) -> None:
        self._link.pass_on(self, data)

    def write(self, data: bytes) -> None:
        if self.open and data:
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.other.open:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.open:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.open, self.lost = False, True
        self._link.on_lost(self)

    def reset(self) -> None:
        if self.open:
            with contextlib.suppress(OSError, AttributeError):
                ending = self.transport.get_extra_info("socket")
                ending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

"""Many subscribers in one process, built so that the rig is not in the picture.

When bytes arrive, the clock is read and both are put on a list; that is all. Frames are parsed and events are
read later, in short slices, when nothing is arriving.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import ssl
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from broadcaster.errors import InvalidEvent
from broadcaster.event import check
from broadcaster.loadtest.records import DeliveryRecord
from broadcaster.wire import PING, Outbound

log = logging.getLogger("broadcaster.fleet")

_SLICE_S: Final = 0.001
"""Longest stretch of parsing while an event may arrive."""
_QUIET_NS: Final = 5_000_000
"""Nothing has arrived for so long: a good moment to parse."""
_BACKLOG_BYTES: Final = 64 * 2**20
"""Unparsed bytes beyond which parsing does not wait for a quiet moment."""
_LAG_EVERY_S: Final = 0.02
_CONNECTING_AT_ONCE: Final = 200
_CONNECT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What a fleet process says of itself.

    Attributes:
        process: Its number, from 1.
        clients: Clients it was to connect.
        connected: Clients that did connect.
        disconnects: Clients that lost their connection before the end, by close code (`1006`: without).
        failures: Clients that could not connect, by reason.
        foreign: Messages that were no events.
        lag_p50_ms, lag_p99_ms, lag_max_ms: How late its event loop ran a timer: the error bar of its stamps.
    """

    process: int
    clients: int
    connected: int
    disconnects: dict[str, int]
    failures: dict[str, int]
    foreign: int
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float


class Client(asyncio.Protocol):
    """One subscriber: answers pings, stamps what arrives."""

    def __init__(self, number: int, fleet: Fleet) -> None:
        self.number = number
        self.outbound = Outbound(fleet.url)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals = fleet.arrivals
        self._fleet = fleet
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.write(self.outbound.request())

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()  # the receive has just returned: nothing comes before this line
        if not self.outbound.connected:
            self._shake_hands(now_ns, data)
            return
        self._arrivals.append((now_ns, self, data))
        self._fleet.arrived_bytes += len(data)
        if PING in data:  # not inside an event, which has no NUL; in a frame's length it costs one pong too many
            self.write(self.outbound.pong())

    def _shake_hands(self, now_ns: int, data: bytes) -> None:
        messages = self.outbound.feed(data)
        self._fleet.record(now_ns, self, messages)
        if not self.ready.done() and (self.outbound.connected or self.outbound.failure):
            self.ready.set_result(None)

    def write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
        elif self.outbound.connected:
            self._fleet.lost.append(self)


class Fleet:
    """The clients of one process and what they have received.

    Attributes:
        url: The hub's ws:// address.
        deliveries: What has been parsed so far; empty if it is only counted.
        received: How many deliveries have been parsed.
        arrivals: What has arrived and is not parsed: time in ns (CLOCK_MONOTONIC), client, bytes.
        lost: Clients that lost their connection, in order.
    """

    def __init__(
        self, url: str, *, first: int = 0, clients: int, ramp_per_s: float, only_count: bool = False
    ) -> None:
        self.url = url
        self._only_count = only_count
        self.received = 0
        self.deliveries: list[DeliveryRecord] = []
        self.arrivals: deque[tuple[int, Client, bytes]] = deque()
        self.arrived_bytes = 0
        self.lost: list[Client] = []
        self._first = first
        self._count = clients
        self._ramp_per_s = ramp_per_s
        self._clients: list[Client] = []
        self._failures: Counter[str] = Counter()
        self._foreign = 0
        self._known: dict[bytes, tuple[str, int]] = {}
        self._wall_ahead_ns = time.time_ns() - time.monotonic_ns()
        self._lags_ms: list[float] = []

    # Connecting

    async def connect(self) -> None:
        """Connect all clients at the ramp's pace; who cannot is counted, not retried."""
        parts = urlsplit(self.url)
        tls = ssl.create_default_context() if parts.scheme == "wss" else None
        port = parts.port or (443 if tls else 80)
        gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def one(number: int) -> None:
            await asyncio.sleep(start + number / self._ramp_per_s - loop.time())
            async with gate:
                client = Client(self._first + number, self)
                try:
                    async with asyncio.timeout(_CONNECT_S):
                        await loop.create_connection(lambda: client, parts.hostname or "127.0.0.1", port, ssl=tls)
                        await client.ready
                except TimeoutError:
                    self._failures[f"no answer within {_CONNECT_S:g} s"] += 1
                    client.abort()
                    return
                except OSError as error:
                    self._failures[f"cannot connect: {error.strerror or error}"] += 1
                    return
            if client.outbound.connected:
                self._clients.append(client)
            else:
                self._failures[client.outbound.failure or "closed during the handshake"] += 1

        gc.collect()
        gc.disable()  # a collection over thousands of stamps would be a pause in the measurement
        await asyncio.gather(*(one(number) for number in range(self._count)))

    @property
    def connected(self) -> int:
        return len(self._clients) - len(self.lost)

    # Parsing, later

    async def keep_parsing(self) -> None:
        """Parse in slices while nothing arrives; runs until cancelled."""
        while True:
            await asyncio.sleep(0.005)
            if self.arrivals and (self._is_quiet() or self.arrived_bytes > _BACKLOG_BYTES):
                self.parse(_SLICE_S)

    def _is_quiet(self) -> bool:
        return time.monotonic_ns() - self.arrivals[-1][0] > _QUIET_NS

    def parse(self, within_s: float) -> None:
        """Parse arrivals for at most about `within_s` seconds."""
        end = time.monotonic() + within_s
        while self.arrivals and time.monotonic() < end:
            stamp_ns, client, data = self.arrivals.popleft()
            self.arrived_bytes -= len(data)
            self.record(stamp_ns, client, client.outbound.feed(data))
            client.write(client.outbound.to_send())

    def record(self, stamp_ns: int, client: Client, messages: list[bytes]) -> None:
        """Note what a client received; the same bytes are decoded once for all clients."""
        for message in messages:
            known = self._known.get(message)
            if known is None:
                try:
                    fields = check(message, max_bytes=len(message))
                except InvalidEvent:
                    self._foreign += 1
                    continue
                if len(self._known) >= 1024:
                    self._known.clear()
                known = self._known[message] = (fields["event_id"], fields["sequence"])
            self.received += 1
            if self._only_count:
                continue
            wall_us = (stamp_ns + self._wall_ahead_ns) // 1000
            self.deliveries.append(DeliveryRecord(client.number, *known, stamp_ns, wall_us))

    # Knowing oneself

    async def keep_measuring_lag(self) -> None:
        """Record how late this loop runs a timer; runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lags_ms.append((loop.time() - due) * 1000)

    def result(self, process: int) -> FleetResult:
        lags = sorted(self._lags_ms) or [0.0]
        return FleetResult(
            process=process,
            clients=self._count,
            connected=len(self._clients),
            disconnects=dict(Counter(str(client.outbound.close_code or 1006) for client in self.lost)),
            failures=dict(self._failures),
            foreign=self._foreign,
            lag_p50_ms=round(lags[len(lags) // 2], 3),
            lag_p99_ms=round(lags[int(len(lags) * 0.99)], 3),
            lag_max_ms=round(lags[-1], 3),
        )

    async def close(self) -> None:
        """Say goodbye (1000) and go; who is not answered at once does not wait."""
        for client in self._clients:
            client.write(client.outbound.close())
        await asyncio.sleep(0.1)
        for client in self._clients:
            client.abort()

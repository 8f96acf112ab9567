"""Many subscribers in one process, built to influence the measurement as little as possible.

When bytes arrive, the clock is read and both are appended to a list, nothing else. Frames are parsed and events
decoded later, in short slices, when nothing is arriving. A client that loses its connection reconnects by itself
and resumes at its position.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from broadcaster.core import dialing
from broadcaster.core.backoff import LONGEST_HINT_S
from broadcaster.core.bounded import BoundedDict
from broadcaster.core.errors import ConfigurationError, InvalidEvent
from broadcaster.core.event import Event, decode
from broadcaster.core.position import Position
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest.client import Client, Connection, Inbox, may_close
from broadcaster.loadtest.records import DeliveryRecord, LossRecord
from broadcaster.loadtest.rig import LagMeter, Stall, step_of
from broadcaster.settings import SubscriberTable, websocket_url
from broadcaster.wire import read_control, tls

log = logging.getLogger("broadcaster.fleet")

_SLICE_S: Final = 0.001
"""Longest stretch of parsing while an event may arrive."""
_QUIET_NS: Final = 5_000_000
"""Nothing has arrived for so many ns: parsing may begin."""
_BACKLOG_BYTES: Final = 64 * 2**20
"""Unparsed bytes beyond which parsing does not wait for a quiet moment."""
_KNOWN_EVENTS: Final = 1024
"""Decoded events that are cached by their bytes."""
_CONNECTING_AT_ONCE: Final = 200
_CONNECT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class FleetResult:
    """The result of a fleet process.

    Attributes:
        process: Its number, from 1.
        clients: Clients it was to connect.
        connected: Clients that did connect.
        disconnects: Connections that were lost before the end, by close code (`1006`: without).
        failures: Clients that could not connect, or not again, by reason.
        foreign: Messages that were neither events nor control frames.
        lag_p50_ms, lag_p99_ms, lag_max_ms, lag_usual_ms, busy_pct, stalls: See `Lag`.
        reconnects: Connections that were opened after a client had lost one.
        deliveries: Rows of its delivery log.
        losses: Rows of its log of losses.
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
    lag_usual_ms: float
    busy_pct: float
    stalls: list[Stall]
    reconnects: int
    deliveries: int
    losses: int


class Fleet:
    """The clients of one process and what they have received.

    Attributes:
        url: The hub's ws:// address.
        deliveries: What has been parsed so far; empty if it is only counted.
        received: How many deliveries have been parsed.
        decoded: How many different events they were, also those of other sources.
        reconnects: How often a client that had lost its connection has reconnected.
        inbox: What has arrived and is not parsed.
        stored: By event_id of the events that count: position, and when it was stored (us since 1970).
        lag: Measures how late its event loop is.
        latencies: Of the deliveries so far, roughly: how many by `step_of` the time since they were written.
    """

    def __init__(
        self,
        url: str,
        *,
        first: int = 0,
        clients: int,
        ramp_per_s: float,
        subscriber: SubscriberTable | None = None,
        only_count: bool = False,
        source: str = "",
    ) -> None:
        """Prepare a fleet; nothing is connected yet.

        Args:
            url: The hub's ws:// address.
            first: Number of the first client.
            clients: How many.
            ramp_per_s: Connections opened per second.
            subscriber: Token, TLS verification and longest wait of each before it reconnects; None: defaults.
            only_count: Keep no deliveries and no losses.
            source: Events of other sources are received, and not counted; empty: all are counted.

        Raises:
            ConfigurationError: The address cannot be connected to, or has a `since` that is no position, or
                `subscriber.tls_ca` cannot be read.
        """
        self._only_count = only_count
        self._source = source
        subscriber = subscriber or SubscriberTable()
        try:
            self.url = url = websocket_url(url)
            self._all = [
                Client(number, url, only_count=only_count, reconnect_max_s=subscriber.reconnect_max_s)
                for number in range(first, first + clients)
            ]
        except ValueError as error:
            raise ConfigurationError(f"fleet.url: {error}") from None
        parts = urlsplit(url)
        self._token = subscriber.token.get_secret_value()
        self._tls = tls.client_context(url, subscriber.tls_ca)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        self._ramp_per_s = ramp_per_s
        self._clients: list[Client] = []
        self._away: asyncio.Queue[Client] = asyncio.Queue()
        self._disconnects: Counter[int] = Counter()
        self._failures: Counter[str] = Counter()
        self.reconnects = self.received = self.decoded = 0
        self.inbox = Inbox()
        self.deliveries: list[DeliveryRecord] = []
        self.stored: dict[str, tuple[Position | None, int | None]] = {}
        self._foreign = 0
        self._refused = ""
        self._known = BoundedDict[bytes, Event](_KNOWN_EVENTS)
        self._wall_ahead_ns = CLOCK.wall_ahead_ns()
        self.lag = LagMeter()
        self.latencies: Counter[int] = Counter()

    # Connecting

    async def connect(self) -> None:
        """Connect all clients at the ramp's pace; one that cannot connect is counted, not retried."""
        start = CLOCK.loop_s()

        async def one(index: int, client: Client) -> None:
            await asyncio.sleep(start + index / self._ramp_per_s - CLOCK.loop_s())
            if self._refused and not self._clients:  # what one is refused for good, all are
                self._failures[self._refused] += 1
                client.on_never_connected(CLOCK.monotonic_ns())
                return
            connection, failure = await self._open(client)
            if connection.outbound.connected:
                self._clients.append(client)
            else:
                if connection.outbound.is_final_refusal:
                    self._refused = failure
                self._failures[failure] += 1
                client.on_never_connected(CLOCK.monotonic_ns())

        gc.collect()
        gc.disable()  # a collection over thousands of stamps would be a pause in the measurement
        await asyncio.gather(*(one(index, client) for index, client in enumerate(self._all)))

    async def _open(self, client: Client) -> tuple[Connection, str]:
        """Try to connect a client; return its connection, and why it failed if it did."""
        async with self._gate:
            connection = Connection(client, self.inbox, self.record, self._token)
            failure = ""
            try:
                async with asyncio.timeout(_CONNECT_S):
                    await dialing.connect(lambda: connection, self._host, self._port, self._tls)
                    await connection.ready
            except TimeoutError:
                failure = f"no answer within {_CONNECT_S:g} s"
            except OSError as error:
                failure = f"cannot connect: {tls.why_not_connected(error)}"
            finally:
                if not connection.outbound.connected:
                    connection.abort()
                    connection.outbound.dispose()
        return connection, failure or connection.outbound.failure or "closed during the handshake"

    async def keep_coming_back(self) -> None:
        """Reconnect clients that have lost their connection; runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._come_back(await self._away.get()))

    async def _come_back(self, client: Client) -> None:
        for wait_s in client.backoff.waits_s():
            await asyncio.sleep(min(client.hint_s, LONGEST_HINT_S) + wait_s)
            connection, failure = await self._open(client)
            if connection.outbound.connected:
                self.reconnects += 1
                return
            if connection.outbound.is_final_refusal:
                client.gone = True
                self._failures[failure] += 1
                return
            client.hint_s = connection.outbound.retry_after_s

    @property
    def connected(self) -> int:
        return sum(client.connection is not None for client in self._clients)

    def awaiting(self, events: int) -> int:
        """How many deliveries may still arrive, now or after a reconnect, if each client is to have `events`."""
        return sum(max(0, events - client.received) for client in self._clients if not client.gone)

    # Parsing, later

    async def keep_parsing(self) -> None:
        """Parse in slices while nothing arrives; runs until cancelled."""
        while True:
            await asyncio.sleep(0 if self.inbox.lost else 0.005)
            if self._is_time_to_parse():
                self.parse(_SLICE_S)

    @property
    def is_quiet(self) -> bool:
        """Whether all that has come is parsed: nothing disturbs the measurement now."""
        return not self.inbox.arrivals

    @property
    def highest_sequence(self) -> int:
        """Of the events that have come; 0: none has."""
        return max((client.highest_sequence or 0 for client in self._clients), default=0)

    def _is_time_to_parse(self) -> bool:
        # A client can reconnect only once it is known up to where everything had arrived on its lost connection.
        if self.inbox.lost or self.inbox.bytes > _BACKLOG_BYTES:
            return True
        arrivals = self.inbox.arrivals
        return bool(arrivals) and CLOCK.monotonic_ns() - arrivals[-1][0] > _QUIET_NS

    def parse(self, within_s: float) -> None:
        """Parse arrivals for at most about `within_s` seconds."""
        arrivals = self.inbox.arrivals
        end = CLOCK.monotonic_s() + within_s
        while arrivals and CLOCK.monotonic_s() < end:
            stamp_ns, connection, data = arrivals.popleft()
            if not data:
                self._read_loss(stamp_ns, connection)
                continue
            self.inbox.bytes -= len(data)
            self.inbox.lost -= may_close(data)
            self.record(stamp_ns, connection.client, connection.outbound.feed(data))
            connection.write(connection.outbound.to_send())

    async def parse_all(self) -> None:
        """Parse everything that has arrived."""
        while self.inbox.arrivals:
            self.parse(_SLICE_S)
            await asyncio.sleep(0)

    def _read_loss(self, stamp_ns: int, connection: Connection) -> None:
        outbound = connection.outbound
        close_code = outbound.close_code or 1006
        outbound.dispose()
        self.inbox.lost -= 1
        self._disconnects[close_code] += 1
        connection.client.on_lost(close_code, stamp_ns, may_resume=outbound.speaks_v1)
        self._away.put_nowait(connection.client)

    def record(self, stamp_ns: int, client: Client, messages: list[bytes]) -> None:
        """Record what a client received; the bytes of an event are decoded once for all clients."""
        for message in messages:
            event = self._known.get(message)
            if event is None:
                if (control := read_control(message)) is not None:
                    client.on_control(control, stamp_ns)
                    continue
                try:
                    event = decode(message, max_bytes=len(message))
                except InvalidEvent:
                    self._foreign += 1
                    continue
                self._known[message] = event
                self.decoded += 1
                if not self._only_count and self._source in ("", event.source):
                    self.stored[event.event_id] = event.position, event.stored_at_us
            self.inbox.note_event(len(message))
            if self._source not in ("", event.source):
                client.on_other(event)
                continue
            self.received += 1
            client.on_event(event)
            if self._only_count:
                continue
            wall_us = (stamp_ns + self._wall_ahead_ns) // 1000
            if event.published_at_us:
                self.latencies[step_of(wall_us - event.published_at_us)] += 1
            row = DeliveryRecord(client.number, event.event_id, event.sequence, stamp_ns, wall_us)
            self.deliveries.append(row)

    # The result

    def losses(self) -> list[LossRecord]:
        """The possible losses of all clients, by client and in order."""
        return [row for client in self._all for row in client.losses]

    def result(self, process: int) -> FleetResult:
        """The result of this process, by its number. Its lag is that from its first to its last delivery."""
        # Not from the first publish: that is an instant of the publisher's clock, which may be of another host.
        received_ns = [row.received_mono_ns for row in self.deliveries]
        lag = self.lag.between(min(received_ns, default=0), max(received_ns, default=CLOCK.monotonic_ns()))
        return FleetResult(
            process=process,
            clients=len(self._all),
            connected=len(self._clients),
            disconnects={str(code): count for code, count in self._disconnects.items()},
            failures=dict(self._failures),
            foreign=self._foreign,
            reconnects=self.reconnects,
            deliveries=len(self.deliveries),
            losses=len(self.losses()),
            lag_p50_ms=lag.lag_p50_ms,
            lag_p99_ms=lag.lag_p99_ms,
            lag_max_ms=lag.lag_max_ms,
            lag_usual_ms=lag.lag_usual_ms,
            busy_pct=lag.busy_pct,
            stalls=lag.stalls,
        )

    async def close(self) -> None:
        """Close all connections (1000), and abort them after 0.1 s, answered or not."""
        connections = [client.connection for client in self._all if client.connection is not None]
        for connection in connections:
            connection.write(connection.outbound.close())
        await asyncio.sleep(0.1)
        for connection in connections:
            connection.abort()

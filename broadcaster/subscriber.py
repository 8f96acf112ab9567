"""The client library: events as an `async for`; resuming by itself, and saying what it could not be given."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from broadcaster import event as events
from broadcaster import trust
from broadcaster.errors import HubRefused, InvalidEvent
from broadcaster.event import Event
from broadcaster.notices import Fresh, Notice, Stale
from broadcaster.place import Places
from broadcaster.position import Gap, Position
from broadcaster.settings import Settings, load
from broadcaster.wire import client, read_control

log = logging.getLogger("broadcaster.subscriber")

RECENT_IDS: Final = 1024
"""Events whose id is remembered, to drop them when they come again."""

_SOURCES: Final = 10_000
"""Sources whose last number is remembered; the one heard of longest ago is forgotten first."""

_MISSED_BEATS: Final = 3
_PONG_S: Final = 2.0
_GRACE_S: Final = 0.5


class Subscriber:
    """A subscriber: `async with Subscriber() as subscriber: async for event in subscriber: ...`.

    The iteration does not end by itself. When the connection is lost, a new one is made, with full-jitter
    back-off, and goes on where the old one ended: what was published meanwhile is delivered. What cannot be
    is a `Gap`. `receive` returns gaps and blindness in their place among the events; the iteration returns
    events only, and counts the rest.

    Attributes:
        positions: Per channel: up to where everything was handed out, or told as a gap.
        stale: Whether beats are missing: no news is no good news.
        received: Events received.
        twins: Events that came again and were dropped.
        gaps: Ranges that could not be given.
        missing: Per source: numbers of its `sequence` that were skipped (on one channel, without a filter).
        reconnects: Connections made after the first.
        invalid: Messages that were no events.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        channels: Sequence[str] = (),
        since: Position | str | Mapping[str, Position] | None = None,
        types: Sequence[str] = (),
        sources: Sequence[str] = (),
        severities: Sequence[str] = (),
        token: str | Callable[[], str] | None = None,
    ) -> None:
        """Prepare a subscriber; nothing is connected yet.

        Args:
            url: ws:// or wss:// address of a hub, such as `ws://127.0.0.1:8765/ws`; None takes the configured.
            settings: None reads broadcaster.toml and the environment.
            channels: Which to receive; none: those of the url, or the hub's default.
            since: Begin after this position, as `positions` had it; None: now. With several channels: each.
            types: Receive only events of these types; none: all.
            sources: Receive only events of these sources; none: all.
            severities: Receive only events of these severities; none: all.
            token: What to show to the hub; a function is asked before every connection, so that it can bring a
                fresh one. None takes the configured.

        Raises:
            ConfigurationError: `subscriber.tls_ca` cannot be read.
            ValueError: `since` is no position, or one for several channels.
        """
        settings = settings or load().settings
        self._settings = settings.subscriber
        self._max_bytes = settings.event.max_bytes
        url = url or settings.subscriber_url
        self._places = Places(url, channels, since, types, sources, severities)
        self._token = self._settings.token.get_secret_value() if token is None else token
        self._tls = trust.context(url, self._settings.tls_ca)
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._last_sequence: dict[str, int] = {}
        # What to hand out, each with the position that is reached by it; without a notice: only that.
        self._notices: deque[tuple[Notice | None, str, Position | None]] = deque()
        self._handed: dict[str, Position] = self._places.named()
        self._connection: client.ClientConnection | None = None
        self._connected_before = False
        self._failures = 0
        self._hint_s = 0.0
        self._complained = False
        self._left = False
        self._beat_interval_s = settings.hub.beat_interval_s
        self._beat_at = 0.0
        self._stale_at = 0.0
        self._pong: asyncio.Future[float] | None = None
        self._pong_by = 0.0
        self.stale = False
        self.received = 0
        self.twins = 0
        self.gaps = 0
        self.missing: Counter[str] = Counter()
        self.reconnects = 0
        self.invalid = 0

    @property
    def positions(self) -> dict[str, Position]:
        return dict(self._handed)

    @property
    def position(self) -> Position | None:
        """The position of the only channel; None before it is known, or when events are not stored."""
        return next(iter(self._handed.values()), None)

    async def __aenter__(self) -> Subscriber:
        self._on_beat()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._connection is not None:
            await self._connection.close()

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Event:
        """The next event; a wait that is cancelled loses none.

        Raises:
            HubRefused: The hub will not have us, and trying again will not help.
        """
        while (notice := await self.receive()) is not None:
            if isinstance(notice, Event):
                return notice
        raise StopAsyncIteration

    async def receive(self) -> Notice | None:
        """The next event, gap or change of `stale`; None once the subscriber was left.

        A wait that is cancelled loses nothing.

        Raises:
            HubRefused: The hub will not have us, and trying again will not help.
        """
        while not self._left:
            if self._notices:
                notice, channel, position = self._notices.popleft()
                if position is not None:
                    self._handed[channel] = position
                if notice is not None:
                    return notice
                continue
            try:
                async with asyncio.timeout_at(self._deadline()):
                    message = await self._next_message()
            except TimeoutError:
                await self._on_silence()
            else:
                if message is not None:
                    self._read(message, received_us=time.time_ns() // 1000)
        return None

    # The connection

    async def _next_message(self) -> bytes | None:
        """The next message; None if losing the connection is news enough."""
        while not self._notices:
            connection = self._connection or await self._connect()
            try:
                return await connection.recv(decode=False)
            except client.ConnectionClosed as error:
                log.warning("connection closed: %s; connecting again", error)
                self._connection = self._pong = None
                self._complained = True
                self._failures = 1  # also the first attempt waits a little: everybody else comes back, too
                if client.came_back_in_vain(error):
                    for gap in self._places.forget():
                        self._announce(gap)
                    self._handed.clear()
        return None

    async def _connect(self) -> client.ClientConnection:
        while True:
            if self._failures:
                longest_s = min(self._settings.reconnect_max_s, 0.1 * 2 ** min(self._failures, 10))
                await asyncio.sleep(self._hint_s + random.uniform(0, longest_s))
                self._hint_s = 0.0
            url = self._places.url()
            try:
                connection = await client.open_connection(
                    url,
                    timeout_s=self._settings.connect_timeout_s,
                    max_queue=self._settings.queue_events,
                    token=self._token() if callable(self._token) else self._token,
                    tls=self._tls,
                )
            except (OSError, TimeoutError, client.InvalidHandshake) as error:
                if isinstance(error, client.InvalidHandshake):
                    if said := client.refused_for_good(error):
                        raise HubRefused(f"{url}: {said}") from None
                    self._hint_s = min(client.retry_after_s(error), 60.0)
                if not self._complained:
                    log.warning("%s: %s; trying again", url, error)
                self._complained = True
                self._failures += 1
            else:
                log.info("connected to %s", url)
                self.reconnects += self._connected_before
                self._connected_before = True
                self._failures = 0
                self._complained = False
                self._connection = connection
                return connection

    # Blindness

    def _deadline(self) -> float | None:
        """Loop time at which silence means something."""
        if self._pong is not None:
            return self._pong_by
        return None if self.stale else self._stale_at

    async def _on_silence(self) -> None:
        """Beats are missing: say so, and find out whether there is still somebody at the other end."""
        now = asyncio.get_running_loop().time()
        if self._connection is not None and not client.can_beat(self._connection):
            self._stale_at = now + _MISSED_BEATS * self._beat_interval_s  # this hub never beats
        elif not self.stale and now > self._stale_at + _GRACE_S:
            self._stale_at = now + _GRACE_S  # it was us who did not listen: the beats may be waiting
        elif not self.stale:
            self.stale = True
            self._notices.append((Stale(now - self._beat_at), "", None))
            log.warning("no beat for %.1f s: this subscriber is blind", now - self._beat_at)
            if self._connection is not None:
                try:
                    pong = await self._connection.ping()
                    self._pong, self._pong_by = asyncio.ensure_future(pong), now + _PONG_S
                except client.ConnectionClosed:
                    self._pong = None  # which the next receive finds out, too
        elif self._pong is not None:
            pong, self._pong = self._pong, None
            if not pong.done() and self._connection is not None:
                self._connection.transport.abort()  # half-open: nobody is there any more

    def _on_beat(self) -> None:
        self._beat_at = asyncio.get_running_loop().time()
        self._stale_at = self._beat_at + _MISSED_BEATS * self._beat_interval_s
        self._pong = None
        if self.stale:
            self.stale = False
            self._notices.append((Fresh(), "", None))

    # What comes

    def _read(self, message: bytes, received_us: int) -> None:
        if (control := read_control(message)) is not None:
            self._on_control(control)
            return
        try:
            event = events.decode(message, max_bytes=self._max_bytes, received_at_us=received_us)
        except InvalidEvent as error:
            self.invalid += 1
            log.warning("not an event: %s", error.detail)
            return
        if event.event_id in self._recent:
            self.twins += 1
            self._announce(self._places.on_event(event))
            self._pass(event.channel)
            return
        self._recent[event.event_id] = None
        if len(self._recent) > RECENT_IDS:
            self._recent.popitem(last=False)
        self._announce(self._places.on_event(event))
        self._count(event)
        self._notices.append((event, event.channel or "", event.position))

    def _on_control(self, control: dict[str, Any]) -> None:
        kind = control["control"]
        if kind == "welcome":
            interval_s = control.get("beat_interval_s")
            if isinstance(interval_s, int | float) and interval_s > 0:
                self._beat_interval_s = float(interval_s)
            self._places.on_welcome(control)
            self._pass(control.get("channel"))
            self._on_beat()
        elif kind == "beat":
            self._announce(self._places.on_beat(control))
            self._pass(control.get("channel"))
            self._on_beat()
        elif kind == "gap":
            self._announce(self._places.on_gap(Gap.from_fields(control)))
        elif kind == "lag":
            log.warning(
                "too slow: %s events, %s ms behind", control.get("behind_events"), control.get("behind_ms")
            )
        elif kind == "drain":
            delay_s = control.get("reconnect_after_s")
            self._hint_s = min(float(delay_s), 60.0) if isinstance(delay_s, int | float) else 0.0

    def _pass(self, channel: object) -> None:
        """Nothing to hand out, but everything before has come."""
        if isinstance(channel, str) and (position := self._places.positions.get(channel)) is not None:
            self._notices.append((None, channel, position))

    def _announce(self, gap: Gap | None) -> None:
        if gap is not None:
            self.gaps += 1
            self._notices.append((gap, gap.channel, gap.position))
            log.warning("gap on %s: %s; events are missing", gap.channel, gap.cause)

    def _count(self, event: Event) -> None:
        """Count holes in the numbers of a source; a smaller number is a source that began anew."""
        self.received += 1
        if not self._places.sees_everything:
            return
        last = self._last_sequence.get(event.source)
        if last is not None and event.sequence > last + 1:
            self.missing[event.source] += event.sequence - last - 1
        self._last_sequence.pop(event.source, None)  # to the end: the one heard of longest ago is first
        self._last_sequence[event.source] = event.sequence
        if len(self._last_sequence) > _SOURCES:
            del self._last_sequence[next(iter(self._last_sequence))]

"""The client library: events as an asynchronous iterator, with automatic resume and explicit gaps."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from broadcaster.core import event as events
from broadcaster.core.bounded import BoundedDict
from broadcaster.core.errors import ConfigurationError, InvalidEvent
from broadcaster.core.event import Event
from broadcaster.core.position import Cause, Gap, Position, read_place
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.settings import Settings, load, websocket_url
from broadcaster.subscribe.connector import Connector
from broadcaster.subscribe.resume_state import ResumeState
from broadcaster.subscribe.status_events import Fresh, Received, Stale
from broadcaster.wire import client, read_control, tls
from broadcaster.wire.bearer import authorization

log = logging.getLogger("broadcaster.subscriber")
log_received = logging.getLogger("broadcaster.subscriber.received")
"""What `receive` returns, too: for programs that read events only."""

_MISSED_BEATS: Final = 3
_SHORTEST_BEAT_S: Final = 0.1
_LONGEST_BEAT_S: Final = 86_400.0
_GRACE_S: Final = 0.5


class Subscriber:
    """A subscriber: `async with Subscriber() as subscriber: async for event in subscriber: ...`.

    The iteration does not end by itself. When the connection is lost, a new one is opened, with full-jitter
    backoff, and resumes where the old one ended: what was published meanwhile is delivered. What cannot be
    is a `Gap`. `receive` returns gaps and changes of `stale` in order among the events; the iteration returns
    events only, and counts the rest.

    Attributes:
        positions: Per channel: up to where everything was handed out, or announced as a gap.
        stale: Whether heartbeats are missing: silence does not mean that nothing happened.
        received: Events received.
        twins: Duplicate events (of the same channel), and those that lie before the position: they were dropped.
        gaps: Ranges that could not be delivered.
        missing: Per source: numbers of its `sequence` that were skipped (on one channel, without a filter), of
            events that are not stored. Stored ones have positions: what is missing of them is a `Gap`.
        reconnects: Connections opened after the first.
        invalid: Messages that were no valid events, or larger than `event.max_bytes`: each is a gap, too.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        channels: Sequence[str] = (),
        since: Position | str | Mapping[str, Position] | None = None,
        last: int | None = None,
        types: Sequence[str] = (),
        sources: Sequence[str] = (),
        severities: Sequence[str] = (),
        token: str | Callable[[], str] | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare a subscriber; nothing is connected yet.

        Args:
            url: ws:// or wss:// address of a hub, such as `ws://127.0.0.1:8765/ws`; None takes the configured.
            settings: None reads broadcaster.toml and the environment.
            channels: Which to receive; none: those of the url, or the hub's default.
            since: Begin after this position, as `positions` had it, with several channels for each; or with what
                was stored so long ago (`10m`; s, m, h, d), or at a time (ISO 8601 with its zone), or later, by the
                clock of Redis; or with all that is stored (`all`); what of that has expired is a `Gap`. None: now.
            last: Begin so many events before the newest one, of each channel without a position in `since`.
            types: Receive only events of these types; none: all.
            sources: Receive only events of these sources; none: all.
            severities: Receive only events of these severities; none: all.
            token: Sent to the hub; a function is called before every connection, so that it can return a
                fresh one. None takes the configured.
            runtime: Time, chance and limits.

        Raises:
            ConfigurationError: `url` cannot be connected to, no header can carry `token`, or `subscriber.tls_ca`
                cannot be read. Nothing secret is in the message.
            ValueError: `since` says no place to begin, or a position for several channels; `last` is no number
                of events; or there is no such severity.
        """
        settings = settings or load().settings
        self._max_bytes = settings.event.max_bytes
        self._follows_hub = self._max_bytes == events.MAX_BYTES  # another one is a bound of this subscriber's own
        try:
            url = websocket_url(url or settings.subscriber_url)
        except ValueError as error:
            raise ConfigurationError(f"url: {error}") from None
        token = settings.subscriber.token.get_secret_value() if token is None else token
        if isinstance(token, str):
            authorization(token)  # a wrong one is refused now
        for severity in severities:
            if severity not in events.SEVERITIES:
                raise ValueError(f"severity must be one of {', '.join(events.SEVERITIES)}, got {severity!r}")
        self._resume_state = ResumeState(url, channels, since, types, sources, severities, last)
        self._connector = Connector(
            settings.subscriber,
            self._resume_state.url,
            token,
            tls.client_context(url, settings.subscriber.tls_ca),
            runtime,
        )
        self._clock = runtime.clock
        self._recent = BoundedDict[tuple[str | None, str], None](runtime.limits.recent_ids)
        self._last_sequence = BoundedDict[str, int](runtime.limits.recent_sources)
        # Items to hand out, each with its channel and the position that it reaches; None: the position only.
        self._pending: deque[tuple[Received | None, str, Position | None]] = deque()
        self._handed: dict[str, Position] = self._resume_state.named()
        self._left = False
        self._beat_interval_s = settings.hub.beat_interval_s
        self._beats: dict[object, float] = {}  # per channel the last one of this connection
        self._beat_at = 0.0
        self._silent_at = 0.0
        self._was_late = False
        self.stale = False
        self.received = 0
        self.twins = 0
        self.gaps = 0
        self.missing: Counter[str] = Counter()
        self.invalid = 0

    @property
    def reconnects(self) -> int:
        return self._connector.reconnects

    @property
    def positions(self) -> dict[str, Position]:
        return dict(self._handed)

    @property
    def position(self) -> Position | None:
        """The position of the only channel; None before it is known, or when events are not stored."""
        return next(iter(self._handed.values()), None)

    async def __aenter__(self) -> Subscriber:
        self._expect_beats(self._clock.loop_s())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        await self._connector.close()

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Event:
        """The next event; a wait that is cancelled loses none.

        Raises:
            HubRefused: The hub refuses this client, and a retry will not help.
        """
        while (item := await self.receive()) is not None:
            if isinstance(item, Event):
                return item
        raise StopAsyncIteration

    async def receive(self) -> Received | None:
        """The next event, gap or change of `stale`; None once the subscriber was left.

        A wait that is cancelled loses nothing and delays nothing: the connection is opened meanwhile.

        Raises:
            HubRefused: The hub refuses this client, and a retry will not help. Another call tries all the same.
        """
        while not self._left:
            if self._pending:
                item, channel, position = self._pending.popleft()
                if position is not None:
                    self._handed[channel] = position
                if item is not None:
                    return item
                continue
            try:
                async with asyncio.timeout_at(self._silent_at):
                    message = await self._next_message()
            except TimeoutError:
                self._on_silence()
            else:
                if message is not None:
                    self._read(message, received_us=self._clock.wall_ns() // 1000)
        return None

    # The connection

    async def _next_message(self) -> bytes | None:
        """The next message; None if the subscriber was left, or a lost connection has made items pending."""
        while not self._pending:
            connection = self._connector.connection or await self._connector.connect()
            if connection is None:
                break
            try:
                return await connection.recv(decode=False)
            except client.ConnectionClosed as error:
                if self._left:
                    break
                self._beats.clear()
                self._connector.on_lost(error)
                if client.cannot_resume(error):
                    for gap in self._resume_state.forget():
                        self._announce(gap)
                    self._handed.clear()
        return None

    # Staleness

    def _on_silence(self) -> None:
        """Heartbeats are missing: report `Stale`, and from then on look whether the connection is half-open."""
        now, silent_at = self._clock.loop_s(), self._silent_at
        self._silent_at = now + _MISSED_BEATS * self._beat_interval_s
        connection = self._connector.connection
        if connection is not None and not client.can_beat(connection):
            return  # this hub sends no heartbeats
        if not self.stale and not self._was_late and now > silent_at + _GRACE_S:
            self._was_late = True
            self._silent_at = now + _GRACE_S  # this process was late: heartbeats may be unread
            return
        if not self.stale:
            self.stale = True
            self._beats.clear()
            self._pending.append((Stale(now - self._beat_at), "", None))
            log_received.warning("no beat for %.1f s: this subscriber is blind", now - self._beat_at)
        self._connector.probe()

    def _on_beat(self, channel: object, *, is_proof: bool = True) -> None:
        """A channel has had a heartbeat, or has begun, which proves nothing to a subscriber that is blind.

        Of several channels the one that has been silent for longest says whether it is.
        """
        now = self._clock.loop_s()
        if self.stale and not is_proof:
            self._silent_at = now + _MISSED_BEATS * self._beat_interval_s
            return
        self._beats[channel] = now
        if len(self._beats) < self._resume_state.channel_count:
            return
        self._expect_beats(min(self._beats.values()))
        if self.stale:
            self.stale = False
            self._connector.stop_probing()
            self._pending.append((Fresh(), "", None))

    def _expect_beats(self, since: float) -> None:
        self._beat_at = since
        self._silent_at = since + _MISSED_BEATS * self._beat_interval_s
        self._was_late = False

    # Incoming messages

    def _read(self, message: bytes, received_us: int) -> None:
        if (control := read_control(message)) is not None:
            self._on_control(control)
            return
        try:
            event = events.decode(message, max_bytes=self._max_bytes, received_at_us=received_us)
        except InvalidEvent as error:
            self.invalid += 1
            log.warning("not an event: %s", error.detail)
            self._refuse(message)
            return
        self._connector.on_event()
        if self._is_duplicate(event):
            self.twins += 1
            self._announce(self._resume_state.on_event(event))
            self._pass(event.channel)
            return
        self._recent[event.channel, event.event_id] = None
        self._announce(self._resume_state.on_event(event))
        self._count(event)
        self._pending.append((event, event.channel or "", event.position))

    def _refuse(self, message: bytes) -> None:
        """Announce a message that is no event for us: a gap at its position, if it has one."""
        place = read_place(message)
        if place is None:
            only = next(iter(self._resume_state.positions), "") if self._resume_state.has_one_channel else ""
            self._announce(Gap(only, Cause.REFUSED))
            return
        for gap in self._resume_state.on_refused(*place):
            self._announce(gap)

    def _is_duplicate(self, event: Event) -> bool:
        """Whether it was given before; on another channel it is another delivery.

        One that is not stored does not say on which channel it came.
        """
        if self._resume_state.has(event):
            return True
        is_known = event.channel is not None or self._resume_state.has_one_channel
        return is_known and (event.channel, event.event_id) in self._recent

    def _on_control(self, control: dict[str, Any]) -> None:
        kind = control["control"]
        if kind == "welcome":
            interval_s = control.get("beat_interval_s")
            if isinstance(interval_s, int | float) and 0 < interval_s <= _LONGEST_BEAT_S:
                self._beat_interval_s = max(float(interval_s), _SHORTEST_BEAT_S)
            max_bytes = control.get("max_bytes")
            if self._follows_hub and type(max_bytes) is int:
                self._max_bytes = max(events.MAX_BYTES, min(max_bytes, events.LARGEST_BYTES))
            self._connector.on_welcome()
            self._announce(self._resume_state.on_welcome(control))
            self._pass(control.get("channel"))
            self._on_beat(control.get("channel"), is_proof=False)
        elif kind == "beat":
            self._announce(self._resume_state.on_beat(control))
            self._pass(control.get("channel"))
            self._on_beat(control.get("channel"))
        elif kind == "gap":
            self._announce(self._resume_state.on_gap(Gap.from_fields(control)))
        elif kind == "lag":
            log.warning(
                "too slow: %s events, %s ms behind", control.get("behind_events"), control.get("behind_ms")
            )
        elif kind == "drain":
            self._connector.hint(control.get("reconnect_after_s"))

    def _pass(self, channel: object) -> None:
        """Queue the position of a channel without an item: everything before it has arrived."""
        if isinstance(channel, str) and (position := self._resume_state.positions.get(channel)) is not None:
            self._pending.append((None, channel, position))

    def _announce(self, gap: Gap | None) -> None:
        if gap is not None:
            self.gaps += 1
            self._pending.append((gap, gap.channel, gap.position))
            log_received.warning("gap on %s: %s; events are missing", gap.channel, gap.cause)

    def _count(self, event: Event) -> None:
        """Count an event, and holes in the sequence of its source; a smaller number is a source that restarted."""
        self.received += 1
        if event.position is not None or not self._resume_state.sees_everything:
            return  # of stored events the offsets count, whatever numbers publishers give them
        last = self._last_sequence.get(event.source)
        if last is not None and event.sequence > last + 1:
            self.missing[event.source] += event.sequence - last - 1
        self._last_sequence[event.source] = event.sequence  # of too many, the oldest is dropped

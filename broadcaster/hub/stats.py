"""The hub in numbers: one frozen value, as `GET /stats` shows it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from broadcaster.core.version import VERSION
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.hub import Hub
from broadcaster.wire import CloseCode


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """One open channel.

    Attributes:
        position: Up to where events were handed on; None before Redis has answered, or without history.
        trouble: Why it is not certain that its events arrive; empty if it is.
        listeners: Who listens now.
        behind: Those of them that are fed from the ring or the log.
        received: Valid events that the subscription brought.
        recovered: Events read from the log because the subscription had not brought them.
        twins: Events that came a second time, and were not delivered again.
        forged: Events with a position that nobody had given them; not delivered.
        gaps: Ranges that could not be given, by cause.
        deliveries: Events written to listeners, once per listener.
        filtered: Events held back by a listener's filter, once per listener.
        sent_bytes: Bytes of the deliveries.
        shed: Events that slow listeners were not given, by severity, once per listener.
        resumed: Listeners that began at an earlier position.
        resumed_whole: Those of them that had missed nothing.
        ring_bytes: Bytes of recent frames held.
    """

    position: str | None
    trouble: str
    listeners: int
    behind: int
    received: int
    recovered: int
    twins: int
    forged: int
    gaps: dict[str, int]
    deliveries: int
    filtered: int
    sent_bytes: int
    shed: dict[str, int]
    resumed: int
    resumed_whole: int
    ring_bytes: int

    @classmethod
    def of(cls, channel: Channel) -> ChannelStatistics:
        fanout, sequencer, replay = channel.fanout, channel.sequencer, channel.replay
        return cls(
            position=None if sequencer.position is None else str(sequencer.position),
            trouble=channel.trouble,
            listeners=channel.listeners,
            behind=len(fanout.behind),
            received=channel.received,
            recovered=sequencer.recovered,
            twins=sequencer.duplicates,
            forged=sequencer.unknown_position,
            gaps=channel.gaps(),
            deliveries=fanout.deliveries,
            filtered=fanout.filtered,
            sent_bytes=fanout.sent_bytes,
            shed=dict(fanout.slow.shed),
            resumed=replay.resumed,
            resumed_whole=replay.recovered,
            ring_bytes=fanout.ring.bytes,
        )


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Counters since the start of the process, and gauges of this moment.

    Attributes:
        name: Of the hub in its deployment: `machine:port#number`.
        address: `http://host:port` that no other hub answers.
        version: Of this package.
        pid: Process id of the hub.
        uptime_s: Seconds since it began to listen.
        ready: Whether delivery is proven; see `/health/ready`.
        stopping: Whether it drains.
        trouble: Why it is not ready; empty if it is.
        channel: The default channel.
        connected: Subscribers now.
        formats: The same by the format in which they are given events.
        ending: Those of them that the hub has closed, and that are not gone yet.
        peak: Most subscribers at one time.
        opened: Subscribers that were let in.
        left: Those of them that have gone without having been closed.
        closed: Those of them that the hub has closed, by close code.
        behind: Subscribers now that are fed from a ring or a log.
        events_received: Valid events from Redis.
        invalid: Refused payloads by cause.
        recovered: Events read from the log because the subscription had not brought them.
        twins: Events that came a second time, and were not delivered again.
        forged: Events with a position that nobody had given them; not delivered.
        gaps: Ranges that could not be given, by cause.
        published: Events that came over HTTP, and that Redis has taken.
        deliveries: Events written to subscribers, once per subscriber.
        filtered: Events held back by filters, once per subscriber.
        shed: Events that slow subscribers were not given, once per subscriber.
        sent_bytes: Bytes of the deliveries.
        compressed: Events that were compressed, however many subscribers were given them.
        resumed: Subscriptions that began at an earlier position.
        resumed_whole: Those of them that had missed nothing.
        slow_closed: Subscribers closed as too slow (4008).
        talkers_closed: Subscribers closed because they said too much (1008).
        ping_timeouts: Subscribers cut without a sign of life.
        expired: Subscribers closed because their token had expired (4001).
        refused: Subscribers that were not let in, by cause.
        aborted: Closed subscribers that were cut because they did not answer.
        redis_reconnects: How often the subscription was restored.
        redis_node: The replica at which it is, without a password; empty: where events are published.
        redis_moves: How often it was moved to another replica.
        redis_moved: The replica that was left last, and why; empty: none.
        proofs: How often delivery was proven.
        pages_read: Pages of the log read for subscriptions that resume.
        ring_bytes: Bytes of recent frames held for slow subscribers.
        channels: Per open channel.
    """

    name: str
    address: str
    version: str
    pid: int
    uptime_s: float
    ready: bool
    stopping: bool
    trouble: str
    channel: str
    connected: int
    formats: dict[str, int]
    ending: int
    peak: int
    opened: int
    left: int
    closed: dict[str, int]
    behind: int
    events_received: int
    recovered: int
    twins: int
    forged: int
    gaps: dict[str, int]
    invalid: dict[str, int]
    published: int
    deliveries: int
    filtered: int
    shed: int
    sent_bytes: int
    compressed: int
    resumed: int
    resumed_whole: int
    slow_closed: int
    talkers_closed: int
    ping_timeouts: int
    expired: int
    refused: dict[str, int]
    aborted: int
    redis_reconnects: int
    redis_node: str
    redis_moves: int
    redis_moved: str
    proofs: int
    pages_read: int
    ring_bytes: int
    channels: dict[str, ChannelStatistics]

    @classmethod
    def of(cls, hub: Hub) -> HubStatistics:
        """Collect what the parts of a hub have counted."""
        channels = {name: ChannelStatistics.of(channel) for name, channel in hub.channels.open.items()}
        totals, registry = hub.channels.totals(), hub.registry
        return cls(
            name=hub.identity.name,
            address=hub.identity.address,
            version=VERSION,
            pid=os.getpid(),
            uptime_s=round(hub.uptime_s, 3),
            ready=hub.ready,
            stopping=hub.admission.stopping,
            trouble=hub.probe.problem,
            channel=hub.channels.default,
            connected=registry.connected,
            formats=dict(registry.by_format),
            ending=len(registry.ending),
            peak=registry.peak,
            opened=registry.opened,
            left=registry.left,
            closed={str(int(code)): count for code, count in sorted(registry.closed.items())},
            behind=len(registry.behind),
            events_received=totals["received"],
            recovered=totals["recovered"],
            twins=totals["twins"],
            forged=totals["forged"],
            gaps={name.removeprefix("gap "): count for name, count in totals.items() if name.startswith("gap ")},
            invalid=dict(hub.dispatcher.invalid),
            deliveries=totals["deliveries"],
            published=hub.publisher.published,
            filtered=totals["filtered"],
            shed=totals["shed"],
            sent_bytes=totals["sent_bytes"],
            compressed=hub.context.formats.deflate.made,
            resumed=totals["resumed"],
            resumed_whole=totals["resumed_whole"],
            slow_closed=registry.closed[CloseCode.SLOW],
            talkers_closed=registry.closed[CloseCode.POLICY],
            ping_timeouts=registry.closed[CloseCode.PING_TIMEOUT],
            expired=registry.closed[CloseCode.EXPIRED],
            refused=dict(hub.admission.refused),
            aborted=registry.aborted,
            redis_reconnects=hub.broker.reconnects,
            redis_node=hub.broker.node,
            redis_moves=hub.broker.moves,
            redis_moved=hub.broker.moved,
            proofs=hub.probe.rounds,
            pages_read=hub.pages.read,
            ring_bytes=sum(channel.ring_bytes for channel in channels.values()),
            channels=channels,
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as `/stats` shows it. Nothing is copied, as `asdict` would: a hub does this once a second."""
        return _fields(self) | {"channels": {name: _fields(channel) for name, channel in self.channels.items()}}


def _fields(row: HubStatistics | ChannelStatistics) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}

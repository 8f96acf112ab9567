"""One channel of the hub: sequencer, fan-out and replay put together, its verdict, and who waits for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from broadcaster import wire
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import Instant, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import Whereabouts
from broadcaster.hub.catchup.event_log import Unreadable
from broadcaster.hub.catchup.live_sequencer import LiveSequencer
from broadcaster.hub.catchup.page_cache import PageCache
from broadcaster.hub.catchup.replay import Replay
from broadcaster.hub.catchup.sequencer import Sequencer
from broadcaster.hub.catchup.times import Asked, Found
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.message import Message
from broadcaster.hub.fanout.scheduler import Scheduler
from broadcaster.hub.fanout.subscription import Sink, State, Subscription
from broadcaster.hub.fanout.trace import Trace
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")


class Channel:
    """One channel.

    Attributes:
        name: Its name.
        rank: Which channel goes first when several wait: the lowest.
        fanout, sequencer, replay: Its parts.
        listeners: How many subscriptions there are.
        opened_by: Address of the client for which it was opened.
        idle_since: Loop time at which the last of them left.
        received: Valid events that the subscription to Redis brought.
        trouble: Why it is not certain that its events arrive; empty if it is. Heartbeats are sent only then.
        refusal: The error with which Redis refuses the channel to the hub: it cannot be served; None if it can.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        pages: PageCache,
        scheduler: Scheduler,
        *,
        rank: int = 0,
        drops_oldest: bool = False,
        unsettled: Sequence[Sink] = (),
        trace: Trace | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare a channel; nothing happens before `run`.

        Args:
            name: Its name.
            settings: Of the hub.
            pages: Of the log, if events are stored.
            scheduler: For work that may wait.
            rank: See above.
            drops_oldest: Whether a slow consumer loses the oldest events; else it is closed.
            unsettled: See `Fanout`.
            trace: See `Fanout`.
            runtime: Time, chance and limits.
        """
        self.name = name
        self.rank = rank
        self.fanout = Fanout(
            *(name, settings.hub), drops_oldest=drops_oldest, unsettled=unsettled, trace=trace, runtime=runtime
        )
        self.sequencer: Sequencer | LiveSequencer
        if settings.history.enabled:
            self.sequencer = Sequencer(self.fanout, pages.log, self._on_caught_up, runtime)
        else:
            self.sequencer = LiveSequencer(self.fanout, self._on_caught_up)
        self._terms = wire.Terms(settings.hub.beat_interval_s, settings.event.max_bytes)
        self.replay = Replay(self.fanout, self.sequencer, pages, self._terms, runtime)
        self._clock = runtime.clock
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._scheduler = scheduler
        self._limits = runtime.limits
        self._waiting: dict[Subscription, int] = {}  # and how many sync rounds had begun when it came
        self._times = pages.times
        self._looking: set[Subscription] = set()  # that have asked for an instant, whose position is looked for
        self._beat: tuple[object, bytes] = (None, b"")
        self.listeners = 0
        self.opened_by = ""
        self.idle_since = runtime.clock.loop_s()
        self.received = 0
        self.trouble = "not caught up yet"
        self.refusal: RedisUnavailable | RedisRefused | None = None
        self._refused_at = 0.0

    def take(self, messages: list[Message]) -> None:
        """Take in valid events from the subscription to Redis, in its order."""
        self.received += len(messages)
        self.sequencer.take(messages)
        if self._waiting:
            self._on_caught_up()  # they may have brought what one of them has seen

    def totals(self) -> dict[str, int]:
        """What was counted since it was opened; gaps by cause, as `gap <cause>`."""
        fanout, sequencer, replay = self.fanout, self.sequencer, self.replay
        gaps = {f"gap {cause}": count for cause, count in self.gaps().items()}
        return dict(
            received=self.received,
            recovered=sequencer.recovered,
            twins=sequencer.duplicates,
            forged=sequencer.unknown_position,
            deliveries=fanout.deliveries,
            filtered=fanout.filtered,
            shed=fanout.slow.shed.total(),
            sent_bytes=fanout.sent_bytes,
            resumed=replay.resumed,
            resumed_whole=replay.recovered,
            **gaps,
        )

    def gaps(self) -> dict[str, int]:
        """Gaps announced, by cause."""
        shed = {"shed": self.fanout.slow.gaps} if self.fanout.slow.gaps else {}
        return {**self.fanout.gaps, **shed}

    async def run(self) -> None:
        """Read the log whenever it is necessary, until cancelled."""
        await self.sequencer.run()

    # Its verdict

    def judge(self, where: Whereabouts, before: Position | None, *, may_subscribe: bool) -> None:
        """Conclude a round of the delivery probe: everything that was published before it has arrived.

        Args:
            where: Where the channel stood in Redis when the round began.
            before: Where it stood here before that.
            may_subscribe: Whether Redis lets the hub subscribe to it.
        """
        error = where if isinstance(where, Exception) else self.sequencer.problem
        if not may_subscribe:
            error = RedisRefused(f"Redis will not let us subscribe to {self.name}")
        if error is not None and self.refusal is None:
            self._refused_at = self._clock.loop_s()
            self._log.log(logging.WARNING, str(error), "%s cannot be served: %s", self.name, error)
        elif error is None and self.refusal is not None:
            self._log.log(logging.INFO, "again", "%s can be served again", self.name)
        self.refusal = error
        if error is not None:
            self.trouble = str(error)
        elif not isinstance(where, Exception) and not self.sequencer.check(where, before):
            self.trouble = f"stored events have not come over the subscription: {self.name}"
        elif not self.sequencer.caught_up:
            self.trouble = f"not caught up yet: {self.name}"
        else:
            self.trouble = ""

    def suspect(self, trouble: str) -> None:
        """Something has happened: in trouble until the next round of the delivery probe."""
        self.trouble = self.trouble or trouble

    def end_unavailable(self) -> None:
        """Close those who listen, if Redis has refused this channel for some time, or their place is not found."""
        if self._waiting and self.sequencer.caught_up:
            self._end_unknown(self._clock.loop_s() - self._limits.page_give_up_s)
        if self.refusal is None or self._clock.loop_s() - self._refused_at < self._limits.unavailable_s:
            return
        for subscription in [*self._waiting, *self._looking, *self.fanout.subscriptions()]:
            self.unsubscribe(subscription)
            self.fanout.end_unavailable(subscription, "Redis refuses it to the hub")

    def _end_unknown(self, before_s: float) -> None:
        """Close who has waited since before then to be told whether the log knows its `since`."""
        for subscription in [each for each in self._waiting if each.behind_since < before_s]:
            if subscription.since is not None and not self.sequencer.knows(subscription.since):
                self.unsubscribe(subscription)
                self.fanout.end_unavailable(subscription, "its log cannot be read")

    # Subscriptions begin and end

    def subscribe(self, subscription: Subscription) -> None:
        """Take a subscription in; it waits until the channel is caught up and its position has been looked up."""
        self.listeners += 1
        if subscription.sink.closing:
            return  # because of another channel of its connection
        since = subscription.since
        subscription.behind_since = self._clock.loop_s()
        if self.sequencer.caught_up and (since is None or self.sequencer.knows(since)):
            self._start(subscription)
        else:
            if since is None and subscription.instant is None:
                # Whatever comes from now on is promised, also what Redis' subscription may miss.
                subscription.since = self.sequencer.position
            self._waiting[subscription] = self.sequencer.sync_round

    def leave(self, subscription: Subscription) -> None:
        """The client of a subscription is gone."""
        self.listeners -= 1
        self.idle_since = self._clock.loop_s()
        self.unsubscribe(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Deliver nothing more to a subscription; does nothing the second time."""
        self._waiting.pop(subscription, None)
        self._looking.discard(subscription)
        self.replay.forget(subscription)
        self.fanout.leave(subscription)

    def _on_caught_up(self) -> None:
        if self._waiting and self.sequencer.caught_up:
            if self.sequencer.position is None:  # nothing is stored: those that wait must not miss what comes next
                while self._start_one():
                    pass
            else:
                self._scheduler.add(self._start_one)

    def _start_one(self) -> bool:
        """Start one of those that wait; whether there are more."""
        sequencer = self.sequencer
        if self._waiting and sequencer.caught_up:
            subscription = next(iter(self._waiting))
            asked_in = self._waiting.pop(subscription)
            since = subscription.since
            if since is not None and sequencer.synced_round <= asked_in and not sequencer.knows(since):
                self._waiting[subscription] = asked_in  # until a round that was begun after it came
                return False
            self._start(subscription)
        return bool(self._waiting) and sequencer.caught_up

    def _start(self, subscription: Subscription) -> None:
        if subscription.sink.closing:
            return  # it was closed in this turn of the loop, and is not settled yet
        if subscription.instant is not None and self.fanout.position is not None:
            self._look_for(subscription, subscription.instant)
            return
        self._go_back(subscription)
        if not (subscription.since or subscription.instant or subscription.back):
            if subscription.sink.wants_control:
                position = self.fanout.position
                subscription.sink.tell(wire.welcome_frame(self.name, position, self._terms, None))
            self.fanout.join(subscription)
        else:
            self.replay.begin(subscription)
        if not subscription.sink.writable:
            self.fanout.fall_behind(subscription)
        if subscription.is_behind:
            subscription.sink.catch_up()

    def _look_for(self, subscription: Subscription, instant: Instant) -> None:
        """An instant becomes a position, as soon as that is found; it goes on as with any other one."""
        self._looking.add(subscription)

        def on_found(found: Found | Unreadable) -> None:
            if subscription not in self._looking:
                return  # its client has gone
            self._looking.discard(subscription)
            if isinstance(found, Exception):
                self.fanout.end_unavailable(subscription, f"its log cannot be read: {found}")
                return
            subscription.instant = None
            subscription.since, subscription.before = found
            subscription.behind_since = self._clock.loop_s()
            self._waiting[subscription] = self.sequencer.sync_round
            if self.sequencer.caught_up:
                self._scheduler.add(self._start_one)

        self._times.want(self.name, Asked(instant, subscription.behind_since), on_found)

    def _go_back(self, subscription: Subscription) -> None:
        """A number of events before the newest one becomes a position, now that it is known where that stands."""
        head, back = self.fanout.position, subscription.back
        if head is not None and back:
            position, since = self.sequencer.order.before(head, back), subscription.since
            if since is None or self.sequencer.order.is_after(since, position):
                subscription.since = position

    # Subscriptions that are behind, and heartbeats

    def feed(self, subscription: Subscription) -> bool:
        """Feed the next piece to a subscription that is behind; whether there is more that can be fed at once."""
        if not subscription.is_behind or subscription.state is State.AWAITING_PAGE:
            return False
        if subscription.cursor is None:
            return self.replay.step(subscription)
        fanout = self.fanout
        fanout.slow.warn_before_shedding(subscription)
        if fanout.slow.is_overtaken(subscription) and not fanout.slow.sheds_for(subscription):
            if not subscription.is_replaying:
                fanout.slow.close(subscription)
                return False
            subscription.cursor = None  # the ring has moved on while it read: back to the log
        else:
            fanout.feed(subscription)
        return subscription.is_behind

    def beat(self, subscription: Subscription) -> None:
        """Send a heartbeat: up to where everything was delivered, filtered out, or announced as a gap."""
        if subscription.since is not None or subscription.state in (State.WAITING, State.CLOSED):
            return  # it has not been welcomed yet, or is due to be closed
        if self.trouble or not self.sequencer.caught_up:
            return  # it is not known whether everything has come
        if self.fanout.slow.is_overtaken(subscription):
            return  # it is about to be told, or closed
        position = self.fanout.position_of(subscription)
        if self._beat[0] != position or not self._beat[1]:
            self._beat = (position, wire.beat_frame(self.name, position))
        subscription.sink.tell(self._beat[1])

"""The ordered pipeline of events to Redis: what is unanswered is sent again until answered or out of time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from broadcaster.core.backoff import SHORTEST_WAIT_S, backoff_s
from broadcaster.core.bounded import BoundedDict
from broadcaster.core.errors import SAYS, RedisErrorReply, RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import Position, is_within
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.publish.lookout import HubLookout
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.connection import Command, check_tls
from broadcaster.redis.stream import Stored
from broadcaster.settings import RedisTable, Settings

log = logging.getLogger("broadcaster.publisher")

Outcome = Stored | RedisUnavailable | RedisRefused


@dataclass(slots=True, eq=False)
class Pending:
    """Events in flight, in one command.

    Attributes:
        channel: Their channel.
        events: Id and payload of each; sent, and sent again, in the same bytes.
        deadline: Loop time at which they are given up.
        reply: The reply on the present connection; None if not sent yet.
        outcomes: One per event, once it is known.
    """

    channel: str
    events: Sequence[tuple[str, bytes]]
    deadline: float
    reply: asyncio.Future[Any] | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """Whether it has to be sent again, or has not been sent at all."""
        if self.outcomes:
            return False
        return self.reply is None or (self.reply.done() and self.reply.exception() is not None)


class PublishPipeline:
    """Publishes payloads in order. With history they are stored in the same step, and a retry makes no duplicate.

    Nothing runs in the background: a caller that waits for a reply opens a new connection when one is needed,
    and sends again, in order, everything that was not answered, also that of other callers.

    Redis answers in order, so replies are read from the front of what is unanswered, each once; a caller reads its
    own as well. Only where something has to be sent again is all of it looked at.
    """

    def __init__(self, settings: Settings, runtime: Runtime = RUNTIME) -> None:
        check_tls("redis.url", settings.redis.url)
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._runtime = runtime
        self._history = settings.history
        self._deadline_s = settings.publisher.publish_deadline_s
        self._max_unanswered = settings.publisher.max_unanswered
        self._longest_wait_s = settings.redis.reconnect_max_s
        self._commands = CommandLink(
            settings.redis, *([stream.LOAD] if self._history.enabled else []), runtime=runtime
        )
        self._unanswered: deque[Pending] = deque()  # what has an outcome leaves it at the front
        self._events = 0  # in it, without an outcome
        self._unsent = 0  # commands in it that were not sent on any connection
        self._last: dict[str, Pending] = {}  # per channel the last one in it
        self._newest = BoundedDict[str, Position](runtime.limits.publish_sources)  # answered, per channel
        self._recovering = asyncio.Lock()
        self._waits_s = backoff_s(SHORTEST_WAIT_S, self._longest_wait_s, self._chance)
        self._lookout = HubLookout(settings.redis.url, runtime)
        self._tried = False
        self._why = "it was silent"
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._told_unstamped = False

    def use(self, redis: RedisTable) -> None:
        """See `CommandLink.use`."""
        self._commands.use(redis)

    async def connect(self) -> None:
        """Connect unless connected.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisConnection.open`.
        """
        await self._commands.connect()

    def close(self) -> None:
        """End the connection; the outcome of what is not answered stays unknown."""
        self._commands.close()

    def send(self, channel: str, events: Sequence[tuple[str, bytes]]) -> list[Pending]:
        """Publish events (id, payload) in one write, now; `settle` returns their outcomes."""
        deadline = self._clock.loop_s() + self._deadline_s
        sent = [Pending(channel, batch, deadline) for batch in self._batches(events)]
        self._read_front()
        # Behind something that was not sent yet nothing may be sent: it would be stored first.
        in_order = not self._unsent
        before = self._last_of(channel)
        room = self._max_unanswered - self._events
        for pending in sent:
            room -= len(pending.events)
            if room < 0:
                error = RedisUnavailable(f"more than {self._max_unanswered} events wait for Redis' answer")
                pending.outcomes = [error] * len(pending.events)
        waiting = [pending for pending in sent if not pending.outcomes]
        for pending in waiting:
            self._events += len(pending.events)
            self._unsent += 1
            self._unanswered.append(pending)
            self._last[channel] = pending
        if in_order and self._commands.link is not None:
            self._write(list(zip(waiting, [before, *waiting], strict=False)))
        return sent

    def _last_of(self, channel: str) -> Pending | None:
        """The last one of a channel that has no outcome."""
        last = self._last.get(channel)
        if last is None or not last.outcomes:
            return last
        behind = (pending for pending in reversed(self._unanswered) if pending.channel == channel)
        return next((pending for pending in behind if not pending.outcomes), None)

    def _batches(self, events: Sequence[tuple[str, bytes]]) -> list[Sequence[tuple[str, bytes]]]:
        """The events of one command each."""
        if not self._history.enabled:
            return [[event] for event in events]
        batches, size = list[list[tuple[str, bytes]]](), 0
        for event in events:
            size += len(event[1])
            if not batches or len(batches[-1]) == self._limits.store_events or size > self._limits.store_bytes:
                batches.append([])
                size = len(event[1])
            batches[-1].append(event)
        return [*batches]

    def _write(self, pairs: Sequence[tuple[Pending, Pending | None]]) -> None:
        """Write some of the unanswered, each on the condition that the other one, before it, was stored."""
        replies = self._commands.send(*(self._command(pending, before) for pending, before in pairs))
        for (pending, _), reply in zip(pairs, replies, strict=True):
            self._unsent -= pending.reply is None
            pending.reply = reply

    def _write_again(self) -> None:
        """Write all that has to be sent, in order."""
        pairs = list[tuple[Pending, Pending | None]]()
        before: dict[str, Pending] = {}
        for pending in self._unanswered:
            if pending.has_failed:
                pairs.append((pending, before.get(pending.channel)))
            if not pending.outcomes:
                before[pending.channel] = pending
        self._write(pairs)

    def _command(self, pending: Pending, before: Pending | None) -> Command:
        if not self._history.enabled:
            return ("PUBLISH", pending.channel, pending.events[0][1])
        # An unanswered one may fail: then this must not be stored before it.
        after = before.events[-1][0] if before is not None else None
        floor = self._newest.get(pending.channel)
        return stream.store(
            *(pending.channel, pending.events, self._history), after=after, floor=floor, runtime=self._runtime
        )

    async def settle(self, sent: Sequence[Pending]) -> list[Stored | RedisUnavailable]:
        """Per event: its position and the number of receivers, or the error.

        An error does not say that the event was not published: Redis may have done it and died before it
        could answer.

        Raises:
            RedisRefused: Redis does not permit publishing; what it has not answered may be published.
        """
        clock = self._clock.loop_s
        while waiting := [pending for pending in sent if not pending.outcomes]:
            last = waiting[-1]
            if last.reply is not None and not last.reply.done():
                await asyncio.wait([last.reply], timeout=last.deadline - clock())
            for pending in waiting:
                self._read(pending)
            self._give_up(clock())
            if last.has_failed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(last.deadline - clock()), self._recovering:
                        self._read(last)
                        if last.has_failed:
                            await self._recover()
        self._read_front()
        outcomes: list[Stored | RedisUnavailable] = []
        for outcome in (outcome for pending in sent for outcome in pending.outcomes):
            if isinstance(outcome, RedisRefused):
                raise outcome
            outcomes.append(outcome)
        if any(isinstance(outcome, Stored) and outcome.position and outcome.receivers for outcome in outcomes):
            await self._lookout.look(self._commands)
        return outcomes

    def _read(self, pending: Pending) -> None:
        """Take the reply to one, if it has arrived."""
        if pending.outcomes or pending.reply is None or not pending.reply.done():
            return
        error = pending.reply.exception()
        if error is None:
            self._read_reply(pending, pending.reply.result())
            self._be_confident()
        elif isinstance(error, RedisRefused) or (isinstance(error, RedisErrorReply) and error.is_lasting):
            self._fail(pending, error)
        elif not self._history.enabled:  # a second one could not be told from the first
            self._fail(pending, RedisUnavailable(str(error)))
        else:
            self._note_trouble(str(error))

    def _note_trouble(self, why: str) -> None:
        """What keeps events waiting: logged now, and part of the error if it lasts."""
        self._why = why
        if why.startswith(SAYS):
            self._log.log(logging.WARNING, why, "%s; trying again for %g s", why, self._deadline_s)

    def _read_reply(self, pending: Pending, reply: Any) -> None:
        try:
            outcomes: list[Outcome] = (
                [*stream.read_stored(reply)] if self._history.enabled else [Stored(None, reply)]
            )
            if len(outcomes) != len(pending.events):
                raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}")
        except RedisUnavailable as error:
            outcomes = [error] * len(pending.events)
        else:
            self._note_newest(pending.channel, outcomes)
            if stream.is_unstamped(reply) and not self._told_unstamped:
                self._told_unstamped = True
                log.warning("Redis refuses TIME to this user: events do not say when they were stored (+time)")
        self._conclude(pending, outcomes)

    def _note_newest(self, channel: str, outcomes: Sequence[Outcome]) -> None:
        """Redis must never again stand before what it has answered."""
        for outcome in reversed(outcomes):
            if not isinstance(outcome, Stored) or outcome.position is None:
                continue
            known = self._newest.get(channel)
            # One that had been stored before may be of an older epoch.
            if outcome.receivers is not None or known is None or is_within(known, outcome.position):
                self._newest[channel] = outcome.position
            if outcome.receivers is not None:
                break

    def _fail(self, pending: Pending, error: RedisUnavailable | RedisRefused) -> None:
        self._conclude(pending, [error] * len(pending.events))

    def _conclude(self, pending: Pending, outcomes: list[Outcome]) -> None:
        pending.outcomes = outcomes
        self._events -= len(pending.events)
        self._unsent -= pending.reply is None

    def _read_front(self) -> None:
        """Take the replies that have arrived, up to the first that has not, or has to be sent again."""
        while self._unanswered:
            front = self._unanswered[0]
            self._read(front)
            if not front.outcomes:
                break
            self._unanswered.popleft()
            if self._last.get(front.channel) is front:
                del self._last[front.channel]

    def _read_all(self) -> None:
        for pending in self._unanswered:
            self._read(pending)

    async def _recover(self) -> None:
        """Try once to send everything that is not answered again, in order."""
        self._read_all()
        if any(pending.has_failed and pending.reply is not None for pending in self._unanswered):
            await self._commands.reset()  # if there is a connection, it does not answer as it should
            self._read_all()
        if not (again := [pending for pending in self._unanswered if not pending.outcomes]):
            return
        if self._commands.link is None:
            try:
                async with asyncio.timeout(again[0].deadline - self._clock.loop_s()):
                    await self._reconnect()
            except TimeoutError:
                return
            except (RedisUnavailable, RedisRefused) as error:
                if isinstance(error, RedisRefused) or self._commands.closed:
                    for pending in (pending for pending in again if not pending.outcomes):
                        self._fail(pending, error)
                else:
                    self._note_trouble(str(error))
                return
        self._write_again()  # what was sent meanwhile is among it, in its order

    async def _reconnect(self) -> None:
        if self._tried:
            await asyncio.sleep(next(self._waits_s))
        self._tried = True
        await self._commands.connect()

    def _give_up(self, now: float) -> None:
        """Fail what is out of time: at the front, since all have equally long."""
        self._read_front()
        while self._unanswered and self._unanswered[0].deadline <= now:
            why = f"no answer from Redis within {self._deadline_s:g} s: {self._why}"
            if self._why.startswith(SAYS):
                why = f"{self._why}, and nothing else within {self._deadline_s:g} s"
            self._fail(self._unanswered[0], RedisUnavailable(why))
            self._read_front()
        if not self._unanswered:  # later callers do not wait because earlier ones had to
            self._be_confident()

    def _be_confident(self) -> None:
        """Reset the backoff: the next attempt is made at once; those after it wait, each time longer."""
        if self._tried:
            self._tried = False
            self._waits_s = backoff_s(SHORTEST_WAIT_S, self._longest_wait_s, self._chance)

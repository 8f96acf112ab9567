"""The ordered pipeline of events to Redis: what is unanswered is sent again until answered or out of time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from broadcaster.core.backoff import SHORTEST_WAIT_S, backoff_s
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.connection import Command
from broadcaster.redis.stream import Stored
from broadcaster.settings import Settings

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

    def fail(self, error: RedisUnavailable | RedisRefused) -> None:
        self.outcomes = [error] * len(self.events)

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
    """

    def __init__(self, settings: Settings, runtime: Runtime = RUNTIME) -> None:
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._history = settings.history
        self._deadline_s = settings.publisher.publish_deadline_s
        self._max_unanswered = settings.publisher.max_unanswered
        self._silence_s = settings.redis.silence_timeout_s
        self._longest_wait_s = settings.redis.reconnect_max_s
        self._commands = CommandLink(
            settings.redis, *([stream.LOAD] if self._history.enabled else []), runtime=runtime
        )
        self._unanswered: deque[Pending] = deque()
        self._recovering = asyncio.Lock()
        self._waits_s = backoff_s(SHORTEST_WAIT_S, self._longest_wait_s, self._chance)
        self._tried = False
        self._why = "it was silent"

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
        self._forget_answered()
        # Behind something that has to be sent again nothing may be sent: it would be stored first.
        in_order = not any(pending.has_failed for pending in self._unanswered)
        room = self._max_unanswered - sum(len(pending.events) for pending in self._unanswered)
        for pending in sent:
            room -= len(pending.events)
            if room < 0:
                pending.fail(RedisUnavailable(f"more than {self._max_unanswered} events wait for Redis' answer"))
        waiting = [pending for pending in sent if not pending.outcomes]
        self._unanswered.extend(waiting)
        if in_order and self._commands.link is not None:
            self._write(waiting)
        return sent

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

    def _write(self, pendings: Sequence[Pending]) -> None:
        """Write some of the unanswered, each on the condition that the one before it was stored."""
        commands, chosen = [], set(pendings)
        before: dict[str, Pending] = {}
        for pending in self._unanswered:
            if pending in chosen:
                commands.append(self._command(pending, before.get(pending.channel)))
            if not pending.outcomes:
                before[pending.channel] = pending
        for pending, reply in zip(pendings, self._commands.send(*commands), strict=True):
            pending.reply = reply

    def _command(self, pending: Pending, before: Pending | None) -> Command:
        if not self._history.enabled:
            return ("PUBLISH", pending.channel, pending.events[0][1])
        # An unanswered one may fail: then this must not be stored before it.
        after = before.events[-1][0] if before is not None else None
        return stream.store(pending.channel, pending.events, self._history, after=after, chance=self._chance)

    async def settle(self, sent: Sequence[Pending]) -> list[Stored | RedisUnavailable]:
        """Per event: its position and the number of receivers, or the error.

        An error does not say that the event was not published: Redis may have done it and died before it
        could answer.

        Raises:
            RedisRefused: Redis does not permit publishing.
        """
        clock = self._clock.loop_s
        while waiting := [pending for pending in sent if not pending.outcomes]:
            last = waiting[-1]
            if last.reply is not None and not last.reply.done():
                left_s = last.deadline - clock()
                await asyncio.wait([last.reply], timeout=min(self._silence_s, left_s))
                if not last.reply.done() and left_s > self._silence_s:
                    await self._commands.reset()
            self._read_replies()
            self._give_up(clock())
            if last.has_failed:
                async with self._recovering:
                    self._read_replies()
                    if last.has_failed:
                        await self._recover()
        outcomes: list[Stored | RedisUnavailable] = []
        for outcome in (outcome for pending in sent for outcome in pending.outcomes):
            if isinstance(outcome, RedisRefused):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    def _read_replies(self) -> None:
        """Take every reply that has arrived, in order."""
        for pending in self._unanswered:
            if pending.outcomes or pending.reply is None or not pending.reply.done():
                continue
            error = pending.reply.exception()
            if error is None:
                self._read_reply(pending, pending.reply.result())
                self._be_confident()
            elif isinstance(error, RedisRefused):
                pending.fail(error)
            elif not self._history.enabled:  # a second one could not be told from the first
                pending.fail(RedisUnavailable(str(error)))
            else:
                self._why = str(error)
        self._forget_answered()

    def _read_reply(self, pending: Pending, reply: Any) -> None:
        try:
            pending.outcomes = [*stream.read_stored(reply)] if self._history.enabled else [Stored(None, reply)]
            if len(pending.outcomes) != len(pending.events):
                raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}")
        except RedisUnavailable as error:
            pending.fail(error)

    def _forget_answered(self) -> None:
        while self._unanswered and self._unanswered[0].outcomes:
            self._unanswered.popleft()

    async def _recover(self) -> None:
        """Try once to send everything that is not answered again, in order."""
        clock = self._clock.loop_s
        if any(pending.has_failed and pending.reply is not None for pending in self._unanswered):
            await self._commands.reset()  # if there is a connection, it does not answer as it should
            self._read_replies()
        if not (again := [pending for pending in self._unanswered if not pending.outcomes]):
            return
        if self._commands.link is None:
            left_s = again[0].deadline - clock()
            if self._tried:
                await asyncio.sleep(max(0.0, min(next(self._waits_s), left_s)))
            self._tried = True
            try:
                async with asyncio.timeout(left_s):
                    await self._commands.connect()
            except TimeoutError:
                return
            except RedisUnavailable as error:
                self._why = str(error)
                return
            except RedisRefused as error:
                for pending in again:
                    pending.fail(error)
                return
        # Those that were sent meanwhile are among them, each in its order.
        self._write([pending for pending in self._unanswered if pending.has_failed])

    def _give_up(self, now: float) -> None:
        for pending in self._unanswered:
            if not pending.outcomes and pending.deadline <= now:
                pending.fail(RedisUnavailable(f"no answer from Redis within {self._deadline_s:g} s: {self._why}"))
        self._forget_answered()
        if not self._unanswered:  # later callers do not wait because earlier ones had to
            self._be_confident()

    def _be_confident(self) -> None:
        """Reset the backoff: the next attempt is made at once; those after it wait, each time longer."""
        if self._tried:
            self._tried = False
            self._waits_s = backoff_s(SHORTEST_WAIT_S, self._longest_wait_s, self._chance)

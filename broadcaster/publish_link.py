"""One ordered pipeline of events to Redis: what was not answered is sent again, until it is or time is up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broadcaster import history
from broadcaster.bus import CommandLink, backoff_s
from broadcaster.errors import RedisRefused, RedisUnavailable
from broadcaster.history import Stored
from broadcaster.redis_link import Command
from broadcaster.settings import Settings

STORE_EVENTS: Final = 64
"""Most events in one step of Redis, which does nothing else meanwhile: some 0.5 ms."""

STORE_BYTES: Final = 262_144
"""Most bytes of such a step, one larger event excepted."""

Outcome = Stored | RedisUnavailable


@dataclass(slots=True, eq=False)
class Pending:
    """Some events on their way, in one command.

    Attributes:
        command: What is sent, and sent again: the same bytes.
        count: How many events.
        deadline: Loop time at which it is given up.
        reply: What the present connection has said.
        outcomes: One per event, once it is known.
    """

    command: Command
    count: int
    deadline: float
    reply: asyncio.Future[Any] | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def fail(self, error: RedisUnavailable) -> None:
        self.outcomes = [error] * self.count


class PublishLink:
    """Publishes payloads in order. With history they are stored in the same step, and a retry makes no twin.

    Nothing runs in the background: whoever waits for a reply makes a new connection when one is needed, and
    sends again, in order, everything that was not answered, whoever it is from.
    """

    def __init__(self, settings: Settings) -> None:
        self._history = settings.history
        self._deadline_s = settings.publisher.publish_deadline_s
        self._max_unanswered = settings.publisher.max_unanswered
        self._silence_s = settings.redis.silence_timeout_s
        self._longest_wait_s = settings.redis.reconnect_max_s
        self._commands = CommandLink(settings.redis, *([history.LOAD] if self._history.enabled else []))
        self._unanswered: deque[Pending] = deque()
        self._recovering = asyncio.Lock()
        self._waits_s = backoff_s(0.05, self._longest_wait_s)
        self._why = "it was silent"

    async def connect(self) -> None:
        """Connect unless connected.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisLink.open`.
        """
        await self._commands.connect()

    def close(self) -> None:
        """End the connection; what is not answered stays unknown."""
        self._commands.close()

    def send(self, channel: str, events: Sequence[tuple[str, bytes]]) -> list[Pending]:
        """Publish events (id, payload) in one write, now; what becomes of them, `settle` says."""
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        sent = [Pending(*command, deadline) for command in self._commands_for(channel, events)]
        self._forget_answered()
        # Behind something that has to be sent again nothing may be sent: it would overtake.
        in_order = not any(map(_has_failed, self._unanswered))
        room = self._max_unanswered - sum(pending.count for pending in self._unanswered)
        for pending in sent:
            room -= pending.count
            if room < 0:
                pending.fail(RedisUnavailable(f"more than {self._max_unanswered} events wait for Redis' answer"))
        waiting = [pending for pending in sent if not pending.outcomes]
        self._unanswered.extend(waiting)
        if in_order and self._commands.link is not None:
            self._write(waiting)
        return sent

    def _commands_for(self, channel: str, events: Sequence[tuple[str, bytes]]) -> list[tuple[Command, int]]:
        if not self._history.enabled:
            return [(("PUBLISH", channel, payload), 1) for _, payload in events]
        commands, batch, size = list[tuple[Command, int]](), list[tuple[str, bytes]](), 0
        for event in events:
            if batch and (len(batch) == STORE_EVENTS or size + len(event[1]) > STORE_BYTES):
                commands.append((history.store(channel, batch, self._history), len(batch)))
                batch, size = [], 0
            batch.append(event)
            size += len(event[1])
        commands.append((history.store(channel, batch, self._history), len(batch)))
        return commands

    async def settle(self, sent: Sequence[Pending]) -> list[Outcome]:
        """Per event: where it is stored and who heard it, or what failed.

        An error does not say that the event was not published: Redis may have done it and died before it
        could answer.

        Raises:
            RedisRefused: Redis will not let us publish.
        """
        while waiting := [pending for pending in sent if not pending.outcomes]:
            last = waiting[-1]
            if last.reply is not None:
                await asyncio.wait([last.reply], timeout=self._silence_s)
                if not last.reply.done():
                    await self._commands.reset()
            self._read_replies()
            if not last.outcomes:
                async with self._recovering:
                    if not last.outcomes and (last.reply is None or last.reply.done()):
                        await self._recover()
        return [outcome for pending in sent for outcome in pending.outcomes]

    def _read_replies(self) -> None:
        """Take every answer that has come, in order.

        Raises:
            RedisRefused: Redis will not let us publish.
        """
        refused = None
        for pending in self._unanswered:
            if pending.outcomes or pending.reply is None or not pending.reply.done():
                continue
            error = pending.reply.exception()
            if isinstance(error, RedisRefused):
                pending.fail(RedisUnavailable(str(error)))
                refused = error
            elif error is None:
                self._read_reply(pending, pending.reply.result())
            elif not self._history.enabled:  # nobody could tell a second one from the first
                pending.fail(RedisUnavailable(str(error)))
        self._forget_answered()
        if refused is not None:
            raise refused

    def _read_reply(self, pending: Pending, reply: Any) -> None:
        try:
            pending.outcomes = list(history.read_stored(reply)) if self._history.enabled else [Stored(None, reply)]
        except RedisUnavailable as error:
            pending.fail(error)

    def _forget_answered(self) -> None:
        while self._unanswered and self._unanswered[0].outcomes:
            self._unanswered.popleft()

    async def _recover(self) -> None:
        """Try once to send everything that is not answered again, in order; give up what is too late.

        Raises:
            RedisRefused: Redis will not have us.
        """
        clock = asyncio.get_running_loop().time
        for pending in self._unanswered:
            if pending.reply is not None and pending.reply.done() and (error := pending.reply.exception()):
                self._why = str(error)
        self._give_up(clock())
        if not (again := [pending for pending in self._unanswered if not pending.outcomes]):
            return
        await self._commands.reset()  # if there is a connection, it does not answer as it should
        left_s = again[0].deadline - clock()
        await asyncio.sleep(min(next(self._waits_s), left_s))
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
                pending.fail(RedisUnavailable(str(error)))
            raise
        # Those that were sent meanwhile are among them, each in its place.
        self._write([pending for pending in self._unanswered if not pending.outcomes])
        self._waits_s = backoff_s(0.05, self._longest_wait_s)

    def _write(self, pendings: Sequence[Pending]) -> None:
        replies = self._commands.send(*(pending.command for pending in pendings))
        for pending, reply in zip(pendings, replies, strict=True):
            pending.reply = reply

    def _give_up(self, now: float) -> None:
        for pending in self._unanswered:
            if not pending.outcomes and pending.deadline <= now:
                pending.fail(RedisUnavailable(f"no answer from Redis within {self._deadline_s:g} s: {self._why}"))
        self._forget_answered()


def _has_failed(pending: Pending) -> bool:
    """Whether it has to be sent again, or has not been sent at all."""
    if pending.outcomes:
        return False
    reply = pending.reply
    return reply is None or (reply.done() and reply.exception() is not None)

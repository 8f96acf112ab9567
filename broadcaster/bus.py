"""The two ways to Redis that last: a subscription that says when it may have missed something, and commands."""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

from broadcaster.errors import RedisRefused, RedisUnavailable
from broadcaster.redis_link import RUN_ID, Command, OnMessages, RedisLink
from broadcaster.settings import RedisTable, redact

log = logging.getLogger("broadcaster.bus")

T = TypeVar("T")

_SHORTEST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 1.0


def backoff_s(shortest_s: float, longest_s: float) -> Iterator[float]:
    """Waits between attempts: full jitter under a bound that doubles (AWS, Exponential Backoff And Jitter)."""
    bound_s = shortest_s
    while True:
        yield random.uniform(0, min(bound_s, longest_s))
        bound_s = min(bound_s * 2, longest_s)


async def keep_trying(work: Callable[[], Awaitable[T]], complaint: str) -> T:
    """The result of `work`, as soon as Redis is there; each failure is logged.

    Raises:
        RedisRefused: Trying again would not help.
    """
    waits_s = backoff_s(_SHORTEST_WAIT_S, _LONGEST_WAIT_S)
    while True:
        try:
            return await work()
        except RedisUnavailable as error:
            log.warning("%s: %s; trying again", complaint, error)
            await asyncio.sleep(next(waits_s))


class Subscription:
    """Redis channels, held for as long as the process lives, over one link.

    Redis may go away for any length of time, be killed, or freeze: a link that says nothing for
    `silence_timeout_s` though pinged counts as gone, and a new one is made, with full-jitter back-off.

    Attributes:
        channels: The channels to be held; change them by `hold` and `release`.
        confirmed: The channels that Redis has confirmed on the link there is now.
        refused: Those that Redis will not let us hold.
        reconnects: How often a link was made anew after one had been confirmed.
    """

    def __init__(
        self,
        redis: RedisTable,
        *,
        on_messages: OnMessages,
        on_confirmed: Callable[[str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Nothing happens before `run`.

        Args:
            redis: Address and deadlines.
            on_messages: Takes per channel the payloads that one read brought, in Redis' order.
            on_confirmed: From here on nothing is missed on a channel. Called in order with the messages.
            on_lost: From here on, until confirmed again, events of a channel may be missed.
        """
        self._redis = redis
        self._url = redis.subscribe_url or redis.url
        self._on_messages = on_messages
        self._on_confirmed = on_confirmed
        self._on_lost = on_lost
        self._link: RedisLink | None = None
        self._ever_confirmed = False
        self.channels: dict[str, None] = {}
        self.confirmed: set[str] = set()
        self.refused: set[str] = set()
        self.reconnects = 0

    def hold(self, channel: str) -> None:
        """Subscribe to a channel, now or as soon as there is a link."""
        self.channels[channel] = None
        if self._link is not None:
            self._link.hold(channel)

    def release(self, channel: str) -> None:
        """Give a channel up; nothing more is said of it."""
        del self.channels[channel]
        self.confirmed.discard(channel)
        if self._link is not None:
            self._link.hold(channel, hold=False)

    async def prove(self) -> None:
        """Subscribe to every channel again, which changes nothing and must be confirmed, and ping.

        When this returns, every message that Redis had sent before has been handed over.

        Raises:
            RedisUnavailable: There is no link, or it has ended.
        """
        if self._link is None:
            raise RedisUnavailable("there is no subscription link")
        *held, pong = [*self._link.hold(*self.channels), *self._link.send(("PING",))]
        await pong
        self._note_refused(await asyncio.gather(*held, return_exceptions=True))

    async def run(self) -> None:
        """Keep the subscription until cancelled.

        Raises:
            RedisRefused: Redis will not have us, and trying again would not help.
        """
        attempts = 0
        waits_s = backoff_s(_SHORTEST_WAIT_S, self._redis.reconnect_max_s)
        while True:
            try:
                why = await self._hold_one_link()
                attempts = 0
                waits_s = backoff_s(_SHORTEST_WAIT_S, self._redis.reconnect_max_s)
            except RedisUnavailable as error:
                why = str(error)
                attempts += 1
            await asyncio.sleep(next(waits_s))
            if attempts <= 1:  # said after the wait: when all are told to stop, Redis gone is no news
                log.warning("redis: %s (%s); trying again", why, redact(self._url))

    async def _hold_one_link(self) -> str:
        """From connecting to the end of one link: why it ended if it had been confirmed, else an error."""
        link = await RedisLink.open(
            self._url,
            timeout_s=self._redis.connect_timeout_s,
            on_messages=self._on_messages,
            on_subscribed=self._on_subscribed,
        )
        try:
            self._link = link
            async with asyncio.timeout(self._redis.connect_timeout_s):
                held = await asyncio.gather(*link.hold(*self.channels), return_exceptions=True)
            self._note_refused(held)
            self.reconnects += self._ever_confirmed
            self._ever_confirmed = True
            return await self._watch(link)
        except TimeoutError:
            raise RedisUnavailable("Redis did not confirm the subscription") from None
        finally:
            self._link = None
            link.abort()
            lost, self.confirmed = self.confirmed, set()
            for channel in lost:
                self._on_lost(channel)

    def _note_refused(self, replies: list[Any]) -> None:
        """One channel that is not for us must not cost us the others; all of them are no Redis for us.

        Raises:
            RedisRefused, RedisUnavailable: None is for us; or the link has ended.
        """
        errors = [reply for reply in replies if isinstance(reply, RedisRefused)]
        others = [reply for reply in replies if isinstance(reply, BaseException) and reply not in errors]
        if others or (errors and len(errors) == len(replies)):
            raise (others or errors)[0]
        refused = self.channels.keys() - self.confirmed if errors else set()
        for channel in refused - self.refused:
            log.warning("redis: the channel %s is not for us: %s", channel, errors[0])
        self.refused = set(refused)

    def _on_subscribed(self, name: bytes, held: bool) -> None:
        channel = name.decode()
        if held and channel in self.channels and channel not in self.confirmed:
            self.confirmed.add(channel)
            self._on_confirmed(channel)
        elif not held and channel in self.confirmed:
            self.confirmed.discard(channel)
            log.warning("redis: the subscription to %s was taken away", channel)
            self._on_lost(channel)

    async def _watch(self, link: RedisLink) -> str:
        """Ping until the link ends or falls silent: a frozen Redis keeps its connections open.

        Silence is counted from a question: if it was this process that stood still, nobody has been silent.
        """
        clock = asyncio.get_running_loop().time
        while not link.lost.done():
            asked_at, [answer] = clock(), link.send(("PING",))
            await asyncio.wait([link.lost], timeout=self._redis.ping_interval_s)
            overdue = False
            while not answer.done():
                left_s = max(asked_at, link.heard_at) + self._redis.silence_timeout_s - clock()
                if left_s <= 0 and overdue:
                    return f"Redis was silent for {clock() - asked_at:.1f} s"
                overdue = left_s <= 0  # if it was this loop that stood still, the answer is read a moment later
                await asyncio.wait([link.lost, answer], timeout=max(left_s, 0.01), return_when=FIRST_COMPLETED)
        return "connection lost"


class CommandLink:
    """Commands to Redis over one connection, made when it is needed and anew when it was lost."""

    def __init__(self, redis: RedisTable, *greeting: Command) -> None:
        """Prepare; nothing is connected yet.

        Args:
            redis: Address and deadlines.
            greeting: Commands that are sent first on every new connection, and must succeed. With a greeting
                `RUN_ID` can be used: a connection leads to one Redis process, which is asked once who it is.
        """
        self._redis = redis
        self._greeting = greeting
        self._run_id = ""
        self._link: RedisLink | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    @property
    def link(self) -> RedisLink | None:
        """The connection, if there is one that has not ended."""
        return None if self._link is None or self._link.lost.done() else self._link

    async def connect(self) -> RedisLink:
        """The connection, made now if there is none.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisLink.open`; or this was closed.
        """
        async with self._connecting:
            if self._closed:
                raise RedisUnavailable("the connection to Redis was closed")
            if (link := self.link) is None:
                timeout_s = self._redis.connect_timeout_s
                link = await RedisLink.open(self._redis.url, timeout_s=timeout_s)
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._greet(link)
                except TimeoutError:
                    link.abort()
                    raise RedisUnavailable(f"Redis did not answer within {timeout_s} s") from None
                except BaseException:
                    link.abort()
                    raise
                self._link = link
                if self._closed:
                    link.abort()
        return link

    async def _greet(self, link: RedisLink) -> None:
        if self._greeting:
            info, *_ = await asyncio.gather(*link.send(("INFO", "server"), *self._greeting))
            self._run_id = server_info(info).get("run_id", "")

    def send(self, *commands: Command) -> list[asyncio.Future[Any]]:
        """Send commands in one write over the connection there is; see `RedisLink.send`."""
        assert self._link is not None
        return self._link.send(*map(self._complete, commands))

    def _complete(self, command: Command) -> Command:
        if RUN_ID not in command:
            return command
        at = command.index(RUN_ID)
        return (*command[:at], self._run_id, *command[at + 1 :])

    async def execute(self, *commands: Command) -> list[Any]:
        """Send commands in one write and wait for all replies.

        Raises:
            RedisUnavailable, RedisRefused: No connection, no answer in time, or an error reply.
        """
        link = await self.connect()
        timeout_s = self._redis.silence_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*self.send(*commands))
        except TimeoutError:
            link.abort()
            raise RedisUnavailable(f"Redis did not answer within {timeout_s} s") from None
        except RedisUnavailable:
            link.abort()  # a script that was flushed, a master that is none any more: a new connection helps
            raise

    async def reset(self) -> None:
        """End the connection, if there is one; the next command makes a new one."""
        if (link := self.link) is not None:
            link.abort()
            await link.lost

    def close(self) -> None:
        """End the connection; there will be no other one."""
        self._closed = True
        if self._link is not None:
            self._link.abort()


async def server_version(redis: RedisTable) -> str:
    """The version Redis reports, such as `7.0.15`.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`.
    """
    commands = CommandLink(redis)
    try:
        [info] = await commands.execute(("INFO", "server"))
    finally:
        commands.close()
    return server_info(info).get("redis_version", "unknown")


def server_info(info: bytes) -> dict[str, str]:
    """The fields of Redis' `INFO server`, such as `redis_version` and `run_id`."""
    lines = str(info, "utf-8", "replace").splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines)}

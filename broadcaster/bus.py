"""Events over Redis Pub/Sub: publishing them, and a subscription that says when it may have missed some."""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from broadcaster.errors import RedisUnavailable
from broadcaster.redis_link import RedisLink, fail
from broadcaster.settings import RedisTable, redact

log = logging.getLogger("broadcaster.bus")


class Subscription:
    """One channel, held for as long as the process lives.

    Redis may go away for any length of time, be killed, or freeze: a link that says nothing for
    `silence_timeout_s` though pinged counts as gone, and a new one is made, with full-jitter back-off.

    Attributes:
        confirmed: Whether Redis has confirmed the subscription and the link is alive.
        reconnects: How often the subscription was restored after it had been confirmed once.
    """

    def __init__(
        self,
        redis: RedisTable,
        channel: str,
        *,
        on_events: Callable[[list[bytes]], None],
        on_confirmed: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """Nothing happens before `run`.

        Args:
            redis: Address and deadlines.
            channel: The Redis channel.
            on_events: Takes the payloads that one read brought, in Redis' order.
            on_confirmed: From here on nothing is missed. Called in order with the events.
            on_lost: From here on, until confirmed again, events may be missed.
        """
        self._redis = redis
        self._channel = channel
        self._on_events = on_events
        self._on_confirmed = on_confirmed
        self._on_lost = on_lost
        self._ever_confirmed = False
        self.confirmed = False
        self.reconnects = 0

    async def run(self) -> None:
        """Keep the subscription until cancelled.

        Raises:
            RedisRefused: Redis will not have us, and trying again would not help.
        """
        attempts = 0
        while True:
            try:
                why = await self._hold_one_link()
                attempts = 0
            except RedisUnavailable as error:
                why = str(error)
                attempts += 1
            longest_s = min(self._redis.reconnect_max_s, 0.05 * 2 ** min(attempts, 10))
            await asyncio.sleep(random.uniform(0, longest_s))
            if attempts <= 1:  # said after the wait: when all are told to stop, Redis gone is no news
                log.warning("redis: %s (%s); trying again", why, redact(self._redis.url))

    async def _hold_one_link(self) -> str:
        """From connecting to the end of one link: why it ended if it had been confirmed, else an error."""
        link = await RedisLink.open(
            self._redis.url,
            timeout_s=self._redis.connect_timeout_s,
            on_messages=self._on_events,
            on_subscribed=self._confirm,
        )
        try:
            async with asyncio.timeout(self._redis.connect_timeout_s):
                await link.execute("SUBSCRIBE", self._channel)
            return await self._watch(link)
        except TimeoutError:
            raise RedisUnavailable("Redis did not confirm the subscription") from None
        finally:
            link.abort()
            if self.confirmed:
                self.confirmed = False
                self._on_lost()

    def _confirm(self) -> None:
        self.confirmed = True
        if self._ever_confirmed:
            self.reconnects += 1
        log.info("redis: subscribed to %s", self._channel)
        self._ever_confirmed = True
        self._on_confirmed()

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


class PublishLink:
    """Publishes payloads; one connection, made anew when it was lost. `async with PublishLink(...)`."""

    def __init__(self, redis: RedisTable) -> None:
        self._redis = redis
        self._link: RedisLink | None = None

    async def __aenter__(self) -> PublishLink:
        """Connect.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisLink.open`.
        """
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is not None:
            self._link.abort()

    async def connect(self) -> None:
        """Connect unless connected.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisLink.open`.
        """
        if self._link is None or self._link.lost.done():
            self._link = await RedisLink.open(self._redis.url, timeout_s=self._redis.connect_timeout_s)

    def send(self, channel: str, payloads: Sequence[bytes]) -> list[asyncio.Future[Any]]:
        """Publish in one write, now; what becomes of it, `settle` says. Without a connection: that it failed."""
        if self._link is None:
            failed: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in payloads]
            for reply in failed:
                fail(reply, RedisUnavailable("there is no connection to Redis"))
            return failed
        return self._link.send(*(("PUBLISH", channel, payload) for payload in payloads))

    async def settle(self, replies: Sequence[asyncio.Future[Any]]) -> list[int | RedisUnavailable]:
        """Per payload: how many Redis subscriptions heard it, or what failed.

        An error does not say that the event was not published: Redis may have done it and died before it
        could answer.

        Raises:
            RedisRefused: Redis will not let us publish.
        """
        await asyncio.wait(replies, timeout=self._redis.silence_timeout_s)
        if not replies[-1].done() and self._link is not None:
            self._link.abort()
            self._link = None
        return [_heard(reply) for reply in replies]


def _heard(reply: asyncio.Future[Any]) -> int | RedisUnavailable:
    if not reply.done():
        return RedisUnavailable("Redis did not answer the publish in time")
    if isinstance(error := reply.exception(), RedisUnavailable):
        return error
    heard: int = reply.result()
    return heard


async def server_version(redis: RedisTable) -> str:
    """The version Redis reports, such as `7.0.15`.

    Raises:
        RedisUnavailable, RedisRefused: See `RedisLink.open`.
    """
    link = await RedisLink.open(redis.url, timeout_s=redis.connect_timeout_s)
    try:
        async with asyncio.timeout(redis.silence_timeout_s):  # a frozen Redis can be connected to
            text = str(await link.execute("INFO", "server"), "utf-8", "replace")
    except TimeoutError:
        raise RedisUnavailable(f"Redis did not answer within {redis.silence_timeout_s} s") from None
    finally:
        link.abort()
    lines = dict(line.partition(":")[::2] for line in text.splitlines())
    return lines.get("redis_version", "unknown")

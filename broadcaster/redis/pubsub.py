"""The subscription to Redis Pub/Sub: restored when it breaks, reporting when messages may be missed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import FIRST_COMPLETED
from collections import Counter
from typing import Any

from broadcaster.core.backoff import SHORTEST_WAIT_S, backoff_s
from broadcaster.core.errors import RedisErrorReply, RedisRefused, RedisUnavailable, RedisUnreachable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.subscription import SubscriptionHandlers
from broadcaster.redis.connection import RedisConnection
from broadcaster.redis.nodes import Nodes
from broadcaster.settings import RedisTable

log = logging.getLogger("broadcaster.redis")


class PubSubLink:
    """Subscriptions to Redis channels that last as long as the process, over one connection at a time.

    Redis may be unavailable for any length of time, be killed, or freeze: a connection on which nothing arrives
    for `silence_timeout_s` after a ping counts as lost, and a new one is opened, with full-jitter backoff; to
    another node if there are several.

    Attributes:
        nodes: Where it may subscribe, and where it does.
        channels: The channels to be subscribed to; changed by `subscribe` and `unsubscribe`.
        confirmed: The channels that Redis has confirmed on the present connection.
        refused: The channels that Redis does not permit subscribing to.
        reconnects: How often a connection was opened again after one had been confirmed.
    """

    def __init__(self, redis: RedisTable, runtime: Runtime = RUNTIME, nodes: Nodes | None = None) -> None:
        """Prepare; nothing happens before `run`."""
        self._redis = redis
        self.nodes = Nodes(redis, runtime) if nodes is None else nodes
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._link: RedisConnection | None = None
        self._ever_confirmed = False
        self._why = ""  # there is no connection, by the last attempt
        self._handlers: SubscriptionHandlers | None = None
        self._leaving: Counter[str] = Counter()  # of which UNSUBSCRIBE is not answered yet
        self.channels: dict[str, None] = {}
        self.confirmed: set[str] = set()
        self.refused: set[str] = set()
        self.reconnects = 0

    def use(self, redis: RedisTable) -> None:
        """Log in as this table says on new connections; the one that is open stays."""
        self._redis = redis
        self.nodes.use(redis)

    def subscribe(self, channel: str) -> None:
        """Subscribe to a channel, now or as soon as there is a connection."""
        self.channels[channel] = None
        if self._link is not None:
            self._link.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        """Unsubscribe from a channel; the handlers receive no more of it."""
        del self.channels[channel]
        self.confirmed.discard(channel)
        if self._link is not None:
            self._link.unsubscribe(channel)
            self._leaving[channel] += 1

    async def verify(self) -> None:
        """Subscribe to every channel again, which changes nothing and must be confirmed, and ping.

        When this returns, every message that Redis had sent before has been handed to the handlers.

        Raises:
            RedisUnavailable: There is no connection, or it has ended.
        """
        if self._link is None:
            raise RedisUnavailable(self._why or "there is no subscription link")
        channels = list(self.channels)
        *confirmations, pong = [*self._link.subscribe(*channels), *self._link.send(("PING",))]
        with contextlib.suppress(RedisErrorReply):  # PING may be disabled; this, too, has come in its turn
            await pong
        self._note_refused(channels, await asyncio.gather(*confirmations, return_exceptions=True))

    def move(self, why: str) -> None:
        """End the connection, and subscribe at another node, if there is one."""
        if self._link is not None:
            self._link.why = why
            self._link.abort()

    async def run(self, handlers: SubscriptionHandlers) -> None:
        """Keep the subscriptions until cancelled.

        Raises:
            RedisRefused: Redis refuses all of them at every node, and has done so from the beginning.
        """
        self._handlers = handlers
        attempts = refusals = 0
        waits_s = backoff_s(SHORTEST_WAIT_S, self._redis.reconnect_max_s, self._chance)
        while True:
            try:
                why = await self._run_one_connection(handlers)
                attempts = refusals = 0
                waits_s = backoff_s(SHORTEST_WAIT_S, self._redis.reconnect_max_s, self._chance)
            except (RedisUnavailable, RedisRefused) as error:
                refusals += isinstance(error, RedisRefused)
                if refusals >= len(self.nodes) and not self._ever_confirmed:
                    raise
                why = error.reason if isinstance(error, RedisUnreachable) else str(error)
                self._why = str(error)
                attempts += 1
            at = self.nodes.address
            self.nodes.leave(why)
            await asyncio.sleep(next(waits_s))
            if attempts <= len(self.nodes):  # after the wait: when all is stopped, a lost Redis is expected
                again = "trying again" if len(self.nodes) == 1 else f"moving to {self.nodes.address}"
                if self._ever_confirmed:
                    self._log.log(logging.WARNING, why + at, "redis: %s (%s); %s", why, at, again)
                else:
                    log.info("waiting for Redis at %s (%s)", at, why)

    async def _run_one_connection(self, handlers: SubscriptionHandlers) -> str:
        """Open a connection and run it to its end; why it ended if it had been confirmed, else an error."""
        link = await RedisConnection.open(
            self.nodes.url,
            timeout_s=self._redis.connect_timeout_s,
            silence_s=self._redis.silence_timeout_s,
            on_messages=handlers.on_messages,
            on_subscribed=self._on_subscribed,
            clock=self._clock,
        )
        try:
            self._link = link
            async with asyncio.timeout(self._redis.connect_timeout_s):
                channels = list(self.channels)
                replies = await asyncio.gather(*link.subscribe(*channels), return_exceptions=True)
            self._note_refused(channels, replies)
            self.reconnects += self._ever_confirmed
            self._ever_confirmed = True
            return await self._watch(link)
        except TimeoutError:
            raise RedisUnavailable("Redis did not confirm the subscription") from None
        finally:
            self._link = None
            self._leaving.clear()
            link.abort()
            lost, self.confirmed = self.confirmed, set()
            for channel in lost:
                handlers.on_lost(channel)

    def _note_refused(self, channels: list[str], replies: list[Any]) -> None:
        """Record the refused channels: one must not cost the others; if all are refused, this Redis is of no use.

        Raises:
            RedisRefused, RedisUnavailable: All are refused; or the connection has ended.
        """
        errors = {
            name: reply for name, reply in zip(channels, replies, strict=True) if isinstance(reply, Exception)
        }
        refused = {name for name, error in errors.items() if isinstance(error, RedisRefused)}
        others = [error for name, error in errors.items() if name not in refused]
        if others or (refused and len(refused) == len(channels)):
            raise (others or [*errors.values()])[0]
        for name in sorted(refused - self.refused):
            self._log.log(logging.WARNING, name, "redis: the channel %s is not for us: %s", name, errors[name])
        self.refused = refused

    def _on_subscribed(self, name: bytes, subscribed: bool) -> None:
        assert self._handlers is not None
        channel = name.decode()
        if not subscribed and self._leaving[channel]:
            self._leaving[channel] -= 1
            self._leaving += Counter()  # without those that are zero
        elif channel in self._leaving:
            return  # what was asked for before: the answer to what was asked for since then will come
        elif subscribed and channel in self.channels and channel not in self.confirmed:
            self.confirmed.add(channel)
            self._handlers.on_confirmed(channel)
        elif not subscribed and channel in self.confirmed:
            self.confirmed.discard(channel)
            self._log.log(
                logging.WARNING, f"away {channel}", "redis: the subscription to %s was taken away", channel
            )
            self._handlers.on_lost(channel)

    async def _watch(self, link: RedisConnection) -> str:
        """Ping until the connection ends: a frozen Redis keeps its connections open, and is found to be silent."""
        while not link.lost.done():
            [answer] = link.send(("PING",))
            await asyncio.wait([link.lost], timeout=self._redis.ping_interval_s)
            if not answer.done():  # as a rule it is: waiting for it all the same costs a turn of the loop
                await asyncio.wait([link.lost, answer], return_when=FIRST_COMPLETED)
        return link.why

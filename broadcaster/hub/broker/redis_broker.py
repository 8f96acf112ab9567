"""The broker on a single Redis server, or on that and its replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from broadcaster.core.errors import RedisErrorReply, RedisRefused, RedisUnavailable
from broadcaster.core.position import Head, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.subscription import (
    ANNOUNCED_S,
    HUB_CHANNELS,
    SubscriptionHandlers,
    announcements_key,
    hub_databases,
)
from broadcaster.hub.broker.broker import StoredEvents, Whereabouts
from broadcaster.hub.broker.replica import Replica
from broadcaster.publish.publisher import Published, Publisher
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink, server_info
from broadcaster.redis.connection import Command, check_tls
from broadcaster.redis.nodes import REPLICATION
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.redis.suitability import ASK_COMMANDS, ASK_SETTINGS, missing_commands, warnings
from broadcaster.settings import HistoryTable, RedisTable, Settings

log = logging.getLogger("broadcaster.redis")

_PROBE_EXPIRE_S: Final = 60
_NO_KEY: Final = -2
_SPARE_S: Final = 1.0
"""So many seconds before the deadline of an HTTP request it is known what became of its event."""


class RedisBroker:
    """A `Broker`, over one connection each for the subscriptions, for commands, for pages and for publishing.

    With replicas, the subscriptions and pages are at one of them, and everything else at the master: so the
    delivery probe proves the whole way.
    """

    def __init__(
        self,
        history: HistoryTable,
        *,
        commands: CommandLink,
        pages: CommandLink,
        pubsub: PubSubLink,
        publisher: Publisher,
        replica: Replica | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Put the links together; nothing is connected yet.

        Args:
            history: Whether and for how long events are stored.
            commands: Made with `stream.LOAD` as its greeting if events are stored.
            pages: Made with `stream.LOAD` and `stream.LOAD_PAGE`; used only if events are stored.
            pubsub: For the subscriptions.
            publisher: For what is published over HTTP.
            replica: Where the subscriptions are, if not at the same Redis.
            runtime: Clock and chance for the names of epochs.
        """
        self._history = history
        self._commands = commands
        self._pages = pages
        self._pubsub = pubsub
        self._publisher = publisher
        self._replica = replica
        self._runtime = runtime
        self._suitable = False  # its settings were looked at

    @classmethod
    def of(cls, settings: Settings, runtime: Runtime = RUNTIME) -> RedisBroker:
        """The broker that the settings describe.

        Raises:
            ConfigurationError: A file that a URL of Redis names for TLS cannot be used.
        """
        if settings.redis.subscribe_url:
            for url in settings.redis.node_urls:
                check_tls("redis.subscribe_url", url)
        longest_s = max(0.1, settings.hub.handshake_timeout_s - _SPARE_S)
        deadline_s = min(settings.publisher.publish_deadline_s, longest_s)
        limits = settings.publisher.model_copy(update={"publish_deadline_s": deadline_s})
        greeting = [stream.LOAD] if settings.history.enabled else []
        pubsub = PubSubLink(settings.redis, runtime)
        replica = Replica(settings.redis, pubsub, runtime) if settings.redis.subscribe_url else None
        return cls(
            settings.history,
            commands=CommandLink(settings.redis, *greeting, runtime=runtime),
            pages=CommandLink(settings.redis, stream.LOAD, stream.LOAD_PAGE, runtime=runtime),
            pubsub=pubsub,
            publisher=Publisher(settings.model_copy(update={"publisher": limits}), runtime=runtime),
            replica=replica,
            runtime=runtime,
        )

    @property
    def confirmed(self) -> Collection[str]:
        return self._pubsub.confirmed

    @property
    def refused(self) -> Collection[str]:
        return self._pubsub.refused

    @property
    def reconnects(self) -> int:
        return self._pubsub.reconnects

    @property
    def node(self) -> str:
        return self._replica.nodes.address if self._replica else ""

    @property
    def moves(self) -> int:
        return self._replica.nodes.moves if self._replica else 0

    @property
    def moved(self) -> str:
        return self._replica.nodes.moved if self._replica else ""

    @property
    def lag_max_s(self) -> float | None:
        return self._replica.lag_max_s if self._replica else None

    def distrust(self, why: str) -> str:
        return self._replica.distrust(why) if self._replica else why

    def use(self, redis: RedisTable) -> None:
        for link in (self._commands, self._pages, self._pubsub, self._publisher):
            link.use(redis)

    async def run(self, handlers: SubscriptionHandlers) -> None:
        await self._pubsub.run(handlers)

    def subscribe(self, channel: str) -> None:
        self._pubsub.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        self._pubsub.unsubscribe(channel)

    async def ensure_epoch(self, channel: str, floor: Position | None) -> Head:
        [reply] = await self._commands.execute(self._ensure_epoch(channel, floor))
        return stream.read_head(reply)

    async def page(
        self, channel: str, first: int, *, count: int, max_bytes: int, floor: Position | None
    ) -> StoredEvents:
        found = await self._read(self._ensure_epoch(channel, floor), channel, first, count, max_bytes)
        assert found is not None  # its epoch has begun
        return found

    async def peek(self, channel: str, first: int, *, count: int, max_bytes: int) -> StoredEvents | None:
        return await self._read(stream.peek_epochs(channel), channel, first, count, max_bytes)

    async def _read(
        self, ask: Command, channel: str, first: int, count: int, max_bytes: int
    ) -> StoredEvents | None:
        """A page; `ask` is the command that says where the channel stands."""
        if self._replica is not None:
            head, info = await self._pages.execute(ask, REPLICATION)
            if head == [None, None]:
                return None
            at = stream.read_head(head)
            return await self._replica.page(channel, first, count=count, max_bytes=max_bytes, head=at, master=info)
        head, listed = await self._pages.execute(ask, stream.page(channel, first, count, max_bytes))
        if head == [None, None]:
            return None
        found = StoredEvents(stream.read_head(head), *stream.read_page(listed))
        if not stream.is_of_head(listed, found.head):
            raise RedisUnavailable("the memory of Redis has changed between two commands")
        return found

    async def stamps(self, channel: str) -> tuple[int | None, int | None]:
        time, rising = await self._pages.execute_each(("TIME",), stream.peek_rising(channel))
        if isinstance(rising, Exception):
            raise rising
        return stream.read_time(time), stream.read_rising(rising)

    def _ensure_epoch(self, channel: str, floor: Position | None) -> tuple[Any, ...]:
        return stream.ensure_epoch(channel, self._history, floor=floor, runtime=self._runtime)

    async def probe(
        self, own_channel: str, token: bytes, channels: Sequence[str], *, touch: bool
    ) -> dict[str, Whereabouts]:
        if self._replica is not None and not self._history.enabled:
            self._replica.must_be_proven()
        stored = channels if self._history.enabled else ()
        if touch:
            await self._check_suitability()
        replies = await self._ask_master(
            ("SET", own_channel, "", "EX", _PROBE_EXPIRE_S),
            ("INFO", "server"),
            *((REPLICATION,) if self._replica else ()),
            *(stream.peek_head(channel) for channel in stored),
            *(self._ensure_epoch(channel, None) for channel in stored if touch),
            ("PUBLISH", own_channel, token),  # last: whatever was read before it arrives before it
        )
        written, info, *replies, published = replies
        replication = replies.pop(0) if self._replica else b""
        for reply in (written, info, replication, published):
            if isinstance(reply, Exception):
                raise reply
        if self._replica is None:
            await self._pubsub.verify()
        else:
            await self._replica.check(replication)
        run_id = server_info(info).get("run_id", "")
        if stored and self._commands.run_id not in ("", run_id):
            # A proxy has led the open connection to another process: what was asked at its beginning is of no use,
            # and the epoch of that process has to begin.
            await self._commands.reset()
            await self._pages.reset()
            raise RedisUnavailable("another Redis process answers on the same connection")
        heads, touched = replies[: len(stored)], replies[len(stored) :] or [None] * len(stored)
        found = dict[str, Whereabouts](dict.fromkeys(channels))
        for channel, head, renewed in zip(stored, heads, touched, strict=True):
            found[channel] = _read_head(renewed if _is_refused(renewed) else head, run_id)
        return found

    async def announce(self, deployment: str, name: str, announcement: bytes) -> None:
        names = announcements_key(deployment)
        self._check_connected()
        await self._commands.execute(
            ("SADD", names, name),
            ("EXPIRE", names, ANNOUNCED_S),
            ("SET", f"{names}.{name}", announcement, "EX", ANNOUNCED_S),
        )

    async def withdraw(self, deployment: str, name: str) -> None:
        names = announcements_key(deployment)
        self._check_connected()
        await self._commands.execute(("SREM", names, name), ("DEL", f"{names}.{name}"))

    async def announced(self, deployment: str) -> tuple[dict[str, tuple[bytes | None, float]], set[int]]:
        names = announcements_key(deployment)
        self._check_connected()
        members, channels = await self._commands.execute_each(
            ("SMEMBERS", names), ("PUBSUB", "CHANNELS", f"{HUB_CHANNELS}*")
        )
        if isinstance(members, Exception):
            raise members
        keys = [f"{names}.{member.decode(errors='replace')}" for member in members]
        asked = [("MGET", *keys), *(("PTTL", key) for key in keys)] if keys else []
        values, *left_ms = await self._commands.execute(*asked) if asked else [[]]
        found: dict[str, tuple[bytes | None, float]] = {}
        silent = []  # for minutes
        for member, value, left in zip(members, values, left_ms, strict=True):
            if left == _NO_KEY:
                silent.append(member)
            else:
                found[member.decode(errors="replace")] = (value, max(0.0, ANNOUNCED_S - left / 1000))
        if silent:
            await self._commands.execute(("SREM", names, *silent))
        return found, set() if isinstance(channels, Exception) else hub_databases(channels)

    def _check_connected(self) -> None:
        """Nobody waits for a connection to announce a hub: the delivery probe opens it."""
        if self._commands.link is None:
            raise RedisUnavailable("there is no connection to Redis")

    async def _ask_master(self, *commands: Command) -> list[Any]:
        """The replies; with a replica it is said that this one does not answer: that one may look well."""
        if self._replica is None:
            return await self._commands.execute_each(*commands)
        patience_s = self._replica.patience_s
        try:
            async with asyncio.timeout(patience_s):
                return await self._commands.execute_each(*commands)
        except TimeoutError:
            raise RedisUnavailable(f"the master did not answer within {patience_s:g} s") from None

    async def _check_suitability(self) -> None:
        """Whether this Redis has the commands that are needed, and, once, what of its settings may cost events.

        Raises:
            RedisUnavailable: Nobody can publish.
        """
        asked = () if self._suitable else ASK_SETTINGS
        commands, *settings = await self._ask_master(ASK_COMMANDS, *asked)
        if missing := missing_commands(commands):
            names = ", ".join(missing)
            raise RedisUnavailable(
                f"Redis has no {names}, without which nobody can publish: disabled, or renamed "
                "(take its rename-command out of redis.conf, and restart Redis)"
            )
        if settings:
            self._suitable = True
            for warning in warnings(*settings):
                log.warning("redis: this server may cost events: %s", warning)

    async def publish(
        self, event_type: str, source: str, *, severity: str, data: Mapping[str, Any] | None, to: str
    ) -> Published:
        return await self._publisher.publish(event_type, source, severity=severity, data=data, to=to)

    def close(self) -> None:
        self._publisher.close()
        self._commands.close()
        self._pages.close()
        if self._replica is not None:
            self._replica.close()


def _is_refused(reply: Any) -> bool:
    """Whether Redis refuses a channel; that it has forgotten the script is no matter of channels."""
    return isinstance(reply, RedisRefused) or (isinstance(reply, RedisErrorReply) and reply.code != "NOSCRIPT")


def _read_head(reply: Any, run_id: str) -> Whereabouts:
    if isinstance(reply, RedisUnavailable | RedisRefused):
        return reply
    try:
        return stream.read_peeked_head(reply, run_id)
    except RedisUnavailable as error:
        return error

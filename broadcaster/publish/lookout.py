"""The lookout of a publisher for the hubs that hear it: do they read what it stores, and are there any?

Redis' Pub/Sub knows no databases: a hub hears what is published in another one than its own, does not find it in
its log, and gives it to nobody. The channel of a hub's probes names its database.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.subscription import (
    ANNOUNCED_S,
    ANNOUNCEMENT_LASTS_S,
    HUB_CHANNELS,
    announcements_key,
    hub_databases,
)
from broadcaster.core.text import printable
from broadcaster.redis.commands import CommandLink
from broadcaster.settings import Settings, redis_database

log = logging.getLogger("broadcaster.publisher")

_EVERY_S: Final = 30.0
_ANSWER_S: Final = 0.5
"""For so long an answer is waited for, which a Redis that has just answered gives at once."""


class HubLookout:
    """Looks every now and then in which databases the hubs are; says so if none is in that of the publisher."""

    def __init__(self, url: str, runtime: Runtime = RUNTIME) -> None:
        """Prepare, for a publisher with this URL of Redis."""
        self._database = redis_database(url)
        self._clock = runtime.clock
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._looked_at = -math.inf

    async def look(self, commands: CommandLink) -> None:
        """Look, if that is due: once in 30 s. Without the right to look, nothing is said."""
        if commands.link is None or self._clock.loop_s() - self._looked_at < _EVERY_S:
            return
        self._looked_at = self._clock.loop_s()
        [reply] = commands.send(("PUBSUB", "CHANNELS", f"{HUB_CHANNELS}*"))
        await asyncio.wait([reply], timeout=_ANSWER_S)
        if not reply.done():
            reply.add_done_callback(lambda late: late.cancelled() or late.exception())
        elif not reply.cancelled() and reply.exception() is None:
            self._compare(reply.result())

    def _compare(self, channels: list[bytes]) -> None:
        found = hub_databases(channels)
        if found and self._database not in found:
            self._log.log(
                logging.WARNING,
                "elsewhere",
                "events are stored in database %d of Redis, and hubs read database %s: they are heard, and given"
                " to nobody; redis.url of both has to name the same one",
                self._database,
                ", ".join(map(str, sorted(found))),
            )


async def announced_hubs(settings: Settings) -> list[str]:
    """The names of the deployment's hubs that are there, wherever they subscribe: each announces itself in Redis.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`; as where this user may not read it.
    """
    key = announcements_key(settings.hub.deployment).encode()
    commands = CommandLink(settings.redis)
    try:
        [names] = await commands.execute(("SMEMBERS", key))
        left_ms = await commands.execute(*(("PTTL", key + b"." + name) for name in names)) if names else []
    finally:
        commands.close()
    oldest_ms = (ANNOUNCED_S - ANNOUNCEMENT_LASTS_S) * 1000
    there = [name for name, left in zip(names, left_ms, strict=True) if left >= oldest_ms]
    return sorted(printable(name.decode(errors="replace")) for name in there)

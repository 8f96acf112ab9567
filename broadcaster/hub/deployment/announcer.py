"""Announces a hub in Redis once a second, and reads what all hubs of its deployment have announced.

Nothing that a subscriber is waiting for waits for it: whatever fails here is said in `/stats` and in the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, Final

from broadcaster.core.errors import ConfigurationError, Unavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.deployment.announcement import Announced, Announcement, missing_of, summed_up
from broadcaster.hub.deployment.identity import Identity, is_under_honcho
from broadcaster.settings import Settings, redis_database

log = logging.getLogger("broadcaster.hub")

_RETRY_S: Final = 0.1
_ANSWER_S: Final = 0.5
"""For so long an answer of Redis is waited for."""


class Announcer:
    """Announces one hub, and knows the others."""

    def __init__(
        self,
        who: Identity,
        settings: Settings,
        broker: Broker,
        statistics: Callable[[], dict[str, Any]],
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare; nothing is announced before `run`.

        Args:
            who: The hub.
            settings: Of it.
            broker: Where it is announced.
            statistics: What `/stats` says of it alone.
            runtime: Clock, and how often.
        """
        self._who = who
        self._deployment = settings.hub.deployment
        self._database = redis_database(settings.redis.url)
        self._wait_s = settings.publisher.start_timeout_s / 3
        self._broker = broker
        self.own_statistics = statistics
        self._every_s = runtime.limits.announce_every_s
        self._clock = runtime.clock
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._serial = 0

    async def run(self) -> None:
        """Announce the hub again and again, until cancelled.

        Raises:
            ConfigurationError: honcho has started fewer hubs than `hub.processes` says.
        """
        # honcho starts all at once, ends all with the first, and does not tell how many there are.
        all_until_s = math.inf if self._who.processes > 1 and is_under_honcho() else None
        while True:
            is_announced = await self._announce()
            if is_announced and all_until_s is not None:
                all_until_s = min(all_until_s, self._clock.loop_s() + self._wait_s)
                announced = await self.announced()
                if not (missing := self._missing_here(announced)):
                    all_until_s = None
                elif self._clock.loop_s() > all_until_s:
                    raise ConfigurationError(self._too_few(missing, announced))
            await asyncio.sleep(self._every_s if is_announced else _RETRY_S)

    async def withdraw(self) -> None:
        """The hub goes: it is not missing."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._broker.withdraw(self._deployment, self._who.name)
        except (Unavailable, TimeoutError):
            pass  # it will be missing for some minutes

    async def announced(self) -> Announced:
        """What all hubs of the deployment have announced; a `trouble` instead of an error."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                found, databases = await self._broker.announced(self._deployment)
        except (Unavailable, TimeoutError) as error:
            return Announced(trouble=str(error) or "Redis does not answer")
        return Announced.read(found, databases - {self._database})

    async def statistics(self) -> dict[str, Any]:
        """What `/stats` says of all hubs of the deployment."""
        announced = await self.announced()
        statistics = self.own_statistics()
        ours = Announcement.of(self._who, statistics, self._serial)
        return summed_up(self._deployment, statistics, ours, announced)

    async def _announce(self) -> bool:
        self._serial += 1
        ours = self._ours()
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._broker.announce(self._deployment, self._who.name, ours.encode())
        except (Unavailable, TimeoutError) as error:
            if ours.ready:  # else that is the trouble, and it is said already
                self._log.log(
                    logging.WARNING,
                    "announce",
                    "this hub cannot be announced to the others: %s",
                    str(error) or "Redis does not answer",
                )
            return False
        return True

    def _ours(self) -> Announcement:
        return Announcement.of(self._who, self.own_statistics(), self._serial)

    def _missing_here(self, announced: Announced) -> list[int]:
        """The numbers of the hubs that are to be on this port of this machine, and are not."""
        here = f"{self._who.machine}:{self._who.port}#"
        names = [name for name in missing_of(self._ours(), announced) if name.startswith(here)]
        return [number for name in names if (number := int(name.removeprefix(here))) <= self._who.processes]

    def _too_few(self, missing: list[int], announced: Announced) -> str:
        who = self._who
        names = ", ".join(f"hub.{number}" for number in missing)
        elsewhere = [
            f"hub.{hub.number} is on port {hub.port}"
            for hub in announced.hubs.values()
            if hub.machine == who.machine and hub.port != who.port and hub.number in missing
        ]
        remedy = (
            f"{', '.join(elsewhere)}, and all have to be on one"
            if elsewhere
            else (f"start honcho with -c hub={who.processes}")
        )
        return f"hub.processes is {who.processes}, but port {who.port} has no {names}; {remedy}"

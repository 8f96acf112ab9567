"""The delivery probe, once a second: only while it succeeds is the hub ready, and does it send heartbeats.

Sockets can be open, publishes succeed, and nothing be delivered: a frozen Redis, a subscription that was taken
away, a replica that has lost its master. So in every round the hub

1. writes to Redis, reads where each open channel stands, and publishes a probe on a channel of its own;
2. subscribes to every channel again, which changes nothing and must be confirmed, and pings;
3. waits for the probe. Redis keeps its order: whatever was published before has then arrived, too, so
   everything that stood in Redis must have been handed on. What was not is read from the log.
"""

from __future__ import annotations

import asyncio
import logging

from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.channels.channels import OWN, Channels
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")


class DeliveryProbe:
    """Proves that events arrive.

    Attributes:
        channel: Where the probes of this hub are published.
        healthy: Whether the last round has succeeded, and nothing has happened since that would make it fail.
        problem: Why it is not healthy; empty if it is.
        rounds: How many rounds have succeeded.
    """

    def __init__(self, settings: Settings, broker: Broker, channels: Channels, runtime: Runtime = RUNTIME) -> None:
        """Prepare; nothing happens before `run`. All open channels of the broker must be caught up."""
        self._interval_s = settings.hub.prove_interval_s
        self._timeout_s = settings.redis.silence_timeout_s
        self._broker = broker
        self._channels = channels
        self._limits = runtime.limits
        self._chance = runtime.chance
        self._probe: asyncio.Future[None] | None = None
        self._expected = b""
        self._wake = asyncio.Event()
        self._refused: set[str] = set()
        self.channel = OWN + runtime.chance.hex(8)
        self.healthy = False
        self.problem = "Redis has not answered yet"
        self.rounds = 0
        broker.subscribe(self.channel)

    def take(self, payloads: list[bytes]) -> None:
        """Take what came over the channel of this hub: it ends here."""
        if self._probe is not None and not self._probe.done() and self._expected in payloads:
            self._probe.set_result(None)

    def mark_suspect(self, problem: str) -> None:
        """Something has happened: unhealthy until the next round, which begins now."""
        self.healthy = False
        self.problem = problem
        self._wake.set()

    def probe_now(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    async def run(self) -> None:
        """Probe, again and again, until cancelled.

        Raises:
            RedisRefused: Redis does not let the hub write, read or publish.
        """
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._timeout_s):
                    problem = await self._round()
            except (RedisUnavailable, TimeoutError) as error:
                problem = str(error) or f"no proof within {self._timeout_s:g} s"
            self._conclude(problem)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(self._limits.probe_pause_s)  # however often it is marked suspect, there is a pause

    def _conclude(self, problem: str) -> None:
        if self._wake.is_set() and not problem and not self.healthy:
            return  # marked suspect in the middle of the round
        if problem and self.healthy:
            log.warning("not ready: %s", problem)
        elif not problem and not self.healthy:
            log.info("ready: events get through")
        self.healthy, self.problem = not problem, problem
        self.rounds += not problem

    async def _round(self) -> str:
        """One round: what is wrong, or nothing.

        Raises:
            RedisUnavailable, RedisRefused, TimeoutError: Redis did not answer as it should.
        """
        self._probe = asyncio.get_running_loop().create_future()
        self._expected = self._chance.hex(8).encode()
        names = [name for name in self._channels.open if self._is_due(name)]
        touch = self.rounds % self._limits.touch_rounds == 0
        heads = await self._broker.probe(self.channel, self._expected, names, touch=touch)
        await self._probe
        self._refused = set(self._broker.refused)
        if lost := self._refused & {self.channel, self._channels.default}:
            raise RedisRefused(f"Redis will not let us subscribe to {', '.join(sorted(lost))}")
        opened = self._channels.open
        missing = [
            name for name, head in heads.items() if self._is_due(name) and not opened[name].sequencer.check(head)
        ]
        if missing:
            return "stored events have not come over the subscription: " + ", ".join(missing[:5])
        if waiting := [name for name in opened if self._is_due(name) and not opened[name].sequencer.caught_up]:
            self.probe_now()
            return "not caught up yet: " + ", ".join(waiting[:5])
        return ""

    def _is_due(self, name: str) -> bool:
        """Whether a channel is open, and not just being opened because a client asks for it."""
        channel = self._channels.open.get(name)
        return (
            channel is not None
            and name not in self._refused
            and (name == self._channels.default or not channel.opening)
        )

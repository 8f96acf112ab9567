"""The delivery probe, once a second: only what it has proven is called ready, and sent heartbeats.

Sockets can be open, publishes succeed, and nothing be delivered: a frozen Redis, a subscription that was taken
away, a replica that has lost its master. So in every round the hub

1. writes to Redis, reads where each open channel stands, and publishes a probe on a channel of its own;
2. subscribes to every channel again, which changes nothing and must be confirmed, and pings;
3. waits for the probe. Redis keeps its order: whatever was published before has then arrived, too, so
   everything that stood in Redis must have been handed on. What was not is read from the log.

Events of a publisher that stores them in another database are heard all the same, as Pub/Sub knows no databases,
and given to nobody: so the channel of the probes names the hub's database, which publishers compare with theirs.

Some of the rounds also keep the open channels from being forgotten by Redis, however silent they are, and let it
drop ids that are no longer needed, which it does by the way: if very many expired at once, it would stop for them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from broadcaster.core.errors import SAYS, RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.subscription import HUB_CHANNELS
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.catchup.sequencer import ELSEWHERE
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.channels.channels import Channels
from broadcaster.settings import Settings, redis_database

log = logging.getLogger("broadcaster.hub")

READY: Final = "ready: events get through"
_WARNED_S: Final = 60.0


class DeliveryProbe:
    """Proves that events arrive: of the links to Redis, and of every open channel for itself (`Channel.judge`).

    Attributes:
        channel: Where the probes of this hub are published.
        proven: Whether the last probe came back, and nothing has happened since that would stop it. Without it no
            channel is sent heartbeats.
        rounds: How many rounds have found the hub ready.
    """

    def __init__(self, settings: Settings, broker: Broker, channels: Channels, runtime: Runtime = RUNTIME) -> None:
        """Prepare; nothing happens before `run`."""
        history = settings.history
        forgotten_s = history.position_expire_s
        self._interval_s = min(settings.hub.prove_interval_s, forgotten_s / 3)  # two rounds may fail
        self._touch_every_s = min(runtime.limits.touch_every_s, history.dedupe_s, forgotten_s / 3)
        self._touched_at = -math.inf
        self._timeout_s = settings.redis.silence_timeout_s
        self._broker = broker
        self._channels = channels
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._probe: asyncio.Future[None] | None = None
        self._expected = b""
        self._wake = asyncio.Event()
        self._suspected = False  # since the round began
        self._logged_healthy: bool | None = None
        self._began_at = math.inf
        self._log = ThrottledLog(log, clock=runtime.clock)
        self.channel = f"{HUB_CHANNELS}{redis_database(settings.redis.url)}.{runtime.chance.hex(8)}"
        self.proven = False
        self._problem = "Redis has not answered yet"
        self.rounds = 0
        broker.subscribe(self.channel)

    @property
    def healthy(self) -> bool:
        """Whether it is proven that the events of the default channel arrive: the readiness of the hub."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Why it is not healthy; empty if it is."""
        return self._problem or self._default.trouble

    @property
    def warning(self) -> str:
        """What an operator should look at although the hub is ready; empty if there is nothing."""
        unknown_at = self._default.sequencer.unknown_at
        return ELSEWHERE if self._clock.loop_s() - unknown_at < _WARNED_S else ""

    @property
    def _default(self) -> Channel:
        return self._channels.open[self._channels.default]

    def take(self, payloads: list[bytes]) -> None:
        """Take what came over the channel of this hub: it ends here."""
        if self._probe is not None and not self._probe.done() and self._expected in payloads:
            self._probe.set_result(None)

    def mark_suspect(self, problem: str) -> None:
        """Something has happened: nothing is proven until the next round, which begins now."""
        self.proven = False
        self._problem = problem
        self._suspected = True
        self._wake.set()

    def on_lost(self, channel: str) -> None:
        """A subscription is lost; if it is that of the probes, nothing can be proven."""
        if channel == self.channel:
            self.mark_suspect(f"the subscription to {channel} is lost")
        self._wake.set()

    def probe_now(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    async def run(self) -> None:
        """Probe, again and again, until cancelled.

        Raises:
            RedisRefused: Redis does not let the hub write or publish, or refuses it the default channel, and has
            done so from the beginning.
        """
        self._began_at = self._clock.loop_s()
        while True:
            self._wake.clear()
            self._suspected = False
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._round()
                self._conclude("")
            except (RedisUnavailable, TimeoutError) as error:
                self._conclude(str(error) or f"no proof within {self._timeout_s:g} s")
            except RedisRefused as error:
                if not self.rounds:
                    raise  # it has never worked: a person is there to read it
                self._conclude(str(error))  # rights and passwords change, and change back
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(self._limits.probe_pause_s)  # however often it is marked suspect, there is a pause

    def _conclude(self, problem: str) -> None:
        if problem or not self._suspected:
            self.proven, self._problem = not problem, problem
        if self.healthy != self._logged_healthy and (self.healthy or self._is_worth_a_line(problem)):
            level, state = (
                (logging.INFO, READY) if self.healthy else (logging.WARNING, f"not ready: {self.problem}")
            )
            if self._log.log(level, state, "%s", state):  # else in a later round, if it is still so
                self._logged_healthy = self.healthy
        self.rounds += self.healthy
        if not problem and not self._default.refusal and not self._default.sequencer.caught_up:
            self.probe_now()  # it will be caught up at any moment

    def _is_worth_a_line(self, problem: str) -> bool:
        """Whether it is no part of a start that the hub is not ready: Redis may begin at the same time."""
        begun = self._clock.loop_s() - self._began_at >= self._timeout_s
        return bool(self.rounds) or begun or problem.startswith(SAYS)

    async def _round(self) -> None:
        """One round.

        Raises:
            RedisUnavailable, RedisRefused, TimeoutError: Redis did not answer as it should.
        """
        self._probe = asyncio.get_running_loop().create_future()
        self._expected = self._chance.hex(8).encode()
        now = self._clock.loop_s()
        touch = now >= self._touched_at + self._touch_every_s
        before = {name: channel.sequencer.position for name, channel in self._channels.open.items()}
        held, connection = self.channel in self._broker.confirmed, self._broker.reconnects
        found = await self._broker.probe(self.channel, self._expected, list(before), touch=touch)
        self._touched_at = now if touch else self._touched_at
        within_s = self._broker.lag_max_s
        arrived, _ = await asyncio.wait([self._probe], timeout=within_s)
        if not arrived:
            why = f"what was published did not come within {within_s:g} s"
            if held and connection == self._broker.reconnects:  # else it was published before the subscription
                why = self._broker.distrust(why)
            raise RedisUnavailable(why)
        refused = self._broker.refused
        if self.channel in refused:
            raise RedisRefused(f"Redis will not let us subscribe to {self.channel}")
        for name, where in found.items():
            if (channel := self._channels.open.get(name)) is not None:
                channel.judge(where, before[name], may_subscribe=name not in refused)
        if isinstance(refusal := self._default.refusal, RedisRefused):
            raise refusal

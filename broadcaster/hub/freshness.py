"""The proof, once a second, that events get through: only while it succeeds is the hub ready, and does it beat.

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
import secrets
from typing import Final

from broadcaster import history
from broadcaster.bus import CommandLink, Subscription, server_info
from broadcaster.errors import RedisRefused, RedisUnavailable
from broadcaster.hub.channels import OWN, Channels
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")

_KEY_EXPIRE_S: Final = 60
_KEEP_ROUNDS: Final = 60


class Freshness:
    """Proves delivery.

    Attributes:
        channel: Where the probes of this hub are published.
        proven: Whether the last round has succeeded, and nothing has happened since that would make it fail.
        trouble: Why it has not; empty if it has.
        rounds: How many rounds have succeeded.
    """

    def __init__(self, settings: Settings, commands: CommandLink, channels: Channels) -> None:
        self._interval_s = settings.hub.prove_interval_s
        self._timeout_s = settings.redis.silence_timeout_s
        self._history = settings.history
        self._commands = commands
        self._channels = channels
        self._probe: asyncio.Future[None] | None = None
        self._expected = b""
        self._wake = asyncio.Event()
        self.channel = OWN + secrets.token_hex(8)
        self._refused: set[str] = set()
        self.proven = False
        self.trouble = "Redis has not answered yet"
        self.rounds = 0

    def take(self, payloads: list[bytes]) -> None:
        """Take what came over the channel of this hub: it ends here."""
        if self._probe is not None and not self._probe.done() and self._expected in payloads:
            self._probe.set_result(None)

    def doubt(self, trouble: str) -> None:
        """Something has happened: nothing is proven until the next round, which begins now."""
        self.proven = False
        self.trouble = trouble
        self._wake.set()

    def hurry(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    async def run(self, subscription: Subscription) -> None:
        """Prove, again and again, until cancelled.

        Raises:
            RedisRefused: Redis will not let us write, read or publish.
        """
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._timeout_s):
                    trouble = await self._round(subscription)
            except (RedisUnavailable, TimeoutError) as error:
                trouble = str(error) or f"no proof within {self._timeout_s:g} s"
            self._judge(trouble)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(0.01)  # however often it is doubted, there is a pause between two rounds

    def _judge(self, trouble: str) -> None:
        if self._wake.is_set() and not trouble and not self.proven:
            return  # doubted in the middle of the round
        if trouble and self.proven:
            log.warning("not ready: %s", trouble)
        elif not trouble and not self.proven:
            log.info("ready: events get through")
        self.proven, self.trouble = not trouble, trouble
        self.rounds += not trouble

    async def _round(self, subscription: Subscription) -> str:
        """One round: what is wrong, or nothing.

        Raises:
            RedisUnavailable, RedisRefused, TimeoutError: Redis did not answer as it should.
        """
        self._probe = asyncio.get_running_loop().create_future()
        self._expected = secrets.token_hex(8).encode()
        names = [name for name in self._channels.open if self._is_due(name)] if self._history.enabled else []
        _, info, *heads = await self._commands.execute(
            ("SET", self.channel, "", "EX", _KEY_EXPIRE_S),
            ("INFO", "server"),
            *(history.glance(name) for name in names),
            ("PUBLISH", self.channel, self._expected),
            *(history.keep(name, self._history) for name in names if self.rounds % _KEEP_ROUNDS == 0),
        )
        await subscription.prove()
        await self._probe
        self._refused = subscription.refused
        if lost := self._refused & {self.channel, self._channels.default}:
            raise RedisRefused(f"Redis will not let us subscribe to {', '.join(sorted(lost))}")
        run_id = server_info(info).get("run_id", "")
        missing = [
            name
            for name, head in zip(names, heads, strict=False)
            if self._is_due(name) and not self._channels.open[name].reader.check(history.read_glance(head, run_id))
        ]
        if missing:
            return "stored events have not come over the subscription: " + ", ".join(missing[:5])
        opened = self._channels.open.items()
        if waiting := [name for name, channel in opened if self._is_due(name) and not channel.reader.steady]:
            self.hurry()
            return "not caught up yet: " + ", ".join(waiting[:5])
        return ""

    def _is_due(self, name: str) -> bool:
        """Whether a channel is open, and not just being opened because somebody asks for it."""
        channel = self._channels.open.get(name)
        return (
            channel is not None
            and name not in self._refused
            and (name == self._channels.default or not channel.opening)
        )

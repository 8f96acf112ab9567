"""What can happen, one method per kind; all of them end by themselves."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.chaos.truth import Life
from tests.simulation.troubles import EVERY_CHANNEL
from tests.simulation.worlds import Fault
from tests.support import Proxy

if TYPE_CHECKING:
    from tests.chaos.run import Chaos

_LINKS: Final = ("cut", "half_open", "black_hole", "one_way", "throttle", "refuse", "delay", "split")

_NOTICED_S: Final = 6.0
"""Seconds after which the end of a half-open connection that was not told is sure to have noticed."""


class Faults:
    """Lets the faults of a world happen, and notes in `troubles` to whom."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos

    def happen(self, fault: Fault) -> None:
        """Let a fault begin; what it does ends after `lasts_s`."""
        now = time.monotonic()
        method: Callable[[Fault], None] = getattr(self, fault.kind)
        lasts_s = max(fault.lasts_s, _NOTICED_S) if fault.kind == "half_open" else fault.lasts_s
        for names in self._parts(fault):
            self._chaos.troubles.note(fault.kind, names, now, now + lasts_s)
        self._chaos.counts[f"fault {fault.kind}"] += 1
        method(fault)

    def _parts(self, fault: Fault) -> list[tuple[str, ...]]:
        """The processes and links that a fault is done to."""
        if fault.kind in _LINKS:
            return [(fault.target, self._peer(fault))]
        if fault.kind == "hub_cut_off":
            return [(fault.target, "redis")]
        if fault.kind.startswith("client"):
            return [(fault.target,), *((fault.target, hub) for hub in self._chaos.hubs)]
        if fault.kind == "redis_deny":
            return [("redis",), ("redis", EVERY_CHANNEL)]
        return [(fault.target if fault.kind.startswith(("hub", "producer")) else "redis",)]

    def _later(self, fault: Fault, work: Callable[[], object]) -> None:
        self._chaos.later(fault.lasts_s, work)

    # Redis

    def redis_restart(self, fault: Fault) -> None:
        """Killed, and back with all of its memory."""
        self._restart(fault, lambda last: last, continues=True)

    def redis_restart_older(self, fault: Fault) -> None:
        """Back with an earlier memory, any there was."""
        snapshots = self._chaos.truth.snapshots
        chosen = snapshots[min(int((1 - fault.size**2) * len(snapshots)), len(snapshots) - 1)]
        self._restart(fault, lambda last: chosen)

    def redis_restart_empty(self, fault: Fault) -> None:
        """Back without memory."""
        self._restart(fault, lambda last: None)

    def redis_fail_over(self, fault: Fault) -> None:
        """A replica that lags is promoted; the master is dead."""
        snapshots = self._chaos.truth.snapshots
        chosen = snapshots[-1 - int(fault.size * min(3, len(snapshots) - 1))]
        self._restart(fault, lambda last: chosen)

    def _restart(
        self,
        fault: Fault,
        memory: Callable[[tuple[Path, int]], tuple[Path, int] | None],
        *,
        continues: bool = False,
    ) -> None:
        truth = self._chaos.truth
        if truth.life is None:
            return
        self._end_older()
        self._chaos.send_connections_to(None)
        chosen = memory(truth.kill())
        life = truth.begin(chosen, continues=continues)
        if not continues:
            truth.lose(life)
        self._chaos.spawn(self._come_back(fault.lasts_s, life))

    async def _come_back(self, down_s: float, life: Life) -> None:
        trouble = self._chaos.troubles.note("is down", ["redis"], time.monotonic())
        await asyncio.sleep(down_s)
        await self._chaos.start_redis(life)
        trouble.end = time.monotonic()

    def redis_split(self, fault: Fault) -> None:
        """A replica is promoted, and the master goes on serving who is connected to it, until it is gone."""
        if self._chaos.truth.life is not None:
            self._chaos.spawn(self._split(fault))

    async def _split(self, fault: Fault) -> None:
        truth = self._chaos.truth
        truth.pump()
        older = truth.life
        assert older is not None
        lags = truth.snapshots and fault.size < 0.7
        life = truth.begin(truth.snapshots[-1] if lags else (older.folder, older.read))
        trouble = self._chaos.troubles.note("redis_split", ["redis"], time.monotonic())
        await asyncio.to_thread(life.start)
        if truth.life is not older:  # it was killed meanwhile
            await asyncio.to_thread(life.end)
            trouble.end = time.monotonic()
            return
        truth.pump()
        self._end_older()
        truth.older.append(older)
        truth.life = life
        truth.lose(life, older.run_id)
        self._chaos.send_connections_to(life)
        await asyncio.sleep(fault.lasts_s)
        if older in truth.older:
            self._end_older()
        trouble.end = time.monotonic()

    def _end_older(self) -> None:
        """The replaced processes are gone."""
        truth = self._chaos.truth
        truth.pump()
        for life in truth.older:
            life.end()
            life.pump()
        truth.older.clear()
        self._chaos.watch_contacts()

    def redis_flush(self, fault: Fault) -> None:
        """Its memory is emptied in the same process."""
        if (life := self._running()) is not None:
            life.ask("FLUSHALL")
            self._chaos.truth.pump()
            self._chaos.expect_notice()

    def redis_evict(self, fault: Fault) -> None:
        """A key goes for want of memory."""
        if (life := self._running()) is None:
            return
        self._chaos.truth.pump()
        if keys := sorted(life.memory.values):
            key = keys[int(fault.size * 1e6) % len(keys)]
            life.evicted.add(key)
            life.ask("UNLINK", key)
            self._chaos.truth.pump()
            life.evicted.discard(key)

    def redis_freeze(self, fault: Fault) -> None:
        if (life := self._chaos.truth.life) is not None:
            life.frozen += 1
            life.server.freeze()
            self._later(fault, lambda: self._thaw(life))

    def _thaw(self, life: Life) -> None:
        life.frozen -= 1
        if not life.frozen and life.alive:
            life.server.thaw()

    def redis_oom(self, fault: Fault) -> None:
        if (life := self._running()) is not None:
            life.ask("CONFIG", "SET", "maxmemory", "1")
            self._later(fault, lambda: self._ask(life, "CONFIG", "SET", "maxmemory", "0"))

    def redis_deny(self, fault: Fault) -> None:
        """A right is missing."""
        if (life := self._running()) is not None:
            names = "xadd", "publish", "evalsha", "subscribe", "set", "xrange", "time", "info"
            name = names[int(fault.size * len(names))]
            life.ask("ACL", "SETUSER", "default", f"-{name}")
            self._later(fault, lambda: self._ask(life, "ACL", "SETUSER", "default", f"+{name}"))

    def _ask(self, life: Life, *words: str) -> None:
        """Tell it something, later if it is frozen now."""
        if life.frozen:
            self._chaos.later(0.1, lambda: self._ask(life, *words))
        elif life.alive:
            life.ask(*words)

    def _running(self) -> Life | None:
        life = self._chaos.truth.life
        return None if life is None or life.frozen else life

    # Hubs

    def hub_kill(self, fault: Fault) -> None:
        self._chaos.hubs[fault.target].kill(fault.lasts_s)

    def hub_drain(self, fault: Fault) -> None:
        """SIGTERM, and back."""
        hub = self._chaos.hubs[fault.target]
        if hub.alive:
            hub.send(signal.SIGTERM)

    def hub_freeze(self, fault: Fault) -> None:
        hub = self._chaos.hubs[fault.target]
        hub.stop()
        self._later(fault, hub.resume)

    def hub_cut_off(self, fault: Fault) -> None:
        """From Redis: black hole, both ways."""
        self._block(fault, self._chaos.proxy(fault.target, "redis"), requests=True, answers=True)

    # Links

    def _peer(self, fault: Fault) -> str:
        if fault.target.startswith(("hub", "producer")):
            return "redis"
        hubs = list(self._chaos.hubs)
        return hubs[int(fault.size * 1e6) % len(hubs)]

    def _proxy(self, fault: Fault) -> Proxy:
        return self._chaos.proxy(fault.target, self._peer(fault))

    def cut(self, fault: Fault) -> None:
        self._proxy(fault).cut()

    def client_cut(self, fault: Fault) -> None:
        for hub in self._chaos.hubs:
            self._chaos.proxy(fault.target, hub).cut()

    def half_open(self, fault: Fault) -> None:
        self._proxy(fault).half_open(at_client=fault.size < 0.5)

    def black_hole(self, fault: Fault) -> None:
        self._block(fault, self._proxy(fault), requests=True, answers=True)

    def one_way(self, fault: Fault) -> None:
        self._block(fault, self._proxy(fault), requests=fault.size < 0.5, answers=fault.size >= 0.5)

    def _block(self, fault: Fault, proxy: Proxy, *, requests: bool, answers: bool) -> None:
        ways = [proxy.requests] * requests + [proxy.answers] * answers
        proxy.change(*ways, blocked=True)
        self._later(fault, lambda: proxy.change(*ways, blocked=False))

    def throttle(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.change(proxy.answers, bytes_per_s=2_000 + fault.size * 200_000)
        self._later(fault, lambda: proxy.change(proxy.answers, bytes_per_s=math.inf))

    def refuse(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.refuses = True
        self._later(fault, lambda: setattr(proxy, "refuses", False))

    def delay(self, fault: Fault) -> None:
        proxy = self._proxy(fault)
        proxy.change(proxy.answers, delay_s=fault.size)
        self._later(fault, lambda: proxy.change(proxy.answers, delay_s=0.0))

    def split(self, fault: Fault) -> None:
        """What is said arrives in small pieces, both ways."""
        proxy = self._proxy(fault)
        proxy.change(proxy.requests, proxy.answers, split=1 + int(fault.size * 500))
        self._later(fault, lambda: proxy.change(proxy.requests, proxy.answers, split=0))

    # Clients

    def client_sleep(self, fault: Fault) -> None:
        """Stopped (SIGSTOP), or asleep without its connection."""
        client = self._chaos.clients.get(fault.target)
        if client is not None:
            client.stop()
            self._later(fault, client.resume)
            if fault.size < 0.5:
                self.client_cut(fault)

    def client_kill(self, fault: Fault) -> None:
        client = self._chaos.clients.get(fault.target)
        if client is not None:
            client.kill(fault.lasts_s)

    def producer_kill(self, fault: Fault) -> None:
        self._chaos.producers[fault.target].kill(fault.lasts_s)

    def producer_freeze(self, fault: Fault) -> None:
        producer = self._chaos.producers[fault.target]
        producer.stop()
        self._later(fault, producer.resume)

"""What can happen, one method per kind; all of them end by themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from tests.simulation.journal import Loss
from tests.simulation.memory import COMMANDS, Memory, run
from tests.simulation.process import Process
from tests.simulation.redis import Replica, heads_of
from tests.simulation.troubles import EVERY_CHANNEL
from tests.simulation.worlds import Fault

if TYPE_CHECKING:
    from tests.simulation.run import Simulation


_LINKS: Final = ("cut", "half_open", "black_hole", "one_way", "throttle", "refuse", "delay")

_NOTICED_S: Final = 6.0
"""Seconds after which the end of a half-open connection that was not told is sure to have noticed."""


_FOREIGN_EPOCH: Final = "Tvvvvvvvvvffffff"
"""Later than all of ours."""


def _foreign(channel: str) -> bytes:
    """An event of another deployment."""
    place = {"channel": channel, "epoch": _FOREIGN_EPOCH, "offset": 1}
    event = {"event_id": "00000000-0000-4000-8000-00000000f0f0", "event_type": "SERVER_DOWN", "source": "foreign"}
    return json.dumps(place | event | {"sequence": 1, "published_at_ms": 1}, separators=(",", ":")).encode()


def _foreign_memory(channels: Sequence[str]) -> Memory:
    """Of another deployment that has the same channels, with an event on each."""
    memory = Memory()
    for channel in channels:
        meta, log = f"{{{channel}}}:meta".encode(), f"{{{channel}}}:log".encode()
        epoch = _FOREIGN_EPOCH.encode()
        memory.values[meta] = {b"epoch": epoch, b"offset": b"1", b"run_id": b"f" * 40, b"epochs": epoch + b":1"}
        run(memory, COMMANDS[b"XADD"], b"XADD", [log, b"1-0", b"e", _foreign(channel)])
    return memory


class Faults:
    """Lets the faults of a world happen, and notes in the simulation's `troubles` to whom."""

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation

    def happen(self, fault: Fault) -> None:
        """Let a fault begin; what it does ends after `lasts_s`."""
        now = self._sim.loop.now
        method: Callable[[Fault], None] = getattr(self, fault.kind)
        lasts_s = max(fault.lasts_s, _NOTICED_S) if fault.kind == "half_open" else fault.lasts_s
        for names in self._parts(fault):
            self._sim.troubles.note(fault.kind, names, now, now + lasts_s)
        self._sim.counts[f"fault {fault.kind}"] += 1
        method(fault)

    def _parts(self, fault: Fault) -> list[tuple[str, ...]]:
        """The processes and links that a fault is done to."""
        if fault.kind in _LINKS:
            return [(fault.target, self._peer(fault))]
        if fault.kind == "hub_cut_off":
            return [(fault.target, "redis")]
        if fault.kind.startswith("client"):
            return [(fault.target,), *((fault.target, hub) for hub in self._sim.hubs)]
        if fault.kind == "redis_deny":
            denied = self._denied(fault)
            return [("redis",), ("redis", denied if denied in self._sim.world.channels else EVERY_CHANNEL)]
        return [(fault.target if fault.kind.startswith(("hub", "producer")) else "redis",)]

    def _denied(self, fault: Fault) -> str:
        """The command, or the channel, to which there is no right."""
        commands = "XADD", "PUBLISH", "EVALSHA", "SUBSCRIBE", "SET", "XRANGE", "TIME", "INFO"
        channels = self._sim.world.channels
        names = [*commands, *channels, *(4 * channels[1:])]
        return names[int(fault.size * len(names))]

    def _later(self, fault: Fault, work: Callable[[], object]) -> None:
        def end() -> None:
            work()
            self._sim.watch_contacts()

        self._sim.loop.call_outside(self._sim.loop.now + fault.lasts_s, end)

    def _lose(self, memory: Memory, left: str = "") -> None:
        """Redis has another memory from now on; a master that is `left` goes on with the one before."""
        self._sim.journal.losses.append(Loss(self._sim.loop.now, heads_of(memory), left=left))

    # Redis

    def redis_restart(self, fault: Fault) -> None:
        """Killed, and back with all of its memory."""
        self._restart(fault, lambda: None)

    def redis_restart_older(self, fault: Fault) -> None:
        """Back with an earlier memory, any there was."""
        snapshots = self._sim.redis.snapshots
        if snapshots:
            _, memory = snapshots[min(int((1 - fault.size**2) * len(snapshots)), len(snapshots) - 1)]
            self._restart(fault, lambda: memory)

    def redis_restart_empty(self, fault: Fault) -> None:
        """Back without memory."""
        self._restart(fault, Memory)

    def _restart(self, fault: Fault, other: Callable[[], Memory | None]) -> None:
        redis = self._sim.redis
        if redis.server is None:
            return
        redis.end_older()
        memory = redis.kill()
        changed = other()
        if changed is not None:
            self._lose(changed)
        self._later(fault, lambda: redis.start(memory if changed is None else changed))

    def redis_set_back(self, fault: Fault) -> None:
        """An earlier memory in the same process."""
        redis = self._sim.redis
        if redis.server is not None and redis.snapshots:
            _, memory = redis.snapshots[int(fault.size * len(redis.snapshots))]
            copy = memory.copy()
            copy.node_entries = redis.server.memory.node_entries
            redis.set_back(copy)
            self._lose(copy)
            self._sim.expect_notice()

    def redis_evict(self, fault: Fault) -> None:
        """A key goes for want of memory."""
        redis = self._sim.redis
        if redis.server is not None and (keys := list(redis.server.memory.values)):
            ours = [key for key in keys if key.endswith((b":log", b":meta"))] if fault.size < 0.7 else keys
            if ours:
                redis.server.evict(ours[int(fault.size * 1e6) % len(ours)])

    def redis_fail_over(self, fault: Fault) -> None:
        """A replica that lags is promoted; the master is dead."""
        redis = self._sim.redis
        if redis.server is not None and redis.snapshots:
            lagging = redis.snapshots[-1 - int(fault.size * min(3, len(redis.snapshots) - 1))][1]
            self._restart(fault, lambda: lagging)

    def redis_split(self, fault: Fault) -> None:
        """A replica is promoted, and the master goes on serving who is connected to it, until it is gone."""
        redis = self._sim.redis
        if redis.server is not None:
            lagging = redis.snapshots[-1][1] if redis.snapshots and fault.size < 0.7 else redis.server.memory
            left = self._depose(fault)
            redis.start(lagging)
            self._lose(lagging, left)

    def _depose(self, fault: Fault) -> str:
        """The master keeps its connections, and is gone some time later; its run_id."""
        redis = self._sim.redis
        redis.depose()
        older = redis.older[-1]
        self._later(fault, older.process.kill)
        self._later(fault, lambda: redis.older.remove(older) if older in redis.older else None)
        return older.run_id

    def redis_promote(self, fault: Fault) -> None:
        """A replica to which hubs subscribe is promoted; the master is dead, or goes on as in a split."""
        redis = self._sim.redis
        replica = self._replica(fault)
        if redis.server is None or replica is None or not replica.is_fed:
            return
        if fault.size < 0.5:
            left = self._depose(fault)
            redis.promote(replica)
            assert redis.server is not None
            self._lose(redis.server.memory, left)
        else:
            redis.end_older()
            redis.kill()
            self._lose(replica.server.memory)
            self._later(fault, lambda: self._promote(replica))

    def _promote(self, replica: Replica) -> None:
        """Have a master again; the replica itself may have died meanwhile."""
        redis = self._sim.redis
        if redis.server is None:
            if replica in redis.replicas:
                redis.promote(replica)
            else:
                redis.start(replica.server.memory)

    def clock_step(self, fault: Fault) -> None:
        """The wall clock of Redis' host jumps by up to an hour, back or forth; and back again some other time."""
        self._sim.redis.step_clock((fault.size - 0.5) * 7200 if fault.size < 0.8 else 0.0)

    def redis_freeze(self, fault: Fault) -> None:
        if (server := self._sim.redis.server) is not None:
            self._freeze(fault, server.process)

    def _freeze(self, fault: Fault, process: Process) -> None:
        process.stop()
        self._later(fault, process.resume)

    def redis_slow(self, fault: Fault) -> None:
        """Each of its next turns takes long."""
        loop, server = self._sim.loop, self._sim.redis.server
        if server is not None:
            for number in range(int(fault.lasts_s / 0.1)):
                loop.call_outside(loop.now + number * 0.1, server.process.pause, 0.09 * fault.size)

    def redis_oom(self, fault: Fault) -> None:
        """Its memory is full, or nearly so."""
        if (server := self._sim.redis.server) is not None:
            server.out_of_memory = self._sim.world.oom_share
            self._later(fault, lambda: setattr(server, "out_of_memory", 0.0))

    def redis_deny(self, fault: Fault) -> None:
        """A right is missing."""
        if (server := self._sim.redis.server) is not None:
            name = self._denied(fault).encode()
            server.denied.add(name)
            self._later(fault, lambda: server.denied.discard(name))

    def _replica(self, fault: Fault) -> Replica | None:
        """One of the replicas, if there are any."""
        replicas = self._sim.redis.replicas
        return replicas[int(fault.size * 1e6) % len(replicas)] if replicas else None

    def _follow_again(self, fault: Fault, replica: Replica) -> None:
        """When the fault ends, if it is still a replica."""

        def follow() -> None:
            redis = self._sim.redis
            if replica in redis.replicas and redis.server is not None:
                replica.follow(redis.server)

        self._later(fault, follow)

    def replica_freeze(self, fault: Fault) -> None:
        if (replica := self._replica(fault)) is not None:
            self._freeze(fault, replica.server.process)

    def replica_lag(self, fault: Fault) -> None:
        if (replica := self._replica(fault)) is not None:
            replica.longest_lag_s = fault.size * 3
            self._later(fault, lambda: setattr(replica, "longest_lag_s", self._sim.redis.replica_lag_s))

    def replica_kill(self, fault: Fault) -> None:
        """Killed, and back with the memory of its master."""
        redis = self._sim.redis
        if (replica := self._replica(fault)) is not None:
            replica.leave()
            replica.server.process.kill()
            redis.replicas.remove(replica)

            self._later(fault, lambda: redis.start_replica(replica.port))

    def replica_detach(self, fault: Fault) -> None:
        """Nothing comes to it any more; it says so, or does not."""
        if (replica := self._replica(fault)) is not None:
            if fault.size < 0.5:
                replica.leave()
            else:
                replica.stalled = True
            self._follow_again(fault, replica)

    def replica_stray(self, fault: Fault) -> None:
        """It follows another master, of which events come that are none of ours; or it is promoted."""
        replica = self._replica(fault)
        if replica is None or not replica.is_fed:  # one that is about to be promoted stays what it is
            return
        replica.leave()
        server = replica.server
        server.replid, server.linked, server.master = "f" * 40, True, fault.size < 0.3
        if not server.master:
            server.set_back(_foreign_memory(self._sim.world.channels))
        for channel in self._sim.world.channels if not server.master else ():
            self._later_at(fault.lasts_s / 2, server.announce, channel.encode(), _foreign(channel))
        self._follow_again(fault, replica)

    def _later_at(self, after_s: float, work: Callable[..., object], *words: bytes) -> None:
        self._sim.loop.call_outside(self._sim.loop.now + after_s, work, *words)

    # Hubs

    def hub_kill(self, fault: Fault) -> None:
        self._sim.hubs[fault.target].kill(fault.lasts_s)

    def hub_drain(self, fault: Fault) -> None:
        self._sim.hubs[fault.target].drain()

    def hub_freeze(self, fault: Fault) -> None:
        self._freeze(fault, self._sim.hubs[fault.target].process)

    def hub_cut_off(self, fault: Fault) -> None:
        """From Redis: black hole, both ways."""
        self._block(fault, fault.target, "redis", both=True)

    # Links

    def _peer(self, fault: Fault) -> str:
        if fault.target.startswith(("hub", "producer")):
            return "redis"
        hubs = list(self._sim.hubs)
        return hubs[int(fault.size * 1e6) % len(hubs)]

    def cut(self, fault: Fault) -> None:
        self._sim.network.cut(fault.target, self._peer(fault))

    def client_cut(self, fault: Fault) -> None:
        for hub in self._sim.hubs:
            self._sim.network.cut(fault.target, hub)

    def half_open(self, fault: Fault) -> None:
        one, other = fault.target, self._peer(fault)
        if fault.size < 0.5:
            one, other = other, one
        self._sim.network.half_open(one, other)

    def black_hole(self, fault: Fault) -> None:
        self._block(fault, fault.target, self._peer(fault), both=True)

    def one_way(self, fault: Fault) -> None:
        one, other = fault.target, self._peer(fault)
        if fault.size < 0.5:
            one, other = other, one
        self._block(fault, one, other, both=False)

    def _block(self, fault: Fault, one: str, other: str, *, both: bool) -> None:
        network = self._sim.network
        links = [network.link(one, other), *([network.link(other, one)] if both else [])]
        for link in links:
            link.blocked = True

        def heal() -> None:
            for link in links:
                link.blocked = False
            network.pump()

        self._later(fault, heal)

    def throttle(self, fault: Fault) -> None:
        sender, network = self._peer(fault), self._sim.network
        link = network.link(sender, fault.target)
        link.bytes_per_s = 200 + fault.size * 20_000

        def heal() -> None:
            link.bytes_per_s = math.inf
            network.hurry(sender, fault.target)

        self._later(fault, heal)

    def refuse(self, fault: Fault) -> None:
        link = self._sim.network.link(fault.target, self._peer(fault))
        link.refuses = True
        self._later(fault, lambda: setattr(link, "refuses", False))

    def delay(self, fault: Fault) -> None:
        link = self._sim.network.link(self._peer(fault), fault.target)
        link.delay_s = (0.0, fault.size)
        self._later(fault, lambda: setattr(link, "delay_s", self._sim.world.delays_s))

    # Clients

    def client_sleep(self, fault: Fault) -> None:
        """Stopped (SIGSTOP), or asleep without its connection."""
        client = self._sim.clients.get(fault.target)
        if client is not None:
            client.process.pause(fault.lasts_s)
            if fault.size < 0.5:
                self.client_cut(fault)

    def client_kill(self, fault: Fault) -> None:
        client = self._sim.clients.get(fault.target)
        if client is not None:
            client.kill(fault.lasts_s)

    def producer_kill(self, fault: Fault) -> None:
        self._sim.producers[fault.target].kill(fault.lasts_s)

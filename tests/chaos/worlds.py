"""Draws the world of a seed: limits, actors, and a script of faults. Nothing here runs anything."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from tests.simulation.worlds import DEFAULT_CHANNEL, TYPES, Client, Fault, Producer

FIRST_HUB: Final = 1
"""Hubs are known by numbers; each has another port in each run."""

SIZES: Final = (0, 200, 4_000, 30_000)
"""Bytes that an event has for nothing."""


@dataclass(frozen=True)
class World:
    """Everything that is drawn before a seed begins.

    Attributes:
        seed: Of it.
        profile: The name of its kinds of fault.
        lasts_s: Seconds until the last fault has begun, or longer.
        channels: Of all actors.
        hubs: Their numbers.
        producers: Of events.
        clients: Of hubs.
        faults: In their order.
        tables: Settings of all processes.
        hub_max_bytes: The largest event that the hubs deliver.
    """

    seed: int
    profile: str
    lasts_s: float
    channels: tuple[str, ...]
    hubs: tuple[int, ...]
    producers: tuple[Producer, ...]
    clients: tuple[Client, ...]
    faults: tuple[Fault, ...]
    tables: dict[str, dict[str, Any]]
    hub_max_bytes: int

    @property
    def calm_from_s(self) -> float:
        """From when on nothing happens any more, in seconds from the start."""
        return max([self.lasts_s, *(fault.at + fault.lasts_s for fault in self.faults)])

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed} ({self.profile}), {self.lasts_s:.1f} s, channels {', '.join(self.channels)}, "
            f"{len(self.hubs)} hubs, which deliver {self.hub_max_bytes} bytes",
            *(f"  {name}: {table}" for name, table in self.tables.items()),
            *(f"  {producer}" for producer in self.producers),
            *(f"  {client}" for client in self.clients),
            *(f"  {fault}" for fault in self.faults),
        ]
        return "\n".join(lines)


_REDIS: Final = (
    *("redis_restart", "redis_restart_older", "redis_restart_empty", "redis_fail_over", "redis_split"),
    *("redis_flush", "redis_evict", "redis_freeze", "redis_oom", "redis_deny"),
)
_HUBS: Final = ("hub_kill", "hub_drain", "hub_freeze", "hub_cut_off")
_LINKS: Final = ("cut", "half_open", "black_hole", "one_way", "throttle", "refuse", "delay", "split")
_CLIENTS: Final = ("client_sleep", "client_kill", "client_cut", "producer_kill", "producer_freeze")

KINDS: Final = (*_REDIS, *_HUBS, *_LINKS, *_CLIENTS)

PROFILES: Final[dict[str, tuple[tuple[str, ...], tuple[int, int]]]] = {
    "calm": ((), (0, 0)),
    "restarts": (("redis_restart", "redis_restart_older"), (3, 8)),
    "old memory": (("redis_restart_older", "redis_restart_empty", "redis_flush", "redis_evict"), (2, 6)),
    "failover": (("redis_fail_over", "redis_split"), (1, 4)),
    "troubled redis": (("redis_freeze", "redis_oom", "redis_deny", "redis_restart"), (2, 6)),
    "hubs": (_HUBS, (2, 8)),
    "network": (_LINKS, (4, 12)),
    "clients": (_CLIENTS, (3, 10)),
    "everything": (KINDS, (3, 12)),
    "everything twice": (KINDS, (8, 20)),
}


def draw(seed: int) -> World:
    """The world of a seed."""
    chance = random.Random(f"{seed}/chaos")
    profile = chance.choice(list(PROFILES))
    lasts_s = chance.uniform(3, 8)
    channels = (DEFAULT_CHANNEL, "events.a", "events.b")[: chance.choice((1, 1, 2, 3))]
    hubs = tuple(range(FIRST_HUB, FIRST_HUB + chance.choice((1, 1, 2, 3))))
    producers = tuple(_producer(chance, index, channels, lasts_s) for index in range(chance.choice((1, 1, 2))))
    clients = tuple(_client(chance, index, channels, lasts_s) for index in range(chance.randint(2, 5)))
    return World(
        seed=seed,
        profile=profile,
        lasts_s=lasts_s,
        channels=channels,
        hubs=hubs,
        producers=producers,
        clients=clients,
        faults=_faults(chance, profile, lasts_s, hubs, producers, clients),
        tables=_tables(chance, channels),
        hub_max_bytes=600 if chance.random() < 0.1 else 65_536,
    )


def _tables(chance: random.Random, channels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    ping_s = chance.uniform(0.1, 0.5)
    return {
        "event": {"channel": channels[0]},
        "history": {
            "max_events": chance.choice((4, 20, 60, 200, 10_000)),
            "idle_expire_s": chance.choice((2, 10, 3600, 86_400)),
            "dedupe_s": chance.choice((20, 60)),
        },
        "redis": {
            "connect_timeout_s": round(chance.uniform(0.5, 1.5), 2),
            "ping_interval_s": round(ping_s, 2),
            "silence_timeout_s": round(ping_s + chance.uniform(0.5, 1.0), 2),
            "reconnect_max_s": round(chance.uniform(0.1, 0.5), 2),
        },
        "hub": {
            "ring_bytes": chance.choice((2**18, 2**24)),
            "beat_interval_s": chance.choice((0.3, 0.5)),
            "prove_interval_s": round(chance.uniform(0.2, 0.6), 2),
            "ping_interval_s": round(chance.uniform(1, 4), 2),
            "behind_max_ms": chance.choice((1000, 5000)),
            "behind_max_bytes": chance.choice((2**17, 2**24)),
            "drain_s": chance.choice((0.0, 0.3, 1.0)),
            "shutdown_s": 0.5,
        },
        "channels": {
            "linger_s": chance.choice((0.5, 5.0, 60.0)),
            "drop_oldest": ["events.*"] if chance.random() < 0.2 else [],
        },
        "publisher": {"publish_deadline_s": round(chance.uniform(3, 12), 1)},
        "subscriber": {
            "connect_timeout_s": round(chance.uniform(0.5, 1.5), 2),
            "reconnect_max_s": round(chance.uniform(0.2, 0.6), 2),
            "queue_events": chance.choice((4, 64, 4096)),
        },
    }


def _producer(chance: random.Random, index: int, channels: tuple[str, ...], lasts_s: float) -> Producer:
    most = chance.choice((1, 1, 4, 30))
    some = channels if chance.random() < 0.6 else (chance.choice(channels),)
    return Producer(f"producer-{index}", some, lasts_s / chance.uniform(30, 200) * (1 + most) / 2, most)


def _client(chance: random.Random, index: int, channels: tuple[str, ...], lasts_s: float) -> Client:
    kind = chance.choice(("v1", "v1", "plain", "Subscriber", "Subscriber"))
    late = index > 1 and chance.random() < 0.5
    return Client(
        name=f"client-{index}",
        kind=kind,
        channels=channels if chance.random() < 0.4 else (chance.choice(channels),),
        since=chance.choice(("now", "old", "old", "older", "foreign", "huge")) if late else "now",
        wanted=chance.choice(TYPES) if chance.random() < 0.2 else None,
        begins_at=chance.uniform(lasts_s / 4, lasts_s) if late else chance.uniform(0, 0.5),
        polls_s=chance.choice((0.02, 0.3)) if kind == "Subscriber" and chance.random() < 0.5 else 0.0,
        naps_s=chance.choice((0.5, 3.0)) if chance.random() < 0.2 else 0.0,
    )


def _faults(
    chance: random.Random,
    profile: str,
    lasts_s: float,
    hubs: tuple[int, ...],
    producers: tuple[Producer, ...],
    clients: tuple[Client, ...],
) -> tuple[Fault, ...]:
    kinds, (least, most) = PROFILES[profile]
    targets = {
        "hub": [f"hub-{number}" for number in hubs],
        "client": [client.name for client in clients],
        "producer": [producer.name for producer in producers],
    }
    faults = []
    for _ in range(chance.randint(least, most)):
        kind = chance.choice(kinds)
        pool = targets.get(kind.split("_")[0], [name for names in targets.values() for name in names])
        at = chance.uniform(0.5, lasts_s)
        longest_s = min(chance.choice((0.1, 0.5, 1.5, 5.0)), lasts_s - at + 1)
        faults.append(Fault(at, kind, chance.uniform(0.01, longest_s), chance.choice(pool), chance.random()))
    return tuple(sorted(faults, key=lambda fault: fault.at))

"""Draws the world of a seed: limits, actors, and a script of faults. Nothing here runs anything."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Final

DEFAULT_CHANNEL: Final = "events.critical"
TYPES: Final = ("SERVER_DOWN", "SERVER_SLOW")
FIRST_HUB_PORT: Final = 8001
BALANCER_PORT: Final = 8000
"""Where a `Subscriber` is led to any of the hubs."""

_SLOW_LINK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens.

    Attributes:
        at: When, in seconds from the start.
        kind: A method of `Faults`.
        lasts_s: How long, or until the victim is started again.
        target: A process, where it has one.
        size: Between 0 and 1; each kind has its own meaning for it.
    """

    at: float
    kind: str
    lasts_s: float
    target: str = ""
    size: float = 0.0

    def __str__(self) -> str:
        return f"{self.at:7.3f} s  {self.kind} {self.target} for {self.lasts_s:.3f} s, size {self.size:.3f}"


@dataclass(frozen=True, slots=True)
class Client:
    """A subscriber.

    Attributes:
        name: Of its process.
        kind: `v1`, `plain` or `Subscriber`.
        channels: What it asks for.
        since: `now`, or what it comes with: `old`, `older`, `foreign`, `huge`, or a `time`.
        wanted: A type, or None for everything.
        begins_at: When, in seconds from the start.
        polls_s: A `Subscriber` whose `receive` is given up after so many seconds each time; 0: awaited.
        naps_s: The longest time for which it does not read; 0: it always reads.
    """

    name: str
    kind: str
    channels: tuple[str, ...]
    since: str
    wanted: str | None
    begins_at: float
    polls_s: float
    naps_s: float


@dataclass(frozen=True, slots=True)
class Producer:
    """A publisher: on which channels, how often, how many events at a time; over HTTP where there are tokens.

    Attributes:
        waits: Whether it publishes again only when it has been answered.
    """

    name: str
    channels: tuple[str, ...]
    every_s: float
    most: int
    uses_http: bool = False
    waits: bool = True


@dataclass(frozen=True)
class World:
    """Everything that is drawn before a seed begins; faults may be left out when it is shrunk."""

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
    ring_bytes: int
    windows: tuple[int, int]
    limits: dict[str, Any]
    node_entries: int
    output_limit: int
    token: str
    balanced: bool
    replica_lag_s: float | None
    replicas: int
    delays_s: tuple[float, float]
    splits: bool
    pauses: tuple[int, float] | None
    oom_share: float = 1.0

    @property
    def calm_from_s(self) -> float:
        """From when on nothing happens any more, in seconds from the start."""
        return max([self.lasts_s, *(fault.at + fault.lasts_s for fault in self.faults)])


PROFILES: Final[dict[str, tuple[tuple[str, ...], tuple[int, int]]]] = {
    "calm": ((), (0, 0)),
    "restarts": (("redis_restart",), (12, 30)),
    "old memory": (("redis_restart_older", "redis_set_back", "redis_restart_empty"), (3, 15)),
    "eviction": (("redis_evict", "redis_restart"), (4, 15)),
    "many epochs": (
        ("redis_restart", "redis_restart", "redis_restart", "client_sleep", "hub_cut_off"),
        (140, 190),
    ),
    "failover": (
        (
            "redis_fail_over",
            "redis_split",
            "redis_promote",
            "redis_restart_older",
            "cut",
            "producer_kill",
            "hub_kill",
        ),
        (3, 12),
    ),
    "clock": (("clock_step", "redis_restart", "redis_restart_older"), (4, 15)),
    "troubled redis": (
        ("redis_freeze", "replica_freeze", "replica_lag", "redis_slow", "redis_oom", "redis_deny"),
        (3, 12),
    ),
    "hubs": (("hub_kill", "hub_drain", "hub_freeze", "hub_cut_off"), (3, 15)),
    "network": (("cut", "half_open", "black_hole", "one_way", "throttle", "refuse", "delay"), (6, 25)),
    "clients": (("client_sleep", "client_kill", "producer_kill", "client_cut"), (5, 20)),
    "sleepers": (("client_sleep", "redis_restart", "hub_cut_off"), (15, 35)),
    "slow clients": (("throttle", "delay", "client_sleep"), (2, 10)),
    "everything": (
        (
            *("redis_restart", "redis_restart_older", "redis_set_back", "redis_restart_empty", "redis_evict"),
            *(
                "redis_fail_over",
                "redis_split",
                "redis_promote",
                "clock_step",
                "replica_freeze",
                "replica_lag",
                "redis_freeze",
                "redis_slow",
                "redis_oom",
            ),
            *("redis_deny", "hub_kill", "hub_drain", "hub_freeze", "hub_cut_off", "cut", "half_open"),
            *("black_hole", "one_way", "throttle", "refuse", "delay", "client_sleep", "client_kill"),
            *("producer_kill", "client_cut"),
        ),
        (5, 20),
    ),
}

REPLICA_KINDS: Final = (
    *("replica_kill", "replica_freeze", "replica_lag", "replica_detach", "replica_stray", "redis_promote"),
    "redis_freeze",
)
"""What happens besides where there are several replicas."""

KINDS: Final = (*PROFILES["everything"][0], "replica_kill", "replica_detach", "replica_stray")


def draw(seed: int) -> World:
    """The world of a seed."""
    chance = random.Random(f"{seed}/world")
    profile = chance.choice(list(PROFILES))
    lasts_s = chance.uniform(6, 30) if chance.random() < 0.95 else chance.uniform(60, 200)
    if profile == "many epochs":
        lasts_s = chance.uniform(30, 50)
    slow = profile == "slow clients"
    stores = chance.random() < 0.9
    channels = (DEFAULT_CHANNEL, "events.a", "events.b")[: chance.choice((1, 1, 2, 3))]
    hubs = tuple(range(FIRST_HUB_PORT, FIRST_HUB_PORT + chance.choice((1, 1, 2, 3))))
    producers = tuple(_producer(chance, index, channels, lasts_s) for index in range(chance.choice((1, 1, 2))))
    clients = tuple(
        _client(chance, index, channels if stores else channels[:1], lasts_s, profile)
        for index in range(chance.randint(2, 7))
    )
    names = [producer.name for producer in producers], [client.name for client in clients]
    dedupe_s = chance.choice((20, 60))
    deadline_s = chance.uniform(3, 15)
    tables: dict[str, dict[str, Any]] = {
        "history": {
            "enabled": stores,
            "max_events": chance.choice((4, 8, 20, 60, 200, 10_000)),
            "idle_expire_s": chance.choice((2, 5, 30, 3600, 86_400)),
            "dedupe_s": dedupe_s,
        },
        "redis": {
            "connect_timeout_s": chance.uniform(0.3, 2),
            "ping_interval_s": (ping_s := chance.uniform(0.1, 0.5)),
            "silence_timeout_s": ping_s + chance.uniform(0.3, 1.5),
            "reconnect_max_s": chance.uniform(0.1, 1),
        },
        "hub": {
            "beat_interval_s": chance.choice((0.3, 0.5, 1.0)),
            "prove_interval_s": chance.uniform(0.2, 1),
            "ping_interval_s": chance.uniform(2, 10),
            "behind_max_ms": chance.choice((1000, 5000)),
            "behind_max_events": 10 if slow else chance.choice((10, 50_000)),
            "drain_s": chance.choice((0.0, 0.3, 1.0)),
            "compress_min_bytes": 64,
            "shutdown_s": 0.5,
        },
        "channels": {
            "linger_s": chance.choice((0.5, 5.0, 60.0)),
            "drop_oldest": ("events.*",) if chance.random() < 0.2 + slow / 2 else (),
        },
        "publisher": {"publish_deadline_s": deadline_s},
        "subscriber": {
            "connect_timeout_s": chance.uniform(0.5, 2),
            "reconnect_max_s": chance.uniform(0.3, 1.5),
            "queue_events": chance.choice((4, 64, 4096)),
        },
    }
    world = World(
        seed=seed,
        profile=profile,
        lasts_s=lasts_s,
        channels=channels,
        hubs=hubs,
        producers=producers,
        clients=clients,
        faults=_faults(chance, profile, lasts_s, hubs, *names),
        tables=tables,
        hub_max_bytes=600 if chance.random() < 0.1 else 65_536,
        ring_bytes=chance.choice((2_000, 8_000, 100_000, 16 * 2**20)),
        windows=(500, 1_500) if slow else chance.choice(((500, 4_000), (16_384, 262_144))),
        limits={
            "page_events": chance.choice((4, 16, 64, 256)),
            "page_bytes": chance.choice((1_000, 10_000, 262_144)),
            "kept_pages": chance.choice((1, 4, 32)),
            "store_events": chance.choice((2, 64)),
            "unsent_bytes": 1_000 if slow else chance.choice((2_000, 65_536)),
            "write_bytes": chance.choice((1_000, 65_536)),
        },
        node_entries=chance.choice((2, 5, 20, 100)),
        output_limit=chance.choice((4_000, 2**20)),
        token="0123456789abcdef" if chance.random() < 0.3 else "",
        balanced=chance.random() < 0.5,
        replica_lag_s=chance.choice((0.001, 0.05))
        if chance.random() < (0.6 if profile == "failover" else 0.2)
        else None,
        replicas=1,
        delays_s=(0.0001, chance.choice((0.0005, 0.005, 0.05))),
        splits=chance.random() < 0.3,
        pauses=(chance.choice((500, 3000)), chance.choice((0.02, 0.3))) if chance.random() < 0.3 else None,
    )
    variations = (
        ("replicas", 0.2, _with_replicas),
        ("cuts", 0.1, _at_the_head),
        ("bursts", 0.1, _filtered_in_bursts),
        ("again", 0.1, _sent_again),
        ("pipelined", 0.1, _pipelined),
        ("unseen", 0.1, _set_back_unseen),
        ("anew", 0.1, _anew_in_old_pages),
        ("times", 0.1, _by_time),
    )
    for name, share, vary in variations:  # each with a chance of its own: the others of a seed stay as they are
        own = random.Random(f"{seed}/{name}")
        if own.random() < share:
            world = vary(world, own)
    if world.delays_s[1] < _SLOW_LINK_S:
        return world
    # Who reads the log may not read slower than it grows, however long each page is on the way.
    least = {"page_events": 32, "page_bytes": 10_000}
    return replace(world, limits={name: max(value, least.get(name, 0)) for name, value in world.limits.items()})


def _with_replicas(world: World, chance: random.Random) -> World:
    """In some seeds with history hubs have several replicas to subscribe at, to which something happens, too."""
    if not world.tables["history"]["enabled"]:
        return world  # without positions a later replica gives again what an earlier one has given
    faults = list(world.faults)
    for _ in range(chance.randint(2, 8)):
        kind, at = chance.choice(REPLICA_KINDS), chance.uniform(1, world.lasts_s)
        lasts_s = chance.uniform(0.01, min(chance.choice((0.2, 1.0, 4.0, 20.0)), world.lasts_s - at + 1))
        faults.append(Fault(at, kind, lasts_s, "redis", chance.random()))
    redis = world.tables["redis"] | {"replica_lag_max_s": chance.choice((0.2, 1.0))}
    return replace(
        world,
        replicas=chance.choice((2, 2, 3)),
        replica_lag_s=world.replica_lag_s or chance.choice((0.001, 0.05)),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        tables=world.tables | {"redis": redis},
    )


def _at_the_head(world: World, chance: random.Random) -> World:
    """In some seeds who comes back finds where it was in a page that reaches as far as the events do just now."""
    if not world.tables["history"]["enabled"]:
        return world
    faults = list(world.faults)
    for client in world.clients:
        for _ in range(chance.randint(1, 3)):  # who is cut off again and again waits longer and longer
            kind = chance.choice(("client_cut", "client_cut", "client_sleep"))
            at, lasts_s = chance.uniform(1, world.lasts_s), chance.uniform(0.01, 1.0)
            faults.append(Fault(at, kind, lasts_s, client.name, chance.random()))
    every_s = max(0.1, world.lasts_s / 150)
    return replace(
        world,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        producers=tuple(replace(producer, every_s=every_s, most=3) for producer in world.producers),
        ring_bytes=2_000,
        limits=world.limits | {"page_events": 256, "page_bytes": 262_144, "kept_pages": chance.choice((1, 4))},
    )


def _filtered_in_bursts(world: World, chance: random.Random) -> World:
    """In some seeds many events come at once, of which clients want some, and a socket takes few at a time."""
    if world.delays_s[1] >= _SLOW_LINK_S:
        return world  # who was away for a minute would not have read all of it when it has to
    every_s = chance.choice((1.0, 2.0))
    clients = (replace(client, wanted=chance.choice((*TYPES, client.wanted))) for client in world.clients)
    return replace(
        world,
        producers=tuple(replace(producer, every_s=every_s, most=30) for producer in world.producers),
        clients=tuple(clients),
        windows=(1_500, 4_000),
        limits=world.limits | {"unsent_bytes": 1_000, "write_bytes": 1_000},
    )


def _sent_again(world: World, chance: random.Random) -> World:
    """In some seeds Redis forgets what it has passed on before its publisher has been answered."""
    faults = list(world.faults)
    for _ in range(chance.randint(2, 5)):
        at, producer = chance.uniform(1, world.lasts_s), chance.choice(world.producers).name
        faults.append(Fault(at, "one_way", 1.0, producer, 0.1))
        faults.append(Fault(at + 0.6, "redis_restart_older", 0.1, "redis", chance.uniform(0, 0.2)))
    return replace(world, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def _pipelined(world: World, chance: random.Random) -> World:
    """In some seeds publishers go on before they are answered, and Redis has no memory for some of it."""
    faults = list(world.faults)
    for _ in range(chance.randint(2, 8)):
        at, lasts_s = chance.uniform(1, world.lasts_s), chance.choice((0.2, 1.0))
        faults.append(Fault(at, "redis_oom", lasts_s, "redis", chance.random()))
    every_s = max(0.5, world.lasts_s / 40)
    producers = (replace(each, every_s=every_s, most=3, uses_http=False, waits=False) for each in world.producers)
    return replace(
        world,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        producers=tuple(producers),
        # What has waited for Redis comes all at once.
        ring_bytes=max(world.ring_bytes, 2**20),
        tables=world.tables | {"hub": world.tables["hub"] | {"behind_max_events": 50_000}},
        oom_share=0.5,
    )


def _set_back_unseen(world: World, chance: random.Random) -> World:
    """In some seeds Redis' memory goes back while nobody publishes who has seen what is lost: hubs have to notice.

    Whoever publishes next may be there at once, and get as far again before the next probe, or much later.
    """
    if not world.tables["history"]["enabled"] or world.profile == "slow clients":
        return world
    faults = list(world.faults)
    for _ in range(chance.randint(1, 3)):
        at, away_s = chance.uniform(2, world.lasts_s), chance.choice((0.02, 0.1, 0.5, 4.0))
        faults += [Fault(at - 0.001, "producer_kill", away_s, producer.name) for producer in world.producers]
        faults.append(Fault(at, "redis_set_back", 0.1, "redis", 0.999 * (1 - chance.random() ** 3)))
        faults += [Fault(at, "cut", 0.1, f"hub-{port}") for port in world.hubs if chance.random() < 0.3]
    every_s = max(0.1, world.lasts_s / 100)
    producers = (
        replace(each, every_s=every_s, most=chance.choice((1, 4, 8)), uses_http=False) if each.waits else each
        for each in world.producers
    )
    return replace(
        world,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        producers=tuple(producers),
        tables=world.tables
        | {
            "hub": world.tables["hub"] | {"prove_interval_s": chance.uniform(0.5, 1), "behind_max_events": 50_000},
        },
    )


def _anew_in_old_pages(world: World, chance: random.Random) -> World:
    """In some seeds epochs go back, and who comes back from one finds its offset in a page of an earlier one."""
    if not world.tables["history"]["enabled"]:
        return world
    faults = list(world.faults)
    for _ in range(chance.randint(2, 6)):
        kind = chance.choice(("redis_restart_older", "redis_set_back", "redis_restart_empty"))
        faults.append(Fault(chance.uniform(1, world.lasts_s), kind, 0.1, "redis", chance.uniform(0, 0.99)))
    for client in world.clients:
        for _ in range(chance.randint(1, 4)):
            at, lasts_s = chance.uniform(1, world.lasts_s), chance.uniform(0.3, 2.0)
            faults.append(Fault(at, "client_sleep", lasts_s, client.name, 0.25))  # without its connection
    every_s = max(0.1, world.lasts_s / 150)
    return replace(
        world,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        producers=tuple(replace(producer, every_s=every_s, most=4) for producer in world.producers),
        tables=world.tables | {"history": world.tables["history"] | {"max_events": 10_000}},
        ring_bytes=2_000 if all(producer.waits for producer in world.producers) else world.ring_bytes,
        limits=world.limits | {"page_events": 256, "page_bytes": 262_144, "kept_pages": 32},
    )


def _by_time(world: World, chance: random.Random) -> World:
    """In some seeds clients that come late ask for a time."""
    if not world.tables["history"]["enabled"]:
        return world
    lasts_s = world.lasts_s
    clients = (
        replace(client, since="time", begins_at=chance.uniform(0.2, 1) * lasts_s)
        if chance.random() < 0.7
        else client
        for client in world.clients
    )
    # Looking for a time takes some fifteen reads, one after the other; who waits gives up after three heartbeats.
    beat_s = 1.0 if world.delays_s[1] >= _SLOW_LINK_S else world.tables["hub"]["beat_interval_s"]
    hub = world.tables["hub"] | {"beat_interval_s": beat_s}
    return replace(world, clients=tuple(clients), tables=world.tables | {"hub": hub})


def _producer(chance: random.Random, index: int, channels: tuple[str, ...], lasts_s: float) -> Producer:
    events = chance.uniform(30, 200)
    most = chance.choice((1, 1, 4, 30))
    some = channels if chance.random() < 0.6 else (chance.choice(channels),)
    return Producer(f"producer-{index}", some, lasts_s / events * (1 + most) / 2, most, chance.random() < 0.5)


def _client(chance: random.Random, index: int, channels: tuple[str, ...], lasts_s: float, profile: str) -> Client:
    kind = chance.choice(("v1", "v1", "plain", "Subscriber", "Subscriber"))
    some = channels if chance.random() < 0.4 else (chance.choice(channels),)
    late, slow = index > 1 and chance.random() < 0.5, profile == "slow clients"
    if index == 0 and profile == "many epochs":  # one that has been away for nearly all of them
        return Client("client-0", kind, channels, "older", None, 0.9 * lasts_s, 0.0, 0.0)
    return Client(
        name=f"client-{index}",
        kind=kind,
        channels=some,
        since=chance.choice(("now", "old", "old", "older", "foreign", "huge")) if late else "now",
        wanted=chance.choice(TYPES) if chance.random() < 0.2 else None,
        begins_at=chance.uniform(lasts_s / 4, lasts_s) if late else chance.uniform(0, 1),
        polls_s=chance.choice((0.02, 0.3)) if kind == "Subscriber" and chance.random() < 0.5 else 0.0,
        naps_s=chance.choice((0.5, 8.0)) if chance.random() < 0.2 + slow / 2 else 0.0,
    )


def _lengths_s(profile: str, kind: str) -> tuple[float, ...]:
    """How long a fault may last: where there are to be many restarts, these are short, and sleep is long."""
    if profile == "many epochs":
        return (0.05, 0.2) if kind.startswith("redis") else (2.0, 45.0)
    if profile not in ("restarts", "sleepers"):
        return 0.2, 1.0, 4.0, 20.0, 150.0
    return (0.1, 0.5) if kind.startswith("redis") else (4.0, 20.0, 150.0)


def _faults(
    chance: random.Random,
    profile: str,
    lasts_s: float,
    hubs: tuple[int, ...],
    producers: list[str],
    clients: list[str],
) -> tuple[Fault, ...]:
    kinds, (least, most) = PROFILES[profile]
    count = chance.randint(least, most)
    targets = {
        "hub": [f"hub-{port}" for port in hubs],
        "client": clients,
        "producer": producers,
    }
    faults = []
    for _ in range(count):
        kind = chance.choice(kinds)
        group = kind.split("_")[0]
        pool = targets.get(group, [name for names in targets.values() for name in names])
        at = chance.uniform(1, lasts_s)
        longest_s = min(chance.choice(_lengths_s(profile, kind)), lasts_s - at + 1)
        faults.append(Fault(at, kind, chance.uniform(0.01, longest_s), chance.choice(pool), chance.random()))
    return tuple(sorted(faults, key=lambda fault: fault.at))

"""Never silently lost: whatever breaks, each event is delivered once and in order, or told to be missing.

`FAULT_TABLE=faults.jsonl` writes what was measured, a line per case.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broadcaster import Gap, Position
from broadcaster.redis import stream
from broadcaster.redis.connection import RUN_ID
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, PublisherTable, RedisTable, SubscriberTable
from tests.faults.ledger import Entry, Got, Ledger, Library, Raw, Reader, Sender, settings_for
from tests.support import (
    ROOT,
    HubProcess,
    Running,
    assert_calm,
    event_payload,
    eventually,
    frozen,
    redis_client,
)

META = "{events.critical}:meta"
LOG = "{events.critical}:log"
HASTY = {"BROADCASTER_REDIS__RECONNECT_MAX_S": "0.2"}


@dataclass
class Scene:
    """A system at work, for something to break: Redis, a hub, subscribers of every kind, and a flow of events."""

    redis: RedisServer
    hub: HubProcess
    ledger: Ledger
    folder: Path
    stack: contextlib.ExitStack
    redis_arguments: tuple[str, ...]
    hub_variables: dict[str, str]

    def command(self, *words: Any) -> Any:
        """Say something to Redis by hand."""
        with redis_client(self.redis) as client:
            return client.command(*words)

    def restart_redis(self) -> None:
        self.redis = self.stack.enter_context(RedisServer.start(self.redis.port, *self.redis_arguments))

    def restart_hub(self) -> None:
        self.hub = self.stack.enter_context(HubProcess(self.redis.url, self.hub.port, **self.hub_variables))
        self.hub.until_ready()

    def not_ready(self) -> bool:
        return self.hub.get("/health/ready")[0] != 200


# What breaks, and is repaired


def links_are_killed(scene: Scene) -> None:
    for cut in range(1, 21):
        scene.ledger.broken()
        assert scene.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
        scene.ledger.noticed(lambda cut=cut: scene.hub.stats()["redis_reconnects"] == cut, "no reconnect")  # type: ignore[misc]


def redis_is_killed(scene: Scene) -> None:
    scene.ledger.broken()
    scene.redis.kill()
    scene.ledger.noticed(scene.not_ready, "the hub has not noticed", within=3.0)
    scene.restart_redis()


def an_older_snapshot_comes_back(scene: Scene, *, with_hub: bool = False) -> None:
    scene.command("SAVE")
    shutil.copy(scene.folder / "dump.rdb", scene.folder / "copy")
    scene.ledger.flows(100)
    scene.ledger.broken()
    scene.redis.kill()
    if with_hub:
        scene.hub.signal(signal.SIGKILL)
        scene.hub.wait()
    scene.ledger.noticed(scene.not_ready, "the hub has not noticed", within=3.0)
    shutil.copy(scene.folder / "copy", scene.folder / "dump.rdb")
    scene.restart_redis()
    if with_hub:
        scene.restart_hub()


def an_older_snapshot_and_another_hub_come_back(scene: Scene) -> None:
    an_older_snapshot_comes_back(scene, with_hub=True)


def redis_is_killed_twice(scene: Scene) -> None:
    for _ in range(2):
        redis_is_killed(scene)
        scene.ledger.flows(20)


def by_hand(*words: str) -> Callable[[Scene], None]:
    """Somebody meddles with Redis."""

    def act(scene: Scene) -> None:
        scene.ledger.broken()
        scene.command(*words)
        reader = scene.ledger.readers[0]
        if words[0] != "SCRIPT":
            scene.ledger.noticed(lambda: reader.gaps, "no gap was told")

    return act


def redis_stands_still(scene: Scene) -> None:
    scene.ledger.broken()
    until = time.monotonic() + 10.0
    with frozen(scene.redis):
        scene.ledger.noticed(scene.not_ready, "the hub has not noticed", within=5.0)
        time.sleep(max(0.0, until - time.monotonic()))


def hub_ends(number: signal.Signals) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        scene.ledger.broken()
        scene.hub.signal(number)
        scene.ledger.noticed(scene.not_ready, "it goes on")
        scene.hub.wait()
        scene.restart_hub()

    return act


def hub_stands_still(scene: Scene) -> None:
    scene.ledger.broken()
    scene.hub.signal(signal.SIGSTOP)
    until = time.monotonic() + 8.0
    for reader in scene.ledger.readers:
        if isinstance(reader, Library) and reader.name != "away":
            scene.ledger.noticed(lambda reader=reader: "stale" in reader.items, "it is blind and does not know")  # type: ignore[misc]
    time.sleep(max(0.0, until - time.monotonic()))
    scene.hub.signal(signal.SIGCONT)


def positions_are_forged(scene: Scene) -> None:
    [raw] = [json.loads(scene.command("XREVRANGE", LOG, "+", "-", "COUNT", "1")[0][1][1])]
    place = {"channel": raw["channel"], "epoch": raw["epoch"], "offset": raw["offset"]}
    forged = [
        place | {"offset": 2**53 - 1},
        place | {"offset": raw["offset"] + 10**6},
        place | {"epoch": "forged"},
        place | {"epoch": "forged", "offset": 2**53 - 1},
        place | {"epoch": "forged", "offset": 1},
        place | {"offset": 1},
        place | {"offset": str(raw["offset"] + 1)},
        place | {"offset": raw["offset"] + 0.5},
        place | {"offset": -1},
        place | {"offset": None},
        {"offset": raw["offset"] + 3},
    ]
    scene.ledger.broken()
    for fields in forged * 3:
        scene.ledger.flows(2)
        assert scene.command("PUBLISH", "events.critical", event_payload(7, source="forger", **fields)) == 1


# What is expected

WHOLE = ""
"""Nobody is told anything, and nothing is missing."""


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        act: Breaks and repairs.
        cause: Of the gap that everybody who was there is told; WHOLE for none.
        nothing_missing: Whether no event at all may be missing, told or not.
        redis, hub: How they are started.
        times: How many of these gaps.
        pad: Bytes that each event is larger.
        crowd: Subscribers of the library.
        rate_hz: Of the events.
    """

    name: str
    act: Callable[[Scene], None]
    cause: str = WHOLE
    nothing_missing: bool = True
    redis: tuple[str, ...] = ()
    hub: dict[str, str] = field(default_factory=dict)
    times: int = 1
    pad: int = 0
    crowd: int = 2
    rate_hz: float = 200.0


RESTARTED = "redis_restarted"
AOF = ("--appendonly", "yes", "--appendfsync", "always")
SMALL_RING = {"BROADCASTER_HUB__RING_BYTES": str(1 << 18)}
LARGE = 8000
"""Bytes of events of which a small ring holds 30: who was away is served from the log."""
CASES = [
    Case("Pub/Sub link killed 20 times", links_are_killed),
    Case("Pub/Sub link killed 20 times, a small ring", links_are_killed, hub=SMALL_RING, pad=LARGE),
    Case("Redis killed, restarted empty", redis_is_killed, RESTARTED, False),
    Case("Redis killed, restarted with all its data", redis_is_killed, RESTARTED, redis=AOF),
    Case("Redis killed, restarted with all its data, a small ring", redis_is_killed, RESTARTED,
         redis=AOF, hub=SMALL_RING, pad=LARGE),
    Case("Redis killed, restarted with an older snapshot", an_older_snapshot_comes_back, RESTARTED),
    Case("Redis killed, an older snapshot, a small ring", an_older_snapshot_comes_back, RESTARTED, False,
         hub=SMALL_RING, pad=LARGE),
    Case("Redis and hub killed, an older snapshot", an_older_snapshot_and_another_hub_come_back, RESTARTED, False),
    Case("Redis killed twice, its data kept", redis_is_killed_twice, RESTARTED, redis=AOF, times=2),
    Case("counter deleted by hand", by_hand("DEL", META), RESTARTED, False),
    Case("counter set back by hand", by_hand("HSET", META, "offset", "5"), RESTARTED, False),
    Case("counter set forward by hand", by_hand("HINCRBY", META, "offset", "1000"), "expired"),
    Case("FLUSHALL", by_hand("FLUSHALL"), RESTARTED, False),
    Case("SCRIPT FLUSH", by_hand("SCRIPT", "FLUSH")),
    Case("Redis stopped for 10 s", redis_stands_still),
    Case("hub killed under 50 subscribers", hub_ends(signal.SIGKILL), crowd=50, rate_hz=50.0),
    Case("hub restarted under 50 subscribers", hub_ends(signal.SIGTERM), crowd=50, rate_hz=50.0),
    Case("hub stopped for 8 s", hub_stands_still, hub={"BROADCASTER_HUB__BEAT_INTERVAL_S": "1"}),
    Case("forged positions published by hand", positions_are_forged),
]  # fmt: skip


@contextlib.contextmanager
def at_work(case: Case, folder: Path) -> Iterator[Scene]:
    """Everything runs, and events flow; one subscriber has left a moment ago."""
    arguments = (*case.redis, "--dir", str(folder), "--dbfilename", "dump.rdb")
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer.start(None, *arguments))
        variables = HASTY | case.hub
        hub = stack.enter_context(HubProcess(redis.url, None, **variables)).until_ready()
        ledger = stack.enter_context(Ledger())
        settings = settings_for(redis.url)
        names = ["away", *(f"library {number}" for number in range(case.crowd))]
        away, *crowd = [Library(name, hub.url, settings) for name in names]
        ledger.subscribe(*crowd, Raw("v1", hub.url), Raw("plain", hub.url, v1=False), away)
        hub.until_connected(len(ledger.readers))
        ledger.publish(settings, case.rate_hz, data={"pad": "x" * case.pad})
        for reader in ledger.readers:
            eventually(lambda reader=reader: reader.got, f"{reader.name} gets nothing")  # type: ignore[misc]
        ledger.send_away(away)
        yield Scene(redis, hub, ledger, folder, stack, arguments, variables)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_every_event_is_accounted_for(case: Case, tmp_path: Path) -> None:
    """Something breaks and is repaired while events flow: nobody loses anything silently, or gets it twice.

    Who was there is told of a hole if there may be one, once, and of none otherwise.
    """
    with at_work(case, tmp_path) as scene:
        ledger = scene.ledger
        ledger.flows(20)
        case.act(scene)
        ledger.repaired()
        ledger.flows(30)
        away = next(reader for reader in ledger.readers if reader.name == "away")
        ledger.call_back(away)
        ledger.flows(30)
        accounts = ledger.close(case.name)
        assert not [entry.error for entry in ledger.entries if entry.error]
        for reader in ledger.readers:
            causes = [gap.cause for gap in reader.gaps]
            if reader.name == "plain":
                assert ("close 4009" in reader.items) == bool(case.cause), reader.name
            elif case.cause != WHOLE and reader.name != "away":
                assert causes == [case.cause] * case.times, reader.name
            else:
                assert set(causes) <= {case.cause}, reader.name
            assert "unexplained" not in causes
        if case.nothing_missing:
            assert not sum(account.told for account in accounts if account.name != "plain")
        if case.cause == WHOLE:
            assert not sum(account.told for account in accounts)
        assert_calm(scene.hub)


# Links of subscribers


def test_a_link_that_is_cut_or_swallows_costs_nothing(redis: RedisServer) -> None:
    """A subscriber's link is reset, then goes half-open: seen as `stale`, and made anew; nothing is lost."""
    settings = settings_for(redis.url)
    with (
        HubProcess(redis.url, BROADCASTER_HUB__BEAT_INTERVAL_S="0.3") as hub,
        Ledger() as ledger,
    ):
        hub.until_ready()
        proxy = ledger.proxy(hub.port)
        far = Library("far", f"ws://127.0.0.1:{proxy.port}/ws", settings)
        ledger.subscribe(far, Library("near", hub.url, settings))
        hub.until_connected(2)
        ledger.publish(settings)
        eventually(lambda: far.got, "nothing comes through")
        ledger.broken()
        ledger.call(proxy.cut())
        ledger.repaired()
        ledger.flows()
        seen = len(far.got)
        eventually(lambda: len(far.got) > seen + 10, "it does not come back after the reset")
        assert "stale" not in far.items
        ledger.record("subscriber's link reset")

        ledger.broken()
        ledger.call(proxy.swallow())
        ledger.noticed(lambda: "stale" in far.items, "it is blind and does not know")
        ledger.repaired()
        eventually(lambda: "fresh" in far.items, "it does not come back")
        ledger.flows()
        [account, _] = ledger.close("subscriber's link half-open")
        assert account.told == 0
        assert far.gaps == []


def test_a_slow_one_that_is_closed_misses_nothing(redis: RedisServer) -> None:
    """A subscriber stops reading, is closed with 4008, and has everything in the end all the same."""
    settings = settings_for(
        redis.url, subscriber=SubscriberTable(queue_events=1, connect_timeout_s=2.0, reconnect_max_s=0.2)
    )
    with (
        HubProcess(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="300") as hub,
        Ledger() as ledger,
    ):
        hub.until_ready()
        slow = Library("slow", hub.url, settings)
        ledger.subscribe(slow, Library("fast", hub.url, settings_for(redis.url)))
        hub.until_connected(2)
        ledger.publish(settings, data={"pad": "x" * 30_000})
        eventually(lambda: slow.got, "nothing comes")
        ledger.broken()
        ledger.pause(slow)
        ledger.noticed(lambda: hub.stats()["slow_closed"] == 1, "it is not closed", within=20.0)
        ledger.pause(slow, pause=False)
        ledger.repaired()
        ledger.flows()
        for account in ledger.close("slow subscriber closed (4008)"):
            assert account.told == 0
        assert slow.gaps == []
        assert_calm(hub)


# The retention window


def publish_at_once(redis: RedisServer, count: int, size: int = 300, **history_table: Any) -> Sender:
    """Publish so many events as fast as possible; they are all stored."""
    settings = settings_for(redis.url, history=HistoryTable(**history_table))
    sender = Sender(settings, 1.0, "server-b", None)

    with Ledger() as ledger:
        ledger.call(sender.burst(count, {"pad": "x" * size}))
    assert all(entry.position for entry in sender.entries)
    return sender


def test_who_was_away_for_too_long_is_told_exactly_what_is_gone(redis: RedisServer) -> None:
    """100 events are kept, 1,000 come while somebody is away: a gap of the very range, then the rest in order."""
    kept = HistoryTable(max_events=100)
    settings = settings_for(redis.url, history=kept)
    with (
        HubProcess(
            redis.url, BROADCASTER_HISTORY__MAX_EVENTS="100", BROADCASTER_HUB__RING_BYTES=str(1 << 18)
        ) as hub,
        Ledger() as ledger,
    ):
        hub.until_ready()
        v1, library = Raw("v1", hub.url), Library("library", hub.url, settings)
        plain = Raw("plain", hub.url, v1=False)
        ledger.subscribe(v1, library, plain)
        hub.until_connected(3)
        sender = ledger.publish(settings)
        for reader in ledger.readers:
            eventually(lambda reader=reader: reader.got, "nothing comes")  # type: ignore[misc]
        ledger.broken()
        for reader in ledger.readers:
            ledger.send_away(reader)
        burst = publish_at_once(redis, 1000, 500, max_events=100)
        ledger.repaired()
        for reader in ledger.readers:
            ledger.call_back(reader)
        eventually(lambda: "close 4009" in plain.items, "the plain one was not told")
        ledger.flows()
        ledger.more_entries = burst.entries
        accounts = ledger.close("away for longer than the retention window")
        for reader, account in zip(ledger.readers[:2], accounts, strict=False):
            [gap] = reader.gaps
            assert gap.cause == "expired"
            assert gap.first is not None
            assert gap.last is not None
            got = {item.position for item in reader.got}
            missing = sorted(
                entry.position.offset
                for entry in [*sender.entries, *burst.entries]
                if entry.position and entry.position not in got
            )
            assert missing == list(range(gap.first, gap.last + 1))
            assert account.told == len(missing) >= 800


def test_a_long_replay_ends_and_holds_nobody_up(redis: RedisServer) -> None:
    """20,000 events of 2 KB, far more than ring and buffers, are replayed whole while events flow to others."""
    settings = settings_for(redis.url, history=HistoryTable(max_events=100_000))
    with (
        HubProcess(
            redis.url, BROADCASTER_HISTORY__MAX_EVENTS="100000", BROADCASTER_HUB__RING_BYTES=str(1 << 20)
        ) as hub,
        Ledger() as ledger,
    ):
        hub.until_ready()
        burst = publish_at_once(redis, 20_000, 1800, max_events=100_000)
        assert burst.entries[0].position is not None
        live = Library("live", hub.url, settings)
        ledger.subscribe(live)
        hub.until_connected(1)
        live.first_entry = len(burst.entries)
        ledger.more_entries = burst.entries
        ledger.publish(settings)
        ledger.broken()
        ledger.repaired()
        begin = str(Position(burst.entries[0].position.epoch, 0))
        ledger.subscribe(Library("back", hub.url, settings, begin), Raw("v1 back", hub.url, begin))
        for reader in ledger.readers[1:]:
            eventually(lambda reader=reader: len(reader.got) > 20_000, "it does not end", within=40.0)  # type: ignore[misc]
        accounts = ledger.close("replay of 20,000 events")
        assert all(account.told == 0 for account in accounts)
        assert all(reader.gaps == [] for reader in ledger.readers)
        assert hub.stats()["slow_closed"] == 0
        assert_calm(hub)


# Redis, half of it


def test_a_subscription_over_a_replica_that_stands_still(tmp_path: Path) -> None:
    """The hub subscribes at a replica, which freezes while the master goes on: not ready, and nothing is lost."""
    folders = [tmp_path / name for name in ("master", "replica")]  # a replication leaves files behind
    for folder in folders:
        folder.mkdir()
    with (
        RedisServer.start(None, "--dir", str(folders[0])) as redis,
        RedisServer.start(None, "--dir", str(folders[1]), "--replicaof", "127.0.0.1", str(redis.port)) as replica,
        HubProcess(redis.url, None, BROADCASTER_REDIS__SUBSCRIBE_URL=replica.url, **HASTY) as hub,
        Ledger() as ledger,
    ):
        hub.until_ready()
        settings = settings_for(redis.url)
        ledger.subscribe(
            Library("library", hub.url, settings), Raw("v1", hub.url), Raw("plain", hub.url, v1=False)
        )
        hub.until_connected(3)
        ledger.publish(settings)
        ledger.broken()
        with frozen(replica):
            ledger.noticed(lambda: hub.get("/health/ready")[0] != 200, "the hub has not noticed", within=5.0)
            ledger.flows(50)
        ledger.repaired()
        hub.until_ready()
        ledger.flows(30)
        for account in ledger.close("replica of the subscription stopped"):
            assert account.told == 0
        assert all(not reader.gaps for reader in ledger.readers)
        assert_calm(hub)


def test_what_could_not_be_published_is_named(redis: RedisServer) -> None:
    """Redis stands still for longer than the publisher tries: each event arrives, or its publish has failed.

    Those that failed may have been stored all the same: nobody gets one of them twice either.
    """
    settings = settings_for(
        redis.url,
        redis=RedisTable(url=redis.url, silence_timeout_s=0.6, connect_timeout_s=0.5, reconnect_max_s=0.2),
        publisher=PublisherTable(publish_deadline_s=1.0),
    )
    with HubProcess(redis.url, None, **HASTY) as hub, Ledger() as ledger:
        hub.until_ready()
        ledger.subscribe(
            Library("library", hub.url, settings), Raw("v1", hub.url), Raw("plain", hub.url, v1=False)
        )
        hub.until_connected(3)
        ledger.publish(settings)
        ledger.broken()
        with frozen(redis):
            ledger.noticed(lambda: any(entry.error for entry in ledger.entries), "no publish fails", within=5.0)
            time.sleep(1.0)
        ledger.repaired()
        hub.until_ready()
        ledger.flows(50)
        for account in ledger.close("Redis stopped for longer than the publisher tries"):
            assert account.told == 0
        failed = [entry for entry in ledger.entries if entry.error]
        assert failed
        assert all("no answer from Redis within 1 s" in str(entry.error) for entry in failed)


# Publishers

PUBLISHER = """
import asyncio, sys
from broadcaster import Publisher

async def main():
    out = open(sys.argv[1], "ab", buffering=0)
    async with Publisher() as publisher:
        tasks = []
        while True:
            drafts = [publisher.draft("SERVER_DOWN", "killed") for _ in range(5)]
            sent = publisher.send(drafts)
            for draft, payload in zip(drafts, sent.payloads):
                out.write(draft.unpublished.event_id.encode() + b" " + payload + b"\\n")
            tasks.append(asyncio.create_task(publisher.settle(sent)))
            await asyncio.sleep(0.001)

asyncio.run(main())
"""


def test_a_publisher_that_is_killed_can_be_repeated(redis: RedisServer, tmp_path: Path) -> None:
    """kill -9 in the middle of publishing: what is published again with its `event_id` is stored once."""
    settings = settings_for(redis.url)
    with HubProcess(redis.url) as hub, Ledger() as ledger, redis_client(redis) as client:
        hub.until_ready()
        ledger.subscribe(Library("library", hub.url, settings), Raw("v1", hub.url))
        hub.until_connected(2)
        ledger.publish(settings)
        sent = tmp_path / "sent"
        ledger.broken()
        with Running(
            sys.executable, "-c", PUBLISHER, str(sent), cwd=ROOT, BROADCASTER_REDIS__URL=redis.url
        ) as run:
            eventually(lambda: sent.exists() and sent.read_bytes().count(b"\n") > 200, run.output)
            run.signal(signal.SIGKILL)
            run.wait()
        run_id = re.findall(rb"run_id:(\w+)", client.command("INFO", "server"))[0]
        lines = sent.read_bytes().splitlines()[-400:]
        events = [(line[:36].decode(), line[37:]) for line in lines]
        entries = []
        for start in range(0, len(events), 50):
            batch = events[start : start + 50]
            command = stream.store("events.critical", batch, HistoryTable())
            reply = client.command(*(run_id if word is RUN_ID else word for word in command))
            for (event_id, payload), stored in zip(batch, stream.read_stored(reply), strict=True):
                sequence = json.loads(payload)["sequence"]
                entries.append(Entry("killed", sequence, event_id, time.monotonic(), stored.position))
        ledger.repaired()
        ledger.flows()
        ledger.more_entries = entries
        for account in ledger.close("publisher killed, its events published again"):
            assert account.told == 0
        stored_ids = [json.loads(item[1][1])["event_id"] for item in client.command("XRANGE", LOG, "-", "+")]
        assert len(stored_ids) == len(set(stored_ids))
        assert {event_id for event_id, _ in events} <= set(stored_ids)


def test_two_hubs_and_two_publishers_are_one_channel(redis: RedisServer) -> None:
    """Subscribers of both hubs see one order; one that moves from hub to hub with its position misses nothing."""
    settings = settings_for(redis.url)
    with HubProcess(redis.url) as one, HubProcess(redis.url) as two, Ledger() as ledger:
        for hub in (one, two):
            hub.until_ready()
        still = [Library("on one", one.url, settings), Library("on two", two.url, settings), Raw("v1", two.url)]
        mover = Library("mover", one.url, settings)
        ledger.subscribe(*still, mover)
        one.until_connected(2)
        two.until_connected(2)
        for source in ("server-a", "server-b"):
            ledger.publish(settings, 100.0, source)
        eventually(lambda: mover.got, "nothing comes")
        ledger.broken()
        for hub in (two, one, two, one):
            ledger.send_away(mover)
            ledger.flows(10)
            mover.url = hub.url
            ledger.call_back(mover)
            seen = len(mover.got)
            eventually(lambda seen=seen: len(mover.got) > seen, "nothing comes any more")  # type: ignore[misc]
        ledger.repaired()
        ledger.flows()
        for account in ledger.close("two hubs, two publishers, and one that moves"):
            assert account.told == 0
        orders = [[got.event_id for got in reader.got] for reader in ledger.readers]
        assert orders[0] == orders[1] == orders[2] == orders[3]


# A replica


def test_a_replica_that_lagged_and_was_promoted(tmp_path: Path) -> None:
    """The master dies, a replica that lacks its last events takes its place: a new epoch, survivors, and a gap.

    Who was there has everything; who was away gets what has survived, and is told of the rest.
    """
    folders = [tmp_path / name for name in ("master", "replica")]  # a replication leaves files behind
    for folder in folders:
        folder.mkdir()
    with (
        RedisServer.start(None, "--dir", str(folders[0])) as redis,
        RedisServer.start(None, "--dir", str(folders[1])) as replica,
        Ledger() as ledger,
    ):
        proxy = ledger.proxy(redis.port)
        url = f"redis://127.0.0.1:{proxy.port}/0"
        settings = settings_for(url)
        with HubProcess(url, None, **HASTY) as hub, redis_client(replica) as client:
            hub.until_ready()
            live, away = Library("live", hub.url, settings), Library("away", hub.url, settings)
            v1, plain = Raw("v1", hub.url), Raw("plain", hub.url, v1=False)
            ledger.subscribe(live, v1, plain, away)
            hub.until_connected(4)
            ledger.publish(settings)
            assert client.command("REPLICAOF", "127.0.0.1", str(redis.port)) == b"OK"
            eventually(lambda: b"master_link_status:up" in client.command("INFO", "replication"), "no replica")
            eventually(lambda: client.command("EXISTS", META), "nothing is replicated")
            eventually(lambda: away.got, "nothing comes")
            ledger.send_away(away)
            left_at = away.got[-1].position
            assert left_at is not None
            eventually(lambda: int(client.command("HGET", META, "offset")) > left_at.offset, "it lags too much")
            ledger.flows(50)
            assert client.command("REPLICAOF", "NO", "ONE") == b"OK"
            survived = int(client.command("HGET", META, "offset"))
            ledger.flows(50)
            ledger.broken()
            redis.kill()
            ledger.noticed(lambda: hub.get("/health/ready")[0] != 200, "the hub has not noticed")
            hub.signal(signal.SIGKILL)  # its ring has more than the new master
            hub.wait()
            proxy.target_port = replica.port
            with HubProcess(url, hub.port, **HASTY) as another:
                another.until_ready()
                ledger.repaired()
                ledger.flows(20)
                ledger.call_back(away)
                ledger.flows(20)
                accounts = ledger.close("lagging replica promoted")
                assert not [entry.error for entry in ledger.entries if entry.error]
                for reader in (live, v1, away):
                    [gap] = reader.gaps
                    assert (gap.cause, gap.last) == ("redis_restarted", None)
                assert "close 4009" in plain.items
                assert max(got.position.offset for got in before(away, away.gaps[0]) if got.position) == survived
                assert [account.told for account in accounts][:2] == [0, 0]
                assert accounts[3].told >= 50
                assert_calm(another)


def before(reader: Reader, gap: Gap) -> list[Got]:
    """What a subscriber got before it was told of a gap."""
    items = reader.items
    return [item for item in items[: items.index(gap)] if isinstance(item, Got)]

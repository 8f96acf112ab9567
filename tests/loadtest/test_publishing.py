"""What the publisher of a load test says of its events."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from broadcaster.core import event
from broadcaster.core.errors import HubUnavailable
from broadcaster.core.event import Draft
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import publishing, rig
from broadcaster.loadtest.publishing import OwnLateness, in_words
from broadcaster.loadtest.records import PublishedRecord
from broadcaster.loadtest.run import Run
from broadcaster.loadtest.target import find_target
from broadcaster.publish.publisher import Published, Publisher, Sent
from broadcaster.redis.server import RedisServer
from broadcaster.settings import load
from tests.loadtest.test_fleet import connected, fleet_on
from tests.support import HubProcess, RedisClient, broadcaster, eventually, free_port

GOOD = PublishedRecord(1, "id", 0, 0, 0, 0, 1, "", "a1", 1)
FAILED, UNHEARD, UNKNOWN = (
    replace(GOOD, heard=None, error="late"),
    replace(GOOD, heard=0),
    replace(GOOD, heard=None),
)

SAID: dict[str, list[PublishedRecord]] = {
    "all 3 stored and heard": [GOOD] * 3,
    "all 1 stored and heard": [GOOD],
    "2 of 3 stored: 1 failed": [GOOD, GOOD, FAILED],
    "3 of 3 stored: 2 heard by nobody": [GOOD, UNHEARD, UNHEARD],
    "2 of 2 stored: 1 not known to be heard (sent again)": [GOOD, UNKNOWN],
    "3 of 4 stored: 1 failed, 1 heard by nobody, 1 not known to be heard (sent again)": [
        GOOD,
        UNHEARD,
        UNKNOWN,
        FAILED,
    ],
}


@pytest.mark.parametrize(("words", "rows"), SAID.items(), ids=SAID)
def test_what_became_of_the_events_is_said_in_words(words: str, rows: list[PublishedRecord]) -> None:
    """Where nothing is wrong nothing is counted; what is wrong is counted, and nothing else."""
    assert in_words(rows, "stored") == words


def test_hubs_at_replicas_are_not_said_to_be_deaf() -> None:
    """Redis counts none of them: only what has failed is told."""
    assert in_words([UNHEARD, UNHEARD, FAILED], "stored", at_replicas=True) == (
        "2 of 3 stored; hubs at replicas are not counted"
    )


def test_the_subscribers_of_others_are_not_waited_for(steady_hub: HubProcess, tmp_path: Path) -> None:
    """A hub that has more of them than the run: each fleet process has to have connected its own."""
    settings = load(
        overrides={
            "hub": {"port": steady_hub.port},
            "fleet": {"clients": 4, "processes": 2},
            "loadtest": {"results": str(tmp_path), "run": "test", "start_timeout_s": 0.5},
        }
    ).settings
    run = Run(tmp_path)

    async def story() -> None:
        async with fleet_on(steady_hub.url, 6):
            await connected(steady_hub, 6)
            run.connected(1).touch()
            with pytest.raises(HubUnavailable, match=r"have connected in time: no \.connected\.2 in"):
                await find_target(settings, run, subscribers=4)
            await find_target(settings, run)  # as a fleet process does
            run.connected(2).touch()
            assert (await find_target(settings, run, subscribers=4)).channel == "events.critical"

    asyncio.run(story())


def test_all_hubs_of_a_run_are_its_own(redis: RedisServer, tmp_path: Path) -> None:
    """Each of several says which process it is, and is counted once; of a hub of others the publisher says it."""
    run = Run(tmp_path / "results" / "test")
    variables = {
        "BROADCASTER_REDIS__URL": redis.url,
        "BROADCASTER_HUB__PORT": str(free_port()),
        "BROADCASTER_HUB__PROCESSES": "2",
        "BROADCASTER_LOADTEST__RUN": "test",
    }
    settings = load(overrides={"redis": {"url": redis.url}}).settings
    with contextlib.ExitStack() as stack:
        hubs = [
            stack.enter_context(broadcaster("hub", "--loadtest", "--number", number, cwd=tmp_path, **variables))
            for number in ("1", "2")
        ]
        pids = [hub.process.pid for hub in hubs]
        eventually(lambda: sorted(rig.announced(run.folder, "hub")) == sorted(pids), "they do not say it")
        other = stack.enter_context(HubProcess(redis.url)).until_ready()
        for pid, said in ((pids[1], pids), (other.process.pid, [*pids, other.process.pid])):
            asyncio.run(publishing._announce_what_is_here(run, pid, settings))
            assert sorted(rig.announced(run.folder, "hub")) == sorted(said)


# How late it is

WRITES: dict[str, tuple[list[tuple[int, int, int, int]], list[int]]] = {
    "in time": ([(0, 0, 5, 6), (100, 102, 107, 108), (200, 201, 206, 207)], [0, 2, 1]),
    "Redis freezes": ([(0, 0, 300, 301), (10, 304, 310, 311), (312, 313, 314, 315)], [0, 0, 1]),
    "Redis is slow": ([(n * 50, n * 64, n * 64 + 60, n * 64 + 64) for n in range(5)], [0] * 5),
    "its own work is slow": ([(n * 50, n * 64, n * 64 + 4, n * 64 + 64) for n in range(5)], [0, 10, 20, 30, 40]),
    "both are": ([(n * 50, n * 100, n * 100 + 45, n * 100 + 100) for n in range(4)], [0, 5, 10, 15]),
    "both are nearly": ([(n * 50, n * 85, n * 85 + 45, n * 85 + 85) for n in range(4)], [0, 0, 0, 0]),
    "it stands still after a freeze": ([(0, 0, 300, 305), (310, 500, 501, 502)], [0, 190]),
    "it stands still when it should catch up": (
        [(0, 0, 300, 400), (10, 400, 401, 402), (200, 402, 403, 404)],
        [0, 90, 0],
    ),
    "it catches up slowly on what Redis has caused": (
        [(0, 0, 300, 308), (10, 308, 309, 317), (61, 317, 318, 326), (112, 326, 327, 335)],
        [0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize(("writes", "late"), WRITES.values(), ids=WRITES.keys())
def test_late_is_what_it_would_be_if_redis_answered_at_once(
    writes: list[tuple[int, int, int, int]], late: list[int]
) -> None:
    """Instants: due, written, answered, ready. Waits do not count; own work adds up until it is caught up on."""
    measured = OwnLateness()
    for due_ns, written_ns, answered_ns, ready_ns in writes:
        measured.on_write(due_ns, written_ns)
        measured.on_ready(answered_ns - written_ns, ready_ns)
    assert measured.late_ns == late


class Made:
    """Stands in for a publisher: Redis answers at once, and each event takes `work_s` to make."""

    def __init__(self, work_s: float = 0.0) -> None:
        self.work_s = work_s
        self.made = 0

    def draft(self, kind: str, source: str, *, data: dict[str, str] | None) -> Draft:
        CLOCK.block(self.work_s)
        self.made += 1
        return event.draft(kind, source, self.made, data=data)

    def send(self, drafts: list[Draft]) -> Sent:
        return Sent("c", drafts, [], 0, [])

    async def settle(self, sent: Sent) -> list[Published]:
        return [Published(draft.unpublished, 1) for draft in sent.drafts]


def test_a_publisher_that_cannot_keep_its_own_schedule_is_late() -> None:
    """5,000 events a second, each of which takes it a millisecond to make: nobody else makes it late."""
    settings = load(overrides={"loadtest": {"events": 612, "rate_hz": 5000}}).settings
    rows, late_ns = asyncio.run(publishing._publish_all(Made(0.001), "s", settings))  # type: ignore[arg-type]
    assert [row.sequence for row in rows] == list(range(1, 613))
    assert max(late_ns) >= 50e6


REVOKED = {"its right": ("SETUSER", "w", "-@all"), "its login": ("DELUSER", "w")}


@pytest.mark.parametrize("rule", REVOKED.values(), ids=REVOKED.keys())
def test_a_right_that_is_revoked_is_a_failure_of_each_event(
    rule: tuple[str, ...], redis: RedisServer, publish: RedisClient
) -> None:
    """What was published before it is kept, and the rest has failed by what Redis says."""
    publish.command("ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
    url = redis.url.replace("redis://", "redis://w:p@")
    settings = load(overrides={"redis": {"url": url}, "loadtest": {"events": 40, "rate_hz": 100}}).settings

    async def story() -> list[PublishedRecord]:
        async with Publisher(settings) as publisher:
            publishing_all = asyncio.create_task(publishing._publish_all(publisher, "s", settings))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(publish.command, "ACL", *rule)
            return (await publishing_all)[0]

    rows = asyncio.run(story())
    assert [row.sequence for row in rows] == list(range(1, 41))
    assert not rows[0].error
    failed = [row for row in rows if row.error]
    assert rows[-len(failed) :] == failed
    assert all("NOPERM" in row.error or "WRONGPASS" in row.error for row in failed)
    assert all(row.event_id and row.heard is None and not row.position for row in failed)

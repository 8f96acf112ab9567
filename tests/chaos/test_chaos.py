"""The short form of `make chaos`, and what it stands on: Redis' own file says what Redis has taken."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broadcaster import Publisher
from broadcaster.settings import Settings
from tests.chaos.truth import Truth, units
from tests.chaos.worlds import KINDS, draw
from tests.support import ROOT, UNIT_S, eventually


def publish(url: str, *sources: str) -> list[str]:
    """Publish an event of each of these sources; their ids."""

    async def work() -> list[str]:
        async with Publisher(Settings.model_validate({"redis": {"url": url}})) as publisher:
            return [(await publisher.publish("DOWN", source)).event.event_id for source in sources]

    return asyncio.run(work())


def heads(truth: Truth) -> list[int]:
    return [event.offset for event in truth.journal.accepted["events.critical"]]


def test_whatever_was_answered_is_in_the_journal_when_redis_is_killed(tmp_path: Path) -> None:
    """And the next process goes on with it, or with any earlier memory, or with none."""
    truth = Truth(tmp_path, time.monotonic)
    try:
        truth.life = truth.begin(None)
        truth.life.start()
        first = publish(truth.life.server.url, "a", "b")
        truth.snapshot()
        second = publish(truth.life.server.url, "c")
        last = truth.kill()
        events = truth.journal.accepted["events.critical"]
        assert [event.event_id for event in events] == first + second
        assert [event.offset for event in events] == [1, 2, 3]

        truth.life = truth.begin(last, continues=True)
        truth.life.start()
        assert all(truth.is_stored(event) for event in events)
        publish(truth.life.server.url, "d")
        truth.pump()
        assert heads(truth) == [1, 2, 3, 4]
        assert len(truth.journal.epochs["events.critical"]) == 2

        truth.kill()
        life = truth.begin(truth.snapshots[-1])
        truth.lose(life)
        life.start()
        truth.life = life
        assert [truth.is_stored(event) for event in events] == [True, True, False, False]
        assert truth.journal.may_be_lost("events.critical", events[2].epoch, 3, time.monotonic())
        assert not truth.journal.may_be_lost("events.critical", events[1].epoch, 2, time.monotonic())
        assert life.ask("XLEN", "{events.critical}:log") == 2

        life.ask("FLUSHALL")
        truth.pump()
        assert not any(map(truth.is_stored, events))
    finally:
        truth.end()


def test_an_event_that_was_taken_back_leaves_its_place_to_another(tmp_path: Path) -> None:
    """What Redis stored, but refused to publish."""
    truth = Truth(tmp_path, time.monotonic)
    try:
        truth.life = life = truth.begin(None)
        life.start()
        publish(life.server.url, "a")
        entry = ("XADD", "{events.critical}:log", "2-0", "e")
        life.ask(*entry, '{"event_id":"taken back"}')
        life.ask("XDEL", "{events.critical}:log", "2-0")
        life.ask("XSETID", "{events.critical}:log", "1-0")
        publish(life.server.url, "b")
        truth.pump()
        assert [event.offset for event in truth.journal.accepted["events.critical"] if truth.is_stored(event)] == [
            1,
            2,
        ]
    finally:
        truth.end()


def test_a_step_that_is_cut_has_not_happened() -> None:
    step = b"*1\r\n$5\r\nMULTI\r\n*2\r\n$3\r\nDEL\r\n$1\r\na\r\n*1\r\n$4\r\nEXEC\r\n"
    one = b"*2\r\n$3\r\nDEL\r\n$1\r\nb\r\n"
    assert list(units(step + one)) == [([[b"DEL", b"a"]], len(step)), ([[b"DEL", b"b"]], len(step + one))]
    for cut in range(len(step)):
        assert list(units(step[:cut])) == []
    for cut in range(len(one)):
        assert list(units(step + one[:cut])) == [([[b"DEL", b"a"]], len(step))]


def test_every_kind_of_fault_is_drawn() -> None:
    assert {fault.kind for seed in range(300) for fault in draw(seed).faults} == set(KINDS)
    assert draw(7) == draw(7) != draw(8)


# Whole seeds

CHAOS = (sys.executable, "-m", "tests.chaos")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [6])
def test_a_seed_breaks_no_promise(seed: int) -> None:
    """In a process of its own: it says what was done, if it fails."""
    done = subprocess.run([*CHAOS, "--seed", str(seed)], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"make chaos SEED={seed}\n{done.stdout[-20_000:]}{done.stderr}"
    assert "deliveries 0," not in done.stdout
    assert done.stdout.rstrip().endswith("failures 0")


@pytest.mark.slow
def test_nothing_is_left_after_an_interrupt(tmp_path: Path) -> None:
    """No process, no folder."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*CHAOS, "--first", "6", "--minutes", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            eventually(lambda: len(of_folder(tmp_path)) > 5, "nothing has begun", 30)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=20 * UNIT_S)
        finally:
            process.kill()
    assert process.returncode == 130, said.decode()
    eventually(lambda: not of_folder(tmp_path), "something has not ended")
    assert not list(tmp_path.glob("chaos-*"))


def of_folder(folder: Path) -> list[int]:
    """The processes that were given a folder for what is temporary, but for the first one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"TMPDIR={folder}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found

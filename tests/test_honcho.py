"""The two commands of the product, as they are typed: `honcho start` and `honcho -f Procfile.loadtest start`.

Everything runs in a folder of its own, on free ports. What goes wrong in a load test goes wrong in several at the
same time, because most of them wait.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support import ROOT, UNIT_S, WHOLE_RUN_S, Running, eventually, finished, free_port
from tests.test_prose import commands, complaint_about

KILL_WAIT_S = 5.0
"""honcho kills what is left this long after the first process has ended."""


CALM = {"BROADCASTER_REPORT__ALLOW_INVALID": "true", "BROADCASTER_REPORT__PICTURES": "false"}
"""The tests share their cores: their runs are INVALID, and to draw takes long."""


def site(folder: Path) -> Path:
    """A folder with what a user has: both Procfiles, broadcaster.toml and the presets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Procfile", "Procfile.loadtest", "broadcaster.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "config", folder / "config")
    return folder


class Honcho(Running):
    """`honcho ... start ...` on free ports."""

    program: tuple[str, ...] = (sys.executable, "-m", "honcho")

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.ports = free_port(), free_port()
        self.folder = folder
        super().__init__(
            *(*self.program, *arguments),
            cwd=folder,
            BROADCASTER_REDIS__URL=f"redis://127.0.0.1:{self.ports[0]}/0",
            BROADCASTER_HUB__PORT=str(self.ports[1]),
            **(CALM | variables),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End honcho; what it leaves, which a test has found wrong by then, is killed, each by its own id."""
        with contextlib.suppress(AssertionError):
            self.signal(signal.SIGTERM)
            self.wait(within=KILL_WAIT_S + 3)
        for _, pid in self.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        super().__exit__(kind, error, trace)

    def started(self) -> list[tuple[str, int]]:
        """The processes that honcho has started, with their ids."""
        return [(name, int(pid)) for name, pid in re.findall(r"(\S+) started \(pid=(\d+)\)", self.output)]

    def pid(self, name: str) -> int:
        """The process id of `hub.1` and so on, as honcho says it."""
        line = self.said(f"{name} started (pid=")
        return int(line.partition("(pid=")[2].rstrip(")"))

    def leftovers(self) -> list[str]:
        """What should be gone: processes that were started, honcho's own helpers, open ports."""
        left = [name for name, pid in self.started() if exists(os.kill, pid)]
        if exists(os.killpg, self.process.pid):
            left.append("a process of honcho's group")
        for port in self.ports:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                left.append(f"port {port}")
        return left

    def runs(self) -> list[Path]:
        """The folders of the runs that were made here."""
        return sorted(path for path in (self.folder / "results").glob("*") if path.is_dir())

    def printed(self, name: str) -> list[str]:
        """The lines of one process, without honcho's prefix."""
        prefix = re.compile(rf"\d\d:\d\d:\d\d {re.escape(name)} +\| ?")
        return [prefix.sub("", line, count=1) for line in self.lines if prefix.match(line)]


def exists(send: Callable[[int, int], None], number: int) -> bool:
    """Whether a signal could be sent to a process, or to a group of them."""
    try:
        send(number, 0)
    except ProcessLookupError:
        return False
    return True


def table_of(lines: list[str]) -> dict[str, list[str]]:
    """The cells of a printed report by the name of their line."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {row[0]: row[1:] for row in rows}


# honcho start


def test_honcho_start_shows_events_and_ends_cleanly(tmp_path: Path) -> None:
    """Soon events are seen with their latency; Ctrl-C ends everything within 5 s, rc 130, nothing is left."""
    with Honcho(site(tmp_path), "start") as system:
        date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
        line = rf"subscriber\.1 +\| {date} events.critical critical SERVER_DOWN server-a #%d -?\d+\.\d\d ms \{{"
        for number in (1, 2):
            seen = re.compile(line % number)
            eventually(lambda: any(map(seen.search, list(system.lines))), f"no #{number}:\n{system.output}")  # noqa: B023
        system.signal(signal.SIGINT)
        assert system.wait(within=5) == 130
        assert not system.leftovers()
    assert "Traceback" not in system.output
    stopped = dict(re.findall(r"(\S+) stopped \(rc=(-?\d+)\)", system.output))
    assert stopped == {"redis.1": "0", "hub.1": "0", "publisher.1": "0", "subscriber.1": "0"}
    assert any("0 missing, 0 gaps announced" in line for line in system.printed("subscriber.1"))
    assert_quiet(system)
    shown = system.printed("publisher.1")
    begin = shown.index("In another terminal, in this folder:")
    typed = [line.strip() for line in shown[begin + 1 :] if line.startswith("  ")]
    assert len([words for line in typed for words in commands(line) if complaint_about(words) is None]) >= 2
    assert re.search("BROADCASTER_HUB__PORT.*BROADCASTER_REDIS__URL", system.output)


def assert_quiet(system: Honcho) -> None:
    """What starts and ends in good order says nothing that looks like a fault."""
    assert not [line for line in system.lines if re.search(r"Errno|WARNING|oO0|Error|rror:", line)]
    assert len(system.printed("redis.1")) == 1


def test_honcho_start_ends_on_sigterm(tmp_path: Path) -> None:
    """SIGTERM to honcho, as soon as it has started everything, leaves nothing behind."""
    with Honcho(site(tmp_path), "start") as system:
        for name in ("redis.1", "hub.1", "publisher.1", "subscriber.1"):
            system.pid(name)  # before that honcho 2.0.0 itself fails (KeyError: 'pid') and leaves all of them
        system.signal(signal.SIGTERM)
        assert system.wait(within=KILL_WAIT_S + 2) == 143
        assert not system.leftovers()
    assert "Traceback" not in system.output


# honcho -f Procfile.loadtest start


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Honcho:
    """One good load test, which has ended."""
    folder = site(tmp_path_factory.mktemp("smoke"))
    with Honcho(
        folder, "-f", "Procfile.loadtest", "start", BROADCASTER_PRESET="smoke", BROADCASTER_REPORT__PICTURES="true"
    ) as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
        assert not run.leftovers()
    return run


def test_the_load_test_prints_its_report(smoke: Honcho) -> None:
    """The user's lines stand in the table, nothing was lost, and each latency is a number."""
    assert "Traceback" not in smoke.output
    table = table_of(smoke.printed("report.1"))
    counts = {"Clients": 5, "Events": 10, "Expected deliveries": 50, "Received deliveries": 50,
              "Dropped deliveries": 0, "Duplicates": 0, "Out of order": 0, "Disconnects": 0}  # fmt: skip
    assert {name: table[name] for name in counts} == {name: [str(count)] for name, count in counts.items()}
    latencies = [float(table[f"{which} latency (ms)"][0]) for which in ("p50", "max")]
    assert latencies == sorted(latencies)
    assert {table[f"{which} latency (ms)"][0] for which in ("p95", "p99")} == {"-"}, "of 50 deliveries"
    assert latencies[0] > 0
    assert any(line.startswith("PASSED") for line in smoke.printed("report.1"))
    assert "all 10 stored and heard" in smoke.printed("publisher.1")
    assert_quiet(smoke)


def test_the_load_test_leaves_its_files(smoke: Honcho) -> None:
    """One folder for the run: settings, what was published, what was received, the hub's counters, a summary."""
    [folder] = smoke.runs()
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert files == {"broadcaster.toml", "published.csv", "deliveries.1.csv", "losses.1.csv", "fleet.1.json",
                     "hub.json", "machine.json", "publisher.json", "rig.csv", "summary.csv",
                     "summary.json", "report.html", "trace.1.csv", "clocks.publisher.csv",
                     "clocks.fleet.1.csv"}  # fmt: skip
    config = tomllib.loads((folder / "broadcaster.toml").read_text())
    assert (config["fleet"]["clients"], config["hub"]["port"]) == (5, smoke.ports[1])
    published, deliveries = rows_of(folder / "published.csv"), rows_of(folder / "deliveries.1.csv")
    assert [row["sequence"] for row in published] == [str(number) for number in range(1, 11)]
    assert {row["heard"] for row in published} == {"1"}
    assert len(deliveries) == 50
    assert json.loads((folder / "hub.json").read_text())["events_received"] == 10 + 10, "with the warm-up"
    assert {row["client"] for row in deliveries} == {"0", "1", "2", "3", "4"}
    assert {row["event_id"] for row in deliveries} == {row["event_id"] for row in published}
    intended = [int(row["intended_mono_ns"]) for row in published]
    assert [due - intended[0] for due in intended] == [number * 100_000_000 for number in range(10)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_load_test_is_in_the_archive(smoke: Honcho) -> None:
    """The archive has one row for it, the same as the first of its summary."""
    [folder] = smoke.runs()
    archived = rows_of(folder.parent / "archive.csv")
    assert archived == rows_of(folder / "summary.csv")[:1]
    row = archived[0]
    assert (row["run"], row["scope"], row["verdict"]) == (folder.name, "run", "PASSED")
    assert (row["clients"], row["events"], row["received"], row["dropped"]) == ("5", "10", "50", "0")


def test_the_report_can_be_printed_again(smoke: Honcho) -> None:
    """`broadcaster report results/<run>` prints the same from the files, ends as the run did, and adds no row."""
    [folder] = smoke.runs()
    again = finished("report", f"results/{folder.name}", cwd=smoke.folder)
    assert (again.code, again.stderr) == (0, "")
    assert f"What the lines mean: broadcaster report results/{folder.name} --explain" in again.stdout
    printed = smoke.printed("report.1")
    printed.remove("One row added to results/archive.csv")
    printed.remove(f"Pictures: results/{folder.name}/report.html")
    assert again.stdout.splitlines() == [line for line in printed if not re.match(r"\d+ of \d+ events, ", line)]
    explained = finished("report", f"results/{folder.name}", "--explain", cwd=smoke.folder).stdout
    assert "Dropped: a delivery that was expected" in explained
    assert "What the lines mean" not in explained
    assert len(rows_of(folder.parent / "archive.csv")) == 1


def test_a_second_run_adds_a_second_row(smoke: Honcho, tmp_path: Path) -> None:
    """Another load test beside it, with two fleet processes: a folder of its own, a row, a column per process."""
    shutil.copytree(smoke.folder, tmp_path, dirs_exist_ok=True)
    [first] = smoke.runs()
    arguments = ("-f", "Procfile.loadtest", "start", "-c", "fleet=2")
    with Honcho(tmp_path, *arguments, BROADCASTER_PRESET="smoke", BROADCASTER_FLEET__PROCESSES="2") as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
        assert not run.leftovers()
    folders = run.runs()
    assert len(folders) == 2
    assert folders[0].name == first.name
    table = table_of(run.printed("report.1"))
    assert table[""] == ["whole run", "fleet.1", "fleet.2"]
    assert table["Clients"] == ["5", "2", "3"]
    assert table["Received deliveries"] == ["50", "20", "30"]
    assert [len(rows_of(folders[1] / f"deliveries.{number}.csv")) for number in (1, 2)] == [20, 30]
    archived = rows_of(tmp_path / "results" / "archive.csv")
    assert [row["run"] for row in archived] == [folder.name for folder in folders]
    assert [row["scope"] for row in rows_of(folders[1] / "summary.csv")] == ["run", "fleet.1", "fleet.2"]


# What goes wrong

Act = Callable[[Honcho], None]


def do_nothing(run: Honcho) -> None:
    """Everything needed is in the settings."""


def while_publishing(name: str, number: signal.Signals) -> Act:
    """Send a signal to a process once deliveries flow."""

    def act(run: Honcho) -> None:
        run.said("publishing 40 events")
        time.sleep(0.3)  # some of them are under way
        os.kill(run.pid(name), number)

    return act


def before_the_start(name: str, number: signal.Signals) -> Act:
    """Send a signal to a process as soon as there is one."""

    def act(run: Honcho) -> None:
        os.kill(run.pid(name), number)

    return act


@dataclass(frozen=True)
class Scenario:
    """A load test with a fault.

    Attributes:
        codes: What honcho may return; None is anything but 0.
        words: What must be said.
        act: What is done to it.
        arguments, variables: How it is started.
    """

    name: str
    codes: tuple[int, ...] | None
    words: str
    act: Act = do_nothing
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


SCENARIOS = [
    Scenario("too_few_fleet_processes", (78,), "fleet.processes is 2, but there is no fleet.2",
             variables={"BROADCASTER_FLEET__PROCESSES": "2", "BROADCASTER_LOADTEST__START_TIMEOUT_S": "30"}),
    Scenario("hub_frozen_at_the_start", (69,), "waited", before_the_start("hub.1", signal.SIGSTOP)),
    Scenario("hub_frozen", (1, 69), "dropped deliveries", while_publishing("hub.1", signal.SIGSTOP)),
    Scenario("broken_limit", (1,), "FAILED: p99 is", variables={"BROADCASTER_REPORT__MAX_P99_MS": "0.0001"}),
    Scenario("hub_killed", None, "hub.1 stopped (rc=-9)", while_publishing("hub.1", signal.SIGKILL)),
    Scenario("publisher_killed", None, "publisher.1 stopped (rc=-9)",
             while_publishing("publisher.1", signal.SIGKILL)),
    Scenario("redis_killed", None, "redis.1 stopped (rc=-9)", while_publishing("redis.1", signal.SIGKILL)),
    Scenario("too_many_fleet_processes", (78,), "this is fleet.2, but fleet.processes is 1",
             arguments=("-c", "fleet=2")),
    Scenario("too_many_hubs", (78,), "this is hub.2, but hub.processes is 1", arguments=("-c", "hub=2")),
    Scenario("too_few_hubs", (78,), "has no hub.3; start honcho with -c hub=3", arguments=("-c", "hub=2"),
             variables={"BROADCASTER_HUB__PROCESSES": "3", "BROADCASTER_PUBLISHER__START_TIMEOUT_S": "6",
                        "BROADCASTER_LOADTEST__START_TIMEOUT_S": "30"}),
]  # fmt: skip

HURRY = {
    "BROADCASTER_FLEET__CLIENTS": "5",
    "BROADCASTER_FLEET__DRAIN_S": "0.5",
    "BROADCASTER_LOADTEST__EVENTS": "40",
    "BROADCASTER_LOADTEST__RATE_HZ": "20",
    "BROADCASTER_LOADTEST__START_TIMEOUT_S": str(10 * UNIT_S),
    "BROADCASTER_REPORT__TIMEOUT_S": str(UNIT_S),
}
"""Deadlines as short as a busy machine allows."""


@dataclass(frozen=True)
class Ended:
    """How a load test ended."""

    code: int
    output: str
    report: list[str]
    leftovers: list[str]


def play(scenario: Scenario, folder: Path) -> Ended:
    """Run one load test with its fault to its end."""
    arguments = ("-f", "Procfile.loadtest", "start", *scenario.arguments)
    with Honcho(site(folder), *arguments, **(HURRY | scenario.variables)) as run:
        scenario.act(run)
        code = run.wait(within=WHOLE_RUN_S)
        leftovers = run.leftovers()
    return Ended(code, run.output, run.printed("report.1"), leftovers)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_ends_the_load_test_red(scenario: Scenario, tmp_path: Path) -> None:
    """Whatever dies, freezes or disagrees: the run ends, not green, with the reason, and leaves nothing."""
    ended = play(scenario, tmp_path)
    assert ended.code != 0, ended.output
    assert scenario.codes is None or ended.code in scenario.codes, ended.output
    assert scenario.words in ended.output, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert "PASSED" not in ended.output
    assert not ended.leftovers

"""A run: one folder, found by all its processes without being told, and by nobody else."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from broadcaster.core.errors import ConfigurationError
from broadcaster.loadtest.report.collect import check_results, planned_s
from broadcaster.loadtest.run import Run, locked
from broadcaster.loadtest.target import check_url
from broadcaster.settings import LoadtestTable, load
from tests.support import ROOT, Running, clean_environment, eventually, finished, free_port

PRINT_FOLDER = """
from broadcaster.loadtest.run import Run
from broadcaster.settings import load
print("FOLDER", Run.current(load().settings.loadtest).folder, flush=True)
import time
time.sleep(60)
"""


def honcho(folder: Path, *arguments: str, **variables: str) -> Running:
    """`honcho start` of a Procfile with one kind of process, which prints the folder of its run."""
    (folder / "print_folder.py").write_text(PRINT_FOLDER)
    (folder / "Procfile").write_text(f"part: exec {sys.executable} print_folder.py\n")
    command = (sys.executable, "-m", "honcho", "start", *arguments)
    return Running(*command, cwd=folder, PYTHONPATH=str(ROOT), **variables)


def folders_of(running: Running, count: int) -> set[str]:
    """The folders that the processes name, once all have."""

    def look() -> list[str]:
        return [line.partition("FOLDER ")[2] for line in list(running.lines) if "FOLDER " in line]

    eventually(lambda: len(look()) == count, f"not all have spoken:\n{running.output}")
    return set(look())


def test_all_processes_of_one_honcho_find_one_folder(tmp_path: Path) -> None:
    """Processes that start at the same moment agree; a second honcho beside them has a folder of its own."""
    with honcho(tmp_path, "-c", "part=4") as first, honcho(tmp_path, "-c", "part=2") as second:
        folders = folders_of(first, 4), folders_of(second, 2)
    assert [len(found) for found in folders] == [1, 1]
    assert folders[0] != folders[1]
    made = [path for path in (tmp_path / "results").iterdir() if path.is_dir()]
    assert {str(path.relative_to(tmp_path)) for path in made} == folders[0] | folders[1]


def test_folders_sort_by_time(tmp_path: Path) -> None:
    """The name begins with date and time, so that a listing is in the order of the runs."""
    run = Run.current(LoadtestTable(results=str(tmp_path)))
    date, time, *starter = run.name.split("-")
    assert (len(date), len(time)) == (8, 6)
    assert (date + time + "".join(starter)).isdigit()
    assert len(starter) == 2


def test_the_same_process_finds_its_folder_again(tmp_path: Path) -> None:
    """Asked twice, it is the same folder; the parents of the folder are made."""
    table = LoadtestTable(results=str(tmp_path / "a" / "b"))
    first = Run.current(table)
    assert Run.current(table) == first
    assert first.folder.is_dir()
    assert first.folder.parent == tmp_path / "a" / "b"


def test_an_explicit_name_is_the_name_of_the_folder(tmp_path: Path) -> None:
    """`loadtest.run` names the folder, whoever asks."""
    run = Run.current(LoadtestTable(results=str(tmp_path), run="nightly-1.2"))
    assert (run.folder, run.name) == (tmp_path / "nightly-1.2", "nightly-1.2")
    with honcho(tmp_path, "-c", "part=2", BROADCASTER_LOADTEST__RUN="named") as running:
        assert folders_of(running, 2) == {"results/named"}


def test_the_files_of_a_run_stand_in_its_folder(tmp_path: Path) -> None:
    """Every file has its own name inside of the folder."""
    run = Run(tmp_path)
    files = [run.published, run.config, run.hub, run.machine, run.summary]
    files += [
        path
        for number in (1, 2)
        for path in (run.deliveries(number), run.losses(number), run.fleet(number), run.present(number))
    ]
    assert {path.parent for path in files} == {tmp_path}
    assert len({path.name for path in files}) == len(files)
    assert (run.deliveries(2).name, run.losses(2).name) == ("deliveries.2.csv", "losses.2.csv")


def test_results_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    """A file where the folder should be is a ConfigurationError that names the key; one line, exit code 78."""
    (tmp_path / "results").write_text("")
    with pytest.raises(ConfigurationError, match=r"loadtest\.results"):
        Run.current(LoadtestTable(results=str(tmp_path / "results")))
    ended = finished("fleet", "--loadtest", cwd=tmp_path, BROADCASTER_HUB__PORT=str(free_port()))
    assert ended.code == 78
    assert "loadtest.results" in ended.complaint


FOLDERS = {
    "a_file_in_its_place": ("results", "is a file, and should be a folder"),
    "a_file_above_it": ("results/deep/er", "is a file, and should be a folder"),
    "read_only": ("/proc/results", "no such file"),
    "full": ("full", "file too large"),
}


@pytest.mark.parametrize(
    "command", ["loadtest", "hub --loadtest", "publisher --loadtest", "fleet --loadtest", "report --loadtest"]
)
@pytest.mark.parametrize(("results", "said"), FOLDERS.values(), ids=FOLDERS.keys())
def test_results_that_cannot_be_kept_are_refused_before_the_run(
    command: str, results: str, said: str, tmp_path: Path
) -> None:
    """One line that names the key and the place, exit code 78, and nothing was begun."""
    (tmp_path / "results").write_text("")
    ended = limited(command, tmp_path, BROADCASTER_LOADTEST__RESULTS=results, BROADCASTER_LOADTEST__RUN="x")
    assert (ended.returncode, ended.stdout) == (78, "")
    assert re.fullmatch(rf"error: loadtest\.results: .*{said}[^\n]*\n", ended.stderr)


def limited(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that may write only a few bytes into any file."""
    return subprocess.run(
        ["bash", "-c", f"ulimit -f 1; exec {sys.executable} -m broadcaster {command}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=folder,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables,
    )


NAMES = ["..", ".", "a/b", "/tmp/x", ".hidden", "archive.csv", "a b", "x" * 65, "a\n", "ö"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    """In words, without a pattern; the name of a run never leads out of the results."""
    with pytest.raises(ConfigurationError, match=r"^loadtest\.run: should be a name for a folder") as refused:
        load(overrides={"loadtest": {"run": name}})
    assert not re.search(r"[{}^$]|pattern", str(refused.value))


SELECTIONS = {
    "type=A": "type",
    "channel=events.critical&source=a": "source",
    "severity=info&severity=warning&type=A": "type, severity",
    "since=1h": "since",
    "last=5": "last",
}


@pytest.mark.parametrize(("query", "names"), SELECTIONS.items(), ids=SELECTIONS)
def test_an_address_that_does_not_ask_for_every_event_is_refused(query: str, names: str) -> None:
    """What a subscriber had not asked for could not be told from what was lost."""
    with pytest.raises(ConfigurationError, match=rf"^fleet\.url: has {names}, but in a load test "):
        check_url(load(overrides={"fleet": {"url": f"ws://h/ws?{query}"}}).settings)
    for allowed in ("", "?channel=events.a", "?_=1"):
        check_url(load(overrides={"fleet": {"url": f"ws://h/ws{allowed}"}}).settings)


@pytest.mark.parametrize("command", ["loadtest", "publisher --loadtest", "fleet --loadtest", "report --loadtest"])
def test_such_an_address_is_told_by_every_part(command: str, tmp_path: Path) -> None:
    """One line, exit code 78, and no row in the archive."""
    url = f"ws://127.0.0.1:{free_port()}/ws?severity=info"
    ended = finished(*command.split(), cwd=tmp_path, BROADCASTER_FLEET__URL=url)
    assert (ended.code, ended.stdout) == (78, "")
    assert ended.complaint.startswith("fleet.url: has severity, but")
    assert not (tmp_path / "results" / "archive.csv").exists()


def test_all_that_a_run_may_take_is_planned() -> None:
    """The report does not give up while a part does what it was asked for."""

    def planned(*, events: int = 100, warmup: int = 0, rate_hz: float = 10, deadline_s: float = 1) -> float:
        schedule = {"events": events, "rate_hz": rate_hz, "warmup_events": warmup, "start_timeout_s": 7}
        fleet = {"clients": 500, "ramp_per_s": 100, "drain_s": 2}
        publisher = {"publish_deadline_s": deadline_s}
        return planned_s(load(overrides={"loadtest": schedule, "fleet": fleet, "publisher": publisher}).settings)

    assert planned() >= 7 + 500 / 100 + 100 / 10 + 1 + 2
    assert planned(warmup=5000) >= planned() + 5000 * 0.02
    assert planned(deadline_s=20) >= planned() + 18.9
    assert planned(rate_hz=0) < planned() - 9.9


def test_a_disk_that_is_too_small_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run will write is compared with what is left."""
    settings = load(
        overrides={"loadtest": {"results": str(tmp_path), "events": 1000}, "fleet": {"clients": 1000}}
    ).settings
    usage = SimpleNamespace(total=10**12, free=110_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigurationError, match=r"has 110\.0 MB left, and 1000 events to 1000 clients take"):
        check_results(settings)
    usage.free *= 2
    check_results(settings)
    usage.total = usage.free = 0
    check_results(settings)


LONELY = """
import os, subprocess, sys
from broadcaster.loadtest import run
from broadcaster.settings import load
{without}
table = load().settings.loadtest
print(run.Run.current(table) == run.Run.current(table), run.Run.current(table).has_started(1))
"""
NO_PROC = "run.Path = lambda path: __import__('pathlib').Path(path.replace('/proc/', '/nowhere/'))"
WITHOUT = {
    "a_parent": "run._parent_and_start = {os.getpid(): (0, '5')}.__getitem__",
    "honcho": "os.environ['HONCHO_PROCESS_NAME'] = 'fleet.1'; "
    "run._parent_and_start = {os.getpid(): (7, '5'), 7: (0, '5')}.__getitem__",
    "proc_and_ps": f"{NO_PROC}; os.environ['PATH'] = ''",
    "a_ps_that_knows_the_options": f"{NO_PROC}; subprocess.run = lambda *a, **b: subprocess.check_call(['false'])",
}


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT.keys())
def test_the_only_process_of_a_container_has_a_run(without: str, tmp_path: Path) -> None:
    """Its name has another source, the same at each look; how parts find each other is said once."""
    done = subprocess.run(
        [sys.executable, "-c", LONELY.format(without=without)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "True False\n"
    assert done.stderr.count("give all parts of a run the same loadtest.run") == 1
    [folder] = [path for path in (tmp_path / "results").iterdir() if path.is_dir()]
    assert re.fullmatch(r"\d{8}-\d{6}-\d+-\d+", folder.name)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    """Inside of the block nobody else gets the lock; afterwards everybody may."""
    path = tmp_path / "lock"
    with locked(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(path):
        assert path.exists()

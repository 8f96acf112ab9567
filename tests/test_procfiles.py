"""`broadcaster demo`, `loadtest` and `init`: what the Procfiles do, in a folder that has none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from broadcaster.redis.server import RedisServer
from tests.support import ROOT, WHOLE_RUN_S, HubProcess, RedisClient, eventually, finished
from tests.test_honcho import Honcho, rows_of, table_of

FILES = {
    *("Procfile", "Procfile.loadtest", "broadcaster.toml"),
    *("config/burst.toml", "config/fanout.toml", "config/smoke.toml", "config/redis.acl"),
    *("config/nginx.conf", "config/haproxy.cfg", "config/broadcaster-hub@.service"),
}


class Whole(Honcho):
    """`broadcaster ...` for a whole system on free ports, where PATH has no command of this product."""

    program: tuple[str, ...] = (
        "/usr/bin/env",
        "PATH=/usr/bin:/bin",
        str(Path(sys.executable).parent / "broadcaster"),
    )


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_demo_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """Four processes, events soon, options for all of them; Ctrl-C ends everything, and no file is left."""
    with Whole(tmp_path, "--set", "publisher.source=server-z", "demo") as system:
        system.said("SERVER_DOWN server-z #2", within=WHOLE_RUN_S)
        assert {name for name, _ in system.started()} == {"redis.1", "hub.1", "publisher.1", "subscriber.1"}
        system.signal(signal.SIGINT)
        assert system.wait(within=6) == 130
        assert not system.leftovers()
    assert "Traceback" not in system.output
    assert not files_in(tmp_path)


class Shell(Whole):
    """The same, typed into a shell: `"$@"` in the line is the command."""

    def __init__(self, line: str, folder: Path, *arguments: str) -> None:
        self.program = ("bash", "-c", line, "bash", *Whole.program)
        super().__init__(folder, *arguments)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for pid in self.parts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def parts(self) -> list[int]:
        """All its processes, whether it has named them or not: those with its port in their environment."""
        mine, found = f"BROADCASTER_HUB__PORT={self.ports[1]}".encode(), []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mine in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found


@pytest.mark.parametrize("command", [("demo",), ("loadtest", "--preset", "smoke")], ids=["demo", "loadtest"])
def test_who_reads_some_lines_only_ends_it(command: tuple[str, ...], tmp_path: Path) -> None:
    """Behind `| head` all parts end, and then the command, with 0."""
    with Shell('"$@" | head -4; echo "ended with ${PIPESTATUS[0]}"', tmp_path, *command) as system:
        assert system.wait(within=20) == 0
        assert not system.parts()
    assert system.lines[-1] == "ended with 0"
    assert "Traceback" not in system.output


def test_a_reader_that_reads_nothing_stops_no_signal(tmp_path: Path) -> None:
    """Where the output is blocked, SIGTERM ends all parts nevertheless."""
    # The reader takes the first line, which is that all is under way, and then sleeps, with the pipe open.
    line = 'exec 3> >(read line; echo "$line"; exec sleep 60); exec "$@" >&3'
    with Shell(line, tmp_path, "--set", "publisher.rate_hz=2000", "demo") as system:
        system.said("started")

        def is_blocked() -> bool:
            call = Path(f"/proc/{system.process.pid}/syscall").read_text().split()
            return call[:2] == ["1", "0x1"]  # write to standard output

        seen = 0
        while seen < 5:  # again and again: it writes all the time
            eventually(is_blocked, f"it goes on:\n{system.output}", within=WHOLE_RUN_S)
            seen = seen + 1 if is_blocked() else 0
            time.sleep(0.05)
        system.signal(signal.SIGTERM)
        assert system.wait(within=10) == 143
        assert not [pid for pid in system.parts() if "broadcaster" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 15])
def test_ctrl_c_in_the_first_moment_ends_all(milliseconds: int, tmp_path: Path) -> None:
    """While the parts are being started, and none has said its pid."""
    with Shell('exec "$@"', tmp_path, "demo") as system:
        pid = system.process.pid
        eventually(Path(f"/proc/{pid}/task/{pid}/children").read_text, "no part was started")
        time.sleep(milliseconds / 1000)
        os.killpg(pid, signal.SIGINT)
        assert system.wait(within=10) == 130
        assert not system.parts()
    assert "bug" not in system.output
    assert "Traceback" not in system.output


def test_a_closed_terminal_ends_all(tmp_path: Path) -> None:
    """SIGHUP goes to all that the terminal has, and ends everything as SIGTERM does."""
    with Shell('exec env --default-signal=HUP "$@"', tmp_path, "demo") as system:  # whatever these tests ignore
        system.said("#2", within=WHOLE_RUN_S)
        os.killpg(system.process.pid, signal.SIGHUP)
        assert system.wait(within=6) == 129
        assert not system.parts()
    stopped = dict(re.findall(r"(\S+) stopped \(rc=(-?\d+)\)", system.output))
    assert stopped == {"redis.1": "0", "hub.1": "0", "publisher.1": "0", "subscriber.1": "0"}


def test_under_nohup_it_outlives_the_terminal(tmp_path: Path) -> None:
    with Shell('trap "" HUP; exec "$@"', tmp_path, "demo") as system:
        system.said("#2", within=WHOLE_RUN_S)
        os.killpg(system.process.pid, signal.SIGHUP)
        before = len(system.lines)
        eventually(lambda: len(system.lines) > before + 1, "it has ended")
        system.signal(signal.SIGTERM)
        assert system.wait(within=6) == 143


def test_a_load_test_runs_in_an_empty_folder(tmp_path: Path) -> None:
    """With a preset of the package and options above it; it leaves its results there, and imports nothing."""
    (tmp_path / "redis.py").write_text("raise AssertionError('imported')")
    options = ("--clients", "4", "--events", "6", "--rate", "0", "--processes", "2")
    with Whole(tmp_path, "loadtest", "--preset", "smoke", *options) as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
        assert not run.leftovers()
    table = table_of(run.printed("report.1"))
    assert (table["Clients"], table["Events"]) == (["4", "2", "2"], ["6", "6", "6"])
    [row] = rows_of(tmp_path / "results" / "archive.csv")
    assert (row["clients"], row["rate_hz"]) == ("4", "0.0")


def test_a_load_test_ends_with_the_exit_code_of_its_run(tmp_path: Path) -> None:
    """A limit that is broken is 1, and the results stand in the folder that was given."""
    arguments = ("--set", "report.max_p99_ms=0.0001", "loadtest", "--preset", "smoke", "--results", "elsewhere")
    with Whole(tmp_path, *arguments) as run:
        assert run.wait(within=WHOLE_RUN_S) == 1, run.output
    assert len(list((tmp_path / "elsewhere").glob("*/summary.csv"))) == 1


SMOKE = ("loadtest", "--preset", "smoke", "--events", "4", "--rate", "0")


def test_a_load_test_looks_like_no_outage(redis: RedisServer, publish: RedisClient, tmp_path: Path) -> None:
    """On a Redis that runs already its events go to a channel of the run, whatever clients are allowed."""
    arguments = ("--set", f"redis.url={redis.url}", "--set", 'channels.allow=["none"]', *SMOKE)
    with Whole(tmp_path, *arguments) as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
    [folder] = run.runs()
    assert publish.command("XLEN", f"{{events.loadtest.{folder.name}}}:log") == 4 + 10, "with the warm-up"
    assert publish.command("XLEN", "{events.critical}:log") == 0


def test_a_load_test_leaves_the_hub_of_others_alone(redis: RedisServer, tmp_path: Path) -> None:
    """A neighbour on the port is named by its process, with the way out; no subscriber comes to it."""
    with HubProcess(redis.url) as hub:
        stats = hub.until_ready().stats()
        arguments = ("--set", f"redis.url={redis.url}", *SMOKE, "--port", str(hub.port))
        with Whole(tmp_path, *arguments) as run:
            assert run.wait(within=WHOLE_RUN_S) == 69, run.output
        who = f"(pid {stats['pid']}, version {stats['version']})"
        assert f"{hub.port} is taken by another hub {who}; --port takes another one" in run.output
        assert (hub.stats()["opened"], hub.stats()["events_received"]) == (0, 0)
    assert "Traceback" not in run.output


def test_a_load_test_without_a_port_for_its_redis_is_told_what_to_do(tmp_path: Path) -> None:
    """Something that is no Redis has it: that is no limit that is broken, but 69."""
    with Whole(tmp_path, *SMOKE) as run, socket.create_server(("127.0.0.1", run.ports[0])):
        assert run.wait(within=WHOLE_RUN_S) == 69, run.output
    assert f"127.0.0.1:{run.ports[0]} is in use by something that does not answer as a Redis" in run.output
    assert "Traceback" not in run.output


KEY = "0123456789abcdef0123456789abcdef"


def test_a_load_test_brings_a_token_of_its_own(tmp_path: Path) -> None:
    """Where it has a key that can sign."""
    keys = json.dumps([{"algorithm": "HS256", "key": KEY}])
    variables = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__JWT_KEYS": keys}
    with Whole(tmp_path, *SMOKE, **variables) as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
    assert KEY not in run.output


def test_a_load_test_without_a_token_says_so_at_once(tmp_path: Path) -> None:
    """The hub's 401 ends it: nothing is tried again for half a minute."""
    keys = json.dumps([{"name": "wall", "key": KEY, "subscribe": ["events.*"]}])
    variables = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__API_KEYS": keys}
    with Whole(tmp_path, *SMOKE, **variables) as run:
        assert run.wait(within=25) == 69, run.output
    assert "no subscriber could connect to" in run.output
    assert "401" in run.output


WRONG = {
    "a preset that is not there": ("loadtest", "--preset", "nonsense"),
    "a value of a wrong kind": ("--set", "hub.port=abc", "demo"),
    "a key that is not there": ("--set", "hub.prt=1", "loadtest"),
    "a file that is not there": ("--config", "nowhere.toml", "demo"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_before_anything_starts(arguments: tuple[str, ...]) -> None:
    """One line and exit code 78, not one of each process."""
    ended = finished(*arguments)
    assert (ended.code, ended.stdout) == (78, "")
    assert re.search(r"nonsense.*known: burst, fanout, smoke|abc|hub\.prt|nowhere\.toml", ended.complaint)


# broadcaster init


def test_init_writes_what_the_product_needs(tmp_path: Path) -> None:
    """The files at the top of the repository, byte for byte, also into a folder that is to be made."""
    assert finished("init", "a/b", cwd=tmp_path).code == 0
    assert files_in(tmp_path / "a" / "b") == FILES
    for name in FILES:
        assert (tmp_path / "a" / "b" / name).read_bytes() == (ROOT / name).read_bytes()
    assert finished("init", cwd=tmp_path).code == 0
    assert files_in(tmp_path) == FILES | {f"a/b/{name}" for name in FILES}


@pytest.mark.parametrize("there", [("broadcaster.toml",), ("config/burst.toml", "Procfile")], ids=["one", "two"])
def test_init_overwrites_nothing(there: tuple[str, ...], tmp_path: Path) -> None:
    """One file that is there, and nothing is written; with --force everything is."""
    (tmp_path / "config").mkdir()
    for name in there:
        (tmp_path / name).write_text("mine")
    ended = finished("init", cwd=tmp_path)
    assert ended.code == 78
    assert all(name in ended.complaint for name in (*there, "--force"))
    assert files_in(tmp_path) == set(there)
    assert {(tmp_path / name).read_text() for name in there} == {"mine"}
    assert finished("init", "--force", cwd=tmp_path).code == 0
    assert files_in(tmp_path) == FILES
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in FILES)


def test_init_says_what_it_cannot_write(tmp_path: Path) -> None:
    """Where a file stands in the place of a folder: one line that names it, exit code 78."""
    (tmp_path / "config").write_text("")
    ended = finished("init", cwd=tmp_path)
    assert (ended.code, "config" in ended.complaint) == (78, True)
    ended = finished("init", "config", cwd=tmp_path)
    assert (ended.code, "config" in ended.complaint) == (78, True)


def test_what_init_wrote_is_what_is_read(tmp_path: Path) -> None:
    """In such a folder its own presets come first; those of the package are there for the others."""
    assert finished("init", cwd=tmp_path).code == 0
    (tmp_path / "config" / "burst.toml").write_text("[loadtest]\nevents = 7\n")
    (tmp_path / "config" / "smoke.toml").unlink()
    assert "events = 7 " in finished("--preset", "burst", "config", "show", cwd=tmp_path).stdout
    assert "events = 10 " in finished("--preset", "smoke", "config", "show", cwd=tmp_path).stdout

"""The command line, as a person uses it: real processes, exit codes, and what stands on which stream."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from broadcaster import Event, Fresh, Gap, Position, Publisher, Settings, Stale
from broadcaster.cli import cli, events
from broadcaster.cli.common import program
from broadcaster.cli.output import as_json_line, describe, watch
from broadcaster.cli.resume_file import ResumeFile
from broadcaster.core import process
from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.event import decode
from broadcaster.core.position import OLDEST, Cause
from broadcaster.core.runtime import CLOCK
from broadcaster.core.version import VERSION
from broadcaster.redis.presence import answers
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable
from broadcaster.subscribe.status_events import Received
from tests.support import (
    CommandLine,
    Finished,
    HubProcess,
    HubThread,
    RedisClient,
    Running,
    broadcaster,
    clean_environment,
    event_payload,
    eventually,
    finished,
    free_port,
    in_loop,
    next_message,
    redis_client,
)
from tests.test_prose import commands, complaint_about


@dataclass(frozen=True)
class System:
    """A Redis and a hub that all tests of this file share; each leaves them as they are."""

    redis: RedisServer
    hub: HubProcess

    @property
    def variables(self) -> dict[str, str]:
        return {"BROADCASTER_REDIS__URL": self.redis.url, "BROADCASTER_HUB__PORT": str(self.hub.port)}

    def run(self, *arguments: str) -> Finished:
        variables = self.variables
        return finished(*arguments, cwd=None, within=20, **variables)

    @contextlib.contextmanager
    def subscribe(self, *arguments: str) -> Iterator[Running]:
        """`broadcaster subscribe ...`, connected, and its channels are open."""
        before = self.hub.stats()["connected"]
        wanted = {value for name, value in itertools.pairwise(arguments) if name == "--channel"}

        def is_served() -> bool:
            stats = self.hub.stats()
            opened = {name for name, channel in stats["channels"].items() if channel["position"]}
            return stats["connected"] > before and wanted <= opened

        with broadcaster("subscribe", *arguments, **self.variables) as running:
            eventually(is_served, f"not connected:\n{running.output}")
            yield running


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with RedisServer.start() as redis, HubProcess(redis.url) as hub:
        yield System(redis, hub.until_ready())


@pytest.fixture
def client(system: System) -> Iterator[RedisClient]:
    with redis_client(system.redis) as connected:
        yield connected


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`run("publish", "--help")` in this process, in an empty folder."""
    return CommandLine(tmp_path, monkeypatch, capsys)


# Help

HELP: dict[str, tuple[str, ...]] = {
    "": ("--config", "--preset", "--set", "--version", "--help"),
    "demo": ("--help",),
    "loadtest": ("--preset", "--clients", "--events", "--rate", "--processes", "--port", "--results",
                 "--quiet"),
    "init": ("FOLDER", "--force"),
    "redis": ("--verbose",),
    "hub": ("--host", "--port", "--redis-url", "--loadtest"),
    "publisher": ("--loadtest",),
    "fleet": ("--loadtest", "--clients", "--url"),
    "report": ("--loadtest", "--explain", "--json", "--markdown", "--junit", "--hgrm", "--html", "--open",
               "FOLDER"),
    "publish": ("--type", "--source", "--count", "--rate", "--severity", "--data", "--channel"),
    "subscribe": ("--channel", "--type", "--source", "--severity", "--since", "--resume-file", "--url", "--json",
                  "--log"),
    "status": ("--json", "--watch", "--url"),
    "restart": ("--url", "--within"),
    "tail": ("--channel", "--type", "--source", "--severity", "--since", "--last", "--url", "--json"),
    "events": ("--channel", "--type", "--source", "--severity", "--since", "--last", "--url", "--json"),
    "config": ("show", "init"),
    "config show": ("--help",),
    "config init": ("FILE",),
    "token": ("create",),
    "token create": ("--name", "--subscribe", "--publish", "--lasts"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "words"), HELP.items(), ids=lambda value: value or "broadcaster")
def test_every_subcommand_has_help(command: str, words: tuple[str, ...], run: CommandLine) -> None:
    """`--help` says what the subcommand is for and names its options."""
    ended = run(*command.split(), "--help")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: broadcaster {command}".rstrip())
    assert not [word for word in words if word not in ended.stdout]


@pytest.mark.parametrize("command", HELP, ids=lambda command: command or "broadcaster")
def test_every_help_has_an_example(command: str, run: CommandLine) -> None:
    """It ends with lines to type, which are commands that exist, this one among them."""
    _, found, typed = re.split(r"\n  (Examples?:)\n", run(*command.split(), "--help").stdout)
    lines = [line.strip() for line in typed.splitlines()]
    assert found == ("Example:" if len(lines) == 1 else "Examples:")
    for line in lines:
        [words] = commands(line)
        assert complaint_about(words) is None, line
        assert command in " ".join(words)


def test_the_help_lists_every_subcommand() -> None:
    """No subcommand is without a test of its help, and `broadcaster --help` names them all."""
    assert {name for name in HELP if name and " " not in name} == set(cli.commands)
    listed = finished("--help").stdout
    assert all(re.search(rf"^  {name} +\w", listed, re.MULTILINE) for name in cli.commands)


def test_a_command_is_told_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `make`, which activates nothing, a command has a path; elsewhere its name."""
    command = tmp_path / ".venv/bin/broadcaster"
    command.parent.mkdir(parents=True)
    command.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert program() == ".venv/bin/broadcaster"
    monkeypatch.chdir(command.parent.parent)
    assert program() == "bin/broadcaster"
    monkeypatch.chdir("/")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert program() == "broadcaster"
    monkeypatch.delenv("VIRTUAL_ENV")
    monkeypatch.chdir(command.parent)
    assert program() == "broadcaster"


def test_the_installed_command_is_the_same() -> None:
    """`broadcaster` and `python -m broadcaster` are one program, with the version of the distribution."""
    path = shutil.which("broadcaster", path=clean_environment()["PATH"])
    assert path is not None
    with Running(path, "--version") as installed:
        assert installed.wait() == 0
    assert installed.output == finished("--version").stdout.strip() == f"broadcaster, version {VERSION}"


# Usage errors

PUBLISH = ("publish", "--type", "SERVER_DOWN", "--source", "server-a")
USAGE_ERRORS = {
    "no_command": (),
    "unknown_command": ("publsh",),
    "unknown_option": ("hub", "--prot", "1"),
    "port_no_number": ("hub", "--port", "abc"),
    "publish_without_type": ("publish", "--source", "a"),
    "publish_without_source": ("publish", "--type", "T"),
    "count_0": (*PUBLISH, "--count", "0"),
    "count_no_number": (*PUBLISH, "--count", "ten"),
    "rate_negative": (*PUBLISH, "--rate", "-1"),
    "rate_not_a_number": (*PUBLISH, "--rate", "nan"),
    "report_of_both": ("report", "--loadtest", "."),
    "unknown_config_command": ("config", "set"),
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS.keys())
def test_a_usage_error_is_exit_code_2(arguments: tuple[str, ...], system: System, run: CommandLine) -> None:
    """What was typed wrong is said on stderr, with the usage, and exit code 2."""
    ended = run(*arguments, **system.variables)
    assert (ended.code, ended.stdout) == (2, "")
    assert "Usage: broadcaster" in ended.stderr
    assert "Traceback" not in ended.stderr


# publish


def test_publish_says_how_many_heard_each(system: System, client: RedisClient) -> None:
    """One line per event with its type, source, number and id, its position, and how many heard it."""
    client.command("SUBSCRIBE", "events.critical")
    ended = system.run("publish", "--type", "DISK_FULL", "--source", "db-7", "--count", "3")
    assert (ended.code, ended.stderr) == (0, "")
    published = [json.loads(next_message(client)) for _ in range(3)]
    assert ended.stdout.splitlines() == [
        f"DISK_FULL db-7 #{number} {event['event_id']}: stored as {event['epoch']}-{event['offset']}; "
        "heard by 2 Redis subscriptions"
        for number, event in enumerate(published, 1)
    ]
    assert [event["sequence"] for event in published] == [1, 2, 3]
    assert {event["severity"] for event in published} == {"critical"}


def test_publish_warns_when_nobody_hears(system: System) -> None:
    """On a channel without listeners it warns, and still ends well: the event was published."""
    ended = system.run(*PUBLISH, "--channel", "nobody.listens")
    assert (ended.code, ended.stderr) == (0, "")
    assert "WARNING: heard by nobody" in ended.stdout
    assert "nobody.listens is none of channels.allow (events.*)" in ended.stdout
    ended = system.run(*PUBLISH, "--channel", "events.nobody-listens")
    assert ended.stdout.endswith("WARNING: heard by nobody; is a hub running?\n")


def test_publish_takes_channel_severity_and_data(system: System, client: RedisClient) -> None:
    """All options are in the event, and it goes to the channel that was named."""
    client.command("SUBSCRIBE", "other.channel")
    data = '{"host": "dömäne", "tries": [1, 2.5, null]}'
    ended = system.run(*PUBLISH, "--channel", "other.channel", "--severity", "info", "--data", data)
    assert (ended.code, "heard by 1 Redis subscription\n" in ended.stdout) == (0, True)
    event = json.loads(next_message(client))
    assert (event["severity"], event["data"]) == ("info", json.loads(data))


def test_publish_keeps_its_rate(system: System, client: RedisClient) -> None:
    """`--rate 20` publishes no event before it is due: number n at n / 20 seconds after the first."""
    client.command("SUBSCRIBE", "paced")
    ended = system.run(*PUBLISH, "--channel", "paced", "--count", "5", "--rate", "20")
    assert ended.code == 0
    times_us = [json.loads(next_message(client))["published_at_us"] for _ in range(5)]
    for number, at_us in enumerate(times_us):
        assert at_us - times_us[0] > number * 50_000 - 45_000  # the first may have been late itself
    assert times_us[4] - times_us[0] > 150_000


def test_publish_can_be_interrupted(system: System) -> None:
    """Ctrl-C in the middle of a slow series ends it with 130, without a traceback."""
    with broadcaster(*PUBLISH, "--count", "1000", "--rate", "5", **system.variables) as running:
        running.said("#1 ")
        running.signal(signal.SIGINT)
        assert running.wait() == 130
    assert "Traceback" not in running.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_publish_that_is_stopped_names_what_is_not_known(number: signal.Signals, code: int) -> None:
    """The event that Redis has not answered, and how many were published."""
    with RedisServer.start() as redis:
        variables = {"BROADCASTER_REDIS__URL": redis.url}
        with broadcaster(*PUBLISH, "--count", "100", "--rate", "20", **variables) as running:
            running.said("#2 ")
            redis.freeze()
            time.sleep(0.5)  # the next one is due meanwhile, and written
            running.signal(number)
            assert running.wait() == code
    *_, unknown, summary = running.lines
    found = re.fullmatch(
        r"SERVER_DOWN server-a #(\d+) [0-9a-f-]{36}: may not have been published: "
        r"stopped before Redis answered",
        unknown,
    )
    assert found, running.output
    published = sum("stored as" in line for line in running.lines)
    assert int(found[1]) == published + 1
    assert summary == f"error: stopped: {published} of 100 events were published, and of 1 it is not known"


STOPPED = {
    "publish": (PUBLISH, "BROADCASTER_REDIS__URL", "redis://127.0.0.1:{}/0"),
    "events": (("events",), "BROADCASTER_REDIS__URL", "redis://127.0.0.1:{}/0"),
    "restart": (("restart", "true"), "BROADCASTER_SUBSCRIBER__URL", "ws://127.0.0.1:{}/ws"),
}


@pytest.mark.parametrize(("arguments", "variable", "url"), STOPPED.values(), ids=STOPPED.keys())
def test_what_is_stopped_before_it_is_done_is_no_success(
    arguments: tuple[str, ...], variable: str, url: str
) -> None:
    """On SIGTERM while what it has asked is silent: 143, also without a Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = url.format(silent.getsockname()[1])
        with broadcaster(*arguments, **{variable: where}) as running, silent.accept()[0]:
            running.signal(signal.SIGTERM)
            assert running.wait() == 143
    assert "Traceback" not in running.output
    assert arguments[0] != "publish" or "stopped: 0 of 1 events were published" in running.output


DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "data_no_json": (("--data", "{host"), "data is not JSON"),
    "data_empty": (("--data", ""), "data is not JSON"),
    "data_a_list": (("--data", "[1]"), "data must be a JSON object"),
    "data_a_number": (("--data", "1"), "data must be a JSON object"),
    "data_null": (("--data", "null"), "data must be a JSON object"),
    "data_with_nan": (("--data", '{"x": NaN}'), "data"),
    "data_nested_without_end": (("--data", DEEP), "data"),
    "data_with_half_a_character": (("--data", '{"x": "\\ud800"}'), "data"),
    "unknown_severity": (("--severity", "fatal"), "severity must be one of critical, warning, info"),
    "bad_channel": (("--channel", "a b"), "channel must"),
    "empty_channel": (("--channel", ""), "channel must"),
    "control_characters_in_type": (("--type", "\x1b[31mRED"), "event_type must be"),
    "newline_in_source": (("--source", "a\nb"), "source must be"),
    "empty_source": (("--source", ""), "source must be"),
    "too_large": (("--data", json.dumps({"pad": "x" * 70_000})), "at most 65536 allowed"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_publish_refuses_what_is_no_event(
    arguments: tuple[str, ...], words: str, system: System, run: CommandLine
) -> None:
    """A wrong field is one line that names it, exit code 2; nothing raw of it reaches the terminal."""
    ended = run(*PUBLISH, *arguments, **system.variables)
    assert (ended.code, ended.stdout) == (2, "")
    assert words in ended.complaint
    assert "\x1b" not in ended.stderr


def test_publish_without_history_has_no_position(system: System) -> None:
    """With `history.enabled=false` nothing is stored, and nothing is said of it."""
    ended = system.run("--set", "history.enabled=false", *PUBLISH)
    assert ended.code == 0
    assert "heard by 1 Redis subscription" in ended.stdout
    assert "stored" not in ended.stdout


@pytest.mark.parametrize("command", [PUBLISH, ("publisher", "--loadtest")], ids=["publish", "publisher"])
def test_without_redis_it_is_unavailable(command: tuple[str, ...], system: System, tmp_path: Path) -> None:
    """A Redis that is not there is one line that says so, exit code 69."""
    variables = system.variables | {
        "BROADCASTER_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
        "BROADCASTER_FLEET__CLIENTS": "1",
        "BROADCASTER_LOADTEST__RUN": "test",
    }
    (tmp_path / "results" / "test").mkdir(parents=True)
    (tmp_path / "results" / "test" / ".connected.1").touch()  # as a fleet does
    with system.subscribe():
        ended = finished(*command, cwd=tmp_path, within=20, **variables)
    assert ended.code == 69
    where = variables["BROADCASTER_REDIS__URL"]
    assert ended.complaint == f"Redis cannot be reached: connection refused ({where})"


def test_a_redis_that_refuses_us_is_told() -> None:
    """A wrong password is one line, exit code 69; the password is not in it."""
    with RedisServer.start(None, "--requirepass", "secret") as redis:
        for password in (":hunter2@", ""):
            url = redis.url.replace("//", f"//{password}")
            ended = finished(*PUBLISH, BROADCASTER_REDIS__URL=url)
            assert ended.code == 69
            assert "WRONGPASS" in ended.complaint or "NOAUTH" in ended.complaint
            assert "hunter2" not in ended.stderr


def test_options_of_the_hub_are_the_highest_layer(system: System) -> None:
    """`broadcaster hub --host --port --redis-url` go over the environment."""
    port = free_port()
    arguments = ("hub", "--host", "localhost", "--port", str(port), "--redis-url", system.redis.url)
    with broadcaster(*arguments, BROADCASTER_HUB__PORT="1", BROADCASTER_REDIS__URL="redis://127.0.0.1:1/0") as hub:
        hub.said(f"listening on ws://localhost:{port}/ws")
        hub.said("subscribed to events.critical")
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0


# redis


def test_redis_begins_empty(tmp_path: Path) -> None:
    """What another Redis has left in the folder for temporary files is not taken for our own."""
    plain = ("--dir", str(tmp_path), "--dbfilename", "dump.rdb")
    with RedisServer.start(None, *plain) as another, redis_client(another) as client:
        client.command("SET", "theirs", "1")
        assert client.command("SAVE") == b"OK"
    assert (tmp_path / "dump.rdb").exists()
    port = free_port()
    with broadcaster(
        "redis", TMPDIR=str(tmp_path), BROADCASTER_REDIS__URL=f"redis://127.0.0.1:{port}/0"
    ) as running:
        eventually(lambda: answers(f"redis://127.0.0.1:{port}/0"), f"it did not start:\n{running.output}")
        with redis_client(port) as client:
            assert client.command("DBSIZE") == 0


# subscribe


def test_subscribe_prints_one_line_per_event(system: System, client: RedisClient) -> None:
    """A line has date and time, channel, severity, type, source, number, latency and data of an event."""
    with system.subscribe() as subscriber:
        client.publish(event_payload(41, severity="warning"))
        client.publish(event_payload(42, event_type="BACK_UP", source="dömäne", data={"länge": [1, "x"]}))
        time, latency = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", r"-?\d+\.\d\d ms"
        start = f"{time} events.critical"
        assert re.fullmatch(rf"{start} warning  SERVER_DOWN server-a #41 {latency}", subscriber.said("#41"))
        data = re.escape('{"länge":[1,"x"]}')
        assert re.fullmatch(rf"{start} critical BACK_UP dömäne #42 {latency} {data}", subscriber.said("#42"))


AGES = {
    0.0: "0.00 ms",
    0.00094: "0.94 ms",
    -0.5: "-500.00 ms",
    0.9994: "999.40 ms",
    1.0: "1 second ago",
    59.9: "59 seconds ago",
    60: "1 minute ago",
    7_199: "1 hour ago",
    7_200: "2 hours ago",
    86_400 * 3.5: "3 days ago",
    -7_200: "2 hours in the future (its publisher's clock is ahead)",
}


@pytest.mark.parametrize(("age_s", "words"), AGES.items())
def test_an_old_event_is_shown_with_its_age_in_words(age_s: float, words: str) -> None:
    """What comes at once has a latency; what was published long before (replay) an age that one can read."""
    assert describe(event_of_age(age_s)).endswith(f" #7 {words}")


def event_of_age(age_s: float, **changes: Any) -> Event:
    """An event that was received so long after it was published."""
    now_us = 1_768_068_834_227_000
    times = {"published_at_us": now_us, "published_at_ms": now_us // 1000}
    return decode(event_payload(7, **(times | changes)), received_at_us=now_us + round(age_s * 1e6))


def test_the_day_of_an_event_can_be_seen() -> None:
    """A replayed event shows on which day it was published, and one that names its channel shows that."""
    position = {"channel": "events.other", "epoch": "a1", "offset": 3}
    at = CLOCK.date("%Y-%m-%d %H:%M:%S", 1_768_068_834)
    line = f"{at}.227 events.other critical SERVER_DOWN server-a #7 2 days ago"
    assert describe(event_of_age(2 * 86_400, **position), "events.critical") == line
    assert " events.critical critical " in describe(event_of_age(0.001), "events.critical")
    assert " - critical " in describe(event_of_age(0.001))


def test_a_clock_that_is_centuries_off_is_no_traceback() -> None:
    """The latest time that an event may have is shown as any other."""
    farthest = 2**53 - 1
    line = describe(event_of_age(0, published_at_ms=farthest, published_at_us=farthest))
    assert re.match(r"28739\d-\d\d-\d\d [\d:]{8}\.991 - critical ", line)


def test_long_data_is_cut() -> None:
    """What does not fit on a line ends with an ellipsis, and what would drive a terminal is escaped."""
    shown = describe(event_of_age(0.001, data={"text": "x" * 100})).partition(" ms ")[2]
    assert (shown[:10], shown[-1], len(shown)) == ('{"text":"x', "…", 60)
    shown = describe(event_of_age(0.001, data={"a": "\x9b31m\u202e\n"})).partition(" ms ")[2]
    assert shown == r'{"a":"\x9b31m\u202e\n"}'


@dataclass(frozen=True)
class Streams:
    """Where a process wrote to, apart."""

    running: Running
    stdout: Path
    stderr: Path


@contextlib.contextmanager
def subscribe_apart(system: System, folder: Path, *arguments: str) -> Iterator[Streams]:
    """`broadcaster subscribe ...`, connected, its two streams in files."""
    streams = folder / "stdout", folder / "stderr"
    before = system.hub.stats()["connected"]
    script = 'out=$1 err=$2; shift 2; exec "$@" >"$out" 2>"$err"'
    command = (sys.executable, "-m", "broadcaster", "subscribe", *arguments)
    with Running("/bin/sh", "-c", script, "sh", *map(str, streams), *command, **system.variables) as running:
        eventually(lambda: system.hub.stats()["connected"] > before, "not connected")
        yield Streams(running, *streams)


ODD_PAYLOADS = [
    event_payload(1, data={"a": "\x1b[31m", "b": "ü"}),
    event_payload(2).replace(b", ", b" ,\t ").replace(b'"sequence": 2', b'"sequence":2'),
    b'{"unknown":[1.50,1e2,"\\u00e9\xc3\xa9\xe2\x80\xa8"],' + event_payload(3)[1:],
]


def test_subscribe_json_prints_the_bytes_as_they_came(system: System, client: RedisClient, tmp_path: Path) -> None:
    """With `--json` stdout has each payload byte for byte, one per line: it can be piped."""
    wanted = b"".join(payload + b"\n" for payload in ODD_PAYLOADS)
    with subscribe_apart(system, tmp_path, "--json") as streams:
        for payload in ODD_PAYLOADS:
            client.publish(payload)
        eventually(lambda: b'"sequence": 3' in streams.stdout.read_bytes(), "the last event did not come")
        streams.running.signal(signal.SIGTERM)
        assert streams.running.wait() == 0
    assert "received 3 events" in streams.stderr.read_text()
    assert streams.stdout.read_bytes() == wanted


@pytest.mark.parametrize("as_json", [False, True], ids=["lines", "json"])
def test_subscribe_log_appends(as_json: bool, system: System, client: RedisClient, tmp_path: Path) -> None:
    """`--log` adds what is printed to a file, behind what was there, as it comes."""
    log = tmp_path / "events.log"
    log.write_text("before\n")
    arguments = ["--log", str(log)] + ["--json"] * as_json
    for number in (1, 2):
        with system.subscribe(*arguments):
            client.publish(event_payload(number))
            eventually(lambda: log.read_text().count("\n") > number, "the log was not written")  # noqa: B023
    first, *lines = log.read_text().splitlines()
    assert first == "before"
    if as_json:
        assert [json.loads(line)["sequence"] for line in lines] == [1, 2]
    else:
        assert [re.search(r"#(\d) .* ms\b", line)[1] for line in lines] == ["1", "2"]  # type: ignore[index]


def test_subscribe_shows_what_is_missing(system: System, client: RedisClient) -> None:
    """Holes in the numbers of a source are shown at the event behind them, and in the totals."""
    with system.subscribe() as subscriber:
        for number in (1, 2, 5, 6, 9):
            client.publish(event_payload(number))
        client.publish(event_payload(100, source="server-b"))
        assert "missing" not in subscriber.said("#2 ")
        assert subscriber.said("#5 ").endswith("(2 before it missing)")
        assert "missing" not in subscriber.said("#6 ")
        assert subscriber.said("#9 ").endswith("(2 before it missing)")
        assert "missing" not in subscriber.said("server-b")
        subscriber.signal(signal.SIGTERM)
        assert subscriber.wait() == 0
    assert subscriber.lines[-1] == "received 6 events, 4 missing, 0 gaps announced"


ENDINGS = {"SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 0)}
endings = pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())


@endings
def test_subscribe_ends_with_totals(
    number: signal.Signals, code: int, system: System, client: RedisClient
) -> None:
    """Ctrl-C is exit code 130, SIGTERM is 0; both with a line of totals and no traceback."""
    with system.subscribe() as subscriber:
        client.publish(event_payload(1))
        subscriber.said("#1 ")
        subscriber.signal(number)
        assert subscriber.wait(within=5) == code
    assert subscriber.lines[-1] == "received 1 events, 0 missing, 0 gaps announced"
    assert "Traceback" not in subscriber.output


@endings
def test_subscribe_ends_though_there_is_no_hub(number: signal.Signals, code: int) -> None:
    """While it waits for a hub it can be ended just as well."""
    with broadcaster("subscribe", "--url", f"ws://127.0.0.1:{free_port()}/ws") as subscriber:
        subscriber.said("trying again")
        subscriber.signal(number)
        assert subscriber.wait(within=5) == code
    assert subscriber.lines[-1] == "received 0 events, 0 missing, 0 gaps announced"
    assert "Traceback" not in subscriber.output


def test_subscribe_into_a_pipe_that_closes(system: System, client: RedisClient) -> None:
    """`broadcaster subscribe | head` ends without a traceback once the reader has gone."""
    script = f"{sys.executable} -m broadcaster subscribe | head -n 2; echo over"
    before = system.hub.stats()["connected"]
    with Running("/bin/sh", "-c", script, **system.variables) as pipe:
        eventually(lambda: system.hub.stats()["connected"] > before, "not connected")

        def publish_and_look() -> bool:
            client.publish(event_payload(1))
            return "over" in pipe.output

        eventually(publish_and_look, f"it does not end:\n{pipe.output}")
        assert pipe.wait() == 0
    assert "Traceback" not in pipe.output
    assert "Exception" not in pipe.output


def test_subscribe_takes_a_channel_and_a_url(system: System, client: RedisClient) -> None:
    """`--url` and `--channel` say what to receive; a channel the hub does not serve is its refusal, rc 69."""
    with broadcaster("subscribe", "--url", system.hub.url, "--channel", "events.critical") as subscriber:
        subscriber.said("connected to")
        eventually(lambda: client.publish(event_payload(7)) and "#7 " in subscriber.output, "no event")
    refused = finished("subscribe", "--url", system.hub.url, "--channel", "other")
    assert refused.code == 69
    assert "no such channel" in refused.stderr
    assert "Traceback" not in refused.stderr


REFUSED_SUBSCRIPTIONS = {
    "bad_channel": (("--channel", "a b"), 2, "channel must"),
    "empty_channel": (("--channel", ""), 2, "channel must"),
    "no_websocket_url": (("--url", "http://127.0.0.1/ws"), 78, "subscriber.url"),
    "url_without_host": (("--url", "ws://"), 78, "subscriber.url"),
    "log_in_a_missing_folder": (("--log", "nowhere/events.log"), None, "nowhere/events.log"),
}


@pytest.mark.parametrize(
    ("arguments", "code", "words"), REFUSED_SUBSCRIPTIONS.values(), ids=REFUSED_SUBSCRIPTIONS.keys()
)
def test_subscribe_refuses_what_cannot_be(
    arguments: tuple[str, ...], code: int | None, words: str, system: System
) -> None:
    """A bad channel, address or log file is one line, before anything is connected."""
    ended = system.run("subscribe", *arguments)
    assert ended.code == code if code is not None else ended.code not in (0, 130, 143)
    assert words in ended.complaint


# subscribe, and go on


def stored(system: System, count: int, *arguments: str) -> list[str]:
    """Publish so many events as a person would; the positions that were printed."""
    ended = system.run(*PUBLISH, "--count", str(count), *arguments)
    positions = re.findall(r"stored as (\w+-\d+); ", ended.stdout)
    assert (ended.code, len(positions)) == (0, count), ended.stdout
    return positions


def numbers(running: Running) -> list[int]:
    """The numbers of the events that were printed."""
    found = (re.search(r" server-a #(\d+) ", line) for line in list(running.lines))
    return [int(match[1]) for match in found if match]


def test_subscribe_since_begins_after_a_position(system: System) -> None:
    """`--since` with a position that `publish` has printed: what came after it, then what is published now."""
    positions = stored(system, 4)
    with system.subscribe("--since", positions[1]) as subscriber:
        eventually(lambda: numbers(subscriber) == [3, 4], subscriber.output)
        stored(system, 1)
        eventually(lambda: numbers(subscriber) == [3, 4, 1], subscriber.output)
        assert "GAP" not in subscriber.output


def test_subscribe_shows_a_gap_in_its_place(system: System) -> None:
    """What cannot be given is a line that names range and cause."""
    [position] = stored(system, 1)
    epoch, _, offset = position.rpartition("-")
    future = f"{epoch}-{int(offset) + 100}"
    line = f"GAP on events.critical: {epoch}-{int(offset) + 101} to ? (position_unknown)"
    with system.subscribe("--since", future) as subscriber:
        assert subscriber.said("GAP on") == line
        stored(system, 1)
        subscriber.said("server-a #1 ")
        subscriber.signal(signal.SIGTERM)
        assert subscriber.wait() == 0
    assert subscriber.lines[-1] == "received 1 events, 0 missing, 1 gaps announced"
    assert subscriber.output.count("position_unknown") == 1


def test_subscribe_json_has_gaps_in_their_place(system: System, tmp_path: Path) -> None:
    """With `--json` a gap is a line of stdout in its place, as a control frame says it, and of the log file."""
    [position] = stored(system, 1)
    epoch, _, offset = position.rpartition("-")
    log = tmp_path / "log"
    arguments = ("--json", "--log", str(log), "--since", f"{epoch}-{int(offset) + 100}")
    with subscribe_apart(system, tmp_path, *arguments) as streams:
        eventually(lambda: b"gap" in streams.stdout.read_bytes(), "no gap")
        stored(system, 1)
        eventually(lambda: b"event_id" in streams.stdout.read_bytes(), "no event")
        streams.running.signal(signal.SIGTERM)
        assert streams.running.wait() == 0
    gap, event = (json.loads(line) for line in streams.stdout.read_text().splitlines())
    assert gap == {
        "control": "gap", "channel": "events.critical", "cause": "position_unknown", "epoch": epoch,
        "first": int(offset) + 101, "last": None, "position": position,
    }  # fmt: skip
    assert event["offset"] == int(offset) + 1
    assert log.read_text() == streams.stdout.read_text()
    assert "GAP" not in streams.stderr.read_text()


JSON_LINES: dict[str, tuple[Received, object]] = {
    "a gap": (
        Gap("c", Cause.REFUSED, "a", 2, 3, Position("a", 3)),
        {"control": "gap", "channel": "c", "cause": "refused", "epoch": "a", "first": 2, "last": 3,
         "position": "a-3"},
    ),
    "a gap without numbers": (
        Gap("c\n", "no_history"),
        {"control": "gap", "channel": "c\n", "cause": "no_history", "epoch": None, "first": None, "last": None,
         "position": None},
    ),
    "stale": (Stale(6.12345), {"control": "stale", "silent_s": 6.123}),
    "fresh": (Fresh(), {"control": "fresh"}),
    "an event over several lines": (
        decode(ODD_PAYLOADS[0].replace(b", ", b",\r\n", 1)), json.loads(ODD_PAYLOADS[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize(("item", "fields"), JSON_LINES.values(), ids=JSON_LINES)
def test_each_item_is_one_line_of_json(item: Received, fields: object) -> None:
    """With the keys that the contract names, whatever a hub says."""
    line = as_json_line(item)
    assert len(line.splitlines()) == 1
    assert json.loads(line) == fields


def test_subscribe_says_when_it_is_blind(system: System) -> None:
    """A hub that stands still: a STALE line with the seconds of silence; when it beats again, FRESH."""
    with (
        HubProcess(system.redis.url, BROADCASTER_HUB__BEAT_INTERVAL_S="0.2") as hub,
        broadcaster("subscribe", "--url", hub.until_ready().url) as subscriber,
    ):
        subscriber.said("connected to")
        hub.until_connected(1)
        hub.signal(signal.SIGSTOP)
        stale = r"STALE: no beat of the hub for \d+\.\d s; what happens now is not seen here"
        assert re.fullmatch(stale, subscriber.said("STALE"))
        hub.signal(signal.SIGCONT)
        assert subscriber.said("FRESH") == "FRESH: the hub beats again"
    assert "blind" not in subscriber.output  # the same in other words


def test_subscribe_takes_channels_and_filters(system: System) -> None:
    """`--channel` is repeatable; `--type`, `--source` and `--severity` hold back what was not asked for."""
    arguments = ("--channel", "events.critical", "--channel", "events.other", "--type", "SERVER_DOWN")
    with system.subscribe(*arguments, "--type", "BACK_UP", "--severity", "warning") as subscriber:
        for number, (channel, event_type, severity) in enumerate(
            [
                ("events.critical", "SERVER_DOWN", "critical"),
                ("events.critical", "SERVER_DOWN", "warning"),
                ("events.other", "BACK_UP", "warning"),
                ("events.other", "DISK_FULL", "warning"),
                ("events.critical", "BACK_UP", "warning"),
            ]
        ):
            ended = system.run("publish", "--type", event_type, "--source", f"s{number}", "--severity", severity,
                               "--channel", channel)  # fmt: skip
            assert ended.code == 0
        subscriber.said("BACK_UP s4 ")
        assert re.findall(r"warning  (\w+ s\d) ", subscriber.output) == [
            "SERVER_DOWN s1",
            "BACK_UP s2",
            "BACK_UP s4",
        ]
        assert " critical " not in subscriber.output
        assert "missing" not in subscriber.output


def test_a_resume_file_keeps_the_place(system: System, tmp_path: Path) -> None:
    """What is published between two runs with the same `--resume-file` is printed by the second, once."""
    kept = tmp_path / "place.json"
    with system.subscribe("--resume-file", str(kept)) as first:
        stored(system, 2)
        eventually(lambda: numbers(first) == [1, 2], first.output)
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
    positions = stored(system, 3)
    with system.subscribe("--resume-file", str(kept)) as second:
        eventually(lambda: numbers(second) == [1, 2, 3], second.output)
        eventually(lambda: json.loads(kept.read_text()) == {"events.critical": positions[-1]}, "it is not saved")
        assert "GAP" not in second.output


def test_a_resume_file_is_of_several_channels(system: System, tmp_path: Path) -> None:
    """Each channel has its own position in it."""
    kept = tmp_path / "place.json"
    arguments = ("--channel", "events.one", "--channel", "events.two", "--resume-file", str(kept))
    with system.subscribe(*arguments) as first:
        for name in ("events.one", "events.two"):
            stored(system, 2, "--channel", name)
        eventually(lambda: numbers(first) == [1, 2, 1, 2], first.output)
        first.signal(signal.SIGINT)
        assert first.wait() == 130
    last = [stored(system, 1, "--channel", name)[0] for name in ("events.one", "events.two")]
    with system.subscribe(*arguments) as second:
        eventually(lambda: numbers(second) == [1, 1], second.output)
    assert json.loads(kept.read_text()) == {"events.one": last[0], "events.two": last[1]}


ENDS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}


@pytest.mark.parametrize("number", ENDS.values(), ids=ENDS.keys())
def test_whenever_it_is_ended_the_next_run_misses_nothing(
    number: signal.Signals, system: System, tmp_path: Path
) -> None:
    """In the middle of a flow, again and again: the file is whole, and all runs together have printed everything.

    After kill -9, what was printed in the last moment may come twice; otherwise nothing does.
    """
    kept = tmp_path / "place.json"
    printed: list[int] = []
    count, rate = 2400, 800
    with contextlib.ExitStack() as stack:
        publisher = None
        while not printed or printed[-1] < count:
            with system.subscribe("--resume-file", str(kept)) as subscriber:
                if publisher is None:
                    publisher = stack.enter_context(
                        broadcaster(*PUBLISH, "--count", str(count), "--rate", str(rate), **system.variables)
                    )
                seen = printed[-1] if printed else 0
                eventually(lambda: numbers(subscriber) and numbers(subscriber)[-1] >= min(seen + 300, count), "")  # noqa: B023
                if number == signal.SIGKILL:
                    time.sleep(0.5)  # by then it is up to date, and prints at the pace of the publisher
                subscriber.signal(number)
                subscriber.wait()
            new = numbers(subscriber)
            if printed:
                again = len([told for told in new if told <= printed[-1]])
                assert again <= (rate / 2 if number == signal.SIGKILL else 0), f"{again} came twice"
                assert new[0] <= printed[-1] + 1, f"lost: {printed[-1] + 1} to {new[0] - 1}"
            assert new == list(range(new[0], new[0] + len(new)))
            assert json.loads(kept.read_text()).keys() == {"events.critical"}
            assert "GAP" not in subscriber.output
            printed = new
    assert not [path for path in tmp_path.iterdir() if path != kept and number != signal.SIGKILL]


class OneMoment:
    """A subscriber that is given its last event in the very moment in which it is told to stop."""

    def __init__(self, stop: asyncio.Event, turns: int) -> None:
        self._stop = stop
        self._turns = turns
        self._given = 0
        self.positions: dict[str, Position] = {}
        self.missing: dict[str, int] = {}
        self.received = self.gaps = 0

    async def receive(self) -> Event:
        """Two events; the second comes so many turns of the event loop after the stop."""
        if self._given == 1:
            self._stop.set()
            for _ in range(self._turns):
                await asyncio.sleep(0)
        elif self._given == 2:
            await asyncio.Event().wait()
        self._given += 1
        event = decode(event_payload(self._given, channel="c", epoch="a", offset=self._given), received_at_us=0)
        self.positions = {"c": Position("a", self._given)}
        return event

    async def __aenter__(self) -> OneMoment:
        return self

    async def __aexit__(self, *error: object) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("turns", range(6))
def test_what_was_not_printed_is_not_saved(turns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whenever the stop comes, the saved position is that of the last event that was printed."""
    kept = tmp_path / "place.json"

    async def story() -> None:
        stop = asyncio.Event()
        subscriber: Any = OneMoment(stop, turns)
        await watch(subscriber, stop, as_json=False, log_file=None, resume_file=ResumeFile(kept))

    asyncio.run(story())
    printed = capsys.readouterr().out.count(" SERVER_DOWN server-a #")
    assert json.loads(kept.read_text()) == {"c": f"a-{printed}"}


def test_what_is_saved_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine leaves no position without its events in the log file, and no half a file."""
    kept, log_file = tmp_path / "place.json", tmp_path / "log"
    flushed: list[tuple[str, str]] = []

    def flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        flushed.append((path.name, path.read_text() if path.is_file() else ""))

    async def story() -> None:
        stop = asyncio.Event()
        subscriber: Any = OneMoment(stop, 5)
        await watch(subscriber, stop, as_json=False, log_file=log_file, resume_file=ResumeFile(kept))

    monkeypatch.setattr(os, "fsync", flush)
    asyncio.run(story())
    names = [name.removesuffix(f".{os.getpid()}") for name, _ in flushed]
    assert names == ["log", ".place.json", tmp_path.name] * (len(flushed) // 3)
    last_log, last_saved = flushed[-3][1], flushed[-2][1]
    assert json.loads(last_saved) == {"c": f"a-{last_log.count(' SERVER_DOWN server-a #')}"}
    assert kept.read_text() == last_saved


DAMAGED: dict[str, bytes] = {
    "half": b'{"events.critical": "a1',
    "a list": b"[]",
    "null": b"null",
    "a number": b'{"events.critical": 7}',
    "no position": b'{"events.critical": "seven"}',
    "nested": b'{"events.critical": {"position": "a-1"}}',
    "nested without end": b"[" * 100_000,
    "no text": b"\xff\xfe\0",
    "too large": b" " * (2**20 + 1),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_resume_file_is_one_clear_line(
    content: bytes, system: System, run: CommandLine, tmp_path: Path
) -> None:
    """What is no file of positions is refused with its name, exit code 78, and left as it is."""
    kept = tmp_path / "place.json"
    kept.write_bytes(content)
    ended = run("subscribe", "--resume-file", str(kept), **system.variables)
    assert (ended.code, ended.stdout) == (78, "")
    assert f"{kept} is no file of positions" in ended.complaint
    assert kept.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_resume_file_is_a_beginning(content: bytes, tmp_path: Path) -> None:
    """As `touch` makes it, or whoever mounts it into a container."""
    kept = tmp_path / "place.json"
    kept.write_bytes(content)
    assert ResumeFile(kept).load() == {}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_resume_file_that_never_ends_is_refused(kind: str, system: System, tmp_path: Path) -> None:
    """Before anything waits for it."""
    path = tmp_path / "place.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    ended = system.run("subscribe", "--resume-file", str(path))
    assert (ended.code, ended.stdout) == (78, "")
    assert ended.complaint == f"{path} is no ordinary file; --resume-file needs one"


def test_no_place_is_kept_in_dev_null(system: System) -> None:
    """It begins now, and is told nothing."""
    with system.subscribe("--resume-file", os.devnull) as subscriber:
        assert system.run(*PUBLISH).code == 0
        subscriber.said("SERVER_DOWN server-a #1")
        subscriber.signal(signal.SIGTERM)
        assert subscriber.wait() == 0
    assert not os.path.isfile(os.devnull)


def test_a_log_that_is_a_pipe_is_refused_before_anything_waits_for_it(
    system: System, run: CommandLine, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    ended = run("subscribe", "--log", str(tmp_path / "pipe"), **system.variables)
    assert (ended.code, ended.stdout) == (78, "")
    assert "is a pipe" in ended.complaint


CONTRADICTIONS = {
    "since_and_resume_file": ("--since", "a-1", "--resume-file", "place.json"),
    "since_of_two_channels": ("--since", "a-1", "--channel", "events.a", "--channel", "events.b"),
    "since_that_is_no_place": ("--since", "seven"),
    "since_without_its_zone": ("--since", "2026-11-27T02:00:00"),
}


@pytest.mark.parametrize("arguments", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_subscribe_refuses_a_place_that_cannot_be(
    arguments: tuple[str, ...], system: System, run: CommandLine
) -> None:
    """It is a usage error, before anything is connected."""
    ended = run("subscribe", *arguments, **system.variables)
    assert (ended.code, ended.stdout) == (2, "")
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_resume_file_that_cannot_be_written_is_told(system: System) -> None:
    """A missing folder is one line, and the end: it could not keep its promise."""
    ended = system.run("subscribe", "--resume-file", "nowhere/place.json")
    assert ended.code == 78
    assert "error: cannot write nowhere/place.json" in ended.stderr


def test_a_resume_file_in_a_folder_that_takes_no_file_is_told_before_it_connects(tmp_path: Path) -> None:
    """Whatever the rights say, which root has: /proc takes no file, and a file that is there is not replaced."""
    name = "p" * 255  # that of a draft would be too long
    (tmp_path / name).write_text("{}")
    for path in ("/proc/place.json", str(tmp_path / name)):
        ended = finished("subscribe", "--resume-file", path, BROADCASTER_HUB__PORT=str(free_port()))
        assert (ended.code, ended.stdout) == (78, "")
        assert ended.complaint.startswith(f"cannot write {path}: no file can be made in its folder (")


NOWHERE: dict[str, tuple[str, ...]] = {
    "hub.tls_cert": ("--set", "hub.tls_cert=/nowhere/a", "--set", "hub.tls_key=/nowhere/b", "hub"),
    "/nowhere/ca": ("--set", "subscriber.tls_ca=/nowhere/ca", "subscribe", "--url", "wss://127.0.0.1:1/ws"),
    "/proc/nowhere": ("--set", "loadtest.results=/proc/nowhere", "fleet", "--loadtest"),
    "/proc/nowhere/log": ("subscribe", "--log", "/proc/nowhere/log"),
}


@pytest.mark.parametrize(("named", "arguments"), NOWHERE.items(), ids=NOWHERE)
def test_a_file_that_is_not_there_is_said_in_words(named: str, arguments: tuple[str, ...]) -> None:
    """One line with its name or that of its setting, and the system's words without their number."""
    ended = finished(*arguments, BROADCASTER_HUB__PORT=str(free_port()))
    assert ended.code == 78
    assert named in ended.complaint
    assert "o such file or directory" in ended.complaint
    assert "Errno" not in ended.complaint


@pytest.mark.parametrize("command", [("status",), ("restart", "true")], ids=["status", "restart"])
def test_where_no_hub_answers_is_said_with_what_to_do(command: tuple[str, ...], run: CommandLine) -> None:
    """The address without its password, the reason, and the way out."""
    port = free_port()
    ended = run(*command[:1], "--url", f"ws://wall:secret-7@127.0.0.1:{port}/ws", *command[1:])
    assert (ended.code, ended.stdout) == (69, "")
    assert ended.complaint == (
        f"http://wall:***@127.0.0.1:{port}: no answer (connection refused); start a hub there, or give --url"
    )


def test_a_port_that_is_taken_is_said_once(system: System) -> None:
    """Address and reason, each once."""
    ended = system.run("hub")
    assert (ended.code, ended.complaint) == (
        69,
        f"hub: cannot listen on 127.0.0.1:{system.hub.port}: address already in use",
    )


CONTROL = "\x1b[31m\x07\r\x7f\x9b"
"""What could drive a terminal: escape, bell, carriage return, delete, and the one-byte form of escape-[."""


@contextlib.contextmanager
def hostile_hub(messages: list[bytes], reason: str) -> Iterator[str]:
    """A hub that sends anything, and closes with any reason."""

    def talk(connection: ServerConnection) -> None:
        for message in messages:
            connection.send(message.decode())
        connection.close(4000, reason)

    with serve(talk, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws"
        server.shutdown()
        thread.join()


def printed_by_subscribe(messages: list[bytes], reason: str, log: Path) -> str:
    """All that `broadcaster subscribe` prints and logs of these messages, which end with event 99."""
    with (
        hostile_hub(messages, reason) as url,
        broadcaster("subscribe", "--url", url, "--log", str(log)) as subscriber,
    ):
        subscriber.said("#99 ")
        subscriber.said("connection closed")
    return subscriber.output + log.read_text()


DRIVES_A_TERMINAL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def test_no_event_drives_the_terminal(tmp_path: Path) -> None:
    """Control characters in any field of an event are never printed as they are."""
    fields: list[dict[str, Any]] = [
        {"event_type": f"T{CONTROL}"},
        {"source": f"s{CONTROL}"},
        {"severity": f"info{CONTROL}"},
        {"data": {f"k{CONTROL}": f"v{CONTROL}"}},
        {f"unknown{CONTROL}": CONTROL},
        {"event_id": CONTROL},
    ]
    messages = [event_payload(number, **change) for number, change in enumerate(fields)]
    # The same once more as raw characters, where JSON allows them: delete and the range 80 to 9f.
    again = [event_payload(number, **change) for number, change in enumerate(fields)]
    raw = [json.dumps(json.loads(message), ensure_ascii=False).encode() for message in again]
    printed = printed_by_subscribe([*messages, *raw, event_payload(99)], "", tmp_path / "events.log")
    assert printed.count("#3 ") == 4
    assert not DRIVES_A_TERMINAL.search(printed), repr(printed)


def test_no_hub_drives_the_terminal(tmp_path: Path) -> None:
    """Control characters in a control frame or a close reason are never printed as they are."""
    gap = {"control": "gap", "channel": f"c{CONTROL}", "cause": f"because{CONTROL}"}
    messages = [json.dumps(gap).encode(), event_payload(99)]
    printed = printed_by_subscribe(messages, f"bye{CONTROL[:5]}", tmp_path / "events.log")
    assert "because" in printed
    assert not DRIVES_A_TERMINAL.search(printed), repr(printed)


def test_no_refusal_drives_the_terminal() -> None:
    """Nor does the answer of a server that refuses a subscriber."""

    def refuse(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(HTTPStatus.FORBIDDEN, f"no{CONTROL}\n")

    with serve(lambda connection: None, "127.0.0.1", 0, process_request=refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        ended = finished("subscribe", "--url", f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws")
        server.shutdown()
        thread.join()
    assert ended.code == 69
    assert "403 no" in ended.complaint
    assert not DRIVES_A_TERMINAL.search(ended.stderr + ended.stdout), repr(ended.stderr)


def test_no_redis_drives_the_terminal() -> None:
    """Nor does what somebody says who listens where Redis should."""

    def talk(listening: socket.socket) -> None:
        listening.settimeout(10)
        with listening.accept()[0] as connection:
            connection.settimeout(10)
            connection.recv(4096)
            connection.sendall(f"-NOAUTH {CONTROL.replace(chr(13), '')}\r\n".encode() * 4)
            connection.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=talk, args=(listening,))
        thread.start()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}/0"
        ended = finished(*PUBLISH, BROADCASTER_REDIS__URL=url)
        thread.join()
    assert ended.code == 69
    assert "NOAUTH" in ended.complaint
    assert not DRIVES_A_TERMINAL.search(ended.stderr + ended.stdout), repr(ended.stderr)


# What all processes share


@pytest.mark.parametrize("error", [None, RuntimeError("a bug")], ids=["returns", "raises"])
def test_a_role_leaves_its_code_or_its_error(error: Exception | None) -> None:
    """`process.run` returns what the role returned; an error passes through."""

    async def main(stop: object) -> int:
        if error is not None:
            raise error
        return 7

    if error is None:
        assert process.run(main) == 7
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            process.run(main)


WAITING = {
    "publisher_SIGINT": ("publisher", *ENDINGS["SIGINT"]),
    "publisher_SIGTERM": ("publisher", *ENDINGS["SIGTERM"]),
    "loadtest_publisher": ("publisher --loadtest", *ENDINGS["SIGTERM"]),
    "loadtest_fleet": ("fleet --loadtest", *ENDINGS["SIGTERM"]),
    "loadtest_report": ("report --loadtest", signal.SIGTERM, 143),
    "loadtest_report_SIGINT": ("report --loadtest", *ENDINGS["SIGINT"]),
}


@pytest.mark.parametrize(("role", "number", "code"), WAITING.values(), ids=WAITING.keys())
def test_a_role_that_waits_can_be_ended(role: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    """While it waits for the others, a signal ends a role in time; only the report calls that a failure."""
    variables = {
        "BROADCASTER_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
        "BROADCASTER_HUB__PORT": str(free_port()),
    }
    script = f"echo started; exec {sys.executable} -m broadcaster {role}"
    with Running("/bin/sh", "-c", script, cwd=tmp_path, **variables) as running:
        if "--loadtest" in role:
            eventually(lambda: list(tmp_path.glob("results/*-*")), f"it did not start:\n{running.output}")
        else:
            running.said("started")
            eventually(lambda: signals_caught(running.process.pid), "it did not start")
        running.signal(number)
        assert running.wait(within=5) == code
    assert "Traceback" not in running.output


def signals_caught(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM (Linux; elsewhere after a second)."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
        return bool(caught >> (signal.SIGTERM - 1) & 1)
    threading.Event().wait(1)
    return True


# What is stored


async def offsets_of_slow_reader(redis: RedisServer, *meanwhile: str) -> AsyncIterator[int]:
    """Of ten stored events, read two at a time; a command is given when the first two have been read."""
    settings = Settings.model_construct(redis=RedisTable(url=redis.url))
    async with Publisher(settings) as publisher:
        await publisher.publish_all([publisher.draft("A", "b") for _ in range(10)])
    async for event in events._stored(settings, settings.event.channel, OLDEST):
        assert event.position is not None
        yield event.position.offset
        if event.position.offset == 2:
            with redis_client(redis) as client:
                client.command(*meanwhile)


@in_loop
async def test_what_leaves_the_log_while_it_is_read_is_said(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pager stands still, and the channel is busy."""
    monkeypatch.setattr(events, "_PAGE_EVENTS", 2)
    trim = "XTRIM", "{events.critical}:log", "MINID", "8"
    assert [offset async for offset in offsets_of_slow_reader(redis, *trim)] == [1, 2, 8, 9, 10]
    assert "the events 3 to 7 have left the log meanwhile" in capsys.readouterr().err


@in_loop
async def test_what_is_read_from_another_memory_is_not_taken_for_the_rest(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis loses its memory between two pages."""
    monkeypatch.setattr(events, "_PAGE_EVENTS", 2)
    with pytest.raises(RedisUnavailable, match="another memory"):
        assert [offset async for offset in offsets_of_slow_reader(redis, "FLUSHALL")] == []


def test_events_are_read_from_redis_itself(tmp_path: Path) -> None:
    """By time, position, number and filter, oldest first, also without a hub; what is gone is said."""
    with RedisServer.start() as redis, redis_client(redis) as client:
        variables = {"BROADCASTER_REDIS__URL": redis.url}

        def events(*arguments: str) -> Finished:
            return finished("events", *arguments, cwd=tmp_path, within=20, **variables)

        def numbers(*arguments: str) -> list[int]:
            ended = events("--json", *arguments)
            assert (ended.code, ended.stderr) == (0, "")
            return [json.loads(line)["offset"] for line in ended.stdout.splitlines()]

        assert numbers() == []
        for severity, count in (("critical", "3"), ("info", "4")):
            options = ("--type", "A", "--source", "s", "--severity", severity, "--count", count)
            assert finished("publish", *options, cwd=tmp_path, within=20, **variables).code == 0
        assert (
            numbers()
            == numbers("--since", "1h")
            == numbers("--since", "2020-01-01T00:00:00Z")
            == [1, 2, 3, 4, 5, 6, 7]
        )
        assert numbers("--since", "2100-01-01T00:00:00Z") == []
        assert numbers("--severity", "info", "--last", "2") == [6, 7]
        assert numbers("--severity", "critical") == [1, 2, 3]
        assert numbers("--type", "B") == []
        line = events("--json", "--last", "3").stdout.splitlines()[0]
        fields = json.loads(line)
        assert numbers("--since", f"{fields['epoch']}-{fields['offset']}") == [6, 7]
        at = datetime.datetime.fromtimestamp(fields["stored_at_us"] / 1_000_000, datetime.UTC)
        assert numbers("--since", at.isoformat())[-3:] == [5, 6, 7]
        assert " info " in events("--last", "1").stdout
        client.command("XTRIM", "{events.critical}:log", "MAXLEN", "2")
        ended = events("--since", "1d", "--json")
        assert len(ended.stdout.splitlines()) == 2
        assert f"the log begins at {fields['epoch']}-6: what came before it is gone" in ended.stderr
        ended = events("--since", f"{fields['epoch']}-5", "--json")
        assert (len(ended.stdout.splitlines()), ended.stderr) == (2, "")  # nothing is gone of what was asked for
        for wrong in ("yesterday", "10", "1w", "-1h", ""):
            ended = events("--since", wrong)
            assert (ended.code, ended.stdout) == (2, "")
            assert "--since is a position, a duration" in ended.stderr
        ended = events("--since", "2026-11-27T02:00:00")
        assert (ended.code, "--since is a time without its zone" in ended.stderr) == (2, True)


def test_events_are_read_through_a_hub(tmp_path: Path) -> None:
    """The same lines and exit codes as from Redis itself, with a token where the hub asks for one."""
    keys = [
        {"name": "reader", "key": "reader-key_0123456789", "subscribe": ["events.*"]},
        {"name": "other", "key": "other-key_0123456789", "subscribe": ["other.*"]},
    ]
    guarded = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__API_KEYS": json.dumps(keys)}
    with (
        RedisServer.start() as redis,
        redis_client(redis) as client,
        HubThread(redis.url, None, **guarded) as hub,
    ):
        url = f"http://127.0.0.1:{hub.until_ready().port}"
        token = {"BROADCASTER_SUBSCRIBER__TOKEN": "reader-key_0123456789"}
        variables = {"BROADCASTER_REDIS__URL": redis.url}

        def both(*arguments: str) -> Finished:
            """What both print, and end with."""
            direct = finished("events", "--json", *arguments, cwd=tmp_path, within=20, **variables)
            through = finished("events", "--json", "--url", url, *arguments, cwd=tmp_path, within=20, **token)
            assert (through.code, through.stdout, through.stderr) == (direct.code, direct.stdout, direct.stderr)
            return through

        assert both().stdout == ""
        variables = {"BROADCASTER_REDIS__URL": redis.url}
        for severity, count in (("critical", "3"), ("info", "4")):
            options = (
                "--type",
                "A",
                "--source",
                "s",
                "--severity",
                severity,
                "--count",
                count,
                "--data",
                '{"ü": 1.50}',
            )
            data = ("--data", '{"ü": 1.50}')
            assert finished("publish", *options, *data, cwd=tmp_path, within=20, **variables).code == 0
        assert len(both().stdout.splitlines()) == 7
        assert len(both("--severity", "info", "--last", "3").stdout.splitlines()) == 3
        client.command("XTRIM", "{events.critical}:log", "MAXLEN", "2")
        ended = both("--since", "1h", "--severity", "critical")
        assert (ended.stdout, "what came before it is gone" in ended.stderr) == ("", True)
        assert " info " in finished("events", "--url", url, cwd=tmp_path, within=20, **token).stdout
        assert both("--since", "tomorrow").code == 2
        assert both("--channel", "a b").code == 2
        ended = finished("events", "--url", url, "--channel", "events.critical", cwd=tmp_path, within=20)
        assert (ended.code, "401 access denied: missing" in ended.stderr) == (69, True)
        other = {"BROADCASTER_SUBSCRIBER__TOKEN": "other-key_0123456789"}
        ended = finished("events", "--url", url, cwd=tmp_path, within=20, **other)
        assert (ended.code, "403 not for you: events.critical" in ended.stderr) == (69, True)
    ended = finished("events", "--url", url, cwd=tmp_path, within=20)
    assert (ended.code, ended.stdout) == (69, "")
    assert "no answer (connection refused)" in ended.stderr
    assert finished("events", "--url", "ws://127.0.0.1:1/ws", cwd=tmp_path, within=20).code == 2


def test_tail_begins_some_events_back(system: System) -> None:
    """The last ones first, then what comes; without a terminal there are no colours."""
    channel = "events.tail"
    options = ("--channel", channel, "--type", "A", "--source", "s")
    assert system.run("publish", *options, "--count", "5").code == 0
    with broadcaster("tail", "--channel", channel, "--last", "2", **system.variables) as running:
        running.said(" A s #5")
        assert system.run("publish", *options, "--severity", "warning").code == 0
        eventually(lambda: running.output.count(" A s #") == 3, "the next one does not come")
    assert " A s #3" not in running.output
    assert "\x1b" not in running.output
    with broadcaster("tail", "--channel", channel, "--since", "10m", **system.variables) as running:
        eventually(lambda: running.output.count(" A s #") == 6, "all of the last minutes does not come")
    assert "GAP" not in running.output

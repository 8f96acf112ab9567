"""Commands with standard streams that are closed, full, or read by nobody; and errors that nobody has foreseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from broadcaster.redis.server import RedisServer
from tests.support import RedisClient, clean_environment, stored_events

COMMAND = f"{sys.executable} -m broadcaster "


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a shell says to a line in which `broadcaster` is this one."""
    return subprocess.run(
        ["bash", "-c", line.replace("broadcaster ", COMMAND, 1)],
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=50,
        env=clean_environment() | variables,
    )


@pytest.mark.parametrize("command", ["config show", "--help", "publish --help"])
def test_a_full_standard_output_is_one_line(command: str) -> None:
    done = shell(f"broadcaster {command} > /dev/full")
    assert (done.returncode, done.stdout) == (74, "")
    assert done.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("command", ["config show", "--help"])
def test_who_reads_the_first_line_only_has_succeeded(command: str) -> None:
    line = f"(broadcaster {command}; echo $? >&2) | head -c 1"
    done = shell(line)
    assert done.stderr in ("0\n", "0\n0\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_files_of_others(
    closed: str, steady_redis: RedisServer, client: RedisClient
) -> None:
    """What is published is published once, with exit code 0; a retry loop would publish it again."""
    channel = f"events.{uuid.uuid4()}"
    line = f"broadcaster publish --type T --source s --channel {channel} {closed}"
    done = shell(line, BROADCASTER_REDIS__URL=steady_redis.url)
    assert done.returncode == 0, done.stderr
    assert len(stored_events(client, channel)) == 1


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}])
def test_what_is_typed_is_utf_8_whatever_the_locale(
    locale: dict[str, str], steady_redis: RedisServer, client: RedisClient
) -> None:
    channel = f"events.{uuid.uuid4()}"
    line = f"broadcaster publish --type T --source größe-é --channel {channel}"
    done = shell(line, BROADCASTER_REDIS__URL=steady_redis.url, **locale)
    assert done.returncode == 0, done.stderr
    assert "größe-é" in done.stdout
    [(_, payload)] = stored_events(client, channel)
    assert json.loads(payload)["source"] == "größe-é"


def test_an_unforeseen_error_is_one_line_and_tells_nothing(tmp_path: Path) -> None:
    """It says where it is from; the traceback is shown to who asks for it."""
    script = "import broadcaster.cli as c; c.people.dump = lambda *some: {}['secret-7']; c.main()"

    def run(**variables: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, "config", "show"],
            check=False,
            capture_output=True,
            text=True,
            env=clean_environment() | {"PYTHONPATH": os.getcwd()} | variables,
            cwd=tmp_path,
        )

    done = run()
    assert done.returncode == 70
    assert done.stderr.startswith("error: this is a bug: KeyError in ")
    assert done.stderr.count("\n") == 1
    assert "secret-7" not in done.stderr
    assert "secret-7" in run(BROADCASTER_TRACEBACK="1").stderr

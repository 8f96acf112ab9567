"""`make start` and `make loadtest`, as they are typed in a terminal: how they end, and what make says of it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import threading
from pathlib import Path
from types import TracebackType

import pytest

from tests.support import UNIT_S, clean_environment, eventually, free_port
from tests.test_docs import made
from tests.test_honcho import HURRY, exists

CTRL_C = b"\x03"


def outside_of_make(**variables: str) -> dict[str, str]:
    """The environment without what the make that runs the tests has put there."""
    names = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    return {name: value for name, value in clean_environment(**variables).items() if name not in names}


class Terminal:
    """A terminal in which `make ...` is typed, in a folder as a user has it, on free ports."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        addresses = {
            "BROADCASTER_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
            "BROADCASTER_HUB__PORT": str(free_port()),
            "BROADCASTER_REPORT__ALLOW_INVALID": "true",  # the tests share their cores
            "BROADCASTER_REPORT__PICTURES": "false",
        }
        self._screen, terminal = pty.openpty()
        # The leader of a new session that opens a terminal has it: make is its foreground process group.
        script = 'exec 0<>"$0" 1>&0 2>&0; exec make "$@"'
        self._make = subprocess.Popen(
            ["/bin/sh", "-c", script, os.ttyname(terminal), *arguments],
            cwd=made(folder),
            env=outside_of_make(**(addresses | variables)),
            start_new_session=True,
        )
        eventually(lambda: foreground(self._screen) == self._make.pid, "make has no terminal")
        os.close(terminal)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while data := os.read(self._screen, 65_536):
                self.output += data.decode(errors="replace")

    def types(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to make alone."""
        self._make.send_signal(number)

    def until(self, words: str) -> None:
        eventually(lambda: words in self.output, f"it does not say {words!r}:\n{self.output}", 20)

    def wait(self, within: float = 20) -> int:
        """The exit code of make; negative: the signal that ended it."""
        code = self._make.wait(within * UNIT_S)
        self._reader.join(5)
        return code

    @property
    def leftovers(self) -> list[str]:
        """Processes that were started and are still there."""
        started = re.findall(r"(\S+) started \(pid=(\d+)\)", self.output)
        return [name for name, pid in started if exists(os.kill, int(pid))]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill(signal.SIGTERM)
        self.wait()
        os.close(self._screen)


def foreground(terminal: int) -> int:
    """The foreground process group of a terminal; 0: none."""
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return 0


TARGETS = {"start": "SERVER_DOWN server-a #1", "loadtest": "publishing"}


@pytest.mark.parametrize(("target", "words"), TARGETS.items(), ids=TARGETS)
def test_ctrl_c_ends_it_without_an_error_of_make(target: str, words: str, tmp_path: Path) -> None:
    """Ctrl-C in the terminal ends all there is, make by that signal (a shell calls it 130), with no `***`."""
    with Terminal(tmp_path, target) as terminal:
        terminal.until(words)
        terminal.types(CTRL_C)
        assert terminal.wait() == -signal.SIGINT
    assert "***" not in terminal.output
    assert "Traceback" not in terminal.output
    assert not terminal.leftovers


def test_a_make_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM to make alone ends honcho and what honcho has started."""
    with Terminal(tmp_path, "start") as terminal:
        terminal.until("SERVER_DOWN server-a #1")
        terminal.kill(signal.SIGTERM)
        assert terminal.wait() == -signal.SIGTERM
    assert not terminal.leftovers


def test_a_run_that_fails_fails_in_make(tmp_path: Path) -> None:
    """A broken limit is the run's own exit code, and make has nothing to add to what the report says."""
    with Terminal(tmp_path, "loadtest", BROADCASTER_REPORT__MAX_P99_MS="0.0001", **HURRY) as terminal:
        assert terminal.wait(30) == 1
    assert "FAILED: p99 is" in terminal.output
    assert "***" not in terminal.output


def test_a_run_that_cannot_be_fails_in_make(tmp_path: Path) -> None:
    """A run that was none ends with what make has for it, which names the run's own code."""
    with Terminal(tmp_path, "loadtest", BROADCASTER_HUB__PORT="nowhere") as terminal:
        assert terminal.wait(30) == 2
    assert re.search(r"make: \*\*\* \[.*loadtest\] Error 78\r?$", terminal.output, re.MULTILINE)
    assert not terminal.leftovers


def test_make_loadtest_can_be_looked_at(tmp_path: Path) -> None:
    """`make -n` runs nothing, and what is not installed is installed first."""
    folder = made(tmp_path)
    (folder / ".venv/installed").unlink()
    shown = subprocess.run(
        ["make", "-n", "loadtest", "PRESET=smoke"],
        cwd=folder,
        env=outside_of_make(),
        capture_output=True,
        text=True,
        check=False,
        timeout=20 * UNIT_S,
    )
    assert shown.returncode == 0
    assert re.search("pip install(.|\n)*BROADCASTER_PRESET=smoke honcho -f Procfile.loadtest start", shown.stdout)
    assert not (folder / ".venv/installed").exists()
    assert not (folder / "results").exists()


def test_a_start_that_fails_fails_in_make(tmp_path: Path) -> None:
    """What cannot begin is no success of make, either."""
    with Terminal(tmp_path, "start", BROADCASTER_HUB__PORT="nowhere") as terminal:
        assert terminal.wait(30) == 2
    assert "Error 78" in terminal.output
    assert not terminal.leftovers


@pytest.mark.parametrize("code", [0, 7])
def test_an_installation_is_not_silent(code: int, tmp_path: Path) -> None:
    """pip, which takes a while, is accompanied by dots; if it fails, so does make, which tries again next time."""
    folder = made(tmp_path)
    (folder / ".venv/bin").unlink()
    (folder / ".venv/bin").mkdir()
    (folder / ".venv/installed").unlink()
    python = folder / ".venv/bin/python"
    python.write_text(f"#!/bin/sh\nsleep 2.5\nexit {code}\n")
    python.chmod(0o755)
    ended = subprocess.run(
        ["make", ".venv/installed"],
        cwd=folder,
        env=outside_of_make(),
        capture_output=True,
        text=True,
        check=False,
        timeout=20 * UNIT_S,
    )
    assert re.fullmatch(r"installing into \.venv \.\.+\n", ended.stdout)
    assert ended.returncode == (2 if code else 0)
    assert (folder / ".venv/installed").exists() == (code == 0)

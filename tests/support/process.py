"""Processes of the product, their output and their end, and the command line without a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from broadcaster.cli import main
from tests.support.forked import Forked
from tests.support.timing import UNIT_S, eventually

ROOT = Path(__file__).parent.parent.parent

PRODUCT = (sys.executable, "-m", "broadcaster")
"""The command that is forked instead of started."""


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without this product's and honcho's variables, plus `variables`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("BROADCASTER_", "HONCHO_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables


class Speaking:
    """Whoever says something, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def said(self, words: str, within: float = 20.0) -> str:
        """Wait for a line that has `words`; return it."""

        def look() -> str:
            return next((line for line in list(self.lines) if words in line), "")

        return eventually(look, f"no line with {words!r} in:\n{self.output}", within)


def start(
    command: Sequence[str], cwd: Path | str | None, out: int, err: int, **variables: str
) -> subprocess.Popen[bytes] | Forked:
    """Start a process that writes to these open files, by default in a folder without a broadcaster.toml."""
    folder, environment = cwd or tempfile.gettempdir(), clean_environment(**variables)
    if tuple(command[:3]) == PRODUCT:
        return Forked(command[3:], folder, environment, out, err)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )


class Running(Speaking):
    """A process of the product with its output; ended when the block ends, whatever happens."""

    def __init__(self, *command: str, cwd: Path | str | None = None, **variables: str) -> None:
        super().__init__()
        reading, writing = os.pipe()
        try:
            self.process = start(command, cwd, writing, writing, **variables)
        finally:
            os.close(writing)
        self._output = os.fdopen(reading, encoding="utf-8")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            self.lines.append(line.rstrip("\n"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def is_open(self) -> bool:
        """Whether it, or a process that it has started, can still say something."""
        return self._reader.is_alive()

    def wait(self, within: float = 10.0) -> int:
        """The exit code; fails after `within` time units."""
        try:
            code = self.process.wait(within * UNIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within} units:\n{self.output}") from None
        self._reader.join(1)
        return code

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        try:
            self.process.wait(8 * UNIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(1)
        self._output.close()


def broadcaster(*arguments: str, cwd: Path | str | None = None, **variables: str) -> Running:
    """Run `broadcaster ...` as a process of its own, by default in a folder without a broadcaster.toml."""
    return Running(*PRODUCT, *arguments, cwd=cwd, **variables)


class Finished(NamedTuple):
    """What a process of the product that has ended leaves behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Its one line on stderr, without `error: `; fails if it said more, less, or a traceback."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"expected one line on stderr, got:\n{self.stderr}"
        assert lines[0].startswith("error: "), self.stderr
        return lines[0].removeprefix("error: ")


def finished(*arguments: str, cwd: Path | str | None = None, within: float = 20.0, **variables: str) -> Finished:
    """Run `broadcaster ...` to its end, by default in a folder without a broadcaster.toml."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start((*PRODUCT, *arguments), cwd, out.fileno(), err.fileno(), **variables)
        try:
            code = process.wait(within * UNIT_S)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return Finished(code, out.read().decode(), err.read().decode())


def memory_bytes(process: Running) -> int:
    """Memory of a process that is in RAM now."""
    return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(process: Running) -> float:
    """Seconds of CPU that a process has used so far."""
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CommandLine:
    """`broadcaster ...` inside of the test's process: the same function as the real one, 20 times as fast."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for variable in set(os.environ) - set(clean_environment()):
            monkeypatch.delenv(variable)
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, **variables: str) -> Finished:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)
        self._monkeypatch.setattr(sys, "argv", ["broadcaster", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Finished(code or 0, *self._capsys.readouterr())

"""The folder of one run of the load test, found by all its processes without configuration.

honcho starts each process from a helper of its own, so (with `exec` at the beginning of every Procfile line) all
processes of a run have the same grandparent: its process id and start time name the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.runtime import CLOCK
from broadcaster.core.text import reason
from broadcaster.settings import LoadtestTable

log = logging.getLogger("broadcaster")

_PROBE_BYTES: Final = 16_384
_NOT_FOUND: Final = (OSError, ValueError, LookupError, subprocess.CalledProcessError)
"""What looking at a process that is not there, or cannot be seen, ends with."""


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run and the names of the files in it.

    Attributes:
        folder: Where its files are.
        others: Its folders on other hosts: logs of fleet processes that are not in `folder` are in one of these.
    """

    folder: Path
    others: tuple[Path, ...] = ()

    def _log(self, name: str) -> Path:
        path = self.folder / name
        if self.others and not path.exists():
            return next((found for other in self.others if (found := other / name).exists()), path)
        return path

    @classmethod
    def current(cls, loadtest: LoadtestTable) -> Run:
        """The run this process is part of; its folder is made by the first process that asks.

        Raises:
            ConfigurationError: The folder cannot be made, or nothing can be written in it.
        """
        results = results_folder(loadtest)
        try:
            with locked(results / ".lock"):
                folder = results / loadtest.run if loadtest.run else _find_or_make(results, _starter())
                folder.mkdir(exist_ok=True)
            _check_writable(folder)
        except OSError as error:
            raise ConfigurationError(_cannot_write(error, results)) from None
        return cls(folder)

    def refuse_if_there(self, result: Path) -> None:
        """Refuse to begin a part that writes `result` if that exists already: it is of another run.

        Raises:
            ConfigurationError: `result` exists.
        """
        if result.exists():
            raise ConfigurationError(f"{result} is there already; give another loadtest.run, or none")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def channel(self) -> str:
        """The channel of its events: nobody else subscribes to it."""
        return f"events.loadtest.{self.name}"

    @property
    def source(self) -> str:
        """The source of its events: on a channel of others it tells them from theirs."""
        return f"loadtest-{self.name}"

    def has_started(self, pid: int) -> bool:
        """Whether a process is one of the run's own, all of which honcho has started."""
        try:
            return _starter_of(_parent_and_start(pid)[0]) == _starter_of(os.getppid())
        except _NOT_FOUND:
            return False  # there is no such process on this machine

    @property
    def archive(self) -> Path:
        return self.folder.parent / "archive.csv"

    @property
    def published(self) -> Path:
        return self.folder / "published.csv"

    @property
    def config(self) -> Path:
        return self.folder / "broadcaster.toml"

    @property
    def hub(self) -> Path:
        return self.folder / "hub.json"

    @property
    def machine(self) -> Path:
        return self.folder / "machine.json"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.csv"

    @property
    def rig(self) -> Path:
        return self.folder / "rig.csv"

    @property
    def publisher(self) -> Path:
        """What the publisher has measured of itself."""
        return self.folder / "publisher.json"

    @property
    def summary_json(self) -> Path:
        return self.folder / "summary.json"

    def deliveries(self, process: int) -> Path:
        return self._log(f"deliveries.{process}.csv")

    def losses(self, process: int) -> Path:
        return self._log(f"losses.{process}.csv")

    def trace(self, process: int) -> Path:
        return self._log(f"trace.{process}.csv")

    def clocks(self, part: str) -> Path:
        """The clocks of the hub and of Redis, compared with that of a part (`publisher`, `fleet.1`)."""
        return self._log(f"clocks.{part}.csv")

    def fleet(self, process: int) -> Path:
        """The result of a fleet process; written last, so that it marks the end."""
        return self._log(f"fleet.{process}.json")

    def progress(self, process: int) -> Path:
        """How far a fleet process is; written again once a second."""
        return self.folder / f".progress.{process}.json"

    def present(self, process: int) -> Path:
        """The file that marks that a fleet process has started."""
        return self.folder / f".fleet.{process}"

    def connected(self, process: int) -> Path:
        """The file that marks that all clients of a fleet process are connected."""
        return self.folder / f".connected.{process}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made if it is missing."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def results_folder(loadtest: LoadtestTable) -> Path:
    """The folder of all results, which is made if it is missing.

    Raises:
        ConfigurationError: It cannot be made, or nothing can be written in it.
    """
    results = Path(loadtest.results)
    try:
        results.mkdir(parents=True, exist_ok=True)
        _check_writable(results)
    except OSError as error:
        raise ConfigurationError(_cannot_write(error, results)) from None
    return results


def _check_writable(folder: Path) -> None:
    probe = folder / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):  # the reason is told
            probe.unlink()


def _cannot_write(error: OSError, results: Path) -> str:
    where = Path(error.filename or results)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"loadtest.results: {where} is a file, and should be a folder"
    if where.name.startswith("."):
        where = where.parent
    return f"loadtest.results: nothing can be written in {where}: {reason(error)}"


def _find_or_make(results: Path, starter: str) -> Path:
    for folder in results.glob(f"*-{starter}"):
        return folder
    return results / f"{CLOCK.date('%Y%m%d-%H%M%S')}-{starter}"


@functools.cache
def _starter() -> str:
    """A unique name of the process that started the run: its process id, and when it was started.

    The first process of a container has no parent, and where there is neither /proc nor `ps` no process can be
    looked at: then it is a name of this process alone.
    """
    try:
        helper = _running_parent(os.getpid())
        pid = _running_parent(helper) if is_under_honcho() else helper
        return f"{pid}-{_parent_and_start(pid)[1]}"
    except _NOT_FOUND:
        log.warning(
            "which run this process belongs to cannot be told from the process that started it: "
            "give all parts of a run the same loadtest.run"
        )
        return f"{os.getpid()}-{CLOCK.wall_ns() // 1_000_000}"


def _running_parent(pid: int) -> int:
    parent = _parent_and_start(pid)[0]
    if not parent:
        raise ProcessLookupError
    return parent


def is_under_honcho() -> bool:
    """Whether honcho has started this process, as a line of a Procfile."""
    return "HONCHO_PROCESS_NAME" in os.environ


def _starter_of(helper: int) -> tuple[int, str]:
    """The process that has started a helper of honcho's, and when that one was started."""
    honcho = _parent_and_start(helper)[0]
    return honcho, _parent_and_start(honcho)[1]


def _parent_and_start(pid: int) -> tuple[int, str]:
    """The parent of a process, and when the process was started (digits, in whatever unit)."""
    try:
        # Counted after the command's name, which may hold spaces: field 4, and 22 in clock ticks since boot.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1]), fields[19]
    except OSError:
        command = ["ps", "-o", "ppid=,lstart=", "-p", str(pid)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parent, _, started = text.strip().partition(" ")
        return int(parent), "".join(character for character in started if character.isdigit())

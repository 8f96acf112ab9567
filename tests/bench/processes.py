"""Child processes with deadlines, and what the kernel says about them. Linux only (/proc)."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

ROOT: Final = Path(__file__).resolve().parents[2]
"""The source tree; the hub under test runs from it."""
_STOP_GRACE_S: Final = 5.0


class TrialError(Exception):
    """Something the figures rest on failed; the text is one line for a person."""


class Process:
    """One child. Leaving the `with` block ends it by its own id, gently and then for certain.

    `talks=True` reads its JSON records from stdout; all other output goes to a file and is
    shown when the child fails.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        talks: bool = False,
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._unread = b""
        self._child = subprocess.Popen(
            command,
            env=env,
            cwd=cwd or tempfile.gettempdir(),  # not the caller's folder with its broadcaster.toml
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else self._log,
            stderr=self._log,
            # Each in a session of its own, as honcho starts them: Linux shares the cores out between
            # sessions first, and wakes a process of another session up later.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._child.pid

    def check_alive(self) -> None:
        """Raise TrialError if the child has ended."""
        if self._child.poll() is not None:
            raise TrialError(f"{self.name} ended with code {self._child.returncode}: {self._last_words()}")

    def record(self, word: str, timeout_s: float) -> dict[str, Any]:
        """The JSON of the next line `<word> {...}`; TrialError when it does not come in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._line(deadline)
            if line is None:
                self.check_alive()
                raise TrialError(f"{self.name}: no {word} within {timeout_s:.0f} s: {self._last_words()}")
            if line.startswith(word + " "):
                parsed: dict[str, Any] = json.loads(line[len(word) :])
                return parsed

    def finish(self, timeout_s: float) -> None:
        """Wait for the end; TrialError unless it comes in time and with code 0."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TrialError(f"{self.name} did not end within {timeout_s:.0f} s: {self._last_words()}") from None
        if self._child.returncode:
            self.check_alive()

    def terminate(self) -> None:
        """SubscribeRequest the child to end; it may still have something to say."""
        if self._child.poll() is None:
            self._child.terminate()

    def stop(self) -> None:
        try:
            self.terminate()
            self._child.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        finally:
            if self._child.stdout:
                self._child.stdout.close()
            self._log.close()

    def _line(self, deadline: float) -> str | None:
        """One line of output, or None at the deadline or at the end of the output."""
        assert self._child.stdout is not None
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._child.stdout], [], [], left_s)[0]:
                return None
            chunk = os.read(self._child.stdout.fileno(), 65_536)
            if not chunk:
                self._child.wait(_STOP_GRACE_S)
                return None
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 4096))
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"


class MemoryPeak:
    """The most private memory a process had while the `with` block ran, sampled 20 times a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_bytes = self.peak_bytes = anonymous_bytes(pid)

    @property
    def growth_bytes(self) -> int:
        return self.peak_bytes - self.before_bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            try:
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes(self._pid))
            except TrialError:
                return  # whoever waits for the process says so


def anonymous_bytes(pid: int) -> int:
    """Private memory (heap and stacks) of a process, without code and mapped files."""
    for line in _proc(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise TrialError(f"/proc/{pid}/status has no RssAnon (Linux 4.5 or newer is needed)")


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process, in seconds."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3); /proc counts in steps of 10 ms
    except OSError:
        raise TrialError(f"process {pid} is gone") from None


def _proc(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise TrialError(f"process {pid} is gone") from None


def raise_file_limit() -> None:
    """Allow as many open sockets as the hard limit permits; children inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

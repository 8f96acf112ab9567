"""`broadcaster ...` as a process of its own, forked from one that has imported all of it.

To start Python and to import what a hub needs is most of what a short process costs, and a suite starts hundreds.
A forked one is a process all the same, with settings, output, signals, memory, open files and an exit code of its
own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

IMPORTED: Final = (
    __name__,
    "broadcaster.cli",
    "broadcaster.hub.serve",
    "broadcaster.loadtest",
    "broadcaster.publish",
    "broadcaster.redis.server",
    "broadcaster.subscribe",
)
"""What every process begins with."""

_CONTEXT: Final[ForkServerContext] = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(IMPORTED))


class Forked:
    """A process with what the tests need of `subprocess.Popen`, in a session of its own and with an empty stdin.

    Attributes:
        returncode: Its exit code, negative for a signal; None until somebody has asked after its end.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: Path | str, env: Mapping[str, str], out: int, err: int
    ) -> None:
        self.returncode: int | None = None
        self._process = _CONTEXT.Process(
            target=_run, args=(list(arguments), str(cwd), dict(env), _Files(out, err))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("broadcaster", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Files:
    """Open files that go along to the process."""

    def __init__(self, out: int, err: int) -> None:
        self._descriptors = out, err

    def __getstate__(self) -> Any:
        return [reduction.DupFd(each) for each in self._descriptors]

    def __setstate__(self, state: Any) -> None:
        self._descriptors = tuple(each.detach() for each in state)

    def take(self) -> None:
        """Make them stdout and stderr; stdin is empty."""
        for at, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *self._descriptors)):
            os.dup2(descriptor, at)
        for descriptor in set(self._descriptors):
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (
            open(0, encoding="utf-8", closefd=False),  # noqa: SIM115
            open(1, "w", encoding="utf-8", closefd=False),  # noqa: SIM115
            open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False),  # noqa: SIM115
        )


def _run(arguments: list[str], cwd: str, env: dict[str, str], files: _Files) -> None:
    os.setsid()
    gc.freeze()  # what has been imported is nobody's garbage
    files.take()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["broadcaster", *arguments]
    from broadcaster.cli import main

    main()

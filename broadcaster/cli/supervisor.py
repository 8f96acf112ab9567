"""honcho's manager with an end for every case: no part outlives the command that started it."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from types import FrameType
from typing import Any, Final

from honcho.manager import KILL_WAIT, SYSTEM_PRINTER_NAME, Manager
from honcho.printer import Message

from broadcaster.cli import streams
from broadcaster.core.runtime import CLOCK

_LOOK_EVERY_S: Final = 0.1
_BLOCKED_S: Final = 1.0


class Supervisor(Manager):  # type: ignore[misc]
    """Runs parts until the first one ends, a signal comes, or nothing can be printed; then it ends all of them.

    They get SIGTERM, and after 5 s SIGKILL. Each is started by a process of honcho's, its wrapper, which tells the
    pid a moment later; a part that is to end gets its signal then.
    """

    def __init__(self, printer: Any = None) -> None:
        super().__init__(printer)
        self._signal = 0
        self._is_silent = False
        self._lost_output: OSError | None = None
        self._writes = 0  # counted as it begins and as it ends: odd while one is under way
        self._writes_before = 0
        self._ending_at_s: float | None = None

    def loop(self) -> None:
        """Run the parts to their end; `returncode` is that of the first one, or 128 and the signal.

        Raises:
            OSError: Standard output cannot be written; all parts have ended.
        """
        self._take_signals()
        try:
            self._start()
            self._follow()
        except BaseException:
            self._is_silent = True
            self.terminate()
            self._follow()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for wrapper in multiprocessing.active_children():  # the exit of this process would wait for it
                wrapper.join(_LOOK_EVERY_S)
                wrapper.kill()
        if self._lost_output is not None and not self._signal:
            raise self._lost_output

    def _take_signals(self) -> None:
        # Noted and nothing else: one may come within a print, or to a wrapper that does not ignore it yet.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._note)
        signal.signal(signal.SIGALRM, self._interrupt_write)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
        signal.setitimer(signal.ITIMER_REAL, _BLOCKED_S, _BLOCKED_S)

    def _interrupt_write(self, _number: int, _frame: FrameType | None) -> None:
        """Once a signal has come, give up output that nobody reads, such as that of `| less`.

        Raises:
            TimeoutError: One write has been under way since the last time.
        """
        if self._writes % 2 and self._writes == self._writes_before:
            raise TimeoutError("nobody reads it")
        self._writes_before = self._writes

    def _follow(self) -> None:
        """Print what the parts say until all have ended; one that does not even when killed is given up."""
        while self._is_any_left():
            try:
                message = self.events.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                pass
            else:
                self._handle(message)
            if self._signal and not self._terminating:
                self._system_print(f"{signal.Signals(self._signal).name} received\n")
            if self._signal:
                self.returncode = 128 + self._signal
            if self._signal or self._lost_output is not None or self.returncode is not None:
                self.terminate()
            if self._ending_s() > 2 * KILL_WAIT:
                break
            if self._ending_s() > KILL_WAIT:
                self.kill()

    def _is_any_left(self) -> bool:
        parts = self._processes.values()
        return any("returncode" not in part for part in parts if "process" in part and part["process"].pid)

    def _handle(self, message: Message) -> None:
        if message.type == "line":
            self._write(message)
            return
        name, part = message.name, self._processes[message.name]
        part.update(message.data)
        if message.type == "start":
            self._system_print(f"{name} started (pid={part['pid']})\n")
            if self._terminating:
                self._send(name)
        else:
            self._system_print(f"{name} stopped (rc={part['returncode']})\n")
            if self.returncode is None:
                self.returncode = part["returncode"]

    def terminate(self) -> None:
        if not self._terminating:
            self._ending_at_s = CLOCK.monotonic_s()
        super().terminate()

    def _ending_s(self) -> float:
        return 0.0 if self._ending_at_s is None else CLOCK.monotonic_s() - self._ending_at_s

    def _killall(self, force: bool = False) -> None:
        for name, part in self._processes.items():
            if "pid" in part and "returncode" not in part:
                self._send(name, force)

    def _send(self, name: str, force: bool = False) -> None:
        pid = self._processes[name]["pid"]
        self._system_print(f"sending {'SIGKILL' if force else 'SIGTERM'} to {name} (pid {pid})\n")
        (self._procmgr.kill if force else self._procmgr.terminate)(pid)

    def _system_print(self, data: str) -> None:
        self._write(Message("line", data, self._clock.now(), SYSTEM_PRINTER_NAME, None))

    def _write(self, message: Message) -> None:
        """Print a line. Output that is lost ends the parts first, and only then this process."""
        if self._is_silent:
            return
        self._writes += 1
        try:
            self._printer.write(message)
        except OSError as error:
            self._lost_output = error
            streams.abandon(but_errors=True)
        finally:
            self._writes += 1

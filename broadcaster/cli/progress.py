"""The progress bar of `broadcaster loadtest` on a terminal: what the report says once a second, drawn."""

from __future__ import annotations

import re
import sys
from typing import Final

from honcho.printer import Message, Printer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SAID: Final = re.compile(r"([\d,]+) of ([\d,]+) events, ([\d,]+ of [\d,]+ deliveries.*)")
"""A line of `loadtest.report.progress`."""


class BarPrinter(Printer):  # type: ignore[misc]
    """honcho's own printer, but for lines of progress, which move a bar at the bottom.

    The bar goes before another line is printed, and comes again with the next line of progress. Nothing draws it
    in the background: honcho forks.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(sys.stdout)
        self._bar = Progress(
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} events"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=1)
        self._is_shown = False

    def write(self, message: Message) -> None:
        text = message.data.decode("utf-8", "replace") if isinstance(message.data, bytes) else message.data
        if message.name == "report.1" and (found := SAID.fullmatch(text.strip())):
            self._show(int(found[1].replace(",", "")), int(found[2].replace(",", "")), found[3])
            return
        self.hide()
        super().write(message)

    def _show(self, events: int, total: int, rest: str) -> None:
        self._bar.update(self._task, completed=events, total=total, description=rest)
        if not self._is_shown:
            self._bar.start()
            self._is_shown = True
        self._bar.refresh()

    def hide(self) -> None:
        if self._is_shown:
            self._bar.stop()
            self._is_shown = False


def printer() -> BarPrinter | None:
    """A printer with a bar; None where there is no terminal that can draw one (also `TERM=dumb`)."""
    console = Console(highlight=False)
    return BarPrinter(console) if console.is_terminal and not console.is_dumb_terminal else None

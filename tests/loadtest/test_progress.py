"""While a run lasts: a line a second, a bar on a terminal, and nothing where nothing is wanted."""

from __future__ import annotations

import io
import json
import sys
from datetime import datetime
from pathlib import Path

import pytest
from honcho.printer import Message
from rich.console import Console

from broadcaster.cli.progress import SAID, BarPrinter, printer
from broadcaster.loadtest.report.progress import so_far
from broadcaster.loadtest.rig import latency_of, step_of
from broadcaster.loadtest.run import Run
from broadcaster.settings import Settings, load


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def settings_of(processes: int, rate_hz: float = 10.0) -> Settings:
    fleet = {"clients": 50, "processes": processes}
    return load(overrides={"fleet": fleet, "loadtest": {"rate_hz": rate_hz}}).settings


def say(run: Run, process: int, events: int, received: int, latencies_us: list[int]) -> None:
    counts: dict[int, int] = {}
    for latency_us in latencies_us:
        counts[step_of(latency_us)] = counts.get(step_of(latency_us), 0) + 1
    said = {"events": events, "received": received, "latencies": counts}
    run.progress(process).write_text(json.dumps(said))


def test_a_line_says_how_far_a_run_is(run: Run) -> None:
    """From all fleet processes; their latencies are added, not their percentiles."""
    assert so_far(run, settings_of(2)) == ""
    say(run, 1, 12, 300, [1000] * 300)
    assert so_far(run, settings_of(2)) == "12 of 50 events, 300 of 2,500 deliveries, 4 s left"
    say(run, 2, 11, 700, [1000] * 688 + [round(latency_of(260) * 1000)] * 12)
    line = so_far(run, settings_of(2))
    assert line == "12 of 50 events, 1,000 of 2,500 deliveries, p99 so far 8.2 ms, 4 s left"
    assert SAID.fullmatch(line)
    assert so_far(run, settings_of(2, rate_hz=0)).endswith(", p99 so far 8.2 ms")
    say(run, 1, 50, 1500, [1000])
    assert "left" not in so_far(run, settings_of(2))
    say(run, 1, 51, 2501, [1000])  # counted by bytes, a few too many
    assert so_far(run, settings_of(1)).startswith("50 of 50 events, 2,500 of 2,500 deliveries")


def test_nothing_is_said_before_the_first_event(run: Run) -> None:
    """A process that has only warmed up, or whose file is damaged, has said nothing."""
    say(run, 1, 0, 0, [])
    run.progress(2).write_text("{")
    assert so_far(run, settings_of(2)) == ""


@pytest.mark.parametrize("latency_us", [1, 7, 100, 1234, 99_999, 10_000_000])
def test_a_rough_latency_is_near_enough(latency_us: int) -> None:
    """Within 2 %; one that is not above zero is the smallest."""
    assert latency_of(step_of(latency_us)) * 1000 == pytest.approx(latency_us, rel=0.02)
    assert step_of(-5) == step_of(0) == step_of(1) == 0


def line(name: str, text: str) -> Message:
    return Message("line", text.encode(), datetime(2026, 1, 1), name, None)


def test_a_bar_goes_before_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of progress move it, of which none is printed; what else is said stands where it should."""
    lines, drawn = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", lines)
    shown = BarPrinter(Console(file=drawn, force_terminal=True, width=100))
    shown.write(line("hub.1", "ready: events get through\n"))
    shown.write(line("report.1", "12 of 50 events, 600 of 2,500 deliveries, 4 s left\n"))
    assert "12 of 50 events" in drawn.getvalue()
    assert "600 of 2,500 deliveries, 4 s left" in drawn.getvalue()
    shown.write(line("hub.1", "12 of 50 events, 600 of 2,500 deliveries, 4 s left\n"))
    shown.write(line("report.1", "50 of 50 events, 2,500 of 2,500 deliveries\n"))
    shown.hide()
    shown.hide()
    assert [each.partition("| ")[2] for each in lines.getvalue().splitlines()] == [
        "ready: events get through",
        "12 of 50 events, 600 of 2,500 deliveries, 4 s left",
    ]
    assert drawn.getvalue().count("\x1b[?25l") == drawn.getvalue().count("\x1b[?25h") == 2


@pytest.mark.parametrize(("term", "is_bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_that_can_draw_none_has_no_bar(
    term: str, is_bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor has what is no terminal: these get honcho's lines."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert printer() is None
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert (printer() is not None) == is_bar


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR leaves the bar, without colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    drawn = io.StringIO()
    shown = BarPrinter(Console(file=drawn, force_terminal=True, width=100))
    shown.write(line("report.1", "12 of 50 events, 600 of 2,500 deliveries, 4 s left\n"))
    shown.hide()
    assert "12 of 50 events" in drawn.getvalue()
    assert "\x1b[3" not in drawn.getvalue()

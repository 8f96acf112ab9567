"""The page with pictures: what it shows is what was measured, in a real browser, and without asking anybody."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from broadcaster.loadtest import records
from broadcaster.loadtest.records import LossRecord, PublishedRecord
from broadcaster.loadtest.report.outcome import Outcome, read_run
from broadcaster.loadtest.report.page.html import page
from broadcaster.loadtest.report.page.series import heat_map, over_time, rates
from broadcaster.loadtest.report.summary import summary
from broadcaster.loadtest.run import Run
from tests.clients.programs import program
from tests.loadtest.test_report import (
    MS,
    announce,
    change,
    command,
    gap,
    longer,
    publisher_result,
    run,
    write_config,
)
from tests.support import CommandLine, clean_environment, finished

__all__ = ["command", "run"]

PICTURES = ("percentiles", "time", "heat", "rates", "ledger")
WIDTHS = (390, 1440)


def outcome_of(run: Run) -> Outcome:
    return read_run(run.folder)


# The numbers that are drawn


def test_latency_over_time_is_that_of_each_event(run: Run) -> None:
    """Four events to four clients: each point is an event, at the time it was due; too few for a percentile."""
    timed = over_time(outcome_of(run))
    assert timed.is_time
    assert [*timed.at] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [*timed.least_ms] == [1, 2, 3, 4]
    assert [*timed.most_ms] == [4, 5, 6, 7]
    assert [*timed.deliveries] == [4] * 4
    assert np.isnan([*timed.p50_ms, *timed.p99_ms]).all()


def test_a_long_run_is_drawn_in_short_times(run: Run) -> None:
    """Of 1,000 events each point is some of them, none is left out, and the slowest stays the slowest."""
    longer(run, 1000)
    timed = over_time(outcome_of(run))
    assert len(timed.at) == 240
    assert (timed.deliveries.sum(), timed.least_ms[0], timed.most_ms[-1]) == (1000, 1.0, 1000.0)


def test_events_that_were_due_at_once_stand_beside_each_other(run: Run) -> None:
    """A burst has no time to be drawn over: the events are numbered."""
    rows = records.read(run.published, PublishedRecord)
    at_once = [PublishedRecord(row.sequence, row.event_id, 0, 0, 0, 0, 1, "", "a1b2", row.offset) for row in rows]
    records.write(run.published, PublishedRecord, at_once)
    timed = over_time(outcome_of(run))
    assert (timed.is_time, [*timed.at]) == (False, [1, 2, 3, 4])


def test_the_heat_map_has_the_slowest_of_each_place(run: Run) -> None:
    """Client c gets event n after c + n ms; where nothing came, nothing is."""
    change(run, 2, lambda rows: rows[1:])
    announce(run, 2, gap(3, 1, 1))
    heat = heat_map(outcome_of(run))
    assert np.isnan(heat.slowest_ms[3, 0])
    assert [*heat.slowest_ms[0]] == [1, 2, 3, 4]
    assert [*heat.slowest_ms[3, 1:]] == [5, 6, 7]


def test_the_rates_are_of_all_deliveries(run: Run) -> None:
    """Each is counted in one of the times."""
    longer(run, 1000)
    edges, per_s = rates(outcome_of(run))
    assert sum(per_s * np.diff(edges)) == pytest.approx(1000)
    assert edges[0] == 0
    assert edges[-1] >= 2.0


# The page


class Text(HTMLParser):
    """What a page shows, and where it would ask for something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.asks: list[str] = []
        self.ids: list[str] = []
        self._in: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action") and value and not value.startswith("#"):
                self.asks.append(value[:40])
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "h2" and data.strip():
            self.titles.append(data.strip())


def test_a_page_asks_nobody_for_anything(run: Run) -> None:
    """No address but that of data in the page itself; no id comes twice; small."""
    longer(run, 1000)
    html = page(outcome_of(run))
    shown = Text(html)
    assert all(asked.startswith("data:") for asked in shown.asks), shown.asks
    assert not re.findall(r"@import|https?://(?!127\.0\.0\.1|www\.w3\.org)[a-z]", html.partition("<pre>")[0])
    assert len(shown.ids) == len(set(shown.ids))
    assert shown.titles[:5] == [
        "Latency by percentile",
        "Latency over time",
        "Subscriber × time",
        "Deliveries per second",
        "Ledger",
    ]
    assert len(html) < 500_000


def test_what_a_hub_has_named_is_no_markup(run: Run) -> None:
    """A cause may be anything, and so may be a reason why a client could not connect."""
    write_config(run, max_dropped=4)
    change(run, 2, lambda rows: [])
    announce(run, 2, LossRecord(3, "<script>alert(1)</script>", "a1b2", 1, None, None, None, "", 5 * MS, 5 * MS))
    html = page(outcome_of(run))
    assert "alert(1)</script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_run_without_deliveries_has_a_page(run: Run) -> None:
    """There is nothing to draw but the ledger."""
    for process in (1, 2):
        change(run, process, lambda rows: [])
    assert Text(page(outcome_of(run))).titles[0] == "Ledger"


ODD = {
    "negative": lambda rows: [records.DeliveryRecord(3, "e1", 1, 0, 0), *rows[1:]],
    "one": lambda rows: rows[:1],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_odd_runs_have_pages(odd: Any, run: Run) -> None:
    """Latencies below zero, and a single delivery, are drawn without a word of warning."""
    for process in (1, 2):
        change(run, process, odd if process == 2 else lambda rows: [])
    assert len(Text(page(outcome_of(run))).titles) >= 5


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Browser, path: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """A page in a window, and all that it has said or asked for."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    shown = context.new_page()
    said: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda asked: said.append(asked.url) if asked.url != path.as_uri() else None)
    shown.goto(path.as_uri())
    return shown, [url for url in said if not url.startswith("data:")]


FONTS = """() => [...document.querySelectorAll('svg text')]
    .filter((text) => text.getClientRects().length)
    .map((text) => [parseFloat(getComputedStyle(text).fontSize), text.getScreenCTM()])
    .map(([size, matrix]) => size * Math.hypot(matrix.a, matrix.b))"""


def test_it_can_be_read_in_a_browser(browser: Browser, run: Run, tmp_path: Path) -> None:
    """Nothing is said on the console or asked for, nothing overflows, labels have 10 px, each picture shows."""
    longer(run, 1000)
    announce(run, 1, gap(0, 1000))
    run.publisher.write_text(json.dumps(publisher_result(stalls=[[500 * MS, 30.0]])))
    path = tmp_path / "report.html"
    path.write_text(page(outcome_of(run)))
    for width, scheme in itertools.product(WIDTHS, ("light", "dark")):
        look(browser, path, width, scheme)


def look(browser: Browser, path: Path, width: int, scheme: str) -> None:
    shown, said = opened(browser, path, width, scheme)
    assert said == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    fonts = shown.evaluate(FONTS)
    assert len(fonts) > 20
    assert min(fonts) >= 10
    which = "narrow" if width < 640 else "wide"
    for name in PICTURES:
        box = shown.locator(f"#{name} + figure .drawing.{which} svg").bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
        other = shown.locator(f"#{name} + figure .drawing.{'wide' if which == 'narrow' else 'narrow'}")
        assert not other.is_visible()
    ink = "rgb(27, 31, 36)" if scheme == "light" else "rgb(230, 237, 243)"
    assert shown.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink
    shown.context.close()


READ_BACK = r"""() => {
    const drawing = document.querySelector('#percentiles + figure .drawing.wide');
    const ticks = [...drawing.querySelectorAll('[id*="-ytick_"]')].map((tick) => [
        parseFloat(tick.querySelector('text').textContent),
        parseFloat(tick.querySelector('path').getAttribute('d').split(' ')[2])]);
    const marks = Object.fromEntries([...drawing.querySelectorAll('[id*="-mark-"]')].map((mark) => [
        mark.id.split('-mark-')[1], parseFloat(mark.querySelector('use').getAttribute('y'))]));
    return [ticks, marks];
}"""


def test_what_is_drawn_is_what_was_measured(browser: Browser, run: Run, tmp_path: Path) -> None:
    """The dots of the percentile curve, read by the axis beside them, are those of summary.json; so is a table."""
    longer(run, 1000)
    outcome = outcome_of(run)
    path = tmp_path / "report.html"
    path.write_text(page(outcome))
    shown, _ = opened(browser, path, 1440, "light")
    (low, low_y), *_, (high, high_y) = shown.evaluate(READ_BACK)[0]
    marks = shown.evaluate(READ_BACK)[1]
    known = {name: value for name, value in summary(outcome)["scopes"]["run"]["latency_ms"].items() if value}
    assert {
        name: low + (y - low_y) / (high_y - low_y) * (high - low) for name, y in marks.items()
    } == pytest.approx({name: value for name, value in known.items() if name != "max"}, rel=1e-4)
    cells = shown.locator("#percentiles ~ details").first.locator("td").all_text_contents()
    assert {name: float(value) for name, value in zip(cells[::2], cells[1::2], strict=True)} == known
    shown.locator("#percentiles + figure .drawing.wide").hover(position={"x": 400, "y": 100})
    assert re.fullmatch(r"[\d.]+ % within [\d.,]+ ms", shown.locator(".tip:visible").inner_text())
    shown.context.close()


# The command


def test_the_command_writes_a_page(run: Run, command: CommandLine, tmp_path: Path) -> None:
    """Where it is told to; the folder of the run stays as it is."""
    before = {path.name for path in run.folder.iterdir()}
    ended = command("report", str(run.folder), "--html", str(tmp_path / "page.html"))
    assert (ended.code, ended.stderr) == (0, "")
    assert f"Pictures: {tmp_path / 'page.html'}\n" in ended.stdout
    assert (tmp_path / "page.html").read_text() == page(outcome_of(run))
    assert {path.name for path in run.folder.iterdir()} == before


def test_a_page_that_cannot_be_written_is_one_line(run: Run, command: CommandLine) -> None:
    """After the text, which is not lost."""
    ended = command("report", str(run.folder), "--html", "/proc/nowhere/page.html")
    assert ended.code == 74
    assert ended.complaint == "cannot write /proc/nowhere/page.html: No such file or directory"
    assert "PASSED" in ended.stdout


def test_matplotlib_needs_no_folder_of_its_own(run: Run, tmp_path: Path) -> None:
    """Where it cannot write its configuration the page is made all the same, and nothing is said."""
    ended = finished(
        "report", str(run.folder), "--html", str(tmp_path / "page.html"), MPLCONFIGDIR="/proc/nowhere"
    )
    assert (ended.code, ended.stderr) == (0, "")
    assert (tmp_path / "page.html").exists()


def test_without_matplotlib_the_text_says_what_to_install(run: Run) -> None:
    """One line, exit code 69, after the text."""
    script = "import sys; sys.modules['matplotlib'] = None; from broadcaster.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", script, "report", str(run.folder), "--open"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 69
    assert ended.stderr == "error: matplotlib is not installed: pip install 'critical-event-broadcaster[report]'\n"
    assert "PASSED" in ended.stdout

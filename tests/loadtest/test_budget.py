"""The hops in a report: the table, the JSON, the archive and the picture say the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from broadcaster.loadtest.hops import HOPS, Part, budget, instants
from broadcaster.loadtest.records import TraceRecord
from broadcaster.loadtest.report.budget import groups
from broadcaster.loadtest.report.outcome import Outcome, read_run
from broadcaster.loadtest.report.page.html import page
from broadcaster.loadtest.report.summary import summary, summary_rows
from broadcaster.loadtest.report.text import present
from broadcaster.loadtest.run import Run
from tests.loadtest.test_report import MS, longer, run, table_of

__all__ = ["run"]


def budgeted(run: Run, *, read_after_ms: float = 0.3) -> Outcome:
    """1,000 events to one client, the n-th after n ms; each stored after 0.2 ms, and written after 0.6 ms."""
    longer(run, 1000)
    outcome = read_run(run.folder)
    traces = [
        TraceRecord(
            row.event_id,
            (row.published_mono_ns + MS // 5) // 1000,
            row.published_mono_ns + round(read_after_ms * MS),
            row.published_mono_ns + 3 * MS // 5,
            0,
        )
        for row in outcome.published
    ]
    part = Part(0, 1, instants(outcome.published, traces))
    return replace(outcome, budget=budget(outcome.published, outcome.latencies, [part]))


def test_the_text_has_the_hops(run: Run) -> None:
    """A line for each, and the latency, whose mean is the sum of theirs; what is not known is not told."""
    text = present(budgeted(run), run.folder)
    table = table_of(text)
    assert table["hop"] == ["deliveries", "mean (ms)", "p50 (ms)", "p95 (ms)", "p99 (ms)", "max (ms)", "share"]
    assert [table[name][1] for name in HOPS] == ["0.000", "0.200", "0.100", "0.300", "499.900"]
    assert table["latency"] == ["1,000", "500.500", "500.000", "950.000", "990.000", "1000.000", "100.0 %"]
    assert sum(float(table[name][1]) for name in HOPS) == float(table["latency"][1])
    assert "Hops known for 1,000 of 1,000 events." in text
    assert "below zero" not in text
    assert "hop" not in table_of(present(read_run(run.folder), run.folder))


def test_a_negative_hop_is_counted(run: Run) -> None:
    """Clocks that disagree are told, and nothing is clamped."""
    text = present(budgeted(run, read_after_ms=0.1), run.folder)
    assert table_of(text)["to_hub"][1] == "-0.100"
    assert "1,000 hops are below zero: clocks disagree." in text


def test_programs_get_the_same(run: Run) -> None:
    """In summary.json, and the means in the archive; without a budget they are null, and empty."""
    outcome = budgeted(run)
    written = summary(outcome)["hops"]
    assert (written["known_events"], written["events"], written["negative"], written["others"]) == (
        1000,
        1000,
        0,
        [],
    )
    assert [row["name"] for row in written["rows"]] == [*HOPS, "latency"]
    assert written["rows"][-1]["p99_ms"] == summary(outcome)["scopes"]["run"]["latency_ms"]["p99"]
    assert sum(row["share"] for row in written["rows"][:-1]) == pytest.approx(1)
    assert summary_rows(outcome)[0]["to_redis_mean_ms"] == 0.2
    assert summary(read_run(run.folder))["hops"] is None
    assert summary_rows(read_run(run.folder))[0]["to_redis_mean_ms"] is None


def test_the_picture_has_the_means(run: Run) -> None:
    """Of all deliveries, of the slowest tenth, and of the slowest hundredth; they add up to their mean latency."""
    outcome = budgeted(run)
    assert outcome.budget is not None
    means = groups(outcome.budget)
    assert {name: round(float(np.sum(hops)), 6) for name, hops in means.items()} == {
        "all": 500.5,
        "slowest 10 %": 950.5,
        "slowest 1 %": 995.5,
    }
    assert ">Where the time goes</h2>" in page(outcome)
    assert "Where the time goes" not in page(read_run(run.folder))

"""The report for programs: stable keys that are documented, JUnit, Markdown, and HdrHistogram's percentiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from broadcaster.loadtest import archive, records
from broadcaster.loadtest.records import LossRecord
from broadcaster.loadtest.report.ci import junit, markdown
from broadcaster.loadtest.report.hgrm import hgrm
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.summary import summary
from broadcaster.loadtest.run import Run
from tests.loadtest.test_budget import budgeted
from tests.loadtest.test_report import (
    BROKEN,
    DISTURBED,
    command,
    run,
    slow,
    write_config,
)
from tests.support import ROOT, CommandLine

__all__ = ["command", "run"]

DOCUMENT = (ROOT / "docs" / "measuring.md").read_text()
ANY_NAME = (
    *("validity/cpu_pct", "validity/stalls_ms", "validity/still_pct", "validity/lags_ms", "clocks/hop_errors_ms"),
    *("scopes", "lost", "hub", "machine"),
)
"""Where the names of keys are data."""


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys, as the document writes them."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            is_any = path.endswith(ANY_NAME)
            yield from keys_of(part, f"{path}/{'*' if is_any else name}".lstrip("/"))
    elif isinstance(value, list):
        for part in value:
            yield from keys_of(part, f"{path}[]")
    else:
        yield path


def documented(heading: str) -> set[str]:
    """What stands in code in the first column of the last table under a heading."""
    section = DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


def test_every_key_is_documented(run: Run) -> None:
    """The keys of a run in which everything happened are those of docs/measuring.md, and no others."""
    written = summary(budgeted(run))
    written["hops"]["others"] = written["hops"]["rows"][:1]
    assert written["validity"]["notes"] == []
    written["validity"] |= {"notes": ["one"], "reasons": ["one"]}
    assert written["clocks"]["notes"] == []
    written["clocks"]["notes"] = ["one"]
    written["scopes"]["run"]["ledger"]["lost"] = {"expired": 1}
    flat = {**written, "hub": {"events_received": 4}}
    found = {key for key in keys_of(flat) if not key.endswith("ledger/lost")}
    assert found == documented("For programs")


def test_every_column_is_documented() -> None:
    """Those of the archive, too."""
    assert set(archive.COLUMNS) == documented("The archive")


def test_a_summary_says_what_the_text_says(run: Run, command: CommandLine) -> None:
    """The same figures, as numbers; what is not known is null; the exit code is that of the run."""
    slow(max_p99_ms=989.9)(run)
    ended = command("report", str(run.folder), "--json")
    assert (ended.code, ended.stderr) == (1, "")
    written = json.loads(ended.stdout)
    assert written == summary(read_run(run.folder))
    whole = written["scopes"]["run"]
    assert whole["latency_ms"] == {
        "p50": 500.0, "p90": 900.0, "p95": 950.0, "p99": 990.0, "p99.9": None, "max": 1000.0
    }  # fmt: skip
    assert whole == written["scopes"]["fleet.1"]
    assert (written["run"], written["verdict"], written["schema"]) == (run.name, "FAILED", 1)
    assert [limit["broken"] for limit in written["limits"] if not limit["holds"]] == [
        "p99 is 990.0 ms, 989.9 ms allowed"
    ]
    assert sum(part["deliveries"] for part in written["histogram"]) == 1000


def test_settings_are_told_apart_by_their_hash(run: Run) -> None:
    """Two runs with the same settings have the same."""
    first = summary(read_run(run.folder))["settings_sha256"]
    write_config(run)
    assert summary(read_run(run.folder))["settings_sha256"] == first
    write_config(run, max_dropped=1)
    assert summary(read_run(run.folder))["settings_sha256"] != first


def test_junit_has_a_case_for_each_limit(run: Run, command: CommandLine) -> None:
    """A broken limit is a failure, an INVALID rig an error, or skipped where it is allowed."""
    BROKEN["dropped"][0](run)
    DISTURBED["late"][0](run)
    ended = command("report", str(run.folder), "--junit")
    suite = ElementTree.fromstring(ended.stdout)
    assert ended.code == 1
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("7", "1", "1")
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["max_dropped"]
    [error] = suite.iter("error")
    assert "20 ms late" in str(error.get("message"))
    write_config(run, max_dropped=2, allow_invalid=True)
    suite = ElementTree.fromstring(junit(read_run(run.folder)))
    assert [suite.get(name) for name in ("failures", "errors", "skipped")] == ["0", "0", "1"]


def test_markdown_is_a_comment(run: Run, command: CommandLine) -> None:
    """Verdict, a line for each limit, a table; what strangers said is no markup."""
    ended = command("report", str(run.folder), "--markdown")
    assert (ended.code, ended.stdout.splitlines()[0]) == (0, "### ✓ Load test PASSED, VALID")
    assert "- ✓ dropped deliveries: 0 (0 allowed)\n" in ended.stdout
    assert "| received | 16 of 16 |\n" in ended.stdout
    assert "| p99 | too few samples |\n" in ended.stdout
    BROKEN["silently_lost"][0](run)
    text = markdown(read_run(run.folder), run.folder)
    assert text.startswith("### ✗ Load test FAILED, VALID\n")
    assert "- ✗ silent losses: 2 (0 allowed): the ledger does not close" in text


def test_what_a_hub_has_named_breaks_no_form(run: Run) -> None:
    """A cause may be anything: control characters, markup, other scripts."""
    cause = "\x1b[31m<b>|`\ud800 日本"
    records.write(
        run.losses(1), LossRecord, [LossRecord(0, cause.replace("\ud800", ""), "a1b2", 1, 1, None, None, "", 0, 0)]
    )
    outcome = read_run(run.folder)
    assert ElementTree.fromstring(junit(outcome)).tag == "testsuite"
    assert "\x1b" not in markdown(outcome, run.folder) + json.dumps(summary(outcome))


@pytest.mark.parametrize(
    "arguments", [("--json", "--loadtest"), ("--hgrm", "--explain", ".")], ids=["run", "explain"]
)
def test_a_form_is_of_a_run_that_has_ended(arguments: tuple[str, ...], command: CommandLine) -> None:
    """Nothing else goes with it."""
    assert command("report", *arguments).code == 2


# .hgrm

LINE = re.compile(r" *(\d+\.\d{3}) (0\.\d{12}|1\.0{12}) +(\d+)(?: +(\d+\.\d\d))?")


@pytest.mark.parametrize("count", [1, 2, 10, 999, 2500])
def test_percentiles_as_hdrhistogram_writes_them(count: int) -> None:
    """Each line: a value, a share, and how many samples are at or below that value; shares go towards 1."""
    samples_ns = np.arange(1, count + 1) * 1_000_000
    header, blank, *lines, mean, largest, _ = hgrm(samples_ns).splitlines()
    assert header.split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    assert blank == ""
    rows = [found.groups() for line in lines if (found := LINE.fullmatch(line))]
    assert len(rows) == len(lines)
    for value, share, total, inverse in rows:
        assert float(value) == float(total) == max(1, np.ceil(round(float(share) * count, 6)))
        assert (
            inverse is None
            if float(share) == 1
            else float(inverse) == pytest.approx(1 / (1 - float(share)), abs=0.01)
        )
    shares = [float(share) for _, share, _, _ in rows]
    assert shares == sorted(set(shares))
    assert (shares[0], shares[-1], float(rows[-1][0])) == (0, 1, count)
    assert re.fullmatch(rf"#\[Mean    = +{(count + 1) / 2:.3f}, StdDeviation   = +[\d.]+\]", mean)
    assert re.fullmatch(rf"#\[Max     = +{count}\.000, Total count    = +{count}\]", largest)


def test_percentiles_of_nothing() -> None:
    """A header and a count of 0."""
    assert "Total count    =            0]" in hgrm(np.empty(0, np.int64))

"""The archive: stable columns, one row per run, never torn, never mixed with something else."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from broadcaster.core.errors import ConfigurationError, OutputError
from broadcaster.loadtest import archive
from tests.support import ROOT, clean_environment

RELEASED = [
    *("run", "scope", "verdict", "clients", "events", "rate_hz", "expected", "received", "dropped"),
    *("p50_ms", "p95_ms", "p99_ms", "max_ms", "duplicates", "out_of_order", "negative", "disconnects"),
    *("publish_failed", "fleet_lag_p99_ms", "fleet_lag_max_ms", "broadcaster", "python", "redis_server"),
    *("sanic", "uvloop", "system", "cpu", "cores"),
]
"""The columns of version 0.1.0: they never change; others may follow them."""

ADDED = [
    *("lost_named", "lost_unexplained", "reconnects", "validity", "reasons", "p90_ms", "p999_ms"),
    *("last_p50_ms", "last_p99_ms", "commit", "settings_sha256", "steal_pct", "others_cpu_pct"),
    *("schedule_mean_ms", "to_redis_mean_ms", "to_hub_mean_ms", "in_hub_mean_ms", "fanout_mean_ms"),
]
"""What has followed them since, in this order."""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_are_stable() -> None:
    """Columns that were released stay, with their names and places; no name comes twice."""
    assert list(archive.COLUMNS) == RELEASED + ADDED
    assert len(set(archive.COLUMNS)) == len(archive.COLUMNS)
    units = [name for name in archive.COLUMNS if "p50" in name or "p99" in name or "lag" in name or "max" in name]
    assert all(name.endswith("_ms") for name in units)


def test_a_summary_is_whole_or_not_there(tmp_path: Path) -> None:
    """Who finds it can read all of it."""
    path = tmp_path / "summary.csv"
    with pytest.raises(ValueError, match="nonsense"):
        archive.write_summary(path, [{"run": "first"}, {"nonsense": 1}])
    assert list(tmp_path.iterdir()) == []
    archive.write_summary(path, [{"run": "first"}, {"run": "first", "scope": "fleet.1"}])
    assert [row["scope"] for row in rows_of(path)] == ["", "fleet.1"]


def test_the_first_run_makes_the_file(tmp_path: Path) -> None:
    """A new archive gets a header; what a run does not say stays empty."""
    path = tmp_path / "archive.csv"
    archive.append(path, {"run": "first", "p50_ms": 0.61, "max_ms": None, "cpu": 'A "CPU", 2 GHz'})
    archive.append(path, {"run": "second", "dropped": 0})
    first, second = rows_of(path)
    assert list(first) == list(archive.COLUMNS)
    assert (first["run"], first["p50_ms"], first["max_ms"], first["cpu"]) == (
        "first",
        "0.61",
        "",
        'A "CPU", 2 GHz',
    )
    assert (second["run"], second["dropped"], second["p50_ms"]) == ("second", "0", "")
    assert path.read_text().count("run,scope") == 1


def test_an_empty_file_is_a_new_archive(tmp_path: Path) -> None:
    """A file of that name without content gets its header."""
    path = tmp_path / "archive.csv"
    path.touch()
    archive.append(path, {"run": "first"})
    assert [row["run"] for row in rows_of(path)] == ["first"]


APPEND_MANY = """
import sys
from pathlib import Path
from broadcaster.loadtest import archive
path, name = Path(sys.argv[1]), sys.argv[2]
for number in range(150):
    archive.append(path, {"run": name, "cpu": name * 20_000, "cores": number})
"""


def test_runs_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    """Two processes add 150 long rows each: one header, every row whole, every writer's rows in order."""
    path = tmp_path / "archive.csv"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, str(path), name], cwd=ROOT, env=clean_environment())
        for name in ("a", "b")
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    rows = rows_of(path)
    assert Counter(row["cpu"] for row in rows) == {"a" * 20_000: 150, "b" * 20_000: 150}
    for name in ("a", "b"):
        assert [row["cores"] for row in rows if row["run"] == name] == [str(n) for n in range(150)]


OTHERS = {
    "other_columns": "a,b,c\n1,2,3\n",
    "fewer_columns": ",".join(RELEASED[:-1]) + "\n",
    "of_a_later_version": ",".join([*archive.COLUMNS, "later"]) + "\n",
    "another_order": ",".join(reversed(RELEASED)) + "\n",
    "no_header": "x" * 100 + "\n",
    "blank_line": "\n",
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS.keys())
def test_another_file_is_left_alone(text: str, tmp_path: Path) -> None:
    """An archive with other columns is refused with a hint, and stays as it is."""
    path = tmp_path / "archive.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"archive\.csv: has other columns; move it away"):
        archive.check(path)
    with pytest.raises(OutputError, match=r"archive\.csv: has other columns; move it away"):
        archive.append(path, {"run": "mine"})
    assert path.read_text() == text


def test_an_archive_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """The columns of today are added to it, empty in its rows, which stay as they are; no draft is left."""
    path = tmp_path / "archive.csv"
    old = {name: f"old {name}" for name in RELEASED} | {"cpu": 'A "CPU", 2 GHz\nand a line'}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RELEASED)
        writer.writeheader()
        writer.writerow(old)
    for name in ("first", "second"):
        archive.append(path, {"run": name, "reconnects": 3})
    rows = rows_of(path)
    assert list(rows[0]) == list(archive.COLUMNS)
    assert rows[0] == dict.fromkeys(archive.COLUMNS, "") | old
    assert [(row["run"], row["reconnects"]) for row in rows[1:]] == [("first", "3"), ("second", "3")]
    assert {file.name for file in tmp_path.iterdir()} == {"archive.csv", ".lock"}


def test_runs_at_the_same_time_bring_an_archive_up_to_date(tmp_path: Path) -> None:
    """Two processes find an archive of an earlier version: it is extended once, and no row is lost."""
    path = tmp_path / "archive.csv"
    path.write_text(",".join(RELEASED) + "\n" + "\n".join(f"old-{number}" for number in range(5000)) + "\n")
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, str(path), name], cwd=ROOT, env=clean_environment())
        for name in ("a", "b")
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    rows = rows_of(path)
    assert [row["run"] for row in rows[:5000]] == [f"old-{number}" for number in range(5000)]
    assert Counter(row["run"] for row in rows[5000:]) == {"a": 150, "b": 150}


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    """A row with a name that is no column is an error: nothing is dropped silently."""
    with pytest.raises(ValueError, match="p75_ms"):
        archive.append(tmp_path / "archive.csv", {"run": "first", "p75_ms": 1.0})


def test_a_summary_has_the_same_columns(tmp_path: Path) -> None:
    """A run's summary.csv is one header, the whole run, and a row per fleet process; written again, replaced."""
    path = tmp_path / "summary.csv"
    for _ in range(2):
        archive.write_summary(path, [{"scope": "run", "clients": 5}, {"scope": "fleet.1", "clients": 5}])
    rows = rows_of(path)
    assert list(rows[0]) == list(archive.COLUMNS)
    assert [row["scope"] for row in rows] == ["run", "fleet.1"]


def kept(change: Callable[[str], bytes | str]) -> bytes:
    """An archive with a run of 0.61 ms, as something else has saved it again."""
    header = ",".join(archive.COLUMNS)
    text = f"{header}\n" + ",".join("0.61" if name == "p50_ms" else "1" for name in archive.COLUMNS) + "\n"
    changed = change(text)
    return changed if isinstance(changed, bytes) else changed.encode()


SAVED = {
    "semicolons": (lambda text: text.replace(",", ";").replace("0.61", "0,61"), "semicolons"),
    "tabs": (lambda text: text.replace(",", "\t"), "tabs"),
    "byte_order_mark": (lambda text: f"\ufeff{text}", "byte order mark"),
    "all_of_it": (lambda text: "\ufeff" + text.replace(",", ";").replace("\n", "\r\n"), "spreadsheet"),
    "carriage_returns": (lambda text: text.replace("\n", "\r"), "lines end with a carriage return only"),
    "macintosh": (lambda text: text.replace(",", ";").replace("\n", "\r"), "semicolons"),
    "carriage_returns_of_another": (lambda text: "a,b\r1,2\r", "has other columns"),
    "utf_16": (lambda text: text.encode("utf-16"), "UTF-16"),
    "decimal_commas": (lambda text: text.replace("0.61", '"0,61"'), "p50_ms of the run 1 has a decimal comma"),
    "latin_1": (lambda text: text.replace("0.61", "0.61 µs").encode("latin-1"), "no UTF-8"),
    "no_csv": (lambda text: text + '"' + "x" * 200_000, "line 3"),
}


@pytest.mark.parametrize(("change", "said"), SAVED.values(), ids=SAVED.keys())
def test_an_archive_that_a_spreadsheet_has_saved_is_recognised(
    change: Callable[[str], bytes | str], said: str, tmp_path: Path
) -> None:
    """Before a run and after it, in one line that says what was seen and what to do; it stays as it is."""
    path = tmp_path / "archive.csv"
    path.write_bytes(before := kept(change))
    with pytest.raises(ConfigurationError, match=said) as refused:
        archive.check(path)
    if "line" not in said and "decimal" not in said and "UTF-8" not in said:  # not in the first line
        with pytest.raises(OutputError, match=said):
            archive.append(path, {"run": "mine"})
    assert "move it away" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [str.strip, lambda text: text.replace("\n", "\r\n"), lambda text: text.strip() + "\r"]
)
def test_a_row_has_a_line_of_its_own(change: Callable[[str], str], tmp_path: Path) -> None:
    """Whatever an editor has put at the end of the last one."""
    path = tmp_path / "archive.csv"
    path.write_bytes(kept(change))
    archive.check(path)
    archive.append(path, {"run": "mine"})
    assert [row["run"] for row in rows_of(path)] == ["1", "mine"]


def test_what_is_no_file_is_no_archive(tmp_path: Path) -> None:
    """A folder of that name, or a pipe, which would wait for a reader."""
    folder, pipe = tmp_path / "a.csv", tmp_path / "b.csv"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        with pytest.raises(ConfigurationError, match=f"{path.name}: is no file"):
            archive.check(path)
        with pytest.raises(OutputError, match="is no file"):
            archive.append(path, {"run": "mine"})


APPEND_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from broadcaster.core.errors import OutputError
from broadcaster.loadtest import archive
path = Path(sys.argv[1])
archive.append(path, {"run": "first"})
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10,) * 2)
try:
    archive.append(path, {"run": "second", "cpu": "x" * 100})
except OutputError as error:
    print(error)
"""


def test_a_row_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A disk that is full in the middle of a row: what was there is there, and nothing else."""
    path = tmp_path / "archive.csv"
    done = subprocess.run(
        [sys.executable, "-c", APPEND_ON_A_FULL_DISK, str(path)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"cannot write {path}: file too large\n"
    assert [row["run"] for row in rows_of(path)] == ["first"]
    assert path.read_text().endswith("\n")


def test_a_link_stays_one(tmp_path: Path) -> None:
    """An archive that all machines share is written where it is."""
    shared = tmp_path / "shared.csv"
    (tmp_path / "archive.csv").symlink_to(shared)
    for name in ("first", "second"):
        archive.check(tmp_path / "archive.csv")
        archive.append(tmp_path / "archive.csv", {"run": name})
    assert [row["run"] for row in rows_of(shared)] == ["first", "second"]
    assert (tmp_path / "archive.csv").is_symlink()

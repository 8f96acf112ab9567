"""The CSV files of a run: what is written is what is read, and half a file is no file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import records
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord, Record

PUBLISHED = [
    PublishedRecord(1, "a", 10**18, 10**18 + 1, 1_768_068_834_227_000, 1_768_068_834_227_001, 3, ""),
    PublishedRecord(2, "b", 0, 0, 0, 0, None, 'Redis closed the connection, "now"\nwith a second line'),
    PublishedRecord(3, "c", -5, 0, 0, 0, 0, "ä,;"),
    PublishedRecord(4, "d", 0, 0, 0, 0, 1, "", "a1b2", 2**53 - 1),
]
DELIVERED = [DeliveryRecord(0, "a", 1, 10**18, 1_768_068_834_227_000), DeliveryRecord(49, "b", 2, 5, 6)]
LOST = [
    LossRecord(0, "redis_restarted", "a1b2", 13, None, 4, 9, "", 10**18, 10**18),
    LossRecord(49, "disconnected 1006", "", None, None, None, None, "a1b2-12", 5, None),
]

ROWS: dict[str, tuple[type[Record], list[Record]]] = {
    "published": (PublishedRecord, [*PUBLISHED]),
    "delivered": (DeliveryRecord, [*DELIVERED]),
    "lost": (LossRecord, [*LOST]),
    "none": (DeliveryRecord, []),
}


@pytest.mark.parametrize(("kind", "rows"), ROWS.values(), ids=ROWS.keys())
def test_what_is_written_is_read(kind: type[Record], rows: list[Record], tmp_path: Path) -> None:
    """Rows come back equal: large and negative numbers, missing ones, quotes, commas and line ends."""
    path = tmp_path / "rows.csv"
    records.write(path, kind, rows)
    assert records.read(path, kind) == rows


@pytest.mark.parametrize("kind", [PublishedRecord, DeliveryRecord, LossRecord])
def test_the_header_is_made_of_the_fields(kind: type[Record], tmp_path: Path) -> None:
    """The first line names the record's fields in order; a time has its unit and its clock in the name."""
    path = tmp_path / "rows.csv"
    records.write(path, kind, [])
    header = path.read_text().splitlines()[0].split(",")
    assert header == [field.name for field in fields(kind)]
    clocks = [name for name in header if "mono" in name or "wall" in name]
    assert clocks
    assert all(name.endswith(("_mono_ns", "_wall_us")) for name in clocks)


def test_any_csv_reader_can_read_it(tmp_path: Path) -> None:
    """It is plain CSV with a header."""
    path = tmp_path / "rows.csv"
    records.write(path, DeliveryRecord, DELIVERED)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["event_id"] for row in rows] == ["a", "b"]
    assert rows[1] == {
        "client": "49", "event_id": "b", "sequence": "2", "received_mono_ns": "5", "received_wall_us": "6"
    }  # fmt: skip


WRONG = {
    "another_header": (
        "client,event_id,sequence,received_ns\n0,a,1,2\n",
        "line 1: has other columns than",
    ),
    "columns_in_another_order": ("event_id,client,sequence,received_mono_ns,received_wall_us\n", "columns"),
    "no_header": ("0,a,1,2,3\n", "line 1: has other columns than"),
    "empty": ("", "line 1: has other columns than"),
    "text_for_a_number": ("{header}\nx,a,1,2,3\n", "line 2: client is no whole number"),
    "too_few_cells": ("{header}\n0,a,1\n", "line 2: has 3 columns, and should have 5"),
    "too_many_cells": ("{header}\n0,a,1,2,3,4\n", "line 2: has 6 columns"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG.keys())
def test_another_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """Other columns, or a value of another type, are refused, and never a wrong figure."""
    path = tmp_path / "rows.csv"
    path.write_text(text.format(header=",".join(field.name for field in fields(DeliveryRecord))))
    with pytest.raises(RunDamaged, match=words):
        records.read(path, DeliveryRecord)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    """While it is written there is no file of that name; afterwards there is nothing else."""
    path = tmp_path / "rows.csv"

    def rows() -> Iterator[DeliveryRecord]:
        for row in DELIVERED:
            yield row
            assert not path.exists()

    records.write(path, DeliveryRecord, rows())
    assert records.read(path, DeliveryRecord) == DELIVERED
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """An error in the middle leaves what was there before, and no draft."""
    path = tmp_path / "rows.csv"
    records.write(path, DeliveryRecord, DELIVERED[:1])
    with pytest.raises(ZeroDivisionError):
        records.write(path, DeliveryRecord, (DELIVERED[1 // number] for number in (1, 0)))
    assert records.read(path, DeliveryRecord) == DELIVERED[:1]
    assert list(tmp_path.iterdir()) == [path]


KINDS = {
    "redis_restarted": True,
    "no_history": True,
    "disconnected 1006": False,
    "disconnected 4008": False,
    "never connected": False,
}


@pytest.mark.parametrize(("cause", "was_announced"), KINDS.items(), ids=KINDS.keys())
def test_who_knows_of_a_loss(cause: str, was_announced: bool) -> None:
    """Gaps are told by the hub; that it has no connection a client knows by itself."""
    assert LossRecord(0, cause, "", None, None, None, None, "", 0, None).was_announced == was_announced


def test_a_position_in_words() -> None:
    """Epoch and offset as everywhere, nothing for an event that is not stored."""
    assert [row.position for row in PUBLISHED] == ["", "", "", f"a1b2-{2**53 - 1}"]

"""The ledger itself: it closes when everything is accounted for, and names whatever is not."""

from __future__ import annotations

import pytest

from broadcaster import Gap, Position
from tests.faults.ledger import Entry, Got, Item, Library, Raw, Reader, reckon, settings_for

C = "events.critical"
SETTINGS = settings_for("redis://127.0.0.1:1/0")


def entries(count: int, failed: int = 0) -> list[Entry]:
    """Events 1, 2, ... at positions a-1, a-2, ...; one of them may not have been answered."""
    return [
        Entry(
            "s", n, f"id-{n}", 0.0, None if n == failed else Position("a", n), "no answer" if n == failed else None
        )
        for n in range(1, count + 1)
    ]


def got(number: int, position: str = "") -> Got:
    return Got(f"id-{number}", "s", number, Position.parse(position or f"a-{number}"))


def gap(first: int, last: int | None, goes_on: str = "") -> Gap:
    return Gap(C, "expired", "a", first, last, Position.parse(goes_on or f"a-{last}"))


BOOKS: dict[str, tuple[bool, list[Item], tuple[int, int, int, int, int]]] = {
    # keeps ids?, what came, (delivered, told, lost, twice, out of order) of five events
    "everything": (True, [got(n) for n in range(1, 6)], (5, 0, 0, 0, 0)),
    "a hole": (True, [got(1), got(2), got(5)], (3, 0, 2, 0, 0)),
    "a hole that was told": (True, [got(1), got(2), gap(3, 4), got(5)], (3, 2, 0, 0, 0)),
    "a hole larger than told": (True, [got(1), gap(3, 4), got(5)], (2, 2, 1, 0, 0)),
    "an open end": (True, [got(1), gap(2, None, "b-7")], (1, 4, 0, 0, 0)),
    "a gap of another epoch": (True, [got(1), Gap(C, "expired", "z", 1, None, None)], (1, 0, 4, 0, 0)),
    "the same position twice": (False, [got(1), got(2), got(2), got(3), got(4), got(5)], (5, 0, 0, 2, 1)),
    "again in a new epoch": (
        False,
        [*(got(n) for n in range(1, 6)), gap(6, None, "b-5"), got(5, "b-6")],
        (5, 0, 0, 0, 0),
    ),
    "again to one that should drop it": (
        True,
        [*(got(n) for n in range(1, 6)), gap(6, None, "b-5"), got(5, "b-6")],
        (5, 0, 0, 2, 1),
    ),
    "out of order": (True, [got(1), got(3), got(2), got(4), got(5)], (5, 0, 0, 0, 2)),
    "told, and delivered": (True, [got(1), gap(2, 3), got(2), got(3), got(4), got(5)], (5, 0, 0, 0, 2)),
    "an epoch that comes back": (
        True,
        [got(1), gap(2, None, "b-1"), got(2, "b-2"), got(3), got(4), got(5)],
        (5, 0, 0, 0, 3),
    ),
    "closed with 4009": (False, [got(1), "close 4009", "connected", got(4), got(5)], (3, 2, 0, 0, 0)),
    "closed with 4009 elsewhere": (False, [got(1), got(4), "close 4009", "connected", got(5)], (3, 0, 2, 0, 0)),
    "closed with another code": (False, [got(1), "close 4008", "connected", got(5)], (2, 0, 3, 0, 0)),
}


@pytest.mark.parametrize(("keeps_ids", "items", "figures"), BOOKS.values(), ids=BOOKS.keys())
def test_the_books(keeps_ids: bool, items: list[Item], figures: tuple[int, int, int, int, int]) -> None:
    """What was delivered, told, lost, given twice and out of order."""
    reader: Reader = Library("r", "", SETTINGS) if keeps_ids else Raw("r", "")
    for item in items:
        reader.note(item)
    account = reckon(reader, entries(5))
    found = (account.delivered, account.told, len(account.lost), len(account.twice), len(account.disorder))
    assert found == figures
    assert bool(account.unaccounted) == any(figures[2:])


def test_what_failed_and_what_came_before_is_not_missed() -> None:
    """An event whose publish failed may be missing; so may what was published before the subscriber was there."""
    reader = Raw("r", "")
    reader.first_entry = 2
    for number in (3, 5):
        reader.note(got(number))
    assert reckon(reader, entries(5, failed=4)).unaccounted == ""
    assert [entry.sequence for entry in reckon(reader, entries(5)).lost] == [4]

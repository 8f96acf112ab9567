"""Positions and gaps: what is read from text that anybody may have written, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broadcaster.core.position import MAX_OFFSET, Cause, Gap, Position, is_epoch, read_position

POSITIONS: list[tuple[str, Position]] = [
    ("4c6d0a1b2e3f-7", Position("4c6d0a1b2e3f", 7)),
    ("a-0", Position("a", 0)),
    ("0-1", Position("0", 1)),
    ("Zz9-10", Position("Zz9", 10)),
    ("x" * 64 + "-1", Position("x" * 64, 1)),
    ("a-100000000000000", Position("a", 10**14)),
    ("a-9007199254740991", Position("a", 2**53 - 1)),
]


@pytest.mark.parametrize(("text", "position"), POSITIONS, ids=[text[:30] for text, _ in POSITIONS])
def test_a_position_is_read_and_written_alike(text: str, position: Position) -> None:
    """Epoch and offset, limits inclusive; as text it is what was read."""
    assert Position.parse(text) == read_position(text) == position
    assert str(position) == f"{position}" == text


NO_POSITIONS: dict[str, str] = {
    "nothing": "",
    "a hyphen": "-",
    "no hyphen": "4c6d0a1b2e3f",
    "no offset": "a-",
    "no epoch": "-1",
    "offset is no number": "a-b",
    "offset is negative": "a--1",
    "offset has a sign": "a-+1",
    "offset is a fraction": "a-1.0",
    "offset is hex": "a-0x1",
    "offset with an underscore": "a-1_0",
    "offset with an exponent": "a-1e3",
    "offset in other digits": "a-١",
    "offset in raised digits": "a-²",
    "offset one too large": f"a-{2**53}",
    "offset of 17 digits": "a-" + "1" * 17,
    "offset of 17 digits, small": "a-" + "0" * 16 + "1",
    "offset of 5,000 digits": "a-" + "1" * 5000,
    "epoch too long": "x" * 65 + "-1",
    "epoch with another letter": "ä-1",
    "epoch with other digits": "٣-1",
    "epoch with an underscore": "a_b-1",
    "epoch with a space": "a b-1",
    "two hyphens": "a-b-1",
    "one more number": "a-1-2",
    "space before it": " a-1",
    "space after it": "a-1 ",
    "newline after it": "a-1\n",
    "NUL after it": "a-1\0",
    "id of a stream": "1769000000000-0-1",
    "comma": "a,1",
    "quoted": '"a-1"',
    "half of a surrogate pair": "\ud800-1",
}


@pytest.mark.parametrize("text", NO_POSITIONS.values(), ids=NO_POSITIONS.keys())
def test_any_other_text_is_refused(text: str) -> None:
    """The refusal is a ValueError that is short whatever the text is; a reader of frames gets None."""
    with pytest.raises(ValueError, match="a position is <epoch>-<offset>") as caught:
        Position.parse(text)
    assert len(str(caught.value)) < 800  # each of 100 characters may be written as \udxxx
    assert "\n" not in str(caught.value)
    assert read_position(text) is None


@pytest.mark.parametrize(
    "value", [None, 7, 1.5, True, b"a-1", ["a", 1], {"epoch": "a"}, Position("a", 1)], ids=repr
)
def test_a_position_in_a_frame_is_text_or_none(value: object) -> None:
    """Whatever else stands in a frame counts as no position."""
    assert read_position(value) is None


EPOCHS: list[tuple[object, bool]] = [
    ("4c6d0a1b2e3f", True),
    ("0", True),
    ("Z" * 64, True),
    ("", False),
    ("Z" * 65, False),
    ("a-b", False),
    ("a_b", False),
    ("a b", False),
    ("a\n", False),
    ("ä", False),
    ("٣", False),
    (b"a", False),
    (12, False),
    (None, False),
    (["a"], False),
]


@pytest.mark.parametrize(("value", "right"), EPOCHS, ids=[f"{value!r:.30}" for value, _ in EPOCHS])
def test_an_epoch_is_letters_and_digits(value: object, right: bool) -> None:
    """1 to 64 of A-Z a-z 0-9, as text."""
    assert is_epoch(value) is right


def test_the_largest_offset_survives_javascript() -> None:
    """It is the last integer for which a float and the one after it differ."""
    assert int(float(MAX_OFFSET)) == MAX_OFFSET
    assert float(MAX_OFFSET) != float(MAX_OFFSET + 1)
    assert float(MAX_OFFSET + 1) == float(MAX_OFFSET + 2)


def test_causes_are_plain_words() -> None:
    """A cause goes into JSON as its own name in small letters."""
    for cause in Cause:
        assert json.dumps({"cause": cause}) == f'{{"cause": "{cause.name.lower()}"}}'


WHOLE: dict[str, Any] = {
    "control": "gap",
    "channel": "events.critical",
    "cause": "expired",
    "epoch": "4c6d0a1b2e3f",
    "first": 3,
    "last": 9,
    "position": "4c6d0a1b2e3f-9",
}


def test_a_gap_is_read_from_its_frame() -> None:
    """All fields of the frame, each with its type."""
    assert Gap.from_fields(WHOLE) == Gap(
        channel="events.critical",
        cause=Cause.EXPIRED,
        epoch="4c6d0a1b2e3f",
        first=3,
        last=9,
        position=Position("4c6d0a1b2e3f", 9),
    )


def test_a_gap_may_know_nothing_but_channel_and_cause() -> None:
    """Null and missing are the same: not known."""
    unknown = Gap("events.critical", "no_history")
    nulls: dict[str, Any] = dict.fromkeys(WHOLE) | {"channel": "events.critical", "cause": "no_history"}
    assert Gap.from_fields({"channel": "events.critical", "cause": "no_history"}) == unknown
    assert Gap.from_fields(nulls) == unknown


UNEXPECTED: list[tuple[str, object]] = [
    ("epoch", "a-b"),
    ("epoch", 12),
    ("epoch", ""),
    ("first", "3"),
    ("first", 3.0),
    ("first", True),
    ("last", "9"),
    ("last", [9]),
    ("last", False),
    ("position", "4c6d0a1b2e3f"),
    ("position", 9),
    ("position", {"epoch": "a", "offset": 1}),
    ("position", ""),
]


@pytest.mark.parametrize(("name", "value"), UNEXPECTED, ids=[f"{n}={v!r:.30}" for n, v in UNEXPECTED])
def test_what_is_not_as_expected_in_a_gap_is_not_known(name: str, value: object) -> None:
    """A field of another type or form is None, and the others are read all the same."""
    gap = Gap.from_fields(WHOLE | {name: value})
    assert getattr(gap, name) is None
    whole = Gap.from_fields(WHOLE)
    for other in ("channel", "cause", "epoch", "first", "last", "position"):
        assert other == name or getattr(gap, other) == getattr(whole, other)


def test_a_cause_from_the_future_is_kept_as_it_is() -> None:
    """A newer hub may know more causes: the word is passed on, and fields that are not known are passed over."""
    gap = Gap.from_fields(WHOLE | {"cause": "moon_phase", "tide": "high"})
    assert (gap.cause, gap.first, gap.last) == ("moon_phase", 3, 9)

"""Filters: what a subscriber wants of a channel."""

from __future__ import annotations

import json

import pytest

from broadcaster.core.event import check
from broadcaster.hub.fanout.filters import EVERYTHING, Filter, Labels
from tests.hub.house import payload

A, B = frozenset("A"), frozenset("AB")
NONE: frozenset[str] = frozenset()
LABELS = Labels("A", "server-1", "info")

CASES: list[tuple[str, Filter, bool]] = [
    ("nothing is asked for", Filter(), True),
    ("the type", Filter(types=A), True),
    ("one of two types", Filter(types=B), True),
    ("another type", Filter(types=frozenset("C")), False),
    ("the type in other case", Filter(types=frozenset("a")), False),
    ("the source", Filter(sources=frozenset({"server-1"})), True),
    ("a source that begins alike", Filter(sources=frozenset({"server-10", "server"})), False),
    ("the severity", Filter(severities=frozenset({"info", "critical"})), True),
    ("another severity", Filter(severities=frozenset({"critical"})), False),
    ("type and severity", Filter(A, NONE, frozenset({"info"})), True),
    ("the type, and another severity", Filter(A, NONE, frozenset({"critical"})), False),
    ("another type, and the severity", Filter(frozenset("C"), NONE, frozenset({"info"})), False),
    ("all three", Filter(A, frozenset({"server-1"}), frozenset({"info"})), True),
    ("all three, one wrong", Filter(A, frozenset({"server-2"}), frozenset({"info"})), False),
]


@pytest.mark.parametrize(("wanted", "passes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_an_event_passes_if_every_label_that_is_asked_for_matches(wanted: Filter, passes: bool) -> None:
    """Any of the values of a label, and all of the labels."""
    assert wanted.wants(LABELS) is passes


@pytest.mark.parametrize("wanted", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_a_filter_is_true_if_it_holds_anything_back(wanted: Filter) -> None:
    """And equal filters are one: the hub serves all who have it together."""
    assert bool(wanted) is (wanted != EVERYTHING)
    assert hash(wanted) == hash(Filter(wanted.types, wanted.sources, wanted.severities))


def test_the_labels_of_an_event_are_its_own_fields() -> None:
    """Without a severity it is critical, as everywhere."""
    fields = check(payload(1, event_type="T", source="S"))
    assert Labels.of(fields) == ("T", "S", "critical")
    assert Labels.of(fields | {"severity": "info"}) == ("T", "S", "info")
    assert "severity" not in json.loads(payload(1))

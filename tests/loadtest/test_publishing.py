"""What the publisher of a load test says of its events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broadcaster.loadtest.publishing import in_words
from broadcaster.loadtest.records import PublishedRecord

GOOD = PublishedRecord(1, "id", 0, 0, 0, 0, 1, "", "a1", 1)
FAILED, UNHEARD, UNKNOWN = (
    replace(GOOD, heard=None, error="late"),
    replace(GOOD, heard=0),
    replace(GOOD, heard=None),
)

SAID: dict[str, list[PublishedRecord]] = {
    "all 3 stored and heard": [GOOD] * 3,
    "all 1 stored and heard": [GOOD],
    "2 of 3 stored: 1 failed": [GOOD, GOOD, FAILED],
    "3 of 3 stored: 2 heard by nobody": [GOOD, UNHEARD, UNHEARD],
    "2 of 2 stored: 1 not known to be heard (sent again)": [GOOD, UNKNOWN],
    "3 of 4 stored: 1 failed, 1 heard by nobody, 1 not known to be heard (sent again)": [
        GOOD,
        UNHEARD,
        UNKNOWN,
        FAILED,
    ],
}


@pytest.mark.parametrize(("words", "rows"), SAID.items(), ids=SAID)
def test_what_became_of_the_events_is_said_in_words(words: str, rows: list[PublishedRecord]) -> None:
    """Where nothing is wrong nothing is counted; what is wrong is counted, and nothing else."""
    assert in_words(rows, "stored") == words


def test_hubs_at_replicas_are_not_said_to_be_deaf() -> None:
    """Redis counts none of them: only what has failed is told."""
    assert in_words([UNHEARD, UNHEARD, FAILED], "stored", at_replicas=True) == (
        "2 of 3 stored; hubs at replicas are not counted"
    )

"""The order of a channel's positions: arithmetic, against tables and against a channel in memory."""

from __future__ import annotations

import itertools
import random

import pytest

from broadcaster.core.position import Cause, Gap, Position
from broadcaster.hub.catchup.epochs import EpochOrder

P = Position.parse


def order(*epochs: str) -> EpochOrder:
    return EpochOrder("events.x", tuple(P(epoch) for epoch in epochs))


ROLLED_BACK = order("a-1", "b-401")
"""Redis was restarted at a-500 and had kept what came up to a-400."""
RESTARTED = order("a-1", "b-501", "c-501", "d-700")
"""Three restarts without loss; nothing was stored in epoch b."""

AFTER: list[tuple[str, EpochOrder, str, str, bool]] = [
    ("the same", ROLLED_BACK, "a-5", "a-5", False),
    ("one later", ROLLED_BACK, "a-6", "a-5", True),
    ("one earlier", ROLLED_BACK, "a-4", "a-5", False),
    ("a newer epoch with a lower offset", ROLLED_BACK, "b-401", "a-500", True),
    ("an older epoch with a higher offset", ROLLED_BACK, "a-500", "b-401", False),
    ("the place before a newer epoch", ROLLED_BACK, "b-400", "a-500", True),
    ("two epochs later", RESTARTED, "c-501", "a-500", True),
    ("an empty epoch between", RESTARTED, "c-500", "b-500", True),
    ("an unknown epoch is older", RESTARTED, "a-1", "x-999", True),
    ("so it is not after a known one", RESTARTED, "x-999", "a-1", False),
    ("of two unknown ones nobody knows", RESTARTED, "x-1", "y-1", True),
    ("the same unknown epoch", RESTARTED, "x-2", "x-1", True),
    ("the same unknown position", RESTARTED, "x-1", "x-1", False),
]


@pytest.mark.parametrize(("known", "one", "other", "after"), [c[1:] for c in AFTER], ids=[c[0] for c in AFTER])
def test_what_comes_after_what(known: EpochOrder, one: str, other: str, after: bool) -> None:
    """Epochs first, in the order in which they began, then offsets; what is unknown is older than all."""
    assert known.is_after(P(one), P(other)) is after


GIVEN: list[tuple[str, EpochOrder, str, str, bool]] = [
    ("the head itself", ROLLED_BACK, "b-450", "b-450", True),
    ("below the head", ROLLED_BACK, "b-401", "b-450", True),
    ("before the first event of all", ROLLED_BACK, "a-0", "b-450", True),
    ("above the head", ROLLED_BACK, "b-451", "b-450", False),
    ("of an epoch that was rolled back", ROLLED_BACK, "a-500", "b-450", True),
    ("of an epoch that nobody knows", ROLLED_BACK, "x-1", "b-450", False),
    ("of an epoch that has just begun", ROLLED_BACK, "b-401", "a-500", False),
]


@pytest.mark.parametrize(("known", "position", "head", "given"), [c[1:] for c in GIVEN], ids=[c[0] for c in GIVEN])
def test_what_can_have_been_given(known: EpochOrder, position: str, head: str, given: bool) -> None:
    """A position of a known epoch that is not beyond the head."""
    assert known.has_given(P(position), P(head)) is given


NEXT: list[tuple[str, EpochOrder, str, int]] = [
    ("in the last epoch", ROLLED_BACK, "b-450", 451),
    ("in an older one, below the next", ROLLED_BACK, "a-300", 301),
    ("at the end of what was kept", ROLLED_BACK, "a-400", 401),
    ("in what was rolled back", ROLLED_BACK, "a-450", 401),
    ("far beyond it", ROLLED_BACK, "a-9999", 401),
    ("before an epoch without events", RESTARTED, "a-500", 501),
    ("in the epoch without events", RESTARTED, "b-500", 501),
    ("in an unknown one", RESTARTED, "x-600", 1),
    ("when nothing is known", order(), "x-600", 601),
]


@pytest.mark.parametrize(("known", "position", "offset"), [case[1:] for case in NEXT], ids=[c[0] for c in NEXT])
def test_where_to_go_on_in_the_log(known: EpochOrder, position: str, offset: int) -> None:
    """One offset later, or at the first of the next epoch, which may be lower; from the front when unknown."""
    assert known.next_offset(P(position)) == offset


def expired(epoch: str, first: int, last: int) -> Gap:
    return Gap("events.x", Cause.EXPIRED, epoch, first, last, Position(epoch, last))


def lost(epoch: str, first: int, last: int) -> Gap:
    return Gap("events.x", Cause.REDIS_RESTARTED, epoch, first, last, Position(epoch, last))


def restarted(epoch: str, first: int, goes_on: str) -> Gap:
    return Gap("events.x", Cause.REDIS_RESTARTED, epoch, first, None, P(goes_on))


GAPS: list[tuple[str, EpochOrder, str, str, list[Gap]]] = [
    ("the next one", ROLLED_BACK, "b-450", "b-451", []),
    ("the same one", ROLLED_BACK, "b-450", "b-450", []),
    ("an earlier one", ROLLED_BACK, "b-450", "b-401", []),
    ("one is missing", ROLLED_BACK, "b-450", "b-452", [expired("b", 451, 451)]),
    ("many are missing", ROLLED_BACK, "a-0", "a-300", [expired("a", 1, 299)]),
    (
        "lost with the memory, of which something is left here",
        ROLLED_BACK,
        "a-450",
        "a-500",
        [lost("a", 451, 499)],
    ),
    ("some expired, some lost so", ROLLED_BACK, "a-0", "a-500", [expired("a", 1, 400), lost("a", 401, 499)]),
    ("rolled back", ROLLED_BACK, "a-500", "b-401", [restarted("a", 501, "b-400")]),
    ("at the end of what was kept", ROLLED_BACK, "a-400", "b-401", [restarted("a", 401, "b-400")]),
    (
        "a new epoch whose first ones are gone",
        ROLLED_BACK,
        "a-400",
        "b-450",
        [restarted("a", 401, "b-400"), expired("b", 401, 449)],
    ),
    (
        "two epochs later",
        RESTARTED,
        "a-500",
        "c-501",
        [restarted("a", 501, "b-500"), restarted("b", 501, "c-500")],
    ),
    (
        "three epochs later, the first of it gone",
        RESTARTED,
        "a-480",
        "d-702",
        [
            restarted("a", 481, "b-500"),
            restarted("b", 501, "c-500"),
            restarted("c", 501, "d-699"),
            expired("d", 700, 701),
        ],
    ),
    ("from an unknown epoch into the first", RESTARTED, "x-7", "a-1", [restarted("x", 8, "a-0")]),
    (
        "from an unknown epoch into the first, later",
        RESTARTED,
        "x-7",
        "a-3",
        [restarted("x", 8, "a-0"), expired("a", 1, 2)],
    ),
    (
        "from an unknown epoch into the second",
        RESTARTED,
        "x-900",
        "b-501",
        [restarted("x", 901, "a-0"), restarted("a", 1, "b-500")],
    ),
]


@pytest.mark.parametrize(("known", "at", "found", "gaps"), [case[1:] for case in GAPS], ids=[c[0] for c in GAPS])
def test_what_is_missing_between_two_events(known: EpochOrder, at: str, found: str, gaps: list[Gap]) -> None:
    """An exact range within an epoch; an open end for each restart; each gap ends where the next one begins."""
    assert known.gaps(P(at), P(found)) == gaps


HEADS: list[tuple[str, EpochOrder, str, str, list[Gap]]] = [
    ("at the head", ROLLED_BACK, "b-450", "b-450", []),
    ("some are gone", ROLLED_BACK, "b-448", "b-450", [expired("b", 449, 450)]),
    ("a new epoch without events", ROLLED_BACK, "a-500", "b-400", [restarted("a", 501, "b-400")]),
    ("all of it gone", ROLLED_BACK, "a-500", "b-402", [restarted("a", 501, "b-400"), expired("b", 401, 402)]),
    ("unknown", order("n-1"), "a-500", "n-0", [restarted("a", 501, "n-0")]),
]


@pytest.mark.parametrize(("known", "at", "head", "gaps"), [case[1:] for case in HEADS], ids=[c[0] for c in HEADS])
def test_what_is_missing_up_to_the_head(known: EpochOrder, at: str, head: str, gaps: list[Gap]) -> None:
    """When the log has nothing more, everything up to the head is missing; the last gap ends at the head."""
    assert known.head_gaps(P(at), P(head)) == gaps
    assert not gaps or gaps[-1].position == P(head)


class History:
    """A channel with restarts, some of which came back with older data; what is left of it, and all it gave."""

    def __init__(self, chance: random.Random) -> None:
        self.epochs = [Position("e0", 1)]
        self.given: list[Position] = []
        log: list[Position] = []
        offset = 0
        for number in range(1, chance.randrange(2, 7)):
            for _ in range(chance.choice([0, 0, 1, 3, 10])):
                offset += 1
                log.append(Position(self.epochs[-1].epoch, offset))
                self.given.append(log[-1])
            kept = chance.choice([offset, offset, chance.randint(self.epochs[-1].offset - 1, offset)])
            log = [position for position in log if position.offset <= kept]
            offset = kept
            self.epochs.append(Position(f"e{number}", offset + 1))
        first = chance.choice([0, 0, chance.randint(0, offset + 1)])
        self.log = [position for position in log if position.offset >= first and chance.random() < 0.8]
        self.head = Position(self.epochs[-1].epoch, offset)


@pytest.mark.parametrize("seed", range(300))
def test_a_walk_over_the_log_tells_every_missing_offset_once(seed: int) -> None:
    """From wherever somebody stands: each event that was given later is handed on, or in exactly one gap."""
    chance = random.Random(seed)
    history = History(chance)
    known = EpochOrder("events.x", tuple(history.epochs))
    standing = [Position("e0", 0), *history.given, Position("x", chance.randrange(50))]
    at = start = chance.choice(standing)
    handed: list[Position] = []
    told: list[Gap] = []
    for position in [p for p in history.log if p.offset >= known.next_offset(at)]:
        if known.is_after(position, at):
            told += known.gaps(at, position)
            handed.append(position)
            at = position
    if known.is_after(history.head, at):
        told += known.head_gaps(at, history.head)
        at = history.head
    assert at == history.head or at == start

    def times_told(position: Position) -> int:
        return sum(
            gap.epoch == position.epoch
            and gap.first is not None
            and gap.first <= position.offset
            and (gap.last is None or position.offset <= gap.last)
            for gap in told
        )

    later = [position for position in history.given if known.is_after(position, start)]
    for position in later:
        assert (position in handed) + times_told(position) == 1, position
    for position in set(history.given) - set(later):
        assert position not in handed
        assert not times_told(position)
    assert len(handed) == len(set(handed))
    # Gaps and events follow each other without a jump: each goes on where the one before has ended.
    assert all(gap.position is not None and gap.first is not None for gap in told)
    crossed = [gap for gap in told if gap.cause == Cause.REDIS_RESTARTED]
    assert len(crossed) == len({gap.epoch for gap in crossed})


# Epochs that are named by the time at which they began

A, B, C, D = (f"T00000000{number}0a0b0c" for number in range(1, 5))
LATER = "T0000000020a0b0d"
"""Of the same millisecond as `B`, and greater."""


def test_the_later_name_is_the_later_epoch() -> None:
    """For everybody, whatever Redis remembers; what an earlier version has named is older."""
    empty = order()
    ranked = ["old-7", f"{A}-9", f"{B}-1", f"{B}-2", f"{LATER}-0", f"{C}-0", f"{D}-0"]
    for (i, one), (j, other) in itertools.product(enumerate(ranked), repeat=2):
        assert empty.is_after(P(one), P(other)) is (i > j)
    assert order("old-1", "x-5", f"{A}-9").is_after(P("x-1"), P("old-400"))


def test_a_reader_of_a_forgotten_epoch_goes_on_at_the_next_one() -> None:
    """Its events have expired, or were in a memory that is gone: a gap with an open end, then what there is."""
    known = order(f"{A}-1", f"{C}-41", f"{D}-60")
    assert known.next_offset(P(f"{B}-700")) == 41
    assert known.gaps(P(f"{B}-700"), P(f"{C}-41")) == [restarted(B, 701, f"{C}-40")]
    assert known.gaps(P(f"{B}-700"), P(f"{C}-45")) == [restarted(B, 701, f"{C}-40"), expired(C, 41, 44)]
    assert known.next_offset(P("old-700")) == 1
    assert known.next_offset(P(f"{D}-70")) == 71
    assert not known.has_given(P(f"{B}-700"), P(f"{D}-70"))


def test_an_event_of_an_epoch_that_is_not_listed_is_told_apart() -> None:
    """A hole between two epochs is never silent."""
    assert order().gaps(P(f"{A}-7"), P(f"{B}-9")) == [restarted(A, 8, f"{B}-8")]
    assert order(f"{B}-5").gaps(P(f"{A}-7"), P(f"{C}-9")) == [
        restarted(A, 8, f"{B}-4"),
        restarted(B, 5, f"{C}-8"),
    ]


def test_redis_lists_and_names_order() -> None:
    """What only we remember is dropped where names say the order, and kept where they do not."""
    known = order("a-1", "b-5", f"{A}-9", f"{B}-11").followed_by((P("a-1"), P(f"{C}-5")))
    assert known.knows("b")
    assert not known.knows(A)
    assert known.is_after(P(f"{C}-5"), P(f"{B}-99"))
    assert not order(f"{A}-1", f"{B}-5").followed_by((P(f"{A}-1"), P(f"{C}-5"))).knows(B)


GONE: list[tuple[str, EpochOrder, list[Gap]]] = [
    ("the log begins later", order(f"{C}-41"), [expired(B, 10, 19)]),
    ("it is listed", order(f"{A}-1", f"{B}-5", f"{C}-41"), [expired(B, 10, 19)]),
    ("a newer one has the same offsets", order(f"{A}-1", f"{C}-9"), [lost(B, 10, 19)]),
    ("and has some of them", order(f"{B}-5", f"{C}-15"), [expired(B, 10, 14), lost(B, 15, 19)]),
    ("there is only an older one", order(f"{A}-1", f"{C}-41"), [lost(B, 10, 19)]),
]


@pytest.mark.parametrize(("known", "gaps"), [case[1:] for case in GONE], ids=[case[0] for case in GONE])
def test_what_is_missing_within_an_epoch_has_expired_or_was_lost(known: EpochOrder, gaps: list[Gap]) -> None:
    """The log loses the oldest first: what Redis cannot have lost so was in a memory that is gone."""
    assert known.gaps(P(f"{B}-9"), P(f"{B}-20")) == gaps

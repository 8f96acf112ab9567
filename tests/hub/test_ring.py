"""The ring: arithmetic on numbers of frames, bounded in bytes."""

from __future__ import annotations

import itertools
import random

import pytest

from broadcaster.core.position import Cause, Gap, Position
from broadcaster.hub.fanout.filters import Labels
from broadcaster.hub.fanout.message import Message
from broadcaster.hub.fanout.ring import Ring

LABELS = Labels("SERVER_DOWN", "server-a", "critical")


def filled(max_bytes: int, *sizes: int) -> Ring:
    """A ring that was given frames of these sizes; frame n is n times its last digit and came at n seconds."""
    ring = Ring(max_bytes)
    ring.begin(at(1, 0))
    for number, size in enumerate(sizes):
        ring.extend([Message(frame(number, size), LABELS, at(1, number + 1))], float(number))
    return ring


def at(epoch: int, offset: int) -> Position:
    return Position(f"e{epoch}", offset)


def placed(max_bytes: int, *places: tuple[int, int], begin: tuple[int, int] = (1, 0)) -> Ring:
    """A ring with a frame of 10 bytes at each of these places (epoch, offset), in order.

    A place that comes again is that of an event that is not stored.
    """
    ring = Ring(max_bytes)
    ring.begin(at(*begin))
    for before, place in itertools.pairwise([begin, *places]):
        if place[0] != before[0]:
            ring.begin(at(place[0], place[1] - 1))
        ring.extend([Message(b"." * 10, LABELS, None if place == before else at(*place))], 0.0)
    return ring


def frame(number: int, size: int) -> bytes:
    return b"%d" % (number % 10) * size


def test_an_empty_ring_has_nothing_to_read() -> None:
    """Tail and head are both 0, and a reader at the head gets nothing."""
    ring = Ring(100)
    assert (ring.tail, ring.head, ring.bytes) == (0, 0, 0)
    assert ring.read(0, 10) == []


BOUNDS = [
    ("one frame", 100, [10], 0, 10),
    ("exactly full", 100, [50, 50], 0, 100),
    ("one byte too much", 100, [50, 50, 1], 1, 51),
    ("one large pushes out many small", 100, [10] * 10 + [95], 10, 95),
    ("as large as the ring", 100, [10, 100], 1, 100),
    ("larger than the ring", 100, [10, 101], 2, 0),
    ("small after one too large", 100, [101, 10], 1, 10),
    ("many", 100, [7] * 1000, 986, 98),
]


@pytest.mark.parametrize(
    ("max_bytes", "sizes", "tail", "held"), [case[1:] for case in BOUNDS], ids=[case[0] for case in BOUNDS]
)
def test_the_oldest_frames_go_when_the_bytes_are_full(
    max_bytes: int, sizes: list[int], tail: int, held: int
) -> None:
    """Never more than the bound is held; head counts every frame that ever came."""
    ring = filled(max_bytes, *sizes)
    assert (ring.tail, ring.head, ring.bytes) == (tail, len(sizes), held)


READS = [
    ("all", 0, 1000, [0, 1, 2, 3, 4]),
    ("from the middle", 2, 1000, [2, 3, 4]),
    ("exactly two", 0, 20, [0, 1]),
    ("one byte less than two", 0, 19, [0]),
    ("one byte more than two", 0, 21, [0, 1]),
    ("no room for even one", 1, 1, [1]),
    ("no room at all", 1, 0, [1]),
    ("at the head", 5, 1000, []),
]


@pytest.mark.parametrize(("cursor", "max_bytes", "numbers"), [c[1:] for c in READS], ids=[c[0] for c in READS])
def test_a_reader_gets_as_many_frames_as_fit(cursor: int, max_bytes: int, numbers: list[int]) -> None:
    """From the cursor on, in order, up to the limit; one frame always, however large it is."""
    ring = filled(1000, 10, 10, 10, 10, 10)
    assert [entry.frame for entry in ring.read(cursor, max_bytes)] == [frame(number, 10) for number in numbers]


def test_what_is_gone_cannot_be_read() -> None:
    """A reader before the tail is a mistake of its caller; one at the tail is served."""
    ring = filled(100, *[40] * 5)
    assert ring.tail == 3
    for cursor in range(3):
        with pytest.raises(AssertionError, match=f"frame {cursor} is gone"):
            ring.read(cursor, 1000)
    assert len(ring.read(3, 1000)) == 2


def test_the_time_is_that_of_the_frame_a_reader_waits_for() -> None:
    """A reader's delay counts from the frame at its cursor, or the oldest that is left."""
    ring = filled(100, *[40] * 5)
    assert [ring.came_at(cursor) for cursor in range(5)] == [3.0, 3.0, 3.0, 3.0, 4.0]


def test_a_gap_is_marked() -> None:
    """Readers can tell what is missing from what is an event."""
    ring = Ring(100)
    gap = Gap("events.x", Cause.EXPIRED, "e1", 2, 3)
    ring.extend([Message(b"event", LABELS, at(1, 1))], 0.0)
    ring.append_gap(gap, b"gap", 1.0)
    first, second = ring.read(0, 100)
    assert (first.labels, first.gap) == (LABELS, None)
    assert (second.labels, second.gap) == (None, gap)


# Positions

PLACES = [(1, 6), (1, 7), (1, 7), (1, 9), (2, 8), (2, 9), (3, 8), (3, 8)]
"""Two events that are not stored (their place is that of the event before), a hole, two restarts, one back."""

AFTER = [
    ("where it began", (1, 5), 0),
    ("after the first", (1, 6), 1),
    ("behind those that are not stored", (1, 7), 3),
    ("in a hole", (1, 8), 3),
    ("at the end of an epoch", (1, 9), 4),
    ("beyond the end of an epoch", (1, 500), 4),
    ("before the first of the next", (2, 7), 4),
    ("in it", (2, 8), 5),
    ("at the gap that begins an epoch", (3, 7), 6),
    ("at the head", (3, 8), 8),
    ("before all", (1, 4), None),
    ("in an epoch before all", (0, 100), None),
]


@pytest.mark.parametrize(("place", "number"), [case[1:] for case in AFTER], ids=[case[0] for case in AFTER])
def test_the_frame_after_a_place_is_found(place: tuple[int, int], number: int | None) -> None:
    """The first frame that is later; None only if something after the place is not here any more."""
    ring = placed(1000, *PLACES, begin=(1, 5))
    assert ring.number_after(at(*place)) == number


def test_what_was_dropped_moves_the_oldest_place() -> None:
    """After the drop one can begin at the last dropped frame's place, and at none before it."""
    ring = placed(40, *PLACES, begin=(1, 5))
    assert ring.tail == 4
    assert ring.number_after(at(1, 9)) == 4
    assert ring.number_after(at(1, 8)) is None
    assert ring.position_at(ring.tail) == at(1, 9)


def test_a_reader_stands_where_the_frame_before_its_cursor_was() -> None:
    """At the front it stands where the ring began; at the head, where the last frame was."""
    ring = placed(1000, *PLACES, begin=(1, 5))
    assert [ring.position_at(cursor) for cursor in range(9)] == [at(*place) for place in [(1, 5), *PLACES]]


def test_an_empty_ring_stands_where_it_began() -> None:
    """Nothing has come yet: only whoever stands there, or later, can go on."""
    ring = placed(100, begin=(1, 5))
    assert ring.position_at(0) == at(1, 5)
    assert ring.number_after(at(1, 5)) == 0
    assert ring.number_after(at(1, 4)) is None


def test_a_ring_that_holds_something_does_not_begin_again() -> None:
    """A new epoch changes nothing about what is held; an empty ring begins there."""
    ring = placed(15, (1, 1))
    ring.begin(at(2, 0))
    assert ring.position_at(0) == at(1, 0)
    ring.extend([Message(b"." * 16, LABELS, at(2, 1))], 0.0)
    assert (ring.tail, ring.head) == (2, 2)
    assert ring.position_at(2) == at(2, 1)
    ring.begin(at(3, 7))
    assert ring.position_at(2) == at(3, 7)


@pytest.mark.parametrize("seed", range(20))
def test_the_ring_is_the_end_of_the_list_of_all_frames(seed: int) -> None:
    """Whatever comes, what can be read is exactly the newest frames that fit."""
    chance = random.Random(seed)
    bound = chance.randrange(1, 2000)
    ring, frames = Ring(bound), list[bytes]()
    epoch, offset, places = 1, 0, [(1, 0)]
    ring.begin(at(epoch, offset))
    for number in range(300):
        frames.append(chance.randbytes(chance.randrange(1, 300)))
        step = chance.choice([0, 1, 1, 1, 3])
        offset += step
        if chance.random() < 0.02:
            epoch, offset = epoch + 1, max(0, offset - 5)
            if ring.head == ring.tail:
                places[-1] = (epoch, offset)
            ring.begin(at(epoch, offset))
            step = 0
        places.append((epoch, offset))
        ring.extend([Message(frames[-1], LABELS, at(epoch, offset) if step else None)], float(number))
        held = [entry.frame for entry in ring.read(ring.tail, 10**9)]
        assert ring.head == len(frames)
        assert held == frames[ring.tail :]
        assert ring.bytes == sum(map(len, held)) <= bound
        if ring.tail:
            assert ring.bytes + len(frames[ring.tail - 1]) > bound
        cursor = chance.randint(ring.tail, ring.head)
        piece = chance.randrange(0, 500)
        read = [entry.frame for entry in ring.read(cursor, piece)]
        assert read == frames[cursor : cursor + len(read)]
        assert len(read) <= 1 or sum(map(len, read)) <= piece
        assert bool(read) == (cursor < ring.head)
        assert ring.position_at(cursor) == at(*places[cursor])
        place = chance.choice([*places[-40:], (epoch, offset + 1), (epoch, chance.randrange(1 + offset))])
        later = next((n for n, other in enumerate(places[1:]) if other > place), ring.head)
        assert ring.number_after(at(*place)) == (later if place >= places[ring.tail] else None)


# The newest stored event, and the place of a reader from an epoch that never came here


def test_the_newest_stored_event_is_found_behind_what_has_no_position_of_its_own() -> None:
    """Events that are not stored, and gaps."""
    ring = placed(1000, (1, 1), (1, 2), (1, 2), (1, 2))
    newest = ring.last_stored
    assert newest is not None
    assert (newest.position, newest.stored) == (at(1, 2), True)
    ring.append_gap(Gap("c", Cause.REFUSED, "e1", 3, 3, at(1, 3)), b"gap", 5.0)
    assert ring.last_stored == newest
    assert ring.frame_at(at(1, 2)) == newest.frame


def test_a_new_epoch_and_an_empty_ring_have_no_newest_event_yet() -> None:
    """Nothing of an earlier epoch is compared with what the log has now; nor what was dropped."""
    ring = placed(1000, (1, 1), (1, 2))
    ring.append_gap(Gap("c", Cause.REDIS_RESTARTED, "e1", 3, None, at(2, 2)), b"gap", 5.0)
    assert ring.last_stored is None
    assert Ring(1000).last_stored is None
    ring = placed(15, (1, 1), (1, 2))
    ring.append_gap(Gap("c", Cause.EXPIRED, "e1", 3, 4, at(1, 4)), b"a gap, longer", 5.0)
    assert ring.last_stored is None


def test_a_reader_from_an_epoch_that_never_came_here_goes_on_behind_the_gap_to_the_next_one() -> None:
    """Where the next epoch begins; nowhere, if there is none after it."""
    ring = placed(1000, (1, 1), (1, 2))
    ring.append_gap(Gap("c", Cause.REDIS_RESTARTED, "e1", 3, None, at(3, 2)), b"gap", 5.0)
    ring.extend([Message(b"x", LABELS, at(3, 3))], 6.0)
    is_after = lambda one, other: (one.epoch, one.offset) > (other.epoch, other.offset)  # noqa: E731
    assert ring.place_after(at(2, 7), is_after) == at(3, 2)
    assert ring.place_after(at(4, 1), is_after) is None
    assert Ring(1000).place_after(at(2, 7), is_after) is None

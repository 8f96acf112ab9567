"""The ring: arithmetic on numbers of frames, bounded in bytes."""

from __future__ import annotations

import random

import pytest

from broadcaster.hub.ring import Ring


def filled(max_bytes: int, *sizes: int) -> Ring:
    """A ring that was given frames of these sizes; frame n is n times its last digit and came at n seconds."""
    ring = Ring(max_bytes)
    for number, size in enumerate(sizes):
        ring.append(frame(number, size), float(number))
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


def test_what_is_gone_is_an_error_not_a_hole() -> None:
    """A reader before the tail is told so; one at the tail is served."""
    ring = filled(100, *[40] * 5)
    assert ring.tail == 3
    for cursor in range(3):
        with pytest.raises(LookupError, match=f"frame {cursor} is gone"):
            ring.read(cursor, 1000)
    assert len(ring.read(3, 1000)) == 2


def test_the_time_is_that_of_the_frame_a_reader_waits_for() -> None:
    """A reader's delay counts from the frame at its cursor, or the oldest that is left."""
    ring = filled(100, *[40] * 5)
    assert [ring.came_at(cursor) for cursor in range(5)] == [3.0, 3.0, 3.0, 3.0, 4.0]


def test_a_control_frame_is_marked() -> None:
    """Readers can tell the frames that only some of them get."""
    ring = Ring(100)
    ring.append(b"event", 0.0)
    ring.append(b"gap", 1.0, control=True)
    assert [(entry.frame, entry.control) for entry in ring.read(0, 100)] == [(b"event", False), (b"gap", True)]


@pytest.mark.parametrize("seed", range(20))
def test_the_ring_is_the_end_of_the_list_of_all_frames(seed: int) -> None:
    """Whatever comes, what can be read is exactly the newest frames that fit."""
    chance = random.Random(seed)
    bound = chance.randrange(1, 2000)
    ring, frames = Ring(bound), list[bytes]()
    for number in range(300):
        frames.append(chance.randbytes(chance.randrange(1, 300)))
        ring.append(frames[-1], float(number))
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

"""Pages of the log: asked for by many, read once, kept within bounds."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from broadcaster.errors import RedisRefused
from broadcaster.hub.log import PAGE_EVENTS
from broadcaster.hub.pages import KEPT_BYTES, KEPT_PAGES, LogPage, Pages
from broadcaster.position import Position
from tests.hub.parts import CHANNEL, INVALID, Memory, payload, turns
from tests.support import in_loop, until

P = Position.parse


class Desk:
    """Pages over a log in memory, and what was served."""

    def __init__(self, stored: int = 0, size: int = 0) -> None:
        self.redis = Memory()
        for number in range(stored):
            self.redis.store(payload(number, size))
        self.pages = Pages(self.redis.event_log())
        self.task = asyncio.create_task(self.pages.run())
        self.served: list[tuple[int, LogPage]] = []

    def want(self, *firsts: int) -> None:
        for first in firsts:
            self.pages.want(CHANNEL, first, partial(self._serve, first))

    def _serve(self, first: int, page: LogPage) -> None:
        self.served.append((first, page))


def offsets(page: LogPage) -> list[int]:
    return [arrival.position.offset for arrival in page.page.arrivals if arrival.position]


@in_loop
async def test_a_page_is_read_once_for_all_who_want_it() -> None:
    """Whoever asks before it has come gets the same one; later ones find it at hand."""
    desk = Desk(1000)
    assert desk.pages.get(CHANNEL, 5) is None
    desk.want(5, 5, 200, 255, 1)
    await turns()
    assert [first for first, _ in desk.served] == [5, 5, 200, 255, 1]
    assert len({id(page) for _, page in desk.served}) == 1
    assert desk.redis.pages == [(CHANNEL, 0)]
    assert offsets(desk.served[0][1]) == list(range(1, PAGE_EVENTS + 1))
    assert desk.pages.get(CHANNEL, 77) is desk.served[0][1]
    assert desk.pages.get(CHANNEL, PAGE_EVENTS) is None
    assert desk.pages.get("events.other", 5) is None
    assert desk.pages.read == 1


@in_loop
async def test_pages_begin_at_round_offsets_and_come_in_the_order_of_asking() -> None:
    """One request at a time, whoever asks."""
    desk = Desk(1000)
    desk.want(900, 300, 5)
    await turns()
    assert [first for _, first in desk.redis.pages] == [768, 256, 0]
    assert [offsets(page)[0] for _, page in desk.served] == [768, 256, 1]
    last = desk.served[0][1].page
    assert (last.last, last.complete) == (1000, True)
    assert [page.page.complete for _, page in desk.served[1:]] == [False, False]


@in_loop
async def test_an_empty_page_says_where_it_was_asked_for() -> None:
    """Nothing there, and nothing after it."""
    desk = Desk(10)
    desk.want(5000)
    await turns()
    page = desk.served[0][1].page
    assert (page.arrivals, page.refused, page.last, page.complete) == ((), (), 4863, True)
    assert page.head.position == P("e1-10")
    assert desk.served[0][1].size == 0


@in_loop
async def test_what_is_wanted_is_read_anew() -> None:
    """Whoever wants a page has seen that the kept one does not help."""
    desk = Desk(10)
    desk.want(1)
    await turns()
    desk.redis.store(payload(11))
    assert offsets(desk.pages.get(CHANNEL, 1) or desk.served[0][1])[-1] == 10
    desk.want(1)
    await turns()
    assert offsets(desk.served[1][1])[-1] == 11
    assert desk.pages.get(CHANNEL, 1) is desk.served[1][1]
    assert desk.pages.read == 2


@in_loop
async def test_no_more_than_so_many_pages_are_kept_and_the_one_not_used_for_longest_goes() -> None:
    """A page that somebody looks at stays."""
    desk = Desk()
    for number in range(KEPT_PAGES):
        desk.want(number * PAGE_EVENTS)
    await turns(1000)
    assert desk.pages.get(CHANNEL, 0) is not None
    desk.want(KEPT_PAGES * PAGE_EVENTS)
    await turns()
    assert desk.pages.get(CHANNEL, 0) is not None
    assert desk.pages.get(CHANNEL, PAGE_EVENTS) is None
    kept = [number for number in range(KEPT_PAGES + 1) if desk.pages.get(CHANNEL, number * PAGE_EVENTS)]
    assert len(kept) == KEPT_PAGES


@in_loop
async def test_no_more_than_so_many_bytes_are_kept() -> None:
    """Large pages push out the oldest; reading one again does not count it twice; one alone is always kept."""
    size = 24_000
    page_bytes = PAGE_EVENTS * size
    desk = Desk(6 * PAGE_EVENTS, size)

    def kept() -> list[int]:
        return [number for number in range(6) if desk.pages.get(CHANNEL, number * PAGE_EVENTS)]

    fit = KEPT_BYTES // page_bytes
    assert 1 < fit < 5
    for number in range(1, 5):
        desk.want(number * PAGE_EVENTS, number * PAGE_EVENTS)
        await until(lambda number=number: len(desk.served) == 2 * number, "not served")  # type: ignore[misc]
    assert kept() == list(range(5 - fit, 5))
    for _ in range(3):
        before = len(desk.served)
        desk.want(4 * PAGE_EVENTS)
        await until(lambda before=before: len(desk.served) > before, "not served")  # type: ignore[misc]
    assert kept() == list(range(5 - fit, 5))


@in_loop
async def test_a_page_larger_than_all_bytes_is_kept_alone() -> None:
    """Or nobody could read it twice."""
    desk = Desk(PAGE_EVENTS + 1, 70_000)
    desk.want(PAGE_EVENTS)
    await turns()
    desk.want(1)
    await until(lambda: len(desk.served) == 2, "not served")
    assert desk.served[1][1].size > KEPT_BYTES
    assert desk.pages.get(CHANNEL, 1) is not None
    assert desk.pages.get(CHANNEL, PAGE_EVENTS) is None


@in_loop
async def test_a_redis_that_is_away_is_asked_again() -> None:
    """Nobody is told of it; everybody is served when it is back."""
    desk = Desk(10)
    desk.redis.failures = 2
    desk.want(1, 5000)
    await until(lambda: len(desk.served) == 2, "it has given up")
    assert desk.pages.read == 2


@in_loop
async def test_a_redis_that_refuses_ends_it() -> None:
    """Trying again would not help."""
    desk = Desk(10)

    async def refuse(*commands: object) -> list[object]:
        raise RedisRefused("NOPERM")

    desk.redis.execute = refuse  # type: ignore[method-assign]
    desk.want(1)
    with pytest.raises(RedisRefused):
        await desk.task


@in_loop
async def test_who_asks_while_a_page_is_read_is_served() -> None:
    """In the middle of an answer, and from within the serving of another one."""
    desk = Desk(1000)
    desk.redis.on_the_way = lambda: desk.want(1) if len(desk.redis.pages) == 1 and len(desk.served) < 3 else None

    def again(page: LogPage) -> None:
        desk.served.append((-1, page))
        if len(desk.served) < 4:
            desk.pages.want(CHANNEL, 600, again)

    desk.pages.want(CHANNEL, 1, again)
    await turns()
    assert len(desk.served) >= 4
    assert desk.pages.read >= 2


# Runs: the quick way through a page


async def page_of(redis: Memory, first: int = 0) -> LogPage:
    page = await redis.event_log().page(CHANNEL, first)
    return LogPage.of(page)


RUNS: list[tuple[str, str, int, list[int]]] = [
    ("all that fit", "e1-0", 10**9, list(range(1, 11))),
    ("from the middle", "e1-4", 10**9, list(range(5, 11))),
    ("the last", "e1-9", 10**9, [10]),
    ("no room", "e1-3", 1, [4]),
    ("at the end", "e1-10", 10**9, []),
    ("beyond the end", "e1-11", 10**9, []),
    ("another epoch", "e2-4", 10**9, []),
]


@pytest.mark.parametrize(("place", "room", "run"), [case[1:] for case in RUNS], ids=[case[0] for case in RUNS])
@in_loop
async def test_a_run_is_what_follows_a_place_without_a_hole(place: str, room: int, run: list[int]) -> None:
    """At least one event, and no more than there is room for; nothing where something may be missing."""
    redis = Memory()
    for number in range(10):
        redis.store(payload(number))
    page = await page_of(redis)
    found = [arrival.position.offset for arrival in page.run(P(place), room) if arrival.position]
    assert found == run


@in_loop
async def test_a_run_is_as_long_as_there_is_room() -> None:
    """Exactly that many bytes fit; one byte less is one event less."""
    redis = Memory()
    for number in range(10):
        redis.store(payload(number, 300 + number))
    page = await page_of(redis)
    frames = [len(arrival.frame) for arrival in page.page.arrivals]
    for start in range(8):
        for count in range(1, 10 - start):
            room = sum(frames[start : start + count])
            assert len(page.run(Position("e1", start), room)) == count
            assert len(page.run(Position("e1", start), room - 1)) == max(1, count - 1)
            assert len(page.run(Position("e1", start), room + 1)) == count


@in_loop
async def test_a_page_with_anything_missing_has_no_run() -> None:
    """A hole, a restart, a refused event: then each step is looked at."""
    hole, restart, refused, front = Memory(), Memory(), Memory(), Memory()
    for number in range(10):
        hole.store(payload(number))
        restart.store(payload(number))
        refused.store(payload(number) if number != 4 else INVALID)
        front.store(payload(number))
    del hole.shelf().log[5]
    restart.restart()
    restart.store(payload(11))
    front.trim(4)
    for redis in (hole, restart, refused):
        page = await page_of(redis)
        assert not page.whole
        assert list(page.run(P("e1-1"), 10**9)) == []
    page = await page_of(front)
    assert page.whole
    assert list(page.run(P("e1-1"), 10**9)) == [], "offsets 2 and 3 are gone"
    assert len(page.run(P("e1-3"), 10**9)) == 7
    assert list((await page_of(Memory())).run(P("e1-0"), 10**9)) == []

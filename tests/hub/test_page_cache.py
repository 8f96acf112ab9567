"""PageCache of the log: asked for by many, read once, kept within bounds."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from broadcaster.core.errors import RedisErrorReply, RedisRefused
from broadcaster.core.position import Position
from broadcaster.core.runtime import LIMITS, Limits, Runtime
from broadcaster.hub.catchup.event_log import EventLog
from broadcaster.hub.catchup.page_cache import CachedPage, PageCache
from broadcaster.settings import Settings
from tests.hub.house import CHANNEL, INVALID, Memory, payload, turns
from tests.support import in_loop, until

P = Position.parse


class Cache:
    """PageCache over a log in memory, and what was served."""

    def __init__(self, stored: int = 0, size: int = 0, limits: Limits = LIMITS) -> None:
        self.redis = Memory()
        for number in range(stored):
            self.redis.store(payload(number, size))
        self.pages = PageCache(self.redis.event_log(), Runtime(limits=limits))
        self.task = asyncio.create_task(self.pages.run())
        self.served: list[tuple[int, CachedPage]] = []

    def want(self, *firsts: int) -> None:
        for first in firsts:
            self.pages.want(CHANNEL, first, None, partial(self._serve, first))

    def _serve(self, first: int, page: object) -> None:
        assert isinstance(page, CachedPage)
        self.served.append((first, page))


def offsets(page: CachedPage) -> list[int]:
    return [arrival.position.offset for arrival in page.page.messages if arrival.position]


@in_loop
async def test_a_page_is_read_once_for_all_who_stand_in_it() -> None:
    """Whoever asks before it has come gets the same one; later ones find it at hand."""
    cache = Cache(1000)
    assert cache.pages.get(CHANNEL, 5, "e1") is None
    cache.want(5, 5, 200, 255)
    await turns()
    assert [first for first, _ in cache.served] == [5, 5, 200, 255]
    assert len({id(page) for _, page in cache.served}) == 1
    assert cache.redis.pages == [(CHANNEL, 5)]
    last = 4 + LIMITS.page_events
    assert offsets(cache.served[0][1]) == list(range(5, last + 1))
    assert cache.pages.get(CHANNEL, 77, "e1") is cache.pages.get(CHANNEL, last, "e1") is cache.served[0][1]
    assert cache.pages.get(CHANNEL, 4, "e1") is None
    assert cache.pages.get(CHANNEL, last + 1, "e1") is None
    assert cache.pages.get("events.other", 5, "e1") is None
    assert cache.pages.read == 1


@in_loop
async def test_those_who_were_cut_at_different_events_go_on_together() -> None:
    """Whatever page comes first, everybody is soon at the end of one that others have read."""
    cache = Cache(1000)
    cache.want(40, 10, 700, 30, 20)
    await turns()
    assert [first for _, first in cache.redis.pages] == [40, 10, 700]
    assert [first for first, _ in cache.served] == [40, 10, 30, 20, 700]


@in_loop
async def test_pages_come_in_the_order_of_asking() -> None:
    """One request at a time, whoever asks."""
    cache = Cache(1000)
    cache.want(900, 300, 5)
    await turns()
    assert [first for _, first in cache.redis.pages] == [900, 300, 5]
    assert [offsets(page)[0] for _, page in cache.served] == [900, 300, 5]
    last = cache.served[0][1].page
    assert (last.last, last.complete) == (P("e1-1000"), True)
    assert [page.page.complete for _, page in cache.served[1:]] == [False, False]


@in_loop
async def test_a_page_is_bounded_by_bytes() -> None:
    """However large the events are; one that is larger than a page is a page of its own."""
    size = len(payload(1, 60_000))
    cache = Cache(20, 60_000)
    cache.want(1, 20)
    await turns()
    fit = LIMITS.page_bytes // (size + 100)
    assert offsets(cache.served[0][1]) == list(range(1, fit + 1))
    assert not cache.served[0][1].page.complete
    assert offsets(cache.served[1][1]) == [20]
    runtime = Runtime(limits=Limits(page_bytes=1000))
    page = await EventLog(cache.redis.broker(Settings()), 65_536, runtime).page(CHANNEL, 1)
    assert (len(page.messages), page.complete) == (1, False)


@in_loop
async def test_an_empty_page_is_complete() -> None:
    """Nothing there, and nothing after it."""
    cache = Cache(10)
    cache.want(5000)
    await turns()
    page = cache.served[0][1].page
    assert (page.messages, page.refused, page.last, page.complete) == ((), (), None, True)
    assert page.head.position == P("e1-10")
    assert cache.served[0][1].size == 0


@in_loop
async def test_a_page_is_of_no_use_in_another_epoch() -> None:
    """Redis may have come back with older data since it was read."""
    cache = Cache(10)
    cache.want(1)
    await turns()
    assert cache.pages.get(CHANNEL, 1, "e1") is not None
    assert cache.pages.get(CHANNEL, 1, "e2") is None


@in_loop
async def test_a_page_of_another_memory_than_its_head_is_read_again() -> None:
    """Else events that are lost with a memory that was set back between the two would be told as expired."""
    cache = Cache(10)
    cache.redis.between = partial(cache.redis.set_back, 6)
    cache.want(1)
    await until(lambda: cache.served, "it is not read again")
    assert cache.redis.pages == [(CHANNEL, 1)] * 2
    assert offsets(cache.served[0][1]) == [1, 2, 3, 4, 5, 6]
    assert cache.served[0][1].page.head.offset == 6


@in_loop
async def test_what_is_wanted_is_read_anew() -> None:
    """Whoever wants a page has seen that the kept one does not help."""
    cache = Cache(10)
    cache.want(1)
    await turns()
    cache.redis.store(payload(11))
    assert offsets(cache.pages.get(CHANNEL, 1, "e1") or cache.served[0][1])[-1] == 10
    cache.want(1)
    await turns()
    assert offsets(cache.served[1][1])[-1] == 11
    assert cache.pages.get(CHANNEL, 1, "e1") is cache.served[1][1]
    assert cache.pages.read == 2


@in_loop
async def test_no_more_than_so_many_pages_are_kept_and_the_one_not_used_for_longest_goes() -> None:
    """A page that somebody looks at stays."""
    cache = Cache(3 * LIMITS.page_events, limits=Limits(kept_pages=2))
    for number in range(2):
        cache.want(number * LIMITS.page_events + 1)
    await turns(1000)
    assert cache.pages.get(CHANNEL, 1, "e1") is not None
    cache.want(2 * LIMITS.page_events + 1)
    await turns(1000)
    assert cache.pages.get(CHANNEL, 1, "e1") is not None
    assert cache.pages.get(CHANNEL, LIMITS.page_events + 1, "e1") is None
    assert cache.pages.get(CHANNEL, 2 * LIMITS.page_events + 1, "e1") is not None


@in_loop
async def test_no_more_than_so_many_bytes_are_kept() -> None:
    """Large pages push out the oldest; reading one again does not count it twice."""
    cache = Cache(50, 60_000, Limits(kept_page_bytes=3 * LIMITS.page_bytes + 10_000))
    firsts = [1, 11, 21, 31, 41]

    def kept() -> list[int]:
        return [first for first in firsts if cache.pages.get(CHANNEL, first, "e1")]

    for first in firsts:
        before = len(cache.served)
        cache.want(first)
        await until(lambda before=before: len(cache.served) > before, "not served")  # type: ignore[misc]
    assert kept() == [21, 31, 41]
    for _ in range(3):
        before = len(cache.served)
        cache.want(41)
        await until(lambda before=before: len(cache.served) > before, "not served")  # type: ignore[misc]
    assert kept() == [21, 31, 41]


@in_loop
async def test_a_page_larger_than_all_bytes_is_kept_alone() -> None:
    """Or nobody could read it twice."""
    cache = Cache(2, 60_000, Limits(kept_page_bytes=50_000))
    cache.want(2)
    await turns()
    cache.want(1)
    await until(lambda: len(cache.served) == 2, "not served")
    assert cache.pages.get(CHANNEL, 1, "e1") is cache.served[1][1]
    assert len(cache.pages._kept) == 1


@in_loop
async def test_a_redis_that_is_away_is_asked_again() -> None:
    """Nobody is told of it; everybody is served when it is back."""
    cache = Cache(10)
    cache.redis.failures = 2
    cache.want(1, 5000)
    await until(lambda: len(cache.served) == 2, "it has given up")
    assert cache.pages.read == 2


@pytest.mark.parametrize("error", [RedisRefused("NOPERM"), RedisErrorReply("WRONGTYPE of the key")])
@in_loop
async def test_one_channel_that_cannot_be_read_does_not_keep_others_waiting(error: Exception) -> None:
    """Whoever waits for it is told so, the next one is read; it is asked again when somebody wants it again."""
    cache = Cache(10)
    cache.redis.errors["events.broken"] = {"XRANGE": error}
    told: list[object] = []
    for _ in range(2):
        cache.pages.want("events.broken", 1, None, told.append)
        cache.want(1)
        await until(lambda: cache.served and told, "somebody is kept waiting")
        assert told.pop() is error
        cache.served.clear()
    cache.redis.errors.clear()
    cache.pages.want("events.broken", 1, None, told.append)
    await until(lambda: told, "it is not asked again")
    assert isinstance(told.pop(), CachedPage)


@in_loop
async def test_nor_do_channels_whose_node_does_not_serve_them_now() -> None:
    """As long as it is tried again the others have their turn; and each is given up in its own time."""
    cache = Cache(10, limits=Limits(page_give_up_s=0.5))
    broken = [f"events.{number}" for number in range(4)]
    told: list[object] = []
    for name in broken:
        cache.redis.errors[name] = {"XRANGE": RedisErrorReply("TRYAGAIN a slot moves")}
        cache.pages.want(name, 1, None, told.append)
    begun_at = time.monotonic()
    cache.want(1)
    await until(lambda: cache.served, "it waits for the others")
    assert told == []
    await until(lambda: len(told) == len(broken), "somebody is kept waiting")
    assert time.monotonic() - begun_at < len(broken) * 0.5


@in_loop
async def test_nobody_waits_for_ever_for_a_redis_that_is_away() -> None:
    """Whoever has waited for long is told why; who comes then is tried for anew."""
    cache = Cache(10, limits=Limits(page_give_up_s=0.1))
    cache.redis.failures = 1_000_000
    told: list[object] = []
    cache.pages.want(CHANNEL, 1, None, told.append)
    cache.pages.want("events.other", 1, None, told.append)
    await until(lambda: len(told) == 2, "somebody is kept waiting")
    assert [str(each) for each in told] == ["there is no Redis"] * 2
    cache.redis.failures = 1
    cache.want(1)
    await until(lambda: cache.served, "it is not asked again")


@in_loop
async def test_who_asks_while_a_page_is_read_is_served() -> None:
    """In the middle of an answer, and from within the serving of another one."""
    cache = Cache(1000)
    cache.redis.on_the_way = lambda: (
        cache.want(1) if len(cache.redis.pages) == 1 and len(cache.served) < 3 else None
    )

    def again(page: object) -> None:
        assert isinstance(page, CachedPage)
        cache.served.append((-1, page))
        if len(cache.served) < 4:
            cache.pages.want(CHANNEL, 600 + len(cache.served), None, again)

    cache.pages.want(CHANNEL, 1, None, again)
    await turns()
    assert len(cache.served) >= 4
    assert cache.pages.read >= 2


# Runs: the quick way through a page


async def page_of(redis: Memory, first: int = 0) -> CachedPage:
    page = await redis.event_log().page(CHANNEL, first)
    return CachedPage.of(page)


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
    frames = [len(arrival.frame) for arrival in page.page.messages]
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
    hole.delete(5)
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

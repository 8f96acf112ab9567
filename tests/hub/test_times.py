"""A time asked for becomes a position: by bisection, or by reading where a clock may have been set back."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence

import pytest

from broadcaster.core.errors import RedisErrorReply, RedisRefused
from broadcaster.core.position import OLDEST, Cause, Gap, Instant, Position
from broadcaster.hub.catchup.times import Asked, Found, Times
from tests.hub.house import CHANNEL, House, Memory, Peer, payload, splice
from tests.hub.test_replay import until_welcome, welcome
from tests.support import in_loop, server_frames, until

P = Position.parse


def stamped(redis: Memory, *stamps: int | None) -> None:
    """Events that were stored at these instants; None: they do not say when."""
    for us in stamps:
        position = redis.next()
        event = splice(CHANNEL, position, payload(position.offset))
        mark = b'"offset":%d,' % position.offset
        redis.store(event if us is None else event.replace(mark, b'%b"stored_at_us":%d,' % (mark, us)))


async def found(redis: Memory, *instants: Instant, channel: str = CHANNEL) -> list[Found] | None:
    times = Times(redis.event_log())
    now_s = asyncio.get_running_loop().time()
    return await times.find(channel, [Asked(instant, now_s) for instant in instants])


async def offsets(redis: Memory, *instants: int) -> list[int]:
    """After which offset a reader begins."""
    places = await found(redis, *map(Instant, instants))
    assert places is not None
    return [place.position.offset for place in places]


RISING: list[tuple[str, int, int]] = [
    ("before all", 1, 0),
    ("at the first", 10, 0),
    ("between two", 11, 1),
    ("at one", 20, 1),
    ("at several at once", 30, 2),
    ("just after these", 31, 5),
    ("at the last", 1000, 99),
    ("after all", 1001, 100),
]


@pytest.mark.parametrize("rising", [1, 0], ids=["bisected", "read"])
@pytest.mark.parametrize(("us", "after"), [case[1:] for case in RISING], ids=[case[0] for case in RISING])
@in_loop
async def test_a_reader_begins_with_the_first_event_then_or_later(us: int, after: int, rising: int) -> None:
    """Not one too many, and none too few."""
    redis = Memory()
    redis.rising = rising
    stamped(redis, 10, 20, 30, 30, 30, *range(60, 1010, 10))
    assert await offsets(redis, us) == [after]


@pytest.mark.parametrize("rising", [1, 0], ids=["bisected", "read"])
@in_loop
async def test_what_leaves_the_log_while_it_is_looked_for_is_told(rising: int) -> None:
    """It cannot be known whether that was stored then or later, and earlier instants begin where it begins now."""
    redis = Memory()
    redis.rising = rising
    stamped(redis, *range(10, 2010, 10))
    redis.trim(21)

    def trim() -> None:
        if len(redis.pages) >= 3:
            redis.trim(131)

    redis.on_the_way = trim
    gone = Found(P("e1-130"), Gap(CHANNEL, Cause.EXPIRED, "e1", None, 130, P("e1-130")))
    places = await found(redis, Instant(300), Instant(1900))
    assert places == [gone, Found(P("e1-189"), None)]


@in_loop
async def test_a_long_log_is_not_read() -> None:
    """Some fourteen events of 10,000; many who ask for nearly the same read no more, nor one after the other."""
    redis = Memory()
    redis.rising = 1
    stamped(redis, *range(10, 100_010, 10))
    assert await offsets(redis, 77_000) == [7_699]
    assert len(redis.pages) <= 16
    redis.pages.clear()
    assert await offsets(redis, *range(77_000, 77_200)) == [(us - 1) // 10 for us in range(77_000, 77_200)]
    assert len(redis.pages) <= 40


SET_BACK: list[tuple[str, list[int | None], int, int]] = [
    ("within the log", [10, 20, 90, 100, 30, 40, 50], 60, 2),
    ("twice", [90, 10, 80, 20, 30, 40], 85, 0),
    ("and got further again", [10, 80, 20, 30, 40, 50, 60, 70, 90], 75, 1),
    ("events that do not say when", [10, 20, None, 30, 40], 35, 2),
    ("only such", [None, None], 35, 0),
    ("the last does not say", [10, 20, None], 35, 2),
]


@pytest.mark.parametrize(("stamps", "us", "after"), [case[1:] for case in SET_BACK], ids=[c[0] for c in SET_BACK])
@in_loop
async def test_where_a_clock_went_back_a_reader_begins_earlier(
    stamps: list[int | None], us: int, after: int
) -> None:
    """No event that was stored then, or later, is left out, wherever it stands."""
    redis = Memory()
    stamped(redis, *stamps)
    assert await offsets(redis, us) == [after]
    assert all(stamp is not None and stamp < us for stamp in stamps[:after])


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_bisecting_finds_what_reading_finds(seed: int) -> None:
    """With holes in the log, several epochs, and many instants at once."""
    chance = random.Random(seed)
    redis = Memory(timed=True)
    us = 0
    for _ in range(300):
        us += chance.choice([0, 0, 1, 5, 100])
        stamped(redis, us)
        if chance.random() < 0.02:
            redis.restart()
    redis.trim(chance.randrange(1, 50))
    redis.delete(*{chance.randrange(100, 200) for _ in range(30)})
    instants = [Instant(chance.randrange(us + 50)) for _ in range(40)]
    read = await found(redis, *instants)
    redis.rising = 1
    bisected = await found(redis, *instants)
    assert read is not None
    assert bisected == read
    log = redis.shelves[CHANNEL].log
    for instant, place in zip(instants, read, strict=True):
        earlier = [offset for offset in log if offset <= place.position.offset]
        assert all(json.loads(log[offset])["stored_at_us"] < instant.us for offset in earlier)
        if following := [offset for offset in sorted(log) if offset > place.position.offset]:
            assert json.loads(log[following[0]])["stored_at_us"] >= instant.us
            assert json.loads(log[following[0]])["epoch"] == place.position.epoch


@in_loop
async def test_a_duration_counts_by_the_clock_of_redis_from_when_it_was_asked() -> None:
    """However far this machine's clock is off, and however long it had to wait."""
    redis = Memory()
    redis.rising = 1
    stamped(redis, *range(1_000_000, 101_000_000, 1_000_000))  # one each second
    redis.now_us = 100_000_000
    now_s = asyncio.get_running_loop().time()
    ago = Instant(10_000_000, ago=True)
    places = await Times(redis.event_log()).find(CHANNEL, [Asked(ago, now_s + 0.5), Asked(ago, now_s - 4.5)])
    assert places is not None
    assert [place.position.offset for place in places] == [90, 85]


@in_loop
async def test_without_the_right_to_ask_redis_the_hubs_clock_counts() -> None:
    """`TIME` is refused; positions are found all the same."""
    redis = Memory()
    redis.errors["events.critical"] = {}
    redis.now_us = -1
    stamped(redis, 10, 20)
    answer = redis._answer
    redis._answer = lambda command: RedisRefused("no right") if command[0] == "TIME" else answer(command)  # type: ignore[method-assign]
    places = await found(redis, Instant(10_000_000, ago=True), Instant(15))
    assert places is not None
    assert [place.position.offset for place in places] == [2, 1]


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_only_what_is_before_the_last_set_back_is_read(seed: int) -> None:
    """It is found where reading all would find it, and what rises is bisected."""
    chance = random.Random(seed)
    redis = Memory()
    before, after = chance.randrange(1, 100), 2_000
    stamped(redis, *[chance.randrange(50_000) for _ in range(before)], *range(100, 100 + 20 * after, 20))
    instants = [Instant(chance.randrange(60_000)) for _ in range(5)]
    read = await found(redis, *instants)
    redis.rising = before + 1
    redis.pages.clear()
    assert await found(redis, *instants) == read
    assert len(redis.pages) < 5 * 14


GONE: list[tuple[str, int, Instant, str, Gap | None]] = [
    ("nothing is gone", 1, OLDEST, "e1-0", None),
    ("of all", 31, OLDEST, "e1-30", Gap(CHANNEL, "expired", "e1", None, 30, P("e1-30"))),
    ("of a time before", 31, Instant(5), "e1-30", Gap(CHANNEL, "expired", "e1", None, 30, P("e1-30"))),
    ("before that time", 31, Instant(320), "e1-31", None),
    ("of an empty log", 101, Instant(5), "e1-100", Gap(CHANNEL, "expired", "e1", None, 100, P("e1-100"))),
]


@pytest.mark.parametrize("rising", [1, 0], ids=["bisected", "read"])
@pytest.mark.parametrize(
    ("first", "instant", "position", "gap"), [case[1:] for case in GONE], ids=[case[0] for case in GONE]
)
@in_loop
async def test_what_has_left_the_retention_window_is_told(
    first: int, instant: Instant, position: str, gap: Gap | None, rising: int
) -> None:
    """If it may have been stored then, or later; since which offset that would be nobody knows."""
    redis = Memory()
    redis.rising = rising
    stamped(redis, *range(10, 1010, 10))
    redis.trim(first)
    assert await found(redis, instant) == [Found(P(position), gap)]


@in_loop
async def test_what_redis_has_lost_has_not_expired() -> None:
    """The log begins with an epoch: what was before was in another memory."""
    redis = Memory(timed=True)
    stamped(redis, *range(10, 110, 10))
    redis.restart()
    stamped(redis, 110, 120)
    redis.trim(11)
    epoch = redis.head().epoch
    places = await found(redis, OLDEST, Instant(115))
    at = Position(epoch, 10)
    assert places == [Found(at, Gap(CHANNEL, "redis_restarted", position=at)), Found(Position(epoch, 11), None)]


@in_loop
async def test_of_a_channel_that_redis_does_not_know_nothing_is_found() -> None:
    """And nothing begins there because somebody has asked."""
    redis = Memory()
    assert await found(redis, OLDEST, channel="events.unknown") is None
    assert not redis.shelves


# In a hub


def stories(peer: Peer) -> list[dict[str, object]]:
    """All that a peer was sent, as JSON."""
    return [json.loads(data) for opcode, data in server_frames(b"".join(peer.socket.writes)) if opcode == 1]


async def opened(stamps: Sequence[int | None], ring_bytes: int = 16 << 20) -> House:
    house = House(ring_bytes)
    house.redis.rising = 1
    stamped(house.redis, *stamps)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    house.count = len(stamps)
    return house


@pytest.mark.parametrize("ring_bytes", [16 << 20, 1 << 18], ids=["from the ring", "from the log"])
@in_loop
async def test_the_welcome_says_what_a_time_has_become(ring_bytes: int) -> None:
    """A position; everything after it follows, and then what comes."""
    house = await opened(range(10, 1010, 10), ring_bytes)
    house.publish(10)
    peer = house.connect("since=1970-01-01T00:00:00.000905Z", v1=True)
    plain = house.connect("since=1970-01-01T00:00:00.000905Z")
    await until_welcome(house, peer)
    house.publish(1)
    await until(lambda: plain.story[-1:] == [111] and peer.story[-1:] == [111], "it does not come")
    assert welcome(peer) == ("e1-90", True)
    assert peer.story == plain.story == [*range(91, 112)]
    totals = house.channel().totals()
    assert (totals["resumed"], totals["resumed_whole"]) == (2, 2)


@in_loop
async def test_what_has_expired_is_told_behind_the_welcome_and_closes_no_plain_client() -> None:
    """A `gap` without a beginning; who cannot be told gets what there is."""
    house = await opened(range(10, 1010, 10), 1 << 18)
    house.redis.trim(31)
    peer, plain = house.connect("since=all", v1=True), house.connect("since=1d")
    await until_welcome(house, peer)
    await until(lambda: plain.story[-1:] == [100] and peer.story[-1:] == [100], "it does not come")
    first, second, third, *_ = stories(peer)
    assert (first["control"], first["position"], first["recovered"]) == ("welcome", "e1-30", False)
    assert second == {"control": "gap", "channel": CHANNEL, "cause": "expired", "epoch": "e1", "first": None,
                      "last": 30, "position": "e1-30"}  # fmt: skip
    assert third["offset"] == 31
    assert peer.story == [("e1", None, 30, "expired"), *range(31, 101)]
    assert plain.story == [*range(31, 101)]
    assert "close 4009" not in plain.told


@in_loop
async def test_a_time_after_all_events_is_now() -> None:
    """The position of the welcome is the head, and nothing that is stored comes."""
    house = await opened(range(10, 1010, 10))
    peer = house.connect("since=0s", v1=True)
    house.redis.now_us = 5_000_000
    await until_welcome(house, peer)
    house.publish(1)
    await house.settle()
    assert welcome(peer) == ("e1-100", True)
    assert peer.story == [101]


@in_loop
async def test_who_goes_while_the_log_is_read_disturbs_nobody() -> None:
    """Neither those who wait with it, nor the channel."""
    house = await opened(range(10, 1010, 10))
    gone, stays = house.connect("since=all", v1=True), house.connect("since=all", v1=True)
    gone.connection.connection_lost(None)
    await until_welcome(house, stays)
    await house.settle()
    assert house.channel().listeners == 1
    assert stays.story == [*range(1, 101)]
    assert not stories(gone)


@in_loop
async def test_nobody_waits_for_a_time_that_is_looked_for() -> None:
    """Redis takes its time: what comes is given at once to all others, and in the end to who has asked, too."""
    house = await opened(range(10, 1010, 10))
    live = house.connect(v1=True)
    house.redis.gate.clear()
    asker = house.connect("since=all", v1=True)
    await house.settle()
    house.publish(2)
    later = house.connect("last=1", v1=True)
    await house.settle()
    assert (live.story, later.story, asker.story) == ([101, 102], [102], [])
    house.redis.gate.set()
    await until_welcome(house, asker)
    await until(lambda: asker.story[-1:] == [102], "it does not come")
    assert asker.story == [*range(1, 103)]


@in_loop
async def test_a_log_that_redis_refuses_closes_who_asks_for_a_time() -> None:
    """As it closes whoever resumes: 4010, with the reason."""
    house = await opened(range(10, 1010, 10))
    house.redis.errors[CHANNEL] = {"XRANGE": RedisErrorReply("WRONGTYPE no stream")}
    peer = house.connect("since=10m", v1=True)
    await until(lambda: peer.told[-1:] == ["close 4010"], "it is not closed")
    assert house.channel().totals()["resumed"] == 0


@in_loop
async def test_without_history_a_time_is_a_gap_without_numbers() -> None:
    """As a position is; a plain client, to which that cannot be told, is closed."""
    house = House(history=False)
    house.channels.on_confirmed(CHANNEL)
    peer, plain = house.connect("since=10m", v1=True), house.connect("since=all")
    await house.settle()
    first, second = stories(peer)
    assert (first["control"], first["position"], first["recovered"]) == ("welcome", None, False)
    assert (second["cause"], second["first"], second["last"]) == ("no_history", None, None)
    assert plain.told[-1] == "close 4009"


@in_loop
async def test_each_channel_has_its_own_beginning() -> None:
    """A time, a number and a position on one connection."""
    house = await opened(range(10, 1010, 10))
    for channel in ("events.a", "events.b"):
        house.store(5, channel=channel)
        house.channels.get(channel)
        house.channels.on_confirmed(channel)
    await house.settle()
    peer = house.connect(
        "channel=events.a&since=e2-3&channel=events.critical&since=1970-01-01T00:00:00.000990Z"
        "&channel=events.b&last=1",
        v1=True,
    )
    await until(lambda: len([told for told in peer.told if told == "welcome"]) == 3, "not welcomed")
    await house.settle()
    got = [(item["channel"], item["offset"]) for item in stories(peer) if "event_id" in item]
    by_channel = {name: [n for _, n in pairs] for name, pairs in itertools.groupby(sorted(got), lambda x: x[0])}
    assert by_channel == {"events.a": [4, 5], "events.b": [5], "events.critical": [99, 100]}

"""Who is slow where the oldest events are dropped: what it loses, what it is told, and what is counted."""

from __future__ import annotations

import itertools
import json
import random
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from broadcaster import wire
from broadcaster.core.event import decode
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.hub.fanout.filters import Filter, Labels
from broadcaster.hub.fanout.ring import Entry
from broadcaster.hub.fanout.slow import SHARE, Lag, gap_entry, overtaken, shed
from broadcaster.hub.fanout.subscription import Subscription
from broadcaster.hub.stats import ChannelStatistics
from broadcaster.settings import ChannelsTable
from broadcaster.subscribe.resume_state import ResumeState
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, House, Peer, payload, splice, turns
from tests.support import Clock, client_frame, in_loop, server_frames, until

OTHER = "events.other"
DROPS = ChannelsTable(drop_oldest=("events.*",))
FAR = 10**9
"""A bound that nothing reaches."""

SEVERITIES = ("info", "warning", "critical")


# Which entries: a pure function

ALLOWED = Lag(100, 100, 100)


def entry(offset: int, severity: str = "critical", *, stored: bool = True, era: int = 1) -> Entry:
    return Entry(b"%d" % offset, Labels("A", "s", severity), Position(f"e{era}", offset), era, 0.0, stored)


def told_entry(offset: int) -> Entry:
    """A gap that everybody is told of."""
    gap = Gap("c", Cause.EXPIRED, "e1", offset, offset, Position("e1", offset))
    return Entry(b"gap", None, gap.position, 1, 0.0, gap=gap)


def lost(first: int | None, last: int | None, epoch: str | None = "e1") -> Entry:
    position = None if epoch is None or last is None else Position(epoch, last)
    return gap_entry(Gap("c", Cause.SHED, epoch, first, last, position))


def shed_at(*entries: tuple[Entry, float]) -> tuple[list[Entry], Counter[str]]:
    """Each entry with how many percent of what is allowed are used up there."""
    lags = [(one, Lag(percent, 0, 0)) for one, percent in entries]
    return shed(lags, channel="c", allowed=ALLOWED)


LIMITS = [(severity, percent) for severity, share in SHARE.items() for percent in (share * 100 - 1, share * 100)]


def test_the_shares_are_those_of_the_contract() -> None:
    """`info` goes at half of what is allowed, `warning` at three quarters, `critical` at all of it."""
    assert SHARE == {"info": 0.5, "warning": 0.75, "critical": 1.0}


@pytest.mark.parametrize("measure", [0, 1, 2], ids=["ms", "events", "bytes"])
@pytest.mark.parametrize(("severity", "percent"), LIMITS)
def test_up_to_its_share_an_event_is_kept_and_beyond_it_is_shed(severity: str, percent: int, measure: int) -> None:
    """Whichever of the three bounds it is; one unit beyond the bound is too much."""
    one = entry(7, severity)
    within = Lag(*(percent if measure == number else 0 for number in range(3)))
    beyond = Lag(*(SHARE[severity] * 100 + 0.5 if measure == number else 0 for number in range(3)))
    assert shed([(one, within)], channel="c", allowed=ALLOWED) == ([one], Counter())
    assert shed([(one, beyond)], channel="c", allowed=ALLOWED) == ([lost(7, 7)], {severity: 1})


I1, I2, I3, I5 = (entry(offset, "info") for offset in (1, 2, 3, 5))
C2, C3 = entry(2), entry(3)
UNSTORED, UNSTORED_TOO = entry(2, "info", stored=False), entry(2, "info", stored=False)
LATER = entry(4, "info", era=2)

SHED: list[tuple[str, list[tuple[Entry, float]], list[Entry], dict[str, int]]] = [
    ("nothing", [], [], {}),
    ("all within", [(I1, 50), (C2, 100)], [I1, C2], {}),
    ("all beyond", [(I1, 60), (I2, 60), (I3, 51)], [lost(1, 3)], {"info": 3}),
    ("one kept between two", [(I1, 90), (C2, 90), (I3, 80)], [lost(1, 1), C2, lost(3, 3)], {"info": 2}),
    ("the oldest only", [(I1, 51), (I2, 50), (C3, 49)], [lost(1, 1), I2, C3], {"info": 1}),
    ("all severities", [(C2, 101), (C3, 100.5), (I5, 100)], [lost(2, 5)], {"critical": 2, "info": 1}),
    ("what a filter held back between", [(I1, 60), (I3, 60), (I5, 60)], [lost(1, 5)], {"info": 3}),
    ("a gap that all are told", [(told_entry(1), 999)], [told_entry(1)], {}),
    ("such a gap between", [(I1, 60), (told_entry(2), 60), (I3, 60)], [lost(1, 1), told_entry(2), lost(3, 3)],
     {"info": 2}),
    ("without a position", [(UNSTORED, 60)], [lost(None, None, None)], {"info": 1}),
    ("several without a position", [(UNSTORED, 60), (UNSTORED_TOO, 60)], [lost(None, None, None)], {"info": 2}),
    ("one without a position between", [(I1, 60), (I2, 60), (UNSTORED, 60), (I3, 60)],
     [lost(1, 2), lost(None, None, None), lost(3, 3)], {"info": 4}),
    ("without a position, kept", [(I1, 60), (UNSTORED, 40), (I3, 40)], [lost(1, 1), UNSTORED, I3], {"info": 1}),
    ("a new epoch", [(I3, 60), (LATER, 60)], [lost(3, 3), lost(4, 4, "e2")], {"info": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "kept", "counts"), [case[1:] for case in SHED], ids=[case[0] for case in SHED]
)
def test_what_is_shed_is_a_gap_in_its_place(
    entries: list[tuple[Entry, float]], kept: list[Entry], counts: dict[str, int]
) -> None:
    """What is too far behind is replaced by its exact range; neighbours are one range; each event is counted."""
    assert shed_at(*entries) == (kept, counts)


# What the ring has dropped: a pure function

E1, E2 = Position("e1", 5), Position("e2", 3)
OVERTAKEN = [
    ("one event", E1, Position("e1", 6), Gap("c", Cause.SHED, "e1", 6, 6, Position("e1", 6))),
    ("many events", E1, Position("e1", 900), Gap("c", Cause.SHED, "e1", 6, 900, Position("e1", 900))),
    ("from the first ever", Position("e1", 0), E1, Gap("c", Cause.SHED, "e1", 1, 5, E1)),
    ("beyond a new epoch", E1, E2, Gap("c", Cause.SHED, "e1", 6, None, E2)),
    ("without positions", None, None, Gap("c", Cause.SHED)),
    ("where positions have begun meanwhile", None, E1, Gap("c", Cause.SHED, position=E1)),
]


@pytest.mark.parametrize(
    ("stood", "goes_on", "gap"), [case[1:] for case in OVERTAKEN], ids=[case[0] for case in OVERTAKEN]
)
def test_what_the_ring_has_dropped_is_told_from_place_to_place(
    stood: Position | None, goes_on: Position | None, gap: Gap
) -> None:
    """Exact within an epoch; with an open end if another one has begun; without numbers where there are none."""
    assert overtaken("c", stood, goes_on) == gap


def test_what_the_ring_has_dropped_without_a_position_has_no_numbers() -> None:
    """Only events without a position have gone: no range of numbers is missing."""
    gap = overtaken("c", E1, E1)
    assert (gap.first, gap.last) == (None, None)


# A house with a clock, and a reader that is behind by so many units


SIZE = 1020
FRAME = SIZE + 4
UNIT_MS = 125
BOUNDS: dict[str, dict[str, Any]] = {
    "ms": {"behind_max_ms": 100 * UNIT_MS, "behind_max_events": FAR, "behind_max_bytes": FAR},
    "events": {"behind_max_ms": FAR, "behind_max_events": 100, "behind_max_bytes": FAR},
    "bytes": {"behind_max_ms": FAR, "behind_max_events": FAR, "behind_max_bytes": 100 * FRAME},
}
"""Each bound by itself; each allows 100 units."""

each_bound = pytest.mark.parametrize("bound", list(BOUNDS))


def event_of(house: House, size: int, channel: str = CHANNEL, **labels: Any) -> bytes:
    """A stored event of exactly so many bytes, not heard yet."""
    house.count += 1
    position = house.redis.next(channel)
    bare = payload(house.count, **labels)
    padding = max(0, size - len(splice(channel, position, bare)))
    return house.redis.store(payload(house.count, len(bare) + padding, **labels), channel)


@dataclass
class Scene:
    """A house with a bound and a clock, in which a unit is an event of 1 KiB, and an eighth of a second."""

    house: House
    clock: Clock
    sent: list[bytes] = field(default_factory=list)

    @classmethod
    async def opened(cls, *also: str, drops: bool = True, **arguments: Any) -> Scene:
        arguments = {"ping_interval_s": 3600.0, "beat_interval_s": 0.1} | arguments
        house = await House.opened(channels=DROPS if drops else ChannelsTable(), **arguments)
        for name in also:
            house.channels.get(name)
            house.channels.on_confirmed(name)
        await house.settle()
        return cls(house, house.clock.stop())

    def slow(self, query: str = "", *, v1: bool = True) -> Peer:
        """Somebody who has stopped reading, and whose socket is full."""
        return self.house.connect(query, v1=v1, reads_along=False)

    def fill(self) -> None:
        """Large events that fill the sockets of those who do not read."""
        for _ in range(2):
            self.publish("critical", 40_000)

    def publish(self, severity: str = "critical", size: int = SIZE, **labels: Any) -> None:
        event = event_of(self.house, size, severity=severity, **labels)
        self.sent.append(event)
        self.house.hear([event])

    def unit(self, severity: str = "critical", **labels: Any) -> None:
        """One event more, and it gets older."""
        self.publish(severity, **labels)
        self.clock.move(UNIT_MS / 1000)

    async def read(self, *peers: Peer) -> None:
        """They read all, and from now on all that comes."""
        for peer in peers:
            peer.socket.read_all()
        await self.house.until_live(*peers)


def ear(peer: Peer, channel: str = CHANNEL) -> Subscription:
    return next(one for one in peer.connection.memberships if one.channel.name == channel)


def texts(peer: Peer) -> list[bytes]:
    """The payloads of all text frames."""
    return [data for opcode, data in server_frames(b"".join(peer.socket.writes)) if opcode == 1]


def joined(story: list[Any]) -> list[Any]:
    """A story in which gaps of the same cause that meet are one."""
    whole: list[Any] = []
    for word in story:
        last = whole[-1] if whole else None
        if (
            isinstance(word, tuple)
            and isinstance(last, tuple)
            and None not in (last[2], word[1])
            and (word[0], word[1], word[3]) == (last[0], last[2] + 1, last[3])
        ):
            whole[-1] = (word[0], last[1], word[2], word[3])
        else:
            whole.append(word)
    return whole


def close_of(peer: Peer) -> tuple[int, str]:
    """Code and reason of the close that somebody was sent; (0, "") if none."""
    for opcode, data in server_frames(b"".join(peer.socket.writes)):
        if opcode == 8:
            assert len(data) <= 125
            return int.from_bytes(data[:2], "big"), data[2:].decode()
    return 0, ""


@each_bound
@in_loop
async def test_who_is_too_slow_loses_the_oldest_and_the_least_severe_first(bound: str) -> None:
    """By each bound alone: info beyond half, warning beyond three quarters, critical beyond all; and it stays."""
    scene = await Scene.opened(**BOUNDS[bound])
    house = scene.house
    slow, quick = scene.slow(), house.connect(v1=True)
    scene.fill()
    assert slow.connection in house.registry.behind
    for number in range(120):
        scene.unit(SEVERITIES[number % 3])
    await scene.read(slow)
    expected: list[Any] = [1, 2]
    counts: Counter[str] = Counter()
    for number in range(120):
        severity, units, offset = SEVERITIES[number % 3], 120 - number, 3 + number
        if units <= SHARE[severity] * 100:
            expected.append(offset)
        else:
            counts[severity] += 1
            expected.append(("e1", offset, offset, "shed"))
    assert joined(slow.story) == joined(expected)
    assert min(counts.values()) > 0
    gaps = len(slow.controls("gap"))
    numbers = ChannelStatistics.of(house.channel())
    assert numbers.shed == counts
    assert numbers.gaps == {"shed": gaps}
    assert numbers.deliveries == 2 * 122 - counts.total()
    assert house.channels.totals()["shed"] == counts.total()
    assert (numbers.filtered, numbers.behind, house.registry.closed[CloseCode.SLOW]) == (0, 0, 0)
    assert close_of(slow) == (0, "")
    assert quick.events() == scene.sent
    scene.unit("info")
    assert slow.events()[-1] == scene.sent[-1], "it is not live again"


@each_bound
@in_loop
async def test_a_gap_goes_on_where_it_ends(bound: str) -> None:
    """Each range says its channel, and as `position` its last event; the next frame is what follows it."""
    scene = await Scene.opened(**BOUNDS[bound])
    slow = scene.slow()
    scene.fill()
    for number in range(90):
        scene.unit(SEVERITIES[number % 3])
    await scene.read(slow)
    gaps = slow.controls("gap")
    assert gaps
    for gap in gaps:
        assert set(gap) == {"channel", "cause", "epoch", "first", "last", "position"}
        assert (gap["channel"], gap["cause"], gap["position"]) == (CHANNEL, "shed", f"e1-{gap['last']}")
        assert gap["first"] <= gap["last"]
    covered = [
        n for word in slow.story for n in ([word] if isinstance(word, int) else range(word[1], word[2] + 1))
    ]
    assert covered == list(range(1, 93))


@each_bound
@in_loop
async def test_whoever_is_within_the_bounds_loses_nothing(bound: str) -> None:
    """At half of what is allowed, to the last unit, also info is given."""
    scene = await Scene.opened(**BOUNDS[bound])
    slow = scene.slow()
    scene.fill()
    for _ in range(50):
        scene.unit("info")
    await scene.read(slow)
    assert slow.events() == scene.sent
    assert slow.told == ["welcome", *scene.sent]
    assert ChannelStatistics.of(scene.house.channel()).shed == {}


@each_bound
@in_loop
async def test_a_plain_client_there_is_closed(bound: str) -> None:
    """It could not be told: beyond what is allowed 4008 says by how much, and nothing was left out before."""
    scene = await Scene.opened(**BOUNDS[bound])
    plain, v1 = scene.slow(v1=False), scene.slow()
    scene.fill()
    for _ in range(100):
        scene.unit("info")
    scene.house.timer.tick()
    assert close_of(plain) == (0, "")
    scene.unit("info")
    scene.house.timer.tick()
    lag = f"101 events, {101 * FRAME} bytes, {101 * UNIT_MS} ms behind"
    assert close_of(plain) == (4008, f"too slow: {lag}")
    assert plain.told == [*scene.sent[:2], "close 4008"]
    assert close_of(v1) == (0, "")
    assert scene.house.registry.closed[CloseCode.SLOW] == 1


# What is said before


@each_bound
@pytest.mark.parametrize("drops", [True, False], ids=["drop_oldest", "disconnect"])
@in_loop
async def test_who_is_slow_is_warned_before_anything_happens(bound: str, drops: bool) -> None:
    """Beyond half of what is allowed, by each bound alone, with its numbers; only who can be told."""
    scene = await Scene.opened(drops=drops, **BOUNDS[bound])
    v1, plain = scene.slow(), scene.slow(v1=False)
    scene.fill()
    for _ in range(50):
        scene.unit()
    scene.house.timer.tick()
    assert v1.controls("lag") == []
    scene.unit()
    scene.house.timer.tick()
    assert v1.controls("lag") == [
        {
            "channel": CHANNEL,
            "behind_ms": 51 * UNIT_MS,
            "behind_events": 51,
            "behind_bytes": 51 * FRAME,
        }
    ]
    assert plain.told == scene.sent[:2]
    assert v1.told == ["welcome", *scene.sent[:2], "lag"]


@pytest.mark.parametrize("drops", [True, False], ids=["drop_oldest", "disconnect"])
@in_loop
async def test_it_is_warned_once_a_second(drops: bool) -> None:
    """As long as it lasts, and no more when it is over; again when it happens again."""
    scene = await Scene.opened(drops=drops, behind_max_events=100, behind_max_ms=FAR, behind_max_bytes=FAR)
    v1 = scene.slow()
    scene.fill()
    for _ in range(60):
        scene.publish()
    seen = []
    for _ in range(50):
        scene.clock.move(0.125)
        scene.house.timer.tick()
        seen.append(len(v1.controls("lag")))
    assert seen[0] == 1
    times = [number for number, (before, now) in enumerate(itertools.pairwise([0, *seen])) if now > before]
    assert all(8 <= later - earlier <= 10 for earlier, later in itertools.pairwise(times)), times
    assert len(times) >= 5
    await scene.read(v1)
    for _ in range(20):
        scene.clock.move(0.125)
        scene.house.timer.tick()
    assert len(v1.controls("lag")) == len(times)
    assert v1.events() == scene.sent
    v1.socket.reads_along = False
    scene.fill()
    for _ in range(60):
        scene.publish()
    scene.house.timer.tick()
    assert len(v1.controls("lag")) == len(times) + 1


@each_bound
@in_loop
async def test_a_v1_client_elsewhere_is_warned_and_then_closed(bound: str) -> None:
    """The policy is to disconnect: nothing is left out, `lag` comes first, then 4008 with all three numbers."""
    scene = await Scene.opened(drops=False, **BOUNDS[bound])
    v1 = scene.slow()
    scene.fill()
    for _ in range(100):
        scene.unit()
        scene.house.timer.tick()
    assert close_of(v1) == (0, "")
    scene.unit()
    scene.house.timer.tick()
    assert close_of(v1) == (4008, f"too slow: 101 events, {101 * FRAME} bytes, {101 * UNIT_MS} ms behind")
    assert v1.told[:4] == ["welcome", *scene.sent[:2], "lag"]
    assert set(v1.told[3:-1]) == {"lag"}
    assert scene.house.registry.closed[CloseCode.SLOW] == 1
    assert ChannelStatistics.of(scene.house.channel()).shed == {}


@pytest.mark.parametrize("bytes_each", [252, 8000], ids=["within the ring", "beyond the ring"])
@in_loop
async def test_a_burst_closes_nobody_who_was_not_warned(bytes_each: int) -> None:
    """Everything comes between two looks of the timer, and it reads on at once: it was warned before its 4008."""
    scene = await Scene.opened(drops=False, ring_bytes=1 << 18, behind_max_events=100)
    v1 = scene.slow()
    scene.fill()
    for _ in range(150):
        scene.publish(size=bytes_each)
    if bytes_each > 252:
        v1.socket.read_all()
        await scene.house.settle()
    scene.house.timer.tick()
    assert v1.told == ["welcome", *scene.sent[:2], "lag", "close 4008"]


@pytest.mark.parametrize("bytes_each", [252, 8000], ids=["within the ring", "beyond the ring"])
@in_loop
async def test_a_burst_sheds_nothing_of_whoever_was_not_warned(bytes_each: int) -> None:
    """Everything comes between two looks of the timer, and it reads on at once: it was warned before its gap."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_events=100)
    v1 = scene.slow()
    scene.fill()
    for _ in range(150):
        scene.publish(size=bytes_each)
    await scene.read(v1)
    told = [word for word in v1.told if isinstance(word, str)]
    assert "gap" in told
    assert told[:2] == ["welcome", "lag"]


@in_loop
async def test_a_warning_never_comes_before_the_welcome() -> None:
    """The first frame of a channel is its welcome, also when the socket is full of another one for long."""
    scene = await Scene.opened(behind_max_ms=1000)
    house = scene.house
    house.store(300, channel=OTHER, note="." * 500)
    slow = scene.slow(f"channel={CHANNEL}&channel={OTHER}&since={house.redis.head(OTHER)._replace(offset=0)}")
    scene.clock = house.clock.stop()
    scene.fill()
    house.channels.on_confirmed(OTHER)
    await house.settle()
    assert ear(slow, OTHER) in house.channel(OTHER).fanout.behind
    for _ in range(7):
        scene.clock.move(0.125)
        house.timer.tick()
    await scene.read(slow)
    assert [frame["channel"] for frame in slow.controls("welcome")] == [CHANNEL, OTHER]
    seen: set[str] = set()
    for data in texts(slow):
        if control := wire.read_control(data):
            assert control["control"] == "welcome" or control["channel"] in seen, control
            seen.add(control["channel"])


# Who resumes


@pytest.mark.parametrize("ring_bytes", [1 << 18, 16 << 20], ids=["from the log", "from the ring"])
@in_loop
async def test_who_resumes_is_not_shed(ring_bytes: int) -> None:
    """However far behind it begins, it gets everything while it makes progress; once live, it loses the oldest."""
    scene = await Scene.opened(ring_bytes=ring_bytes, behind_max_events=100, behind_max_ms=FAR)
    for _ in range(900):
        scene.publish("info")
    slow = scene.slow("since=e1-0")
    await scene.house.settle()
    while ear(slow).is_replaying:
        scene.house.timer.tick()
        slow.socket.read(50_000)
        await turns(20)
    assert slow.events() == scene.sent[: len(slow.events())]
    assert slow.controls("gap") == []
    await scene.read(slow)
    assert slow.events() == scene.sent
    slow.socket.reads_along = False
    scene.fill()
    for _ in range(200):
        scene.publish("info")
    await scene.read(slow)
    assert ChannelStatistics.of(scene.house.channel()).shed == {"info": 150}
    assert joined(slow.story)[-51:] == [("e1", 903, 1052, "shed"), *range(1053, 1103)]


@in_loop
async def test_who_resumes_and_makes_no_progress_is_closed() -> None:
    """It could come back: also where the oldest are dropped it is held to a piece in `behind_max_ms`."""
    scene = await Scene.opened(behind_max_ms=1000)
    for _ in range(900):
        scene.publish("info")
    slow = scene.slow("since=e1-0")
    await scene.house.settle()
    assert ear(slow).is_replaying
    scene.clock.move(1.0)
    scene.house.timer.tick()
    assert close_of(slow) == (0, "")
    scene.clock.move(0.125)
    scene.house.timer.tick()
    assert slow.told[-2:] == ["lag", "close 4008"]
    assert slow.controls("gap") == []


# Who is overtaken by the ring


@in_loop
async def test_who_is_overtaken_is_told_of_everything_that_is_gone() -> None:
    """One exact gap from its place to the oldest that is left, each event counted; then what is left, and live."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_ms=FAR)
    slow = scene.slow()
    scene.fill()
    for _ in range(600):
        scene.publish()
    await scene.read(slow)
    first = scene.house.fanout.ring.tail + 1
    assert slow.story == [1, 2, ("e1", 3, first - 1, "shed"), *range(first, 603)]
    assert ChannelStatistics.of(scene.house.channel()).shed == {"overtaken": first - 3}
    assert ChannelStatistics.of(scene.house.channel()).gaps == {"shed": 1}
    scene.publish("info")
    assert slow.events()[-1] == scene.sent[-1]


@in_loop
async def test_who_is_overtaken_keeps_every_critical_event_that_the_ring_has() -> None:
    """At the bound of the ring itself, wherever the ring stands: what is there is within the bounds."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_bytes=1 << 18, behind_max_ms=FAR)
    house = scene.house
    slow = scene.slow()
    scene.fill()
    while house.fanout.ring.tail < 1500:
        scene.publish(size=400)
    for _ in range(2000):
        scene.publish(size=400)
        listener = ear(slow)
        tail = house.fanout.ring.tail
        lag = house.fanout.slow._lag_at(tail, house.fanout.ring.read(tail, 0)[0])
        assert lag.bytes <= 1 << 18, f"at frame {tail}"
        assert house.fanout.slow.lag_of(listener).bytes <= 1 << 18
    await scene.read(slow)
    assert set(house.fanout.slow.shed) == {"overtaken"}


@in_loop
async def test_who_is_overtaken_by_events_without_a_position_is_told_without_numbers() -> None:
    """Nobody can say which they were; but that something is missing is told, in its place."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_ms=FAR)
    house = scene.house
    slow = scene.slow()
    scene.fill()
    house.unstored(3000)
    await scene.read(slow)
    [gap] = slow.controls("gap")
    assert (gap["cause"], gap["first"], gap["last"]) == ("shed", None, None)
    places = ResumeState(f"ws://x/ws?channel={CHANNEL}", (), Position("e1", 2), (), (), ())
    assert places.on_gap(Gap.from_fields(gap)) is not None, "a subscriber does not hear of it"


@in_loop
async def test_who_is_overtaken_beyond_a_restart_is_told_with_an_open_end() -> None:
    """The gap of the restart has left the ring as well: nobody knows what the old Redis had accepted."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_ms=FAR)
    house = scene.house
    slow = scene.slow()
    scene.fill()
    scene.publish()
    restart(house, CHANNEL)
    for _ in range(500):
        scene.publish()
    await scene.read(slow)
    first = house.redis.head().offset - (house.fanout.ring.head - house.fanout.ring.tail) + 1
    assert slow.story == [1, 2, ("e1", 3, None, "shed"), *range(first, 504)]
    assert slow.controls("gap")[0]["position"] == f"e2-{first - 1}"


@in_loop
async def test_what_is_counted_as_shed_are_events() -> None:
    """A gap that has left the ring with the events around it is no event."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_ms=FAR)
    house = scene.house
    slow = scene.slow()
    scene.fill()
    for _ in range(20):
        scene.publish()
        hole(house, CHANNEL, 1)
    for _ in range(500):
        scene.publish()
    await scene.read(slow)
    missing = len(scene.sent) - len(slow.events())
    assert ChannelStatistics.of(house.channel()).shed == {"overtaken": missing}


# Who stops for good, and who only seems to


@in_loop
async def test_who_stops_reading_for_good_is_ended() -> None:
    """Where nobody is closed for being slow, whoever reads nothing for a round of pings is (1011)."""
    scene = await Scene.opened(ping_interval_s=5.0)
    slow, plain = scene.slow(), scene.slow(v1=False)
    scene.fill()
    for _ in range(40):
        scene.clock.move(0.125)
        scene.house.timer.tick()
    assert close_of(slow) == (0, "")
    scene.clock.move(0.125)
    scene.house.timer.tick()
    assert close_of(slow) == (1011, "nothing is read")
    assert close_of(plain)[0] == 4008
    assert scene.house.registry.closed[CloseCode.PING_TIMEOUT] == 1
    assert scene.house.registry.behind == set()
    scene.clock.move(2.0)
    scene.house.timer.tick()
    assert slow.socket.aborted


@in_loop
async def test_who_reads_slowly_stays_however_long() -> None:
    """A piece now and then is progress, for many rounds of pings."""
    scene = await Scene.opened(ping_interval_s=5.0, behind_max_ms=1000)
    slow = scene.slow()
    scene.fill()
    for _ in range(60):
        for _ in range(40):
            scene.publish("warning", 4000)
        scene.clock.move(1.0)
        slow.socket.read(70_000)
        await turns(5)
        scene.house.timer.tick()
        slow.connection.data_received(client_frame(10))
    assert close_of(slow) == (0, "")
    assert scene.house.fanout.slow.shed["warning"] > 0
    await scene.read(slow)
    assert covered(slow) == set(range(1, len(scene.sent) + 1))


@in_loop
async def test_who_reads_one_channel_slowly_is_not_taken_for_dead_in_the_other() -> None:
    """While the channel that goes first takes all that the client can read, it does read: it stays."""
    scene = await Scene.opened(OTHER, ping_interval_s=5.0, behind_max_ms=1000)
    house = scene.house
    slow = scene.slow(f"channel={CHANNEL}&channel={OTHER}")
    scene.fill()
    assert ear(slow, OTHER) in house.channel(OTHER).fanout.behind
    house.publish(3, channel=OTHER)
    for _ in range(20):
        for _ in range(40):
            scene.publish(size=4000)
        scene.clock.move(1.0)
        slow.socket.read(70_000)
        await turns(5)
        house.timer.tick()
        slow.connection.data_received(client_frame(10))
        assert close_of(slow) == (0, ""), "it was closed while it read"
    await scene.read(slow)
    others = [json.loads(event)["offset"] for event in slow.events() if OTHER.encode() in event[:60]]
    told = [gap for gap in slow.controls("gap") if gap["channel"] == OTHER]
    assert set(others) | {n for gap in told for n in range(gap["first"], gap["last"] + 1)} == {1, 2, 3}


@pytest.mark.parametrize("priority", [(), (CHANNEL,)], ids=["in turn", "the other one first"])
@in_loop
async def test_who_reads_a_long_log_is_not_slow_in_a_channel_that_waits_for_it(priority: tuple[str, ...]) -> None:
    """Of equal priority each has its turn; and one that has to wait for the other is not closed for that."""
    house = await House.opened(behind_max_ms=200, channels=ChannelsTable(priority=priority))
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    house.publish(8000)
    await house.settle()
    peer = house.connect(f"channel={CHANNEL}&since=e1-0&channel={OTHER}", v1=True, reads_along=False)
    await house.settle()
    house.clock.stop()
    [event] = house.publish(1, channel=OTHER)
    await house.settle()
    for _ in range(8):
        house.clock.move(0.06)
        peer.socket.read(130_000)
        await turns(20)
        house.timer.tick()
    assert close_of(peer) == (0, "")
    assert (event in peer.events()) == (not priority), "it has no turn"
    peer.socket.read_all()
    await house.until_live(peer)
    assert len(peer.events()) == 8001


@in_loop
async def test_no_page_is_held_for_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another channel of the connection fills its socket in the moment in which a page has come for it."""
    house = await House.opened(ring_bytes=1 << 18)
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    [*_, last] = house.publish(4000, channel=OTHER)
    await house.settle()
    epoch = json.loads(last)["epoch"]
    replay, held = house.channel(OTHER).replay, list[int]()
    on_page = replay._on_page

    def on_page_and_burst(*what: Any) -> None:
        on_page(*what)
        if not held:
            assert replay._fresh
            house.publish(3, 60_000)
            held.append(1)

    monkeypatch.setattr(replay, "_on_page", on_page_and_burst)
    peer = house.connect(f"channel={CHANNEL}&channel={OTHER}&since={epoch}-0", v1=True, reads_along=False)
    await until(lambda: held, "no page has come")
    assert peer.connection.blocked
    assert not replay._fresh
    peer.socket.read_all()
    await house.until_live(peer)
    assert len(peer.events()) == 4003


def covered(peer: Peer) -> set[int]:
    """All offsets that somebody was given, or told of."""
    given = {word for word in peer.story if isinstance(word, int)}
    told = {n for word in peer.story if isinstance(word, tuple) for n in range(word[1], word[2] + 1)}
    assert not given & told
    return given | told


# Beats


def beats(peer: Peer) -> list[str]:
    return [beat["position"] for beat in peer.controls("beat")]


@in_loop
async def test_a_beat_counts_what_was_told_as_shed_and_nothing_beyond() -> None:
    """While it is behind: up to what was written to it or told; once overtaken: nothing, until it was told."""
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_events=100, behind_max_ms=FAR)
    house = scene.house
    house.be_proven()
    slow = scene.slow()
    scene.fill()
    for _ in range(120):
        scene.publish("info")
    await tick(house)
    assert beats(slow) == ["e1-2"]
    slow.socket.read(1 << 40)
    await turns(50)
    await tick(house)
    assert ear(slow) not in house.fanout.behind
    assert joined(slow.story) == [1, 2, ("e1", 3, 72, "shed"), *range(73, 123)]
    assert beats(slow)[1:] == ["e1-122"]
    for _ in range(600):
        scene.publish("info")
    assert house.fanout.slow.is_overtaken(ear(slow))
    before = len(beats(slow))
    await tick(house)
    assert len(beats(slow)) == before
    await scene.read(slow)
    await tick(house)
    assert beats(slow)[before:] == ["e1-722"]


MISSING = [("some events", 7), ("a restart", 0)]


@pytest.mark.parametrize("drops", [True, False], ids=["drop_oldest", "disconnect"])
@pytest.mark.parametrize("count", [case[1] for case in MISSING], ids=[case[0] for case in MISSING])
@in_loop
async def test_no_beat_is_beyond_a_gap_that_still_waits(count: int, drops: bool) -> None:
    """Nothing has ever come on a channel, then something is missing: who is behind has not been told yet."""
    scene = await Scene.opened(OTHER, drops=drops)
    house = scene.house
    house.be_proven()
    slow = scene.slow(f"channel={CHANNEL}&channel={OTHER}")
    before = str(house.redis.head(OTHER))
    scene.fill()
    assert ear(slow, OTHER) in house.channel(OTHER).fanout.behind
    if count:
        hole(house, OTHER, count)
    else:
        restart(house, OTHER)
    await tick(house)
    assert [beat["position"] for beat in slow.controls("beat") if beat["channel"] == OTHER] == [before]
    await scene.read(slow)
    await tick(house)
    told = [str(house.redis.head(OTHER))]
    assert [gap["position"] for gap in slow.controls("gap")] == told
    assert [beat["position"] for beat in slow.controls("beat") if beat["channel"] == OTHER] == [before, *told]


async def tick(house: House) -> None:
    house.timer.tick()
    await turns(5)


# Everything together


class Told(NamedTuple):
    """One frame of the ring as the truth has it.

    Attributes:
        size: Bytes of its frame.
        at: When it came.
        event: Its payload; empty for a gap.
        labels: None for a gap.
        position: None if it has none.
        gap: What all are told is missing.
    """

    size: int
    at: float
    event: bytes
    labels: Labels | None
    position: Position | None
    gap: Gap | None = None


def hole(house: House, channel: str, count: int) -> Gap:
    """The next so many events are gone before anybody could read them; everybody is told."""
    first = house.redis.next(channel)
    house.store(count, channel=channel)
    last = house.redis.head(channel)
    gap = Gap(channel, Cause.EXPIRED, first.epoch, first.offset, last.offset, last)
    house.channel(channel).fanout.announce(gap)
    return gap


def restart(house: House, *channels: str) -> list[Gap]:
    """Redis begins a new epoch; everybody is told."""
    house.redis.restart()
    gaps = []
    for channel in channels:
        fanout = house.channel(channel).fanout
        assert fanout.position is not None
        epoch, offset = fanout.position
        head = house.redis.head(channel)
        gaps.append(Gap(channel, Cause.REDIS_RESTARTED, epoch, offset + 1, None, head))
        fanout.announce(gaps[-1])
    return gaps


class Truth:
    """Everything that one channel was brought, in the order of its ring."""

    def __init__(self) -> None:
        self.all: list[Told] = []
        self.places: dict[Position, int] = {}
        self._begins = [0]

    def add(self, told: Told) -> None:
        if told.position is not None:
            self.places[told.position] = len(self.all)
        self.all.append(told)
        self._begins.append(self._begins[-1] + told.size)

    def bytes_from(self, number: int) -> int:
        return self._begins[-1] - self._begins[number]

    def tail(self, ring_bytes: int) -> int:
        """The oldest frame that fits into the ring."""
        return bisect_left(self._begins, self._begins[-1] - ring_bytes)


@dataclass
class Reading:
    """A slow client, and what it has found out so far about one channel.

    Attributes:
        at: Number of the next frame of the truth that it has not accounted for.
        given, gaps, beats: What it was sent.
        lost, perhaps: Events that it was not given, by the reason; those of which it is not certain.
        without_numbers: Whether the last that it was told is that events without a position are missing.
    """

    peer: Peer
    channel: str
    filter: Filter
    at: int
    given: int = 0
    gaps: int = 0
    beats: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    perhaps: Counter[str] = field(default_factory=Counter)
    without_numbers: bool = False

    def wants(self, told: Told) -> bool:
        """Whether it has to get it, or to be told; gaps always."""
        return told.labels is None or self.filter.wants(told.labels)


QUERIES = [
    "",
    "severity=critical",
    "severity=info&severity=warning",
    "type=A",
    f"channel={OTHER}",
    f"channel={CHANNEL}&channel={OTHER}",
    f"channel={CHANNEL}&channel={OTHER}&type=B",
]


class Story:
    """Random events, holes, restarts, times and readers; each frame is held against the truth at its moment."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.house: House
        self.clock: Clock
        self.most: Lag
        self.truths = {CHANNEL: Truth(), OTHER: Truth()}
        self.old: dict[str, int] = {}  # how much had come before this step
        self.readings: list[Reading] = []
        self.seen: dict[int, int] = {}
        self.ring_bytes = self.chance.choice([1 << 18, 1 << 19])

    # What happens

    def arrive(self) -> None:
        query = self.chance.choice(QUERIES)
        peer = self.house.connect(query, v1=True, reads_along=False)
        for listener in peer.connection.memberships:
            name = listener.channel.name
            self.readings.append(Reading(peer, name, listener.filter, len(self.truths[name].all)))

    def publish(self) -> None:
        channel = self.chance.choice([CHANNEL, CHANNEL, OTHER])
        count = self.chance.choice([1, 5, 40, 300])
        size = self.chance.choice([0, 300, 300, 2000])
        batch = []
        for _ in range(count):
            labels = Labels(self.chance.choice("AB"), "server-a", self.chance.choice(SEVERITIES))
            fields = {"severity": labels.severity, "event_type": labels.event_type}
            position = None
            if self.chance.random() < 0.1:
                self.house.count += 1
                event = payload(self.house.count, max(200, size), **fields)
            else:
                position = self.house.redis.next(channel)
                event = event_of(self.house, size, channel, **fields)
            batch.append(event)
            frame = wire.text_frame(event)
            self.truths[channel].add(Told(len(frame), self.clock.loop_s(), event, labels, position))
        self.house.hear(batch, channel)

    def hole(self) -> None:
        channel = self.chance.choice([CHANNEL, OTHER])
        self.tell(hole(self.house, channel, self.chance.choice([1, 7])))

    def restart(self) -> None:
        for gap in restart(self.house, CHANNEL, OTHER):
            self.tell(gap)

    def tell(self, gap: Gap) -> None:
        told = Told(len(wire.gap_frame(gap)), self.clock.loop_s(), b"", None, gap.position, gap)
        self.truths[gap.channel].add(told)

    def wait(self) -> None:
        self.clock.move(self.chance.choice([0.0625, 0.125, 0.25]))
        self.house.timer.tick()

    def read(self) -> None:
        for peer in {id(reading.peer): reading.peer for reading in self.readings}.values():
            peer.socket.read(self.chance.choice([0, 0, 1000, 70_000, 70_000, 300_000]))

    def begin_step(self) -> None:
        self.old = {channel: len(truth.all) for channel, truth in self.truths.items()}

    async def run(self, steps: int) -> None:
        self.house = await House.opened(
            ring_bytes=self.ring_bytes,
            channels=DROPS,
            behind_max_ms=self.chance.choice([1000, 2000, FAR]),
            behind_max_events=self.chance.choice([100, 400, FAR]),
            behind_max_bytes=self.chance.choice([1 << 16, 1 << 17, FAR]),
            ping_interval_s=100.0,
            beat_interval_s=0.1,
        )
        self.house.channels.get(OTHER)
        self.house.channels.on_confirmed(OTHER)
        await self.house.settle()
        self.clock = self.house.clock.stop()
        self.house.be_proven()
        self.most = Lag.allowed(self.house.settings.hub)
        for _ in range(3):
            self.arrive()
        what = [self.arrive] + [self.publish] * 14 + [self.hole, self.restart] + [self.wait] * 6 + [self.read] * 10
        for _ in range(steps):
            self.begin_step()
            self.chance.choice(what)()
            await turns(self.chance.choice([0, 0, 1, 5, 30]))
            self.look()
        self.begin_step()
        for reading in self.readings:
            reading.peer.socket.read_all()
        await self.house.until_live(*(reading.peer for reading in self.readings))
        self.look()

    # What it has to be

    def share(self, reading: Reading, number: int) -> float:
        """How much of what is allowed is used up by whoever is given this frame now."""
        truth = self.truths[reading.channel]
        ms = (self.clock.loop_s() - truth.all[number].at) * 1000
        return Lag(ms, len(truth.all) - number, truth.bytes_from(number)).share_of(self.most)

    def look(self) -> None:
        """Read what was written since the last look."""
        by_peer: dict[int, list[Reading]] = {}
        for reading in self.readings:
            by_peer.setdefault(id(reading.peer), []).append(reading)
        for key, readings in by_peer.items():
            writes = readings[0].peer.socket.writes
            new, self.seen[key] = writes[self.seen.get(key, 0) :], len(writes)
            for opcode, data in server_frames(b"".join(new)):
                assert opcode != 8, "somebody was closed"
                if opcode == 1:
                    self.account(readings, data)

    def account(self, readings: list[Reading], data: bytes) -> None:
        if (control := wire.read_control(data)) is None:
            channels = [OTHER] if OTHER.encode() in data[:60] else [CHANNEL]
            if b'"offset"' not in data[:200]:
                channels = [CHANNEL, OTHER]
            found = [(one, self.find(one, event=data)) for one in readings if one.channel in channels]
            numbers = [(reading, number) for reading, number in found if number is not None]
            assert numbers, f"an event comes twice, or out of order: {data[:100]!r}"
            self.give(*numbers[0])
            return
        [reading] = [one for one in readings if one.channel == control["channel"]]
        if control["control"] == "beat":
            reading.beats += 1
            self.hear_beat(reading, Position.parse(control["position"]))
        elif control["control"] == "gap" and control["cause"] == "shed":
            reading.gaps += 1
            self.lose_range(reading, control)
        elif control["control"] == "gap":
            number = self.find(reading, gap=Gap.from_fields(control))
            assert number is not None, f"a gap comes twice, or out of order: {control}"
            self.give(reading, number)

    def find(self, reading: Reading, event: bytes = b"", gap: Gap | None = None) -> int | None:
        everything = self.truths[reading.channel].all
        return next((n for n in range(reading.at, len(everything)) if everything[n][2:6:3] == (event, gap)), None)

    def give(self, reading: Reading, number: int) -> None:
        """What was left out before it was told already, or held back, and it was not too old to be given."""
        told = self.truths[reading.channel].all[number]
        self.hold_back(reading, number)
        reading.without_numbers = False
        if told.labels is None:
            return
        reading.given += 1
        assert reading.wants(told), "it was to be held back"
        if number < self.old[reading.channel]:  # not live: it was fed, with the lag of this moment
            share = self.share(reading, number)
            assert share <= SHARE[told.labels.severity], f"{told.labels} was given at {share}"

    def hold_back(self, reading: Reading, number: int) -> None:
        """Whatever was left out before this frame was not wanted."""
        for told in self.truths[reading.channel].all[reading.at : number]:
            assert not reading.wants(told), f"{told.position or told.event!r} is missing, and was not told"
        reading.at = number + 1

    def lose_range(self, reading: Reading, gap: dict[str, Any]) -> None:
        """Events were shed: exactly these, and each of them was too far behind."""
        truth = self.truths[reading.channel]
        tail = truth.tail(self.ring_bytes)
        if gap["epoch"] is None:
            assert (gap["first"], gap["last"]) == (None, None)
            end = reading.at
        else:
            goes_on = Position.parse(gap["position"])
            assert gap["last"] == (goes_on.offset if goes_on.epoch == gap["epoch"] else None)
            assert gap["last"] is None or gap["first"] <= gap["last"]
            end = truth.places[goes_on] + 1
            assert end > reading.at, f"{gap} comes too late"
            given = (told for told in reversed(truth.all[: reading.at]) if told.position and reading.wants(told))
            before = next((told.position for told in given), None)
            assert not before or before < (gap["epoch"], gap["first"]) or before.epoch != gap["epoch"]
            for told in truth.all[reading.at : end]:
                place = told.position
                if place and place.epoch == gap["epoch"] and place.offset < gap["first"]:
                    assert not reading.wants(told), f"{place} is missing, and was not told"
        for number in range(reading.at, end):
            self.lose(reading, number, tail)
        for number in range(end, len(truth.all)):  # what had no position, and went with it
            if not self.is_lost_without_number(reading, number, tail, told=gap["epoch"] is None):
                if reading.wants(truth.all[number]):
                    break
                continue
            if end == reading.at or number < tail:
                self.lose(reading, number, tail)
            else:  # with the one before, or else with what comes next: both look the same
                labels = truth.all[number].labels
                reading.perhaps[labels.severity if labels else ""] += 1
            end = number + 1
        assert end > reading.at or (gap["epoch"] is None and reading.without_numbers), f"{gap} has lost nothing"
        reading.without_numbers = gap["epoch"] is None
        reading.at = end

    def is_lost_without_number(self, reading: Reading, number: int, tail: int, *, told: bool) -> bool:
        """Whether an event without a position has left the ring, or was shed and `told` as that."""
        one = self.truths[reading.channel].all[number]
        if one.position is not None or one.labels is None or not reading.wants(one):
            return False
        return number < tail or (told and self.share(reading, number) > SHARE[one.labels.severity])

    def lose(self, reading: Reading, number: int, tail: int) -> None:
        told = self.truths[reading.channel].all[number]
        if number < tail:
            reading.lost["overtaken"] += 1
            return
        assert told.labels is not None, f"{told.gap} is still there, and was not told as what it is"
        if reading.wants(told):
            share = self.share(reading, number)
            assert share > SHARE[told.labels.severity], f"{told.labels} was shed at {share}"
            reading.lost[told.labels.severity] += 1

    def hear_beat(self, reading: Reading, position: Position) -> None:
        """Everything up to it was given, held back, or told."""
        truth = self.truths[reading.channel]
        for told in truth.all[reading.at : truth.places.get(position, -1) + 1]:
            missing = told.position is not None and reading.wants(told)
            assert not missing, f"the beat at {position} is beyond {told.position}"

    def close(self) -> None:
        """The end: everybody has everything."""
        for reading in self.readings:
            self.hold_back(reading, len(self.truths[reading.channel].all))


@pytest.mark.parametrize("seed", range(12))
@in_loop
async def test_whatever_happens_everything_is_given_told_or_held_back(seed: int) -> None:
    """Random events, holes, restarts, filters, channels and readers: each frame at its moment, and the numbers."""
    story = Story(seed)
    await story.run(150)
    story.close()
    for channel in (CHANNEL, OTHER):
        mine = [reading for reading in story.readings if reading.channel == channel]
        fanout = story.house.channel(channel).fanout
        assert not fanout.behind
        assert fanout.deliveries == sum(reading.given for reading in mine)
        assert fanout.slow.gaps == sum(reading.gaps for reading in mine)
        lost = sum((reading.lost for reading in mine), Counter())
        perhaps = sum((reading.perhaps for reading in mine), Counter())
        for severity in SEVERITIES:
            assert lost[severity] <= fanout.slow.shed[severity] <= lost[severity] + perhaps[severity]
    assert sum(reading.beats for reading in story.readings) > 0
    assert story.house.registry.closed[CloseCode.SLOW] == story.house.registry.closed[CloseCode.PING_TIMEOUT] == 0


@pytest.mark.parametrize("query", ["", "severity=critical", "type=A"])
@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_the_counters_say_what_has_become_of_each_event(seed: int, query: str) -> None:
    """Events = delivered + shed + filtered, for a reader of a random pace; each severity by itself."""
    chance = random.Random(seed)
    scene = await Scene.opened(behind_max_events=150, behind_max_ms=FAR)
    slow = scene.slow(query)
    for _ in range(60):
        for _ in range(chance.choice([1, 30, 100])):
            scene.publish(chance.choice(SEVERITIES), 700, event_type=chance.choice("AB"))
        slow.socket.read(chance.choice([0, 4000, 8000]))
        await turns(chance.choice([0, 3, 20]))
    await scene.read(slow)
    numbers = ChannelStatistics.of(scene.house.channel())
    assert sum(numbers.shed.values()) > 0
    assert numbers.deliveries == len(slow.events())
    assert numbers.deliveries + sum(numbers.shed.values()) + numbers.filtered == len(scene.sent)
    published, given = severities(scene.sent, query), severities(slow.events(), query)
    assert {severity: published[severity] - given[severity] for severity in numbers.shed} == numbers.shed
    assert numbers.gaps == {"shed": len(slow.controls("gap"))}


def severities(events: list[bytes], query: str) -> Counter[str]:
    """How many of each severity somebody wants."""
    fields = [json.loads(event) for event in events]
    name, _, value = query.replace("type", "event_type").partition("=")
    return Counter(one["severity"] for one in fields if not name or one[name] == value)


@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_a_subscriber_finds_every_gap_announced(seed: int) -> None:
    """What the client library makes of the frames of a slow reader: no hole that nobody has told it of."""
    chance = random.Random(seed)
    scene = await Scene.opened(ring_bytes=1 << 18, behind_max_events=200, behind_max_ms=FAR)
    scene.house.be_proven()
    slow = scene.slow()
    for _ in range(60):
        for _ in range(chance.choice([1, 30, 200])):
            scene.publish(chance.choice(SEVERITIES), 700)
        slow.socket.read(chance.choice([0, 10_000, 80_000]))
        await tick(scene.house)
    await scene.read(slow)
    await tick(scene.house)
    places = ResumeState(f"ws://x/ws?channel={CHANNEL}", (), None, (), (), ())
    gaps: list[Gap | None] = []
    for data in texts(slow):
        control = wire.read_control(data)
        if control is None:
            gaps.append(places.on_event(decode(data)))
        elif control["control"] == "welcome":
            places.on_welcome(control)
        elif control["control"] == "beat":
            gaps.append(places.on_beat(control))
        elif control["control"] == "gap":
            gap = Gap.from_fields(control)
            assert places.on_gap(gap) == gap
    assert set(gaps) == {None}
    assert slow.controls("gap")
    assert places.positions[CHANNEL] == scene.house.redis.head()

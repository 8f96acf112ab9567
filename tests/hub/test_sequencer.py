"""The reader of a channel: whatever the subscription does, each stored event is handed on once, or told."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from broadcaster.core.errors import RedisErrorReply, RedisRefused, RedisUnavailable
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import LIMITS
from broadcaster.hub.catchup.live_sequencer import LiveSequencer
from broadcaster.hub.catchup.sequencer import Sequencer, with_refused_cause
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.message import Message
from tests.hub.house import CHANNEL, INVALID, Memory, messages, payload, splice, turns
from tests.support import in_loop, until

P = Position.parse


class Record:
    """A fan-out that writes down what it is given."""

    channel = CHANNEL

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.batches: list[int] = []
        self.position: Position | None = None
        self.stored: dict[Position, Message] = {}
        self.kept = 1000
        self.ring = self

    def begin(self, position: Position) -> None:
        self.position = position
        self.said.append(f"begin {position}")

    def broadcast(self, events: Sequence[Message], *, recovered: bool = False) -> None:
        self.batches.append(len(events))
        self.said += [None if event.position is None else str(event.position) for event in events]
        for event in events:
            self.position = event.position or self.position
            if event.position is not None:
                self.stored[event.position] = event
        self.stored = dict(list(self.stored.items())[-self.kept :])

    def frame_at(self, position: Position) -> bytes | None:
        message = self.stored.get(position)
        return None if message is None else message.frame

    @property
    def last_stored(self) -> Message | None:
        at = self.position
        of_epoch = [message for place, message in self.stored.items() if at and place.epoch == at.epoch]
        return of_epoch[-1] if of_epoch else None

    def announce(self, gap: Gap) -> None:
        self.position = gap.position or self.position
        self.said.append((str(gap.cause), gap.epoch, gap.first, gap.last, gap.position and str(gap.position)))


class Channel:
    """A reader, its log, and what it has handed on."""

    def __init__(self, stored: int = 0, *, max_bytes: int = 131_072) -> None:
        self.redis = Memory()
        self.record = Record()
        self.caught_up = 0
        self.steady_at: list[Position | None] = []
        self.count = 0
        self.store(stored)
        log = self.redis.event_log(max_bytes)
        self.sequencer = Sequencer(cast(Fanout, self.record), log, self._on_caught_up)
        self.task = asyncio.create_task(self.sequencer.run())

    @classmethod
    async def opened(cls, stored: int = 0, **arguments: Any) -> Channel:
        channel = cls(stored, **arguments)
        channel.sequencer.confirm()
        await channel.settle()
        assert channel.sequencer.caught_up
        assert channel.record.said == [f"begin {channel.redis.head()}"]
        channel.record.said.clear()
        return channel

    def _on_caught_up(self) -> None:
        self.caught_up += 1
        if self.sequencer.caught_up:
            self.steady_at.append(self.sequencer.position)

    def store(self, count: int) -> list[bytes]:
        first, self.count = self.count + 1, self.count + count
        return [self.redis.store(payload(number)) for number in range(first, self.count + 1)]

    def hear(self, payloads: list[bytes]) -> None:
        self.sequencer.take(messages(payloads))

    async def settle(self) -> None:
        await turns()
        if self.task.done():
            await self.task  # raises what ended it

    @property
    def counters(self) -> tuple[int, int, int]:
        """Twins, forged, recovered."""
        return self.sequencer.duplicates, self.sequencer.unknown_position, self.sequencer.recovered


def run_of(epoch: str, first: int, last: int) -> list[str]:
    return [f"{epoch}-{offset}" for offset in range(first, last + 1)]


# From the subscription


@in_loop
async def test_the_next_one_is_handed_on_at_once() -> None:
    """What comes in order needs no log, and one read of the subscription is one batch."""
    channel = await Channel.opened(stored=10)
    looks = channel.redis.looks
    channel.hear(channel.store(1))
    channel.hear(channel.store(5))
    assert channel.record.said == run_of("e1", 11, 16)
    assert channel.record.batches == [1, 5]
    assert channel.sequencer.position == P("e1-16")
    await channel.settle()
    assert (channel.redis.looks, channel.redis.pages) == (looks, [])
    assert channel.counters == (0, 0, 0)


@in_loop
async def test_what_is_not_stored_passes_at_once() -> None:
    """Events without a position are handed on where they come, whatever the reader waits for."""
    channel = await Channel.opened()
    first, _, third = channel.store(3)
    channel.hear([payload(90), first, payload(91), third, payload(92)])
    assert channel.record.said == [None, "e1-1", None, None]
    await channel.settle()
    assert channel.record.said == [None, "e1-1", None, None, "e1-2", "e1-3"]


@in_loop
async def test_what_is_not_stored_passes_before_anything_is_known() -> None:
    """Also when Redis has not answered yet."""
    channel = Channel()
    channel.hear([payload(1)])
    assert channel.record.said == [None]


@in_loop
async def test_twins_are_dropped_and_counted() -> None:
    """An event that comes again, at once or much later, is not handed on again."""
    channel = await Channel.opened()
    stored = channel.store(4)
    channel.hear([stored[0], stored[0], stored[1]])
    channel.hear([stored[0], stored[1], stored[2], stored[3], stored[2]])
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 4)
    assert channel.counters == (4, 0, 0)
    assert channel.redis.pages == []


@in_loop
async def test_a_hole_is_read_from_the_log() -> None:
    """What the subscription did not bring comes before what it brought after it, once and in order."""
    channel = await Channel.opened()
    stored = channel.store(10)
    channel.hear([stored[0], stored[4], stored[5], stored[9]])
    assert channel.record.said == ["e1-1"], "nothing is handed on behind a hole"
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 10)
    assert channel.sequencer.recovered == 9
    assert channel.sequencer.caught_up
    channel.hear(channel.store(1))
    assert channel.record.said[-1] == "e1-11"


@in_loop
async def test_a_hole_of_many_pages_is_read_page_by_page() -> None:
    """However large the hole is, each page begins after the one before."""
    channel = await Channel.opened()
    stored = channel.store(LIMITS.page_events * 2 + 7)
    channel.hear(stored[-1:])
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, len(stored))
    firsts = [first for _, first in channel.redis.pages]
    assert firsts == [1, 1 + LIMITS.page_events, 1 + 2 * LIMITS.page_events]


@in_loop
async def test_events_that_come_while_a_page_is_read_are_handed_on_once() -> None:
    """Live events between question and answer, before and behind the hole: no hole, no twin."""
    channel = await Channel.opened()
    first, second, third = channel.store(3)
    late: list[list[bytes]] = [[first, second], [first, third], [second]]

    def meanwhile() -> None:
        if late:
            channel.hear([*late.pop(0), *channel.store(2)])

    channel.redis.on_the_way = meanwhile
    channel.hear([third])
    await channel.settle()
    assert late == [], "it has not looked often enough"
    assert channel.record.said == run_of("e1", 1, 9)
    assert channel.sequencer.position == P("e1-9")


@pytest.mark.parametrize("missed", [1, 3 * LIMITS.page_events])
@in_loop
async def test_events_without_a_pause_do_not_keep_it_from_catching_up(missed: int) -> None:
    """Whenever an answer arrives more have come: they join on to it, and are not read from the log, too."""
    channel = await Channel.opened(stored=5)
    channel.sequencer.interrupt()
    channel.store(missed)
    channel.redis.on_the_way = lambda: channel.hear(channel.store(2))
    channel.sequencer.confirm()
    await until(lambda: channel.sequencer.caught_up, "it never catches up")
    channel.redis.on_the_way = None
    await channel.settle()
    assert channel.record.said == run_of("e1", 6, channel.count)
    assert len(channel.redis.pages) <= 2 + missed // LIMITS.page_events
    channel.hear(channel.store(1))
    assert channel.record.said[-1] == f"e1-{channel.count}"


@in_loop
async def test_no_more_is_kept_than_may_be() -> None:
    """What has no room is read from the log."""
    channel = await Channel.opened()
    channel.sequencer._limits = replace(LIMITS, early_bytes=1000)
    _, *rest = channel.store(1000)
    channel.hear(rest)
    assert len(channel.sequencer._early) < 20
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 1000)
    assert not channel.sequencer._early


@in_loop
async def test_an_event_that_overtakes_the_answer_is_not_lost() -> None:
    """It comes after the page was made and before it has arrived: it is skipped, and looked for again."""
    channel = await Channel.opened()
    channel.store(1)
    once = [1]

    def meanwhile() -> None:
        if channel.redis.pages and once:
            once.pop()
            channel.hear(channel.store(1))

    channel.redis.on_the_way = meanwhile
    assert not channel.sequencer.check(channel.redis.head())
    await channel.settle()
    assert channel.record.said == ["e1-1", "e1-2"]


@in_loop
async def test_events_that_overtake_many_answers_are_all_handed_on() -> None:
    """With each answer another event overtakes it; it is steady only when that one has been handed on, too."""
    channel = await Channel.opened()
    channel.steady_at.clear()
    channel.sequencer.interrupt()
    channel.store(5)

    steady = list[Position]()

    def on_caught_up() -> None:
        channel._on_caught_up()
        steady.append(channel.redis.head())

    channel.sequencer._on_caught_up = on_caught_up

    def meanwhile() -> None:
        if channel.count < 15:
            channel.hear(channel.store(1))

    channel.redis.on_the_way = meanwhile
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.count > 6
    assert channel.record.said == run_of("e1", 1, channel.count)
    assert channel.steady_at == steady
    assert channel.steady_at[-1] == P(f"e1-{channel.count}")


@in_loop
async def test_a_lost_event_at_the_end_is_found_by_the_proof() -> None:
    """Nobody comes after it: the head that was read in Redis says that it is missing."""
    channel = await Channel.opened(stored=2)
    assert channel.sequencer.check(P("e1-2"))
    assert channel.sequencer.check(P("e1-1"))
    channel.store(1)
    assert not channel.sequencer.check(channel.redis.head())
    await channel.settle()
    assert channel.record.said == ["e1-3"]
    assert channel.sequencer.check(channel.redis.head())


@in_loop
async def test_a_head_that_nobody_knows_makes_it_look() -> None:
    """No position in Redis, or one of another epoch, is no proof."""
    channel = await Channel.opened(stored=2)
    looks = channel.redis.looks
    assert not channel.sequencer.check(None)
    await channel.settle()
    assert not channel.sequencer.check(P("zz-1"))
    await channel.settle()
    assert channel.redis.looks == looks + 2
    assert channel.record.said == []


# Forged

FORGED: list[tuple[str, str]] = [
    ("a huge offset", f"e1-{2**53 - 1}"),
    ("an offset one too high", "e1-7"),
    ("an unknown epoch", "zz-6"),
    ("an unknown epoch and a low offset", "zz-1"),
    ("an unknown epoch and a huge offset", "zz-999999999"),
]


@pytest.mark.parametrize("position", [case[1] for case in FORGED], ids=[case[0] for case in FORGED])
@in_loop
async def test_a_forged_position_is_counted_and_harms_nobody(position: str) -> None:
    """An event with a position that nobody has given is not handed on; those with real ones all are."""
    channel = await Channel.opened(stored=5)
    channel.hear([splice(CHANNEL, P(position), payload(99))])
    await channel.settle()
    assert channel.counters == (0, 1, 0)
    stored = channel.store(3)
    channel.hear(stored[:1])
    channel.hear([splice(CHANNEL, P("zz-50"), payload(99)), *stored[1:]])
    await channel.settle()
    assert channel.record.said == run_of("e1", 6, 8)
    assert channel.counters[:2] == (0, 2)
    assert channel.sequencer.caught_up


@in_loop
async def test_a_late_event_of_an_older_epoch_is_not_forged() -> None:
    """It was given once; it is dropped."""
    channel = await Channel.opened(stored=5)
    old = splice(CHANNEL, P("e1-5"), payload(5))
    channel.redis.restart()
    channel.hear(channel.store(2))
    await channel.settle()
    channel.record.said.clear()
    channel.hear([old])
    await channel.settle()
    assert channel.record.said == []
    assert channel.sequencer.unknown_position == 0


# Restarts of Redis


@in_loop
async def test_a_new_epoch_is_told_once_and_then_goes_on() -> None:
    """Nobody knows what the old process had accepted: a gap with an open end, then the new epoch."""
    channel = await Channel.opened(stored=5)
    channel.redis.restart()
    stored = channel.store(3)
    channel.hear(stored[:1])
    await channel.settle()
    assert channel.record.said == [("redis_restarted", "e1", 6, None, "e2-5"), "e2-6", "e2-7", "e2-8"]
    channel.hear(stored[1:] + channel.store(1))
    assert channel.record.said[-1] == "e2-9"
    assert channel.sequencer.duplicates == 2


@in_loop
async def test_what_survived_of_the_old_epoch_comes_before_the_gap() -> None:
    """The end of the old epoch is read from the log, then the gap, then the new epoch from its first event."""
    channel = await Channel.opened(stored=5)
    channel.sequencer.interrupt()
    channel.store(3)
    channel.redis.restart()
    channel.store(2)
    channel.sequencer.confirm()
    await channel.settle()
    gap = ("redis_restarted", "e1", 9, None, "e2-8")
    assert channel.record.said == ["e1-6", "e1-7", "e1-8", gap, "e2-9", "e2-10"]


@in_loop
async def test_a_redis_that_came_back_with_older_data_loses_no_new_event() -> None:
    """Offsets are given again, in another epoch: they are new events, not twins."""
    channel = await Channel.opened(stored=5)
    channel.hear(channel.store(5))
    channel.record.said.clear()
    channel.redis.restart(kept=7)
    stored = channel.store(2)
    channel.hear(stored)
    await channel.settle()
    assert channel.record.said == [("redis_restarted", "e1", 11, None, "e2-7"), "e2-8", "e2-9"]
    assert channel.sequencer.duplicates == 0


@in_loop
async def test_a_page_that_was_asked_for_before_an_epoch_began_misses_none_of_it() -> None:
    """Between two answers Redis comes back with older data: the new epoch begins before what was asked for."""
    channel = await Channel.opened(stored=20)
    channel.sequencer.interrupt()
    channel.store(10)

    def come_back() -> None:
        channel.redis.on_the_way = None
        channel.redis.restart(kept=10)
        channel.store(5)

    channel.redis.on_the_way = come_back
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [("redis_restarted", "e1", 21, None, "e2-10"), *run_of("e2", 11, 15)]


@in_loop
async def test_a_new_epoch_without_events_is_told_by_the_proof() -> None:
    """Redis was restarted and nobody publishes: it is told all the same, once."""
    channel = await Channel.opened(stored=5)
    channel.redis.restart(kept=3)
    assert not channel.sequencer.check(None)
    await channel.settle()
    assert channel.record.said == [("redis_restarted", "e1", 6, None, "e2-3")]
    assert channel.sequencer.check(P("e2-3"))


@in_loop
async def test_several_restarts_are_told_each() -> None:
    """Three epochs, one of them without events: three gaps, each ending where the next one begins."""
    channel = await Channel.opened(stored=2)
    channel.sequencer.interrupt()
    for stored in (1, 0, 2):
        channel.redis.restart()
        channel.store(stored)
        channel.redis.shelf()
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [
        ("redis_restarted", "e1", 3, None, "e2-2"),
        "e2-3",
        ("redis_restarted", "e2", 4, None, "e3-3"),
        ("redis_restarted", "e3", 4, None, "e4-3"),
        "e4-4",
        "e4-5",
    ]


@in_loop
async def test_a_redis_that_crashes_twice_and_forgets_the_first_time_repeats_nothing() -> None:
    """Its second start knows nothing of the epoch of the first: what was handed on before both is not again."""
    channel = await Channel.opened()
    channel.hear(channel.store(5))
    channel.redis.restart()
    channel.hear(channel.store(2))
    await channel.settle()
    assert channel.sequencer.position == P("e2-7")
    channel.record.said.clear()
    shelf = channel.redis.shelf()
    channel.redis.restart(kept=5)
    shelf.epochs = shelf.epochs[:1]
    channel.hear(channel.store(1))
    await channel.settle()
    assert [word for word in channel.record.said if isinstance(word, str)] == ["e3-6"]
    gaps = [word for word in channel.record.said if not isinstance(word, str)]
    assert gaps[0][:4] == ("redis_restarted", "e2", 8, None)


@in_loop
async def test_a_counter_that_was_deleted_begins_anew() -> None:
    """Nothing is known of the channel any more: a gap, and offsets from 1."""
    channel = await Channel.opened(stored=5)
    channel.redis.forget()
    stored = channel.store(2)
    channel.hear(stored)
    await channel.settle()
    assert channel.record.said == [("redis_restarted", "e1", 6, None, "e2-0"), "e2-1", "e2-2"]
    assert channel.counters == (0, 0, 2)


# What the log does not have


@in_loop
async def test_what_has_expired_is_told_with_its_range() -> None:
    """The hub was away for longer than the log reaches back."""
    channel = await Channel.opened(stored=5)
    channel.sequencer.interrupt()
    channel.store(20)
    channel.redis.trim(16)
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [("expired", "e1", 6, 15, "e1-15"), *run_of("e1", 16, 25)]


@in_loop
async def test_a_log_that_is_gone_is_told_up_to_the_head() -> None:
    """Silence has emptied the log, the counter lives: everything up to it is told."""
    channel = await Channel.opened(stored=5)
    channel.sequencer.interrupt()
    channel.store(4)
    channel.redis.trim(1000)
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [("expired", "e1", 6, 9, "e1-9")]
    channel.hear(channel.store(1))
    assert channel.record.said[-1] == "e1-10"


REFUSED: list[tuple[str, list[int], list[Any]]] = [
    ("one between", [7], ["e1-6", ("refused", "e1", 7, 7, "e1-7"), "e1-8", "e1-9", "e1-10"]),
    ("two in a row", [7, 8], ["e1-6", ("refused", "e1", 7, 8, "e1-8"), "e1-9", "e1-10"]),
    (
        "two apart",
        [7, 9],
        ["e1-6", ("refused", "e1", 7, 7, "e1-7"), "e1-8", ("refused", "e1", 9, 9, "e1-9"), "e1-10"],
    ),
    ("the first", [6], [("refused", "e1", 6, 6, "e1-6"), "e1-7", "e1-8", "e1-9", "e1-10"]),
    ("the last", [10], ["e1-6", "e1-7", "e1-8", "e1-9", ("refused", "e1", 10, 10, "e1-10")]),
    ("all", [6, 7, 8, 9, 10], [("refused", "e1", 6, 10, "e1-10")]),
]


@pytest.mark.parametrize(("bad", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
@in_loop
async def test_what_is_stored_and_no_valid_event_is_told_as_refused(bad: list[int], said: list[Any]) -> None:
    """Its range is exact, wherever it stands, and what stands around it is handed on."""
    channel = await Channel.opened(stored=5)
    channel.sequencer.interrupt()
    for offset in range(6, 11):
        channel.redis.store(INVALID if offset in bad else payload(offset))
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == said
    assert channel.sequencer.position == P("e1-10")


@in_loop
async def test_what_is_stored_at_another_place_is_refused() -> None:
    """An event that somebody has put into the log by hand does not get the place of another one."""
    channel = await Channel.opened(stored=1)
    channel.sequencer.interrupt()
    channel.store(2)
    channel.redis.shelf().log[2] = splice(CHANNEL, P("e1-77"), payload(2))
    channel.redis.shelf().log[3] = payload(3)
    channel.store(1)
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [("refused", "e1", 2, 3, "e1-3"), "e1-4"]


@in_loop
async def test_what_is_too_large_for_this_hub_is_refused() -> None:
    """A publisher with another limit: the hub tells what it cannot give."""
    channel = await Channel.opened(max_bytes=400)
    channel.redis.store(payload(1, 500))
    channel.hear(channel.store(1))
    await channel.settle()
    assert channel.record.said == [("refused", "e1", 1, 1, "e1-1"), "e1-2"]


@pytest.mark.parametrize(
    "count", [LIMITS.page_events - 1, LIMITS.page_events, LIMITS.page_events + 1, 3 * LIMITS.page_events]
)
@in_loop
async def test_whole_pages_that_are_refused_do_not_stop_it(count: int) -> None:
    """However many bad ones stand in a row, it gets past them, and to what comes after."""
    channel = await Channel.opened(stored=1)
    channel.sequencer.interrupt()
    for _ in range(count):
        channel.redis.store(INVALID)
    channel.store(1)
    channel.sequencer.confirm()
    await channel.settle()
    told = [word for word in channel.record.said if not isinstance(word, str)]
    assert {gap[0] for gap in told} == {"refused"}
    assert [offset for _, _, first, last, _ in told for offset in range(first, last + 1)] == [*range(2, 2 + count)]
    assert channel.record.said[-1] == f"e1-{2 + count}"
    assert len(channel.redis.pages) < 10


@in_loop
async def test_a_page_that_is_refused_is_of_the_epoch_of_its_place() -> None:
    """Redis has restarted, and the first whole page of the new epoch is refused: nothing else is missing."""
    channel = await Channel.opened(stored=5)
    channel.redis.restart()
    for _ in range(LIMITS.page_events):
        channel.redis.store(INVALID)
    channel.store(1)
    channel.sequencer.check(channel.redis.head())
    await channel.settle()
    last = 5 + LIMITS.page_events
    assert channel.record.said == [
        ("redis_restarted", "e1", 6, None, "e2-5"),
        ("refused", "e2", 6, last, f"e2-{last}"),
        f"e2-{last + 1}",
    ]


def test_what_is_refused_in_one_epoch_has_expired_in_another() -> None:
    """Redis came back with older data, and gives the same offsets again: the cause is that of the epoch."""
    gap = Gap(CHANNEL, Cause.EXPIRED, "e1", 6, 6, P("e1-6"))
    assert with_refused_cause(gap, {P("e2-6")}) == gap
    assert with_refused_cause(gap, {P("e1-6")}) == replace(gap, cause=Cause.REFUSED)


# Other events at the same positions


@in_loop
async def test_a_memory_that_was_set_back_and_got_further_again_is_told() -> None:
    """Nobody who publishes has seen what was lost, so no floor shows it: the events that came twice do."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.redis.set_back(3)
    other = channel.store(5)
    channel.hear(other)
    await channel.settle()
    assert channel.record.said == [*run_of("e1", 1, 6), "e1-7", "e1-8", ("redis_restarted", "e1", 9, None, "e2-8")]
    channel.hear(channel.store(1))
    assert channel.record.said[-1] == "e2-9"


TOLD_OF_ONE = [*run_of("e1", 1, 9), ("redis_restarted", "e1", 10, None, "e2-9")]
"""What a channel has said that was set back by one event, and was handed on three more before it noticed."""


async def set_back_unheard() -> Channel:
    """A channel that has handed on six events, of which Redis has three, since its subscription was lost."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.sequencer.interrupt()
    channel.redis.set_back(3)
    return channel


async def set_back_by_one() -> Channel:
    """A channel that has handed on six events, of which Redis has five."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.redis.set_back(5)
    return channel


@pytest.mark.parametrize("at_once", [True, False])
@in_loop
async def test_it_is_told_though_the_ring_holds_few(at_once: bool) -> None:
    """What comes behind the event that came twice drops the first one, at once or before the log is read."""
    channel = await set_back_by_one()
    channel.record.kept = 2
    other = channel.store(4)
    for payloads in [other] if at_once else [[each] for each in other]:
        channel.hear(payloads)
    await channel.settle()
    assert channel.record.said == TOLD_OF_ONE


@in_loop
async def test_it_is_told_though_the_log_has_dropped_both() -> None:
    """Events come so fast that the one that came twice has left the log before that is read."""
    channel = await set_back_by_one()
    channel.hear(channel.store(4))
    channel.redis.trim(8)
    await channel.settle()
    assert channel.record.said == TOLD_OF_ONE


@in_loop
async def test_it_is_told_though_redis_can_begin_no_epoch_at_first() -> None:
    """It has no memory for that just then: what the hub has found out is not forgotten."""
    channel = await set_back_by_one()
    channel.hear(channel.store(4))

    def fill() -> None:
        """Once the log has been read, and before the epoch is asked for."""
        channel.redis.errors[CHANNEL] = {"EVALSHA": RedisUnavailable("OOM command not allowed")}
        channel.redis.on_the_way = None

    channel.redis.on_the_way = fill
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 9)
    channel.redis.errors.clear()
    await until(lambda: len(channel.record.said) > 9, "it is not told")
    assert channel.record.said == TOLD_OF_ONE


@pytest.mark.parametrize("then", ["the subscription is confirmed anew", "one is forged"])
@in_loop
async def test_it_is_told_whatever_else_has_to_be_looked_up(then: str) -> None:
    """The log has dropped the event that came twice, and has what is doubted after it as it was handed on."""
    channel = await set_back_by_one()
    channel.hear(channel.store(4))
    channel.redis.trim(8)
    if then == "one is forged":
        channel.hear([splice(CHANNEL, P("e1-8"), payload(99))])
    else:
        channel.sequencer.interrupt()
        channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == TOLD_OF_ONE


@in_loop
async def test_it_is_told_though_the_subscription_is_lost_again_before_the_log_can_be_read() -> None:
    """What has joined on meanwhile is of the memory that is there, and cannot show what was lost before it."""
    channel = await set_back_unheard()
    channel.store(3)
    channel.redis.failures = 1
    channel.sequencer.confirm()
    await channel.settle()
    channel.hear(channel.store(1))
    channel.sequencer.interrupt()
    channel.sequencer.confirm()
    await until(lambda: channel.sequencer.caught_up, "it does not catch up")
    assert channel.record.said == [*run_of("e1", 1, 7), ("redis_restarted", "e1", 8, None, "e2-7")]


@pytest.mark.parametrize("refused", [6, 4], ids=["at its place", "before it"])
@in_loop
async def test_it_is_told_though_the_hub_refuses_some_of_the_other_events(refused: int) -> None:
    """It was set back while nobody listened; where an event had been handed on there is none for anybody now."""
    channel = await set_back_unheard()
    for offset in range(4, 8):
        channel.redis.store(INVALID) if offset == refused else channel.store(1)
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == [*run_of("e1", 1, 7), ("redis_restarted", "e1", 8, None, "e2-7")]


@in_loop
async def test_it_is_told_though_the_hub_had_refused_the_last_one() -> None:
    """The last event that it has handed on tells it, though others were stored behind that."""
    channel = await Channel.opened()
    channel.hear(channel.store(5))
    channel.redis.store(INVALID)
    channel.sequencer.check(channel.redis.head())
    await channel.settle()
    channel.sequencer.interrupt()
    channel.redis.set_back(3)
    channel.store(4)
    channel.sequencer.confirm()
    await channel.settle()
    refused = ("refused", "e1", 6, 6, "e1-6")
    told = ("redis_restarted", "e1", 8, None, "e2-7")
    assert channel.record.said == [*run_of("e1", 1, 5), refused, "e1-7", told]


@in_loop
async def test_it_is_told_though_what_the_hub_had_handed_on_last_was_a_gap() -> None:
    """Of an event that it refuses; the one before was the last that could be compared, and has left the log."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.redis.store(INVALID)
    channel.sequencer.check(channel.redis.head())
    await channel.settle()
    channel.redis.set_back(5)
    channel.hear(channel.store(4))
    channel.redis.trim(8)
    await channel.settle()
    refused = ("refused", "e1", 7, 7, "e1-7")
    assert channel.record.said == [
        *run_of("e1", 1, 6),
        refused,
        "e1-8",
        "e1-9",
        ("redis_restarted", "e1", 10, None, "e2-9"),
    ]


@in_loop
async def test_what_is_doubted_again_while_it_is_looked_up_is_looked_up_again() -> None:
    """One was forged; when the log had been read, Redis was set back, and another came at the same place."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.hear([splice(CHANNEL, P("e1-6"), payload(99))])

    def set_back() -> None:
        channel.redis.on_the_way = None
        channel.redis.set_back(5)
        channel.hear(channel.store(1))

    channel.redis.on_the_way = set_back
    await channel.settle()
    assert channel.record.said == [*run_of("e1", 1, 6), ("redis_restarted", "e1", 7, None, "e2-6")]


@in_loop
async def test_one_that_is_forged_of_what_the_log_has_dropped_begins_no_epoch() -> None:
    """It is not the last one that was handed on: if Redis had been set back, another one of that would follow."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.redis.trim(4)
    channel.hear([splice(CHANNEL, P("e1-2"), payload(99))])
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 6)
    assert channel.redis.head() == P("e1-6")


@pytest.mark.parametrize("stored", [1, 3, 5], ids=["less", "as much", "more"])
@in_loop
async def test_a_memory_that_was_set_back_while_nobody_listened_is_told(stored: int) -> None:
    """The subscription was lost meanwhile; less, as much or more has been stored again than was lost."""
    channel = await set_back_unheard()
    channel.store(stored)
    channel.sequencer.confirm()
    await channel.settle()
    rest = run_of("e1", 7, 3 + stored)
    first = 7 + len(rest)
    told = ("redis_restarted", "e1", first, None, f"e2-{3 + stored}")
    assert channel.record.said == [*run_of("e1", 1, 6), *rest, told]
    channel.hear(channel.store(1))
    assert channel.record.said[-1] == f"e2-{4 + stored}"


@in_loop
async def test_a_memory_that_was_set_back_and_stays_there_is_told_by_the_proof() -> None:
    """Nothing is published: only where the channel stands now, and stood before, shows it."""
    channel = await Channel.opened()
    channel.hear(channel.store(6))
    channel.redis.set_back(3)
    assert not channel.sequencer.check(channel.redis.head(), P("e1-6"))
    await channel.settle()
    assert channel.record.said == [*run_of("e1", 1, 6), ("redis_restarted", "e1", 7, None, "e2-3")]


@in_loop
async def test_a_forged_duplicate_begins_no_epoch() -> None:
    """Somebody publishes another event with a position that was given: the log has the one that was handed on."""
    channel = await Channel.opened()
    first, _ = channel.store(1), channel.store(1)
    channel.hear([*first, splice(CHANNEL, P("e1-1"), payload(99))])
    await channel.settle()
    assert channel.record.said == run_of("e1", 1, 2)
    assert channel.redis.head() == P("e1-2")
    assert channel.counters[0] == 1


NOBODYS = pytest.mark.parametrize("at", ["e1-999", "T000000009000000-5"], ids=["forged", "of another database"])


@NOBODYS
@in_loop
async def test_events_of_nobody_that_keep_coming_do_not_keep_it_from_catching_up(at: str) -> None:
    """They come more often than the log can be read, which begins again for each."""
    channel = Channel(stored=3)
    channel.redis.on_the_way = lambda: channel.hear([splice(CHANNEL, P(at), payload(99))])
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.sequencer.caught_up
    assert channel.sequencer.position == P("e1-3")


@NOBODYS
@in_loop
async def test_events_of_nobody_are_counted_also_if_redis_does_not_answer_at_first(at: str) -> None:
    """They are looked up again when it does."""
    channel = await Channel.opened(stored=3)
    channel.redis.failures = 1
    channel.hear([splice(CHANNEL, P(at), payload(99))])
    await until(lambda: channel.sequencer.unknown_position, "it is not counted")
    await channel.settle()
    assert channel.counters == (0, 1, 0)


@NOBODYS
@in_loop
async def test_events_of_nobody_take_no_room_of_those_that_come_early(at: str) -> None:
    """Else these would be read again, and what comes meanwhile, without an end."""
    channel = await Channel.opened(stored=3)
    nobodys = splice(CHANNEL, P(at), payload(99) + b" " * 100_000)
    for _ in range(2 * LIMITS.early_bytes // len(nobodys)):
        channel.hear([nobodys])
        await channel.settle()
    pages = len(channel.redis.pages)

    def hear_one_more() -> None:
        """Once the page has been read."""
        if len(channel.redis.pages) > pages:
            channel.redis.on_the_way = None
            channel.hear(channel.store(1))

    channel.redis.on_the_way = hear_one_more
    channel.hear(channel.store(2)[1:])
    await channel.settle()
    assert channel.record.said == run_of("e1", 4, 6)
    assert len(channel.redis.pages) == pages + 1


# Interruptions


@in_loop
async def test_it_is_steady_only_when_the_subscription_holds_and_all_is_handed_on() -> None:
    """Confirmed is not enough, and neither is having read everything."""
    channel = Channel(stored=3)
    await channel.settle()
    assert not channel.sequencer.caught_up
    assert channel.sequencer.position is None
    channel.redis.gate.clear()
    channel.sequencer.confirm()
    await channel.settle()
    assert not channel.sequencer.caught_up, "Redis has not answered yet"
    channel.redis.gate.set()
    await channel.settle()
    assert channel.sequencer.caught_up
    channel.sequencer.interrupt()
    assert not channel.sequencer.caught_up
    assert not channel.sequencer.check(P("zz-0"))
    await channel.settle()
    assert not channel.sequencer.caught_up, "it has looked, but nothing holds"
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.sequencer.caught_up


@in_loop
async def test_an_interruption_while_it_reads_is_not_forgotten() -> None:
    """Lost and confirmed again during one answer: what was missed in between is looked for again."""
    channel = await Channel.opened(stored=3)
    channel.sequencer.interrupt()
    channel.sequencer.confirm()
    channel.redis.gate.clear()
    await channel.settle()
    channel.sequencer.interrupt()
    channel.store(2)
    channel.sequencer.confirm()
    channel.redis.gate.set()
    await channel.settle()
    assert channel.record.said == ["e1-4", "e1-5"]
    assert channel.sequencer.caught_up


@in_loop
async def test_a_look_before_the_last_confirmation_does_not_make_it_steady() -> None:
    """Lost and confirmed again while an answer was on its way: what it says is older than what was missed."""
    channel = await Channel.opened(stored=3)
    channel.steady_at.clear()
    answers: list[bool] = []

    def meanwhile() -> None:
        answers.append(channel.sequencer.caught_up)
        if len(answers) == 1:
            channel.sequencer.interrupt()
            channel.store(2)
            channel.sequencer.confirm()

    channel.redis.on_the_way = meanwhile
    channel.sequencer.interrupt()
    channel.sequencer.confirm()
    await channel.settle()
    assert not any(answers)
    assert channel.steady_at == [P("e1-5")]


@in_loop
async def test_a_subscription_lost_while_it_reads_is_not_steady_afterwards() -> None:
    """The answer comes after the loss: it proves nothing about the time after."""
    channel = await Channel.opened(stored=3)
    channel.sequencer.interrupt()
    channel.sequencer.confirm()
    channel.redis.gate.clear()
    await channel.settle()
    channel.sequencer.interrupt()
    channel.redis.gate.set()
    await channel.settle()
    assert not channel.sequencer.caught_up


@in_loop
async def test_events_before_the_confirmation_is_looked_up_are_not_lost() -> None:
    """The subscription is quicker than the first look: what it brings is read from the log, once."""
    channel = Channel(stored=3)
    late = [1]

    def meanwhile() -> None:
        if late:
            late.pop()
            channel.hear(channel.store(2))

    channel.redis.on_the_way = meanwhile
    channel.sequencer.confirm()
    await channel.settle()
    assert channel.record.said == ["begin e1-3", "e1-4", "e1-5"]
    assert set(channel.steady_at) == {P("e1-5")}, "it was steady while something was skipped"


@in_loop
async def test_a_redis_that_does_not_answer_is_asked_until_it_does() -> None:
    """Nothing is lost, and nobody is told that all is well, while the log cannot be read."""
    channel = await Channel.opened(stored=3)
    channel.redis.failures = 1_000_000
    channel.hear(channel.store(4)[2:])
    await until(lambda: channel.redis.failures < 999_997, "it has given up")
    assert channel.record.said == []
    channel.redis.failures = 0
    await until(lambda: channel.record.said, "it has given up")
    assert channel.record.said == run_of("e1", 4, 7)


@in_loop
async def test_a_failure_between_two_pages_repeats_nothing() -> None:
    """Redis goes away in the middle of a long hole: it goes on where it was."""
    channel = await Channel.opened()
    stored = channel.store(3 * LIMITS.page_events)

    def cut() -> None:
        if len(channel.redis.pages) == 2:
            channel.redis.failures, channel.redis.on_the_way = 2, None

    channel.redis.on_the_way = cut
    channel.hear(stored[-1:])
    await until(lambda: channel.sequencer.position == P(f"e1-{len(stored)}"), "it has given up")
    assert channel.record.said == run_of("e1", 1, len(stored))


@pytest.mark.parametrize("error", [RedisRefused("NOPERM"), RedisErrorReply("WRONGTYPE of the key")])
@in_loop
async def test_the_error_with_which_redis_answers_is_its_problem(error: Exception) -> None:
    """Until it is mended: then everything is handed on, as if nothing had been."""
    channel = await Channel.opened()
    assert channel.sequencer.problem is None
    channel.redis.errors[CHANNEL] = {"EVALSHA": error}
    channel.hear(channel.store(2)[1:])
    await until(lambda: channel.sequencer.problem is error, "not noticed")
    channel.redis.errors.clear()
    await until(lambda: channel.sequencer.problem is None, "not mended")
    assert channel.record.said == run_of("e1", 1, 2)


@pytest.mark.parametrize("said", ["LOADING Redis is loading", "READONLY You can't write", "OOM", "NOSCRIPT"])
@in_loop
async def test_an_error_of_the_whole_server_is_no_problem_of_the_channel(said: str) -> None:
    """The delivery probe finds it; this channel is only read again."""
    channel = await Channel.opened()
    channel.redis.errors[CHANNEL] = {"EVALSHA": RedisErrorReply(said)}
    looks = channel.redis.asked
    channel.hear(channel.store(2)[1:])
    await until(lambda: channel.redis.asked >= looks + 3, "it has given up")
    assert channel.sequencer.problem is None
    channel.redis.errors.clear()
    await until(lambda: channel.record.said == run_of("e1", 1, 2), "not mended")


@in_loop
async def test_whoever_waits_is_told_after_each_look() -> None:
    """A position that is ahead is looked for; afterwards it is known, or nobody has given it."""
    channel = await Channel.opened(stored=3)
    assert channel.sequencer.knows(P("e1-0"))
    assert channel.sequencer.knows(P("e1-3"))
    before = channel.caught_up
    channel.store(2)
    assert not channel.sequencer.knows(P("e1-5"))
    await channel.settle()
    assert channel.caught_up == before + 1
    assert channel.sequencer.knows(P("e1-5"))
    assert not channel.sequencer.knows(P("e1-6"))
    assert not channel.sequencer.knows(P("zz-1"))


# At random


class Story:
    """A publisher, a Redis and a subscription of which none can be relied upon."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.channel = Channel()
        self.stored: dict[str, None] = {}
        self.on_the_way: list[bytes] = []
        self.held = False

    def publish(self) -> None:
        for _ in range(self.chance.choice([1, 1, 2, 5, 300])):
            position = str(self.channel.redis.next())
            [event] = self.channel.store(1)
            self.stored[position] = None
            if self.held and self.chance.random() < 0.9:
                self.on_the_way.append(event)

    def arrive(self) -> None:
        count = self.chance.choice([1, 3, 1000])
        batch, self.on_the_way = self.on_the_way[:count], self.on_the_way[count:]
        if batch and self.chance.random() < 0.3:
            batch = batch + self.chance.choices(batch, k=3)
        if self.chance.random() < 0.1:
            batch.append(splice(CHANNEL, Position("zz", self.chance.randrange(1, 10**6)), payload(1)))
        self.channel.hear(batch)

    def cut(self) -> None:
        if self.held:
            self.held = False
            self.on_the_way.clear()
            self.channel.sequencer.interrupt()
        else:
            self.held = True
            self.channel.sequencer.confirm()

    def restart(self) -> None:
        offset = self.channel.redis.shelf().offset
        least = self.channel.redis.shelf().epochs[-1].offset - 1
        self.channel.redis.restart(self.chance.choice([offset, max(least, offset - 3)]))
        self.on_the_way.clear()
        if self.held:
            self.cut()

    def trim(self) -> None:
        self.channel.redis.trim(self.channel.redis.shelf().offset - self.chance.choice([0, 5, 400]))

    def fail(self) -> None:
        self.channel.redis.failures = 1

    async def run(self) -> None:
        self.cut()
        await self.channel.settle()
        likely = [self.publish] * 8 + [self.arrive] * 10 + [self.cut] * 3
        rare = [self.restart, self.trim, self.fail]
        for _ in range(120):
            self.chance.choice(likely + rare)()
            await turns(self.chance.choice([0, 1, 3, 20]))
        if not self.held:
            self.cut()
        self.channel.redis.shelf()
        self.channel.sequencer.check(None)
        await until(
            lambda: (
                self.channel.sequencer.caught_up and self.channel.sequencer.position == self.channel.redis.head()
            ),
            "never steady",
        )
        self.channel.hear(self.on_the_way)
        await self.channel.settle()


@pytest.mark.parametrize("seed", range(8))
@in_loop
async def test_whatever_happens_each_stored_event_is_handed_on_once_in_order_or_told(seed: int) -> None:
    """Cuts, twins, drops, delays, forgeries, restarts, rollbacks and trims at random."""
    story = Story(seed)
    await story.run()
    said = [word for word in story.channel.record.said if not str(word).startswith("begin")]
    handed = [P(word) for word in said if isinstance(word, str)]
    gaps = [word for word in said if not isinstance(word, str)]
    assert len(handed) == len(set(handed))
    stored = [P(position) for position in story.stored]
    assert [position for position in stored if position in set(handed)] == handed, "not in their order"
    for position in stored:
        told = sum(
            epoch == position.epoch and first <= position.offset and (last is None or position.offset <= last)
            for _, epoch, first, last, _ in gaps
        )
        assert (position in handed) + told == 1, position
    # What follows a gap goes on after its position.
    for before, after in itertools.pairwise(said):
        if isinstance(before, tuple) and isinstance(after, str):
            assert P(before[4])._replace(offset=P(before[4]).offset + 1) == P(after)


# Where events are not stored


def passing() -> tuple[LiveSequencer, Record, list[int]]:
    record, caught_up = Record(), list[int]()
    return LiveSequencer(cast(Fanout, record), lambda: caught_up.append(1)), record, caught_up


LOST = ("redis_link_lost", None, None, None, None)


@in_loop
async def test_without_history_everything_passes_without_positions() -> None:
    """Also what another system has stored, and what comes again: nobody can tell."""
    reader, record, caught_up = passing()
    assert not reader.caught_up
    reader.confirm()
    assert (reader.caught_up, caught_up, record.said) == (True, [1], [])
    stored = splice(CHANNEL, P("e1-5"), payload(5))
    reader.take(messages([payload(1), stored, stored]))
    assert record.said == [None, None, None]
    assert record.batches == [3]
    assert (reader.position, reader.duplicates, reader.unknown_position, reader.recovered) == (None, 0, 0, 0)
    assert reader.check(None)
    assert reader.knows(P("e1-5"))


@in_loop
async def test_without_history_each_interruption_is_a_gap() -> None:
    """The first confirmation is none; each later one is, between what came before it and after it."""
    reader, record, caught_up = passing()
    reader.confirm()
    for number in range(3):
        reader.take(messages([payload(number)]))
        reader.interrupt()
        assert not reader.caught_up
        reader.confirm()
        assert reader.caught_up
    assert record.said == [None, LOST, None, LOST, None, LOST]
    assert len(caught_up) == 4

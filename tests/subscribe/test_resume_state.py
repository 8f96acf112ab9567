"""Where a subscriber stands: what it asks for, how its positions move, and which holes it finds by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from broadcaster import Event, Gap, Position
from broadcaster.core.event import decode
from broadcaster.core.position import Cause
from broadcaster.subscribe.resume_state import ResumeState
from tests.support import event_payload

URL = "ws://hub:8765/ws"
C = "events.critical"

Since = Position | str | Mapping[str, Position] | None


def places(url: str = URL, since: Since = None, *channels: str, types: tuple[str, ...] = ()) -> ResumeState:
    return ResumeState(url, channels, since, types, (), ())


def stored(position: str | None, channel: str = C) -> Event:
    """An event at a position, or one that is not stored."""
    if position is None:
        return decode(event_payload())
    epoch, offset = Position.parse(position)
    return decode(event_payload(channel=channel, epoch=epoch, offset=offset))


def welcome(position: str | None, channel: str = C) -> dict[str, Any]:
    return {"control": "welcome", "channel": channel, "position": position}


def beat(position: str | None, channel: str = C) -> dict[str, Any]:
    return {"control": "beat", "channel": channel, "position": position}


def standing(position: str, **options: Any) -> ResumeState:
    """Somebody who has been welcomed at a position."""
    known = places(**options)
    known.on_welcome(welcome(position))
    return known


# What it asks for

A, B = Position("a", 7), Position("b", 8)

URLS: dict[str, tuple[ResumeState, str]] = {
    "nothing": (places(), URL),
    "a position": (places(since=A), f"{URL}?since=a-7"),
    "a position as text": (places(since="a-7"), f"{URL}?since=a-7"),
    "a position in the address": (places(f"{URL}?since=a-7"), f"{URL}?since=a-7"),
    "an argument goes over the address": (places(f"{URL}?since=a-7", "b-8"), f"{URL}?since=b-8"),
    "a channel": (places(URL, None, "x"), f"{URL}?channel=x"),
    "a channel in the address": (places(f"{URL}?channel=x", A), f"{URL}?channel=x&since=a-7"),
    "a channel with a position": (places(URL, A, "x"), f"{URL}?channel=x&since=a-7"),
    "two channels": (places(URL, {"x": A, "y": B}, "x", "y"), f"{URL}?channel=x&since=a-7&channel=y&since=b-8"),
    "one of two has a position": (places(URL, {"y": B}, "x", "y"), f"{URL}?channel=x&channel=y&since=b-8"),
    "the default channel by its name": (places(URL, {C: A}), f"{URL}?channel={C}&since=a-7"),
    "a filter": (places(types=("T", "U v")), f"{URL}?type=T&type=U+v"),
    "a filter in the address": (
        places(f"{URL}?severity=info&source=s", A),
        f"{URL}?since=a-7&severity=info&source=s",
    ),
    "no positions": (places(URL, {}), URL),
}


@pytest.mark.parametrize(("asking", "url"), URLS.values(), ids=URLS.keys())
def test_the_address_says_where_to_begin(asking: ResumeState, url: str) -> None:
    """Each channel with its position behind it, then the filters."""
    assert asking.url() == url


@pytest.mark.parametrize(
    "since", ["", "7", "a", "a-", "-7", "a-7-7", "a--7", "ä-7", "a-" + "9" * 17, "a-9007199254740992"]
)
def test_what_is_no_position_is_refused(since: str) -> None:
    """A text that no hub has ever said is an error at once; the empty one is none."""
    if since:
        with pytest.raises(ValueError, match="since is a position"):
            places(since=since)
    else:
        assert places(since=since).positions == {}


def test_one_position_for_two_channels_is_refused() -> None:
    """Nobody could say of which of them it is."""
    with pytest.raises(ValueError, match="several channels"):
        places(URL, A, "x", "y")


def test_a_position_given_without_a_channel_is_that_of_the_default_one() -> None:
    """Once the hub has said its name, it stands under it, and only there."""
    known = places(since="a-7")
    known.on_welcome(welcome("a-7"))
    assert known.positions == {C: A}
    known.on_event(stored("a-8"))
    assert known.positions == {C: Position("a", 8)}
    assert known.url() == f"{URL}?since=a-8"


def test_forgetting_is_beginning_now() -> None:
    """After `forget` nothing is asked for but what is published from now on, and nothing is missed."""
    known = standing("a-7")
    known.forget()
    assert (known.positions, known.url()) == ({}, URL)
    known.on_welcome(welcome("b-90"))
    assert known.on_event(stored("b-91")) is None


def test_forgetting_is_told_of_each_channel() -> None:
    """Also of those of which no position is known."""
    known = places(URL, {"y": B}, "x", "y")
    assert known.forget() == [Gap("x", Cause.CLOSED), Gap("y", Cause.CLOSED, "b", 9)]
    assert places().forget() == [Gap("", Cause.CLOSED)]


AGAIN: dict[str, tuple[ResumeState, list[str | None], Gap | None]] = {
    "for the first time": (places(), [None], None),
    "again, and nothing is stored": (places(), [None, None], Gap(C, Cause.NO_HISTORY)),
    "again, and from now on events are stored": (
        places(),
        [None, "a-7"],
        Gap(C, Cause.NO_HISTORY, position=A),
    ),
    "again, resuming": (places(), ["a-7", "a-7"], None),
    "again, resuming at a hub that cannot, which tells it": (places(), ["a-7", None], None),
    "for the first time with a position, whose hub tells it": (places(since="a-7"), [None], None),
    "again with a position, whose hub tells it": (places(since="a-7"), [None, None], None),
}


@pytest.mark.parametrize(("known", "positions", "gap"), AGAIN.values(), ids=AGAIN.keys())
def test_a_welcome_without_resuming_is_a_gap(
    known: ResumeState, positions: list[str | None], gap: Gap | None
) -> None:
    """Who comes again and cannot say after which position has missed what came meanwhile, and is told so once."""
    *_, last = [known.on_welcome(welcome(position)) for position in positions]
    assert last == gap
    other = known.on_welcome(welcome(None, "other"))
    assert other is None


def test_what_was_forgotten_is_told_once() -> None:
    """`forget` has told of all that is missed before the next welcome."""
    known = places()
    known.on_welcome(welcome(None))
    assert known.forget() == [Gap("", Cause.CLOSED)]
    assert known.on_welcome(welcome(None)) is None
    assert known.on_welcome(welcome(None)) == Gap(C, Cause.NO_HISTORY)


SEES: dict[str, tuple[ResumeState, bool]] = {
    "everything": (places(), True),
    "one channel": (places(URL, None, "x"), True),
    "two channels": (places(URL, None, "x", "y"), False),
    "two channels in the address": (places(f"{URL}?channel=x&channel=y"), False),
    "a filter": (places(types=("T",)), False),
    "a filter in the address": (places(f"{URL}?severity=info"), False),
}


@pytest.mark.parametrize(("known", "sees"), SEES.values(), ids=SEES.keys())
def test_who_sees_everything(known: ResumeState, sees: bool) -> None:
    """One channel and no filter: then every hole is a loss."""
    assert known.sees_everything is sees


# How positions move


def test_a_welcome_that_did_not_recover_moves_nothing() -> None:
    """Its gap does, which the connection may end before."""
    known = places(since=A)
    assert known.on_welcome(welcome("b-9") | {"recovered": False}) is None
    assert known.url() == f"{URL}?since={A}"
    told = Gap(C, Cause.POSITION_UNKNOWN, "a", 8, None, Position("b", 9))
    assert known.on_gap(told) == told
    assert known.url() == f"{URL}?since=b-9"


Step = tuple[str, str | None]
MOVES: dict[str, tuple[list[Step], str | None]] = {
    "nothing": ([], None),
    "welcome": ([("welcome", "a-7")], "a-7"),
    "welcome where nothing is stored": ([("welcome", None)], None),
    "an event": ([("welcome", "a-7"), ("event", "a-8")], "a-8"),
    "an event that is not stored": ([("welcome", "a-7"), ("event", None)], "a-7"),
    "a beat over what a filter held back": ([("welcome", "a-7"), ("beat", "a-20")], "a-20"),
    "a beat where nothing is stored": ([("welcome", None), ("beat", None)], None),
    "a twin": ([("welcome", "a-7"), ("twin", "a-8")], "a-8"),
    "a twin from before": ([("welcome", "a-7"), ("twin", "a-3")], "a-7"),
    "a twin in a new epoch": ([("welcome", "a-7"), ("gap", "b-7"), ("twin", "b-8")], "b-8"),
    "a gap": ([("welcome", "a-7"), ("gap", "a-12")], "a-12"),
    "a gap into a new epoch": ([("welcome", "a-7"), ("gap", "b-3")], "b-3"),
    "an event without a welcome": ([("event", "a-8")], "a-8"),
}  # fmt: skip


@pytest.mark.parametrize(("steps", "position"), MOVES.values(), ids=MOVES.keys())
def test_every_frame_moves_the_position(steps: list[Step], position: str | None) -> None:
    """Up to where everything has come, or was told as a gap."""
    known = places(types=("T",))
    actions: dict[str, Callable[[str | None], object]] = {
        "welcome": lambda at: known.on_welcome(welcome(at)),
        "beat": lambda at: known.on_beat(beat(at)),
        "event": lambda at: known.on_event(stored(at)),
        "twin": lambda at: known.on_event(stored(at)),
        "gap": lambda at: known.on_gap(Gap(C, "expired", "a", 8, None, Position.parse(str(at)))),
    }
    for kind, at in steps:
        actions[kind](at)
    assert known.positions == ({} if position is None else {C: Position.parse(position)})


def test_each_channel_has_its_own() -> None:
    """Frames of one channel do not move another."""
    known = places(URL, {"x": A, "y": B}, "x", "y")
    known.on_event(stored("a-8", "x"))
    known.on_gap(Gap("y", "expired", "b", 9, 11, Position("b", 11)))
    known.on_beat(beat("a-9", "x"))
    assert known.positions == {"x": Position("a", 9), "y": Position("b", 11)}
    assert known.url() == f"{URL}?channel=x&since=a-9&channel=y&since=b-11"


# Holes


def hole(epoch: str, first: int, last: int | None, position: str) -> Gap:
    return Gap(C, Cause.UNEXPLAINED, epoch, first, last, Position.parse(position))


HOLES: dict[str, tuple[str, Gap | None]] = {
    "event a-8": ("a-8", None),
    "event a-9": ("a-9", hole("a", 8, 8, "a-8")),
    "event a-100": ("a-100", hole("a", 8, 99, "a-99")),
    "event b-8": ("b-8", hole("a", 8, None, "b-7")),
}
BEATS: dict[str, tuple[str | None, Gap | None]] = {
    "beat a-7": ("a-7", None),
    "beat a-8": ("a-8", hole("a", 8, 8, "a-8")),
    "beat a-50": ("a-50", hole("a", 8, 50, "a-50")),
    "beat b-7": ("b-7", hole("a", 8, None, "b-7")),
    "beat of a hub that does not store": (None, None),
}


@pytest.mark.parametrize(("at", "gap"), HOLES.values(), ids=HOLES.keys())
def test_an_event_behind_a_hole_shows_it(at: str, gap: Gap | None) -> None:
    """What the hub has skipped without a word is an unexplained gap of exactly that range, told once."""
    known = standing("a-7")
    assert known.on_event(stored(at)) == gap
    assert known.positions[C] == Position.parse(at)
    epoch, offset = Position.parse(at)
    assert known.on_event(stored(f"{epoch}-{offset + 1}")) is None


@pytest.mark.parametrize(("at", "gap"), BEATS.values(), ids=BEATS.keys())
def test_a_beat_beyond_what_has_come_shows_it(at: str | None, gap: Gap | None) -> None:
    """A beat says that everything up to its position was given: what was not is an unexplained gap, told once."""
    known = standing("a-7")
    assert known.on_beat(beat(at)) == gap
    assert known.on_beat(beat(at)) is None


@pytest.mark.parametrize("known", [standing("a-7", types=("T",)), standing("a-7", url=f"{URL}?source=s")])
def test_with_a_filter_a_hole_is_no_loss(known: ResumeState) -> None:
    """What is not there may have been held back."""
    assert known.on_event(stored("a-20")) is None
    assert known.on_beat(beat("a-30")) is None
    assert known.positions[C] == Position("a", 30)


def test_an_announced_gap_is_no_unexplained_one() -> None:
    """Behind a gap that the hub has told, it goes on without another."""
    known = standing("a-7")
    told = Gap(C, "expired", "a", 8, 19, Position("a", 19))
    assert known.on_gap(told) == told
    assert known.on_event(stored("a-20")) is None
    restarted = Gap(C, "redis_restarted", "a", 21, None, Position("b", 15))
    assert known.on_gap(restarted) == restarted
    assert known.on_event(stored("b-16")) is None


NARROWED: dict[str, tuple[Gap, Gap]] = {
    "from before": (
        Gap(C, "expired", "a", 3, 12, Position("a", 12)),
        Gap(C, "expired", "a", 8, 12, Position("a", 12)),
    ),
    "exactly from here": (
        Gap(C, "expired", "a", 8, 12, Position("a", 12)),
        Gap(C, "expired", "a", 8, 12, Position("a", 12)),
    ),
    "another epoch": (
        Gap(C, "redis_restarted", "z", 3, None, Position("a", 7)),
        Gap(C, "redis_restarted", "z", 3, None, Position("a", 7)),
    ),
    "unknown": (Gap(C, "redis_link_lost"), Gap(C, "redis_link_lost")),
}


@pytest.mark.parametrize(("told", "given"), NARROWED.values(), ids=NARROWED.keys())
def test_a_gap_does_not_name_what_has_come(told: Gap, given: Gap) -> None:
    """What was received from another hub before is not missing, whatever this one says."""
    assert standing("a-7").on_gap(told) == given


def test_a_gap_that_lies_wholly_behind_moves_nothing_back() -> None:
    """All of it has come already: the position stays, or what comes next would look like a hole, or come again."""
    known = standing("a-7")
    known.on_gap(Gap(C, "expired", "a", 3, 5, Position("a", 5)))
    assert known.positions[C] == A


# Epochs with a time, oldest first, and one of an earlier version, which is older than all of them
FIRST, SECOND, THIRD = "T000000001aaaaaa", "T000000002aaaaaa", "T000000003aaaaaa"
HERE = Position(SECOND, 10)

Range = tuple[str, int, int | None, Position | None]
BEFORE: dict[str, tuple[Range, Range | None]] = {
    "of an older epoch, up to before here": ((FIRST, 6, None, Position(SECOND, 5)), None),
    "of an older epoch, up to here": ((FIRST, 6, None, HERE), None),
    "of an older epoch, into ours": (
        (FIRST, 6, None, Position(SECOND, 12)),
        (SECOND, 11, None, Position(SECOND, 12)),
    ),
    "of an older epoch, into a newer one": (
        (FIRST, 6, None, Position(THIRD, 15)),
        (SECOND, 11, None, Position(THIRD, 15)),
    ),
    "of an older epoch, with an end": ((FIRST, 6, 8, Position(FIRST, 8)), None),
    "of an epoch of an earlier version": (
        ("a", 6, None, Position(SECOND, 12)),
        (SECOND, 11, None, Position(SECOND, 12)),
    ),
    "of ours, without an end": ((SECOND, 6, None, Position(THIRD, 15)), (SECOND, 11, None, Position(THIRD, 15))),
    "of ours, up to before here": ((SECOND, 6, None, Position(SECOND, 9)), None),
    "of ours, and nobody knows up to where": ((SECOND, 6, None, None), (SECOND, 11, None, None)),
    "after here": ((SECOND, 11, 12, Position(SECOND, 12)), (SECOND, 11, 12, Position(SECOND, 12))),
    "after here, which was never given": (
        (SECOND, 11, None, Position(SECOND, 4)),
        (SECOND, 11, None, Position(SECOND, 4)),
    ),
    "of a newer epoch": ((THIRD, 3, None, Position(FIRST, 4)), (THIRD, 3, None, Position(FIRST, 4))),
}


@pytest.mark.parametrize(("told", "given"), BEFORE.values(), ids=BEFORE.keys())
def test_a_gap_holds_nothing_from_before_the_position(told: Range, given: Range | None) -> None:
    """Whatever the epoch in which it begins: what lies before the position is cut off, and moves nothing back."""
    known = standing(str(HERE))
    gap = known.on_gap(Gap(C, "expired", *told))
    assert gap == (None if given is None else Gap(C, "expired", *given))
    assert known.positions[C] == (HERE if given is None or given[3] is None else given[3])


def test_a_gap_from_before_and_one_into_here() -> None:
    """A hub that was away has two for what this subscriber has in part: only the rest of the second is missing."""
    known = standing(str(HERE))
    told = [
        Gap(C, "redis_restarted", FIRST, 6, None, Position(SECOND, 5)),
        Gap(C, "expired", SECOND, 6, 12, Position(SECOND, 12)),
    ]
    assert [known.on_gap(gap) for gap in told] == [
        None,
        Gap(C, "expired", SECOND, 11, 12, Position(SECOND, 12)),
    ]
    assert known.on_event(stored(f"{SECOND}-13")) is None


OLDER: dict[str, tuple[str, str, bool]] = {
    "the same": ("a-7", "a-7", True),
    "older": ("a-7", "a-3", True),
    "newer": ("a-7", "a-8", False),
    "of an older epoch": (f"{SECOND}-7", f"{FIRST}-9", True),
    "of a newer epoch": (f"{SECOND}-7", f"{THIRD}-3", False),
    "of an epoch of an earlier version": (f"{SECOND}-7", "a-9", True),
    "of an epoch with a time, after one without": ("a-7", f"{FIRST}-3", False),
    "of two epochs without a time": ("a-7", "b-3", False),
}


@pytest.mark.parametrize(("here", "at", "older"), OLDER.values(), ids=OLDER.keys())
def test_an_older_event_is_known_and_moves_nothing(here: str, at: str, older: bool) -> None:
    """Events move a position forward only."""
    known = standing(here)
    assert known.has(stored(at)) == older
    gap = known.on_event(stored(at))
    assert known.positions[C] == Position.parse(here if older else at)
    assert not (older and gap)


def test_what_has_no_position_is_new() -> None:
    """Nothing is known of an event that is not stored, or of a channel that has said nothing."""
    assert not standing("a-7").has(stored(None))
    assert not standing("a-7").has(stored("a-3", "other"))


@pytest.mark.parametrize("position", ["", "nonsense", 7, None, ["a-7"]])
def test_a_position_that_is_none_is_passed_over(position: object) -> None:
    """Whatever a strange hub says, the known position stays."""
    known = standing("a-7")
    known.on_welcome({"control": "welcome", "channel": C, "position": position})
    known.on_beat({"control": "beat", "channel": C, "position": position})
    assert known.positions[C] == A


def test_a_time_is_asked_for_until_it_is_a_position() -> None:
    """Also where what had expired is told first; of several channels each has its own, and none begins anew."""
    state = ResumeState("ws://hub/ws", (), "10m", ["A"], (), ())
    assert state.url() == "ws://hub/ws?since=10m&type=A"
    state.on_welcome({"channel": "c", "position": "e-40", "recovered": False})
    assert state.url() == "ws://hub/ws?since=10m&type=A"
    gap = Gap("c", "expired", "e", None, 40, Position("e", 40))
    assert state.on_gap(gap) == gap
    assert state.url() == "ws://hub/ws?since=e-40&type=A"
    state = ResumeState("ws://hub/ws?since=1d", ("x", "y"), "2026-11-27T02:00:00+02:00", (), (), (), 5)
    asked = "since=2026-11-27T02%3A00%3A00%2B02%3A00"
    assert state.url() == f"ws://hub/ws?channel=x&{asked}&channel=y&{asked}"
    state.on_welcome({"channel": "x", "position": "e-7", "recovered": True})
    assert state.url() == f"ws://hub/ws?channel=x&since=e-7&channel=y&{asked}"
    state.forget()
    assert state.url() == "ws://hub/ws?channel=x&channel=y"
    assert ResumeState("ws://hub/ws?since=all", (), None, (), (), ()).url() == "ws://hub/ws?since=all"


@pytest.mark.parametrize(("since", "last"), [("10m", None), (None, 50)], ids=["a time", "the last events"])
def test_who_begins_again_has_missed_nothing(since: str | None, last: int | None) -> None:
    """The connection has ended before the gap of its welcome: the next one tells that again, and nothing else."""
    state = ResumeState(URL, (), since, (), (), (), last)
    assert state.on_welcome(welcome("e-40") | {"recovered": False}) is None
    assert state.on_welcome(welcome("e-60") | {"recovered": False}) is None
    gap = Gap(C, "expired", "e", None, 60, Position("e", 60))
    assert state.on_gap(gap) == gap
    assert state.on_welcome(welcome("e-60") | {"recovered": True}) is None


def test_without_history_a_time_is_asked_for_once() -> None:
    """The hub tells that as a gap without a position: what is missed afterwards is another one."""
    state = ResumeState("ws://hub/ws", (), "10m", (), (), ())
    state.on_welcome({"channel": "c", "position": None, "recovered": False})
    state.on_gap(Gap("c", "no_history"))
    assert state.url() == "ws://hub/ws"
    assert state.on_welcome({"channel": "c", "position": None, "recovered": None}) == Gap("c", "no_history")


@pytest.mark.parametrize("since", ["yesterday", "10", "10w", "-1h", "2026-11-27T02:00:00", "2026-11-27"])
def test_a_since_that_says_no_place_is_an_error_that_names_it(since: str) -> None:
    """Also a time without its zone: it would be another one on each machine."""
    with pytest.raises(ValueError, match=r"^since is "):
        ResumeState("ws://hub/ws", (), since, (), (), ())


def test_the_last_events_are_asked_for_until_it_is_known_where_they_begin() -> None:
    """A welcome before a gap does not say it yet: the connection may end between the two."""
    state = ResumeState("ws://hub/ws", (), None, ["A"], (), (), 50)
    assert state.url() == "ws://hub/ws?last=50&type=A"
    state.on_welcome({"channel": "c", "position": "e-40", "recovered": False})
    assert state.url() == "ws://hub/ws?last=50&type=A"
    state.on_welcome({"channel": "c", "position": "e-40", "recovered": True})
    assert state.url() == "ws://hub/ws?since=e-40&type=A"
    state.forget()
    assert state.url() == "ws://hub/ws?type=A"
    assert ResumeState("ws://hub/ws?last=7", ("x", "y"), None, (), (), ()).url() == (
        "ws://hub/ws?channel=x&last=7&channel=y&last=7"
    )
    with pytest.raises(ValueError, match="number of events"):
        ResumeState("ws://hub/ws", (), None, (), (), (), -1)

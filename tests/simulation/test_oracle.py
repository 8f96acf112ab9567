"""The oracle finds each broken promise in made-up books, and none in those of a sound system."""

from __future__ import annotations

import json

import pytest

from tests.simulation.books import (
    Beaten,
    Blind,
    Book,
    Closed,
    Connected,
    Entry,
    Given,
    Place,
    Refused,
    Told,
    Welcomed,
)
from tests.simulation.journal import Journal, Loss
from tests.simulation.live import LiveRules
from tests.simulation.oracle import Findings, Oracle, Truth
from tests.simulation.stored import StoredRules
from tests.simulation.times import instant
from tests.simulation.troubles import EVERY_CHANNEL, Troubles

CHANNEL = "c"
EPOCHS = {letter: f"T00000000{number}000000" for number, letter in enumerate("abx", 1)}
NOW = 20.0


def place(text: str) -> Place:
    """Epoch and offset, such as `a5`; one that is not listed is called by its letter."""
    return Place(EPOCHS.get(text[0], text[0]), int(text[1:]))


def payload(text: str, event_id: str = "", size: int = 0) -> bytes:
    epoch, offset = place(text)
    labels = {"event_type": "t", "source": "s", "severity": "info"}
    fields = {"channel": CHANNEL, "epoch": epoch, "offset": offset, "event_id": event_id or text, **labels}
    return json.dumps({**fields, "stored_at_us": 10 * offset, "data": "x" * size}).encode()


class Case:
    """A channel with the events a1 to a5 and then b6 to b9, and one client, which comes with `since` a1."""

    def __init__(
        self,
        kind: str = "v1",
        since: str | None = "a1",
        stores: bool = True,
        at: float = NOW,
        time: str | None = None,
        wanted: str | None = None,
        behind_max_events: int = 50_000,
    ) -> None:
        self.journal = Journal()
        self.troubles = Troubles()
        self.stored = set[str]()
        self.silent_s = 0.0
        self.connections = list[tuple[float, float]]()
        self.findings = Findings()
        for now, text in enumerate(["a1", "a2", "a3", "a4", "a5", "b6", "b7", "b8", "b9"]):
            if stores:
                self.journal.on_stored(payload(text), "run", float(now))
            else:
                event = {"event_id": text, "event_type": "t", "source": "s"}
                self.journal.on_published(CHANNEL, json.dumps(event).encode(), "run", float(now))
        truth = Truth(
            self.journal,
            self.troubles,
            is_stored=lambda accepted: accepted.event_id in self.stored,
            in_charge=lambda: "run",
            connections=lambda client: self.connections,
            silent_s=lambda hub: self.silent_s,
            told_s=5.0,
            round_s=2.0,
            beat_s=1.0,
            ping_s=5.0,
            idle_expire_s=60,
            dedupe_s=60,
            max_bytes=1000,
            behind_max_events=behind_max_events,
            clock_us=lambda: 30_000_030,
        )
        rules = StoredRules(truth, self.findings) if stores else LiveRules(truth, self.findings)
        self.oracle = Oracle(truth, rules, self.findings)
        came_with = {CHANNEL: place(since) if since else None}
        self.book = Book("client", kind, came_with.copy(), wanted)
        self.book.listener = self.oracle.on_entry
        self.note(Connected("hub", came_with, time), at=at)

    def note(self, *entries: Entry, at: float = NOW) -> None:
        for entry in entries:
            self.book.note(at, entry)

    @property
    def rules(self) -> list[str]:
        return [failure.rule for failure in self.findings.failures]


def given(*texts: str) -> list[Entry]:
    return [Given(CHANNEL, place(text), text) for text in texts]


def gap(cause: str, first: str, last: int | None, position: str) -> Entry:
    return Told(CHANNEL, cause, *place(first), last, place(position))


def welcome(at: str, recovered: bool | None) -> Entry:
    return Welcomed(CHANNEL, place(at), recovered)


def beat(at: str) -> Entry:
    return Beaten(CHANNEL, place(at))


ALL_OF_A = given("a2", "a3", "a4", "a5")
TO_B = gap("redis_restarted", "a6", None, "b5")
TWICE = "two gaps without end in one epoch"
UNKNOWN = "position_unknown"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([*ALL_OF_A, TO_B, *given("b6")], []),
        ([welcome("a1", True), *given("a2"), beat("a2")], []),
        (given("a2", "a4"), ["lost, untold"]),
        (given("a2", "a2"), ["given twice"]),
        (given("a2", "a3", "a4", "a3"), ["given twice"]),
        ([*given("a2", "a3", "a4"), Given(CHANNEL, place("a1"), "a1")], ["out of order"]),
        (given("a2", "b6"), ["another epoch, untold"]),
        ([*ALL_OF_A, *given("a6")], ["never accepted"]),
        ([gap("expired", "a2", 3, "a3"), *given("a4")], ["expired, but never left the log"]),
        ([*ALL_OF_A, gap("expired", "a6", 7, "a7")], ["expired, but was never accepted"]),
        ([*given("a2"), gap("redis_restarted", "a3", None, "a4")], ["no epoch has begun between"]),
        ([*given("a2"), gap("redis_restarted", "a3", None, "x4")], ["a gap to nowhere"]),
        ([*given("a2"), gap("redis_restarted", "a3", None, "b99")], ["a gap to nowhere"]),
        ([*ALL_OF_A, TO_B, TO_B], ["another epoch, untold", TWICE]),
        ([*given("a2"), gap("expired", "a2", 2, "a2")], ["told from before its place", "told although given"]),
        ([*given("a2"), gap("refused", "a3", 3, "a3")], ["refused, but sound"]),
        ([*given("a2"), gap("redis_link_lost", "a3", 3, "a3")], ["redis_link_lost although there is history"]),
        ([*given("a2"), gap("unexplained", "a3", 3, "a3")], ["unexplained"]),
        ([Told(CHANNEL, "expired", None, None, None, None)], ["a gap without numbers"]),
        ([beat("a3")], ["lost, untold"]),
        ([Beaten(CHANNEL, None)], ["a heartbeat without a position"]),
        ([welcome("a1", False), *given("a2")], ["recovered false, and no gap first"]),
        ([welcome("a1", False), beat("a1"), gap("redis_restarted", "a2", None, "b5")], []),
        ([welcome("a1", False), beat("a5")], ["recovered false, and no gap first", "lost, untold"]),
        ([welcome("a2", True)], ["recovered, but elsewhere"]),
        ([welcome("a1", None)], ["since without recovered"]),
        ([gap(UNKNOWN, "a2", None, "b9")], ["position_unknown, but it was given"]),
        ([gap(UNKNOWN, "a3", None, "b9")], ["lost, untold", "position_unknown, but not its since"]),
        ([Given(CHANNEL, None, "a2")], ["an event without a position"]),
    ],
)  # fmt: skip
def test_a_broken_promise_is_found(entries: list[Entry], expected: list[str]) -> None:
    case = Case()
    case.note(*entries)
    assert case.rules == expected


@pytest.mark.parametrize(
    ("most", "is_back", "excused"), [(10, True, True), (10, False, False), (999, True, False)]
)
def test_what_has_waited_for_redis_may_be_more_than_a_hub_keeps(most: int, is_back: bool, excused: bool) -> None:
    """All of it comes at once; nothing else is more."""
    case = Case(behind_max_events=most)
    if is_back:
        case.troubles.note("redis_kill", ["redis"], NOW - 5, NOW - 1)
    case.note(gap("shed", "a2", 3, "a3"))
    assert ("shed for one that is not slow" in case.rules) == (not excused)


def test_a_position_beyond_the_head_is_unknown() -> None:
    case = Case(since="b99")
    case.note(welcome("b99", False), gap(UNKNOWN, "b100", None, "b9"))
    assert case.rules == []


def test_a_position_of_a_memory_that_is_gone_may_be_unknown() -> None:
    case = Case(since="a4")
    case.journal.losses.append(Loss(10.0, {CHANNEL: (EPOCHS["a"], 3)}))
    case.note(welcome("a4", False), gap(UNKNOWN, "a5", None, "a3"))
    assert case.rules == []


@pytest.mark.parametrize(("kind", "expected"), [("Subscriber", []), ("v1", ["not its since"])])
def test_a_subscriber_comes_again_with_the_place_to_which_a_heartbeat_has_brought_it(
    kind: str, expected: list[str]
) -> None:
    """Of events that its filter leaves out it has seen nothing else."""
    case = Case(kind=kind, since=None, wanted="other")
    case.journal.losses.append(Loss(10.0, {CHANNEL: (EPOCHS["a"], 2)}))
    case.note(welcome("a1", None), gap(UNKNOWN, "a5", None, "a2"))
    assert case.rules == [f"position_unknown, but {rule}" for rule in expected]


def test_an_unknown_position_is_no_reason_to_lose_what_lies_after_the_head() -> None:
    case = Case(since="b7")
    case.note(welcome("b7", False), gap(UNKNOWN, "b8", None, "b9"))
    assert case.rules == ["position_unknown, but it was given", "position_unknown, but the channel is further"]


@pytest.mark.parametrize(("kind", "expected"), [("v1", []), ("Subscriber", ["given again, in another epoch"])])
def test_between_two_masters_a_client_goes_back_and_forth(kind: str, expected: list[str]) -> None:
    """A hub of the old one knows nothing of the new one: what came from that may come again, by another hub."""
    case = Case(kind=kind, since="a5")
    case.troubles.note("redis_split", ["redis"], 5.0, NOW + 5)
    case.note(TO_B, *given("b6"))
    if kind == "v1":  # a `Subscriber` connects again by itself
        case.note(Connected("old", {CHANNEL: place("b6")}))
    case.note(gap(UNKNOWN, "b7", None, "a5"), TO_B, *given("b6", "b7"))
    assert case.rules == expected


def test_who_goes_back_is_given_nothing_twice_of_where_it_stands() -> None:
    case = Case()
    case.troubles.note("redis_split", ["redis"], 5.0, NOW + 5)
    case.note(*ALL_OF_A, TO_B, *given("b6"))
    case.note(Connected("old", {CHANNEL: place("b6")}), welcome("a5", False), gap(UNKNOWN, "b7", None, "a5"))
    case.note(*given("a5"))
    assert case.rules == ["given twice"]


@pytest.mark.parametrize(("again", "expected"), [(["a4", "a5"], []), (["a3"], ["given twice"])])
def test_who_goes_back_within_an_epoch_may_be_given_the_rest_of_it_again(
    again: list[str], expected: list[str]
) -> None:
    case = Case()
    case.journal.losses.append(Loss(10.0, {CHANNEL: (EPOCHS["a"], 3)}))
    case.note(*ALL_OF_A, Connected("hub", {CHANNEL: place("a5")}))
    case.note(welcome("a5", False), gap(UNKNOWN, "a6", None, "a3"), *given(*again))
    assert case.rules == expected


def test_what_has_left_the_log_may_be_told_as_expired() -> None:
    case = Case()
    case.journal.on_removed([((n, 0), [b"e", payload(f"a{n}")]) for n in (2, 3)], 10.0)
    case.note(gap("expired", "a2", 3, "a3"), *given("a4"))
    assert case.rules == []


def test_what_is_back_in_the_log_must_not_be_told_as_expired() -> None:
    case = Case()
    case.journal.on_removed([((2, 0), [b"e", payload("a2")])], 3.0)
    case.stored = {"a2"}
    case.note(gap("expired", "a2", 2, "a2"))
    assert case.rules == ["expired, but it is stored"]


@pytest.mark.parametrize("stored", ["a3", "b6"])
def test_what_is_stored_must_be_given_and_not_told(stored: str) -> None:
    case = Case()
    case.stored = {stored}
    case.note(*given("a2"), gap("redis_restarted", "a3", None, "b6"))
    assert case.rules == ["told, but it could be given"]


def test_who_is_with_a_master_that_was_left_knows_nothing_of_what_the_new_one_takes() -> None:
    case = Case()
    case.stored = {"b6"}
    case.troubles.note("redis_split", ["redis"], 4.5, NOW - 0.5)
    case.note(*ALL_OF_A, gap("redis_restarted", "a6", None, "b6"))
    assert case.rules == []


def test_what_is_too_large_may_be_refused() -> None:
    case = Case(since="b9")
    case.journal.on_stored(payload("b10", size=2000), "run", 9.0)
    case.note(gap("refused", "b10", 10, "b10"))
    assert case.rules == []


@pytest.mark.parametrize("told_again", [True, False])
def test_another_event_at_a_position_must_be_told(told_again: bool) -> None:
    """Memory was set back, and somebody who had seen nothing of it has published."""
    case = Case(since="b5", at=5.0)
    case.note(*given("b6", "b7", "b8", "b9"), at=9.0)
    case.journal.on_stored(payload("b9", "other"), "run", 10.0)
    if told_again:
        case.journal.on_stored(payload("x10"), "run", 11.0)
        case.note(gap("redis_restarted", "b10", None, "x9"), *given("x10"))
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == ([] if told_again else ["another event at its position, untold"])


@pytest.mark.parametrize(
    ("thaws_at", "killed_at", "excused"), [(11.0, 12.0, True), (11.0, 14.5, False), (15.0, 14.5, True)]
)
def test_a_hub_that_ends_before_it_can_notice_takes_along_what_it_has_seen(
    thaws_at: float, killed_at: float, excused: bool
) -> None:
    case = Case(since="b5", at=5.0)
    case.note(*given("b6", "b7", "b8", "b9"), at=9.0)
    case.journal.on_stored(payload("b9", "other"), "run", 10.0)
    case.troubles.note("hub_freeze", ["hub"], 9.5, thaws_at)
    case.troubles.note("hub_kill", ["hub"], killed_at, killed_at)
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == ([] if excused else ["another event at its position, untold"])


def test_who_lacks_the_last_event_is_not_caught_up_at_the_end() -> None:
    case = Case()
    case.note(*ALL_OF_A)
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == ["not caught up at the end"]


@pytest.mark.parametrize(("at", "expected"), [(8.5, []), (7.5, ["not caught up at the end"])])
def test_who_was_not_welcomed_before_the_last_event_begins_behind_it(at: float, expected: list[str]) -> None:
    case = Case(kind="Subscriber", since=None, at=7.0)
    case.note(Beaten(CHANNEL, place("b8"), is_claim=False), at=at)
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == expected


@pytest.mark.parametrize(
    ("kind", "lasted_s", "event_at", "ended_at", "expected"),
    [
        ("Subscriber", 0.5, None, NOW - 6.0, []),
        ("Subscriber", 0.5, None, NOW - 9.5, ["not caught up at the end", "blind at the end"]),
        ("Subscriber", 0.5, 12.0, NOW - 6.0, ["not caught up at the end", "blind at the end"]),
        ("Subscriber", 5.0, None, NOW - 6.0, ["not caught up at the end", "blind at the end"]),
        ("v1", 0.5, None, NOW - 6.0, ["not caught up at the end", "blind at the end"]),
    ],
)  # fmt: skip
def test_a_subscriber_whose_connections_were_in_vain_may_wait_before_the_next_one(
    kind: str, lasted_s: float, event_at: float | None, ended_at: float, expected: list[str]
) -> None:
    case = Case(kind=kind, since="a1", at=1.0)
    case.troubles.note("hub_drain", ["hub"], 2.0, NOW - 6)
    for end in (ended_at - 8, ended_at - 2, ended_at):
        case.connections.append((end - lasted_s, end))
    if event_at is not None:
        case.connections[1] = event_at, event_at
        case.note(*given("a2"), at=event_at)
    case.note(Blind(True), at=NOW - 5)
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == expected


def test_an_epoch_is_not_named_before_the_one_that_redis_knew() -> None:
    case = Case()
    case.journal.on_epoch(CHANNEL, "T000000000000000", 9, 10.0, before=EPOCHS["b"])
    case.oracle.at_the_end([], {}, 8.0, NOW)
    assert case.rules == ["an epoch named before another one"]


def test_what_is_sent_again_is_not_stored_again() -> None:
    case = Case()
    case.journal.on_stored(payload("b10", "b9"), "run", 12.0)
    case.oracle.at_the_end([], {}, 8.0, NOW)
    assert case.rules == ["stored twice"]


def test_what_was_forgotten_may_be_stored_again_and_a_subscriber_drops_it() -> None:
    case = Case(kind="Subscriber", since="b8")
    case.troubles.note("redis_evict", ["redis"], 10.0, 10.0)
    case.journal.on_stored(payload("b10", "b9"), "run", 12.0)
    case.note(*given("b9"), Given(CHANNEL, place("b10"), "b9"))
    case.oracle.at_the_end([], {}, 8.0, NOW)
    assert case.rules == ["given again, in another epoch"]


# Heartbeats, and being blind


def test_who_gets_heartbeats_has_what_redis_had_a_while_ago() -> None:
    case = Case(since="b7")
    case.note(welcome("b7", True), at=9.0)
    case.note(beat("b7"))
    assert case.rules == ["a heartbeat although blind"]


@pytest.mark.parametrize(("at", "expected"), [(13.9, []), (NOW, ["a heartbeat although blind"])])
def test_what_a_slow_redis_proves_is_older(at: float, expected: list[str]) -> None:
    case = Case(since="b7", at=1.0)
    case.troubles.note("redis_slow", ["redis"], 7.0, NOW)
    case.note(welcome("b7", True), at=1.0)
    case.note(beat("b7"), at=at)
    assert case.rules == expected


def test_who_has_just_been_welcomed_catches_up() -> None:
    case = Case(since="b7")
    case.note(welcome("b7", True), at=NOW - 1)
    case.note(beat("b7"))
    assert case.rules == []


def test_a_hub_without_redis_sends_no_heartbeats() -> None:
    case = Case(since="b9")
    case.silent_s = 6.0
    case.note(welcome("b9", True), beat("b9"))
    assert case.rules == ["a heartbeat without Redis"]


@pytest.mark.parametrize(("kind", "expected"), [("redis_freeze", []), ("", ["stale without a cause"])])
def test_nobody_is_stale_without_a_cause(kind: str, expected: list[str]) -> None:
    case = Case()
    if kind:
        case.troubles.note(kind, ["redis"], NOW - 4, NOW - 1)
    case.note(Blind(True))
    assert case.rules == expected


def test_who_is_stale_and_fresh_again_has_said_both() -> None:
    case = Case(kind="Subscriber")
    case.troubles.note("redis_freeze", ["redis"], NOW - 4, NOW - 1)
    case.note(Blind(True), Blind(False))
    assert case.rules == []
    case.note(Blind(False))
    assert case.rules == ["fresh, but it was not stale"]
    case.note(Blind(True), Blind(True))
    assert case.rules[1:] == ["stale twice"]
    case.note(Connected("hub", {CHANNEL: None}), Blind(False))
    assert case.rules[2:] == ["fresh, but it was not stale"]


def test_who_hears_of_one_channel_hears_of_the_others() -> None:
    case = Case(since="b9")
    case.book.channels["d"] = None
    case.note(Connected("hub", {CHANNEL: place("b9"), "d": None}), at=9.0)
    case.note(welcome("b9", True), at=9.0)
    case.note(beat("b9"))
    assert case.rules == ["no word of a channel"]


# Connections


@pytest.mark.parametrize(
    ("entry", "kind", "part", "excused"),
    [
        (Closed(4008, ""), "throttle", ["client", "hub"], True),
        (Closed(4008, ""), "redis_restart", ["redis"], False),
        (Closed(4010, ""), "redis_deny", ["redis", CHANNEL], True),
        (Closed(4010, ""), "redis_deny", ["redis", EVERY_CHANNEL], True),
        (Closed(4010, ""), "redis_deny", ["redis", "another channel"], False),
        (Closed(4010, ""), "redis_restart", ["redis"], False),
        (Closed(1011, ""), "black_hole", ["client", "hub"], True),
        (Closed(1011, ""), "redis_freeze", ["redis"], False),
        (Closed(1012, ""), "hub_drain", ["hub"], True),
        (Closed(1012, ""), "hub_freeze", ["hub"], False),
        (Closed(1006, ""), "cut", ["client", "hub"], True),
        (Closed(1006, ""), "cut", ["hub", "redis"], False),
        (Closed(1000, ""), "cut", ["client", "hub"], False),
        (Refused(0), "hub_kill", ["hub"], True),
        (Refused(0), "hub_kill", ["another hub"], False),
        (Refused(503), "hub_drain", ["hub"], True),
        (Refused(503), "redis_restart", ["redis"], False),
        (Refused(400), "hub_drain", ["hub"], False),
        (Told(CHANNEL, "shed", *place("a2"), 2, place("a2")), "throttle", ["client", "hub"], True),
        (Told(CHANNEL, "shed", *place("a2"), 2, place("a2")), "redis_freeze", ["redis"], False),
    ],
)  # fmt: skip
def test_the_end_of_a_connection_has_its_cause(entry: Entry, kind: str, part: list[str], excused: bool) -> None:
    case = Case()
    case.troubles.note(kind, part, NOW - 2, NOW - 1)
    case.note(entry)
    assert (case.rules == []) is excused
    assert len(case.rules) < 2


@pytest.mark.parametrize(
    ("texts", "stored", "excused"),
    [
        (["a2", "a3", "a4", "a5"], (), True),  # b has begun
        (["a2"], (), True),  # a3 is gone
        (["a2"], ("a3", "a4", "a5"), False),
        (["a2"], ("a3",), False),  # a3 should have been given first
    ],
)
def test_a_plain_client_is_closed_right_before_what_cannot_be_given(
    texts: list[str], stored: tuple[str, ...], excused: bool
) -> None:
    case = Case(kind="plain")
    case.stored = set(stored)
    case.note(*given(*texts), Closed(4009, ""))
    assert case.rules == ([] if excused else ["4009 without a cause"])


def test_nobody_else_is_closed_so() -> None:
    case = Case()
    case.note(*ALL_OF_A, Closed(4009, ""))
    assert case.rules == ["4009 for a client with gaps"]


# Where events are not stored


def live(*texts: str) -> list[Entry]:
    return [Given(CHANNEL, None, text) for text in texts]


LINK_LOST = Told(CHANNEL, "redis_link_lost", None, None, None, None)
CAME_AGAIN = Connected("hub", {CHANNEL: None})
LIVE = Welcomed(CHANNEL, None, None)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([LIVE, *live("a1", "a2", "a3")], []),
        ([LIVE, *live("a3", "a4")], []),
        (live("a1", "a3"), ["lost, untold"]),
        ([*live("a1"), CAME_AGAIN, LIVE, *live("a3")], []),
        (live("a1", "a1"), ["given twice"]),
        (live("a2", "a1"), ["out of order"]),
        (live("z1"), ["never published"]),
        ([*live("a1"), LINK_LOST, *live("a3")], ["redis_link_lost without a cause"]),
        ([Given(CHANNEL, place("a1"), "a1")], ["a position without history"]),
        ([Welcomed(CHANNEL, None, True)], ["recovered without history"]),
        ([gap("expired", "a2", 2, "a2")], ["a gap with numbers, without history", "expired without a cause"]),
        ([*live("a1"), Beaten(CHANNEL, None)], ["a heartbeat although blind"]),
    ],
)  # fmt: skip
def test_without_history_a_loss_is_told_too(entries: list[Entry], expected: list[str]) -> None:
    case = Case(since=None, stores=False)
    case.note(*entries)
    assert case.rules == expected


@pytest.mark.parametrize(("told_at", "expected"), [(9.0, []), (7.5, ["not live at the end"])])
def test_without_history_who_is_told_after_the_last_event_need_not_have_it(
    told_at: float, expected: list[str]
) -> None:
    case = Case(since=None, stores=False, at=5.0)
    case.troubles.note("cut", ["hub", "redis"], 5.0, 6.0)
    case.note(LIVE, *live("a1"), at=5.5)
    case.note(LINK_LOST, at=told_at)
    case.oracle.at_the_end([case.book], {"": {CHANNEL: "b9"}}, 8.0, NOW)
    assert case.rules == expected


def test_without_history_a_lost_link_is_a_cause() -> None:
    case = Case(since=None, stores=False)
    case.troubles.note("cut", ["hub", "redis"], NOW - 5, NOW - 4)
    case.note(*live("a1"), LINK_LOST, *live("a3"))
    assert case.rules == []


# Those that ask by time: each event was stored at ten times its offset, in microseconds

TOO_LATE = "asked by time, and begins too late"
GONE = Told(CHANNEL, "expired", place("a2").epoch, None, 2, place("a2"))


@pytest.mark.parametrize(
    ("time", "entries", "expected"),
    [
        ("all", [welcome("a0", True), *given("a1")], []),
        ("all", [welcome("a1", True)], [TOO_LATE]),
        (instant(30), [welcome("a2", True)], []),
        (instant(30), [welcome("a1", True)], []),
        (instant(30), [welcome("a3", True)], [TOO_LATE]),
        (instant(31), [welcome("a3", True)], []),
        ("30s", [welcome("a2", True)], []),
        ("30s", [welcome("a3", True)], [TOO_LATE]),
        (instant(30), given("a3", "a4"), []),
        (instant(30), given("a4"), [TOO_LATE]),
        (instant(30), [welcome("a2", None)], ["a time without recovered"]),
        ("all", [welcome("a2", False), *given("a3")], ["recovered false, and no gap first", TOO_LATE]),
        ("all", [welcome("a2", False), GONE, *given("a3")], [TOO_LATE]),
        (instant(30), [welcome("a2", False), GONE, *given("a3")], []),
        (
            instant(30),
            [Told(CHANNEL, "refused", place("a2").epoch, None, 2, place("a2"))],
            ["a gap without numbers"],
        ),
        (
            instant(30),
            [Told(CHANNEL, "expired", place("a2").epoch, None, 3, place("a2"))],
            ["a gap's position is not its end"],
        ),
        (instant(30), [GONE, GONE], ["a gap without numbers"]),
    ],
)
def test_who_asks_by_time_gets_all_that_was_stored_then_or_later(
    time: str, entries: list[Entry], expected: list[str]
) -> None:
    """As far as it is still there; not more than that is judged."""
    case = Case(since=None, time=time)
    case.stored |= {"a1", "a2", "a3", "a4", "a5"}
    case.journal.removed[CHANNEL, *place("a0")] = 1.0
    case.note(*entries)
    assert case.rules == expected


def test_what_is_no_longer_there_cannot_be_given_to_who_asks_by_time() -> None:
    """And it is told that something is gone only if something is."""
    case = Case(since=None, time="all")
    case.stored |= {"a3", "a4", "a5"}
    case.note(welcome("a2", False), GONE, *given("a3"))
    assert case.rules == ["expired, but nothing has left the log"]


def test_what_was_lost_with_all_that_was_before_it_may_be_called_expired() -> None:
    """Nobody can tell the two apart."""
    case = Case()
    case.journal.losses.append(Loss(5.5, {}))
    case.note(gap("expired", "a2", 3, "a3"), *given("a4"))
    assert case.rules == []

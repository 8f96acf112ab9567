"""The script that stores and publishes in one step, on a real Redis, and what its replies mean.

Two rules hold through every fault here: a position is given to one event only, and an event that was published
can be found again until it is trimmed or its channel is given a new epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core import event
from broadcaster.core.errors import RedisErrorReply, RedisUnavailable
from broadcaster.core.position import Head, Position, is_timed
from broadcaster.core.runtime import Clock, Runtime
from broadcaster.redis import stream
from broadcaster.redis.commands import server_info
from broadcaster.redis.connection import RUN_ID, Command
from broadcaster.redis.server import RedisServer
from broadcaster.redis.stream import Stored
from broadcaster.settings import HistoryTable
from tests.support import (
    RedisClient,
    connections_taken,
    event_payload,
    eventually,
    free_port,
    next_message,
    redis_client,
    stored_events,
    unstamped,
)

CHANNEL = "events.critical"
META, LOG = f"{{{CHANNEL}}}:meta", f"{{{CHANNEL}}}:log"
IDS = f"{{{CHANNEL}}}:id:odd", f"{{{CHANNEL}}}:id:even"
TABLE = HistoryTable()


@pytest.fixture(scope="module")
def steady_redis() -> Iterator[RedisServer]:
    """A Redis whose data the tests of this file change, but not itself."""
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


@pytest.fixture
def client(steady_redis: RedisServer) -> Iterator[RedisClient]:
    """A client of that Redis, which is empty but for the script."""
    with ready(steady_redis) as connected:
        connected.command("FLUSHALL")
        yield connected


@contextlib.contextmanager
def ready(server: RedisServer) -> Iterator[RedisClient]:
    """A client of a Redis that has the script."""
    with redis_client(server) as client:
        assert client.command(*stream.LOAD).decode() == stream.SHA
        assert client.command(*stream.LOAD_PAGE).decode() == stream.PAGE_SHA
        yield client


def run_id_of(client: RedisClient) -> str:
    return server_info(client.command("INFO", "server"))["run_id"]


def say(client: RedisClient, command: Command) -> Any:
    """Send a command with the run_id of this Redis in its place; what it answers, errors included."""
    return client.command(*(run_id_of(client) if word is RUN_ID else word for word in command))


def ask(client: RedisClient, command: Command) -> Any:
    """`say`, where an error is a failure of the test."""
    reply = say(client, command)
    assert not isinstance(reply, Exception), reply
    return reply


def payload_of(event_id: str) -> bytes:
    return b'{"event_id":"%b"}' % event_id.encode()


def batch(ids: str) -> list[tuple[str, bytes]]:
    """One event for each word."""
    return [(event_id, payload_of(event_id)) for event_id in ids.split()]


def store(client: RedisClient, ids: str, channel: str = CHANNEL, table: HistoryTable = TABLE) -> list[Stored]:
    """Store one event for each word, in one step."""
    return stream.read_stored(ask(client, stream.store(channel, batch(ids), table)))


def positions(client: RedisClient, ids: str) -> list[Position]:
    """`store`, of events that are new: where they are."""
    stored = store(client, ids)
    assert all(one.receivers is not None for one in stored), f"they were there before: {stored}"
    return [one.position for one in stored if one.position is not None]


def look(client: RedisClient, channel: str = CHANNEL) -> Head:
    return stream.read_head(ask(client, stream.ensure_epoch(channel, TABLE)))


def log_of(client: RedisClient, channel: str = CHANNEL) -> list[tuple[int, bytes]]:
    """Offset and payload of everything that is stored."""
    return stream.read_page(ask(client, stream.page(channel, 0, 1_000_000, 2**30)))[0]


def ids_of(client: RedisClient) -> str:
    """The ids of everything that is stored, in order."""
    return " ".join(json.loads(payload)["event_id"] for _, payload in log_of(client))


@contextlib.contextmanager
def ear(server: RedisServer, channel: str = CHANNEL) -> Iterator[Callable[[], list[bytes]]]:
    """Somebody who listens to a channel; calling what is given returns what has been heard since the last call."""
    with redis_client(server) as listener, redis_client(server) as other:
        listener.command("SUBSCRIBE", channel)

        def heard() -> list[bytes]:
            other.publish(b"until here", channel)
            return list(iter(lambda: next_message(listener), b"until here"))

        yield heard


def place_of(payload: bytes) -> Position:
    fields = json.loads(payload)
    return Position(fields["epoch"], fields["offset"])


def assert_no_position_twice(payloads: list[bytes]) -> None:
    """Of all that was ever published no two different events have the same position."""
    places: dict[Position, str] = {}
    for payload in payloads:
        event_id = json.loads(payload)["event_id"]
        assert places.setdefault(place_of(payload), event_id) == event_id, f"twice: {place_of(payload)}"


# Storing


def test_positions_count_up(client: RedisClient) -> None:
    """Within an epoch offsets begin with 1 and rise by one, over batches of any size."""
    places = [*positions(client, "a"), *positions(client, "b c d"), *positions(client, "e f")]
    assert [place.offset for place in places] == [1, 2, 3, 4, 5, 6]
    assert len({place.epoch for place in places}) == 1
    assert ids_of(client) == "a b c d e f"
    assert look(client) == Head((Position(places[0].epoch, 1),), 6)
    assert look(client).position == places[-1]


def test_channels_count_for_themselves(client: RedisClient) -> None:
    """Each channel has its own epoch, offsets and ids."""
    [[first], [second]] = [store(client, "a", channel) for channel in ("one", "two")]
    assert first.position is not None
    assert second.position is not None
    assert (first.position.offset, second.position.offset) == (1, 1)
    assert first.position.epoch != second.position.epoch
    assert second.receivers == 0, "the id of another channel was taken for a retry"


def test_a_batch_of_many(client: RedisClient) -> None:
    """A thousand events are stored in one step, in order."""
    ids = " ".join(f"n{number}" for number in range(1000))
    assert [place.offset for place in positions(client, ids)] == list(range(1, 1001))
    assert ids_of(client) == ids


def test_who_heard_it_is_told(steady_redis: RedisServer, client: RedisClient) -> None:
    """`receivers` is the number of Redis subscriptions that received an event; 0 is nobody."""
    assert [one.receivers for one in store(client, "a")] == [0]
    with ear(steady_redis), ear(steady_redis, "events.other"):
        assert [one.receivers for one in store(client, "b c")] == [1, 1]
        with ear(steady_redis):
            assert [one.receivers for one in store(client, "d")] == [2]


PAYLOADS: dict[str, bytes] = {
    "one field": b'{"a":1}',
    "an empty key": b'{"":0}',
    "UTF-8": '{"source":"dömäne 🔥"}'.encode(),
    "escapes": rb'{"a":"\"\\\u0000\n{\""}',
    "patterns of Lua": b'{"a":"%1 %0 %d %% %s ^.-*+?[]$()"}',
    "what looks like a place": b'{"channel":"x","epoch":"y","offset":9}',
    "no JSON at all": b'{"\0\r\n\xff\xfe',
    "as short as it can be": b'{"',
    "100 kB": b'{"a":"' + b"x" * 100_000 + b'"}',
}


@pytest.mark.parametrize("channel", [CHANNEL, "A-z_0:9.%1", "x" * 128], ids=["usual", "signs", "longest"])
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_the_place_stands_in_front_of_the_bytes(
    steady_redis: RedisServer, client: RedisClient, payload: bytes, channel: str
) -> None:
    """What is stored and published is the place and then, byte for byte, what was given."""
    with ear(steady_redis, channel) as heard:
        ask(client, stream.store(channel, [("1", b'{"first":1}'), ("2", payload)], TABLE))
        messages = heard()
    epoch = look(client, channel).position.epoch
    place = f'{{"channel":"{channel}","epoch":"{epoch}","offset":2,'.encode()
    assert unstamped(messages[1]) == place + payload[1:]
    assert log_of(client, channel) == [(1, messages[0]), (2, messages[1])]


def test_an_event_says_when_it_was_stored_by_the_clock_of_redis(client: RedisClient) -> None:
    """All events of one call have the same time, that of its beginning; a retry is answered with the first one."""
    before_us = redis_us(client)
    store(client, "a b")
    between_us = redis_us(client)
    store(client, "c a")
    after_us = redis_us(client)
    times = {name: fields["stored_at_us"] for name, fields in stored_fields(client).items()}
    assert before_us <= times["a"] == times["b"] <= between_us <= times["c"] <= after_us
    assert list(stored_fields(client)["a"])[:4] == ["channel", "epoch", "offset", "stored_at_us"]


def test_without_the_right_to_ask_for_the_time_events_do_not_say_it(
    steady_redis: RedisServer, client: RedisClient
) -> None:
    """An ACL of an earlier version goes on publishing, and the reply says so."""
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", "~*", "&*", "+@all", "-time")
    with redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"
        reply = say(weak, stream.store(CHANNEL, batch("a"), TABLE))
    assert stream.is_unstamped(reply)
    assert [one.receivers for one in stream.read_stored(reply)] == [0]
    assert "stored_at_us" not in stored_fields(client)["a"]
    assert not stream.is_unstamped(ask(client, stream.store(CHANNEL, batch("b"), TABLE)))


def rising(client: RedisClient) -> int | None:
    return stream.read_rising(say(client, stream.peek_rising(CHANNEL)))


def test_it_is_known_since_where_the_stamps_rise(steady_redis: RedisServer, client: RedisClient) -> None:
    """From the first event on; anew where the clock went back, or an event was stored by an earlier version."""
    assert rising(client) is None
    store(client, "a b")
    store(client, "c")
    store(client, "b c")  # retries store nothing
    assert rising(client) == 1
    first, last, us = client.command("HGET", META, "rising").split(b":")
    assert (first, last, int(us)) == (b"1", b"3", stored_fields(client)["c"]["stored_at_us"])
    client.command("HSET", META, "rising", b"1:3:%d" % (int(us) + 10**9))  # as if the clock had been ahead
    store(client, "d e")
    assert rising(client) == 4
    store(client, "f")
    assert rising(client) == 4
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", "~*", "resetchannels", "+@all")
    with redis_client(steady_redis) as weak:  # what is refused is not stored, and changes nothing
        assert weak.command("AUTH", "w", "p") == b"OK"
        assert isinstance(say(weak, stream.store(CHANNEL, batch("refused"), TABLE)), Exception)
    assert rising(client) == 4
    client.command("HSET", META, "offset", "7")  # as an earlier version stores one
    assert rising(client) is None
    store(client, "g")
    assert rising(client) == 8


def test_what_does_not_say_when_it_was_stored_ends_what_rises(
    steady_redis: RedisServer, client: RedisClient
) -> None:
    """Nothing is known until there are stamps again."""
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", "~*", "&*", "+@all", "-time")
    store(client, "a")
    with redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"
        say(weak, stream.store(CHANNEL, batch("b"), TABLE))
    assert rising(client) is None
    store(client, "c")
    assert rising(client) == 3


def redis_us(client: RedisClient) -> int:
    seconds, microseconds = client.command("TIME")
    return int(seconds) * 1_000_000 + int(microseconds)


def stored_fields(client: RedisClient) -> dict[str, dict[str, Any]]:
    """The fields of everything that is stored, by event_id."""
    rows = [json.loads(payload) for _, payload in log_of(client)]
    return {fields["event_id"]: fields for fields in rows}


def test_what_is_stored_is_an_event_that_knows_its_place(client: RedisClient) -> None:
    """An event that was published can be decoded as it is stored, with the position that was answered."""
    drafted = event.draft("SERVER_DOWN", "server-a", 7, data={"rack": "ü7"})
    payload = drafted.stamp(1_768_068_834_227_000)
    command = stream.store(CHANNEL, [(drafted.unpublished.event_id, payload)], TABLE)
    [stored] = stream.read_stored(ask(client, command))
    [(offset, found)] = log_of(client)
    decoded = event.decode(found)
    assert (decoded.channel, decoded.position) == (CHANNEL, stored.position)
    assert decoded.position is not None
    assert decoded.position.offset == offset
    assert (decoded.event_id, decoded.sequence) == (drafted.unpublished.event_id, 7)
    assert decoded.data == {"rack": "ü7"}


@pytest.mark.parametrize("offset", [10**14 - 2, 10**15 - 2, 2**53 - 4])
def test_large_offsets_are_written_as_digits(steady_redis: RedisServer, client: RedisClient, offset: int) -> None:
    """Beyond 10^14, where Lua would write 1e+14, and up to 2^53 - 1, every offset is exact everywhere."""
    look(client)
    client.command("HSET", META, "offset", offset)
    with ear(steady_redis) as heard:
        places = [*positions(client, "a b"), *positions(client, "c")]
        messages = heard()
    expected = [offset + 1, offset + 2, offset + 3]
    assert [place.offset for place in places] == expected
    assert [b'"offset":%d,' % number in message for number, message in zip(expected, messages, strict=True)] == [
        True
    ] * 3
    assert [number for number, _ in log_of(client)] == expected
    assert look(client).offset == expected[-1]
    assert client.command("HGET", META, "offset") == b"%d" % expected[-1]
    client.command("HSET", META, "run_id", "another")
    assert look(client).epochs[-1].offset == expected[-1] + 1
    assert [(place.offset, one.receivers) for one in store(client, "c a") if (place := one.position)] == [
        (expected[2], None),
        (expected[0], None),
    ]


# Retries


def test_a_retry_is_answered_with_the_first_position(steady_redis: RedisServer, client: RedisClient) -> None:
    """The same event once more has its first position; it is neither published nor stored again."""
    with ear(steady_redis) as heard:
        [first] = positions(client, "a")
        assert len(heard()) == 1
        for _ in range(3):
            assert store(client, "a") == [Stored(first, None)]
        assert heard() == []
    assert ids_of(client) == "a"
    assert look(client).offset == 1
    assert positions(client, "b") == [Position(first.epoch, 2)]


def test_a_retry_is_known_by_its_id_only(client: RedisClient) -> None:
    """Whatever its bytes are the second time, what was stored first stays."""
    [first] = positions(client, "a")
    again = stream.store(CHANNEL, [("a", b'{"event_id":"other"}')], TABLE)
    assert stream.read_stored(ask(client, again)) == [Stored(first, None)]
    assert ids_of(client) == "a"


RETRIES: list[tuple[str, str, str, list[int], list[bool]]] = [
    ("twice in one batch", "", "a a", [1, 1], [True, False]),
    ("again and again", "", "a b a b a", [1, 2, 1, 2, 1], [True, True, False, False, False]),
    ("before new ones", "a b", "a b c d", [1, 2, 3, 4], [False, False, True, True]),
    ("after new ones", "a b", "c d a b", [3, 4, 1, 2], [True, True, False, False]),
    ("mixed with new ones", "a b c", "d a e c f b d", [4, 1, 5, 3, 6, 2, 4], [True, False] * 3 + [False]),
    ("in another order", "a b c", "c b a", [3, 2, 1], [False] * 3),
]


@pytest.mark.parametrize(
    ("before", "ids", "offsets", "new"), [case[1:] for case in RETRIES], ids=[case[0] for case in RETRIES]
)
def test_retries_among_new_events(
    steady_redis: RedisServer, client: RedisClient, before: str, ids: str, offsets: list[int], new: list[bool]
) -> None:
    """In whatever company: an event is stored and published once, in the order of its first coming."""
    if before:
        store(client, before)
    with ear(steady_redis) as heard:
        stored = store(client, ids)
        messages = heard()
    assert [one.position.offset for one in stored if one.position] == offsets
    assert [one.receivers is not None for one in stored] == new
    expected = list(dict.fromkeys([*before.split(), *ids.split()]))
    assert ids_of(client).split() == expected
    assert [json.loads(message)["event_id"] for message in messages] == expected[len(before.split()) :]
    assert look(client).offset == len(expected)


def test_a_retry_in_a_later_epoch_has_its_old_position(client: RedisClient) -> None:
    """What was stored in an earlier epoch is answered as it was, also beside events of the new one."""
    [first] = positions(client, "a")
    client.command("HSET", META, "run_id", "another")
    old, new = store(client, "a b")
    assert old == Stored(first, None)
    assert new.position is not None
    assert new.position.epoch != first.epoch
    assert ids_of(client) == "a b"


def end_turn(client: RedisClient) -> None:
    """The turn of the hash that takes the ids is over."""
    client.command("HSET", META, "ids_until", redis_ms(client) - 1)


def redis_ms(client: RedisClient) -> int:
    seconds, microseconds = client.command("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


def kept_ids(client: RedisClient) -> list[set[str]]:
    """The ids in each of the two hashes, in the order of their names in `IDS`."""
    return [{name.decode() for name in client.command("HKEYS", key)} - {"epoch"} for key in IDS]


def test_a_retry_after_its_time_is_a_new_event(client: RedisClient) -> None:
    """An id is known to the end of the turn after its own, from `stream.dedupe_s` on; then it is dropped."""
    [first] = positions(client, "a")
    end_turn(client)
    assert store(client, "a") == [Stored(first, None)]
    positions(client, "b")
    assert store(client, "a") == [Stored(first, None)]
    end_turn(client)
    store(client, "c")
    assert sorted(map(sorted, kept_ids(client))) == [["b"], ["c"]]
    assert positions(client, "a") == [Position(first.epoch, 4)]
    assert [one.receivers for one in store(client, "b c a")] == [None] * 3


def test_a_turn_lasts_as_long_as_the_setting_says(client: RedisClient) -> None:
    """By the clock: at first all are known, and after two turns none; what is left goes by itself."""
    table = HistoryTable(dedupe_s=1)
    store(client, "a", table=table)
    assert store(client, "a", table=table)[0].receivers is None
    begun_at = time.monotonic()

    def is_forgotten() -> bool:
        store(client, "b", table=table)
        return "a" not in set().union(*kept_ids(client))

    eventually(is_forgotten, "it is still known")
    assert time.monotonic() - begun_at > 1
    eventually(lambda: not client.command("EXISTS", *IDS), "ids are there for ever")
    assert store(client, "a", table=table)[0].receivers is not None


def test_the_keys_of_a_channel_are_always_the_same(client: RedisClient) -> None:
    """All of them exist from the first event on, as long as it is in use: a cluster may move their slot."""
    for turn in range(4):
        store(client, f"a{turn} b{turn}")
        assert {key.decode() for key in client.command("KEYS", "*")} == {META, LOG, *IDS}
        assert all(2 * TABLE.dedupe_s < client.command("TTL", key) <= 3 * TABLE.dedupe_s for key in IDS)
        end_turn(client)
        look(client)
        assert client.command("EXISTS", *IDS) == 2


def test_who_looks_lets_ids_be_dropped(client: RedisClient) -> None:
    """A channel that has fallen silent has none after two turns, before they would expire; no event is lost."""
    positions(client, "a b")
    for _ in range(2):
        end_turn(client)
        head = look(client)
    assert kept_ids(client) == [set(), set()]
    assert head.offset == 2
    assert ids_of(client) == "a b"


def test_ids_are_known_over_turns_and_epochs(client: RedisClient) -> None:
    """In whatever epoch an event was stored, and whatever its hash began with: a retry has its own position."""
    places = dict[str, Position | None]()
    for number in range(6):
        places |= {f"a{number}": positions(client, f"a{number}")[0]}
        if number in (1, 3, 4):
            client.command("HSET", META, "run_id", "another")
        places |= {f"b{number}": positions(client, f"b{number}")[0]}
        if number == 2:
            end_turn(client)
        assert {event_id: store(client, event_id)[0].position for event_id in places} == places
    assert len({place.epoch for place in places.values() if place}) == 4


CLOCKS: dict[str, int] = {
    "ahead": 3_600_000,
    "behind": -3_600_000,
    "a little behind": -20_000,
    "nowhere": -(10**12),
}


class AnotherClock(Clock):
    def __init__(self, client: RedisClient, shift_ms: int) -> None:
        super().__init__()
        self._client = client
        self._shift_ms = shift_ms

    def wall_ns(self) -> int:
        return (redis_ms(self._client) + self._shift_ms) * 1_000_000


@pytest.mark.parametrize("shift_ms", CLOCKS.values(), ids=CLOCKS.keys())
def test_turns_follow_the_clock_of_redis(client: RedisClient, shift_ms: int) -> None:
    """A caller with another clock ends no turn; one that is over ends also where all callers are such."""
    runtime = Runtime(clock=AnotherClock(client, shift_ms))

    def store_there(event_id: str) -> None:
        ask(client, stream.store(CHANNEL, batch(event_id), TABLE, runtime=runtime))

    positions(client, "a")
    for number in range(3):
        store_there(f"b{number}")
    assert {"a"} | {f"b{number}" for number in range(3)} in kept_ids(client)
    client.command("HSET", META, "ids_until", redis_ms(client) - 1000 * TABLE.dedupe_s)
    store_there("c")
    assert {"c"} in kept_ids(client)


@pytest.mark.parametrize("until", ["9007199254740991", "inf", "nan", "-inf", "soon", ""])
def test_a_turn_without_a_sensible_end_begins_anew(client: RedisClient, until: str) -> None:
    """The clock of Redis was set back, or somebody wrote nonsense: no id is lost, and the turn has an end."""
    positions(client, "a")
    end_turn(client)
    positions(client, "b")
    client.command("HSET", META, "ids_until", until)
    for _ in range(2):
        assert [one.receivers for one in store(client, "a b")] == [None, None] or until == "-inf"
        left_ms = int(client.command("HGET", META, "ids_until")) - redis_ms(client)
        assert 0 < left_ms <= 1000 * TABLE.dedupe_s


@pytest.mark.parametrize("field", ["ids", "ids_until", "ids_offset"])
@pytest.mark.parametrize("value", ["", "1", "2x", "nonsense", None])
def test_ids_survive_nonsense_about_them(client: RedisClient, field: str, value: str | None) -> None:
    """What somebody has written or deleted by hand costs no id of this turn."""
    places = positions(client, "a b")
    if value is None:
        client.command("HDEL", META, field)
    else:
        client.command("HSET", META, field, value)
    assert [one.position for one in store(client, "b a")] == places[::-1]
    assert positions(client, "c") == [Position(places[0].epoch, 3)]
    assert [one.receivers for one in store(client, "a b c")] == [None] * 3


@pytest.mark.parametrize("rights", [("-time",), ("-unlink",), ("-get",), ("-time", "-unlink", "-exists", "-set")])
def test_ids_are_known_with_the_rights_of_an_earlier_version(
    steady_redis: RedisServer, client: RedisClient, rights: tuple[str, ...]
) -> None:
    """Without the right to read the clock that of the caller counts; without UNLINK they are dropped by DEL."""
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", "~*", "&*", "+@all", *rights)
    run_id = run_id_of(client)

    with redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"

        def store_there(ids: str) -> list[int | None]:
            words = [run_id if word is RUN_ID else word for word in stream.store(CHANNEL, batch(ids), TABLE)]
            return [one.receivers for one in stream.read_stored(weak.command(*words))]

        assert store_there("a a") == [0, None]
        for event_id in ("b", "c"):
            end_turn(client)
            assert store_there(f"{event_id} {event_id}") == [0, None]
        assert store_there("a") == [0]


def test_rights_on_no_more_than_the_keys_that_it_has_are_enough(
    steady_redis: RedisServer, client: RedisClient
) -> None:
    """Whether a slot moves it looks for at a fifth one: a refusal of that one is no reason to store twice."""
    keys = (f"~{key}" for key in (*IDS, META, LOG))
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", *keys, "&*", "+@all")
    with redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"
        places = positions(weak, "a b")
        again = store(weak, "a b c")
        assert [one.position for one in again[:2]] == places
        assert [one.receivers for one in again] == [None, None, 0]


# Beside publishers of an earlier version


def store_as_before(client: RedisClient, event_id: str) -> Position:
    """Store an event as a publisher of an earlier version, which has a key for each id."""
    epoch, offset = (value.decode() for value in client.command("HMGET", META, "epoch", "offset"))
    position = Position(epoch, int(offset) + 1)
    key = f"{{{CHANNEL}}}:id:{event_id}"
    assert client.command("SET", key, str(position), "NX", "EX", TABLE.dedupe_s) == b"OK"
    client.command("HSET", META, "offset", position.offset)
    client.command("XADD", LOG, f"{position.offset}-0", "e", payload_of(event_id))
    return position


def test_ids_of_an_earlier_version_are_known(client: RedisClient) -> None:
    """After an upgrade, and again whenever one of its publishers has stored beside the new ones."""
    look(client)
    client.command("HDEL", META, "ids_offset")
    old = store_as_before(client, "a")
    assert store(client, "a b a")[::2] == [Stored(old, None)] * 2
    assert store(client, "a") == [Stored(old, None)]
    another = store_as_before(client, "c")
    [between] = positions(client, "d")
    assert [one.position for one in store(client, "a b c d")] == [
        old, Position(old.epoch, 2), another, between
    ]  # fmt: skip
    assert another.offset == 3


def test_an_event_may_follow_one_of_an_earlier_version(client: RedisClient) -> None:
    """That it was stored is known by its key."""
    positions(client, "a")
    store_as_before(client, "b")
    assert isinstance(say(client, stream.store(CHANNEL, batch("d"), TABLE, after="c")), Exception)
    [stored] = stream.read_stored(ask(client, stream.store(CHANNEL, batch("d"), TABLE, after="b")))
    assert stored.position is not None
    assert stored.position.offset == 3


def test_ids_of_an_earlier_version_are_looked_for_during_one_turn(client: RedisClient) -> None:
    """They have expired by then: a key that does not exist is nothing for a script in a cluster."""

    def looks_for_keys() -> bool:
        before = calls(client, "get")
        positions(client, str(uuid.uuid4()))
        return calls(client, "get") > before

    assert not looks_for_keys(), "there was never an earlier version"
    store_as_before(client, "a")
    assert [looks_for_keys() for _ in range(3)] == [True] * 3
    mark = client.command("HGET", META, "ids_offset").decode()
    offset, _, until = mark.partition(":")
    assert 0 < int(until) - redis_ms(client) <= 1000 * TABLE.dedupe_s
    client.command("HSET", META, "ids_offset", f"{offset}:{redis_ms(client)}")
    assert [looks_for_keys() for _ in range(3)] == [False] * 3
    assert client.command("HGET", META, "ids_offset") == client.command("HGET", META, "offset")
    store_as_before(client, "b")
    assert looks_for_keys()


def calls(client: RedisClient, command: str) -> int:
    """How often a command was run, in scripts or not."""
    line = re.search(rb"cmdstat_%b:calls=(\d+)" % command.encode(), client.command("INFO", "commandstats"))
    return int(line[1]) if line else 0


# What is refused

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "a brace": b"{",
    "an empty object": b"{}",
    "a space after the brace": b'{ "a":1}',
    "a space before it": b' {"a":1}',
    "a byte order mark": b'\xef\xbb\xbf{"a":1}',
    "an array": b'["a"]',
    "text": b'"{"',
    "null": b"null",
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED.keys())
def test_a_payload_without_a_beginning_refuses_the_whole_batch(
    steady_redis: RedisServer, client: RedisClient, payload: bytes, place: int
) -> None:
    """What cannot be given a place is refused; nothing of its batch is stored, published or remembered."""
    positions(client, "before")
    events = batch("a b")
    events.insert(place, ("bad", payload))
    with ear(steady_redis) as heard:
        reply = say(client, stream.store(CHANNEL, events, TABLE))
        assert str(reply).startswith("BADEVENT")
        assert heard() == []
        assert ids_of(client) == "before"
        assert look(client).offset == 1
        assert sorted(map(sorted, kept_ids(client))) == [[], ["before"]]
        assert [place.offset for place in positions(client, "a b")] == [2, 3]


def test_a_bad_batch_into_nothing_leaves_no_event(client: RedisClient) -> None:
    """Also the very first batch of a channel, when refused, stores nothing; the next one begins with 1."""
    reply = say(client, stream.store(CHANNEL, [*batch("a"), ("bad", b"[]")], TABLE))
    assert str(reply).startswith("BADEVENT")
    assert client.command("EXISTS", LOG) == 0
    assert [place.offset for place in positions(client, "a")] == [1]


RIGHTS: dict[str, tuple[str, ...]] = {
    "publish": ("~*", "&*", "+@all", "-publish"),
    "publish or set a log back": ("~*", "&*", "+@all", "-publish", "-xsetid"),
    "publish on this channel": ("~*", "resetchannels", "&events.other", "+@all"),
    "store": ("~*", "&*", "+@all", "-xadd"),
    "remember ids": (f"~{META}", f"~{LOG}", "&*", "+@all"),
    "know ids": ("~*", "&*", "+@all", "-hmget"),
    "count": ("~*", "&*", "+@all", "-hset"),
    "run scripts": ("~*", "&*", "+@all", "-evalsha"),
    "touch these keys": ("~other", "&*", "+@all"),
}


@pytest.mark.parametrize("rules", RIGHTS.values(), ids=RIGHTS.keys())
def test_who_lacks_a_right_changes_nothing(
    steady_redis: RedisServer, client: RedisClient, rules: tuple[str, ...]
) -> None:
    """Without the right to one of the commands inside nothing is stored, and a retry is no success either."""
    before = positions(client, "before")
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", *rules)
    run_id = run_id_of(client)
    command = [run_id if word is RUN_ID else word for word in stream.store(CHANNEL, batch("a b"), TABLE)]
    with ear(steady_redis) as heard, redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"
        for _ in range(2):
            assert isinstance(weak.command(*command), Exception)
            assert ids_of(client) == "before"
            assert heard() == []
        assert positions(client, "a b") == [Position(before[0].epoch, 2), Position(before[0].epoch, 3)]
        assert len(heard()) == 2


def test_a_place_that_was_taken_back_is_not_given_twice(steady_redis: RedisServer, client: RedisClient) -> None:
    """A number whose place the log keeps is given once more; after a counter that was set back, in a new epoch."""
    epoch = positions(client, "before")[0].epoch
    client.command("ACL", "SETUSER", "w", "reset", "on", ">p", *RIGHTS["publish or set a log back"])
    with redis_client(steady_redis) as weak:
        assert weak.command("AUTH", "w", "p") == b"OK"
        for _ in range(3):
            assert isinstance(say(weak, stream.store(CHANNEL, batch("a"), TABLE)), Exception)
    assert positions(client, "a b") == [Position(epoch, 2), Position(epoch, 3)]
    assert [offset for offset, _ in stored_events(client, CHANNEL)] == [1, 2, 3]
    client.command("HSET", META, "offset", 1)
    [again] = positions(client, "c")
    assert (again.epoch > epoch, again.offset) == (True, 2)
    assert [offset for offset, _ in stored_events(client, CHANNEL)] == [2]


def test_a_redis_without_memory_stores_nothing_and_a_retry_may_help(
    steady_redis: RedisServer, client: RedisClient
) -> None:
    """It says so by a code that is not that of a missing right, and later the event is new."""
    [first] = positions(client, "a")
    client.command("CONFIG", "SET", "maxmemory", 1)
    try:
        with ear(steady_redis) as heard:
            for _ in range(2):
                reply = say(client, stream.store(CHANNEL, batch("b c"), TABLE))
                assert RedisErrorReply(str(reply)).code == "OOM"
            assert heard() == []
    finally:
        client.command("CONFIG", "SET", "maxmemory", 0)
    assert store(client, "a") == [Stored(first, None)]
    assert [place.offset for place in positions(client, "b c")] == [2, 3]


# Epochs


def test_another_redis_begins_an_epoch_and_counts_on(client: RedisClient) -> None:
    """When the run_id is another one, a new epoch begins after the last offset; both are in the list."""
    first = positions(client, "a b")[0].epoch
    client.command("HSET", META, "run_id", "another")
    [third] = positions(client, "c")
    assert third.offset == 3
    assert third.epoch != first
    assert look(client) == Head((Position(first, 1), Position(third.epoch, 3)), 3)
    assert ids_of(client) == "a b c"
    assert positions(client, "d") == [Position(third.epoch, 4)]


def test_looking_begins_an_epoch_and_stores_nothing(steady_redis: RedisServer, client: RedisClient) -> None:
    """`look` says where a channel stands, and that position is good for what comes; nothing is published."""
    with ear(steady_redis) as heard:
        head = look(client)
        assert head == Head((Position(head.position.epoch, 1),), 0)
        assert head.position.offset == 0
        assert [look(client) for _ in range(3)] == [head] * 3
        assert client.command("KEYS", "*") == [META.encode()]
        assert positions(client, "a b")[0] == Position(head.position.epoch, 1)
        client.command("HSET", META, "run_id", "another")
        after = look(client)
        assert after.epochs == (*head.epochs, Position(after.position.epoch, 3))
        assert after.offset == 2
        assert positions(client, "c") == [Position(after.position.epoch, 3)]
        assert len(heard()) == 3


LOST_FIELDS: dict[str, tuple[str, ...]] = {
    "all": ("DEL", META),
    "epoch": ("HDEL", META, "epoch"),
    "offset": ("HDEL", META, "offset"),
    "list of epochs": ("HDEL", META, "epochs"),
    "offset is a word": ("HSET", META, "offset", "many"),
    "offset is empty": ("HSET", META, "offset", ""),
}


@pytest.mark.parametrize("command", LOST_FIELDS.values(), ids=LOST_FIELDS.keys())
def test_a_channel_of_which_nothing_is_known_begins_anew(client: RedisClient, command: tuple[str, ...]) -> None:
    """Without its counter the log is dropped: a new epoch from 1, and nothing of the old one to be found."""
    old = positions(client, "a b c")[0].epoch
    client.command(*command)
    places = positions(client, "d e")
    assert [place.offset for place in places] == [1, 2]
    assert places[0].epoch != old
    assert ids_of(client) == "d e"
    assert look(client) == Head((Position(places[0].epoch, 1),), 2)


def test_a_redis_that_was_flushed_begins_anew(client: RedisClient) -> None:
    """After FLUSHALL the channel is a new one, in a new epoch."""
    old = positions(client, "a b c")[0].epoch
    client.command("FLUSHALL")
    head = look(client)
    assert head.position.epoch != old
    assert head == Head((Position(head.position.epoch, 1),), 0)


def test_a_missing_run_id_is_another_redis(client: RedisClient) -> None:
    """Nobody knows who began the epoch: a new one, counting on."""
    old = positions(client, "a b")[0].epoch
    client.command("HDEL", META, "run_id")
    [place] = positions(client, "c")
    assert (place.offset, place.epoch != old) == (3, True)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("ids", ["d", "d e f g"], ids=["one", "batch"])
def test_a_counter_that_was_set_back_gives_no_position_twice(
    steady_redis: RedisServer, client: RedisClient, offset: int, ids: str
) -> None:
    """The log knows better: it is dropped, a new epoch goes on where the counter stands."""
    with ear(steady_redis) as heard:
        old = positions(client, "a b c")[0].epoch
        client.command("HSET", META, "offset", offset)
        places = positions(client, ids)
        places += positions(client, "h")
        assert_no_position_twice(heard())
    assert [place.offset for place in places] == list(range(offset + 1, offset + 1 + len(places)))
    assert {place.epoch for place in places}.isdisjoint({old})
    assert len({place.epoch for place in places}) == 1
    assert ids_of(client) == f"{ids} h"
    assert look(client) == Head((Position(old, 1), Position(places[0].epoch, offset + 1)), places[-1].offset)


def test_a_counter_set_back_in_another_redis_begins_one_epoch(client: RedisClient) -> None:
    """An epoch that has just begun, for whatever reason, is not followed by a second one."""
    old = positions(client, "a b c")[0].epoch
    client.command("HSET", META, "offset", 1, "run_id", "another")
    [place] = positions(client, "d")
    assert look(client).epochs == (Position(old, 1), Position(place.epoch, 2))
    assert place.offset == 2


def test_a_counter_that_was_set_forward_is_followed(steady_redis: RedisServer, client: RedisClient) -> None:
    """Offsets that are left out do no harm: none is given twice."""
    with ear(steady_redis) as heard:
        positions(client, "a b")
        client.command("HSET", META, "offset", 100)
        assert [place.offset for place in positions(client, "c d")] == [101, 102]
        assert_no_position_twice(heard())
    assert ids_of(client) == "a b c d"


def test_a_foreign_entry_in_the_log_is_dropped_with_it(steady_redis: RedisServer, client: RedisClient) -> None:
    """Somebody else's XADD is ahead of the counter: new epoch, counting on, without his entry."""
    with ear(steady_redis) as heard:
        old = positions(client, "a")[0].epoch
        client.command("XADD", LOG, "*", "e", b'{"event_id":"x"}')
        [place] = positions(client, "b")
        assert_no_position_twice(heard())
    assert place.offset == 2
    assert place.epoch != old
    assert ids_of(client) == "b"


NONSENSE: list[tuple[str, str]] = [
    ("offset", "-5"),
    ("offset", "1.5"),
    ("offset", "nan"),
    ("offset", "inf"),
    ("offset", "1e300"),
    ("epoch", ""),
    ("epoch", "a-b"),
    ("epoch", "a b"),
    ("epochs", "nonsense"),
]


@pytest.mark.parametrize(("field", "value"), NONSENSE, ids=[f"{field}={value!r}" for field, value in NONSENSE])
def test_a_channel_recovers_from_nonsense_in_its_counter(
    steady_redis: RedisServer, client: RedisClient, field: str, value: str
) -> None:
    """Whatever somebody has written there by hand, the channel goes on with positions that can be read."""
    with ear(steady_redis) as heard:
        positions(client, "a b c")
        client.command("HSET", META, field, value)
        places = positions(client, "d e")
        assert all(Position.parse(str(place)) == place for place in places)
        assert look(client).position == places[-1]
        assert_no_position_twice(heard())
        assert ids_of(client).endswith("d e")


def test_no_seed_makes_an_epoch_twice() -> None:
    """A program that seeds its random numbers, at each start alike, draws other digits for them each time."""
    state = random.getstate()
    try:
        made = []
        for _ in range(2):
            random.seed(7)
            made += [stream.ensure_epoch(CHANNEL, TABLE) for _ in range(100)]
    finally:
        random.setstate(state)
    epochs = [word for command in made for word in command if isinstance(word, str) and len(word) == 6]
    assert len(epochs) == 200
    assert len(set(epochs)) > 190


def test_every_epoch_with_an_event_is_listed(client: RedisClient) -> None:
    """Oldest first, each with the first offset it may have; those of which there are no events are dropped."""
    epochs = []
    for number in range(40):
        client.command("HSET", META, "run_id", "another")
        head = look(client)
        epochs.append(Position(head.position.epoch, 2 * number + 1))
        assert head.epochs == tuple(epochs)
        positions(client, f"a{number} b{number}")
    assert [epoch for epoch, _ in epochs] == sorted({epoch for epoch, _ in epochs})
    client.command("XTRIM", LOG, "MINID", "60-0")
    client.command("HSET", META, "run_id", "another")
    assert [first for _, first in look(client).epochs] == [*range(59, 80, 2), 81]
    client.command("DEL", LOG)
    client.command("HSET", META, "run_id", "another")
    assert [first for _, first in look(client).epochs] == [81, 81], "the last one was not over yet"


def test_five_hundred_and_twelve_epochs_are_listed(client: RedisClient) -> None:
    """However often Redis is restarted, the list is bounded."""
    positions(client, "a")
    for _ in range(520):
        client.command("HSET", META, "run_id", "another")
        positions(client, f"b{_}")
    head = look(client)
    assert len(head.epochs) == 512
    assert head.epochs[-1].offset == head.offset == 521


def timed(ms: int, digits: str = "0a0b0c") -> str:
    """The name of an epoch that begins at that time."""
    alphabet = "0123456789abcdefghijklmnopqrstuv"
    return "T" + "".join(alphabet[ms >> shift & 31] for shift in range(40, -1, -5)) + digits


def test_an_epoch_is_named_by_the_time_of_redis(client: RedisClient) -> None:
    """Whatever the clock of the caller says; of two names the later one is the greater text."""
    before, after = (int(client.command("TIME")[0]) * 1000, int(client.command("TIME")[0]) * 1000 + 2000)
    name = look(client).position.epoch
    assert is_timed(name)
    assert timed(before, "000000") < name < timed(after, "ffffff")


LATER = 4_000_000_000_000  # milliseconds: in a hundred years


@pytest.mark.parametrize("seen", [timed(LATER), timed(LATER, "ffffff")])
def test_it_begins_after_whatever_was_seen(client: RedisClient, seen: str) -> None:
    """The clock of Redis may have been set back, or its memory: what its caller has seen is older all the same."""
    [first] = positions(client, "a")
    [stored] = stream.read_stored(ask(client, stream.store(CHANNEL, batch("b"), TABLE, floor=Position(seen, 7))))
    assert stored.position is not None
    assert stored.position.offset == 2, "offsets count on"
    assert timed(LATER + 1, "000000") <= stored.position.epoch <= timed(LATER + 1, "ffffff")
    client.command("HSET", META, "run_id", "another")
    assert timed(LATER + 2, "000000") <= look(client).position.epoch <= timed(LATER + 2, "ffffff")
    assert [epoch.epoch for epoch in look(client).epochs][:2] == [first.epoch, stored.position.epoch]


FLOORS: list[tuple[str, Callable[[Position], Position], bool]] = [
    ("the head", lambda head: head, False),
    ("an earlier offset", lambda head: Position(head.epoch, 0), False),
    ("a later offset", lambda head: Position(head.epoch, head.offset + 1), True),
    ("an older epoch", lambda head: Position(timed(5), 99), False),
    ("a newer epoch", lambda head: Position(timed(LATER), 0), True),
    ("an epoch of an earlier version", lambda head: Position("0a1b2c3d4e5f", 99), False),
]


@pytest.mark.parametrize(("floor", "begins"), [case[1:] for case in FLOORS], ids=[case[0] for case in FLOORS])
def test_a_redis_that_stands_before_the_floor_begins_an_epoch(
    client: RedisClient, floor: Callable[[Position], Position], begins: bool
) -> None:
    """Its memory is older than what somebody was handed out: that place must not be given again."""
    positions(client, "a b c")
    before = look(client).position
    after = stream.read_head(ask(client, stream.ensure_epoch(CHANNEL, TABLE, floor=floor(before)))).position
    assert (after.epoch != before.epoch) is begins
    assert after.offset == before.offset


def test_epochs_of_an_earlier_version_are_read(client: RedisClient) -> None:
    """They are older than those with a time, and stay in the list, which alone has their order."""
    client.command("HSET", META, "epoch", "bb22", "offset", "7", "run_id", "another", "epochs", "aa11:1 bb22:5")
    head = look(client)
    assert [*head.epochs[:2]] == [Position("aa11", 1), Position("bb22", 5)]
    assert is_timed(head.position.epoch)
    assert head.offset == 7
    client.command("HSET", META, "epoch", "bb22", "offset", "7", "epochs", "aa11:1 bb22:5")
    for known, begins in (("aa11", False), ("bb22", False), ("cc33", True)):
        floor = Position(known, 7)
        head = stream.read_head(ask(client, stream.ensure_epoch(CHANNEL, TABLE, floor=floor)))
        assert (head.position.epoch != "bb22") is begins


# What is kept


@pytest.mark.parametrize("max_events", [1, 10, 300])
def test_about_so_many_events_are_kept(client: RedisClient, max_events: int) -> None:
    """No fewer than `stream.max_events`, and at most a node of the stream (100 entries) more; the newest."""
    table = HistoryTable(max_events=max_events)
    for start in range(0, 1000, 50):
        store(client, " ".join(f"n{number}" for number in range(start, start + 50)), table=table)
        assert min(max_events, start + 50) <= client.command("XLEN", LOG) <= max_events + 100
    kept = log_of(client)
    assert [offset for offset, _ in kept] == list(range(1001 - len(kept), 1001))
    assert look(client).offset == 1000


def test_a_silent_channel_is_forgotten_but_its_counter_is_not(client: RedisClient) -> None:
    """The log expires after `stream.idle_expire_s` without an event; positions count on in the same epoch."""
    table = HistoryTable(idle_expire_s=1000)
    [first] = positions(client, "a")
    assert TABLE.idle_expire_s - 60 < client.command("TTL", LOG) <= TABLE.idle_expire_s
    client.command("EXPIRE", LOG, 5)
    store(client, "b", table=table)
    assert 940 < client.command("TTL", LOG) <= 1000
    client.command("PEXPIRE", LOG, 1)
    eventually(lambda: not client.command("EXISTS", LOG), "the log did not expire")
    assert look(client).position == Position(first.epoch, 2)
    assert positions(client, "c") == [Position(first.epoch, 3)]
    assert ids_of(client) == "c"


def test_a_name_that_was_only_asked_for_is_soon_forgotten(client: RedisClient) -> None:
    """Else thousands of names that strangers have tried would be kept for a week."""
    for table, kept_s in ((TABLE, 3600), (HistoryTable(idle_expire_s=60), 420)):
        ask(client, stream.ensure_epoch(CHANNEL, table))
        assert kept_s - 60 < client.command("TTL", META) <= kept_s
    positions(client, "a")
    assert client.command("TTL", META) > 3600


def test_positions_outlive_the_events(client: RedisClient) -> None:
    """The counter expires after 7 times `stream.idle_expire_s`; storing and looking begin that anew."""
    table = HistoryTable(idle_expire_s=1000)
    [first] = positions(client, "a")
    assert 7 * TABLE.idle_expire_s - 60 < client.command("TTL", META) <= 7 * TABLE.idle_expire_s
    for command in (
        stream.store(CHANNEL, batch("b"), table),
        stream.store(CHANNEL, batch("b"), table),
        stream.ensure_epoch(CHANNEL, table),
    ):
        client.command("EXPIRE", META, 100)
        ask(client, command)
        assert 6900 < client.command("TTL", META) <= 7000
    client.command("PEXPIRE", META, 1)
    eventually(lambda: not client.command("EXISTS", META), "the counter did not expire")
    [place] = positions(client, "c")
    assert place.offset == 1
    assert place.epoch != first.epoch
    assert ids_of(client) == "c"


def test_no_setting_is_too_long_for_redis(client: RedisClient) -> None:
    """The longest times and the largest number that settings allow are taken."""
    table = HistoryTable(max_events=10_000_000, idle_expire_s=31_536_000, dedupe_s=86_400)
    store(client, "a b", table=table)
    assert ids_of(client) == "a b"
    assert client.command("TTL", META) > 7 * 31_536_000 - 60


# Keys of another type


def test_a_counter_of_another_type_is_an_error(steady_redis: RedisServer, client: RedisClient) -> None:
    """Nothing is stored, published or overwritten while the key of the counter is somebody else's."""
    client.command("SET", META, "mine")
    with ear(steady_redis) as heard:
        for command in (stream.store(CHANNEL, batch("a"), TABLE), stream.ensure_epoch(CHANNEL, TABLE)):
            assert "WRONGTYPE" in str(say(client, command))
        assert heard() == []
    assert client.command("KEYS", "*") == [META.encode()]
    assert client.command("GET", META) == b"mine"


def test_a_log_of_another_type_is_an_error(steady_redis: RedisServer, client: RedisClient) -> None:
    """What is somebody else's key is not overwritten: nothing is stored or published until it is gone."""
    [first] = positions(client, "a")
    client.command("DEL", LOG)
    client.command("RPUSH", LOG, "mine")
    with ear(steady_redis) as heard:
        for _ in range(2):
            assert "WRONGTYPE" in str(say(client, stream.store(CHANNEL, batch("b c"), TABLE)))
        assert heard() == []
        assert client.command("LRANGE", LOG, 0, -1) == [b"mine"]
        client.command("DEL", LOG)
        assert positions(client, "b c") == [Position(first.epoch, 2), Position(first.epoch, 3)]
        assert len(heard()) == 2
    assert ids_of(client) == "b c"


def test_a_position_is_that_of_its_event_also_where_the_ids_were_evicted(client: RedisClient) -> None:
    """What is stored after that says in which epoch: a retry in a later one is answered the same position."""
    positions(client, "a")
    taken = next(key for key in IDS if client.command("HEXISTS", key, "a"))
    client.command("DEL", taken)
    [first] = positions(client, "b")
    client.command("HSET", META, "run_id", "another")
    [later] = positions(client, "c")
    assert later.epoch > first.epoch
    [again] = store(client, "b")
    assert (again.position, again.receivers) == (first, None)


@pytest.mark.parametrize("key", IDS)
def test_ids_of_another_type_lose_nothing(steady_redis: RedisServer, client: RedisClient, key: str) -> None:
    """What is somebody else's key is not overwritten: nothing is stored or published until it is gone."""
    [first] = positions(client, "a")
    client.command("DEL", key)
    client.command("RPUSH", key, "mine")
    with ear(steady_redis) as heard:
        for _ in range(2):
            assert "WRONGTYPE" in str(say(client, stream.store(CHANNEL, batch("b c"), TABLE)))
            end_turn(client)
        assert heard() == []
        assert client.command("LRANGE", key, 0, -1) == [b"mine"]
        client.command("DEL", key)
        assert positions(client, "b c") == [Position(first.epoch, 2), Position(first.epoch, 3)]
    assert ids_of(client) == "a b c"


def test_a_key_of_an_earlier_version_of_another_type_loses_nothing(
    steady_redis: RedisServer, client: RedisClient
) -> None:
    """A batch with such an id is stored whole or not at all, and what was published before and with it stays."""
    before = positions(client, "a")
    store_as_before(client, "old")
    client.command("RPUSH", f"{{{CHANNEL}}}:id:bad", "mine")
    with ear(steady_redis) as heard:
        say(client, stream.store(CHANNEL, batch("b bad c"), TABLE))
        positions(client, "d")
        published = [json.loads(message)["event_id"] for message in heard()]
    assert ids_of(client).split() == ["a", "old", *published]
    assert look(client).epochs == (Position(before[0].epoch, 1),)


# Another process


def test_an_older_snapshot_counts_on_in_a_new_epoch(tmp_path: Path) -> None:
    """Redis comes back with what it had saved: what it has forgotten is never confused with what comes."""
    keep = ("--hz", "500", "--dir", str(tmp_path), "--dbfilename", "dump.rdb")
    messages: list[bytes] = []
    with RedisServer.start(None, *keep) as server, ready(server) as client, ear(server) as heard:
        old = positions(client, "a b c")[0].epoch
        assert client.command("SAVE") == b"OK"
        positions(client, "d e")
        messages += heard()
        server.kill()
    with RedisServer.start(server.port, *keep) as again, ready(again) as client, ear(again) as heard:
        assert ids_of(client) == "a b c"
        head = look(client)
        assert head == Head((Position(old, 1), Position(head.position.epoch, 4)), 3)
        assert head.position.epoch != old
        # Those that were forgotten are new events, one that was saved is known.
        assert positions(client, "d x") == [Position(head.position.epoch, 4), Position(head.position.epoch, 5)]
        assert store(client, "c") == [Stored(Position(old, 3), None)]
        assert_no_position_twice(messages + heard())
        assert ids_of(client) == "a b c d x"


def test_a_redis_that_comes_back_empty_begins_anew() -> None:
    """Without anything on disk: a new epoch from 1, and no position means two events."""
    messages: list[bytes] = []
    epochs = set()
    port = free_port()
    for life in range(3):
        with RedisServer.start(port, "--hz", "500") as server, ready(server) as client, ear(server) as heard:
            places = positions(client, f"a{life} b{life}")
            assert [place.offset for place in places] == [1, 2]
            epochs.add(places[0].epoch)
            messages += heard()
            server.kill()
    assert len(epochs) == 3
    assert_no_position_twice(messages)


def test_a_promoted_replica_begins_an_epoch(tmp_path: Path) -> None:
    """The replica has the log, is no place to store, and counts on in a new epoch once it is the master."""
    at_once = ("--hz", "500", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
    with (
        RedisServer.start(None, *at_once, "--dir", str(tmp_path)) as master,
        RedisServer.start(
            None, *at_once, "--dir", str(tmp_path), "--replicaof", "127.0.0.1", str(master.port)
        ) as replica,
        ready(master) as client,
        ready(replica) as other,
    ):
        old = positions(client, "a b c")[0].epoch
        eventually(lambda: ids_of(other) == "a b c", "the replica did not follow")
        for command in (stream.store(CHANNEL, batch("x"), TABLE), stream.ensure_epoch(CHANNEL, TABLE)):
            assert "READONLY" in str(say(other, command))
        assert ids_of(other) == "a b c"
        assert other.command("REPLICAOF", "NO", "ONE") == b"OK"
        head = look(other)
        assert head == Head((Position(old, 1), Position(head.position.epoch, 4)), 3)
        assert head.position.epoch != old
        [old_master], [new_master] = positions(client, "d"), positions(other, "d")
        assert old_master.offset == new_master.offset == 4
        assert old_master != new_master, "two masters have given the same position"


def test_nothing_is_kept_when_the_script_is_flushed(client: RedisClient) -> None:
    """Without the script Redis says NOSCRIPT and does nothing; loaded again, it goes on where it was."""
    [first] = positions(client, "a")
    client.command("SCRIPT", "FLUSH")
    assert str(say(client, stream.store(CHANNEL, batch("b"), TABLE))).startswith("NOSCRIPT")
    client.command(*stream.LOAD_PAGE)
    assert ids_of(client) == "a"
    client.command(*stream.LOAD)
    assert positions(client, "b") == [Position(first.epoch, 2)]


# In a cluster


@contextlib.contextmanager
def cluster(tmp_path: Path) -> Iterator[tuple[RedisClient, RedisClient]]:
    """Two nodes; the first one has the slot of the channel, and another one: without any it would be a replica."""
    with contextlib.ExitStack() as stack:
        clients = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
            server = stack.enter_context(RedisServer.start(None, *options, "--dir", str(tmp_path / name)))
            clients.append(stack.enter_context(ready(server)))
        first, second = clients
        assert first.command("CLUSTER", "ADDSLOTS", 0, slot_of(first)) == b"OK"
        assert first.command("CLUSTER", "MEET", "127.0.0.1", server.port) == b"OK"
        for client in clients:
            eventually(lambda client=client: is_whole(client), "the nodes did not meet")  # type: ignore[misc]
        yield first, second


def slot_of(client: RedisClient) -> int:
    slot: int = client.command("CLUSTER", "KEYSLOT", META)
    return slot


def is_whole(client: RedisClient) -> bool:
    """Whether a node knows the other one as a master, and that the slot is served."""
    nodes = client.command("CLUSTER", "NODES").decode().splitlines()
    masters = [flags for _, _, flags, *_ in map(str.split, nodes) if flags in ("master", "myself,master")]
    said = client.command("CLUSTER", "INFO")
    return len(masters) == 2 and b"cluster_state:ok" in said and b"slots_ok:2\r" in said


IDS = f"{{{CHANNEL}}}:id:odd", f"{{{CHANNEL}}}:id:even"


def test_a_cluster_serves_the_script_while_it_moves_the_slot(tmp_path: Path) -> None:
    """New events, retries, order, looks and the end of a turn: no key is missing, and the ids move along."""
    with cluster(tmp_path) as (first, second):
        slot, ids = slot_of(first), [client.command("CLUSTER", "MYID") for client in (first, second)]
        places = positions(first, "a b")
        assert second.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0]) == b"OK"
        assert first.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1]) == b"OK"
        for event_id in ("c", "d", "e"):
            places += positions(first, event_id)
            assert look(first).position == places[-1]
            assert [one.position for one in store(first, "a b c")] == places[:3]
            # However long it takes: what expires meanwhile could not be made again.
            assert all(first.command("TTL", key) > 10 for key in IDS)
            for key in IDS:
                first.command("EXPIRE", key, 10)
            end_turn(first)
        after = stream.store(CHANNEL, batch("f"), TABLE, after="e")
        assert [one.receivers for one in stream.read_stored(ask(first, after))] == [0]

        keys = first.command("CLUSTER", "GETKEYSINSLOT", slot, 10)
        address = first.command("CLUSTER", "NODES").decode().splitlines()
        [port] = [re.search(r":(\d+)@", line)[1] for line in address if "myself" not in line]  # type: ignore[index]
        assert first.command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys) == b"OK"
        for client in (second, first):
            assert client.command("CLUSTER", "SETSLOT", slot, "NODE", ids[1]) == b"OK"
        stored = store(second, "e a g")
        assert [one.position for one in stored[:2]] == [places[4], places[0]]
        assert stored[2].position is not None
        assert stored[2].position.offset == 7


# Reading


def glance(client: RedisClient, run_id: str) -> Position | None:
    return stream.read_peeked_head(ask(client, stream.peek_head(CHANNEL)), run_id)


def test_a_glance_says_where_a_channel_stands_and_changes_nothing(client: RedisClient) -> None:
    """None until an epoch has begun, and when it was another Redis that began it; else what `look` says."""
    run_id = run_id_of(client)
    assert len(run_id) == 40
    assert glance(client, run_id) is None
    assert client.command("DBSIZE") == 0
    assert look(client).position == glance(client, run_id)
    positions(client, "a b")
    assert glance(client, run_id) == look(client).position
    assert glance(client, "another") is None
    client.command("HSET", META, "run_id", "another")
    assert glance(client, run_id) is None
    assert client.command("HGET", META, "run_id") == b"another"


PAGES: list[tuple[int, int, list[int]]] = [
    (1, 3, [1, 2, 3]),
    (0, 3, [1, 2, 3]),
    (4, 3, [4, 5, 6]),
    (9, 3, [9, 10]),
    (10, 1, [10]),
    (11, 3, []),
    (2**53 - 1, 3, []),
    (1, 1000, list(range(1, 11))),
]


@pytest.mark.parametrize(("first", "count", "expected"), PAGES)
def test_a_page_is_so_many_events_from_an_offset_on(
    client: RedisClient, first: int, count: int, expected: list[int]
) -> None:
    """At most `count` events in order, each with its offset and bytes; none beyond the last one."""
    positions(client, "a b c d e f g h i j")
    page, complete = stream.read_page(ask(client, stream.page(CHANNEL, first, count, 10**6)))
    assert complete is (first + count > 11)
    assert [offset for offset, _ in page] == expected
    assert [place_of(payload).offset for _, payload in page] == expected


SIZES = [10, 3000, 10, 10, 900, 900, 200_000, 10, *[50] * 200, 5000]


@pytest.mark.parametrize("max_bytes", [1, 100, 1000, 4000, 10_000, 250_000, 10**6])
def test_a_page_is_bounded_by_bytes(client: RedisClient, max_bytes: int) -> None:
    """As many in order as fit, whatever their sizes, and at least one: page by page nothing is left out."""
    for number, size in enumerate(SIZES, 1):
        client.command("XADD", LOG, f"{number}-0", "e", b"x" * size)
    first, pages = 1, list[list[int]]()
    while first <= len(SIZES):
        page, complete = stream.read_page(ask(client, stream.page(CHANNEL, first, 150, max_bytes)))
        assert [len(payload) for _, payload in page] == [SIZES[offset - 1] for offset, _ in page]
        pages.append([offset for offset, _ in page])
        first = pages[-1][-1] + 1
        assert complete <= (first > len(SIZES))
    assert [offset for offsets in pages for offset in offsets] == list(range(1, len(SIZES) + 1))
    for offsets in pages:
        size, more = sum(SIZES[offset - 1] for offset in offsets), SIZES[offsets[-1] : offsets[-1] + 1]
        assert size <= max_bytes or len(offsets) == 1
        assert not more or size + more[0] > max_bytes or len(offsets) == 150


def test_a_page_says_of_which_memory_it_is(client: RedisClient) -> None:
    """A head that was told by another one is not that of the page: one of another epoch, or further on."""
    positions(client, "a b c")
    head = stream.read_head(ask(client, stream.ensure_epoch(CHANNEL, TABLE)))
    page = ask(client, stream.page(CHANNEL, 1, 10, 10**6))
    assert stream.is_of_head(page, head)
    assert stream.is_of_head(page, dataclasses.replace(head, offset=2))
    assert not stream.is_of_head(page, dataclasses.replace(head, offset=4))
    other = Position("T" + "v" * 9 + "000000", 1)
    assert not stream.is_of_head(page, dataclasses.replace(head, epochs=(*head.epochs, other)))
    client.command("HSET", META, "offset", "x")
    assert not stream.is_of_head(ask(client, stream.page(CHANNEL, 1, 10, 10**6)), head)
    client.command("DEL", META)
    assert not stream.is_of_head(ask(client, stream.page(CHANNEL, 1, 10, 10**6)), head)


def test_a_page_passes_over_what_was_trimmed_and_left_out(client: RedisClient) -> None:
    """Offsets need not follow each other: a page has what is there, of a channel without a log nothing."""
    assert stream.read_page(ask(client, stream.page(CHANNEL, 1, 10, 10**6))) == ([], True)
    positions(client, "a b c")
    client.command("XDEL", LOG, "2-0")
    client.command("HSET", META, "offset", 9)
    positions(client, "d")
    assert [offset for offset, _ in log_of(client)] == [1, 3, 10]


def test_replies_of_the_script_are_read() -> None:
    """Position and number of subscriptions per event; epochs and last offset of the channel."""
    reply = [b"a1:1 b2:451", b"452", b"b2-451", 3, b"b2-452", 0, b"a1-7", -1]
    assert stream.read_stored(reply) == [
        Stored(Position("b2", 451), 3),
        Stored(Position("b2", 452), 0),
        Stored(Position("a1", 7), None),
    ]
    assert stream.read_head(reply) == Head((Position("a1", 1), Position("b2", 451)), 452)
    assert stream.read_stored([b"a1:1", b"0"]) == []


GLANCES: list[tuple[str, list[bytes | None], str, Position | None]] = [
    ("whole", [b"a1", b"7", b"me"], "me", Position("a1", 7)),
    ("nothing yet", [b"a1", b"0", b"me"], "me", Position("a1", 0)),
    ("nothing known", [None, None, None], "me", None),
    ("another Redis", [b"a1", b"7", b"you"], "me", None),
    ("nobody began it", [b"a1", b"7", None], "me", None),
    ("nobody is asked", [b"a1", b"7", None], "", None),
    ("no epoch", [None, b"7", b"me"], "me", None),
    ("no offset", [b"a1", None, b"me"], "me", None),
    ("epoch is nonsense", [b"a-1", b"7", b"me"], "me", None),
    ("epoch is not ASCII", [b"\xff", b"7", b"me"], "me", None),
    ("offset is a word", [b"a1", b"many", b"me"], "me", None),
    ("offset is negative", [b"a1", b"-7", b"me"], "me", None),
    ("offset is a fraction", [b"a1", b"7.5", b"me"], "me", None),
    ("offset in other digits", [b"a1", "٣".encode(), b"me"], "me", None),
]


@pytest.mark.parametrize(
    ("reply", "run_id", "expected"), [case[1:] for case in GLANCES], ids=[case[0] for case in GLANCES]
)
def test_a_glance_is_read_or_nothing_is_known(
    reply: list[bytes | None], run_id: str, expected: Position | None
) -> None:
    """Only a whole counter, begun by this Redis, is a position."""
    assert stream.read_peeked_head(reply, run_id) == expected


NO_REPLIES: dict[str, object] = {
    "nothing": None,
    "a word": b"OK",
    "a number": 7,
    "an empty list": [],
    "numbers": [1, 2, 3, 4],
    "nested": [[b"a1:1"], [b"1"], [b"a1-1"], [0]],
    "nulls": [None, None, None, None],
}

NOT_STORED: dict[str, object] = NO_REPLIES | {
    "no offset": [b"a1:1"],
    "half an event": [b"a1:1", b"1", b"a1-1"],
    "position is null": [b"a1:1", b"1", None, 0],
    "position is a number": [b"a1:1", b"1", 7, 0],
    "position is nonsense": [b"a1:1", b"1", b"nonsense", 0],
    "position is not UTF-8": [b"a1:1", b"1", b"\xff-1", 0],
    "position is too large": [b"a1:1", b"1", b"a1-9007199254740992", 0],
    "heard is null": [b"a1:1", b"1", b"a1-1", None],
    "heard is text": [b"a1:1", b"1", b"a1-1", b"0"],
    "the second is wrong": [b"a1:1", b"2", b"a1-1", 0, b"", 0],
}

NO_HEADS: dict[str, object] = NO_REPLIES | {
    "no offset": [b"a1:1"],
    "no epochs": [b"", b"1"],
    "epoch without first offset": [b"a1", b"1"],
    "epoch with an empty first offset": [b"a1:", b"1"],
    "first offset is a word": [b"a1:x", b"1"],
    "one of the epochs is wrong": [b"a1:1 b2 c3:7", b"9"],
    "epoch is empty": [b":1", b"1"],
    "epoch is nonsense": [b"a_b:1", b"1"],
    "epochs are not UTF-8": [b"\xff:1", b"1"],
    "epochs are null": [None, b"1"],
    "offset is a word": [b"a1:1", b"x"],
    "offset is null": [b"a1:1", None],
}

NO_PAGES: dict[str, object] = {
    "nothing": None,
    "a word": b"OK",
    "a number": 7,
    "an empty list": [],
    "no flag": [b"1-0", b"{}"],
    "a flag alone": [1],
    "no place": [1, b"1-0", b"{}"],
    "half a place": [1, [b"a1"]],
    "a place of numbers": [1, [1, 2]],
    "numbers": [1, 2, 3, 4],
    "id only": [1, [b"a1", b"1"], b"1-0"],
    "id is nonsense": [1, [b"a1", b"1"], b"x-0", b"{}"],
    "id is null": [1, [b"a1", b"1"], None, b"{}"],
    "payload is null": [1, [b"a1", b"1"], b"1-0", None],
}

NO_GLANCES: dict[str, object] = {
    "nothing": None,
    "a number": 7,
    "an empty list": [],
    "too short": [b"a1", b"7"],
    "too long": [b"a1", b"7", b"me", b"me"],
    "numbers": [1, 7, 2],
}

WRONG_REPLIES: list[tuple[str, Callable[[Any], object], object]] = [
    (f"{reader}: {name}", read, reply)
    for reader, read, replies in (
        ("stored", stream.read_stored, NOT_STORED),
        ("head", stream.read_head, NO_HEADS),
        ("page", stream.read_page, NO_PAGES),
        ("glance", lambda reply: stream.read_peeked_head(reply, "me"), NO_GLANCES),
    )
    for name, reply in replies.items()
]


@pytest.mark.parametrize(
    ("read", "reply"), [case[1:] for case in WRONG_REPLIES], ids=[case[0] for case in WRONG_REPLIES]
)
def test_what_is_no_reply_is_redis_being_unavailable(read: Callable[[Any], object], reply: object) -> None:
    """Whatever answers there, the only exception is RedisUnavailable, with a short piece of what it said."""
    with pytest.raises(RedisUnavailable, match="unexpected answer") as caught:
        read(reply)
    assert len(str(caught.value)) < 200


def test_a_long_answer_is_told_short() -> None:
    """The complaint does not repeat megabytes."""
    for read in (stream.read_stored, stream.read_head, stream.read_page):
        with pytest.raises(RedisUnavailable) as caught:
            read([b"x" * 1_000_000, b"y", b"z"])
        assert len(str(caught.value)) < 200


# The tests' own tools


def test_the_ear_hears_what_is_published(steady_redis: RedisServer, client: RedisClient) -> None:
    """The check of positions finds a position that was given twice."""
    with ear(steady_redis) as heard:
        store(client, "a")
        client.publish(event_payload())
        assert len(heard()) == 2
        assert heard() == []
    assert connections_taken(client) > 2
    twice = [b'{"event_id":"%b","epoch":"a","offset":1}' % name for name in (b"x", b"y")]
    assert_no_position_twice([twice[0], twice[0]])
    with pytest.raises(AssertionError, match="twice: a-1"):
        assert_no_position_twice(twice)

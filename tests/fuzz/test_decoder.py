"""The readers of events, control frames and positions: whatever the bytes are, they refuse or understand."""

from __future__ import annotations

import asyncio
import json
import math
import re
import uuid
from typing import Any, Final, NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broadcaster import wire
from broadcaster.core import event
from broadcaster.core.errors import InvalidEvent
from broadcaster.core.position import MAX_OFFSET, Position, is_epoch, read_position
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, RedisTable
from tests.fuzz import fuzzed, mutated
from tests.support import (
    Hub,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    next_but_ping,
)

# An oracle, written from docs/contract.md and nothing else

RIGHT: Final = "right"

SURE_DEPTH: Final = 90
"""Levels that are always read; deeper ones may be refused as too deep."""


class Twice(ValueError):
    """A key stands twice in one object."""


def no_number(word: str) -> NoReturn:
    raise ValueError(word)


def finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(digits)
    return number


def depth_of(text: str) -> int:
    """At least as many levels as the text has, if it is JSON."""
    return text.count("[") + text.count("{")


def judge(payload: bytes) -> tuple[set[str], Any]:
    """The verdicts that are right about a payload within the size limit, and the value that it has as JSON."""
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return {"not_utf8"}, None
    deep = {"too_deep"} if depth_of(text) > SURE_DEPTH else set()
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        twice.extend(["duplicate_key"] if len(fields) < len(pairs) else [])
        assert_text([list(pair) for pair in pairs])
        return fields

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_number, parse_float=finite)
        assert_text(value)
    except RecursionError:
        return {"too_deep", "not_json"}, None
    except ValueError:
        return {"not_json", *deep}, None
    if not isinstance(value, dict):
        return {"not_object", *twice, *deep}, value
    wrong = {*twice, *([] if is_of_schema(value) else ["field"])}
    return (wrong or {RIGHT}) | deep, value


def assert_text(value: Any) -> None:
    """Raises ValueError if a string within can be no UTF-8."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for item in value:
            assert_text(item)
    elif isinstance(value, dict):
        for item in value.items():
            assert_text(list(item))


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_name(value: Any) -> bool:
    control = {*range(0x20), *range(0x7F, 0xA0)}
    return (
        isinstance(value, str) and 1 <= len(value) <= 256 and not any(ord(letter) in control for letter in value)
    )


def is_uuid(value: Any) -> bool:
    if not isinstance(value, str) or len(value) != 36 or not value.isascii():
        return False
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def is_channel(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", value) is not None


def is_of_schema(fields: dict[str, Any]) -> bool:
    place = {"channel", "epoch", "offset"} & fields.keys()
    epoch = fields.get("epoch")
    return (
        is_uuid(fields.get("event_id"))
        and is_name(fields.get("event_type"))
        and is_name(fields.get("source"))
        and is_number(fields.get("sequence"))
        and is_number(fields.get("published_at_ms"))
        and is_number(fields.get("published_at_us", 0))
        and fields.get("severity", "info") in ("critical", "warning", "info")
        and isinstance(fields.get("data", {}), dict)
        and (
            not place
            or (
                is_channel(fields.get("channel"))
                and (isinstance(epoch, str) and epoch.isascii() and epoch.isalnum() and len(epoch) <= 64)
                and (is_number(fields.get("offset")) and fields["offset"] >= 1)
            )
        )
    )


def cause_of(error: InvalidEvent) -> str:
    """Its cause, out of the fixed set; a refusal is short and of one line."""
    assert error.cause in event.CAUSES
    assert len(str(error)) < 400
    assert "\n" not in str(error)
    return error.cause


def verdict(payload: bytes, max_bytes: int = event.MAX_BYTES) -> str:
    """What the product says; any other exception than its own fails the test."""
    try:
        decoded = event.decode(payload, max_bytes=max_bytes)
        fields = event.check(payload, max_bytes=max_bytes)
    except InvalidEvent as error:
        return cause_of(error)
    assert decoded.payload == payload, "the bytes are not those that came"
    assert {name: fields[name] for name in ("event_id", "sequence", "source")} == {
        "event_id": decoded.event_id,
        "sequence": decoded.sequence,
        "source": decoded.source,
    }
    return RIGHT


def assert_agreement(payload: bytes) -> None:
    """Product and oracle say the same, and read the same value."""
    verdicts, value = judge(payload)
    said = verdict(payload)
    assert said in verdicts
    if said == RIGHT:
        assert event.check(payload) == value


# Payloads

EVENT: Final[dict[str, Any]] = {
    "event_id": "a987fbc9-4bed-4078-8f07-9141ba07c9f3",
    "event_type": "SERVER_DOWN",
    "source": "server-a",
    "sequence": 7,
    "published_at_ms": 1768068834227,
}
PLACE: Final[dict[str, Any]] = {"channel": "events.critical", "epoch": "4c6d0a1b2e3f", "offset": 7}

GOOD: Final[list[bytes]] = [
    json.dumps(EVENT).encode(),
    json.dumps(EVENT | {"severity": "info", "data": {"a": [1, {"b": "c:d"}]}}, separators=(",", ":")).encode(),
    json.dumps(PLACE | EVENT | {"published_at_us": 1768068834227000}, indent=1).encode(),
    json.dumps(EVENT | {"source": "Süd 🔥", "note": '"\\\0:{}'}, ensure_ascii=False).encode(),
]

SNIPPETS: Final[list[bytes]] = [
    *(b'"', b"\\", b'\\"', b":", b",", b"{", b"}", b"[", b"]", b" ", b"\n", b"\0", b"\x1f", b"\x7f"),
    *(b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82", b"\xef\xbb\xbf", b"\xc2\x85", "🔥".encode()),
    *(rb"\ud83d", rb"\ude00", rb"\ud83d\ude00", rb"\u0000", rb"\u0022", rb"\x", rb"\u12", rb"\/"),
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"1E2", b"1.0", b"01", b"9" * 17, b"9" * 4301, b"0." + b"1" * 400),
    *(b"null", b"true", b"[]", b"{}", b'{"a":1,"a":1}', b'"event_id":"",', b'"sequence":2,', b"[" * 40, b"]" * 40),
    *(b'"channel":"x",', b'"epoch":"e",', b'"offset":1,', b'"offset":9007199254740992,', b"/**/", b"\xe2\x80\xa8"),
]

ODD: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**53 - 1, 2**53, 2**63, 2**64, 10**30, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.sampled_from(["x" * 256, "x" * 257, "x" * 128, "x" * 129, "e" * 64, "e" * 65, "a\n", "info", "a:b", "٣"]),
)
JSON: Final = st.recursive(
    ODD,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)
NAMES: Final = [*EVENT, *PLACE, "published_at_us", "severity", "data", "note", "control", ""]


@st.composite
def written(draw: st.DrawFn) -> bytes:
    """An event with odd values in a few fields, some left out, some said twice, written in an odd way."""
    members = list((EVENT | draw(st.sampled_from([{}, PLACE]))).items())
    for _ in range(draw(st.integers(0, 3))):
        members.insert(draw(st.integers(0, len(members))), (draw(st.sampled_from(NAMES)), draw(JSON)))
    if draw(st.booleans()):
        changed = {name for name, _ in members}
        members = [(name, value) for name, value in members if draw(st.booleans()) or name not in changed]
    if draw(st.booleans()):
        members = list(dict(members).items())
    gap = draw(st.sampled_from(["", " ", "\n\t"]))
    ascii_only = draw(st.booleans())
    texts = [
        f"{json.dumps(name, ensure_ascii=ascii_only)}{gap}:{gap}{json.dumps(value, ensure_ascii=ascii_only)}"
        for name, value in members
    ]
    return f"{gap}{{{f',{gap}'.join(texts)}}}{gap}".encode("utf-8", "surrogatepass")


SPELLINGS: Final = {
    ":": [":", r"\u003a", r"\u003A"],
    "\\": [r"\\", r"\u005c", r"\u005C"],
    '"': [r"\"", r"\u0022"],
    "u": ["u", r"\u0075"],
    "0": ["0", r"\u0030"],
}
"""Some letters, and the ways to write them in a string."""
STRINGS: Final = st.lists(
    st.one_of(
        st.sampled_from([spelling for spellings in SPELLINGS.values() for spelling in spellings]),
        st.sampled_from(["003a", "003A", "{", "}", "[", "]", ",", "a", "ü", "🔥", r"\n", r"\ud83d\udd25"]),
    ),
    max_size=5,
).map(lambda letters: f'"{"".join(letters)}"')
KEYS: Final = st.sampled_from(['"a"', r'"\u0061"', '":"', r'"\u003a"', r'"\\u003a"', '""', '"b:"'])
VALUES: Final = st.recursive(
    st.one_of(STRINGS, st.sampled_from(["0", "-1.5e3", "null", "{}", "[]"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda values: f"[{','.join(values)}]"),
        st.lists(st.tuples(KEYS, inner).map(":".join), max_size=4).map(lambda members: f"{{{','.join(members)}}}"),
    ),
    max_leaves=12,
)


@fuzzed(600)
@given(
    st.lists(st.tuples(st.sampled_from(['"data"', '"x"', r'"\u0078"', '"y:"']), VALUES).map(":".join), max_size=4)
)
@example([r'"x":"\u003a"', r'"x":1'])
@example([r'"data":{"a":"\\u003a","a":1}'])
def test_a_key_that_stands_twice_is_found_however_it_and_its_neighbours_are_written(members: list[str]) -> None:
    """Colons and quotes in strings, and escapes for them, neither hide a duplicate key nor look like one."""
    assert_agreement(",".join([json.dumps(EVENT).removesuffix("}"), *members]).encode() + b"}")


@pytest.mark.parametrize("payload", GOOD, ids=["plain", "with data", "stored", "with odd text"])
def test_the_seeds_are_right(payload: bytes) -> None:
    """What is mutated below is an event, for product and oracle alike."""
    assert judge(payload)[0] == {RIGHT}
    assert_agreement(payload)


@fuzzed(120)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
def test_arbitrary_bytes_are_refused_with_a_cause(payload: bytes) -> None:
    """Noise is refused with a cause out of the fixed set, the one that an independent reading finds."""
    assert_agreement(payload)


@fuzzed(600)
@given(mutated(st.sampled_from(GOOD), SNIPPETS))
@example(GOOD[0].replace(b"7,", b"-0,"))
@example(GOOD[0].replace(b"7,", b"7e0,"))
@example(GOOD[1].replace(b'"c:d"', b'"c:d","c":1,"c":2'))
def test_a_damaged_event_is_read_as_an_independent_reader_reads_it(payload: bytes) -> None:
    """Damage is either refused, or harmless: then the value is the one that any JSON reader finds."""
    assert_agreement(payload)


@fuzzed(400)
@given(written())
def test_odd_fields_are_judged_as_the_contract_says(payload: bytes) -> None:
    """Wrong types, limits, missing and doubled fields, in every way of writing them."""
    assert_agreement(payload)


@fuzzed(120)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.booleans())
def test_what_a_producer_may_say_is_accepted(data: dict[str, Any], stored: bool) -> None:
    """Any JSON object whatever may be `data`, and comes back as it was."""
    place = PLACE if stored else {}
    payload = json.dumps(place | EVENT | {"data": data}).encode()
    if judge(payload)[0] == {RIGHT}:
        decoded = event.decode(payload)
        assert decoded.data == data
        assert decoded.payload == payload
        assert decoded.position == (Position(PLACE["epoch"], PLACE["offset"]) if stored else None)
    else:
        assert verdict(payload) != RIGHT


@pytest.mark.parametrize("name", [*EVENT, *PLACE, "published_at_us", "severity", "data", "note"])
@pytest.mark.parametrize(("before", "after"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
def test_nesting_in_any_field_is_read_or_refused(name: str, before: bytes, after: bytes) -> None:
    """At every depth, also at the edge of what can be read, and also where the refusal has to show the value."""
    for depth in (*range(1, 100, 7), *range(900, 1010)):
        members = {**PLACE, **EVENT, "severity": "info", "data": {}, name: "@"}
        payload = json.dumps(members).encode().replace(b'"@"', before * depth + b"1" + after * depth)
        said = verdict(payload)
        fitting = name == "note" or (name == "data" and after == b"}")
        assert said in ({RIGHT, "too_deep"} if fitting else {"field", "too_deep"})
        assert depth >= SURE_DEPTH or said != "too_deep"


async def store(redis: RedisServer, payloads: list[bytes]) -> None:
    """Store and publish whatever it is in the way the product does, as a publisher that checks nothing would."""
    commands = CommandLink(RedisTable(url=redis.url), stream.LOAD)
    try:
        events = [(str(uuid.uuid4()), payload) for payload in payloads]
        await commands.execute(stream.store("events.critical", events, HistoryTable()))
    finally:
        commands.close()


def test_no_nesting_ends_a_hub(redis: RedisServer, publish: RedisClient, hub: Hub) -> None:
    """Stored or only published, at every depth around the edge: counted, and the next event comes through."""
    with RawClient(hub.port) as client:
        hub.until_connected(1)
        reconnects = hub.stats()["redis_reconnects"]
        poisoned = [b'{"event_id":' + b"[" * depth + b"]" * depth + b"}" for depth in range(850, 1010)]
        for payload in poisoned:
            publish.publish(payload)
        asyncio.run(store(redis, poisoned))
        good = event_payload()
        publish.publish(good)
        assert next_but_ping(client) == (1, good)
        assert sum(hub.stats()["invalid"].values()) >= len(poisoned)
        assert hub.stats()["redis_reconnects"] == reconnects
    assert_calm(hub)


def from_further_down(payload: bytes, frames: int) -> str:
    """The verdict that a caller gets whose own stack is deeper."""
    return from_further_down(payload, frames - 1) if frames else verdict(payload)


def test_publisher_and_hub_refuse_the_same_nesting() -> None:
    """What is too deep is a matter of the event, not of who looks at it: the hub takes what the publisher took."""
    for depth in range(50, 1000, 50):
        payload = GOOD[0][:-1] + b', "note": ' + b"[" * depth + b"]" * depth + b"}"
        assert from_further_down(payload, 200) == verdict(payload), f"{depth} levels"


@fuzzed(120)
@given(
    st.integers(0, 300),
    st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9]{1,64}", fullmatch=True),
    st.integers(1, MAX_OFFSET),
    st.none() | st.integers(0, MAX_OFFSET),
    st.integers(-2, 2),
)
def test_a_place_does_not_count_for_the_size(
    size: int, channel: str, epoch: str, offset: int, stored_us: int | None, more: int
) -> None:
    """An event that may be published may be stored: what is put in front of it is not held against it."""
    plain = json.dumps(EVENT | {"data": {"pad": "x" * size}}).encode()
    place = b'{"channel":"%b","epoch":"%b","offset":%d,' % (channel.encode(), epoch.encode(), offset)
    stamp = b"" if stored_us is None else b'"stored_at_us":%d,' % stored_us
    stored = place + stamp + plain[1:]
    limit = len(plain) + more
    assert verdict(plain, limit) == verdict(stored, limit) == (RIGHT if more >= 0 else "too_large")


@fuzzed(80)
@given(st.one_of(st.none(), st.integers(), st.binary(max_size=9), st.text(max_size=200), st.just("x" * 129)))
def test_anything_but_a_channel_name_is_refused(name: Any) -> None:
    """Whatever is given as the name of a channel, it is one, or an `InvalidEvent` says that it is none."""
    if is_channel(name):
        assert event.check_channel(name) == name
    else:
        with pytest.raises(InvalidEvent) as caught:
            event.check_channel(name)
        assert len(str(caught.value)) < 1000


# Control frames

CONTROLS: Final = st.builds(
    lambda kind, channel, fields: (kind, channel, fields),
    st.sampled_from(["welcome", "gap", "beat", "lag", "drain"]),
    st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True),
    st.dictionaries(st.text(max_size=5).filter(lambda key: key not in ("control", "channel", "event_id")), JSON),
)


def control_payload(control: tuple[str, str, dict[str, Any]]) -> bytes:
    kind, channel, fields = control
    return json.dumps({"control": kind, "channel": channel, **fields}).encode()


@fuzzed(80)
@given(CONTROLS.filter(lambda control: not {"self", "control", "channel"} & control[2].keys()))
def test_a_control_frame_is_read_as_it_was_written(control: tuple[str, str, dict[str, Any]]) -> None:
    """Every field comes back."""
    kind, channel, fields = control
    assert wire.read_control(control_payload(control)) == {"control": kind, "channel": channel, **fields}


@fuzzed(200)
@given(mutated(CONTROLS.map(control_payload), SNIPPETS))
def test_a_damaged_control_frame_is_read_or_is_none(payload: bytes) -> None:
    """What is returned is an object with `control`, and without the field that tells an event."""
    fields = wire.read_control(payload)
    if fields is not None:
        assert "control" in fields
        assert "event_id" not in fields
        assert json.loads(payload) == fields or fields != fields  # NaN is what Python reads, and equals nothing


@fuzzed(80)
@given(st.sampled_from(GOOD), JSON)
def test_an_event_is_never_taken_for_a_control_frame(payload: bytes, value: Any) -> None:
    """Not even one that begins as control frames do."""
    disguised = b'{"control": ' + json.dumps(value).encode() + b", " + payload.lstrip()[1:]
    assert wire.read_control(disguised) is None
    assert wire.read_control(payload) is None


@pytest.mark.parametrize("depth", [10, 990, 1000, 5000, 100_000])
def test_a_deep_control_frame_is_none_or_read(depth: int) -> None:
    """Nesting is no way to end a subscriber."""
    fields = wire.read_control(b'{"control": ' + b"[" * depth + b"]" * depth + b"}")
    assert fields is None or list(fields) == ["control"]


# Positions

EPOCHS: Final = st.from_regex(r"[0-9A-Za-z]{1,64}", fullmatch=True)


@fuzzed(80)
@given(EPOCHS, st.integers(0, MAX_OFFSET))
def test_a_position_is_read_as_it_is_written(epoch: str, offset: int) -> None:
    """From text and back."""
    position = Position(epoch, offset)
    assert Position.parse(str(position)) == position == read_position(str(position))


@fuzzed(200)
@given(
    st.one_of(
        st.text(max_size=20),
        st.from_regex(r"[0-9A-Za-z٣é]{0,66}-[-0-9٣ +_]{0,20}", fullmatch=True),
        st.builds("{}-{}".format, EPOCHS, st.integers(MAX_OFFSET - 2, 10 * MAX_OFFSET)),
        st.builds("{}-{}{}".format, EPOCHS, st.integers(0, 9), st.sampled_from(["\n", " ", "\0", "-", "٣"])),
    )
)
def test_any_other_text_is_no_position(text: str) -> None:
    """Only `<epoch>-<offset>` in ASCII is read, and never as anything but what it says."""
    epoch, _, offset = text.partition("-")
    right = (
        (epoch.isascii() and epoch.isalnum() and len(epoch) <= 64)
        and (offset.isascii() and offset.isdigit() and len(offset) <= 16)
        and int(offset) <= MAX_OFFSET
    )
    if right:
        assert Position.parse(text) == (epoch, int(offset))
    else:
        assert read_position(text) is None
        with pytest.raises(ValueError, match="a position is"):
            Position.parse(text)


@fuzzed(80)
@given(JSON)
def test_no_other_value_is_a_position_or_an_epoch(value: Any) -> None:
    """Whatever a frame has in these fields, it is read or counts as not known."""
    assert read_position(value) is None or str(read_position(value)).isascii()
    assert is_epoch(value) == (isinstance(value, str) and re.fullmatch("[0-9A-Za-z]{1,64}", value) is not None)

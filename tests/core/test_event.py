"""The event: what is refused and why, what passes, and that its bytes are left alone."""

from __future__ import annotations

import contextlib
import json
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from broadcaster.core import event
from broadcaster.core.errors import InvalidEvent
from broadcaster.core.position import Position
from tests.support import event_payload

MIB = 1 << 20


def changed(**changes: Any) -> bytes:
    """A good event with other fields; `...` leaves one out."""
    return event_payload(**changes)


def with_raw(raw: bytes) -> bytes:
    """A good event with one more, hand-written member at its end."""
    return event_payload()[:-1] + b", " + raw + b"}"


def refusal(payload: bytes, **options: Any) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        event.check(payload, **options)
    return caught.value


def verdict(payload: bytes) -> str:
    """The cause of the refusal, or `right`."""
    try:
        event.check(payload, max_bytes=MIB)
    except InvalidEvent as error:
        return error.cause
    return "right"


NOT_JSON = {
    "nothing": b"",
    "spaces": b"   ",
    "a word": b"server-a is down",
    "half an object": event_payload()[:-1],
    "two objects": event_payload() + event_payload(),
    "text after it": event_payload() + b"x",
    "NUL after it": event_payload() + b"\0",
    "NUL before it": b"\0" + event_payload(),
    "no-break space before it": "\xa0".encode() + event_payload(),
    "no-break space after it": event_payload() + "\xa0".encode(),
    "vertical tab after it": event_payload() + b"\x0b",
    "single quotes": str(json.loads(event_payload())).encode(),
    "trailing comma": event_payload()[:-1] + b",}",
    "byte order mark": b"\xef\xbb\xbf" + event_payload(),
    "NaN": with_raw(b'"load": NaN'),
    "Infinity": with_raw(b'"load": Infinity'),
    "-Infinity": with_raw(b'"load": [-Infinity]'),
    "raw newline in a string": with_raw(b'"note": "a\nb"'),
    "raw NUL in a string": with_raw(b'"note": "a\0b"'),
    "raw escape character in a string": with_raw(b'"note": "a\x1bb"'),
    "raw tab in a key": with_raw(b'"a\tb": 1'),
    "bad escape": with_raw(rb'"note": "\x41"'),
    "leading zero": with_raw(b'"load": 01'),
    "hex number": with_raw(b'"load": 0x1F'),
    "more digits than can be read": with_raw(b'"load": ' + b"9" * 5000),
    "a number beyond what floats hold": with_raw(b'"load": 1e999'),
    "half of a surrogate pair": with_raw(rb'"note": "\ud83d"'),
    "the other half": with_raw(rb'"note": "\udd25\ud83d"'),
    "half of a surrogate pair in a known field": changed(source="server\ud800"),
    "more digits in a known field": changed(sequence=...)[:-1] + b', "sequence": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("payload", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_bytes_that_are_not_json_are_refused(payload: bytes) -> None:
    """What is not exactly one JSON text is refused as such."""
    assert refusal(payload).cause == "not_json"


NOT_UTF8 = {
    "latin-1 in a known field": event_payload(source="serv").replace(b'"serv"', b'"serv\xe9"'),
    "latin-1 in an unknown field": with_raw(b'"note": "caf\xe9"'),
    "latin-1 in a key": with_raw(b'"caf\xe9": 1'),
    "overlong slash": with_raw(b'"note": "\xc0\xaf"'),
    "encoded surrogate": with_raw(b'"note": "\xed\xa0\x80"'),
    "cut in the middle": with_raw(b'"note": "\xe2\x82"'),
    "beyond the last character": with_raw(b'"note": "\xf4\x90\x80\x80"'),
    "UTF-16": event_payload().decode().encode("utf-16"),
    "after the object": event_payload() + b"\xff",
}


@pytest.mark.parametrize("payload", NOT_UTF8.values(), ids=NOT_UTF8.keys())
def test_bytes_that_are_not_utf8_are_refused(payload: bytes) -> None:
    """One byte of invalid text anywhere in the payload refuses it: it would close every client."""
    assert refusal(payload).cause == "not_utf8"


def test_utf16_without_a_mark_is_refused() -> None:
    """UTF-16 of plain ASCII is valid UTF-8 full of NULs, and is no JSON."""
    assert refusal(event_payload().decode().encode("utf-16-le")).cause == "not_json"


TOO_DEEP = {
    "arrays, closed": with_raw(b'"data": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "arrays, open": b"[" * 100_000,
    "objects, closed": with_raw(b'"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "objects, open": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("payload", TOO_DEEP.values(), ids=TOO_DEEP.keys())
def test_nesting_beyond_what_can_be_read_is_refused(payload: bytes) -> None:
    """100,000 levels are a refusal, never a RecursionError or a crash."""
    assert refusal(payload, max_bytes=MIB).cause == "too_deep"


@pytest.mark.parametrize(("before", "after"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["arrays", "objects"])
def test_every_depth_is_either_read_or_refused(before: bytes, after: bytes) -> None:
    """Also at the very edge of what can be read, the only exception is a refusal."""
    depths = (*range(1, 110), *range(110, 900, 50), *range(900, 1100), *range(1100, 12_000, 200))
    verdicts = [verdict(with_raw(b'"x": ' + before * depth + b"1" + after * depth)) for depth in depths]
    assert set(verdicts) == {"right", "too_deep"}
    assert verdicts[:100] == ["right"] * 100


def test_nesting_within_the_size_limit_can_be_too_deep() -> None:
    """Also what fits the default size limit can be nested too deeply."""
    assert refusal(b"[" * event.MAX_BYTES).cause == "too_deep"


TOO_LARGE = {
    "1 MB of text": (event_payload(data={"text": "x" * MIB}), event.MAX_BYTES),
    "1 MB of nothing": (b" " * MIB, event.MAX_BYTES),
    "100,000 levels": (b"[" * 100_000, event.MAX_BYTES),
    "one byte too many": (b" " * 301, 300),
}


@pytest.mark.parametrize(("payload", "limit"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_a_payload_beyond_the_limit_is_refused_unread(payload: bytes, limit: int) -> None:
    """Size is checked first, and the refusal names both numbers."""
    error = refusal(payload, max_bytes=limit)
    assert error.cause == "too_large"
    assert str(len(payload)) in error.detail
    assert str(limit) in error.detail


def test_a_payload_of_exactly_the_limit_passes() -> None:
    """The limit itself is allowed."""
    payload = event_payload(data={"text": "x" * 500})
    assert event.check(payload, max_bytes=len(payload))["data"]["text"] == "x" * 500
    assert refusal(payload, max_bytes=len(payload) - 1).cause == "too_large"


DUPLICATES = {
    "known field": with_raw(b'"sequence": 2'),
    "known field, same value": with_raw(b'"severity": "info", "severity": "info"'),
    "unknown field": with_raw(b'"note": 1, "note": 1'),
    "written with an escape": with_raw(rb'"s\u0065quence": 2'),
    "nested": with_raw(b'"data": {"a": {"b": 1, "b": 2}}'),
    "in an array": with_raw(b'"list": [{"b": 1, "b": 2}]'),
}


@pytest.mark.parametrize("payload", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_a_key_that_stands_twice_is_refused(payload: bytes) -> None:
    """Two readers could read two different events from one payload."""
    assert refusal(payload).cause == "duplicate_key"


LARGE: dict[str, tuple[object, object]] = {
    "one string": ("a:b " * 15_000, "a-b " * 15_000),
    "strings": (["http://a:80"] * 4_000, ["http---a-80"] * 4_000),
    "quotes and colons": ('":' * 20_000, '"-' * 20_000),
}


@pytest.mark.parametrize(("with_colons", "without"), LARGE.values(), ids=LARGE.keys())
def test_a_large_event_with_colons_in_its_strings_is_checked_as_fast(with_colons: object, without: object) -> None:
    """What a string holds makes no event expensive to check: the hub does nothing else meanwhile."""

    def fastest_s(text: object) -> float:
        payload = event_payload(data={"text": text})
        times_s = []
        for _ in range(15):
            begun = time.perf_counter()
            event.check(payload)
            times_s.append(time.perf_counter() - begun)
        return min(times_s)

    assert fastest_s(with_colons) < 5 * fastest_s(without)


@pytest.mark.parametrize("payload", [b"[]", b"1", b"-0.5", b'"text"', b"null", b"true", b" [1] ", b'["event_id"]'])
def test_json_other_than_an_object_is_refused(payload: bytes) -> None:
    """An event is one JSON object."""
    assert refusal(payload).cause == "not_object"


WRONG_FIELDS: list[tuple[str, object]] = [
    ("event_id", ...),
    ("event_id", None),
    ("event_id", 1),
    ("event_id", ""),
    ("event_id", "server-a-1"),
    ("event_id", uuid.UUID(int=7).hex),
    ("event_id", f"{{{uuid.UUID(int=7)}}}"),
    ("event_id", f"{uuid.UUID(int=7)}\n"),
    ("event_type", ...),
    ("event_type", None),
    ("event_type", 1),
    ("event_type", ""),
    ("event_type", "x" * 257),
    ("event_type", ["SERVER_DOWN"]),
    ("event_type", "SERVER\nDOWN"),
    ("event_type", "SERVER_DOWN\n"),
    ("event_type", "\x1b[2J"),
    ("source", ...),
    ("source", None),
    ("source", True),
    ("source", ""),
    ("source", {}),
    ("source", "x" * 257),
    ("source", "server\0a"),
    ("source", "server\x7f"),
    ("source", "server\x85a"),
    ("sequence", ...),
    ("sequence", None),
    ("sequence", "1"),
    ("sequence", 1.0),
    ("sequence", True),
    ("sequence", False),
    ("sequence", -1),
    ("sequence", 2**53),
    ("sequence", 10**30),
    ("published_at_ms", ...),
    ("published_at_ms", None),
    ("published_at_ms", "1768068834227"),
    ("published_at_ms", 1768068834227.5),
    ("published_at_ms", True),
    ("published_at_ms", -1),
    ("published_at_ms", 2**53),
    ("published_at_us", None),
    ("published_at_us", "1"),
    ("published_at_us", 1.5),
    ("published_at_us", True),
    ("published_at_us", -1),
    ("published_at_us", 2**53),
    ("severity", None),
    ("severity", ""),
    ("severity", "fatal"),
    ("severity", "CRITICAL"),
    ("severity", 1),
    ("severity", ["info"]),
    ("severity", {}),
    ("data", None),
    ("data", []),
    ("data", "text"),
    ("data", 1),
    ("data", False),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS, ids=[f"{n}={v!r:.30}" for n, v in WRONG_FIELDS])
def test_a_wrong_field_is_refused_by_its_name(name: str, value: object) -> None:
    """A missing field, a wrong type (a bool is no integer) and a value out of range name the field."""
    error = refusal(changed(**{name: value}))
    assert error.cause == "field"
    assert error.detail.startswith(f"{name} must be ")


PLACE: dict[str, Any] = {"channel": "events.critical", "epoch": "4c6d0a1b2e3f", "offset": 7}
"""What an event is given when it is stored."""

WRONG_PLACES: list[tuple[str, object]] = [
    ("channel", ...),
    ("channel", None),
    ("channel", 1),
    ("channel", True),
    ("channel", ""),
    ("channel", "a b"),
    ("channel", "a\n"),
    ("channel", "x" * 129),
    ("channel", ["events.critical"]),
    ("epoch", ...),
    ("epoch", None),
    ("epoch", 12),
    ("epoch", True),
    ("epoch", ""),
    ("epoch", "a-b"),
    ("epoch", "a_b"),
    ("epoch", "a\n"),
    ("epoch", "ä"),
    ("epoch", "٣"),
    ("epoch", "x" * 65),
    ("epoch", {}),
    ("offset", ...),
    ("offset", None),
    ("offset", "7"),
    ("offset", 7.0),
    ("offset", True),
    ("offset", 0),
    ("offset", -1),
    ("offset", 2**53),
    ("offset", 10**30),
    ("offset", [7]),
    ("stored_at_us", None),
    ("stored_at_us", "7"),
    ("stored_at_us", 7.0),
    ("stored_at_us", True),
    ("stored_at_us", -1),
    ("stored_at_us", 2**53),
]


@pytest.mark.parametrize(("name", "value"), WRONG_PLACES, ids=[f"{n}={v!r:.30}" for n, v in WRONG_PLACES])
def test_a_wrong_place_is_refused_by_its_name(name: str, value: object) -> None:
    """An event has all three fields of a stored one, each of its type and range, or none of them."""
    error = refusal(event_payload(**PLACE | {name: value}))
    assert error.cause == "field"
    assert error.detail.startswith(f"{name} must be ")


@pytest.mark.parametrize("name", PLACE)
def test_one_field_of_a_place_alone_is_refused(name: str) -> None:
    """Whoever claims a part of a place without the rest is refused, however right that part is."""
    error = refusal(event_payload(**{name: PLACE[name]}))
    assert error.cause == "field"
    assert error.detail.endswith("got nothing")


def test_a_time_of_storing_without_a_place_is_refused() -> None:
    """`stored_at_us` is Redis' to say: a publisher cannot set it."""
    error = refusal(event_payload(stored_at_us=1))
    assert (error.cause, error.detail) == ("field", "offset must be an integer from 1 to 2^53 - 1, got nothing")


@pytest.mark.parametrize("stored_us", [None, 0, 1_790_000_000_123_456, 2**53 - 1])
def test_when_it_was_stored_is_read(stored_us: int | None) -> None:
    """It may be missing: Redis may not say it, and earlier versions did not ask."""
    stamp = {} if stored_us is None else {"stored_at_us": stored_us}
    assert event.decode(event_payload(**PLACE, **stamp)).stored_at_us == stored_us


RIGHT_PLACES: list[tuple[str, object]] = [
    ("channel", "x" * 128),
    ("channel", "A-z_0:9.x"),
    ("epoch", "0"),
    ("epoch", "Zz9" * 21 + "a"),
    ("offset", 1),
    ("offset", 10**14),
    ("offset", 2**53 - 1),
]


@pytest.mark.parametrize(("name", "value"), RIGHT_PLACES, ids=[f"{n}={v!r:.30}" for n, v in RIGHT_PLACES])
def test_a_stored_event_knows_its_place(name: str, value: object) -> None:
    """Channel and position of a stored event are read from its payload, limits inclusive."""
    place = PLACE | {name: value}
    decoded = event.decode(event_payload(3, **place))
    assert decoded.channel == place["channel"]
    assert decoded.position == Position(place["epoch"], place["offset"])
    assert decoded.sequence == 3


def test_an_event_that_is_not_stored_has_no_place() -> None:
    """Without the three fields there is neither channel nor position, whatever `data` has under these names."""
    decoded = event.decode(event_payload(data=PLACE))
    assert (decoded.channel, decoded.position) == (None, None)
    assert decoded.data == PLACE


def test_a_place_that_stands_twice_is_refused() -> None:
    """A foreign publisher cannot smuggle in a second place: it would stand beside the true one."""
    forged = event_payload(**PLACE | {"offset": 9})
    stored = b'{"channel":"events.critical","epoch":"4c6d0a1b2e3f","offset":7,' + forged[1:]
    assert refusal(stored).cause == "duplicate_key"


def test_a_refusal_is_short_and_of_one_line_whatever_the_value_is() -> None:
    """A refusal goes to a log: a long or many-lined value must not."""
    error = refusal(event_payload(source="a\n" * 20_000))
    assert len(error.detail) < 250
    assert "\n" not in str(error)


def test_every_cause_is_known_beforehand() -> None:
    """A cause is a counter's label: the set of causes is fixed and complete."""
    tables = {
        "not_json": NOT_JSON,
        "not_utf8": NOT_UTF8,
        "too_deep": TOO_DEEP,
        "too_large": TOO_LARGE,
        "duplicate_key": DUPLICATES,
    }
    assert set(event.CAUSES) == {*tables, "not_object", "field"}


RIGHT_FIELDS: list[tuple[str, object]] = [
    ("sequence", 0),
    ("sequence", 2**53 - 1),
    ("published_at_ms", 0),
    ("published_at_us", ...),
    ("published_at_us", 2**53 - 1),
    ("event_id", "A987FBC9-4BED-3078-CF07-9141BA07C9F3"),
    ("event_type", "x" * 256),
    ("event_type", "Störung: 倒れた 🔥"),
    ("source", " "),
    ("severity", "info"),
    ("severity", "warning"),
    ("severity", "critical"),
    ("data", {}),
    ("data", {"deep": [[[{"a": [None, True, 1.5e300, "\0\n:{"]}]]]}),
    ("note", "an unknown field"),
    ("note", None),
    ("control", "gap"),
    ("", ""),
]


@pytest.mark.parametrize(("name", "value"), RIGHT_FIELDS, ids=[f"{n}={v!r:.30}" for n, v in RIGHT_FIELDS])
def test_what_is_of_the_schema_passes(name: str, value: object) -> None:
    """Limits are inclusive, optional fields may be missing, unknown fields may be anything."""
    fields = event.check(changed(**{name: value}))
    assert fields.get(name, ...) == value


FORMS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "as json.dumps writes it": lambda fields: json.dumps(fields).encode(),
    "indented": lambda fields: json.dumps(fields, indent=4).encode(),
    "UTF-8 unescaped": lambda fields: json.dumps(fields, ensure_ascii=False).encode(),
    "all escaped": lambda fields: json.dumps(fields).replace("S", r"\u0053").encode(),
    "spaces around it": lambda fields: b" \t\r\n" + json.dumps(fields).encode() + b"\n\n",
    "other order": lambda fields: json.dumps(dict(reversed(list(fields.items())))).encode(),
    "numbers JavaScript would write otherwise": lambda fields: json.dumps(fields).encode()[:-1] + b',"n":1E+2}',
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_bytes_of_an_event_are_left_alone(form: Callable[[dict[str, Any]], bytes]) -> None:
    """However a foreign publisher writes its JSON, the same bytes travel on, unknown fields included."""
    fields = json.loads(event_payload(3, source="Süd", note={"any": ["thing", 1.50]}))
    payload = form(fields)
    decoded = event.decode(payload)
    assert decoded.payload == payload
    assert (decoded.source, decoded.sequence, decoded.event_id) == ("Süd", 3, fields["event_id"])


def test_a_foreign_event_has_defaults_for_what_it_leaves_out() -> None:
    """The five fields of the schema are enough."""
    decoded = event.decode(event_payload(published_at_us=..., published_at_ms=1768068834227), received_at_us=9)
    assert decoded.published_at_us is None
    assert decoded.severity == "critical"
    assert decoded.data == {}
    assert decoded.received_at_us == 9


def test_a_draft_is_stamped_with_the_instant_of_its_publication() -> None:
    """A drafted event has an id of its own; both times of one instant come last, and complete the encoding."""
    first = event.draft("SERVER_DOWN", "server-a", 7, severity="info", data={"rack": "ü7"})
    second = event.draft("SERVER_DOWN", "server-a", 8)
    now_us = time.time_ns() // 1000
    payload = first.stamp(now_us)
    published = first.published(now_us, payload)

    assert json.loads(payload) == {
        "event_id": published.event_id,
        "event_type": "SERVER_DOWN",
        "source": "server-a",
        "sequence": 7,
        "published_at_ms": now_us // 1000,
        "published_at_us": now_us,
        "severity": "info",
        "data": {"rack": "ü7"},
    }
    assert event.decode(payload) == published
    assert published.payload == payload
    assert published.published_at_us == now_us
    other = event.decode(second.stamp(now_us + 1))
    assert other.event_id != published.event_id
    assert (other.severity, other.data, other.published_at_us) == ("critical", {}, now_us + 1)
    assert "data" not in json.loads(other.payload)


CANNOT_BE_DRAFTED: list[tuple[str, dict[str, Any], str]] = [
    ("empty type", {"event_type": ""}, "field"),
    ("control character", {"source": "a\nb"}, "field"),
    ("lone surrogate in source", {"source": "a\udc00"}, "field"),
    ("bool as number", {"sequence": True}, "field"),
    ("negative number", {"sequence": -1}, "field"),
    ("unknown severity", {"severity": "fatal"}, "field"),
    ("data is a list", {"data": [1]}, "field"),
    ("data with NaN", {"data": {"load": float("nan")}}, "field"),
    ("data with infinity", {"data": {"load": float("inf")}}, "field"),
    ("data with bytes", {"data": {"raw": b"x"}}, "field"),
    ("data with a lone surrogate", {"data": {"text": "\ud800"}}, "field"),
    ("data with a key that is no text", {"data": {(1, 2): 3}}, "field"),
    ("data with two keys of one text", {"data": {1: "a", "1": "b"}}, "duplicate_key"),
    ("too large", {"data": {"text": "x" * event.MAX_BYTES}}, "too_large"),
    ("too large for this limit", {"data": {"text": "x" * 300}, "max_bytes": 300}, "too_large"),
]


@pytest.mark.parametrize(
    ("changes", "cause"), [case[1:] for case in CANNOT_BE_DRAFTED], ids=[case[0] for case in CANNOT_BE_DRAFTED]
)
def test_a_draft_is_refused_if_the_hub_would_refuse_it(changes: dict[str, Any], cause: str) -> None:
    """A wrong event is an error at the publisher, with the cause the hub would count."""
    arguments: dict[str, Any] = {"event_type": "SERVER_DOWN", "source": "server-a", "sequence": 1} | changes
    with pytest.raises(InvalidEvent) as caught:
        event.draft(**arguments)
    assert caught.value.cause == cause


def test_data_without_a_bottom_is_refused() -> None:
    """Data that contains itself, or is nested too deeply, is a refusal as well."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InvalidEvent) as caught:
        event.draft("SERVER_DOWN", "server-a", 1, data=deep)
    assert caught.value.cause == "too_deep"
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(InvalidEvent):
        event.draft("SERVER_DOWN", "server-a", 1, data=endless)


def test_an_event_of_exactly_the_limit_can_be_drafted() -> None:
    """What may be published is what the hub lets pass, to the byte."""
    now_us = time.time_ns() // 1000
    empty = len(event.draft("A", "b", 1, data={"text": ""}).stamp(now_us))
    draft = event.draft("A", "b", 1, data={"text": "x" * (500 - empty)}, max_bytes=500)
    assert len(draft.stamp(now_us)) == 500
    with pytest.raises(InvalidEvent):
        event.draft("A", "b", 1, data={"text": "x" * (501 - empty)}, max_bytes=500)


@pytest.mark.parametrize("stamp", [b"", b'"stored_at_us":1790000000123456,'], ids=["unstamped", "stamped"])
@pytest.mark.parametrize("channel", ["events.critical", "x" * 128], ids=["usual name", "longest name"])
def test_an_event_of_exactly_the_limit_passes_when_it_is_stored(channel: str, stamp: bytes) -> None:
    """The place that the store puts in front does not count: what could be published is not refused later."""
    now_us = time.time_ns() // 1000
    empty = len(event.draft("A", "b", 1, data={"text": ""}).stamp(now_us))
    payload = event.draft("A", "b", 1, data={"text": "x" * (500 - empty)}, max_bytes=500).stamp(now_us)
    place = b'{"channel":"%b","epoch":"4c6d0a1b2e3f","offset":7,%b' % (channel.encode(), stamp)
    assert event.decode(place + payload[1:], max_bytes=500).position == Position("4c6d0a1b2e3f", 7)
    with pytest.raises(InvalidEvent, match="501 bytes, at most 500 allowed"):
        event.decode(place + payload[1:].replace(b"xx", b"xxx", 1), max_bytes=500)


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def damaged(chance: random.Random, payload: bytes) -> bytes:
    """A few bytes deleted, inserted, changed or doubled."""
    raw = bytearray(payload)
    for _ in range(chance.choice([1, 1, 2, 3])):
        at, size = chance.randrange(len(raw)), chance.randrange(1, 30)
        what = chance.choice(
            [b"", b'"', b":", b",", b"{", b"[", b"}", b"]", b"\\", b"0", b"-", b"e", b"\xff", b"\0"]
        )
        kind = chance.randrange(3)
        if kind == 0:
            raw[at : at + chance.randrange(4)] = what
        elif kind == 1:
            raw[at] = chance.randrange(256)
        else:
            raw[at:at] = raw[at : at + size]
    return bytes(raw)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_passes_is_read_by_any_other_decoder_to_the_same_fields(seed: int) -> None:
    """Of thousands of damaged events those that pass are right for a strict decoder of another make, too."""
    chance = random.Random(seed)
    whole = event_payload(3, data={"a:": [1, -2.5e3, None, 'x:y"z\\'], "b": {"": [{}]}}, note="Süd: 🔥")
    passed = 0
    for _ in range(4000):
        payload = damaged(chance, whole)
        with contextlib.suppress(InvalidEvent):
            fields = event.check(payload)
            assert fields == json.loads(payload.decode(), object_pairs_hook=without_twins)
            passed += 1
    assert passed > 100


LATENCIES = [
    ("not received yet", 1_000_000, None, None),
    ("microseconds", 1_000_250, 1_001_750, 1.5),
    ("milliseconds only", ..., 1_003_500, 3.5),
    ("clocks that disagree", 1_000_250, 1_000_000, -0.25),
]


@pytest.mark.parametrize(
    ("published_us", "received_us", "latency_ms"), [c[1:] for c in LATENCIES], ids=[c[0] for c in LATENCIES]
)
def test_latency_is_from_publish_to_receipt(
    published_us: object, received_us: int | None, latency_ms: float | None
) -> None:
    """Latency is in milliseconds, of the best resolution there is, and never clamped."""
    payload = event_payload(published_at_ms=1000, published_at_us=published_us)
    assert event.decode(payload, received_at_us=received_us).latency_ms == latency_ms


@pytest.mark.parametrize("name", ["events.critical", "a", "A-z_0:9.x", "x" * 128, "-", "..."])
def test_a_channel_name_of_the_allowed_characters_is_returned(name: str) -> None:
    """1 to 128 of the allowed characters are a channel."""
    assert event.check_channel(name) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "events/critical", "ä", "}x", "a*", "a\0", "٣"])
def test_any_other_channel_name_is_refused(name: str) -> None:
    """Everything else is refused, trailing newlines and digits of other scripts included."""
    with pytest.raises(InvalidEvent) as caught:
        event.check_channel(name)
    assert caught.value.cause == "field"
    assert "channel" in caught.value.detail

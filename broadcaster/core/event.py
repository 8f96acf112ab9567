"""The event schema, shared by publisher, hub and subscriber.

An event is refused unless its whole payload is valid UTF-8 and one JSON object of this schema, at most
`max_bytes` long. Every way in which a decoder can fail is such a refusal, never another exception: the hub
forwards the very bytes it checked here, and one frame of invalid text would make every conforming
WebSocket client close its connection (1007).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from broadcaster.core.errors import InvalidEvent
from broadcaster.core.position import MAX_OFFSET, Position, is_epoch
from broadcaster.core.runtime import CHANCE, CLOCK, Chance

MAX_BYTES: Final = 65_536
"""Default size limit of one encoded event in bytes."""

LARGEST_BYTES: Final = 16 * 2**20
"""What `event.max_bytes` is at most."""

MAX_LEVELS: Final = 256
"""Nesting limit of objects and arrays; deeper events are refused, by the publisher as by the hub."""

SEVERITIES: Final = ("critical", "warning", "info")

CAUSES: Final = ("too_large", "not_utf8", "not_json", "too_deep", "duplicate_key", "not_object", "field")
"""Every value of `InvalidEvent.cause`."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as published and as received.

    Attributes:
        event_id: UUID; the same event published again carries the same id.
        event_type: What happened, such as `SERVER_DOWN`.
        source: What it happened to, such as `server-a`.
        sequence: Number of this event at its source; rises by one with each event.
        published_at_ms: Time of publication in milliseconds since 1970 (UTC).
        published_at_us: The same time in microseconds; None from a foreign publisher that has only
            milliseconds.
        severity: `critical`, `warning` or `info`.
        data: The producer's own JSON object.
        channel: The channel it was stored in; None if it is not stored.
        position: Its position in that channel; None if it is not stored.
        payload: The encoded event, byte for byte as it travels.
        received_at_us: Time of receipt by a subscriber in microseconds since 1970; None before that.
        stored_at_us: When Redis stored it, by its own clock, in microseconds since 1970; None if it is not stored,
            or Redis did not say.
    """

    event_id: str
    event_type: str
    source: str
    sequence: int
    published_at_ms: int
    published_at_us: int | None = None
    severity: str = "critical"
    data: Mapping[str, Any] = field(default_factory=dict)
    channel: str | None = None
    position: Position | None = None
    payload: bytes = field(default=b"", repr=False, compare=False)
    received_at_us: int | None = None
    stored_at_us: int | None = None

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds from publish to receipt by the wall clocks of both hosts; None before receipt.

        Negative when the clocks disagree by more than the latency. Its resolution is 1 ms when the
        publisher gave no `published_at_us`.
        """
        if self.received_at_us is None:
            return None
        published_us = self.published_at_us or self.published_at_ms * 1000
        return (self.received_at_us - published_us) / 1000


def check_channel(name: str) -> str:
    """Return `name` if it is a valid channel name.

    Raises:
        InvalidEvent: It is not 1 to 128 characters of A-Z a-z 0-9 . _ : -
    """
    if type(name) is not str or not _CHANNEL(name):
        raise InvalidEvent("field", f"channel must be 1 to 128 of A-Z a-z 0-9 . _ : -, got {_shown(name, 140)}")
    return name


def channel_name(name: str) -> str:
    """As `check_channel`, for a name that is no field of an event.

    Raises:
        ValueError: It is no valid channel name; the message is the reason alone.
    """
    try:
        return check_channel(name)
    except InvalidEvent as error:
        raise ValueError(error.detail) from None


@dataclass(frozen=True, slots=True)
class Draft:
    """An event without its time of publication: encoded and checked before it is due, as that takes time."""

    unpublished: Event
    head: bytes

    def stamp(self, now_us: int) -> bytes:
        """The encoded event, published at `now_us` (microseconds since 1970)."""
        return b'%b,"published_at_ms":%d,"published_at_us":%d}' % (self.head, now_us // 1000, now_us)

    def published(self, now_us: int, payload: bytes) -> Event:
        """The event that `stamp` encoded as `payload`."""
        return replace(self.unpublished, published_at_ms=now_us // 1000, published_at_us=now_us, payload=payload)


def draft(
    event_type: str,
    source: str,
    sequence: int,
    *,
    severity: str = "critical",
    data: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    chance: Chance = CHANCE,
) -> Draft:
    """Prepare an event with a new id: encode and check it.

    Raises:
        InvalidEvent: A field is wrong, or the encoded event would be larger than `max_bytes`.
    """
    fields: dict[str, Any] = {
        "event_id": chance.uuid(),
        "event_type": event_type,
        "source": source,
        "sequence": sequence,
        "severity": severity,
    }
    if data is not None:
        fields["data"] = data
    _check_fields({**fields, "published_at_ms": 0})  # names the field; encoding it would only fail
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        head = text.removesuffix("}").encode()
    except InvalidEvent:
        raise
    except RecursionError:
        raise InvalidEvent("too_deep", "data is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise InvalidEvent("field", f"data cannot be encoded: {error}") from None
    unstamped = Draft(Event("", "", "", 0, 0), head)
    event = decode(unstamped.stamp(CLOCK.wall_ns() // 1000), max_bytes=max_bytes)
    return Draft(event, head)


def decode(payload: bytes, *, max_bytes: int = MAX_BYTES, received_at_us: int | None = None) -> Event:
    """Decode an event. Unknown fields are kept in `payload` only.

    Raises:
        InvalidEvent: `check` refuses it.
    """
    fields = check(payload, max_bytes=max_bytes)
    return Event(
        event_id=fields["event_id"],
        event_type=fields["event_type"],
        source=fields["source"],
        sequence=fields["sequence"],
        published_at_ms=fields["published_at_ms"],
        published_at_us=fields.get("published_at_us"),
        severity=fields.get("severity", "critical"),
        data=fields.get("data", {}),
        channel=fields.get("channel"),
        position=Position(fields["epoch"], fields["offset"]) if "offset" in fields else None,
        payload=payload,
        received_at_us=received_at_us,
        stored_at_us=fields.get("stored_at_us"),
    )


def check(payload: bytes, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return all fields of an event if its bytes conform to the schema.

    Raises:
        InvalidEvent: In every other case, whatever the bytes are.
    """
    if len(payload) > max_bytes and not (
        payload.startswith(_POSITION_PREFIX) and len(payload) <= max_bytes + _POSITION_BYTES
    ):
        raise _too_large(len(payload), max_bytes)
    try:
        payload.decode()  # the decoder below validates only the strings it reads
    except UnicodeDecodeError as error:
        raise InvalidEvent("not_utf8", f"not UTF-8 at byte {error.start}") from None
    try:
        fields = _DECODE(payload)
        if type(fields) is not dict:
            raise InvalidEvent("not_object", f"not a JSON object but {type(fields).__name__}")
        # As many keys as colons: none is duplicate (the decoder would have kept the last of two). That is so for
        # most events: they have no colon in a string, and no keys but their own and those of `data`.
        colons, data = payload.count(b":"), fields.get("data")
        if len(fields) + (len(data) if type(data) is dict else 0) != colons or b"[" in payload:
            if payload.count(b"{") + payload.count(b"[") > MAX_LEVELS and _is_too_deep(fields):
                raise RecursionError
            if not _has_every_key(fields, payload, colons):
                raise InvalidEvent("duplicate_key", "a key stands twice in one object")
    except RecursionError:
        raise InvalidEvent("too_deep", "nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise InvalidEvent("not_json", f"not JSON: {error}") from None
    _check_fields(fields)
    if len(payload) > max_bytes:
        _check_size(len(payload), max_bytes, fields)
    return fields


def _check_size(size: int, max_bytes: int, fields: dict[str, Any]) -> None:
    """Check the size without the fields that were added when the event was stored."""
    if "offset" in fields:
        channel, epoch, offset = fields["channel"], fields["epoch"], fields["offset"]
        size -= len(f'"channel":"{channel}","epoch":"{epoch}","offset":{offset},')
    if "stored_at_us" in fields:
        size -= len(f'"stored_at_us":{fields["stored_at_us"]},')
    if size > max_bytes:
        raise _too_large(size, max_bytes)


def _too_large(size: int, max_bytes: int) -> InvalidEvent:
    return InvalidEvent("too_large", f"{size} bytes, at most {max_bytes} allowed")


def _check_fields(fields: dict[str, Any]) -> None:
    # Unrolled, not a loop: this runs for every event before its first subscriber gets it.
    get = fields.get
    event_id, event_type, source = get("event_id"), get("event_type"), get("source")
    sequence, published_ms, published_us = get("sequence"), get("published_at_ms"), get("published_at_us", 0)
    if type(event_id) is not str or not _UUID(event_id):
        raise _wrong("event_id", "a UUID", fields)
    if type(event_type) is not str or not _NAME(event_type):
        raise _wrong("event_type", _A_NAME, fields)
    if type(source) is not str or not _NAME(source):
        raise _wrong("source", _A_NAME, fields)
    if type(sequence) is not int or not 0 <= sequence < _MAX_NUMBER:
        raise _wrong("sequence", _A_NUMBER, fields)
    if type(published_ms) is not int or not 0 <= published_ms < _MAX_NUMBER:
        raise _wrong("published_at_ms", _A_NUMBER, fields)
    if type(published_us) is not int or not 0 <= published_us < _MAX_NUMBER:
        raise _wrong("published_at_us", _A_NUMBER, fields)
    if get("severity", "critical") not in SEVERITIES:
        raise _wrong("severity", "one of " + ", ".join(SEVERITIES), fields)
    if type(get("data", fields)) is not dict:
        raise _wrong("data", "a JSON object", fields)
    if "offset" in fields or "epoch" in fields or "channel" in fields or "stored_at_us" in fields:
        _check_position(fields)


def _check_position(fields: dict[str, Any]) -> None:
    """Check the fields of a stored event: it has all three, or none; and may say when it was stored."""
    stored_us = fields.get("stored_at_us", 0)
    if type(stored_us) is not int or not 0 <= stored_us < _MAX_NUMBER:
        raise _wrong("stored_at_us", _A_NUMBER, fields)
    channel, epoch, offset = fields.get("channel"), fields.get("epoch"), fields.get("offset")
    if type(offset) is not int or not 1 <= offset <= MAX_OFFSET:
        raise _wrong("offset", "an integer from 1 to 2^53 - 1", fields)
    if type(channel) is str and type(epoch) is str and _may_be_position(channel, epoch):
        return
    if not is_epoch(epoch):
        raise _wrong("epoch", "1 to 64 letters and digits", fields)
    raise _wrong("channel", "a channel name", fields)


@functools.lru_cache(1024)
def _may_be_position(channel: str, epoch: str) -> bool:
    """Whether channel and epoch are valid; cached, as every event asks and there are few of them."""
    return is_epoch(epoch) and _CHANNEL(channel) is not None


def _wrong(name: str, expected: str, fields: dict[str, Any]) -> InvalidEvent:
    got = _shown(fields[name], 80) if name in fields else "nothing"
    return InvalidEvent("field", f"{name} must be {expected}, got {got}")


def _shown(value: object, most: int) -> str:
    try:
        return repr(value)[:most]
    except RecursionError:  # the caller's own stack is deep
        return type(value).__name__


class _Answer(msgspec.Struct):
    events: list[msgspec.Raw]
    next: str | None
    complete: bool


def read_answer(body: bytes) -> tuple[list[bytes], str | None, bool]:
    """The events of an answer to `/events` as they are stored, its `next` and `complete`; the rest is ignored.

    Raises:
        ValueError: It is no such answer.
    """
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return [bytes(event) for event in answer.events], answer.next, answer.complete


def _has_every_key(fields: dict[str, Any], payload: bytes, colons: int) -> bool:
    """Whether every key of a payload, which has so many colons, is in its decoded `fields`.

    Encoded again, the fields have all colons of the payload, those written as an escape as well, but for those of
    the members that the decoder has replaced: at least one each. It is linear, whatever the strings hold.
    """
    if b"\\" in payload and b"u003" in payload:
        escapes = payload.replace(b"\\\\", b"")  # without escaped backslashes: each that is left begins an escape
        colons += escapes.count(b"\\u003a") + escapes.count(b"\\u003A")
    return _ENCODE(fields).count(b":") == colons


def _is_too_deep(fields: dict[str, Any]) -> bool:
    """Whether a JSON object has more than `MAX_LEVELS` levels."""
    level: list[Any] = [fields]
    for _ in range(MAX_LEVELS):
        values = itertools.chain.from_iterable(held.values() if type(held) is dict else held for held in level)
        level = [value for value in values if type(value) is dict or type(value) is list]
    return bool(level)


_POSITION_PREFIX: Final = b'{"channel":"'  # how a stored event begins
_POSITION_BYTES: Final = 320  # more than what is added to a stored event can have
_A_NAME: Final = "1 to 256 characters without control characters"
_A_NUMBER: Final = "an integer from 0 to 2^53 - 1"
_MAX_NUMBER: Final = MAX_OFFSET + 1  # one more than the last integer that JavaScript reads exactly
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}").fullmatch
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}").fullmatch
_CHANNEL: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch
_DECODE: Final = msgspec.json.Decoder().decode
_ENCODE: Final = msgspec.json.Encoder().encode

"""The event: one schema, shared by publisher, hub and subscriber.

An event is refused unless its whole payload is valid UTF-8 and one JSON object of this schema, at most
`max_bytes` long. Every way in which a decoder can fail is such a refusal, never another exception: the hub
forwards the very bytes it checked here, and one frame of invalid text would make every conforming
WebSocket client close its connection (1007).
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from broadcaster.errors import InvalidEvent

MAX_BYTES: Final = 65_536
"""Default size limit of one encoded event in bytes."""

SEVERITIES: Final = ("critical", "warning", "info")
RESERVED: Final = ("channel", "epoch", "offset")
"""Fields that belong to the store of events; a publisher that sets them is refused."""

CAUSES: Final = ("too_large", "not_utf8", "not_json", "too_deep", "duplicate_key", "not_object", "field")
"""Every `InvalidEvent.cause` there is."""

_MAX_NUMBER: Final = 2**53  # the last integer that JavaScript reads exactly
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")
_CHANNEL: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as published and as received.

    Attributes:
        event_id: UUID; the same event published again carries the same id.
        event_type: What happened, such as `SERVER_DOWN`.
        source: To whom it happened, such as `server-a`.
        sequence: Number of this event at its source; one more each time.
        published_at_ms: When publish ran: milliseconds since 1970 (UTC).
        published_at_us: The same instant in microseconds; None from a foreign publisher that has only
            milliseconds.
        severity: `critical`, `warning` or `info`.
        data: The producer's own JSON object.
        payload: The encoded event, byte for byte as it travels.
        received_at_us: When a subscriber received it: microseconds since 1970; None before that.
    """

    event_id: str
    event_type: str
    source: str
    sequence: int
    published_at_ms: int
    published_at_us: int | None = None
    severity: str = "critical"
    data: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = field(default=b"", repr=False, compare=False)
    received_at_us: int | None = None

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
    """Return `name` if it may be a channel.

    Raises:
        InvalidEvent: If it has other characters than A-Z a-z 0-9 . _ : - or not 1 to 128 of them.
    """
    if not _CHANNEL.fullmatch(name):
        raise InvalidEvent("field", f"channel must match {_CHANNEL.pattern}, got {name[:140]!r}")
    return name


def create(
    event_type: str,
    source: str,
    sequence: int,
    *,
    severity: str = "critical",
    data: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Event:
    """Make an event that is published now: new id, this instant, encoded and checked.

    Raises:
        InvalidEvent: If a field is wrong or the encoded event is larger than `max_bytes`.
    """
    now_us = time.time_ns() // 1000
    fields: dict[str, Any] = {
        "event_id": str(uuid.uuid4()),
        "event_type": event_type,
        "source": source,
        "sequence": sequence,
        "published_at_ms": now_us // 1000,
        "published_at_us": now_us,
        "severity": severity,
    }
    if data is not None:
        fields["data"] = data
    try:
        payload = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError:
        raise InvalidEvent("too_deep", "data is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise InvalidEvent("field", f"data cannot be encoded: {error}") from None
    return decode(payload, max_bytes=max_bytes)


def decode(payload: bytes, *, max_bytes: int = MAX_BYTES, received_at_us: int | None = None) -> Event:
    """Read an event from its bytes. Unknown fields stay in `payload` only.

    Raises:
        InvalidEvent: If `check` refuses it.
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
        payload=payload,
        received_at_us=received_at_us,
    )


def check(payload: bytes, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the fields of an event, all of them, if its bytes are of the schema.

    Raises:
        InvalidEvent: In every other case, whatever the bytes are.
    """
    if len(payload) > max_bytes:
        raise InvalidEvent("too_large", f"{len(payload)} bytes, at most {max_bytes} allowed")
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        raise InvalidEvent("not_utf8", f"not UTF-8 at byte {error.start}") from None
    try:
        fields = _DECODER.decode(text)
    except InvalidEvent:
        raise
    except RecursionError:
        raise InvalidEvent("too_deep", "nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise InvalidEvent("not_json", f"not JSON: {error}") from None
    if type(fields) is not dict:
        raise InvalidEvent("not_object", f"not a JSON object but {type(fields).__name__}")
    _check_fields(fields)
    return fields


def _check_fields(fields: dict[str, Any]) -> None:
    get = fields.get
    event_id = get("event_id")
    if type(event_id) is not str or not _is_uuid(event_id):
        raise _wrong("event_id", "a UUID", fields)
    for name in ("event_type", "source"):
        value = get(name)
        if type(value) is not str or not _NAME.fullmatch(value):
            raise _wrong(name, "1 to 256 characters without control characters", fields)
    for name in ("sequence", "published_at_ms"):
        value = get(name)
        if type(value) is not int or not 0 <= value < _MAX_NUMBER:
            raise _wrong(name, "an integer from 0 to 2^53 - 1", fields)
    published_us = get("published_at_us", 0)
    if type(published_us) is not int or not 0 <= published_us < _MAX_NUMBER:
        raise _wrong("published_at_us", "an integer from 0 to 2^53 - 1", fields)
    if get("severity", "critical") not in SEVERITIES:
        raise _wrong("severity", "one of " + ", ".join(SEVERITIES), fields)
    if type(get("data", {})) is not dict:
        raise _wrong("data", "a JSON object", fields)


def _wrong(name: str, expected: str, fields: dict[str, Any]) -> InvalidEvent:
    got = repr(fields[name])[:80] if name in fields else "nothing"
    return InvalidEvent("field", f"{name} must be {expected}, got {got}")


def _is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that names a key twice: two readers could read two different events."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise InvalidEvent("duplicate_key", "a key stands twice in one object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are Python's, not JSON's: a browser would fail on them."""
    raise InvalidEvent("not_json", f"not JSON: {name}")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)

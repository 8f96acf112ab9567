"""Control frames: their builders and their reader. Only `broadcaster.v1` clients are sent these."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from broadcaster.core.position import Gap, Position
from broadcaster.wire.frames import text_frame


class Terms(NamedTuple):
    """What a hub says of itself in each `welcome`.

    Attributes:
        beat_interval_s: Seconds between heartbeats.
        max_bytes: It delivers no larger events.
    """

    beat_interval_s: float
    max_bytes: int


def welcome_frame(channel: str, position: Position | None, terms: Terms, recovered: bool | None) -> bytes:
    """The first frame of a channel.

    Args:
        channel: Its name.
        position: Events after it are delivered; None when events are not stored.
        terms: The hub's.
        recovered: Whether nothing is missing after the requested position; None if none was requested.
    """
    return _control_frame("welcome", channel, position=_text(position), recovered=recovered, **terms._asdict())


def beat_frame(channel: str, position: Position | None) -> bytes:
    """A heartbeat: everything up to `position` was sent, filtered out for the client, or announced as a gap."""
    return _control_frame("beat", channel, position=_text(position))


def gap_frame(gap: Gap) -> bytes:
    """A range of events that cannot be delivered."""
    return _control_frame(
        "gap",
        gap.channel,
        cause=str(gap.cause),
        epoch=gap.epoch,
        first=gap.first,
        last=gap.last,
        position=_text(gap.position),
    )


def lag_frame(channel: str, behind_ms: float, behind_events: float, behind_bytes: float) -> bytes:
    """A warning to a slow consumer: its lag, before events are shed or it is closed."""
    return _control_frame(
        "lag", channel, behind_ms=round(behind_ms), behind_events=behind_events, behind_bytes=behind_bytes
    )


def drain_frame(channel: str, reconnect_after_s: float) -> bytes:
    """An announcement that the hub stops: it closes the client, which may reconnect `reconnect_after_s` later."""
    return _control_frame("drain", channel, reconnect_after_s=reconnect_after_s)


def read_control(message: bytes) -> dict[str, Any] | None:
    """The fields of a control frame; None if the message is anything else.

    A foreign event may have a field `control`, too; it has an `event_id`, which no control frame has.
    """
    if not message.startswith(_BEGIN):
        return None
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        return None
    return None if not isinstance(fields, dict) or "event_id" in fields else fields


def _control_frame(control: str, channel: str, **fields: object) -> bytes:
    """`{"control": control, "channel": channel, ...}` as a text frame."""
    return text_frame(json.dumps({"control": control, "channel": channel, **fields}).encode())


def _text(position: Position | None) -> str | None:
    return None if position is None else str(position)


_BEGIN: Final = b'{"control": '

"""An event of a channel as the hub handles it: checked once, framed once, forwarded as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from broadcaster import wire
from broadcaster.core.event import check
from broadcaster.core.position import Position
from broadcaster.hub.fanout.filters import Labels
from broadcaster.hub.fanout.format import PLAIN, Format


class Message(NamedTuple):
    """One valid event.

    Attributes:
        frame: The WebSocket frame, the same for every plain subscriber; other formats are made of it.
        labels: What filters match on.
        position: Where it is stored in its channel; None if it is not stored.
    """

    frame: bytes
    labels: Labels
    position: Position | None


def read_message(payload: bytes, max_bytes: int) -> Message:
    """Check an event and build its frame. The bytes pass unchanged; nothing is encoded again.

    Raises:
        InvalidEvent: It is not of the schema, or too large.
    """
    fields = check(payload, max_bytes=max_bytes)
    position = Position(fields["epoch"], fields["offset"]) if "offset" in fields else None
    return Message(wire.text_frame(payload), Labels.of(fields), position)


def framed(messages: Sequence[Message], form: Format) -> list[bytes]:
    """Events in a format."""
    if form is PLAIN:
        return [message.frame for message in messages]
    return [form.event(message.frame, message.position) for message in messages]

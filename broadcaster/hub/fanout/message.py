"""An event of a channel as the hub handles it: checked once, framed once, forwarded as it is."""

from __future__ import annotations

from typing import NamedTuple

from broadcaster import wire
from broadcaster.core.event import check
from broadcaster.core.position import Position
from broadcaster.hub.fanout.filters import Labels


class Message(NamedTuple):
    """One valid event.

    Attributes:
        frame: The WebSocket frame, the same for every subscriber.
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

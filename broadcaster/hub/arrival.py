"""Bytes from Redis, checked and framed once: what reader, fan-out and ring hand on."""

from __future__ import annotations

from typing import NamedTuple

from broadcaster import wire
from broadcaster.event import check
from broadcaster.hub.filters import Labels
from broadcaster.position import Position


class Arrival(NamedTuple):
    """One valid event.

    Attributes:
        frame: As it goes to every subscriber.
        labels: What filters look at.
        position: Its place in the channel; None if it is not stored.
    """

    frame: bytes
    labels: Labels
    position: Position | None


def read(payload: bytes, max_bytes: int) -> Arrival:
    """Check an event and build its frame. The bytes pass as they are; nothing is encoded again.

    Raises:
        InvalidEvent: It is not of the schema, or too large.
    """
    fields = check(payload, max_bytes=max_bytes)
    position = Position(fields["epoch"], fields["offset"]) if "offset" in fields else None
    return Arrival(wire.text_frame(payload), Labels.of(fields), position)

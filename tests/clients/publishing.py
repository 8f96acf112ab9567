"""Events for other people's clients: published through the product, and compared with what arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from broadcaster import Event, Publisher
from broadcaster.core.event import draft
from tests.clients.programs import Client
from tests.faults.ledger import settings_for
from tests.support import eventually

WRITING = (
    "Grüße, naïve façade – ΑΒΓ Ж שלום مرحبا हिन्दी 日本語 한국어 🚨 👩\u200d🚒 𝄞 e\u0301 \u00a0\u2028\u2029\ufeff "
    "<&> \"'\\/ \t\n\0"
)
"""What may break on the way: up to four bytes, joined, right to left, escaped, ends of lines in JavaScript."""


def of_size(size: int) -> dict[str, str]:
    """Data that makes an event of so many bytes (if it has a number of two digits)."""
    bare = len(draft("SERVER_DOWN", "server-a", 99, data={"text": ""}).stamp(time.time_ns() // 1000))
    return {"text": "x" * (size - bare)}


async def _publish(redis_url: str, all_data: Sequence[Mapping[str, Any]]) -> list[Event]:
    async with Publisher(settings_for(redis_url)) as publisher:
        return [(await publisher.publish("SERVER_DOWN", "server-a", data=data)).event for data in all_data]


def publish(redis_url: str, *all_data: Mapping[str, Any]) -> list[Event]:
    """Publish one event after another through the product's publisher."""
    return asyncio.run(_publish(redis_url, all_data))


def on_the_wire(event: Event) -> dict[str, Any]:
    """What a subscriber has to be given: the event as it was published, with its position."""
    assert event.position is not None
    stored = {"channel": event.channel, "epoch": event.position.epoch, "offset": event.position.offset}
    published: dict[str, Any] = json.loads(event.payload)
    return stored | published


def as_published(fields: dict[str, Any]) -> dict[str, Any]:
    """An event as it came, but for the time at which it was stored, which no test can know."""
    return {name: value for name, value in fields.items() if name != "stored_at_us"}


def events_of(client: Client) -> list[dict[str, Any]]:
    """The events that a client has received: no control frames, and not when they were stored."""
    return [as_published(fields) for text in client.texts() if "control" not in (fields := json.loads(text))]


def assert_got(client: Client, events: Sequence[Event]) -> None:
    """Wait for the last of them; all must have come intact, exactly once, in order, and nothing else."""
    last = events[-1].event_id
    eventually(lambda: any(last in text for text in client.texts()), f"{client!r} does not get the last event", 20)
    assert events_of(client) == [on_the_wire(event) for event in events]

"""Events as a foreign publisher would write them."""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import Any


def event_payload(sequence: int = 1, **changes: Any) -> bytes:
    """An encoded event as a foreign publisher would write it; a change to `...` (Ellipsis) leaves a field out."""
    now_us = time.time_ns() // 1000
    fields: dict[str, Any] = {
        "event_id": str(uuid.uuid4()),
        "event_type": "SERVER_DOWN",
        "source": "server-a",
        "sequence": sequence,
        "published_at_ms": now_us // 1000,
        "published_at_us": now_us,
    } | changes
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


def unstamped(stored: bytes) -> bytes:
    """A stored event without the time at which it was stored, which no test can know."""
    return re.sub(rb'^(\{"channel":"[^"]*","epoch":"[^"]*","offset":\d+,)"stored_at_us":\d+,', rb"\1", stored)

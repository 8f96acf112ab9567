"""A low-latency event broadcaster: Redis Pub/Sub → hub → every WebSocket subscriber.

from broadcaster import Publisher, Subscriber

Each name is imported when it is used for the first time: a command that needs no Redis does not load its client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from broadcaster.core.errors import BroadcasterError, InvalidEvent, Unavailable
    from broadcaster.core.event import Event
    from broadcaster.core.position import Gap, Position
    from broadcaster.publish.publisher import Published, Publisher
    from broadcaster.publish.publisher_sync import PublisherSync
    from broadcaster.settings import Settings, load
    from broadcaster.subscribe.status_events import Fresh, Stale
    from broadcaster.subscribe.subscriber import Subscriber

__all__ = [
    "BroadcasterError",
    "Event",
    "Fresh",
    "Gap",
    "InvalidEvent",
    "Position",
    "Published",
    "Publisher",
    "PublisherSync",
    "Settings",
    "Stale",
    "Subscriber",
    "Unavailable",
    "load",
]

_HOMES: Final = {
    "BroadcasterError": "core.errors",
    "Event": "core.event",
    "Fresh": "subscribe.status_events",
    "Gap": "core.position",
    "InvalidEvent": "core.errors",
    "Position": "core.position",
    "Published": "publish.publisher",
    "Publisher": "publish.publisher",
    "PublisherSync": "publish.publisher_sync",
    "Settings": "settings",
    "Stale": "subscribe.status_events",
    "Subscriber": "subscribe.subscriber",
    "Unavailable": "core.errors",
    "load": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A low-latency event broadcaster: Redis Pub/Sub → hub → every WebSocket subscriber.

from broadcaster import Publisher, Subscriber
"""

from broadcaster.core.errors import BroadcasterError, InvalidEvent, Unavailable
from broadcaster.core.event import Event
from broadcaster.core.position import Gap, Position
from broadcaster.core.status_events import Fresh, Stale
from broadcaster.publish.publisher import Published, Publisher
from broadcaster.settings import Settings, load
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
    "Settings",
    "Stale",
    "Subscriber",
    "Unavailable",
    "load",
]

"""A low-latency event broadcaster: Redis Pub/Sub → hub → every WebSocket subscriber.

from broadcaster import Publisher, Subscriber
"""

from broadcaster.errors import BroadcasterError, InvalidEvent, Unavailable
from broadcaster.event import Event
from broadcaster.notices import Fresh, Stale
from broadcaster.position import Gap, Position
from broadcaster.publisher import Published, Publisher
from broadcaster.settings import Settings, load
from broadcaster.subscriber import Subscriber

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

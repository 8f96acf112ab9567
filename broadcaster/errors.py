"""The errors that programs may want to catch, where they have always been found."""

from broadcaster.core.errors import (
    BroadcasterError,
    ConfigurationError,
    HubRefused,
    HubUnavailable,
    InvalidEvent,
    RedisRefused,
    RedisUnavailable,
    Unavailable,
)

__all__ = [
    "BroadcasterError",
    "ConfigurationError",
    "HubRefused",
    "HubUnavailable",
    "InvalidEvent",
    "RedisRefused",
    "RedisUnavailable",
    "Unavailable",
]

"""What can go wrong, as a tree; every error builds its own sentence and knows its exit code.

BroadcasterError                 70  a bug, or something nobody foresaw
├── ConfigurationError           78  a setting that is wrong, unknown or contradicts another
├── InvalidEvent                  2  an event that is not of the schema
└── Unavailable                  69  something this process depends on is not there
    ├── RedisUnavailable             Redis does not answer (for now)
    ├── RedisRefused                 Redis answers, and will not have us (for good)
    ├── RedisNotInstalled            there is no redis-server to start
    ├── HubUnavailable               the hub is not ready within the deadline
    ├── HubRefused                   the hub answers, and will not have us (for good)
    ├── PortTaken                    the address of the hub is in use
    └── RunIncomplete                a part of the load test did not hand in its result
"""

from __future__ import annotations


class BroadcasterError(Exception):
    """Root of all errors this package raises on purpose."""

    exit_code = 70


class ConfigurationError(BroadcasterError):
    """A setting that is wrong, unknown, or contradicts another; one line per problem."""

    exit_code = 78


class InvalidEvent(BroadcasterError, ValueError):
    """An event that is not of the schema.

    `cause` is one of a small fixed set (it is a counter's label), `detail` names field and reason.
    """

    exit_code = 2

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"invalid event: {detail}")
        self.cause = cause
        self.detail = detail


class Unavailable(BroadcasterError):
    """Something this process depends on is not there."""

    exit_code = 69


class RedisUnavailable(Unavailable):
    """Redis does not answer, or stopped answering: trying again may help."""


class RedisRefused(Unavailable):
    """Redis answers and will not have us (wrong password, missing right): trying again will not help."""


class RedisNotInstalled(Unavailable):
    """No redis-server answers, and none can be found to start."""


class HubUnavailable(Unavailable):
    """The hub did not answer, or was not ready, within the deadline."""


class HubRefused(Unavailable):
    """The hub answers and will not have us (no such channel, bad request): trying again will not help."""


class PortTaken(Unavailable):
    """Another process listens on the hub's address."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"hub: cannot listen on {host}:{port}: {reason}")
        self.host = host
        self.port = port


class RunIncomplete(Unavailable):
    """A part of the load test did not hand in its result before the deadline."""

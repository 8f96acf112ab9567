"""The exception hierarchy; the number is the exit code of a process that ends with the error.

BroadcasterError                 70  a bug, or an unforeseen error
├── ConfigurationError           78  a setting that is wrong, unknown or contradicts another
├── InvalidEvent                  2  an event that violates the schema
├── OutputError                  74  a file, or standard output, that cannot be written any more
├── RunDamaged                   65  the folder of a run that cannot be read
└── Unavailable                  69  something this process depends on is not available
    ├── RedisUnavailable             Redis does not answer (temporary)
    │   ├── RedisUnreachable         there is no connection (temporary)
    │   └── RedisErrorReply          it answers one command with an error (temporary)
    ├── RedisRefused                 Redis answers, and refuses this client (permanent)
    ├── RedisNotInstalled            there is no redis-server to start
    ├── ExtraNotInstalled            a part of this package that was not installed
    ├── HubUnavailable               the hub is not ready within the deadline
    ├── HubRefused                   the hub answers, and refuses this client (permanent)
    ├── PortTaken                    the address of the hub is in use
    └── RunIncomplete                a part of the load test did not deliver its result
"""

from __future__ import annotations

import re
from typing import Final

SAYS: Final = "Redis says: "
"""How errors begin that quote an error reply."""

_SERVER_ERRORS: Final = (
    *("LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "MISCONF", "OOM", "BUSY", "NOSCRIPT"),
    *("CLUSTERDOWN", "TRYAGAIN"),
)

_SERVER_WORDS: Final = ("max number of clients", "Script killed by user")
"""The same without a code of their own."""

_LASTING: Final = ("WRONGTYPE",)

_CODE: Final = re.compile(r"[A-Z]+\b")


class BroadcasterError(Exception):
    """Root of all errors this package raises on purpose."""

    exit_code = 70


class ConfigurationError(BroadcasterError):
    """A setting that is wrong, unknown, or contradicts another; one line per problem."""

    exit_code = 78


class InvalidEvent(BroadcasterError, ValueError):
    """An event that violates the schema.

    `cause` is one of a small fixed set (it is a counter's label), `detail` names field and reason.
    """

    exit_code = 2

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"invalid event: {detail}")
        self.cause = cause
        self.detail = detail


class OutputError(BroadcasterError):
    """A file cannot be written any more: its disk is full, or has failed, or it is not what it was."""

    exit_code = 74

    def __init__(self, where: object, why: OSError | str) -> None:
        said = why if isinstance(why, str) else why.strerror or type(why).__name__
        super().__init__(f"cannot write {where}: {said}")


class RunDamaged(BroadcasterError):
    """The folder of a load test's run lacks a file, or a file of it is no such file; it says which, and where."""

    exit_code = 65


class Unavailable(BroadcasterError):
    """Something this process depends on is not available."""

    exit_code = 69


class RedisUnavailable(Unavailable):
    """Redis does not answer, or stopped answering: a retry may help."""


class RedisUnreachable(RedisUnavailable):
    """There is no connection to Redis.

    `where` is its URL without a password, `reason` says why. The message has no address: health checks show it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"Redis cannot be reached: {reason}")
        self.where = where
        self.reason = reason


class RedisErrorReply(RedisUnavailable):
    """Redis answers a command with an error: others may work, and a retry may help.

    `code` is the word with which Redis begins it, such as `WRONGTYPE`. `is_lasting`: waiting will not change it.
    `is_of_server`: the state of the whole server is the reason, not the command or its keys.
    """

    def __init__(self, said: str, remedy: str = "") -> None:
        super().__init__(SAYS + said + (f" ({remedy})" if remedy else ""))
        found = _CODE.match(said)
        self.code = found[0] if found else ""
        self.is_lasting = self.code in _LASTING or "unknown command" in said
        self.is_of_server = self.code in _SERVER_ERRORS or any(words in said for words in _SERVER_WORDS)


class RedisRefused(Unavailable):
    """Redis answers and refuses this client (wrong password, missing right): a retry will not help."""


class RedisNotInstalled(Unavailable):
    """No redis-server answers, and none can be found to start."""


class ExtraNotInstalled(Unavailable):
    """A part of this package whose extra (`pip install 'critical-event-broadcaster[hub]'`) is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'critical-event-broadcaster[{extra}]'")


class HubUnavailable(Unavailable):
    """The hub did not answer, or was not ready, within the deadline."""


class HubRefused(Unavailable):
    """The hub answers and refuses this client (no such channel, bad request): a retry will not help."""


class PortTaken(Unavailable):
    """Another process listens on the hub's address."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"hub: cannot listen on {host}:{port}: {reason}")
        self.host = host
        self.port = port


class RunIncomplete(Unavailable):
    """A part of the load test did not deliver its result before the deadline."""

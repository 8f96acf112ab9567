"""Whether a Redis is set up for what is promised: its commands, what it evicts, when it cuts subscribers."""

from __future__ import annotations

from typing import Any, Final

from broadcaster.redis.connection import Command

_NEEDED: Final = ("XADD", "XRANGE", "HSET", "HMGET", "EXPIRE", "EVALSHA", "PUBLISH")

ASK_COMMANDS: Final[Command] = ("COMMAND", "INFO", *_NEEDED)
ASK_SETTINGS: Final[tuple[Command, ...]] = (
    ("CONFIG", "GET", "maxmemory*"),
    ("CONFIG", "GET", "client-output-buffer-limit"),
)
"""Rights that a hub need not have: without them nothing is known."""

_LEAST_BUFFER: Final = 8 * 2**20


def missing_commands(reply: Any) -> list[str]:
    """The commands that are needed, and disabled or renamed there; none if the reply does not tell."""
    if not isinstance(reply, list) or len(reply) != len(_NEEDED):
        return []
    return [name for name, about in zip(_NEEDED, reply, strict=True) if not about]


def warnings(memory: Any, buffers: Any) -> list[str]:
    """What of its settings may cost events; empty if the replies do not tell."""
    found = []
    limits = _pairs(memory)
    policy = limits.get("maxmemory-policy", "noeviction")
    if limits.get("maxmemory", "0") != "0" and policy != "noeviction":
        found.append(
            f"its maxmemory-policy is {policy}: it may drop stored events and positions, and who resumes is told "
            "a gap (CONFIG SET maxmemory-policy noeviction)"
        )
    words = _pairs(buffers).get("client-output-buffer-limit", "").split()
    if "pubsub" in words:
        hard = int(words[words.index("pubsub") + 1])
        if 0 < hard < _LEAST_BUFFER:
            found.append(
                f"its client-output-buffer-limit for pubsub is {hard} bytes: in a burst hubs are cut off "
                "(CONFIG SET client-output-buffer-limit 'pubsub 256mb 64mb 60')"
            )
    return found


def _pairs(reply: Any) -> dict[str, str]:
    if not isinstance(reply, list) or not all(type(word) is bytes for word in reply):
        return {}
    words = [word.decode("utf-8", "replace") for word in reply]
    return dict(zip(words[::2], words[1::2], strict=False))

"""What an error reply of Redis means: whether a retry may help, and what there is to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from broadcaster.core.errors import SAYS, RedisErrorReply, RedisRefused

_REFUSALS: Final = ("WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH", "ERR invalid pass", "ERR Client sent AUTH")
"""How error replies begin after which a retry will not help."""

_REFUSALS_IN_A_SCRIPT: Final = (
    "can't run this command",
    "can't access at least one of the keys",
    "ACL failure in script",
)
"""The same for a command in a script: Redis 6.2, and 7."""

_OF_A_SCRIPT: Final = re.compile(
    r"^(?:ERR )?Error running script \(.*?\): @user_script:\d+: |^(?:ERR )?@user_script: ?\d+: -?"
    r"| script: (?:\w+, )?on @\S+$"
)
"""What the versions of Redis and Valkey put around the error of a command in a script."""

_UNKNOWN_IN_A_SCRIPT: Final = re.compile(r"^(?:ERR )?Unknown (?:Redis )?command called from (?:Lua )?script")

_PASSWORD: Final = "was the password changed? It stands in redis.url or redis.password"

_REMEDIES: Final[Mapping[str, str]] = {
    "OOM": "it has reached its maxmemory: raise that, or lower history.max_events",
    "MISCONF": "it cannot write its snapshot to disk: make room there",
    "READONLY": "it is a replica: redis.url has to lead to the master",
    "MASTERDOWN": "it is a replica that has lost its master",
    "NOREPLICAS": "fewer replicas are connected than its min-replicas-to-write",
    "CLUSTERDOWN": "its cluster does not serve this channel: redis-cli --cluster check",
    "LOADING": "it reads its data, which takes a while",
    "BUSY": "a script runs in it and does not end: SCRIPT KILL",
    "DENIED": "set a password for it, or bind it to other addresses",
    "NOAUTH": _PASSWORD,
    "WRONGPASS": _PASSWORD,
    "NOPERM": "its ACL denies a right; those that are needed: config/redis.acl",
    "unknown command": "it is disabled or renamed there, and needed here",
    "max number of clients": "raise its maxclients",
}
"""What to do, by words of an error: its code, or others."""


def read_error(said: str) -> RedisErrorReply | RedisRefused:
    """The error that an error reply stands for.

    Args:
        said: What Redis says, without its leading minus.
    """
    text = _OF_A_SCRIPT.sub("", _OF_A_SCRIPT.sub("", said))
    text = _UNKNOWN_IN_A_SCRIPT.sub("ERR unknown command in a script", text)
    if text.startswith("DENIED"):
        text = text.partition(" because ")[0]  # a page of advice follows
    remedy = next((what for words, what in _REMEDIES.items() if words in text), "")
    if said.startswith(_REFUSALS) or any(words in said for words in _REFUSALS_IN_A_SCRIPT):
        return RedisRefused(SAYS + text + (f" ({remedy})" if remedy else ""))
    return RedisErrorReply(text, remedy)

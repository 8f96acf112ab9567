"""The nodes of Redis at which a hub may subscribe and read the log: which one it uses, and why it has moved."""

from __future__ import annotations

import math
from typing import Final

from broadcaster.core.redaction import redact
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.redis.connection import Command
from broadcaster.settings import RedisTable

REPLICATION: Final[Command] = ("INFO", "replication")


class Nodes:
    """Replicas of `redis.url` (or that alone): one is used at a time. Hubs with the same list spread over it.

    Attributes:
        number: Which one is used, by its place in the settings.
        moves: How often it was left for another one.
        moved: Which one was left last, and why; empty: none.
    """

    def __init__(self, redis: RedisTable, runtime: Runtime = RUNTIME) -> None:
        """Begin with one by chance: a thousand hubs have the same settings."""
        self._urls = redis.node_urls
        numbers = list(range(len(self._urls)))
        if len(numbers) > 1:
            runtime.chance.shuffle(numbers)
        self._clock = runtime.clock
        self._left_at = dict.fromkeys(numbers, -math.inf)
        self.number = numbers[0]
        self.moves = 0
        self.moved = ""

    def __len__(self) -> int:
        return len(self._left_at)

    @property
    def url(self) -> str:
        """Of the one that is used, with the password."""
        return self._urls[self.number]

    def use(self, redis: RedisTable) -> None:
        """The same nodes, and another user or password from now on."""
        self._urls = redis.node_urls

    @property
    def address(self) -> str:
        """Of the one that is used, without the password."""
        return redact(self.url)

    def has_another(self, hold_s: float) -> bool:
        """Whether there is one that has not been left within so many seconds."""
        before = self._clock.loop_s() - hold_s
        return any(left_at < before for number, left_at in self._left_at.items() if number != self.number)

    def leave(self, why: str) -> None:
        """Use the one that was left the longest time ago; if there is only one, it stays."""
        if len(self) == 1:
            return
        self._left_at[self.number] = self._clock.loop_s()
        self.moves += 1
        self.moved = f"{self.address}: {why}"
        others = [number for number in self._left_at if number != self.number]
        self.number = min(others, key=self._left_at.__getitem__)


def why_not_a_replica(node: dict[str, str], master: dict[str, str]) -> str:
    """What is wrong with a node, by what it and the master say of their replication; empty if nothing is.

    Processes that have the same history have the same replication id, and a promoted replica takes another one.
    """
    if not master.get("master_replid") or not node.get("master_replid"):
        return ""  # it does not say; the delivery probe proves more
    if node["master_replid"] == master["master_replid"]:
        is_down = node.get("role") != "master" and node.get("master_link_status") == "down"
        return "it has lost its master" if is_down else ""
    if node.get("role") == "master":
        return "it is no replica: it was promoted, or does not replicate"
    return f"it follows another master, {node.get('master_host')}:{node.get('master_port')}"

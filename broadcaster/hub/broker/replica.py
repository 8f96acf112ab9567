"""The replica at which a hub subscribes and reads the log: whether it is of the master, and has got so far."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from broadcaster.core.backoff import backoff_s
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.position import Head, is_within
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import StoredEvents
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink, server_info
from broadcaster.redis.nodes import REPLICATION, Nodes, why_not_a_replica
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.settings import RedisTable, redis_database

_SHARE: Final = 0.75
"""Of `redis.silence_timeout_s`, which a whole round of the delivery probe may take."""

_LATE_HOLD_S: Final = 10.0
"""For so long a node that was left is not moved to from one that is late, and proven: all of them may be ..."""

_HOLD_S: Final = 1.0
"""... or from one that is of no use: a master that was restarted may have no replica yet."""

_SHORTEST_WAIT_S: Final = 0.01
_LONGEST_WAIT_S: Final = 0.1


class Replica:
    """One of the nodes of `redis.subscribe_url`, and the moves between them.

    Where a channel stands is asked at the master, which alone can begin an epoch. A page is read here, and counts
    only if this has what the master had: the same history (replication id), and no less of it.

    Attributes:
        nodes: Which one it is.
        patience_s: Seconds within which the master answers a round of the delivery probe.
    """

    def __init__(self, redis: RedisTable, pubsub: PubSubLink, runtime: Runtime = RUNTIME) -> None:
        self.nodes: Nodes = pubsub.nodes
        self._pubsub = pubsub
        database = redis_database(redis.url)  # which the URL of a replica need not repeat
        greeting = (("SELECT", database), stream.LOAD_PAGE) if database else (stream.LOAD_PAGE,)
        self._commands = CommandLink(redis, *greeting, runtime=runtime, url=lambda: self.nodes.url)
        self._leads_to = self.nodes.number
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._lag_max_s = redis.replica_lag_max_s
        self.patience_s = _SHARE * redis.silence_timeout_s
        # By the last proof: the master's replication id, and during which connection of the subscription.
        self._history: tuple[str, int] | None = None
        self._unproven = 0  # rounds of the delivery probe since then, where there is no log

    @property
    def lag_max_s(self) -> float:
        """Seconds within which what the master has taken has to come; more where there is no other node to try."""
        is_due = self._lag_max_s < self.patience_s and self.nodes.has_another(_LATE_HOLD_S)
        return self._lag_max_s if is_due else self.patience_s

    def distrust(self, why: str) -> str:
        """Move to another node, if there is one that has not been left lately; what is wrong with this one."""
        said = f"{self.nodes.address}: {why}"
        if self.nodes.has_another(_HOLD_S):
            self._pubsub.move(why)
        return said

    def must_be_proven(self) -> None:
        """A round of the delivery probe begins, which succeeds with `check`; there is no log.

        After one that does not, the subscription begins anew: a replica may have lost its master meanwhile, and
        have copied it anew.
        """
        self._unproven += 1

    async def check(self, master: bytes) -> None:
        """Whether this is a replica of the master that the hub publishes at, whose `INFO replication` is given.

        Raises:
            RedisUnavailable, RedisRefused: It is none, or does not answer as it should.
        """
        try:
            await self._pubsub.verify()
            [info] = await self._execute(REPLICATION)
        except RedisRefused as error:
            if not self.nodes.has_another(_HOLD_S):
                raise
            raise RedisUnavailable(self.distrust(str(error))) from None
        why = why_not_a_replica(server_info(info), server_info(master))
        if not why and self._pubsub.refused and self.nodes.has_another(_HOLD_S):
            why = f"it refuses {', '.join(sorted(self._pubsub.refused))}"
        if why:
            raise RedisUnavailable(self.distrust(why))
        # It has copied the memory of its master anew, and kept its connections: what was published, and had not
        # come to it by then, never will. With a log that is read there; without one a lost connection is told.
        master_history = server_info(master).get("master_replid", "")
        before, self._history = self._history, (master_history, self._pubsub.reconnects)
        failed, self._unproven = self._unproven - 1, 0
        if before is None or before[1] != self._pubsub.reconnects:
            return
        if before[0] not in ("", master_history):
            why = "its master has another history than before"
        elif failed > 0:
            why = "it may have lost its master since the last proof"
        if why:
            self._pubsub.move(why)
            raise RedisUnavailable(f"{self.nodes.address}: {why}")

    async def page(
        self, channel: str, first: int, *, count: int, max_bytes: int, head: Head, master: bytes
    ) -> StoredEvents:
        """A page, as soon as the channel stands here where it stood at the master: at `head`.

        Raises:
            RedisUnavailable, RedisRefused: It does not get so far, or does not answer as it should.
        """
        wanted = stream.peek_epochs(channel), stream.page(channel, first, count, max_bytes), REPLICATION
        give_up_at = self._clock.loop_s() + self.lag_max_s
        for wait_s in backoff_s(_SHORTEST_WAIT_S, _LONGEST_WAIT_S, self._chance):
            found, listed, info = await self._execute(*wanted)  # the last one tells if all were of one history
            if why := why_not_a_replica(server_info(info), server_info(master)):
                break
            if found != [None, None] and _has_reached(here := stream.read_head(found), head):
                page = StoredEvents(here, *stream.read_page(listed))
                if stream.is_of_head(listed, here):
                    return page
            if self._clock.loop_s() > give_up_at:
                why = f"it has not got as far as {head.position} yet"
                break
            await asyncio.sleep(wait_s)
        raise RedisUnavailable(f"{self.nodes.address}: {why}")

    async def _execute(self, *commands: Any) -> list[Any]:
        """Ask the node at which the hub subscribes now."""
        if self._leads_to != self.nodes.number:
            self._leads_to = self.nodes.number
            await self._commands.reset()
        return await self._commands.execute(*commands)

    def close(self) -> None:
        """End the connection."""
        self._commands.close()


def _has_reached(found: Head, head: Head) -> bool:
    """Whether a channel stands at `head` or beyond, in the same history."""
    return is_within(head.position, found.position)

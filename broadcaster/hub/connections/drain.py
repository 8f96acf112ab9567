"""The end of a hub: its connections are closed one after another, so that clients do not return all at once."""

from __future__ import annotations

import asyncio
import logging

from broadcaster import wire
from broadcaster.hub.connections.connection import ConnectionContext
from broadcaster.hub.connections.registry import TICK_S

log = logging.getLogger("broadcaster.hub")


async def drain(context: ConnectionContext, within_s: float) -> None:
    """Close every connection (1012) at a moment of its own; until its close each client gets what comes.

    A `broadcaster.v1` client is told at once, and how long to stay away after the close.

    Args:
        context: Of the connections.
        within_s: The closes are spread over so many seconds.
    """
    registry, clock, chance = context.registry, context.runtime.clock, context.runtime.chance
    connections = registry.everyone()
    chance.shuffle(connections)
    begun_at = clock.loop_s()
    if connections:
        log.info("draining: %d connections within %g s", len(connections), within_s)
    for number, connection in enumerate(connections):
        if connection.wants_control and connection.memberships and connection.close_deadline is None:
            away_s = round(chance.uniform(0, max(within_s, 1.0)), 3)
            connection.tell(wire.drain_frame(connection.memberships[0].channel.name, away_s))
        if number % 100 == 99:
            await asyncio.sleep(0)
    for number, connection in enumerate(connections):
        due = begun_at + within_s * number / len(connections)
        while registry.connected and (wait_s := due - clock.loop_s()) > 0.005:
            await asyncio.sleep(min(wait_s, TICK_S))  # they may all leave by themselves meanwhile
        connection.close(wire.CloseCode.RESTART, "the hub is restarting")


async def close_all(context: ConnectionContext, code: wire.CloseCode, reason: str, within_s: float) -> None:
    """Close every connection, wait until they are gone, cut those that are left."""
    registry, clock = context.registry, context.runtime.clock
    for connection in registry.everyone():
        connection.close(code, reason)
    deadline = clock.loop_s() + within_s
    while registry.connected and clock.loop_s() < deadline:
        await asyncio.sleep(0.01)
    for connection in registry.everyone():
        connection.abort()

"""How soon is a hub up to date that was cut off while much was stored?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Final

import redis

from broadcaster.core import event
from broadcaster.core.runtime import LIMITS
from broadcaster.redis import stream
from broadcaster.redis.connection import RUN_ID, Command
from broadcaster.settings import HistoryTable
from tests.bench.figures import Line, absolute_line, number
from tests.bench.hubs import PRODUCT, redis_url, running_hub, statistics
from tests.bench.plan import OUTAGE_CONNS, OUTAGE_EVENTS
from tests.bench.processes import TrialError, cpu_s
from tests.bench.stored import CHANNEL, clear, head
from tests.bench.trial import Bench, await_result, say

_EVENT_BYTES: Final = 256
_GRACE_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class CatchUp:
    """CPU time of the hub from the cut until everybody had everything; wall time from the end of the outage."""

    cpu_s: float
    wall_s: float


def catchup(bench: Bench) -> list[Line]:
    """One transaction of Redis cuts the hub's subscription and stores 10,000 events; 5 subscribers wait."""
    if bench.hub != PRODUCT:
        return [Line("catchup: after an outage", verdict=f"skipped: {bench.hub} stores nothing")]
    events = OUTAGE_EVENTS // 5 if bench.quick else OUTAGE_EVENTS
    done: list[CatchUp] = []
    for number_of_round in range(1, bench.rounds + 1):
        done.append(_outage(bench, events))
        say(
            f"catchup {number_of_round}/{bench.rounds}: {events:,} events, "
            f"CPU {done[-1].cpu_s:.3f} s, wall {done[-1].wall_s:.3f} s"
        )
    wall = f"wall time, s: {number(median(each.wall_s for each in done))}"
    return [
        absolute_line(
            f"catchup: {events:,} events, {OUTAGE_CONNS} subscribers, hub CPU, s",
            [each.cpu_s for each in done],
            1.0,
            wall,
        )
    ]


def _outage(bench: Bench, events: int) -> CatchUp:
    clear(bench.redis_port)
    commands = _commands(events)
    with running_hub(bench.hub, bench.redis_port, bench.tools) as hub:
        with (
            bench.load(hub.port, OUTAGE_CONNS, first=1, last=events, by_offset=1) as load,
            redis.Redis.from_url(redis_url(bench.redis_port)) as client,
        ):
            client.execute_command(*stream.LOAD)
            before_s = cpu_s(hub.pid)
            over_us = _cut_and_store(client, commands)
            result = await_result(load, _GRACE_S)
            used_s = cpu_s(hub.pid) - before_s
        result.check(bench.hub)
        _check_whence(statistics(hub.port), str(head(bench.redis_port)), events)
    return CatchUp(used_s, (result.ended_at_us - over_us) / 1e6)


def _commands(events: int) -> list[Command]:
    """The events as the publisher would send them all at once, made before the clock counts."""
    now_us = time.time_ns() // 1000
    bare = len(event.draft("SERVER_DOWN", "server-a", events, data={"pad": ""}).stamp(now_us))
    data = {"pad": "x" * (_EVENT_BYTES - bare)}
    drafts = [event.draft("SERVER_DOWN", "server-a", number + 1, data=data) for number in range(events)]
    stored = [(draft.unpublished.event_id, draft.stamp(now_us)) for draft in drafts]
    return [
        stream.store(CHANNEL, stored[start : start + LIMITS.store_events], HistoryTable())
        for start in range(0, events, LIMITS.store_events)
    ]


def _cut_and_store(client: redis.Redis, commands: list[Command]) -> int:
    """Nothing comes between the commands of a transaction: no subscription can hear any of these events.

    Returns the end of the outage by Redis' clock, in µs: from then on it answers the hub again.
    """
    run_id = client.info("server")["run_id"]
    with client.pipeline(transaction=True) as transaction:
        transaction.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
        for command in commands:
            words = (run_id if word is RUN_ID else word for word in command)
            transaction.execute_command(*words)  # type: ignore[no-untyped-call]
        transaction.time()
        killed, *replies, (over_s, and_us) = transaction.execute()
    heard = sum(stored.receivers or 0 for reply in replies for stored in stream.read_stored(reply))
    if not killed or heard:
        raise TrialError(f"the hub was not cut off: {killed} subscriptions ended, {heard} events were heard")
    return int(over_s) * 1_000_000 + int(and_us)


def _check_whence(said: dict[str, object], expected: str, events: int) -> None:
    """The hub stands at the head, and what it handed on came out of the log."""
    channels = said["channels"]
    assert isinstance(channels, dict)
    mine = channels[CHANNEL]
    if mine["position"] != expected or mine["recovered"] != events or mine["gaps"]:
        raise TrialError(
            f"the hub is at {mine['position']}, the channel at {expected}; {mine['recovered']} of {events} "
            f"events came from the log, gaps: {mine['gaps']}"
        )

"""The hub and the channel of a load test: its own, so that nobody is alarmed by it; what the hub says of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from broadcaster.auth.tokens import create_token, monitoring_token
from broadcaster.core.errors import ConfigurationError, HubUnavailable, Unavailable
from broadcaster.core.position import Position
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest.records import ClockRecord, TraceRecord
from broadcaster.loadtest.run import Run, is_under_honcho
from broadcaster.redis import commands
from broadcaster.settings import RedisTable, Settings, SubscriberTable
from broadcaster.subscribe import hub_status

log = logging.getLogger("broadcaster.loadtest")

_MARGIN_S: Final = 3600.0
"""So much longer than the run should last its token is valid: one that expires would end its connections."""


_SELECTS: Final = ("type", "source", "severity", "since", "last")
"""What a URL must not ask for in a load test."""


def check_url(settings: Settings) -> None:
    """Refuse a load test whose subscribers would not be sent every event, and none from before.

    What they had not asked for could not be told from what was lost without a word.

    Raises:
        ConfigurationError: `fleet.url` has a filter, or begins elsewhere than now.
    """
    query = parse_qsl(urlsplit(settings.fleet_url).query, keep_blank_values=True)
    if found := [name for name in _SELECTS if name in dict(query)]:
        raise ConfigurationError(
            f"fleet.url: has {', '.join(found)}, but in a load test all subscribers are to receive all events: "
            "it takes channel only"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load test publishes and subscribes.

    Attributes:
        channel: `events.loadtest.<run>` on a hub of the run's own; else what `fleet.url` or `event.channel` says.
        url: Where its fleet connects.
        subscriber: The settings of its clients, with a token.
        hub_pid: Process id of the hub, on its own machine; 0 if it does not say.
        token: For the hub's counters, trace and clocks.
    """

    channel: str
    url: str
    subscriber: SubscriberTable
    hub_pid: int
    token: str = field(repr=False)

    async def hub_clock(self) -> ClockRecord:
        """Compare the clock of the hub with that of this process."""
        own_ns = CLOCK.wall_ahead_ns()
        try:
            read = await hub_status.clock(
                hub_status.base_url(self.url), tls_ca=self.subscriber.tls_ca, token=self.token
            )
        except HubUnavailable as error:
            return ClockRecord("hub", "", own_ns, None, None, None, str(error))
        return ClockRecord("hub", read.instance, own_ns, read.ahead_ns, read.error_ns, read.wall_ahead_ns, "")

    async def trace_page(self, after: Position | None) -> dict[str, Any]:
        """The next page of the hub's trace.

        Raises:
            HubUnavailable: It has none.
        """
        url = hub_status.base_url(self.url)
        return await hub_status.trace(url, self.channel, after, tls_ca=self.subscriber.tls_ca, token=self.token)


async def redis_clock(redis: RedisTable) -> ClockRecord:
    """Compare the wall clock of Redis with CLOCK_MONOTONIC of this process."""
    own_ns = CLOCK.wall_ahead_ns()
    try:
        ahead_ns, error_ns = await commands.server_clock(redis)
    except Unavailable as error:
        return ClockRecord("redis", "", own_ns, None, None, None, str(error))
    return ClockRecord("redis", "", own_ns, ahead_ns, error_ns, None, "")


class TraceLog:
    """What the hub of a fleet process says of the events that have come.

    Attributes:
        fetched_for: How many events had come when it was read last, also those of other sources.
    """

    def __init__(self, target: Target) -> None:
        self.fetched_for = 0
        self._target = target
        self._after: Position | None = None
        self._found: dict[Position, tuple[int, int | None, int]] = {}

    async def fetch(self, events: int) -> None:
        """Read what is new; `events` have come so far. Where the hub has no trace nothing is known."""
        self.fetched_for = events
        try:
            complete = False
            while not complete:
                page = await self._target.trace_page(self._after)
                for row in page["events"]:
                    self._after = Position.parse(row["position"])
                    instants = row["read_mono_ns"], row["written_mono_ns"], int(row["recovered"])
                    self._found[self._after] = instants
                complete = page["complete"] is True or not page["events"]
        except HubUnavailable as error:
            log.info("no trace of the hub: %s", error)
        except (KeyError, TypeError, ValueError):
            log.warning("the hub's trace cannot be read")

    def rows(self, stored: Mapping[str, tuple[Position | None, int | None]]) -> list[TraceRecord]:
        """One row per event that has come: by event_id, its position, and when it says it was stored."""
        nothing = None, None, 0
        return [
            TraceRecord(event_id, stored_us, *(self._found.get(position, nothing) if position else nothing))
            for event_id, (position, stored_us) in stored.items()
        ]


async def find_target(settings: Settings, run: Run, *, subscribers: int = 0) -> Target:
    """Wait for the hub of a run, and for so many subscribers of it, among which are all of the run's fleets.

    Raises:
        ConfigurationError: See `check_url`.
        HubUnavailable: They were not there in time; or another hub has its port, which is said at once.
    """
    check_url(settings)
    url, within_s = settings.fleet_url, settings.loadtest.start_timeout_s
    deadline = CLOCK.loop_s() + within_s
    brings_a_hub = is_under_honcho() and not settings.fleet.url
    found = await hub_status.wait_until_ready(
        hub_status.base_url(url),
        subscribers=subscribers,
        within_s=within_s,
        tls_ca=settings.subscriber.tls_ca,
        token=(token := monitoring_token(settings, _lasts_s(settings))),
        # Parts that are started by hand, with a name, have any hub.
        is_ours=run.has_started if brings_a_hub and not settings.loadtest.run else None,
        whole=brings_a_hub and not settings.loadtest.run,
    )
    if not found:
        log.warning("the hub does not show its counters to this token; give it one that may monitor")
    if subscribers:  # the hub may have others, and then its counters do not say that these are there
        await _wait_for_fleets(run, settings, deadline)
    pid = found.get("pid", 0)
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not (brings_a_hub and (not found or await asyncio.to_thread(run.has_started, pid))):
        asked = next((value for key, value in query if key == "channel"), settings.event.channel)
        return Target(asked, url, settings.subscriber, pid, token)
    url = urlunsplit(parts._replace(query=urlencode([("channel", run.channel), *query])))
    return Target(run.channel, url, _with_token(settings, run.channel), pid, token)


def _with_token(settings: Settings, channel: str) -> SubscriberTable:
    """The settings of the clients, with a token of their own where the run has none and its hub asks for one."""
    subscriber = settings.subscriber
    if subscriber.token.get_secret_value() or settings.auth.mode != "token":
        return subscriber
    try:
        token = create_token(
            settings.auth, "loadtest", subscribe=[channel], publish=(), lasts_s=_lasts_s(settings)
        )
    except ConfigurationError:
        return subscriber  # no key can sign: the hub says 401
    return subscriber.model_copy(update={"token": type(subscriber.token)(token)})


def _lasts_s(settings: Settings) -> float:
    loadtest = settings.loadtest
    return _MARGIN_S + (loadtest.events / loadtest.rate_hz if loadtest.rate_hz else 0.0)


async def _wait_for_fleets(run: Run, settings: Settings, deadline: float) -> None:
    """Wait for the marks of all fleet processes; those of other hosts may be copied here (docs/measuring.md)."""
    wanted = range(1, settings.fleet.processes + 1)
    while missing := [run.connected(number) for number in wanted if not run.connected(number).exists()]:
        if CLOCK.loop_s() > deadline:
            names = ", ".join(path.name for path in missing)
            raise HubUnavailable(f"not all subscribers have connected in time: no {names} in {run.folder}")
        await asyncio.sleep(0.05)

"""The hub and the channel of a load test: its own, so that nobody is alarmed by it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from broadcaster.auth.tokens import create_token
from broadcaster.core.errors import ConfigurationError
from broadcaster.loadtest.run import Run, is_under_honcho
from broadcaster.settings import Settings, SubscriberTable
from broadcaster.subscribe import hub_status

_MARGIN_S: Final = 3600.0
"""So much longer than the run should last its token is valid: one that expires would end its connections."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load test publishes and subscribes.

    Attributes:
        channel: `events.loadtest.<run>` on a hub of the run's own; else what `fleet.url` or `event.channel` says.
        url: Where its fleet connects.
        subscriber: The settings of its clients, with a token.
        hub_pid: Process id of the hub, on its own machine; 0 if it does not say.
    """

    channel: str
    url: str
    subscriber: SubscriberTable
    hub_pid: int


async def find_target(settings: Settings, run: Run, *, subscribers: int = 0) -> Target:
    """Wait for the hub of a run, and for so many subscribers of it.

    Raises:
        HubUnavailable: It was not ready in time; or another hub has its port, which is said at once.
    """
    url = settings.fleet_url
    brings_a_hub = is_under_honcho() and not settings.fleet.url
    found = await hub_status.wait_until_ready(
        hub_status.base_url(url),
        subscribers=subscribers,
        within_s=settings.loadtest.start_timeout_s,
        tls_ca=settings.subscriber.tls_ca,
        # Parts that are started by hand, with a name, have any hub.
        is_ours=run.has_started if brings_a_hub and not settings.loadtest.run else None,
        whole=brings_a_hub and not settings.loadtest.run,
    )
    pid = found.get("pid", 0)
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not (brings_a_hub and await asyncio.to_thread(run.has_started, pid)):
        asked = next((value for key, value in query if key == "channel"), settings.event.channel)
        return Target(asked, url, settings.subscriber, pid)
    url = urlunsplit(parts._replace(query=urlencode([("channel", run.channel), *query])))
    return Target(run.channel, url, _with_token(settings, run.channel), pid)


def _with_token(settings: Settings, channel: str) -> SubscriberTable:
    """The settings of the clients, with a token of their own where the run has none and its hub asks for one."""
    subscriber, loadtest = settings.subscriber, settings.loadtest
    if subscriber.token.get_secret_value() or settings.auth.mode != "token":
        return subscriber
    lasts_s = _MARGIN_S + (loadtest.events / loadtest.rate_hz if loadtest.rate_hz else 0.0)
    try:
        token = create_token(settings.auth, "loadtest", subscribe=[channel], publish=(), lasts_s=lasts_s)
    except ConfigurationError:
        return subscriber  # no key can sign: the hub says 401
    return subscriber.model_copy(update={"token": type(subscriber.token)(token)})

"""The publisher of `honcho start`: sample events, so that a user sees something arrive."""

from __future__ import annotations

import logging
from collections.abc import Callable

from broadcaster.core.logs import ThrottledLog
from broadcaster.publish.publisher import Publisher
from broadcaster.publish.schedule import on_schedule, padding
from broadcaster.settings import Settings
from broadcaster.subscribe import hub_status

log = logging.getLogger("broadcaster.publisher")


async def publish_samples(
    settings: Settings, on_start: Callable[[], None] = lambda: None, token: str = ""
) -> None:
    """Wait for hub and one subscriber, then publish at `publisher.rate_hz` until cancelled.

    Args:
        settings: Of the hub, of Redis, and of what is published.
        on_start: Called when both are there.
        token: For the hub's counters. Where it does not show them, no subscriber is waited for.

    Raises:
        HubUnavailable: They were not ready in time.
        RedisUnavailable, RedisRefused: Redis was not available at the start. Later failures are logged.
    """
    table = settings.publisher
    await hub_status.wait_until_ready(
        settings.hub_url,
        subscribers=1,
        within_s=table.start_timeout_s,
        tls_ca=settings.subscriber.tls_ca,
        token=token,
    )
    rhythm = f"{table.rate_hz:g} event{'s' if table.rate_hz != 1 else ''} a second"
    log.info("publishing %s to %s", rhythm, settings.event.channel)
    on_start()
    data = padding(settings, note="a sample event")
    throttled = ThrottledLog(log)
    async with Publisher(settings) as publisher:
        async for due in on_schedule(0, table.rate_hz):
            batch = [publisher.draft(table.event_type, table.source, data=data) for _ in due]
            for result in await publisher.publish_all(batch):
                if result.error is not None:
                    said = "#%d may not have been published: %s"
                    throttled.log(logging.WARNING, result.error, said, result.event.sequence, result.error)
                elif result.heard == 0 and not settings.redis.subscribe_url:  # hubs at replicas are not counted
                    throttled.log(logging.WARNING, "", "#%d was heard by nobody", result.event.sequence)

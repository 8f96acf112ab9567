"""The hub's parts put together, its HTTP routes, and its life from start to SIGTERM.

Sole home of Sanic (with `front.py`, which borrows its protocol).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import sys
from dataclasses import asdict
from math import ceil
from types import SimpleNamespace
from typing import Any

from sanic import HTTPResponse, Request, Sanic, json
from sanic.config import Config

from broadcaster import wire
from broadcaster.bus import Subscription
from broadcaster.errors import ConfigurationError, PortTaken
from broadcaster.hub.fanout import Fanout
from broadcaster.hub.front import Front
from broadcaster.hub.intake import Intake
from broadcaster.hub.roster import Roster
from broadcaster.hub.statistics import HubStatistics
from broadcaster.settings import Settings
from broadcaster.version import VERSION

log = logging.getLogger("broadcaster.hub")

App = Sanic[Config, SimpleNamespace]


class Hub:
    """The parts of one hub. Made inside a running event loop; nothing happens before `serve`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fanout = Fanout(settings.event.channel, settings.hub.ring_bytes)
        possible = min(settings.hub.max_connections, _open_files())
        self.roster = Roster(settings.hub.model_copy(update={"max_connections": possible}), self.fanout)
        self.intake = Intake(self.fanout, settings.event.max_bytes)
        self.subscription = Subscription(
            settings.redis,
            settings.event.channel,
            on_events=self.intake.take,
            on_confirmed=self.fanout.resume,
            on_lost=self.fanout.interrupt,
        )
        self.stopping = False
        self._started_at = asyncio.get_running_loop().time()

    @property
    def ready(self) -> bool:
        return self.subscription.confirmed and not self.stopping

    def admit(self, target: wire.Target) -> wire.Refusal | None:
        """Whether a well-formed upgrade request is let in; the refusal if not."""
        if self.stopping:
            return wire.Refusal(503, "the hub is stopping", retry_after_s=1)
        if self.roster.full:
            return wire.Refusal(503, "too many subscribers", retry_after_s=5)
        for key, value in target.query:
            if key != "channel":
                return wire.Refusal(400, f"unknown query parameter {key[:40]!r}")
            if value != self.settings.event.channel:
                return wire.Refusal(404, f"no such channel here; this hub serves {self.fanout.channel}")
        return None

    def statistics(self) -> HubStatistics:
        return HubStatistics(
            version=VERSION,
            pid=os.getpid(),
            uptime_s=round(asyncio.get_running_loop().time() - self._started_at, 3),
            ready=self.ready,
            channel=self.fanout.channel,
            connected=self.roster.connected,
            peak=self.roster.peak,
            behind=len(self.fanout.behind),
            events_received=self.intake.received,
            invalid=dict(self.intake.invalid),
            deliveries=self.fanout.deliveries,
            sent_bytes=self.fanout.sent_bytes,
            slow_closed=self.roster.slow_closed,
            talkers_closed=self.roster.talkers_closed,
            ping_timeouts=self.roster.ping_timeouts,
            aborted=self.roster.aborted,
            redis_reconnects=self.subscription.reconnects,
            ring_bytes=self.fanout.ring.bytes,
        )


def create_app(hub: Hub) -> App:
    """The HTTP side: `/health`, `/health/live`, `/health/ready`, `/stats`. `/ws` never reaches it."""
    app = Sanic(f"broadcaster-{id(hub):x}", configure_logging=False)
    app.config.KEEP_ALIVE = False  # an upgrade on a connection that Sanic has used would reach Sanic
    app.config.ACCESS_LOG = False
    app.config.REQUEST_TIMEOUT = ceil(hub.settings.hub.handshake_timeout_s)
    app.config.REQUEST_MAX_SIZE = 65_536

    @app.get("/health/live")
    async def live(request: Request) -> HTTPResponse:
        """The event loop turns."""
        return json({"live": True})

    @app.get("/health/ready")
    @app.get("/health", name="health")
    async def ready(request: Request) -> HTTPResponse:
        """200 when events get through: the subscription is confirmed and the hub is not stopping."""
        body = {"ready": hub.ready, "redis": hub.subscription.confirmed, "stopping": hub.stopping}
        return json(body, status=200 if hub.ready else 503)

    @app.get("/stats")
    async def stats(request: Request) -> HTTPResponse:
        return json(asdict(hub.statistics()))

    return app


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run one hub until `stop` is set; returns the exit code.

    Raises:
        ConfigurationError: A second hub was asked for on the same port.
        PortTaken: Somebody else listens there.
        RedisRefused: Redis will not have us, for good.
    """
    _one_hub_per_port()
    hub = Hub(settings)
    app = create_app(hub)
    front = Front.bound(hub.roster, hub.admit, settings.hub.header_max_bytes)
    host, port = settings.hub.host, settings.hub.port
    try:
        server: Any = await app.create_server(  # untyped in Sanic
            host,
            port,
            protocol=front,
            backlog=settings.hub.backlog,
            asyncio_server_kwargs={"start_serving": False},
        )
        await server.startup()
        await server.before_start()
        await server.start_serving()
        await server.after_start()
    except OSError as error:
        raise PortTaken(host, port, error.strerror or str(error)) from None
    log.info("listening on ws://%s:%d/ws", host, port)
    _calm_the_collector()

    subscription = asyncio.create_task(hub.subscription.run(), name="subscription")
    timer = asyncio.create_task(hub.roster.keep(), name="timer")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        # A hub whose reader or timer is dead must not look alive: whatever ends first ends the hub.
        await asyncio.wait([subscription, timer, stopped], return_when=asyncio.FIRST_COMPLETED)
        hub.stopping = True
        for task in (subscription, timer):
            if task.done():
                task.result()  # raises what ended it
        return 0
    finally:
        hub.stopping = True
        server.close()
        await hub.roster.close_all(wire.CloseCode.RESTART, "the hub is restarting", settings.hub.shutdown_s)
        await _cancel(subscription, timer, stopped)
        for connection in list(server.connections):
            if not connection.close_if_idle():
                connection.abort()
        with contextlib.suppress(Exception):
            await server.before_stop()
            await server.after_stop()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _one_hub_per_port() -> None:
    name = os.environ.get("HONCHO_PROCESS_NAME", "")
    if name.startswith("hub.") and name != "hub.1":
        raise ConfigurationError(f"one hub per port: {name} would have to share hub.1's; start one hub only")


def _open_files() -> int:
    """How many subscribers may be open files: the soft limit, raised to the hard one, less a few for the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(1, soft - 100) if soft != resource.RLIM_INFINITY else sys.maxsize


def _calm_the_collector() -> None:
    """The hot path makes no reference cycles: look for them rarely, and never among what is here to stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)

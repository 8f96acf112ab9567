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
import ssl
import sys
from dataclasses import asdict
from math import ceil
from types import SimpleNamespace
from typing import Any

from sanic import HTTPResponse, Request, Sanic, json
from sanic.config import Config

from broadcaster import history, wire
from broadcaster.bus import CommandLink, Subscription
from broadcaster.errors import ConfigurationError, PortTaken
from broadcaster.hub.channels import Channels
from broadcaster.hub.crew import Crew
from broadcaster.hub.desk import Desk
from broadcaster.hub.freshness import Freshness
from broadcaster.hub.front import Front
from broadcaster.hub.gate import Gate
from broadcaster.hub.intake import Intake
from broadcaster.hub.log import EventLog
from broadcaster.hub.pacer import Pacer
from broadcaster.hub.pages import Pages
from broadcaster.hub.roster import Roster
from broadcaster.hub.statistics import ChannelStatistics, HubStatistics
from broadcaster.settings import Settings
from broadcaster.version import VERSION

log = logging.getLogger("broadcaster.hub")

App = Sanic[Config, SimpleNamespace]


class Hub:
    """The parts of one hub. Made inside a running event loop; nothing happens before `serve`."""

    def __init__(self, settings: Settings) -> None:
        settings = self.settings = _within_open_files(settings)
        self.crew = Crew()
        stored = settings.history.enabled
        self._commands = CommandLink(settings.redis, *([history.LOAD] if stored else []))
        events = EventLog(self._commands, settings.history, settings.event.max_bytes)
        self.pages = Pages(events)
        pacer = Pacer()
        self.channels = Channels(settings, (events, self.pages) if stored else None, pacer, self.crew.spawn)
        self.freshness = Freshness(settings, self._commands, self.channels)
        self.intake = Intake(self.channels, self.freshness, settings.event.max_bytes)
        self.gate = Gate(settings, self.channels)
        self.desk = Desk(settings, self.gate.access)
        self.pacer = pacer
        self.roster = Roster(settings.hub, self.channels, self.freshness, self.gate, pacer)
        self.subscription = Subscription(
            settings.redis,
            on_messages=self.intake.take,
            on_confirmed=self._on_confirmed,
            on_lost=self._on_lost,
        )
        self.subscription.hold(self.freshness.channel)
        self.channels.begin(self.subscription)
        self._started_at = asyncio.get_running_loop().time()

    def start(self) -> None:
        """Begin to work: subscription, proofs, timer."""
        for work, name in (
            (self.subscription.run(), "subscription"),
            (self.freshness.run(self.subscription), "proofs"),
            (self.pages.run(), "pages"),
            (self.roster.keep(), "timer"),
        ):
            self.crew.spawn(work, name)

    async def stop(self) -> None:
        """End all work; the connections are gone by now."""
        await self.crew.dismiss()
        self.desk.close()
        self._commands.close()

    def _on_confirmed(self, channel: str) -> None:
        self.channels.on_confirmed(channel)
        self.freshness.hurry()

    def _on_lost(self, channel: str) -> None:
        self.channels.on_lost(channel)
        self.freshness.doubt(f"the subscription to {channel} is lost")

    @property
    def ready(self) -> bool:
        return self.freshness.proven and not self.gate.stopping

    def statistics(self) -> HubStatistics:
        channels = {name: ChannelStatistics.of(channel) for name, channel in self.channels.open.items()}
        totals = self.channels.totals()
        return HubStatistics(
            version=VERSION,
            pid=os.getpid(),
            uptime_s=round(asyncio.get_running_loop().time() - self._started_at, 3),
            ready=self.ready,
            channel=self.channels.default,
            connected=self.roster.connected,
            peak=self.roster.peak,
            behind=len(self.roster.behind),
            events_received=totals["received"],
            invalid=dict(self.intake.invalid),
            deliveries=totals["deliveries"],
            published=self.desk.published,
            filtered=totals["filtered"],
            shed=totals["shed"],
            sent_bytes=totals["sent_bytes"],
            slow_closed=self.roster.slow_closed,
            talkers_closed=self.roster.talkers_closed,
            ping_timeouts=self.roster.ping_timeouts,
            expired=self.roster.expired,
            refused=dict(self.gate.refused),
            aborted=self.roster.aborted,
            redis_reconnects=self.subscription.reconnects,
            proofs=self.freshness.rounds,
            pages_read=self.pages.read,
            ring_bytes=sum(channel.ring_bytes for channel in channels.values()),
            channels=channels,
        )


def create_app(hub: Hub) -> App:
    """The HTTP side: `/health`, `/health/live`, `/health/ready`, `/stats`, `/publish`. `/ws` never reaches it."""
    app = Sanic(f"broadcaster-{id(hub):x}", configure_logging=False)
    app.config.KEEP_ALIVE = False  # an upgrade on a connection that Sanic has used would reach Sanic
    app.config.ACCESS_LOG = False
    app.config.REQUEST_TIMEOUT = ceil(hub.settings.hub.handshake_timeout_s) + 1  # the gate's deadline comes first
    app.config.REQUEST_MAX_SIZE = 65_536

    @app.get("/health/live")
    async def live(request: Request) -> HTTPResponse:
        """The event loop turns."""
        return json({"live": True})

    @app.get("/health/ready")
    @app.get("/health", name="health")
    async def ready(request: Request) -> HTTPResponse:
        """200 while it is proven that events get through, and the hub is not stopping."""
        body = {
            "ready": hub.ready,
            "redis": hub.channels.default in hub.subscription.confirmed,
            "stopping": hub.gate.stopping,
            "trouble": hub.freshness.trouble,
        }
        return json(body, status=200 if hub.ready else 503)

    @app.get("/stats")
    async def stats(request: Request) -> HTTPResponse:
        return json(asdict(hub.statistics()))

    @app.post("/publish")
    async def publish(request: Request) -> HTTPResponse:
        """201 with what became of the event."""
        if hub.gate.stopping:
            return json({"error": "the hub is stopping"}, status=503, headers={"Retry-After": "1"})
        reply = await hub.desk.answer(request.headers.getall("Authorization", []), request.body)
        return json(reply.body, status=reply.status, headers=reply.headers)

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
    front = Front.bound(hub.gate, hub.roster, hub.pacer, settings.hub.header_max_bytes)
    host, port = settings.hub.host, settings.hub.port
    try:
        server: Any = await app.create_server(  # untyped in Sanic
            host,
            port,
            protocol=front,
            backlog=min(settings.hub.backlog, hub.settings.hub.max_handshakes),
            ssl=_tls(settings),
            asyncio_server_kwargs={"start_serving": False, **_tls_deadlines(settings)},
        )
        await server.startup()
        await server.before_start()
        await server.start_serving()
        await server.after_start()
    except OSError as error:
        raise PortTaken(host, port, error.strerror or str(error)) from None
    log.info("listening on %s://%s:%d/ws", "wss" if settings.hub.tls_cert else "ws", host, port)
    _calm_the_collector()

    hub.start()
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        # A hub with a dead part must not look alive: whatever ends first ends the hub.
        ends: list[asyncio.Future[Any]] = [hub.crew.failed, stopped]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        hub.gate.stopping = True
        if hub.crew.failed.done():
            hub.crew.failed.result()  # raises what ended it
        return 0
    finally:
        hub.gate.stopping = True
        await hub.roster.drain(settings.hub.drain_s if stop.is_set() else 0.0)
        server.close()  # only now: until here /health/ready says that this hub is going
        await hub.roster.close_all(wire.CloseCode.RESTART, "the hub is restarting", settings.hub.shutdown_s)
        await hub.stop()
        stopped.cancel()
        for connection in list(server.connections):
            if not connection.close_if_idle():
                connection.abort()
        with contextlib.suppress(Exception):
            await server.before_stop()
            await server.after_stop()


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """For wss:// and https://, if there is a certificate.

    Raises:
        ConfigurationError: It cannot be read, or is not the key's.
    """
    if not settings.hub.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password that is no password: else the library asks for one on the terminal, and waits.
        context.load_cert_chain(settings.hub.tls_cert, settings.hub.tls_key, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigurationError(f"hub.tls_cert, hub.tls_key: {error}") from None
    return context


def _tls_deadlines(settings: Settings) -> dict[str, float]:
    """Seconds for the handshake of TLS, before which no request can come, and for its goodbye."""
    hub = settings.hub
    if not hub.tls_cert:
        return {}
    return {"ssl_handshake_timeout": hub.handshake_timeout_s, "ssl_shutdown_timeout": hub.close_timeout_s}


def _one_hub_per_port() -> None:
    name = os.environ.get("HONCHO_PROCESS_NAME", "")
    if name.startswith("hub.") and name != "hub.1":
        raise ConfigurationError(f"one hub per port: {name} would have to share hub.1's; start one hub only")


def _within_open_files(settings: Settings) -> Settings:
    """The settings with no more connections than there can be open files."""
    files = _open_files()
    handshakes = min(settings.hub.max_handshakes, max(1, files // 4))
    connections = min(settings.hub.max_connections, max(1, files - handshakes))
    limits = {"max_handshakes": handshakes, "max_connections": connections}
    return settings.model_copy(update={"hub": settings.hub.model_copy(update=limits)})


def _open_files() -> int:
    """How many connections may be open files: the soft limit, raised to the hard one, less a few for the rest."""
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

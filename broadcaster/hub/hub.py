"""The parts of one hub, put together."""

from __future__ import annotations

from functools import partial

from broadcaster import wire
from broadcaster.auth.access import Access
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.catchup.event_log import EventLog
from broadcaster.hub.catchup.history import History
from broadcaster.hub.catchup.page_cache import PageCache
from broadcaster.hub.channels.channels import Channels, Spawn
from broadcaster.hub.channels.delivery_probe import DeliveryProbe
from broadcaster.hub.channels.dispatch import Dispatcher
from broadcaster.hub.connections.admission import AdmissionControl
from broadcaster.hub.connections.connection import Connection, ConnectionContext
from broadcaster.hub.connections.registry import ConnectionRegistry, ticks
from broadcaster.hub.connections.timer import Timer
from broadcaster.hub.deployment.identity import Identity
from broadcaster.hub.fanout.format import Formats
from broadcaster.hub.fanout.scheduler import Scheduler
from broadcaster.hub.http_publisher import HttpPublisher
from broadcaster.settings import Settings


class Hub:
    """The parts of one hub. Made inside a running event loop; nothing happens before `start`.

    Attributes:
        instance: A name by chance, which tells this process from another hub, and from itself after a restart.
    """

    def __init__(self, settings: Settings, broker: Broker, spawn: Spawn, runtime: Runtime = RUNTIME) -> None:
        """Put the parts together.

        Raises:
            ConfigurationError: A key of access control cannot be read; or the hub is one too many.
        """
        self.instance = runtime.chance.hex(8)
        self.clock = runtime.clock
        self.settings = settings
        self.identity = Identity.of(settings)
        self.broker = broker
        self.spawn = spawn
        scheduler = Scheduler(runtime)
        self.registry = ConnectionRegistry[Connection](ticks(settings.hub.ping_interval_s), settings.hub.drain_s)
        self.pages = PageCache(EventLog(broker, settings.event.max_bytes, runtime), runtime)
        unsettled = self.registry.unsettled
        self.channels = Channels(settings, broker, self.pages, scheduler, spawn, unsettled, runtime)
        self.probe = DeliveryProbe(settings, broker, self.channels, runtime)
        self.dispatcher = Dispatcher(self.channels, self.probe, settings.event.max_bytes, runtime)
        self.access = Access(settings.auth, runtime)
        self.admission = AdmissionControl(settings, self.channels, self.access, self.registry, runtime)
        self.history = History(self.pages.log, self.pages.times, runtime)
        self.publisher = HttpPublisher(settings.event.channel, broker, self.access)
        self.context = ConnectionContext(
            self.registry,
            scheduler,
            settings.hub,
            lambda: self.probe.proven,
            self.admission.log,
            runtime,
            Formats(settings.hub.compress_min_bytes, runtime.limits),
        )
        self.timer = Timer(settings.hub, self.context, self.channels, self.admission)
        self._started_at = runtime.clock.loop_s()

    def start(self) -> None:
        """Begin to work: subscriptions, probes, pages, times, timer."""
        for work, name in (
            (partial(self.broker.run, self.dispatcher), "subscription"),
            (self.probe.run, "proofs"),
            (self.pages.run, "pages"),
            (self.pages.times.run, "times"),
            (self.timer.run, "timer"),
        ):
            self.spawn(work, name)

    def use(self, settings: Settings) -> None:
        """Go by other keys, origins, limits and credentials of Redis from now on.

        The connections of keys that are gone are closed (4001); no connection to Redis is.

        Raises:
            ConfigurationError: A key cannot be read; then nothing has changed.
        """
        self.access.use(settings.auth)
        self.admission.use(settings)
        self.broker.use(settings.redis)
        for connection in self.registry.everyone():
            if not self.access.still_gives(connection.grant):
                connection.close(wire.CloseCode.EXPIRED, "the key is not valid any more")

    @property
    def ready(self) -> bool:
        """Whether events of the default channel arrive, and the hub is not stopping."""
        return self.probe.healthy and not self.admission.stopping

    @property
    def uptime_s(self) -> float:
        return self.clock.loop_s() - self._started_at

"""A hub's composition root: `serve` puts the parts together, runs them, and ends them."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from functools import partial
from typing import Any

from broadcaster import wire
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.broker.redis_broker import RedisBroker
from broadcaster.hub.channels.channels import Work
from broadcaster.hub.connections.drain import close_all, drain
from broadcaster.hub.connections.handshake import HandshakeProtocol
from broadcaster.hub.deployment import certificate
from broadcaster.hub.deployment.announcer import Announcer
from broadcaster.hub.deployment.certificate import Certificate
from broadcaster.hub.deployment.listening import Listening
from broadcaster.hub.health import Health
from broadcaster.hub.http import create_app
from broadcaster.hub.hub import Hub
from broadcaster.hub.open_files import within_open_files
from broadcaster.hub.reload import Reload
from broadcaster.hub.stats import HubStatistics
from broadcaster.hub.web.files import CLIENT, PAGE, Files
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")


class Stopped(Exception):
    """Ends the task group of a hub that was told to stop."""


async def serve(
    settings: Settings,
    stop: asyncio.Event,
    broker: Broker | None = None,
    runtime: Runtime = RUNTIME,
    reload: Reload | None = None,
) -> int:
    """Run one hub until `stop` is set; returns the exit code.

    Args:
        settings: Of the hub.
        stop: Ends it.
        broker: Its links to where events are stored and published; None: to the Redis of the settings.
        runtime: Time, chance and limits.
        reload: Asks it to re-read some of the settings.

    Raises:
        ConfigurationError: There are more or fewer hubs than `hub.processes` says, a hub of another deployment
            shares the port, or a file of the settings cannot be read.
        PortTaken: Another process listens there.
        RedisRefused: Redis refuses the hub, and a retry would not help.
    """
    if broker is None:
        broker = RedisBroker.of(settings, runtime)
    # A hub with a dead part must not look alive: whatever ends first ends the hub. The other parts work on until
    # the connections are closed.
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        async with asyncio.TaskGroup() as group:

            def spawn(work: Work, name: str) -> asyncio.Task[None]:
                return group.create_task(_until_cancelled(work, name, failed), name=name)

            hub = Hub(within_open_files(settings), broker, spawn, runtime)
            await _run(hub, stop, failed, reload, most=settings.hub.max_connections)
            raise Stopped
    except BaseExceptionGroup as errors:
        if not isinstance(error := errors.exceptions[0], Stopped):
            raise error from None
        return 0
    finally:
        failed.cancel()
        broker.close()


async def _until_cancelled(work: Work, name: str, failed: asyncio.Future[None]) -> None:
    """Work that must not end by itself; the first failure is the reason, what follows is its consequence."""
    try:
        await work()
        raise RuntimeError(f"the task {name!r} has ended")
    except Exception as error:
        if not failed.done():
            failed.set_exception(error)
            failed.exception()  # counts as seen: while the hub stops, nobody looks


async def _run(
    hub: Hub, stop: asyncio.Event, failed: asyncio.Future[None], reload: Reload | None, most: int
) -> None:
    """Listen, work until `stop` is set or a part has failed, and go: connections first, then the rest.

    `most`: the connections that were asked for.
    """
    context = certificate.read(hub.settings.hub)
    shown = Certificate(context) if context else None
    announcer = Announcer(
        hub.identity, hub.settings, hub.broker, lambda: HubStatistics.of(hub).as_dict(), hub.context.runtime
    )
    listening = Listening(hub.context.runtime.clock)
    health, files = Health(hub), Files(CLIENT | PAGE if hub.settings.page.enabled else CLIENT)
    try:
        protocol = HandshakeProtocol.bound(
            hub.admission,
            hub.context,
            hub.channels,
            lambda method, path, head: health.answer(method, path) or files.answer(method, path, head),
        )
        await listening.begin(create_app(hub, announcer), protocol, hub.settings, hub.identity, context)
    except BaseException:
        listening.close()
        raise
    if (room := hub.settings.hub.max_connections) < 0.9 * most:
        log.warning("hub.max_connections is %d, but only %d can be open (ulimit -n)", most, room)
    _quiet_garbage_collector()
    hub.start()
    if hub.context.runtime.limits.announce_every_s < math.inf:
        hub.spawn(announcer.run, "announcements")
    if reload is not None:
        hub.spawn(partial(reload.run, hub, shown), "reload")
    stopped = asyncio.ensure_future(stop.wait())
    try:
        ends: list[asyncio.Future[Any]] = [failed, stopped]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()  # raises what ended it
    finally:
        stopped.cancel()
        await listening.leave_port(lambda: not hub.admission.pending)
        hub.admission.stopping = True
        await drain(hub.context, hub.settings.hub.drain_s if stop.is_set() else 0.0)
        listening.close()  # only now: until here /health/ready says that this hub is going
        reason = "the hub is restarting"
        await close_all(hub.context, wire.CloseCode.RESTART, reason, hub.settings.hub.shutdown_s)
        await announcer.withdraw()
        await listening.end()


def _quiet_garbage_collector() -> None:
    """The hot path makes no reference cycles: look for them rarely, and never among what is here to stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)

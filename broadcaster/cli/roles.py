"""The subcommands of the Procfiles, one per role: redis, hub, publisher and fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

import click

from broadcaster.cli.common import cli, examples, load_settings, say
from broadcaster.core import process
from broadcaster.core.errors import BroadcasterError, ConfigurationError, PortTaken
from broadcaster.settings import Loaded, Settings

log = logging.getLogger("broadcaster")


@cli.command(epilog=examples("broadcaster redis", "broadcaster --set redis.url=redis://127.0.0.1:7000/0 redis"))
@click.option("-v", "--verbose", is_flag=True, help="Show all that Redis says, not only why it failed.")
@click.pass_context
def redis(context: click.Context, verbose: bool) -> None:
    """Start a Redis, or use the one that runs.

    Where `redis.url` says.
    """
    from broadcaster.redis.server import start_or_attach

    settings = load_settings(context).settings
    found = start_or_attach(settings.redis.command_url, verbose=verbose)

    async def main(stop: asyncio.Event) -> int:
        log.info("%s", found)
        return await _linger(stop)

    sys.exit(process.run(main))


@cli.command(epilog=examples("broadcaster hub", "broadcaster hub --port 9000 --redis-url redis://10.0.0.5:6379/0"))
@click.option("--host", help="Address to listen on; default: hub.host.")
@click.option("--port", type=int, help="Port to listen on; default: hub.port.")
@click.option("--number", type=int, help="Which of hub.processes it is, from 1; default: hub.number.")
@click.option("--redis-url", help="Where Redis is; default: redis.url.")
@click.option("--loadtest", is_flag=True, help="Also let the channel of this load test in.")
@click.pass_context
def hub(
    context: click.Context,
    host: str | None,
    port: int | None,
    number: int | None,
    redis_url: str | None,
    loadtest: bool,
) -> None:
    """Push every event to every WebSocket subscriber.

    SIGHUP re-reads keys, origins, limits, certificates and the password of Redis.
    """
    from broadcaster.auth.tokens import monitoring_token
    from broadcaster.hub.reload import Reload
    from broadcaster.hub.serve import serve
    from broadcaster.subscribe import hub_status

    def load() -> Loaded:
        options = {"hub__host": host, "hub__port": port, "hub__number": number, "redis__url": redis_url}
        return load_settings(context, **options)

    def load_again() -> Settings:
        again = load()
        if gone := [str(file) for file in loaded.files if file not in again.files]:
            raise ConfigurationError(f"there is no config file {gone[0]} any more")  # without it, all is default
        return _of_its_run(again.settings) if loadtest else again.settings

    async def main(stop: asyncio.Event) -> int:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        try:
            return await serve(settings, stop, reload=Reload(asked, load_again))
        except PortTaken as error:
            if not loadtest:
                raise
            url = hub_status.base_url(settings.local_websocket_url)
            try:
                token = monitoring_token(settings)
                other = await hub_status.statistics(url, tls_ca=settings.subscriber.tls_ca, token=token)
            except BroadcasterError:
                raise error from None
            raise PortTaken(error.host, error.port, hub_status.taken_by(url, other)) from None

    loaded = load()
    settings = _of_its_run(loaded.settings) if loadtest else loaded.settings
    sys.exit(process.run(main))


def _of_its_run(settings: Settings) -> Settings:
    """The settings of a hub of a load test, which is told that this process is one."""
    from broadcaster.loadtest import rig
    from broadcaster.loadtest.run import Run

    run = Run.current(settings.loadtest)
    # Each of several hubs on one port: which of them answers the publisher is chance.
    rig.announce(run.folder, "hub", os.getpid(), os.getpid())
    channels = settings.channels.model_copy(update={"allow": (*settings.channels.allow, run.channel)})
    own = settings.hub.model_copy(update={"deployment": run.name})  # and nobody else's subscribers are counted
    return settings.model_copy(update={"channels": channels, "hub": own})


@cli.command(epilog=examples("broadcaster publisher", "broadcaster --set publisher.rate_hz=5 publisher"))
@click.option("--loadtest", is_flag=True, help="Publish the events of this load test, then wait to be stopped.")
@click.pass_context
def publisher(context: click.Context, loadtest: bool) -> None:
    """Publish sample events, until stopped.

    It begins when a hub is ready and has a subscriber. Your own events: `broadcaster publish`.
    """
    settings = load_settings(context).settings
    if loadtest:
        from broadcaster.loadtest.publishing import publish_run

        _run_then_linger(publish_run(settings))
    from broadcaster.auth.tokens import monitoring_token
    from broadcaster.publish.samples import publish_samples

    _run_then_linger(publish_samples(settings, lambda: say(what_to_type()), monitoring_token(settings)))


@cli.command(epilog=examples("broadcaster fleet", "broadcaster fleet --clients 1000 --url ws://127.0.0.1:8765/ws"))
@click.option("--loadtest", is_flag=True, help="Receive this load test, then wait to be stopped.")
@click.option("--clients", type=int, help="Subscribers in all; default: fleet.clients.")
@click.option("--url", help="ws:// or wss:// address of a hub; default: the configured one.")
@click.pass_context
def fleet(context: click.Context, loadtest: bool, clients: int | None, url: str | None) -> None:
    """Connect many subscribers, and count events."""
    from broadcaster.loadtest import measuring

    settings = load_settings(context, fleet__clients=clients, fleet__url=url).settings
    if loadtest:
        _run_then_linger(measuring.measure_run(settings))

    async def main(stop: asyncio.Event) -> int:
        await measuring.watch(settings, stop)
        return 0

    sys.exit(process.run(main))


def what_to_type() -> str:
    """What to try in another terminal while `honcho start` runs."""
    here = Path.cwd()
    lines = ["In another terminal, in this folder:"]
    if sys.prefix != sys.base_prefix:
        activate = Path(sys.prefix, "bin", "activate")
        lines.append(f"  . {activate.relative_to(here) if activate.is_relative_to(here) else activate}")
    lines += [
        '  broadcaster publish --type DISK_FULL --source db-7 --data \'{"disk": "sda1"}\'',
        "  broadcaster subscribe --severity critical",
        "  broadcaster config show",
    ]
    if names := sorted(name for name in os.environ if name.startswith("BROADCASTER_")):
        lines.append(f"with the same {', '.join(names)} as here. Ctrl-C here ends everything.")
    else:
        lines.append("Ctrl-C here ends everything.")
    return "\n".join(lines)


async def _linger(stop: asyncio.Event) -> int:
    """Wait to be stopped: if a process ended when its work is done, honcho would stop all others."""
    await stop.wait()
    return 0


def _run_then_linger(work: Coroutine[Any, Any, None]) -> NoReturn:
    async def main(stop: asyncio.Event) -> int:
        await process.unless_stopped(stop, work)
        return await _linger(stop)

    sys.exit(process.run(main))

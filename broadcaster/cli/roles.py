"""The subcommands of the Procfiles, one per role: redis, hub, publisher, fleet and report."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

import click

from broadcaster.cli.common import cli, fail, load_settings
from broadcaster.core import process
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster")


@cli.command()
@click.pass_context
def redis(context: click.Context) -> None:
    """Start a Redis at redis.url, or use the one that runs there."""
    from broadcaster.redis.server import start_or_attach

    settings = load_settings(context).settings
    found = start_or_attach(settings.redis.url)

    async def main(stop: asyncio.Event) -> int:
        log.info("%s", found)
        return await _linger(stop)

    sys.exit(process.run(main))


@cli.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.")
@click.option("--redis-url", help="Where Redis is.")
@click.pass_context
def hub(context: click.Context, host: str | None, port: int | None, redis_url: str | None) -> None:
    """Push every event to every WebSocket subscriber; SIGHUP re-reads keys, origins, limits and certificates."""
    from broadcaster.hub.reload import Reload
    from broadcaster.hub.serve import serve

    def load() -> Settings:
        return load_settings(context, hub__host=host, hub__port=port, redis__url=redis_url).settings

    async def main(stop: asyncio.Event) -> int:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        return await serve(settings, stop, reload=Reload(asked, load))

    settings = load()
    sys.exit(process.run(main))


@cli.command()
@click.option("--loadtest", is_flag=True, help="Publish the events of this load test, then wait to be stopped.")
@click.pass_context
def publisher(context: click.Context, loadtest: bool) -> None:
    """Publish sample events, one after another, until stopped."""
    settings = load_settings(context).settings
    if loadtest:
        from broadcaster.loadtest.publishing import publish_run

        _run_then_linger(publish_run(settings))
    from broadcaster.publish.samples import publish_samples

    _run_then_linger(publish_samples(settings))


@cli.command()
@click.option("--loadtest", is_flag=True, help="Receive this load test, then wait to be stopped.")
@click.option("--clients", type=int, help="Subscribers in all.")
@click.option("--url", help="ws:// or wss:// address of a hub.")
@click.pass_context
def fleet(context: click.Context, loadtest: bool, clients: int | None, url: str | None) -> None:
    """Connect many subscribers to a hub and count what they receive."""
    from broadcaster.loadtest import measuring

    settings = load_settings(context, fleet__clients=clients, fleet__url=url).settings
    if loadtest:
        _run_then_linger(measuring.measure_run(settings))

    async def main(stop: asyncio.Event) -> int:
        await measuring.watch(settings, stop)
        return 0

    sys.exit(process.run(main))


@cli.command()
@click.option("--loadtest", is_flag=True, help="Wait for this load test, and file it in the archive.")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.pass_context
def report(context: click.Context, loadtest: bool, folder: Path | None) -> None:
    """Print the report of a run: of FOLDER, such as results/20260101-120000-1-2."""
    from broadcaster.loadtest import report as reports

    if loadtest == (folder is not None):
        raise click.UsageError("give the folder of a run, or --loadtest inside of one")
    if loadtest:
        settings = load_settings(context).settings

        async def main(stop: asyncio.Event) -> int:
            nonlocal folder
            folder = await process.unless_stopped(stop, reports.report_run(settings))
            return 0

        code = process.run(main)
        if folder is None:
            fail("stopped before the run was complete", code or 143)
    assert folder is not None
    outcome = reports.read_run(folder)
    click.echo(reports.present(outcome, folder))
    sys.exit(1 if outcome.broken else 0)


async def _linger(stop: asyncio.Event) -> int:
    """Wait to be stopped: if a process ended when its work is done, honcho would stop all others."""
    await stop.wait()
    return 0


def _run_then_linger(work: Coroutine[Any, Any, None]) -> NoReturn:
    async def main(stop: asyncio.Event) -> int:
        await process.unless_stopped(stop, work)
        return await _linger(stop)

    sys.exit(process.run(main))

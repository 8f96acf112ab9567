"""The command line: one subcommand per word of the Procfiles, and a few for people.

Nothing heavy is imported before a subcommand needs it: `honcho start` waits for all of them to start.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from broadcaster import process
from broadcaster.errors import BroadcasterError, ConfigurationError, InvalidEvent
from broadcaster.settings import CONFIG_FILE, Loaded, Settings, assignment, dump, load
from broadcaster.version import VERSION

if TYPE_CHECKING:
    from broadcaster.publisher import Published

log = logging.getLogger("broadcaster")


class _Rate(click.FloatRange):
    """Events per second; click's own range lets NaN in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        rate: float = super().convert(value, param, ctx)
        if rate != rate:
            self.fail("NaN is no rate", param, ctx)
        return rate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", type=click.Path(path_type=Path), help=f"TOML file; default: {CONFIG_FILE} if there.")
@click.option("--preset", metavar="NAME", help="config/NAME.toml over it, such as burst.")
@click.option("--set", "assignments", metavar="TABLE.KEY=VALUE", multiple=True, help="One setting; repeatable.")
@click.version_option(VERSION)
@click.pass_context
def cli(context: click.Context, config: Path | None, preset: str | None, assignments: tuple[str, ...]) -> None:
    """Low-latency event broadcaster: Redis Pub/Sub to WebSocket subscribers.

    `honcho start` runs the system, `honcho -f Procfile.loadtest start` the load test.
    """
    context.obj = {"config": config, "preset": preset, "assignments": assignments}


def _load(context: click.Context, **options: Any) -> Loaded:
    """All layers; `options` are `table__key=value`, None where the option was not given."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in context.obj["assignments"]:
        for table, keys in assignment(text).items():
            overrides.setdefault(table, {}).update(keys)
    for name, value in options.items():
        if value is not None:
            table, key = name.split("__")
            overrides.setdefault(table, {})[key] = value
    return load(config=context.obj["config"], preset=context.obj["preset"], overrides=overrides)


# The words of the Procfiles


@cli.command()
@click.pass_context
def redis(context: click.Context) -> None:
    """Start a Redis at redis.url, or use the one that runs there."""
    from broadcaster.redis_server import start_or_attach

    settings = _load(context).settings
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
    """Push every event to every WebSocket subscriber."""
    from broadcaster.hub.app import serve

    settings = _load(context, hub__host=host, hub__port=port, redis__url=redis_url).settings
    sys.exit(process.run(lambda stop: serve(settings, stop)))


@cli.command()
@click.option("--loadtest", is_flag=True, help="Publish the events of this load test, then wait to be stopped.")
@click.pass_context
def publisher(context: click.Context, loadtest: bool) -> None:
    """Publish sample events, one after another, until stopped."""
    settings = _load(context).settings
    if loadtest:
        from broadcaster.loadtest.publishing import publish_run

        _run_then_linger(publish_run(settings))
    from broadcaster.samples import publish_samples

    _run_then_linger(publish_samples(settings))


@cli.command()
@click.option("--loadtest", is_flag=True, help="Receive this load test, then wait to be stopped.")
@click.option("--clients", type=int, help="Subscribers in all.")
@click.option("--url", help="ws:// or wss:// address of a hub.")
@click.pass_context
def fleet(context: click.Context, loadtest: bool, clients: int | None, url: str | None) -> None:
    """Connect many subscribers to a hub and count what they receive."""
    from broadcaster.loadtest import measuring

    settings = _load(context, fleet__clients=clients, fleet__url=url).settings
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
        settings = _load(context).settings

        async def main(stop: asyncio.Event) -> int:
            nonlocal folder
            folder = await process.unless_stopped(stop, reports.report_run(settings))
            return 0

        code = process.run(main)
        if folder is None:
            _fail("stopped before the run was complete", code or 143)
    assert folder is not None
    outcome = reports.read_run(folder)
    click.echo(reports.present(outcome, folder))
    sys.exit(1 if outcome.broken else 0)


# For people


@cli.command()
@click.option("--type", "event_type", required=True, help="What happened, such as SERVER_DOWN.")
@click.option("--source", required=True, help="To whom, such as server-a.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="How many events.")
@click.option("--rate", default=0.0, show_default=True, type=_Rate(0, 100_000), metavar="HZ", help="0: at once.")
@click.option("--severity", default="critical", show_default=True, help="critical, warning or info.")
@click.option("--data", metavar="JSON", help="A JSON object of your own.")
@click.option("--channel", help="Redis channel; default: the configured one.")
@click.pass_context
def publish(
    context: click.Context,
    event_type: str,
    source: str,
    count: int,
    rate: float,
    severity: str,
    data: str | None,
    channel: str | None,
) -> None:
    """Publish events, and say how many Redis subscriptions heard each."""
    from broadcaster.publisher import Publisher, on_schedule

    fields = _json_object(data)
    settings = _load(context).settings

    async def work() -> int:
        failed = 0
        async with Publisher(settings, channel=channel) as publisher:
            async for due in on_schedule(count, rate):
                batch = [publisher.draft(event_type, source, severity=severity, data=fields) for _ in due]
                for result in await publisher.publish_all(batch):
                    failed += result.error is not None
                    click.echo(_what_became_of(result))
        return 69 if failed else 0

    async def main(stop: asyncio.Event) -> int:
        return await process.unless_stopped(stop, work()) or 0

    sys.exit(process.run(main))


@cli.command()
@click.option("--channel", "channels", multiple=True, help="Channel to receive; repeatable; default: the hub's.")
@click.option("--type", "types", multiple=True, help="Only events of this type; repeatable.")
@click.option("--source", "sources", multiple=True, help="Only events of this source; repeatable.")
@click.option("--severity", "severities", multiple=True, help="Only critical, warning or info; repeatable.")
@click.option("--since", metavar="EPOCH-OFFSET", help="Begin after this position; default: now.")
@click.option("--resume-file", type=click.Path(dir_okay=False, path_type=Path),
              help="Keep the position here, and go on from it next time.")  # fmt: skip
@click.option("--url", help="ws:// or wss:// address of a hub; default: the configured one.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as it came, one per line.")
@click.option("--log", "log_file", type=click.Path(dir_okay=False, path_type=Path), help="Also append to a file.")
@click.pass_context
def subscribe(
    context: click.Context,
    channels: tuple[str, ...],
    types: tuple[str, ...],
    sources: tuple[str, ...],
    severities: tuple[str, ...],
    since: str | None,
    resume_file: Path | None,
    url: str | None,
    as_json: bool,
    log_file: Path | None,
) -> None:
    """Print one line per event with its latency, until stopped; gaps and blindness in their place."""
    from broadcaster.event import check_channel
    from broadcaster.subscriber import Subscriber
    from broadcaster.watching import ResumeFile, watch

    settings = _load(context, subscriber__url=url).settings
    if since is not None and resume_file is not None:
        raise click.UsageError("give --since or --resume-file, not both")
    kept = ResumeFile(resume_file) if resume_file else None
    for channel in channels:
        check_channel(channel)
    if as_json:
        process.talk_in_lines(logs=sys.stderr)

    async def main(stop: asyncio.Event) -> int:
        try:
            subscriber = Subscriber(
                settings=settings,
                channels=channels,
                since=kept.load() if kept else since,
                types=types,
                sources=sources,
                severities=severities,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        await watch(subscriber, stop, as_json=as_json, log_file=log_file, resume_file=kept)
        return 0

    sys.exit(process.run(main))


@cli.group()
def config() -> None:
    """Show the settings that hold, or write a fresh broadcaster.toml."""


@config.command("show")
@click.pass_context
def config_show(context: click.Context) -> None:
    """Print the effective settings, and where each came from."""
    loaded = _load(context)
    click.echo(dump(loaded.settings, loaded.origins), nl=False)


@config.command("init")
@click.argument("file", default=CONFIG_FILE, type=click.Path(path_type=Path))
def config_init(file: Path) -> None:
    """Write all settings with their defaults to FILE; an existing file is left alone."""
    if file.exists():
        raise ConfigurationError(f"{file} exists already; it is left as it is")
    try:
        file.write_text(dump(Settings.model_construct()))
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error.strerror}") from None
    click.echo(f"wrote {file}")


# Common parts


async def _linger(stop: asyncio.Event) -> int:
    """Work is done, but an early end would end all other processes."""
    await stop.wait()
    return 0


def _run_then_linger(work: Coroutine[Any, Any, None]) -> NoReturn:
    async def main(stop: asyncio.Event) -> int:
        await process.unless_stopped(stop, work)
        return await _linger(stop)

    sys.exit(process.run(main))


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent("field", f"data is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidEvent("field", "data must be a JSON object")
    return fields


def _what_became_of(result: Published) -> str:
    event, heard = result.event, result.heard
    name = f"{event.event_type} {event.source} #{event.sequence} {event.event_id}"
    if result.error is not None:
        return f"{name}: may not have been published: {result.error}"
    stored = "" if result.position is None else f"stored as {result.position}; "
    if heard is None:
        return f"{name}: {stored}who heard it is not known, it took more than one attempt"
    if heard == 0:
        return f"{name}: {stored}WARNING: heard by nobody; is a hub running?"
    return f"{name}: {stored}heard by {heard} Redis subscription{'s' if heard != 1 else ''}"


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(code)


def main() -> None:
    """Entry point: every foreseen error is one line per problem and an exit code, never a traceback."""
    process.talk_in_lines()
    try:
        cli(prog_name="broadcaster")
    except BroadcasterError as error:
        _fail(str(error), error.exit_code)

"""The subcommands for interactive use: publish, subscribe, config and token."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from broadcaster.cli.common import BEGINNINGS, Number, cli, examples, fail, filters, load_settings, say
from broadcaster.core import process
from broadcaster.core.errors import ConfigurationError, Unavailable
from broadcaster.core.files import whole_file
from broadcaster.settings import CONFIG_FILE, Settings, dump

if TYPE_CHECKING:
    from broadcaster.core.event import Draft, Event
    from broadcaster.publish.publisher import Published

_NAMED: Final = 3
"""Of many hubs so many are named."""


@cli.command(
    epilog=examples(
        "broadcaster publish --type SERVER_DOWN --source server-a",
        'broadcaster publish --type DISK_FULL --source db-7 --severity warning --data \'{"disk": "sda1"}\'',
    )
)
@click.option("--type", "event_type", required=True, help="What happened, such as SERVER_DOWN.")
@click.option("--source", required=True, help="What it happened to, such as server-a.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="How many events.")
@click.option(
    "--rate",
    default=0.0,
    show_default=True,
    type=Number(0, 100_000),
    metavar="HZ",
    help="Events per second; 0: all at once.",
)
@click.option("--severity", default="critical", show_default=True, help="critical, warning or info.")
@click.option("--data", metavar="JSON", help="A JSON object of your own.")
@click.option("--channel", help="Channel to publish on; default: event.channel.")
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
    """Publish an event, or several.

    It says where each is stored, and how many Redis subscriptions heard it: each hub is one.
    """
    from broadcaster.core.event import check_channel, draft
    from broadcaster.publish.publisher import Publisher
    from broadcaster.publish.schedule import on_schedule

    fields = _json_object(data)
    settings = load_settings(context).settings
    # What is no event is told before anything is connected.
    draft(event_type, source, 1, severity=severity, data=fields, max_bytes=settings.event.max_bytes)
    to = check_channel(settings.event.channel if channel is None else channel)

    published = 0
    unanswered: list[Draft] = []

    async def work() -> int:
        nonlocal published, unanswered
        failed, unheard = 0, ""
        async with Publisher(settings, channel=channel) as publisher:
            async for due in on_schedule(count, rate):
                unanswered = [publisher.draft(event_type, source, severity=severity, data=fields) for _ in due]
                results = await publisher.publish_all(unanswered)
                unanswered = []
                failed += sum(result.error is not None for result in results)
                published += sum(result.error is None for result in results)
                try:
                    if not unheard and any(result.heard == 0 for result in results):
                        unheard = await _why_unheard(settings, to)
                finally:  # also if it is stopped meanwhile: they are stored
                    for result in results:
                        say(_what_became_of(result, unheard))
        return 69 if failed else 0

    async def main(stop: asyncio.Event) -> int:
        return await process.code_of(stop, work())

    code = process.run(main)
    if code in (process.INTERRUPTED, process.TERMINATED):
        _end_stopped(code, published, count, [each.unpublished for each in unanswered])
    sys.exit(code)


@cli.command(
    epilog=examples(
        "broadcaster subscribe",
        "broadcaster subscribe --severity critical --severity warning --source server-a",
        "broadcaster subscribe --since 10m",
        "broadcaster subscribe --resume-file position.json --log events.log",
    )
)
@click.option("--channel", "channels", multiple=True, help="Channel to receive; repeatable; default: the hub's.")
@filters
@click.option("--since", metavar="WHEN", help=f"Begin there: {BEGINNINGS}; default: now.")
@click.option("--resume-file", type=click.Path(dir_okay=False, path_type=Path),
              help="Keep the position here, and go on from it next time.")  # fmt: skip
@click.option("--url", help="ws:// or wss:// address of a hub; default: the configured one.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line: events, gap, stale, fresh.")
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
    """Print events as they come, until stopped.

    A line has date, channel, severity, type, source, number, latency (or age, if it is old) and data.

    GAP: events that cannot be delivered. STALE: the hub is silent, so what happens now is not seen here.
    """
    from broadcaster.cli.output import follow
    from broadcaster.cli.resume_file import ResumeFile
    from broadcaster.core.event import check_channel
    from broadcaster.subscribe.subscriber import Subscriber

    settings = load_settings(context, subscriber__url=url).settings
    if since is not None and resume_file is not None:
        raise click.UsageError("give --since or --resume-file, not both")
    kept = ResumeFile(resume_file) if resume_file else None
    for channel in channels:
        if any(character in channel for character in "*?["):
            raise click.UsageError(
                f"--channel takes one channel, not a pattern such as {channel!r}: repeat it for each"
            )
        check_channel(channel)

    def subscriber() -> Subscriber:
        return Subscriber(
            settings=settings,
            channels=channels,
            since=kept.load() if kept else since,
            types=types,
            sources=sources,
            severities=severities,
        )

    sys.exit(follow(subscriber, as_json=as_json, log_file=log_file, resume_file=kept))


@cli.group(epilog=examples("broadcaster config show", "broadcaster config init"))
def config() -> None:
    """Show the settings that hold, or write a new file."""


@config.command("show", epilog=examples("broadcaster config show", "broadcaster --preset burst config show"))
@click.pass_context
def config_show(context: click.Context) -> None:
    """Print the settings, and where each came from."""
    loaded = load_settings(context)
    click.echo(dump(loaded.settings, loaded.origins), nl=False)


@config.command("init", epilog=examples("broadcaster config init", "broadcaster config init other.toml"))
@click.argument("file", default=CONFIG_FILE, type=click.Path(path_type=Path))
def config_init(file: Path) -> None:
    """Write all settings with their defaults.

    To FILE, by default broadcaster.toml (`-` prints them); an existing file is left alone.
    """
    if str(file) == "-":
        click.echo(dump(Settings.model_construct()), nl=False)
        return
    if file.exists():
        raise ConfigurationError(f"{file} exists already; it is left as it is")
    try:
        with whole_file(file) as draft:
            draft.write(dump(Settings.model_construct()))
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error.strerror}") from None
    click.echo(f"wrote {file}")


_TOKEN_EXAMPLE = "broadcaster token create --name wall --subscribe 'events.*' --lasts 86400"


@cli.group(epilog=examples(_TOKEN_EXAMPLE))
def token() -> None:
    """Make tokens, for hubs that ask for them."""


@token.command("create", epilog=examples(_TOKEN_EXAMPLE))
@click.option("--name", required=True, help="Who it is for.")
@click.option(
    "--subscribe", "subscribed", multiple=True, metavar="PATTERN", help="Channels to receive; repeatable."
)
@click.option(
    "--publish", "published", multiple=True, metavar="PATTERN", help="Channels to publish on; repeatable."
)
@click.option("--monitor", is_flag=True, help="Good for the hub's counters: /stats, /trace, /time.")
@click.option(
    "--lasts", default=3600.0, show_default=True, type=Number(1, 1e10), metavar="SECONDS", help="Until it expires."
)
@click.pass_context
def token_create(
    context: click.Context,
    name: str,
    subscribed: tuple[str, ...],
    published: tuple[str, ...],
    monitor: bool,
    lasts: float,
) -> None:
    """Sign a token (JWT) and print it.

    With the first key of auth.jwt_keys that can sign.
    """
    from broadcaster.auth.tokens import create_token

    settings = load_settings(context).settings
    auth = settings.auth
    made = create_token(auth, name, subscribe=subscribed, publish=published, monitor=monitor, lasts_s=lasts)
    click.echo(made)


def _json_object(text: str | None) -> dict[str, Any] | None:
    from broadcaster.core.text import json_object

    return None if text is None else json_object(text, "data")


async def _why_unheard(settings: Settings, channel: str) -> str:
    """What is known of the hubs where Redis says that nobody has heard an event on a channel."""
    from broadcaster.publish.lookout import announced_hubs

    outside = ""
    if not settings.allows(channel):
        allowed = ", ".join(settings.channels.allow) or "none"
        outside = (
            f" And {channel} is none of channels.allow ({allowed}): a hub with these settings does not serve it"
        )
    try:
        hubs = await announced_hubs(settings)
    except Unavailable as error:
        if settings.redis.subscribe_url:
            return f"hubs at replicas are not counted, and which there are is not known: {error}{outside}"
        hubs = []
    if not hubs:
        return f"WARNING: heard by nobody; is a hub running?{outside}"
    named = ", ".join(hubs[:_NAMED]) + (", …" if len(hubs) > _NAMED else "")
    there = f"{len(hubs)} hub{'s are' if len(hubs) > 1 else ' is'} there ({named})"
    return (
        f"heard by nobody at this Redis; {there}: one at a replica is not counted, and others listen to a channel "
        f"only while it has a subscriber{outside}"
    )


def _end_stopped(code: int, published: int, count: int, unanswered: Sequence[Event]) -> NoReturn:
    """Name the events of which it is not known whether they were published, and end."""
    for event in unanswered:
        say(f"{_name(event)}: may not have been published: stopped before Redis answered")
    unknown = f", and of {len(unanswered)} it is not known" if unanswered else ""
    fail(f"stopped: {published} of {count} events were published{unknown}", code)


def _name(event: Event) -> str:
    return f"{event.event_type} {event.source} #{event.sequence} {event.event_id}"


def _what_became_of(result: Published, unheard: str) -> str:
    name, receivers = _name(result.event), result.heard
    if result.error is not None:
        return f"{name}: may not have been published: {result.error}"
    stored = "" if result.position is None else f"stored as {result.position}; "
    if receivers is None:
        return f"{name}: {stored}who heard it is not known, it took more than one attempt"
    if receivers == 0:
        return f"{name}: {stored}{unheard or 'heard by nobody'}"
    return f"{name}: {stored}heard by {receivers} Redis subscription{'s' if receivers != 1 else ''}"

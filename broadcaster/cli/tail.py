"""`broadcaster tail`: the last events of a channel, and then what comes, in the colours of their severity."""

from __future__ import annotations

import asyncio
import logging
import sys

import click

from broadcaster.cli.common import cli, examples, load_settings
from broadcaster.core import process
from broadcaster.core.logs import configure_logging


@cli.command(
    epilog=examples(
        "broadcaster tail",
        "broadcaster tail --last 100 --severity critical",
        "broadcaster tail --channel events.billing --json",
    )
)
@click.option("--channel", help="Channel to receive; default: the hub's.")
@click.option("--type", "types", multiple=True, help="Only events of this type; repeatable.")
@click.option("--source", "sources", multiple=True, help="Only events of this source; repeatable.")
@click.option("--severity", "severities", multiple=True, help="Only critical, warning or info; repeatable.")
@click.option("--since", metavar="EPOCH-OFFSET", help="Begin after this position, in the place of --last.")
@click.option(
    "--last", default=10, show_default=True, type=click.IntRange(0), metavar="N", help="Begin so many events back."
)
@click.option("--url", help="ws:// or wss:// address of a hub; default: the configured one.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line: events, gap, stale, fresh.")
@click.pass_context
def tail(
    context: click.Context,
    channel: str | None,
    types: tuple[str, ...],
    sources: tuple[str, ...],
    severities: tuple[str, ...],
    since: str | None,
    last: int,
    url: str | None,
    as_json: bool,
) -> None:
    """Print the last events and then what comes, until stopped.

    As `broadcaster subscribe`, from a number of events back, and in colours on a terminal.
    """
    from broadcaster.cli.output import watch
    from broadcaster.core.event import check_channel
    from broadcaster.subscribe.subscriber import Subscriber

    settings = load_settings(context, subscriber__url=url).settings
    if channel is not None:
        check_channel(channel)
    if as_json:
        configure_logging(sys.stderr)

    async def main(stop: asyncio.Event) -> int:
        try:
            subscriber = Subscriber(
                settings=settings,
                channels=[channel] if channel else (),
                since=since,
                last=None if since else last,
                types=types,
                sources=sources,
                severities=severities,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        logging.getLogger("broadcaster.subscriber.received").disabled = True  # it is printed in its place
        await watch(subscriber, stop, as_json=as_json, log_file=None, resume_file=None, in_colours=True)
        return 0

    sys.exit(process.run(main))

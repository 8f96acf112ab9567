"""`broadcaster tail`: the last events of a channel, and then what comes, in the colours of their severity."""

from __future__ import annotations

import sys

import click

from broadcaster.cli.common import BEGINNINGS, cli, examples, filters, load_settings


@cli.command(
    epilog=examples(
        "broadcaster tail",
        "broadcaster tail --last 100 --severity critical",
        "broadcaster tail --since 1h",
        "broadcaster tail --channel events.billing --json",
    )
)
@click.option("--channel", help="Channel to receive; default: the hub's.")
@filters
@click.option("--since", metavar="WHEN", help=f"Begin there, in the place of --last: {BEGINNINGS}.")
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

    As `broadcaster subscribe`, from a number of events or a time back, and in colours on a terminal.
    """
    from broadcaster.cli.output import follow
    from broadcaster.core.event import check_channel
    from broadcaster.subscribe.subscriber import Subscriber

    settings = load_settings(context, subscriber__url=url).settings
    if channel is not None:
        check_channel(channel)

    def subscriber() -> Subscriber:
        return Subscriber(
            settings=settings,
            channels=[channel] if channel else (),
            since=since,
            last=None if since else last,
            types=types,
            sources=sources,
            severities=severities,
        )

    sys.exit(follow(subscriber, as_json=as_json, in_colours=True))

"""`broadcaster events`: what is stored, read from Redis itself, without a hub."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Final

import click

from broadcaster.cli.common import cli, examples, filters, load_settings
from broadcaster.core import process
from broadcaster.core.errors import InvalidEvent

if TYPE_CHECKING:
    from broadcaster.core.event import Event
    from broadcaster.settings import Settings

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII).fullmatch
_PAGE_EVENTS: Final = 512
_PAGE_BYTES: Final = 2**20


@cli.command(
    epilog=examples(
        "broadcaster events --last 20",
        "broadcaster events --since 1h --severity critical",
        "broadcaster events --since 2026-11-27T02:00:00Z --source server-a --json",
    )
)
@click.option("--channel", help="Whose events; default: event.channel.")
@filters
@click.option("--since", default="all", show_default=True, metavar="WHEN",
              help="A duration (90s, 10m, 2h, 1d), a time (ISO 8601), a position, or all.")  # fmt: skip
@click.option("--last", type=click.IntRange(0), metavar="N", help="Of these only the last N.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as it is stored, one per line.")
@click.pass_context
def events(
    context: click.Context,
    channel: str | None,
    types: tuple[str, ...],
    sources: tuple[str, ...],
    severities: tuple[str, ...],
    since: str,
    last: int | None,
    as_json: bool,
) -> None:
    """Print stored events, oldest first, from Redis itself.

    What has left the retention window (history.max_events, history.idle_expire_s) is gone: where that begins later
    than asked for, it says so on stderr.
    """
    from broadcaster.cli.output import as_json_line, describe
    from broadcaster.core.event import SEVERITIES, check_channel

    settings = load_settings(context).settings
    channel = channel or settings.event.channel
    check_channel(channel)
    if unknown := set(severities) - set(SEVERITIES):
        raise click.UsageError(f"--severity is one of {', '.join(SEVERITIES)}, got {unknown.pop()!r}")

    def is_wanted(event: Event) -> bool:
        return (
            (not types or event.event_type in types)
            and (not sources or event.source in sources)
            and (not severities or event.severity in severities)
        )

    async def work() -> int:
        show = as_json_line if as_json else describe
        kept: deque[str] = deque(maxlen=last)
        async for event in _stored(settings, channel, since):
            if not is_wanted(event):
                continue
            if last is None:
                click.echo(show(event))
            else:
                kept.append(show(event))
        for line in kept:
            click.echo(line)
        return 0

    async def main(stop: asyncio.Event) -> int:
        return await process.unless_stopped(stop, work()) or 0

    sys.exit(process.run(main))


async def _stored(settings: Settings, channel: str, since: str) -> AsyncIterator[Event]:
    """The events of a channel that were stored when this began, from `since` on.

    Raises:
        ConfigurationError: A file that `redis.url` names for TLS cannot be used.
        click.UsageError: `since` says no time and no position.
        RedisUnavailable, RedisRefused: See `CommandLink.execute`.
    """
    from broadcaster.core.event import LARGEST_BYTES, decode
    from broadcaster.redis import stream
    from broadcaster.redis.commands import CommandLink
    from broadcaster.redis.connection import check_tls

    check_tls("redis.url", settings.redis.url)
    link = CommandLink(settings.redis, stream.LOAD_PAGE)
    try:
        time, table = await link.execute(("TIME",), stream.peek_epochs(channel))
        now_us = int(time[0]) * 1_000_000 + int(time[1])
        begins = _beginning(since, now_us)
        if table[0] is None:
            return  # nothing is known of this channel
        head, offset, begun = stream.read_head(table), 1, False
        while offset <= head.offset:
            [page] = await link.execute(stream.page(channel, offset, _PAGE_EVENTS, _PAGE_BYTES))
            stored, complete = stream.read_page(page)
            for number, payload in stored:
                if number > head.offset:
                    return
                try:
                    event = decode(payload, max_bytes=LARGEST_BYTES, received_at_us=now_us)
                except InvalidEvent as error:
                    click.echo(f"what is stored at {number} is no event: {error.detail}", err=True)
                    continue
                if not begun and begins(event):
                    begun = True  # and all that follow: where a clock went back, it begins earlier, never later
                    if offset == 1 and number == stored[0][0] > 1:
                        click.echo(f"the log begins at {event.position}: what came before it is gone", err=True)
                if begun:
                    yield event
            if complete or not stored:
                return
            offset = stored[-1][0] + 1
    finally:
        link.close()


def _beginning(since: str, now_us: int) -> Callable[[Event], bool]:
    """Whether an event is the first one of those asked for.

    Raises:
        click.UsageError: `since` says no time and no position.
    """
    from broadcaster.core.position import read_position

    if since == "all":
        return lambda event: True
    if duration := _DURATION(since):
        begin_us = now_us - int(duration[1]) * _UNITS[duration[2]] * 1_000_000
        return lambda event: event.stored_at_us is None or event.stored_at_us >= begin_us
    if (position := read_position(since)) is not None:
        return lambda event: (
            event.position is not None
            and (
                event.position.offset > position.offset
                if event.position.epoch == position.epoch
                else event.position.epoch > position.epoch
            )
        )
    try:
        at_us = int(datetime.fromisoformat(since).timestamp() * 1_000_000)
    except ValueError:
        raise click.UsageError(
            "--since is a duration such as 10m, a time such as 2026-11-27T02:00:00Z, a position or all, "
            f"got {since!r}"
        ) from None
    return lambda event: event.stored_at_us is None or event.stored_at_us >= at_us

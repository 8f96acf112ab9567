"""`broadcaster events`: what is stored, read from Redis itself, without a hub, or through one."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Final

import click

from broadcaster.cli.common import BEGINNINGS, cli, examples, filters, load_settings
from broadcaster.core import process
from broadcaster.core.errors import InvalidEvent, RedisUnavailable
from broadcaster.core.runtime import CLOCK

if TYPE_CHECKING:
    from broadcaster.core.event import Event
    from broadcaster.core.position import Head, Instant, Position
    from broadcaster.redis.commands import CommandLink
    from broadcaster.settings import Settings

_PAGE_EVENTS: Final = 512
_PAGE_BYTES: Final = 2**20


@cli.command(
    epilog=examples(
        "broadcaster events --last 20",
        "broadcaster events --since 1h --severity critical",
        "broadcaster events --since 2026-11-27T02:00:00Z --source server-a --json",
        "broadcaster events --url http://127.0.0.1:8765 --since 1h",
    )
)
@click.option("--channel", help="Whose events; default: event.channel.")
@filters
@click.option("--since", default="all", show_default=True, metavar="WHEN", help=f"Begin there: {BEGINNINGS}.")
@click.option("--last", type=click.IntRange(0), metavar="N", help="Of these only the last N.")
@click.option("--url", help="http:// or https:// address of a hub: read through it, with subscriber.token.")
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
    url: str | None,
    as_json: bool,
) -> None:
    """Print stored events, oldest first, from Redis itself, or from a hub.

    What has left the retention window (history.max_events, history.idle_expire_s) is gone: where that begins later
    than asked for, it says so on stderr.
    """
    from broadcaster.cli.output import as_json_line, describe
    from broadcaster.core.event import check_channel

    settings = load_settings(context).settings
    channel = channel or settings.event.channel
    check_channel(channel)
    is_wanted = _filter(types, sources, severities)
    begins = _read(since)
    if url is None:
        found = _stored(settings, channel, begins)
    else:
        named = (("type", types), ("source", sources), ("severity", severities))
        wanted = [(name, value) for name, values in named for value in values]
        found = _of_hub(settings, _checked(url), channel, since, begins, wanted)

    async def work() -> int:
        show = as_json_line if as_json else describe
        kept: deque[str] = deque(maxlen=last)
        async for event in found:
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
        return await process.code_of(stop, work())

    sys.exit(process.run(main))


def _filter(types: Sequence[str], sources: Sequence[str], severities: Sequence[str]) -> Callable[[Event], bool]:
    """Whether an event is wanted.

    Raises:
        click.UsageError: There is no such severity.
    """
    from broadcaster.core.event import SEVERITIES

    if unknown := set(severities) - set(SEVERITIES):
        raise click.UsageError(f"--severity is one of {', '.join(SEVERITIES)}, got {unknown.pop()!r}")
    return lambda event: (
        (not types or event.event_type in types)
        and (not sources or event.source in sources)
        and (not severities or event.severity in severities)
    )


def _read(since: str) -> Position | Instant:
    from broadcaster.core.position import read_since

    try:
        return read_since(since)
    except ValueError as error:
        raise click.UsageError(f"--since {error}") from None


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise click.UsageError("--url is the http:// or https:// address of a hub, such as http://127.0.0.1:8765")
    return url


async def _stored(settings: Settings, channel: str, begins: Position | Instant) -> AsyncIterator[Event]:
    """The events of a channel that were stored when this began, from a place on.

    Raises:
        ConfigurationError: A file that `redis.url` names for TLS cannot be used.
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
        is_first = _beginning(begins, now_us)
        if table[0] is None:
            return  # nothing is known of this channel
        head, offset, begun = stream.read_head(table), 1, False
        while offset <= head.offset:
            stored, complete = await _page(link, channel, offset, head)
            for number, payload in stored:
                if number > head.offset:
                    return
                try:
                    event = decode(payload, max_bytes=LARGEST_BYTES, received_at_us=now_us)
                except InvalidEvent as error:
                    click.echo(f"what is stored at {number} is no event: {error.detail}", err=True)
                    continue
                if not begun and is_first(event):
                    begun = True  # and all that follow: where a clock went back, it begins earlier, never later
                    if offset == 1 and number == stored[0][0] and not _joins_on(begins, event):
                        _say_gone(event)
                if begun:
                    yield event
            if complete or not stored:
                return
            offset = stored[-1][0] + 1
    finally:
        link.close()


async def _page(link: CommandLink, channel: str, offset: int, head: Head) -> tuple[list[tuple[int, bytes]], bool]:
    """What is stored from an offset on, and whether that is all; what has left the log since it began is said.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`; or its memory is another one.
    """
    from broadcaster.redis import stream

    [page] = await link.execute(stream.page(channel, offset, _PAGE_EVENTS, _PAGE_BYTES))
    stored, complete = stream.read_page(page)
    if not stream.is_of_head(page, head):
        raise RedisUnavailable("Redis has another memory than when this began: ask again")
    if offset > 1 and (not stored or stored[0][0] > offset):
        [page] = await link.execute(stream.page(channel, 1, 1, _PAGE_BYTES))
        oldest = next((number for number, _ in stream.read_page(page)[0]), head.offset + 1)
        if oldest > offset:  # else there never was an event
            gone = f"the events {offset} to {oldest - 1} have left the log meanwhile: they are gone"
            click.echo(gone, err=True)
    return stored, complete


async def _of_hub(
    settings: Settings,
    url: str,
    channel: str,
    since: str,
    begins: Position | Instant,
    wanted: Sequence[tuple[str, str]],
) -> AsyncIterator[Event]:
    """The same of a hub, which applies the filters.

    Raises:
        HubRefused, HubUnavailable, ConfigurationError: See `stored_pages`.
    """
    from broadcaster.core.event import LARGEST_BYTES, decode
    from broadcaster.core.position import Position
    from broadcaster.subscribe.stored_events import StoredPage, stored_pages

    token, tls_ca = settings.subscriber.token.get_secret_value(), settings.subscriber.tls_ca

    def pages(since: str, wanted: Sequence[tuple[str, str]] = (), most: int = 1000) -> AsyncIterator[StoredPage]:
        return stored_pages(url, channel, since, wanted, most=most, tls_ca=tls_ca, token=token)

    def read(payload: bytes) -> Event:
        return decode(payload, max_bytes=LARGEST_BYTES, received_at_us=CLOCK.wall_ns() // 1000)

    complete = True
    async for first in pages(since, most=1):  # whatever the filters: what comes before it may be gone
        complete = complete and first.complete
        if first.payloads:
            break
    else:
        return
    oldest = read(first.payloads[0])
    if not complete and not _joins_on(begins, oldest):
        _say_gone(oldest)
    if oldest.position is not None and not isinstance(begins, Position):
        since = str(oldest.position._replace(offset=oldest.position.offset - 1))
    is_known = not complete and isinstance(begins, Position)
    async for page in pages(since, wanted):
        if not page.complete and not is_known:
            click.echo("some of what follows has left the log meanwhile, or is no event", err=True)
        is_known = False
        for payload in page.payloads:
            yield read(payload)


def _joins_on(begins: Position | Instant, event: Event) -> bool:
    """Whether nothing was before an event, or between it and the position that was asked for."""
    if event.position is None or event.position.offset == 1:
        return True
    return begins == event.position._replace(offset=event.position.offset - 1)


def _say_gone(event: Event) -> None:
    click.echo(f"the log begins at {event.position}: what came before it is gone", err=True)


def _beginning(begins: Position | Instant, now_us: int) -> Callable[[Event], bool]:
    """Whether an event is the first one of those asked for."""
    from broadcaster.core.position import Position

    if isinstance(begins, Position):
        return lambda event: (
            event.position is not None
            and (
                event.position.offset > begins.offset
                if event.position.epoch == begins.epoch
                else event.position.epoch > begins.epoch
            )
        )
    begin_us = now_us - begins.us if begins.ago else begins.us
    return lambda event: event.stored_at_us is None or event.stored_at_us >= begin_us

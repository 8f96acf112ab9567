"""What `broadcaster subscribe` prints: one line per event with its latency, and what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import IO
from urllib.parse import urlencode

import click

from broadcaster import process
from broadcaster.errors import ConfigurationError
from broadcaster.event import Event, check_channel
from broadcaster.settings import Settings
from broadcaster.subscriber import Subscriber


async def watch(
    settings: Settings, stop: asyncio.Event, *, channel: str | None, as_json: bool, log_file: Path | None
) -> None:
    """Print events until `stop`; then a line of totals (to stderr if events are printed as JSON).

    Raises:
        InvalidEvent: `channel` is no channel name.
        ConfigurationError: `log_file` cannot be written.
    """
    url = settings.subscriber_url
    if channel is not None:
        url += "?" + urlencode({"channel": check_channel(channel)})
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(log_file)) if log_file else None
        async with Subscriber(url, settings=settings) as subscriber:
            await process.unless_stopped(stop, _print_all(subscriber, as_json, file))
        lost = sum(subscriber.missing.values())
        totals = f"received {subscriber.received} events, {lost} missing, {subscriber.gaps} gaps announced"
        click.echo(totals, err=as_json)


def _open(log_file: Path) -> IO[str]:
    try:
        return log_file.open("a", buffering=1)
    except OSError as error:
        raise ConfigurationError(f"cannot write {log_file}: {error.strerror}") from None


async def _print_all(subscriber: Subscriber, as_json: bool, file: IO[str] | None) -> None:
    missing = 0
    async for event in subscriber:
        line = event.payload.decode() if as_json else describe(event)
        if not as_json and (now_missing := sum(subscriber.missing.values())) != missing:
            line += f"  ({now_missing - missing} before it missing)"
            missing = now_missing
        click.echo(line)
        if file is not None:
            file.write(line + "\n")


def describe(event: Event) -> str:
    """One line for a person."""
    seconds, milliseconds = divmod(event.published_at_ms, 1000)
    at = time.strftime("%H:%M:%S", time.localtime(seconds))
    return (
        f"{at}.{milliseconds:03d} {event.severity:<8} {event.event_type} {event.source} "
        f"#{event.sequence} {event.latency_ms:.2f} ms"
    )

"""What `broadcaster subscribe` prints: one line per event with its latency, and what is missing, in its place."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import click

from broadcaster.cli.resume_file import SAVE_EVERY_S, ResumeFile
from broadcaster.core import process
from broadcaster.core.errors import ConfigurationError
from broadcaster.core.event import Event
from broadcaster.core.position import Gap
from broadcaster.core.status_events import Received, Stale
from broadcaster.core.text import printable
from broadcaster.subscribe.subscriber import Subscriber


async def watch(
    subscriber: Subscriber,
    stop: asyncio.Event,
    *,
    as_json: bool,
    log_file: Path | None,
    resume_file: ResumeFile | None,
) -> None:
    """Print events until `stop`; then a line of totals (to stderr if events are printed as JSON).

    Raises:
        ConfigurationError: A file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(log_file)) if log_file else None
        async with subscriber:
            await process.unless_stopped(stop, _print_all(subscriber, as_json, file, resume_file))
        if resume_file is not None:
            resume_file.save(now=True)
        lost = sum(subscriber.missing.values())
        totals = f"received {subscriber.received} events, {lost} missing, {subscriber.gaps} gaps announced"
        click.echo(totals, err=as_json)


def _open(log_file: Path) -> IO[str]:
    try:
        return log_file.open("a", buffering=1)
    except OSError as error:
        raise ConfigurationError(f"cannot write {log_file}: {error.strerror}") from None


async def _print_all(
    subscriber: Subscriber, as_json: bool, file: IO[str] | None, resume_file: ResumeFile | None
) -> None:
    missing = 0
    async for notice in _notices(subscriber, SAVE_EVERY_S if resume_file else None):
        if notice is not None:
            line = notice.payload.decode() if as_json and isinstance(notice, Event) else describe(notice)
            if not as_json and (now_missing := sum(subscriber.missing.values())) != missing:
                line += f"  ({now_missing - missing} before it missing)"
                missing = now_missing
            click.echo(line, err=as_json and not isinstance(notice, Event))
            if file is not None and (isinstance(notice, Event) or not as_json):
                file.write(line + "\n")
        if resume_file is not None:
            resume_file.printed = subscriber.positions  # and not later: what is not printed must come again
            resume_file.save()


async def _notices(subscriber: Subscriber, every_s: float | None) -> AsyncIterator[Received | None]:
    """What the subscriber receives, and None when nothing has come for `every_s` seconds."""
    while True:
        receiving = asyncio.ensure_future(subscriber.receive())
        try:
            while not (await asyncio.wait([receiving], timeout=every_s))[0]:
                yield None
            yield receiving.result()
        finally:
            receiving.cancel()


def describe(notice: Received) -> str:
    """One line for a person."""
    if isinstance(notice, Gap):
        first = "?" if notice.first is None else notice.first
        last = "?" if notice.last is None else notice.last
        which = "unknown events" if notice.epoch is None else f"{notice.epoch}-{first} to {last}"
        # What a hub says may reach a terminal: no control characters.
        return f"GAP on {printable(notice.channel)}: {which} ({printable(notice.cause)})"
    if isinstance(notice, Stale):
        return f"STALE: no beat of the hub for {notice.silent_s:.1f} s; what happens now is not seen here"
    if not isinstance(notice, Event):
        return "FRESH: the hub beats again"
    seconds, milliseconds = divmod(notice.published_at_ms, 1000)
    at = time.strftime("%H:%M:%S", time.localtime(seconds))
    return (
        f"{at}.{milliseconds:03d} {notice.severity:<8} {notice.event_type} {notice.source} "
        f"#{notice.sequence} {notice.latency_ms:.2f} ms"
    )

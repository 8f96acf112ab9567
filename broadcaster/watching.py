"""What `broadcaster subscribe` prints: one line per event with its latency, and what is missing, in its place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Final

import click

from broadcaster import process
from broadcaster.errors import ConfigurationError
from broadcaster.event import Event
from broadcaster.notices import Notice, Stale
from broadcaster.position import Gap, Position
from broadcaster.subscriber import Subscriber

_SAVE_EVERY_S: Final = 0.2


class ResumeFile:
    """Positions per channel, kept in a file from one run to the next.

    Attributes:
        printed: Up to where everything was printed; what is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved: dict[str, Position] = {}
        self._saved_at = 0.0
        self.printed: dict[str, Position] = {}

    def load(self) -> dict[str, Position]:
        """What was saved; nothing if there is no file yet.

        Raises:
            ConfigurationError: The file cannot be read, or is not one of these.
        """
        try:
            fields = json.loads(self._path.read_text())
            self._saved = {str(channel): Position.parse(position) for channel, position in fields.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigurationError(f"{self._path} is no file of positions: {error}") from None
        self.printed = dict(self._saved)
        return dict(self._saved)

    def save(self, *, now: bool = False) -> None:
        """Save if something has changed, and not too often; the file is whole at any time.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        positions = self.printed
        if positions == self._saved or not (now or time.monotonic() - self._saved_at > _SAVE_EVERY_S):
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps({channel: str(position) for channel, position in positions.items()}))
            draft.replace(self._path)
        except OSError as error:
            raise ConfigurationError(f"cannot write {self._path}: {error.strerror}") from None
        self._saved, self._saved_at = positions, time.monotonic()


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
    async for notice in _notices(subscriber, _SAVE_EVERY_S if resume_file else None):
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


async def _notices(subscriber: Subscriber, every_s: float | None) -> AsyncIterator[Notice | None]:
    """What the subscriber receives, and None when nothing has come for `every_s` seconds."""
    while True:
        receiving = asyncio.ensure_future(subscriber.receive())
        try:
            while not (await asyncio.wait([receiving], timeout=every_s))[0]:
                yield None
            yield receiving.result()
        finally:
            receiving.cancel()


def describe(notice: Notice) -> str:
    """One line for a person."""
    if isinstance(notice, Gap):
        first = "?" if notice.first is None else notice.first
        last = "?" if notice.last is None else notice.last
        which = "unknown events" if notice.epoch is None else f"{notice.epoch}-{first} to {last}"
        # What a hub says may reach a terminal: no control characters.
        return f"GAP on {_printable(notice.channel)}: {which} ({_printable(notice.cause)})"
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


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)

"""What `broadcaster subscribe` and `tail` print: a line per event with its latency or age, and gaps, in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import click

from broadcaster.cli.resume_file import SAVE_EVERY_S, ResumeFile
from broadcaster.core import process
from broadcaster.core.errors import ConfigurationError, OutputError
from broadcaster.core.event import Event
from broadcaster.core.logs import configure_logging
from broadcaster.core.position import Gap
from broadcaster.core.runtime import CLOCK
from broadcaster.core.text import escaped, printable
from broadcaster.subscribe.status_events import Received, Stale
from broadcaster.subscribe.subscriber import Subscriber

_DATA_LENGTH: Final = 60
"""Characters of an event's `data` that are shown; `--json` has all of them."""

_LATENCY_S: Final = 1.0
"""An event that came later than this after its publication is an old one: its age is told in words."""

_COLOURS: Final = {"critical": "red", "warning": "yellow"}

_ONE_LINE: Final = {ord("\n"): " ", ord("\r"): " "}
"""A line break in JSON stands between its tokens, never in a string."""

_UNITS: Final = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


def follow(
    subscriber: Callable[[], Subscriber],
    *,
    as_json: bool,
    log_file: Path | None = None,
    resume_file: ResumeFile | None = None,
    in_colours: bool = False,
) -> int:
    """Print all that a subscriber receives until SIGINT or SIGTERM; the exit code.

    Args:
        subscriber: Makes it; a ValueError says what was asked for wrongly.
        as_json: A JSON object per line, and the log on stderr.
        log_file: Where the lines are written, too.
        resume_file: Where the positions are kept.
        in_colours: By severity, on a terminal.
    """
    if as_json:
        configure_logging(sys.stderr)

    async def main(stop: asyncio.Event) -> int:
        try:
            made = subscriber()
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        logging.getLogger("broadcaster.subscriber.received").disabled = True  # it is printed in its place
        await watch(made, stop, as_json=as_json, log_file=log_file, resume_file=resume_file, in_colours=in_colours)
        return 0

    return process.run(main)


async def watch(
    subscriber: Subscriber,
    stop: asyncio.Event,
    *,
    as_json: bool,
    log_file: Path | None,
    resume_file: ResumeFile | None,
    in_colours: bool = False,
) -> None:
    """Print all that is received until `stop`; then a line of totals (to stderr if the others are JSON).

    Raises:
        ConfigurationError: The log file cannot be opened.
        OutputError: A file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(log_file)) if log_file else None
        async with subscriber:
            await process.unless_stopped(stop, _print_all(subscriber, as_json, file, resume_file, in_colours))
        if resume_file is not None:
            resume_file.save(now=True, log_file=file)
        lost = sum(subscriber.missing.values())
        totals = f"received {subscriber.received} events, {lost} missing, {subscriber.gaps} gaps announced"
        click.echo(totals, err=as_json)


def _open(log_file: Path) -> IO[str]:
    try:
        if log_file.is_fifo():  # opening it would wait for a reader, and so would each write
            raise ConfigurationError(
                f"{log_file} is a pipe, and --log takes a file: send the output there instead"
            )
        return log_file.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {log_file}: {error.strerror}") from None


async def _print_all(
    subscriber: Subscriber,
    as_json: bool,
    file: IO[str] | None,
    resume_file: ResumeFile | None,
    in_colours: bool,
) -> None:
    missing = 0
    async for item in _received(subscriber, SAVE_EVERY_S if resume_file else None):
        if item is not None:
            channel = next(iter(subscriber.positions), "") if len(subscriber.positions) == 1 else ""
            line = as_json_line(item) if as_json else describe(item, channel)
            if not as_json and (now_missing := sum(subscriber.missing.values())) != missing:
                line += f"  ({now_missing - missing} before it missing)"
                missing = now_missing
            click.echo(_painted(line, item) if in_colours and not as_json else line)
            if file is not None:
                _append(file, line)
        if resume_file is not None:
            resume_file.printed = subscriber.positions  # not later: what is not printed must be delivered again
            resume_file.save(log_file=file)


def _painted(line: str, item: Received) -> str:
    """A line in the colour of its severity; click takes that out again where the output is no terminal."""
    if isinstance(item, Event):
        return click.style(line, fg=_COLOURS.get(item.severity))
    return click.style(line, fg="magenta", bold=True)


def _append(file: IO[str], line: str) -> None:
    try:
        file.write(line + "\n")
    except OSError as error:
        raise OutputError(file.name, error) from None


async def _received(subscriber: Subscriber, every_s: float | None) -> AsyncIterator[Received | None]:
    """What the subscriber receives, and None when nothing has arrived for `every_s` seconds."""
    while True:
        receiving = asyncio.ensure_future(subscriber.receive())
        try:
            while not (await asyncio.wait([receiving], timeout=every_s))[0]:
                yield None
            yield receiving.result()
        finally:
            receiving.cancel()


def as_json_line(item: Received) -> str:
    """One line of JSON for a received item: an event as it came, and the rest as a control frame says it.

    An event has an `event_id`, and nothing else has.
    """
    if isinstance(item, Event):
        return item.payload.decode().translate(_ONE_LINE)
    fields: dict[str, object] = {"control": type(item).__name__.lower()}
    if isinstance(item, Stale):
        fields["silent_s"] = round(item.silent_s, 3)
    elif isinstance(item, Gap):
        position = None if item.position is None else str(item.position)
        fields |= {"channel": item.channel, "cause": str(item.cause)}
        fields |= {"epoch": item.epoch, "first": item.first, "last": item.last, "position": position}
    return json.dumps(fields)


def describe(item: Received, channel: str = "") -> str:
    """One line of text for a received item.

    Args:
        item: What was received.
        channel: Of an event that does not name its own, because it is not stored; empty: not known.
    """
    if isinstance(item, Gap):
        first = "?" if item.first is None else item.first
        last = "?" if item.last is None else item.last
        which = "unknown events" if item.epoch is None else f"{item.epoch}-{first} to {last}"
        # What a hub says may reach a terminal: no control characters.
        return f"GAP on {printable(item.channel)}: {which} ({printable(item.cause)})"
    if isinstance(item, Stale):
        return f"STALE: no beat of the hub for {item.silent_s:.1f} s; what happens now is not seen here"
    if not isinstance(item, Event):
        return "FRESH: the hub beats again"
    seconds, milliseconds = divmod(item.published_at_ms, 1000)
    at = CLOCK.date("%Y-%m-%d %H:%M:%S", seconds)
    line = (
        f"{at}.{milliseconds:03d} {item.channel or printable(channel) or '-'} {item.severity:<8} "
        f"{item.event_type} {item.source} #{item.sequence} {_age((item.latency_ms or 0.0) / 1000)}"
    )
    return f"{line} {_cut(item.data)}" if item.data else line


def _age(seconds: float) -> str:
    """How long ago an event was published: a latency in milliseconds, or in words."""
    if abs(seconds) < _LATENCY_S:
        return f"{seconds * 1000:.2f} ms"
    unit, length = next((unit, length) for unit, length in _UNITS if abs(seconds) >= length)
    count = int(abs(seconds) // length)
    words = f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{words} ago" if seconds > 0 else f"{words} in the future (its publisher's clock is ahead)"


def _cut(data: Mapping[str, Any]) -> str:
    text = escaped(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    return text if len(text) <= _DATA_LENGTH else f"{text[: _DATA_LENGTH - 1]}…"

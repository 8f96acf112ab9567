"""What all subcommands share: the global options, loading of the settings, output of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from broadcaster.cli.streams import NobodyReads
from broadcaster.core.redaction import scrub
from broadcaster.core.text import escaped
from broadcaster.core.version import VERSION
from broadcaster.settings import CONFIG_FILE, Loaded, assignment, load


class Number(click.FloatRange):
    """An option type: a number in a range; click's own range accepts NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail("NaN is no number", param, ctx)
        return number


BEGINNINGS: Final = "a duration (90s, 10m, 2h, 1d), a time (ISO 8601, with its zone), a position, or all"
"""What `--since` may be: the words of its help."""


def examples(*lines: str) -> str:
    """The end of a help text: lines to type."""
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])


class Commands(click.Group):
    """Commands that may be read by `head`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise NobodyReads from None


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "broadcaster demo",
        "broadcaster subscribe",
        "broadcaster publish --type SERVER_DOWN --source server-a",
        "broadcaster --set hub.port=9000 hub",
    ),
)
@click.option(
    "--config", type=click.Path(path_type=Path), help=f"File of settings; default: {CONFIG_FILE}, if it is here."
)
@click.option("--preset", metavar="NAME", help="Settings of config/NAME.toml go above it, such as burst.")
@click.option(
    "--set", "assignments", metavar="TABLE.KEY=VALUE", multiple=True, help="One setting, above all; repeatable."
)
@click.version_option(VERSION)
@click.pass_context
def cli(context: click.Context, config: Path | None, preset: str | None, assignments: tuple[str, ...]) -> None:
    """Broadcast critical events: from a Redis channel to every WebSocket subscriber, at once.

    `broadcaster demo` runs all parts of it, for a look; `broadcaster loadtest` measures it.
    """
    context.obj = {"config": config, "preset": preset, "assignments": assignments}


def filters(command: Callable[..., None]) -> Callable[..., None]:
    """The options `--type`, `--source` and `--severity` of a command: `types`, `sources`, `severities`."""
    for option in (
        click.option(
            "--severity", "severities", multiple=True, help="Only critical, warning or info; repeatable."
        ),
        click.option("--source", "sources", multiple=True, help="Only events of this source; repeatable."),
        click.option("--type", "types", multiple=True, help="Only events of this type; repeatable."),
    ):
        command = option(command)
    return command


def load_settings(context: click.Context, **options: Any) -> Loaded:
    """Load all layers; `options` are `table__key=value`, None where the option was not given."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in context.obj["assignments"]:
        for table, keys in assignment(text).items():
            overrides.setdefault(table, {}).update(keys)
    for name, value in options.items():
        if value is not None:
            table, key = name.split("__")
            overrides.setdefault(table, {})[key] = value
    return load(config=context.obj["config"], preset=context.obj["preset"], overrides=overrides, strict=True)


def program() -> str:
    """How this command is typed here: with a path, if it is in a virtual environment that is not active (make)."""
    path = Path(sys.prefix, "bin", "broadcaster")
    if "VIRTUAL_ENV" not in os.environ and path.is_file() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return "broadcaster"


def say(text: str, *, err: bool = False) -> None:
    """Print text that may quote a peer, which must not control a terminal: `escaped`."""
    click.echo(escaped(text), err=err)


def fail(message: str, code: int) -> NoReturn:
    for line in scrub(message).strip("\n").split("\n"):
        say(f"error: {line}", err=True)
    sys.exit(code)

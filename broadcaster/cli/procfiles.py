"""The subcommands that run the Procfiles of this package from any folder, and the one that writes them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from broadcaster.cli.common import Number, cli, examples, load_settings, say
from broadcaster.cli.extras import require
from broadcaster.core.errors import ConfigurationError
from broadcaster.core.files import STARTER, whole_file
from broadcaster.settings import ENVIRONMENT, assignment

_ROLE: Final = "exec broadcaster "
"""How every line of the Procfiles begins."""


@cli.command(epilog=examples("broadcaster demo", "broadcaster --set publisher.rate_hz=5 demo"))
@click.pass_context
def demo(context: click.Context) -> None:
    """Run all of it to watch, until Ctrl-C.

    Redis, hub, publisher of sample events and a subscriber: the same as `honcho start` with the Procfile that
    `broadcaster init` writes, without a file.
    """
    require("hub loadtest")
    settings = load_settings(context).settings
    _run("Procfile", _variables(context), hub=settings.hub.processes)


@cli.command(epilog=examples("broadcaster loadtest", "broadcaster loadtest --preset burst --clients 200"))
@click.option("--preset", metavar="NAME", help="burst, fanout, smoke, or a file of your own: config/NAME.toml.")
@click.option("--clients", type=click.IntRange(1), help="Subscribers in all.")
@click.option("--events", type=click.IntRange(1), help="Events published.")
@click.option("--rate", type=Number(0), metavar="HZ", help="Events a second; 0: all at once.")
@click.option("--processes", type=click.IntRange(1), help="Processes that the subscribers are spread over.")
@click.option("--hubs", type=click.IntRange(1), help="Hubs that share its port.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port of its hub; default: hub.port.")
@click.option("--results", metavar="FOLDER", help="Where the results go; default: results.")
@click.option("--quiet", is_flag=True, help="Say nothing of the progress.")
@click.pass_context
def loadtest(context: click.Context, /, preset: str | None, quiet: bool, **options: Any) -> None:
    """Run one load test; its report ends it.

    The same as `honcho -f Procfile.loadtest start` with what `broadcaster init` writes, without a file.
    Its exit code is that of `broadcaster report`.
    """
    require("hub loadtest")
    from broadcaster.loadtest.report.collect import check_results
    from broadcaster.loadtest.target import check_url

    context.obj["preset"] = preset or context.obj["preset"]
    keys = {"clients": "fleet.clients", "processes": "fleet.processes", "rate": "loadtest.rate_hz",
            "events": "loadtest.events", "port": "hub.port", "hubs": "hub.processes",
            "results": "loadtest.results"}  # fmt: skip
    given = [f"{keys[name]}={value}" for name, value in options.items() if value is not None]
    if quiet:
        given.append("loadtest.progress=false")
    context.obj["assignments"] = (*context.obj["assignments"], *given)
    settings = load_settings(context).settings
    check_url(settings)
    check_results(settings)
    _run("Procfile.loadtest", _variables(context), fleet=settings.fleet.processes, hub=settings.hub.processes)


@cli.command(epilog=examples("broadcaster init", "broadcaster init wall --force"))
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def init(folder: Path, force: bool) -> None:
    """Write Procfiles and settings into a folder.

    Procfile, Procfile.loadtest, broadcaster.toml and config/ (presets, Redis users) into FOLDER, by default this
    one. Files that are there are left as they are, and nothing is written.
    """
    names = sorted(path.relative_to(STARTER) for path in _files(STARTER))
    there = [str(name) for name in names if os.path.lexists(folder / name)]
    if there and not force:
        raise ConfigurationError(
            f"{folder} has {', '.join(there)} already; nothing was written (--force overwrites)"
        )
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / name) as draft:
                draft.write((STARTER / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot write {error.filename2 or error.filename}: {error.strerror}") from None
    say(f"wrote {', '.join(map(str, names))} in {folder}")
    say("Run them there: honcho start, or honcho -f Procfile.loadtest start")


def _files(folder: Path) -> list[Path]:
    """All files below a folder; in a checkout some are reached by links."""
    return [file for path in folder.iterdir() for file in (_files(path) if path.is_dir() else [path])]


def _variables(context: click.Context) -> dict[str, str]:
    """The global options as variables: so they reach every process."""
    variables = {}
    for text in context.obj["assignments"]:
        [(table, keys)] = assignment(text).items()
        variables.update({f"{ENVIRONMENT}{table}__{key}".upper(): text.partition("=")[2] for key in keys})
    for name in ("config", "preset"):
        if context.obj[name] is not None:
            variables[f"{ENVIRONMENT}{name}".upper()] = str(context.obj[name])
    return variables


def _run(procfile: str, variables: dict[str, str], **concurrency: int) -> NoReturn:
    """Run a Procfile of this package until its first process ends; its exit code is that one's.

    The lines are run by this very interpreter: `broadcaster` need not be on PATH. Modules that happen to be in the
    folder where it runs are not imported (-P).
    """
    from honcho.environ import expand_processes, parse_procfile

    from broadcaster.cli.progress import printer
    from broadcaster.cli.supervisor import Supervisor

    # A secret is given once: an option takes the place of the variable, and of the one that names a file with it.
    over = {f"{name}_FILE" for name in variables} | {name.removesuffix("_FILE") for name in variables}
    given = {name: value for name, value in os.environ.items() if name.upper() not in over}
    shown = printer()
    supervisor = Supervisor(shown)
    lines = parse_procfile((STARTER / procfile).read_text(encoding="utf-8")).processes
    for process in expand_processes(lines, concurrency=concurrency):
        command = process.cmd.replace(_ROLE, f"exec {shlex.quote(sys.executable)} -P -m broadcaster ", 1)
        supervisor.add_process(process.name, command, env={**given, **variables, **process.env})
    try:
        supervisor.loop()
    finally:
        if shown is not None:
            shown.hide()
    sys.exit(supervisor.returncode)

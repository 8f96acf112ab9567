"""`broadcaster report`: the last role of a load test, and the same report again, in whatever form."""

from __future__ import annotations

import asyncio
import json
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

from broadcaster.cli.common import cli, examples, fail, load_settings, program, say
from broadcaster.cli.extras import extra_of
from broadcaster.core import process
from broadcaster.core.errors import BroadcasterError, OutputError
from broadcaster.core.text import reason

if TYPE_CHECKING:
    from broadcaster.loadtest.report.collect import Filed
    from broadcaster.loadtest.report.outcome import Outcome

_PAGE: Final = "report.html"
"""The page with pictures, in the folder of its run."""


@cli.command(
    epilog=examples(
        "broadcaster report --open",
        "broadcaster report results/20260101-120000-1-2 --explain",
        "broadcaster report host-a/results/monday host-b/results/monday --json",
    )
)
@click.option("--loadtest", is_flag=True, help="Wait for this load test, and file it in the archive.")
@click.option("--explain", is_flag=True, help="Also say what the lines mean.")
@click.option("--json", "form", flag_value="json", help="Print it for programs (docs/measuring.md).")
@click.option("--markdown", "form", flag_value="markdown", help="Print it for a pull request.")
@click.option("--junit", "form", flag_value="junit", help="Print it for CI: each limit is a test case.")
@click.option("--hgrm", "form", flag_value="hgrm", help="Print the percentiles as HdrHistogram does, in ms.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write its page with pictures.")
@click.option("--open", "is_open", is_flag=True, help="Open this page in a browser.")
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@click.pass_context
def report(
    context: click.Context,
    loadtest: bool,
    explain: bool,
    form: str | None,
    html: Path | None,
    is_open: bool,
    folders: tuple[Path, ...],
) -> None:
    """Print the report of a load test again.

    FOLDER is that of the run, by default the newest one in results/; several are its folders on several hosts, and
    make one report. Exit code 0: all limits of [report] hold; 1: one is broken, or the run is INVALID; 65: the
    folder is not that of a complete run, or several are not of the same one.
    """
    from broadcaster.loadtest.report.text import present

    if loadtest and folders:
        raise click.UsageError("give the folder of a run, or --loadtest inside of one")
    if form and (loadtest or explain or html or is_open):
        raise click.UsageError(f"--{form} is of a run that has ended, and goes with nothing else")
    if loadtest and (html or is_open):
        raise click.UsageError("a load test writes its page into its folder")
    filed = _collect(context) if loadtest else _read(context, folders)
    folder, outcome = filed.folder, filed.outcome
    if form:
        click.echo(_rendered(form, outcome, folder), nl=False)
        sys.exit(1 if outcome.is_failure else 0)
    say(present(outcome, folder, explain=explain))
    if filed.problem:
        fail(filed.problem, OutputError.exit_code)
    if loadtest:
        say(f"One row added to {folder.parent / 'archive.csv'}")
        if outcome.config["report"].pictures:
            say(_with_pictures(outcome, folder))
    elif html or is_open:
        _show(outcome, html or folder / _PAGE, is_open=is_open)
    _end(outcome, folders or (folder,), explain=explain)


def _end(outcome: Outcome, folders: tuple[Path, ...], *, explain: bool) -> NoReturn:
    """Say where more is, and end with the exit code of the run."""
    listed = " ".join(map(str, folders))
    if len(folders) > 1:
        say(f"One run, merged from: {listed}")
    if not explain:
        say(f"What the lines mean: {program()} report {listed} --explain")
    sys.exit(1 if outcome.is_failure else 0)


def _collect(context: click.Context) -> Filed:
    """Wait for the run that this process is a part of."""
    from broadcaster.loadtest.report.collect import report_run

    settings = load_settings(context).settings
    filed: Filed | None = None

    async def main(stop: asyncio.Event) -> int:
        nonlocal filed
        filed = await process.unless_stopped(stop, report_run(settings))
        return 0

    code = process.run(main)
    if filed is None:
        fail("stopped before the run was complete", code or process.TERMINATED)
    return filed


def _read(context: click.Context, folders: tuple[Path, ...]) -> Filed:
    """Read a run that has ended; without a folder the newest one."""
    from broadcaster.loadtest.report.collect import Filed
    from broadcaster.loadtest.report.merge import read_merged
    from broadcaster.loadtest.report.outcome import newest_run, read_run

    if len(folders) > 1:
        return Filed(*read_merged(folders), "")
    [folder] = folders or [None]
    folder = folder or newest_run(Path(load_settings(context).settings.loadtest.results))
    return Filed(folder, read_run(folder), "")


def _show(outcome: Outcome, path: Path, *, is_open: bool) -> None:
    from broadcaster.loadtest.report.page.html import write_page

    write_page(outcome, path)
    say(f"Pictures: {path}")
    if is_open and not webbrowser.open(path.absolute().as_uri()):
        say("There is no browser to open it with.", err=True)


def _rendered(form: str, outcome: Outcome, folder: Path) -> str:
    from broadcaster.loadtest.report import ci, hgrm, summary

    if form == "json":
        return json.dumps(summary.summary(outcome), indent=2) + "\n"
    if form == "hgrm":
        return hgrm.hgrm(outcome.latencies.ordered_ns)
    return ci.markdown(outcome, folder) if form == "markdown" else ci.junit(outcome)


def _with_pictures(outcome: Outcome, folder: Path) -> str:
    """Write the page of a run that has just ended; say where it is, or how to get it."""
    try:
        from broadcaster.loadtest.report.page.html import write_page

        write_page(outcome, folder / _PAGE)
    except ModuleNotFoundError as error:
        return f"No pictures: {extra_of(error) or error}, then {program()} report {folder} --open"
    except (OSError, BroadcasterError) as error:
        return f"No pictures: {reason(error)}"
    return f"Pictures: {folder / _PAGE}"

"""The command line: one subcommand per role of the Procfiles, and a few for interactive use.

Nothing heavy is imported before a subcommand needs it: `honcho start` waits for all of them to start.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import click

from broadcaster.cli import events, people, procfiles, reports, roles, status, streams, tail
from broadcaster.cli.common import cli, fail
from broadcaster.cli.extras import extra_of
from broadcaster.core import logs
from broadcaster.core.errors import BroadcasterError, OutputError, RedisUnreachable
from broadcaster.settings import TRACEBACK

__all__ = ["cli", "events", "main", "people", "procfiles", "reports", "roles", "status", "tail"]


def main() -> None:
    """Entry point: every error is one line per problem and an exit code, never a traceback."""
    streams.prepare()
    if not isinstance(sys.stderr, logs.Scrubbed):  # usage errors and tracebacks quote what was typed
        sys.stderr = logs.Scrubbed(sys.stderr)
    logs.configure_logging()
    try:
        try:
            code = _run()
        finally:
            streams.flush()
    except (streams.NobodyReads, BrokenPipeError):
        streams.abandon()
        code = 0  # as behind `| head -1`
    except OSError as error:
        streams.abandon(but_errors=True)
        fail(str(OutputError("to standard output", error)), OutputError.exit_code)
    sys.exit(code)


def _run() -> int:
    """Run what the arguments say; the exit code.

    Raises:
        OSError: Standard output cannot be written; errors of files have been named by their users.
    """
    try:
        code: object = cli(prog_name="broadcaster", standalone_mode=False)
    except SystemExit as ended:
        code = ended.code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as ended:
        if isinstance(ended.__cause__, EOFError):  # nothing is asked here: it came from elsewhere
            fail(*_explain(ended.__cause__))
        return 130
    except Exception as error:
        if streams.is_theirs(error):
            raise
        fail(*_explain(error))
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code. Nothing of what an unforeseen one quotes: it may be secret."""
    if isinstance(error, RedisUnreachable):
        return f"{error} ({error.where})", error.exit_code
    if isinstance(error, BroadcasterError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (missing := extra_of(error)):
        return str(missing), missing.exit_code
    if TRACEBACK in os.environ:
        traceback.print_exception(error)
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(at.filename).name}, line {at.lineno}"
    return (
        f"this is a bug: {type(error).__name__} in {where} ({TRACEBACK}=1 shows more)",
        BroadcasterError.exit_code,
    )

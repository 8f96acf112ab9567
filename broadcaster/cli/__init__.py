"""The command line: one subcommand per role of the Procfiles, and a few for interactive use.

Nothing heavy is imported before a subcommand needs it: `honcho start` waits for all of them to start.
"""

from __future__ import annotations

from broadcaster.cli import people, procfiles, roles
from broadcaster.cli.common import cli, fail
from broadcaster.cli.extras import extra_of
from broadcaster.core import logs
from broadcaster.core.errors import BroadcasterError, RedisUnreachable

__all__ = ["cli", "main", "people", "procfiles", "roles"]


def main() -> None:
    """Entry point: every foreseen error is one line per problem and an exit code, never a traceback."""
    logs.configure_logging()
    try:
        cli(prog_name="broadcaster")
    except RedisUnreachable as error:
        fail(f"{error} ({error.where})", error.exit_code)
    except BroadcasterError as error:
        fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if missing := extra_of(error):
            fail(str(missing), missing.exit_code)
        raise

"""The extras: the base is the client, and a part that was not installed says what brings it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import pytest

from broadcaster.cli.extras import EXTRAS
from broadcaster.redis.server import RedisServer
from tests.support import HubProcess, clean_environment

COMMAND = "from broadcaster.cli import main; main()"


def without(
    modules: list[str], *arguments: str, program: str = COMMAND, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`broadcaster ...`, or another program, where these modules cannot be imported."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {program}",
            *arguments,
        ],
        cwd=tempfile.gettempdir(),
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


VARIABLES = {
    "BROADCASTER_AUTH__MODE": "token",
    "BROADCASTER_AUTH__JWT_KEYS": json.dumps([{"algorithm": "HS256", "key": "x" * 32}]),
    "BROADCASTER_HUB__MAX_CONNECTIONS": "10",  # more than may be open would be said, too
}
MISSING = {
    "the hub": ("sanic", "hub", ("hub",)),
    "the hub's parser": ("httptools", "hub", ("hub",)),
    "signed tokens in the hub": ("jwt", "hub", ("hub",)),
    "signed tokens": ("jwt", "hub", ("token", "create", "--name", "x")),
    "the report": ("tabulate", "loadtest", ("report", ".")),
    "its figures": ("numpy", "loadtest", ("report", ".")),
    "a load test": ("honcho", "all", ("loadtest",)),
    "a load test's report": ("tabulate", "all", ("loadtest",)),
    "a load test's hub": ("sanic", "all", ("loadtest",)),
    "the demo": ("honcho", "all", ("demo",)),
}


@pytest.mark.parametrize(("module", "extra", "arguments"), MISSING.values(), ids=MISSING.keys())
def test_a_missing_extra_is_one_line(module: str, extra: str, arguments: tuple[str, ...]) -> None:
    """It names what to install; exit code 69."""
    ended = without([module], *arguments, **VARIABLES)
    said = f"error: {module} is not installed: pip install 'critical-event-broadcaster[{extra}]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (69, "", said)


RECEIVE = """
import asyncio
from broadcaster import Subscriber

async def main():
    async with Subscriber(since=sys.argv[1]) as subscriber:
        print((await subscriber.receive()).source)

asyncio.run(main())
"""


def test_the_base_is_the_client() -> None:
    """Without any extra events are published, and received from a hub; every other command can say what it is."""
    with RedisServer.start() as redis, HubProcess(redis.url) as hub:
        hub.until_ready()
        variables = {"BROADCASTER_REDIS__URL": redis.url, "BROADCASTER_HUB__PORT": str(hub.port)}
        for source in ("first", "second"):
            published = without([*EXTRAS], "publish", "--type", "T", "--source", source, **variables)
            assert (published.returncode, published.stderr) == (0, "")
        last = published.stdout.partition("stored as ")[2].partition(";")[0]
        before = f"{last.partition('-')[0]}-1"
        received = without([*EXTRAS], before, program=RECEIVE, **variables)
        assert (received.stdout, received.stderr) == ("second\n", "")
    for arguments in (["--help"], ["config", "show"], ["hub", "--help"]):
        assert without([*EXTRAS], *arguments).returncode == 0

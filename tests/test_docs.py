"""What the documents show is typed as it stands: every fenced block of them is run, in a folder like a user's.

A comment in front of a block says what is special about it:

- `<!-- run until: WORDS -->`: it does not end by itself; once it has said WORDS it is ended by Ctrl-C.
- `<!-- run with: access control -->`: the hub is one that asks for tokens.
- `<!-- not run: REASON -->`: it cannot be run; `NOT_RUN` lists these.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broadcaster.redis.server import RedisServer
from broadcaster.settings import load
from tests.clients.programs import node_has_websocket, node_packages, program
from tests.support import (
    ROOT,
    WHOLE_RUN_S,
    HubThread,
    RedisClient,
    Running,
    event_payload,
    eventually,
    free_port,
    redis_client,
)

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = [
    "README.md: a fresh clone is what .ci/run makes, with the address of the repository",
    "README.md: what `make loadtest` prints",
    "README.md: what that run printed",
    "README.md: installs from the network",
    "README.md: restarts services of systemd",
    "docs/clients.md: a browser",
    "docs/clients.md: a browser",
    "docs/design.md: a drawing",
    "docs/design.md: a fragment; tests/bench/naive.py is the whole program",
    "docs/design.md: a drawing",
    "docs/faults.md: takes minutes",
]
"""What is shown and not run, with the reason."""

ENDED_BY_CTRL_C = (0, 130, -signal.SIGINT)

_BLOCK = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        document: Its path in the repository.
        line: Where it begins.
        language: Of its content.
        mark: The comment before it; empty: none.
        text: Its content.
        earlier: The shell blocks that stand before it: what was typed in the same terminal.
    """

    document: str
    line: int
    language: str
    mark: str
    text: str
    earlier: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line} {self.language}"

    def marked(self, word: str) -> str:
        """What stands behind `word: ` in the comment before the block."""
        return self.mark.partition(f"{word}: ")[2] if self.mark.startswith(f"{word}: ") else ""


def blocks_of(document: Path) -> list[Block]:
    """All blocks of a document, in their order."""
    text, name = document.read_text(), str(document.relative_to(ROOT))
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        mark, language, content = match[1] or "", match[2], match[3]
        line = text.count("\n", 0, match.start(3)) + 1
        earlier = "".join(block.text for block in found if block.language == "sh")
        found.append(Block(name, line, language, mark, content, earlier))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


@dataclass(frozen=True)
class Site:
    """What a user has: the folder after `make`, and a Redis and hubs that run.

    Attributes:
        folder: With Makefile, Procfiles, settings, presets and `.venv`.
        redis: For all blocks but those that start one.
        hub: Anybody may subscribe.
        guarded: It asks for tokens.
        key: With which these are signed.
        client: Publishes.
    """

    folder: Path
    redis: RedisServer
    hub: HubThread
    guarded: HubThread
    key: str
    client: RedisClient

    def as_shown(self, text: str, hub_port: int) -> str:
        """A block with the addresses of this site in place of those that it shows."""
        for shown, here in {
            "127.0.0.1:8765": f"127.0.0.1:{hub_port}",
            "127.0.0.1:6390": f"127.0.0.1:{self.redis.port}",
            "PORT=9000": f"PORT={free_port()}",
            "PORT=9001": f"PORT={free_port()}",
        }.items():
            text = text.replace(shown, here)
        return text


def made(folder: Path) -> Path:
    """A folder as `make` leaves it."""
    copied = ("Makefile", "Procfile", "Procfile.loadtest", "broadcaster.toml", "pyproject.toml", "README.md")
    for name in copied:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for name in ("installed", "installed-dev"):
        (folder / ".venv" / name).touch()
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = made(tmp_path_factory.mktemp("broadcaster"))
    key = "0123456789abcdef" * 4
    keys = json.dumps([{"algorithm": "HS256", "key": key}])
    with (
        RedisServer.start() as redis,
        redis_client(redis) as client,
        HubThread(redis.url) as hub,
        HubThread(redis.url, BROADCASTER_AUTH__MODE="token", BROADCASTER_AUTH__JWT_KEYS=keys) as guarded,
    ):
        yield Site(folder, redis, hub.until_ready(), guarded.until_ready(), key, client)


def variables_of(site: Site, block: Block) -> dict[str, str]:
    """The environment of a block: that of a new terminal, but for addresses and sizes."""
    here = Path(sys.executable).parent
    path = [each for each in os.environ["PATH"].split(os.pathsep) if Path(each).resolve() != here.resolve()]
    port, redis_url = site.hub.port, site.redis.url
    if block.marked("run with"):
        port = site.guarded.port
    elif starts := re.search(r"\b(make|broadcaster) (start|demo|loadtest|hub)\b", block.text):
        port = free_port()
        if starts[2] != "hub":
            redis_url = f"redis://127.0.0.1:{free_port()}/0"
    return {
        "PATH": os.pathsep.join(path),
        "BROADCASTER_REDIS__URL": redis_url,
        "BROADCASTER_HUB__PORT": str(port),
        "BROADCASTER_LOADTEST__EVENTS": "5",
        "BROADCASTER_FLEET__DRAIN_S": "0.5",
        "BROADCASTER_REPORT__ALLOW_INVALID": "true",
        "BROADCASTER_REPORT__PICTURES": "false",
        "BROADCASTER_HUB__DRAIN_S": "0.1",
    } | ({"BROADCASTER_AUTH__JWT_KEYS": json.dumps([{"algorithm": "HS256", "key": site.key}])}
         if block.marked("run with") else {})  # fmt: skip


@contextlib.contextmanager
def started(site: Site, block: Block, *command: str, **variables: str) -> Iterator[Running]:
    """A process that runs a block, in a process group of its own, of which nothing is left."""
    with Running(*command, cwd=site.folder, **(variables_of(site, block) | variables)) as running:
        group = running.process.pid
        try:
            yield running
            eventually(lambda: not exists(group), f"it has left a process:\n{running.output}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def exists(group: int) -> bool:
    """Whether there is a process of a group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run(site: Site, block: Block, *command: str, **variables: str) -> None:
    """Run a block to its end, or until it has said what it should."""
    with started(site, block, *command, **variables) as running:
        if words := block.marked("run until"):

            def said() -> bool:
                site.client.publish(event_payload(1))
                assert running.process.poll() is None, f"it has ended:\n{running.output}"
                return words in running.output

            eventually(said, f"it does not say {words!r}:\n{running.output}", 30)
            os.killpg(running.process.pid, signal.SIGINT)
            assert running.wait(within=10) in ENDED_BY_CTRL_C, running.output
        else:
            assert running.wait(within=WHOLE_RUN_S) == 0, running.output
    if block.language != "python" or running.lines[-1:] != ["KeyboardInterrupt"]:  # that may be left to Python
        assert "Traceback" not in running.output
    assert "Errno" not in running.output
    assert "make: ***" not in running.output


# How each language is run


def run_shell(site: Site, block: Block) -> None:
    """In a terminal in which what stands before it was typed: the README has to say how the commands get there."""
    text = site.as_shown(block.text, int(variables_of(site, block)["BROADCASTER_HUB__PORT"]))
    is_active = block.document != "README.md" or ". .venv/bin/activate" in block.earlier
    for name in re.findall(r"^(?:\w+=\$\()?(curl|openssl|redis-cli)\b|\$\((openssl)", text, re.MULTILINE):
        program("".join(name))
    if is_active:
        text = f". .venv/bin/activate\n{text}"
    run(site, block, "bash", "-e", "-u", "-c", text)


def run_python(site: Site, block: Block) -> None:
    """As a program of its own, with the Python of `.venv`."""
    file = site.folder / "program.py"
    file.write_text(site.as_shown(block.text, site.hub.port))
    run(site, block, sys.executable, "-W", "error", str(file))


def run_javascript(site: Site, block: Block) -> None:
    """In node, which before version 22 is given the WebSocket of the package `ws`."""
    file = site.folder / "program.js"
    shim = "" if node_has_websocket() else 'globalThis.WebSocket = require("ws");\n'
    packages = "" if node_has_websocket() else str(node_packages())
    file.write_text(shim + site.as_shown(block.text, site.hub.port))
    run(site, block, program("node"), str(file), NODE_PATH=packages)


def check_toml(site: Site, block: Block) -> None:
    """These are settings."""
    file = site.folder / "shown.toml"
    file.write_text(block.text)
    load(config=file)


def check_json(site: Site, block: Block) -> None:
    """It can be parsed."""
    json.loads(block.text)


NGINX = """\
pid {folder}/nginx.pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
{shown}
    }}
}}
"""


def check_nginx(site: Site, block: Block) -> None:
    """Nginx takes it in a server (tests/clients has it in front of a hub)."""
    file = site.folder / "nginx.conf"
    file.write_text(NGINX.format(folder=site.folder, port=free_port(), shown=block.text))
    command = [program("nginx"), "-t", "-q", "-e", "stderr", "-p", str(site.folder), "-c", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert checked.returncode == 0, checked.stderr


HOW: dict[str, Callable[[Site, Block], None]] = {
    "sh": run_shell,
    "python": run_python,
    "javascript": run_javascript,
    "toml": check_toml,
    "json": check_json,
    "nginx": check_nginx,
}


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if not block.marked("not run")], ids=lambda block: block.name
)
def test_a_block_works_as_it_is_shown(block: Block, site: Site) -> None:
    """Typed as it stands it does what it should, leaves no process, and shows no traceback."""
    assert block.language in HOW, f"nobody knows how to run {block.language or 'a block without a language'!r}"
    HOW[block.language](site, block)


def test_what_is_not_run_is_listed() -> None:
    """No block is left out without a reason, and none without being noticed here."""
    left_out = [f"{block.document}: {block.marked('not run')}" for block in BLOCKS if block.marked("not run")]
    assert left_out == NOT_RUN


def test_every_block_is_found() -> None:
    """Each fence of the documents belongs to a block, and each mark is one of those that are known."""
    fences = sum(len(re.findall(r"^\s*(?:```|~~~)", document.read_text(), re.MULTILINE)) for document in DOCUMENTS)
    assert fences == 2 * len(BLOCKS)
    assert len(BLOCKS) > 15
    marks = sum(len(re.findall("^<!-- ", document.read_text(), re.MULTILINE)) for document in DOCUMENTS)
    assert marks == sum(bool(block.mark) for block in BLOCKS)
    known = ("run until", "run with", "not run")
    assert not [block.name for block in BLOCKS if block.mark and not any(map(block.marked, known))]

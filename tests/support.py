"""Real parts for the tests: a hub process, a raw client, waiting with a deadline.

Every wait is a multiple of `UNIT_S`; `TEST_TIME_SCALE=3` triples them on a slow machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import hiredis
import pytest
import uvloop
from blockbuster import blockbuster_ctx

from broadcaster.cli import main
from broadcaster.redis.server import RedisServer, free_port
from broadcaster.settings import RedisTable

T = TypeVar("T")
P = ParamSpec("P")

UNIT_S = float(os.environ.get("TEST_TIME_SCALE", "1"))
"""The time unit of all deadlines in seconds."""

ROOT = Path(__file__).parent.parent


def eventually(probe: Callable[[], T], message: str, within: float = 10.0) -> T:
    """Poll until `probe` returns something true; return it. `within` is in time units."""
    deadline = time.monotonic() + within * UNIT_S
    while not (result := probe()):
        assert time.monotonic() < deadline, f"after {within} units: {message}"
        time.sleep(0.01)
    return result


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without this product's and honcho's variables, plus `variables`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("BROADCASTER_", "HONCHO_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables


class Running:
    """A process of the product with its output; ended when the block ends, whatever happens."""

    def __init__(self, *command: str, cwd: Path | str | None = None, **variables: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd or tempfile.gettempdir(),
            env=clean_environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within: float = 10.0) -> int:
        """The exit code; fails after `within` time units."""
        try:
            code = self.process.wait(within * UNIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within} units:\n{self.output}") from None
        self._reader.join(1)
        return code

    def said(self, words: str, within: float = 10.0) -> str:
        """Wait for a line that has `words`; return it."""

        def look() -> str:
            return next((line for line in list(self.lines) if words in line), "")

        return eventually(look, f"no line with {words!r} in:\n{self.output}", within)

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        try:
            self.process.wait(8 * UNIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(1)
        assert self.process.stdout is not None
        self.process.stdout.close()


def broadcaster(*arguments: str, cwd: Path | str | None = None, **variables: str) -> Running:
    """Run `broadcaster ...` as a process of its own, by default in a folder without a broadcaster.toml."""
    return Running(sys.executable, "-m", "broadcaster", *arguments, cwd=cwd, **variables)


class HubProcess(Running):
    """A real `broadcaster hub` on a free port."""

    def __init__(self, redis_url: str, port: int | None = None, **variables: str) -> None:
        self.port = port or free_port()
        super().__init__(
            *(sys.executable, "-m", "broadcaster", "hub"),
            BROADCASTER_REDIS__URL=redis_url,
            BROADCASTER_HUB__PORT=str(self.port),
            **({"BROADCASTER_HUB__DRAIN_S": "0.1"} | variables),
        )

    def __enter__(self) -> HubProcess:
        return self

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a GET; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=3) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, {}

    def stats(self) -> dict[str, Any]:
        return self.get("/stats")[1]

    def until_ready(self, within: float = 10.0) -> HubProcess:
        eventually(lambda: self.get("/health/ready")[0] == 200, f"hub not ready:\n{self.output}", within)
        return self

    def until_connected(self, count: int) -> None:
        eventually(lambda: self.stats().get("connected") == count, f"never {count} connected: {self.stats()}")


class RawClient:
    """A WebSocket client down at the bytes, for what a well-behaved library would not send.

    `text` and `close_code` wait for the next frame of that kind; `frames` keeps all, as (opcode, payload).
    """

    def __init__(self, port: int, *, path: str = "/ws", subprotocol: str = "", receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10 * UNIT_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(upgrade_request(port, path=path, subprotocol=subprotocol))
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            more = self.socket.recv(65_536)
            assert more, f"closed during the handshake: {self._buffer!r}"
            self._buffer += more
        self.response, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self.frames: list[tuple[int, bytes]] = []

    def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> None:
        """Send one frame, right or wrong."""
        self.socket.sendall(client_frame(opcode, payload, fin=fin, mask=mask))

    def next_frame(self) -> tuple[int, bytes]:
        """The next whole frame; raises EOFError when the hub has closed the connection."""
        head = self._take(2)
        length = head[1] & 0x7F
        if length == 126:
            length = int.from_bytes(self._take(2), "big")
        elif length == 127:
            length = int.from_bytes(self._take(8), "big")
        frame = (head[0] & 0x0F, self._take(length))
        self.frames.append(frame)
        return frame

    def text(self) -> str:
        while True:
            opcode, payload = self.next_frame()
            if opcode == 1:
                return payload.decode()

    def event(self) -> dict[str, Any]:
        """The next text frame as JSON."""
        fields: dict[str, Any] = json.loads(self.text())
        return fields

    def close_code(self) -> int:
        while True:
            opcode, payload = self.next_frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                more = self.socket.recv(1 << 20)
            except ConnectionResetError:
                more = b""
            if not more:
                raise EOFError("the hub closed the connection")
            self._buffer += more
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def vanish(self) -> None:
        """Go away without a close frame (RST)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def upgrade_request(port: int, *, path: str = "/ws", subprotocol: str = "", **headers: str) -> bytes:
    """A correct upgrade request; `headers` (with _ for -) replace or add."""
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
    }
    if subprotocol:
        fields["Sec-WebSocket-Protocol"] = subprotocol
    fields |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode()


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
    """A frame as a client sends it, masked with zeros unless `mask` is off (which is an error)."""
    first = bytes([opcode | (0x80 if fin else 0)])
    bit = 0x80 if mask else 0
    if len(payload) < 126:
        head = first + bytes([bit | len(payload)])
    elif len(payload) < 65_536:
        head = first + bytes([bit | 126]) + len(payload).to_bytes(2, "big")
    else:
        head = first + bytes([bit | 127]) + len(payload).to_bytes(8, "big")
    return head + (b"\0\0\0\0" if mask else b"") + payload


def event_payload(sequence: int = 1, **changes: Any) -> bytes:
    """An encoded event as a foreign publisher would write it; a change to `...` (Ellipsis) leaves a field out."""
    now_us = time.time_ns() // 1000
    fields: dict[str, Any] = {
        "event_id": str(uuid.uuid4()),
        "event_type": "SERVER_DOWN",
        "source": "server-a",
        "sequence": sequence,
        "published_at_ms": now_us // 1000,
        "published_at_us": now_us,
    } | changes
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


class RedisClient:
    """A plain Redis client, for what somebody else's publisher might do."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._reader = hiredis.Reader()

    def command(self, *words: Any) -> Any:
        self._socket.sendall(hiredis.pack_command(words))
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(65_536))
        return reply

    def publish(self, payload: bytes, channel: str = "events.critical") -> int:
        """PUBLISH; how many subscriptions heard it."""
        heard: int = self.command("PUBLISH", channel, payload)
        return heard

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def redis_client(server: RedisServer | int) -> Iterator[RedisClient]:
    """A client of a Redis of ours, or of whatever listens on a port."""
    client = RedisClient(server if isinstance(server, int) else server.port)
    try:
        yield client
    finally:
        client.close()


class Finished(NamedTuple):
    """What a process of the product that has ended leaves behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Its one line on stderr, without `error: `; fails if it said more, less, or a traceback."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"expected one line on stderr, got:\n{self.stderr}"
        assert lines[0].startswith("error: "), self.stderr
        return lines[0].removeprefix("error: ")


def finished(*arguments: str, cwd: Path | str | None = None, within: float = 20.0, **variables: str) -> Finished:
    """Run `broadcaster ...` to its end, by default in a folder without a broadcaster.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "broadcaster", *arguments],
        cwd=cwd or tempfile.gettempdir(),
        env=clean_environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=within * UNIT_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_async(story: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine with asyncio's debug mode on; a call in the product that blocks the loop is an error."""
    with blockbuster_ctx("broadcaster"):
        return asyncio.run(story, debug=True)


async def until(probe: Callable[[], T], message: str, within: float = 10.0) -> T:
    """`eventually` for a coroutine: the event loop turns between two looks."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within * UNIT_S
    while not (result := probe()):
        assert loop.time() < deadline, f"after {within} units: {message}"
        await asyncio.sleep(0.01)
    return result


def next_reply(client: RedisClient) -> Any:
    """What Redis says next to `client`, asked or not."""
    while (reply := client._reader.gets()) is False:
        client._reader.feed(client._socket.recv(65_536))
    return reply


def next_message(client: RedisClient) -> bytes:
    """The next payload on the channels that `client` has subscribed to."""
    message: bytes = next_reply(client)[2]
    return message


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test as the hub runs, on uvloop; a blocked loop or an error in a callback fails it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        unhandled: list[str] = []

        async def story() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(str(what)))
            async with asyncio.timeout(30 * UNIT_S):
                await test(*args, **kwargs)

        with (
            blockbuster_ctx("broadcaster"),
            asyncio.Runner(debug=True, loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(story())
        assert not unhandled, unhandled

    return run


def server_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Whole frames as a hub sends them, as (opcode, payload); what is cut at the end is left out."""
    frames = []
    at = 0
    while len(data) >= at + 2:
        start, length = at + 2, data[at + 1] & 0x7F
        if width := {126: 2, 127: 8}.get(length, 0):
            length, start = int.from_bytes(data[start : start + width], "big"), start + width
        if len(data) < start + length:
            break
        frames.append((data[at] & 0x0F, data[start : start + length]))
        at = start + length
    return frames


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Redis stands still: connections stay open, nothing is answered."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextlib.contextmanager
def crashed(server: RedisServer) -> Iterator[Callable[[], RedisServer]]:
    """Redis dies at once; calling what is given starts another one at the same port, until the block ends."""
    server.kill()
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(RedisServer.start(server.port))


def assert_calm(hub: HubProcess, since: int = 0) -> None:
    """The hub lives, answers, and has no error in its log from this line on."""
    assert hub.get("/health/live")[0] == 200, hub.output
    said = "\n".join(hub.lines[since:])
    assert not any(word in said for word in ("Traceback", "Error", "exception")), said


def memory_bytes(process: Running) -> int:
    """Memory of a process that is in RAM now."""
    return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(process: Running) -> float:
    """Seconds of CPU that a process has used so far."""
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CommandLine:
    """`broadcaster ...` inside of the test's process: the same function as the real one, 20 times as fast."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        for variable in set(os.environ) - set(clean_environment()):
            monkeypatch.delenv(variable)
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, **variables: str) -> Finished:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)
        self._monkeypatch.setattr(sys, "argv", ["broadcaster", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Finished(code or 0, *self._capsys.readouterr())


def read_to_end(client: RawClient, within: float = 5.0) -> None:
    """Read all frames until the hub has ended the connection; fails when it has not in so many time units."""
    client.socket.settimeout(within * UNIT_S)
    try:
        with contextlib.suppress(EOFError):
            while True:
                client.next_frame()
    except TimeoutError:
        raise AssertionError(f"the hub has not ended the connection after {within} units") from None


def next_but_ping(client: RawClient) -> tuple[int, bytes]:
    """The next frame that is no ping of the hub's own: those may come at any time."""
    while (frame := client.next_frame())[0] == 9:
        pass
    return frame


@contextlib.asynccontextmanager
async def dead(server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[RedisServer]]]:
    """`crashed`, for a coroutine."""
    with contextlib.ExitStack() as stack:
        revive = await asyncio.to_thread(stack.enter_context, crashed(server))
        try:
            yield lambda: asyncio.to_thread(revive)
        finally:
            await asyncio.to_thread(stack.close)


def hasty(url: str, **changes: float) -> RedisTable:
    """Settings that notice and retry soon."""
    times = {
        "connect_timeout_s": 1.0 * UNIT_S,
        "ping_interval_s": 0.1,
        "silence_timeout_s": 0.5 * UNIT_S,
        "reconnect_max_s": 0.1,
    }
    return RedisTable.model_validate({"url": url, **times, **changes})


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def stand_in(talk: Talk) -> AsyncIterator[str]:
    """A server that says what the test wants, for what no real Redis would do on demand; yields its URL."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await talk(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        for writer in writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()


def connections_taken(client: RedisClient) -> int:
    """How many connections Redis has accepted since it was started, this client's included."""
    statistics: bytes = client.command("INFO", "stats")
    lines = dict(line.partition(b":")[::2] for line in statistics.splitlines())
    return int(lines[b"total_connections_received"])

"""A hub for the tests: in a thread of the test's process, or in a process of its own.

A thread takes a tenth of the time to start. A process is for what a thread cannot have: a death (SIGKILL,
SIGSTOP), memory, CPU time and open files of its own, the command itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import pytest
import uvloop
from sanic import Sanic
from sanic.touchup import TouchUp

from broadcaster.core.errors import BroadcasterError
from broadcaster.core.text import escaped
from broadcaster.hub import serve
from broadcaster.hub.connections.handshake import HandshakeProtocol
from broadcaster.settings import Settings, load
from tests.support.loop import unblocked
from tests.support.ports import free_port
from tests.support.process import Running, Speaking, clean_environment
from tests.support.timing import UNIT_S, eventually

STOPPING_S = 8.0
"""Seconds, in time units, in which a hub has to end."""


MONITOR_KEY = "monitor-key_0123456789"
"""An API key that each hub of the tests has which asks for tokens: good for its counters, and nothing else."""


class Hub(Speaking):
    """A hub as a test sees it, wherever it runs.

    Attributes:
        port: Where it listens on 127.0.0.1.
        lines: What it has logged.
    """

    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def get(self, path: str, token: str = "", timeout_s: float = 3.0) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a GET; status 0 while nobody listens."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, {}

    def stats(self) -> dict[str, Any]:
        """What it says of itself alone."""
        return self.get("/stats?scope=self", MONITOR_KEY)[1]

    @property
    def ended(self) -> bool:
        raise NotImplementedError

    def until_ready(self, within: float = 20.0) -> Self:
        eventually(lambda: self.ended or self.get("/health/ready")[0] == 200, "the hub is not ready", within)
        assert not self.ended, f"the hub has ended:\n{self.output}"
        return self

    def until_connected(self, count: int) -> None:
        eventually(lambda: self.stats().get("connected") == count, f"never {count} connected: {self.stats()}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        raise NotImplementedError

    def wait(self, within: float = 10.0) -> int:
        """The exit code; fails after `within` time units."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError


def variables_of(redis_url: str, port: int, **variables: str) -> dict[str, str]:
    """The environment of a hub of the tests; `variables` come first."""
    if "BROADCASTER_AUTH__API_KEYS" in variables or "BROADCASTER_AUTH__JWT_KEYS" in variables:
        keys = json.loads(variables.get("BROADCASTER_AUTH__API_KEYS", "[]"))
        keys.append({"name": "monitor", "key": MONITOR_KEY, "monitor": True})
        variables["BROADCASTER_AUTH__API_KEYS"] = json.dumps(keys)
    defaults = {"REDIS__URL": redis_url, "HUB__PORT": str(port), "HUB__DRAIN_S": "0.1"}
    defaults["HUB__DEPLOYMENT"] = f"test-{port}"  # alone, whatever else is on its Redis
    return {f"BROADCASTER_{key}": value for key, value in defaults.items()} | variables


class HubProcess(Running, Hub):
    """A real `broadcaster hub` on a free port."""

    def __init__(self, redis_url: str, port: int | None = None, **variables: str) -> None:
        self.port = port or free_port()
        super().__init__(
            *(sys.executable, "-m", "broadcaster", "hub"), **variables_of(redis_url, self.port, **variables)
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def __enter__(self) -> Self:
        return self


class HubThread(Hub):
    """The hub of `broadcaster hub` on a free port: the same settings, `serve` and event loop, in a thread.

    It ends with the block, which fails if the hub has failed and nobody has asked for its exit code. A call that
    blocks its event loop is an error.
    """

    def __init__(self, redis_url: str, port: int | None = None, **variables: str) -> None:
        super().__init__()
        self.port = port or free_port()
        self._settings = settings_of(variables_of(redis_url, self.port, **variables))
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._interrupted = False
        self._code: int | None = None
        self._bug: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"hub-{self.port}")
        self._thread.start()
        self._begun.wait()

    def _run(self) -> None:
        with _as_if_alone(), _logged(self.lines):
            try:
                with unblocked(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    self._code = runner.run(self._serve())
            except BroadcasterError as error:
                self.lines.extend(f"error: {line}" for line in str(error).splitlines())
                self._code = error.exit_code
            except BaseException as error:
                self.lines.extend(traceback.format_exc().splitlines())
                self._code, self._bug = 1, error

    async def _serve(self) -> int:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._begun.set()
        try:
            code = await serve.serve(self._settings, self._stop)
        finally:
            for transport in _ALONE.transports_of(self._loop):
                transport.abort()  # as the end of a process ends all connections there are
            for _ in range(5):  # a TLS connection that was aborted takes some turns of the loop to be gone
                await asyncio.sleep(0)
        return 130 if self._interrupted else code

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT; for all others it would have to be a process."""
        assert number in (signal.SIGTERM, signal.SIGINT), f"{number.name} needs a HubProcess"
        self._interrupted |= number == signal.SIGINT
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self, within: float = 10.0) -> int:
        self._thread.join(within * UNIT_S)
        assert not self._thread.is_alive(), f"still running after {within} units:\n{self.output}"
        assert self._code is not None
        self._bug = None
        return self._code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.signal(signal.SIGTERM)
        self._thread.join(STOPPING_S * UNIT_S)
        assert not self._thread.is_alive(), f"the hub does not end:\n{self.output}"
        if error is None and self._bug is not None:
            raise AssertionError(f"the hub has failed:\n{self.output}") from self._bug


def settings_of(variables: dict[str, str]) -> Settings:
    """The settings of a process with this environment, in a folder without a broadcaster.toml."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_environment()):
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.chdir(tempfile.gettempdir())
        return load().settings


class _Lines(logging.Handler):
    """Keeps what one thread logs, as `configure_logging` would print it."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._lines.extend(escaped(self.format(record)).splitlines())


LEVELS = {
    "broadcaster": logging.INFO,
    "sanic": logging.WARNING,
    "websockets": logging.WARNING,
    "asyncio": logging.WARNING,
}


@contextlib.contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    """Keep what this thread logs."""
    handler = _Lines(lines)
    for name in LEVELS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LEVELS:
            logging.getLogger(name).removeHandler(handler)


def _reference(transport: asyncio.BaseTransport) -> Callable[[], Any]:
    """A weak reference, but for a transport of TLS, which has none."""
    try:
        return weakref.ref(transport)
    except TypeError:
        return lambda: transport


class _Alone:
    """What a hub does to its whole process is undone when the last hub of this process has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hubs = 0
        self._undo = contextlib.ExitStack()
        self._touch_up: Any = TouchUp.run
        self._touched = False
        self._transports: dict[asyncio.AbstractEventLoop, list[Callable[[], Any]]] = {}

    def begin(self) -> None:
        with self._lock:
            self._hubs += 1
            if self._hubs > 1:
                return
            for name, level in LEVELS.items():
                logger = logging.getLogger(name)
                self._undo.callback(logger.setLevel, logger.level)
                logger.setLevel(level)
            self._undo.callback(gc.set_threshold, *gc.get_threshold())
            self._undo.callback(
                resource.setrlimit, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)
            )
            # To freeze would be for ever: all tests so far, and never undone for one hub of several.
            quiet = serve._quiet_garbage_collector
            self._undo.callback(setattr, serve, "_quiet_garbage_collector", quiet)
            setattr(serve, "_quiet_garbage_collector", lambda: None)  # noqa: B010
            # Sanic rewrites its own classes at each start, and dies of what it has rewritten already.
            self._undo.callback(setattr, TouchUp, "run", self._touch_up)
            setattr(TouchUp, "run", self._touch_up_once)  # noqa: B010
            self._undo.callback(Sanic._app_registry.clear)  # it keeps every app there was
            # It looks at the apps of all hubs while others are added.
            self._undo.callback(setattr, Sanic, "_check_uvloop_conflict", Sanic.__dict__["_check_uvloop_conflict"])
            setattr(Sanic, "_check_uvloop_conflict", staticmethod(lambda: None))  # noqa: B010
            self._remember_transports()

    def _remember_transports(self) -> None:
        made = HandshakeProtocol.connection_made

        def remembered(protocol: HandshakeProtocol, transport: asyncio.BaseTransport) -> None:
            self._transports.setdefault(asyncio.get_running_loop(), []).append(_reference(transport))
            made(protocol, transport)

        self._undo.callback(setattr, HandshakeProtocol, "connection_made", made)
        setattr(HandshakeProtocol, "connection_made", remembered)  # noqa: B010

    def transports_of(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Transport]:
        """Connections that hubs of this process have taken in a loop."""
        return [transport for each in self._transports.pop(loop, ()) if (transport := each())]

    def _touch_up_once(self, app: Any) -> None:
        with self._lock:
            if not self._touched:
                self._touch_up(app)
            self._touched = True

    def end(self) -> None:
        with self._lock:
            self._hubs -= 1
            if not self._hubs:
                self._undo.close()


_ALONE = _Alone()


@contextlib.contextmanager
def _as_if_alone() -> Iterator[None]:
    _ALONE.begin()
    try:
        yield
    finally:
        _ALONE.end()


def assert_calm(hub: Hub, since: int = 0) -> None:
    """The hub lives, answers, and has no error in its log from this line on."""
    assert hub.get("/health/live")[0] == 200, hub.output
    said = "\n".join(hub.lines[since:])
    assert not any(word in said for word in ("Traceback", "Error", "exception")), said

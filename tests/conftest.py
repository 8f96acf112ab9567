"""Fixtures: a real Redis on a free port, a real hub on another, in a thread, a client to publish with."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broadcaster.redis import server as redis_server
from broadcaster.redis.server import RedisServer
from tests.support import Hub, HubProcess, HubThread, RedisClient, free_port, redis_client

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = (
    "auth/test_access.py::test_tokens_without_end",
    "clients/",
    "faults/",
    "fuzz/",
    "hub/test_access.py",
    "hub/test_backpressure.py",
    "hub/test_counters.py::test_they_add_up",
    "hub/test_limits.py",
    "hub/test_memory.py::test_real_servers",
    "hub/test_replay.py::test_whatever_happens",
    "hub/test_sequencer.py::test_whatever_happens",
    "hub/test_serve.py",
    "hub/test_slow.py::test_a_subscriber_finds_every_gap",
    "hub/test_slow.py::test_whatever_happens",
    "hub/test_verdicts.py",
    "loadtest/test_coming_back.py",
    "loadtest/test_fleet.py",
    "loadtest/test_ledger.py::test_a_large_run",
    "loadtest/test_page.py::test_it_can_be_read",
    "loadtest/test_page.py::test_matplotlib",
    "loadtest/test_page.py::test_what_is_drawn",
    "loadtest/test_rig.py::test_a_busy_machine",
    "loadtest/test_rig.py::test_what_is_stopped",
    "loadtest/test_run.py",
    "loadtest/test_whole_run.py",
    "publish/test_pipeline.py",
    "publish/test_publisher.py",
    "publish/test_publisher_sync.py::test_whole_programs",
    "redis/test_server.py",
    "redis/test_tls.py",
    "soak/",
    "subscribe/test_subscriber.py",
    "test_cli.py",
    "test_docs.py::test_a_block",
    "test_make.py",
    "test_extras.py",
    "test_honcho.py",
    "test_procfiles.py",
    "test_wheel.py",
)
"""Beginnings of the names of tests with processes of their own, long waits, or very many cases."""


LONG_S = 100.0
"""A test that is given more time than this takes a good part of it."""


def pytest_configure(config: pytest.Config) -> None:
    """Put the server that TEST_REDIS_SERVER names, if any, first on PATH: for tests and processes alike."""
    if binary := os.environ.get("TEST_REDIS_SERVER"):
        folder = Path(tempfile.mkdtemp(prefix="redis-of-the-tests-"))
        config.add_cleanup(lambda: shutil.rmtree(folder))
        # No link: one into a virtual environment would not be taken.
        (folder / "redis-server").write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(binary).absolute()))} "$@"\n')
        (folder / "redis-server").chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in `SLOW`, and spread what may take minutes: one process would end long after the others."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    long = [item for item in items if _timeout_s(item) > LONG_S]
    others = [item for item in items if item not in long]
    for number, item in enumerate(long):
        others.insert(number * len(items) // len(long), item)
    items[:] = others


def _timeout_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how to have this order again; `-q` keeps it to itself."""
    if (seed := getattr(config.option, "randomly_seed", None)) not in (None, "default"):
        terminalreporter.write_line(f"the order was that of --randomly-seed={seed}")


@pytest.fixture(scope="module", autouse=True)
def own_ports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every Redis has a port of the tests'; not where the finding of ports is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("redis.test_server"):
            patch.setattr(redis_server, "free_port", free_port)
        yield


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that ran in this process leaves no handler behind: it would write to what is closed by then."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own; the test may kill, freeze and restart it."""
    with RedisServer.start() as server:
        yield server


@pytest.fixture
def publish(redis: RedisServer) -> Iterator[RedisClient]:
    """A plain client of that Redis."""
    with redis_client(redis) as client:
        yield client


@pytest.fixture
def hub(redis: RedisServer) -> Iterator[Hub]:
    """A ready hub on that Redis, with default settings."""
    with HubThread(redis.url) as hub:
        yield hub.until_ready()


@pytest.fixture
def hub_process(redis: RedisServer) -> Iterator[HubProcess]:
    """The same in a process of its own, for how that ends."""
    with HubProcess(redis.url) as process:
        yield process.until_ready()


@pytest.fixture(scope="module")
def steady_redis() -> Iterator[RedisServer]:
    """A Redis for tests that leave it as it is."""
    with RedisServer.start() as server:
        yield server


@pytest.fixture(scope="module")
def steady_hub(steady_redis: RedisServer) -> Iterator[Hub]:
    """A hub for tests that leave it as it is."""
    with HubThread(steady_redis.url) as hub:
        yield hub.until_ready()


@pytest.fixture
def client(steady_redis: RedisServer) -> Iterator[RedisClient]:
    """A plain client of the steady Redis."""
    with redis_client(steady_redis) as connected:
        yield connected

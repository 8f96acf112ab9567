"""Fixtures: a real Redis on a free port, a real hub on another, a client to publish with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from broadcaster.redis import server as redis_server
from broadcaster.redis.server import RedisServer
from tests.support import HubProcess, RedisClient, redis_client


@pytest.fixture(scope="module", autouse=True)
def chosen_redis(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every Redis is the binary that TEST_REDIS_SERVER names, if it names one; not where the finding is tested."""
    binary = os.environ.get("TEST_REDIS_SERVER")
    with pytest.MonkeyPatch.context() as patch:
        if binary and not request.module.__name__.endswith("redis.test_server"):
            patch.setattr(redis_server, "find_binary", lambda: binary)
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
def hub(redis: RedisServer) -> Iterator[HubProcess]:
    """A ready hub process on that Redis, with default settings."""
    with HubProcess(redis.url) as process:
        yield process.until_ready()


@pytest.fixture(scope="module")
def steady_redis() -> Iterator[RedisServer]:
    """A Redis for tests that leave it as it is."""
    with RedisServer.start() as server:
        yield server


@pytest.fixture(scope="module")
def steady_hub(steady_redis: RedisServer) -> Iterator[HubProcess]:
    """A hub for tests that leave it as it is."""
    with HubProcess(steady_redis.url) as hub:
        yield hub.until_ready()


@pytest.fixture
def client(steady_redis: RedisServer) -> Iterator[RedisClient]:
    """A plain client of the steady Redis."""
    with redis_client(steady_redis) as connected:
        yield connected

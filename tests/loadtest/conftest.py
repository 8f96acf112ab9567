"""Fixtures of the load test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broadcaster.redis.server import RedisServer
from tests.support import HubProcess


@pytest.fixture
def hub(redis: RedisServer) -> Iterator[HubProcess]:
    """A ready hub that a test may kill, on the Redis of the test's own."""
    with HubProcess(redis.url) as process:
        yield process.until_ready()

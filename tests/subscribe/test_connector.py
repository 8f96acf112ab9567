"""The connector of a subscriber: when it makes its attempts."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from broadcaster.settings import SubscriberTable
from broadcaster.subscribe.connector import Connector
from tests.support import free_port, run_async


class Attempts:
    """A hub that is not there, and how often it was looked for."""

    def __init__(self) -> None:
        self.count = 0
        self._url = f"ws://127.0.0.1:{free_port()}/ws"

    def url(self) -> str:
        self.count += 1
        return self._url


async def poll(connector: Connector, times: int, every_s: float) -> None:
    """Wait for a connection again and again, for a short time each."""
    for _ in range(times):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await connector.connect()


@pytest.mark.parametrize("hint_s", [0.0, 0.3])
def test_a_wait_that_is_cancelled_goes_on_and_is_not_begun_anew(hint_s: float) -> None:
    """Whoever polls with short time-outs comes to an attempt as soon as whoever waits."""

    async def story() -> int:
        attempts = Attempts()
        connector = Connector(SubscriberTable(reconnect_max_s=3600.0), attempts.url, "", None)
        connector.hint(hint_s)
        connector.on_lost()
        await poll(connector, 60, 0.01)
        return attempts.count

    assert run_async(story()) >= 1


def test_the_waits_grow_with_failed_attempts_only() -> None:
    """A cancelled wait doubles nothing: after it the same wait is under way."""

    async def story() -> None:
        attempts = Attempts()
        connector = Connector(SubscriberTable(reconnect_max_s=3600.0), attempts.url, "", None)
        connector.hint(60.0)
        connector.on_lost()
        due = connector._not_before
        await poll(connector, 20, 0.005)
        assert connector._not_before == due
        assert attempts.count == 0

    run_async(story())

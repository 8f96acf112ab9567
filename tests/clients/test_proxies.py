"""Three hubs behind a real nginx and a real HAProxy: one drains, one is killed, all are restarted.

A few hundred subscribers here; `make proxies CLIENTS=5000` has more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pytest
import uvloop

from broadcaster import Event, Gap, Publisher, Subscriber
from broadcaster.redis.server import RedisServer
from broadcaster.settings import Settings
from tests.clients.proxies import PROXIES, proxy
from tests.hub.test_many_hubs import Address
from tests.support import UNIT_S, Running, eventually, finished, free_port
from tests.support.hub import settings_of, variables_of
from tests.support.ports import free_ports

CLIENTS = int(os.environ.get("PROXY_CLIENTS", "200"))
HUBS = 3
PUBLISHED_HZ = min(50.0, 10_000 / CLIENTS)
"""So many deliveries one process can take beside all that it is to notice."""
OPENED_HZ = 150
"""So many connections one process can open; of more at once all would be late."""

PATIENCE = max(20.0, CLIENTS / 50)
"""Time units until all subscribers have come, or have got what there is."""

SERVICE = """\
trap 'kill $hub; wait $hub; exit' TERM
while :; do
    "$PYTHON" -m broadcaster hub --number "$1" &
    hub=$!
    echo $hub > "$2/$1.pid.new" && mv "$2/$1.pid.new" "$2/$1.pid"
    wait $hub
done
"""
"""What systemd does with broadcaster-hub@.service: a hub that has ended is started again."""


@dataclass
class Services:
    """Three hubs, each with something that starts it again."""

    folder: Path
    port: int
    own_port: int
    variables: dict[str, str]
    running: list[Running] = field(default_factory=list)

    def pid(self, number: int) -> int:
        return int((self.folder / f"{number}.pid").read_text())

    def alone(self, number: int) -> Address:
        return Address(self.own_port + number - 1)

    def names(self) -> list[Address]:
        return [self.alone(number) for number in range(1, HUBS + 1)]

    def output(self) -> str:
        return "\n".join(running.output for running in self.running)


@pytest.fixture
def services(redis: RedisServer, tmp_path: Path) -> Iterator[Services]:
    port, own_port = free_port(), free_ports(HUBS)
    variables = variables_of(
        redis.url,
        port,
        BROADCASTER_HUB__PROCESSES=str(HUBS),
        BROADCASTER_HUB__OWN_PORT=str(own_port),
        BROADCASTER_HUB__DRAIN_S="0.5",
    )
    found = Services(tmp_path, port, own_port, variables)
    with contextlib.ExitStack() as stack:
        for number in range(1, HUBS + 1):
            command = ("/bin/sh", "-c", SERVICE, "service", str(number), str(tmp_path))
            found.running.append(stack.enter_context(Running(*command, PYTHON=sys.executable, **variables)))
        for hub in found.names():
            hub.until_ready(30)
        yield found


class Crowd:
    """Many subscribers behind a proxy and one publisher, in a thread of their own, and what each was given."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))
        self.is_quiet = False
        self.published = 0
        self.given: list[list[str]] = [[] for _ in range(CLIENTS)]
        self.connected = 0

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group, Publisher(self._settings) as publisher:
            tasks = [group.create_task(self._subscribe(*each)) for each in enumerate(self.given)]
            while not self._stop.is_set():
                if self.connected == CLIENTS and not self.is_quiet:
                    await publisher.publish("SERVER_DOWN", "server-a", data={"number": self.published})
                    self.published += 1
                await asyncio.sleep(1 / PUBLISHED_HZ)
            for task in tasks:
                task.cancel()

    async def _subscribe(self, number: int, given: list[str]) -> None:
        await asyncio.sleep(number / OPENED_HZ)
        async with Subscriber(self._url, settings=self._settings) as subscriber:
            welcome = asyncio.ensure_future(subscriber.receive())
            while not subscriber.positions:
                await asyncio.sleep(CLIENTS / 10_000)  # thousands that look more often leave no time to connect
            self.connected += 1
            while True:
                item = await welcome
                if isinstance(item, Event | Gap):  # a hub that is down for seconds is also `Stale`
                    given.append(str(item.position) if isinstance(item, Event) else repr(item))
                welcome = asyncio.ensure_future(subscriber.receive())

    def until_all_have(self, count: int) -> None:
        eventually(
            lambda: all(len(given) >= count for given in self.given),
            f"{count} of {self.published} events; the least that one has: {min(map(len, self.given))}",
            PATIENCE,
        )

    def publish_more(self, count: int = 10) -> None:
        """Until so many more events have been published."""
        then = self.published + count
        eventually(
            lambda: self.published >= then, f"{self.published} published, {self.connected} connected", PATIENCE
        )

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30 * UNIT_S)


def drain(services: Services, crowd: Crowd) -> None:
    """One hub goes (SIGTERM), and is started again."""
    pid = services.pid(2)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: services.pid(2) != pid, f"it does not come back:\n{services.output()}", 20)
    crowd.publish_more()


def kill(services: Services, crowd: Crowd) -> None:
    """One hub dies (SIGKILL) with all of its connections, and is started again."""
    pid = services.pid(3)
    os.kill(pid, signal.SIGKILL)
    crowd.publish_more()
    eventually(lambda: services.pid(3) != pid, f"it does not come back:\n{services.output()}", 20)


def restart_all(services: Services, crowd: Crowd) -> None:
    """The documented command for all of them."""
    before = [services.pid(number) for number in range(1, HUBS + 1)]
    command = ("restart", "sh", "-c", f"kill -TERM $(cat {services.folder}/{{}}.pid)")
    ended = finished(*command, within=120, **services.variables)
    assert ended.code == 0, ended
    assert ended.stdout.count("is back after") == HUBS
    assert not {services.pid(number) for number in range(1, HUBS + 1)} & set(before)
    crowd.publish_more()


def write_down(fault: str, seconds: float, published: int) -> None:
    """For docs/faults.md, if it is asked for: what a fault took, until all had all again."""
    if table := os.environ.get("FAULT_TABLE"):
        with Path(table).open("a") as file:
            row = {"fault": fault, "seconds": round(seconds, 1), "published": published, "subscribers": CLIENTS}
            file.write(json.dumps(row) + "\n")


FAULTS: dict[str, Callable[[Services, Crowd], None]] = {"drain": drain, "kill": kill, "restart": restart_all}


@pytest.mark.slow
@pytest.mark.timeout(max(240, CLIENTS / 5))
@pytest.mark.parametrize("kind", PROXIES)
def test_nothing_is_lost_behind_a_proxy(kind: str, services: Services, tmp_path: Path) -> None:
    """A drain, a kill, a restart of all hubs: all subscribers have each event once, in order, without a gap."""
    settings = settings_of(
        services.variables
        | {
            "BROADCASTER_SUBSCRIBER__RECONNECT_MAX_S": "0.5",
            "BROADCASTER_SUBSCRIBER__CONNECT_TIMEOUT_S": str(PATIENCE / 2),  # one process opens all of them
        }
    )
    with (
        proxy(kind, tmp_path / "proxy", services.own_port) as port,
        Crowd(settings, f"ws://127.0.0.1:{port}/ws") as crowd,
    ):
        eventually(lambda: crowd.connected == CLIENTS, f"{crowd.connected} connected", PATIENCE)
        shares = [hub.stats()["connected"] for hub in services.names()]
        assert min(shares) > CLIENTS / HUBS / 2, shares
        crowd.publish_more()
        for name, fault in FAULTS.items():
            for hub in services.names():
                hub.until_ready(20)
            begun, before = time.monotonic(), crowd.published
            fault(services, crowd)
            crowd.until_all_have(crowd.published - 1)
            write_down(f"{name} behind {kind}", time.monotonic() - begun, crowd.published - before)
        crowd.is_quiet = True
        time.sleep(0.5 * UNIT_S)  # what was being published is
        crowd.until_all_have(crowd.published)
    published = crowd.given[0]
    assert len(published) == len(set(published)) == crowd.published
    wrong = [number for number, given in enumerate(crowd.given) if given != published]
    assert not wrong, [crowd.given[number] for number in wrong[:3]]
    offsets = [int(position.rpartition("-")[2]) for position in published]
    assert offsets == list(range(1, crowd.published + 1))

"""Several hubs on one port: who may share it, how connections spread, how one of them leaves it."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from broadcaster.core.errors import ConfigurationError
from broadcaster.hub.deployment import listening
from broadcaster.hub.deployment.identity import Identity
from broadcaster.redis.server import RedisServer
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    eventually,
    free_port,
    upgrade_request,
)
from tests.support.hub import settings_of, variables_of
from tests.support.ports import free_ports


class Port:
    """One port and the ports after it, for the hubs of one deployment."""

    def __init__(self, redis_url: str, processes: int) -> None:
        self.port, self.own, self.processes = free_port(), free_ports(processes), processes
        self.redis_url = redis_url

    def variables(self, number: int, **others: str) -> dict[str, str]:
        shared = {
            "BROADCASTER_HUB__PROCESSES": str(self.processes),
            "BROADCASTER_HUB__NUMBER": str(number),
            "BROADCASTER_HUB__OWN_PORT": str(self.own),
        }
        return shared | others

    def thread(self, number: int, **others: str) -> HubThread:
        """A hub that listens, or has ended: one after another, as in one process they share a lock of imports."""
        hub = HubThread(self.redis_url, self.port, **self.variables(number, **others))
        eventually(lambda: hub.ended or "listening on" in hub.output, "it does not listen", 30)
        return hub

    def process(self, number: int, **others: str) -> HubProcess:
        return HubProcess(self.redis_url, self.port, **self.variables(number, **others))

    def alone(self, number: int) -> Address:
        return Address(self.own + number - 1)


class Address(Hub):
    """What a test sees of one hub at its own address."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    @property
    def ended(self) -> bool:
        return False


def until_ready(*hubs: Address) -> None:
    for hub in hubs:
        hub.until_ready(30)


@contextlib.contextmanager
def opened(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many subscribers of whatever hub the kernel gives each to."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10 * UNIT_S))
            client.sendall(upgrade_request(port))
            clients.append(client)
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 101"
        yield clients


def test_connections_spread_over_all_hubs(steady_redis: RedisServer, client: RedisClient) -> None:
    """1,000 connections to four hubs: each has its quarter, within 20 %; each answers alone; all get an event."""
    port = Port(steady_redis.url, 4)
    with contextlib.ExitStack() as stack:
        for number in range(1, 5):
            stack.enter_context(port.thread(number))
        hubs = [port.alone(number) for number in range(1, 5)]
        until_ready(*hubs)
        names = [hub.stats()["name"] for hub in hubs]
        assert names == [f"{socket.gethostname()}:{port.port}#{number}" for number in range(1, 5)]
        with opened(port.port, 1000):
            shares = [hub.stats()["connected"] for hub in hubs]
            assert sum(shares) == 1000
            assert all(200 <= share <= 300 for share in shares), shares
            client.publish(event_payload(1))
            eventually(lambda: sum(hub.stats()["deliveries"] for hub in hubs) == 1000, "not delivered to all")


class Arrivals:
    """Clients that come, one after another, from a thread of their own; what became of each is counted."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self.ends: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        request = upgrade_request(self._port)
        while not self._stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), 5 * UNIT_S) as client:
                    client.sendall(request)
                    self.ends[client.recv(12).decode()] += 1
            except OSError as error:
                self.ends[type(error).__name__] += 1

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_hub_that_goes_leaves_the_port_first(steady_redis: RedisServer) -> None:
    """Who comes while it drains comes to the other one: none is reset or refused; alone it says that it stops."""
    port = Port(steady_redis.url, 2)
    with port.thread(1, BROADCASTER_HUB__DRAIN_S="2") as going, port.thread(2) as staying:
        first, second = port.alone(1), port.alone(2)
        until_ready(first, second)
        with (
            RawClient(first.port, subprotocol="broadcaster.v1") as client,
            RawClient(first.port),
            Arrivals(port.port) as arrivals,
        ):
            assert client.event()["control"] == "welcome"
            eventually(lambda: arrivals.ends["HTTP/1.1 101"] > 50, "nobody comes")
            going.signal(signal.SIGTERM)
            assert client.event()["control"] == "drain"
            status, health = first.get("/health/ready")
            assert (status, health["stopping"]) == (503, True)
            before = second.stats()["opened"]
            came = arrivals.ends.total()
            eventually(lambda: arrivals.ends.total() > came + 50, "nobody comes any more")
            assert second.stats()["opened"] - before > 40
            assert client.close_code() == 1012
            client.send(8, b"\x03\xf4")
            assert going.wait() == 0
        assert set(arrivals.ends) == {"HTTP/1.1 101"}, arrivals.ends
        going.said("left the shared port")
        assert_calm(staying)


def test_what_waits_in_the_queue_is_answered(steady_redis: RedisServer) -> None:
    """A hub that is stopped for a moment has a full queue when it is told to go: all are let in, none is reset."""
    port = Port(steady_redis.url, 2)
    with port.process(1) as hub:
        until_ready(port.alone(1))
        hub.signal(signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port.port))) for _ in range(200)]
            for client in clients:
                client.settimeout(10 * UNIT_S)
                client.sendall(upgrade_request(port.port))
            hub.signal(signal.SIGTERM)
            hub.signal(signal.SIGCONT)
            assert [client.recv(12) for client in clients] == [b"HTTP/1.1 101"] * 200
        assert hub.wait() == 0


DIFFERENT = {
    "redis": ("redis.url", {"BROADCASTER_REDIS__URL": "redis://127.0.0.1:1/0"}),
    "database": ("the database in redis.url", {}),
    "channel": ("event.channel", {"BROADCASTER_EVENT__CHANNEL": "events.other"}),
    "allowed": ("channels.allow", {"BROADCASTER_CHANNELS__ALLOW": '["events.*", "more"]'}),
    "name": ("hub.deployment", {"BROADCASTER_HUB__DEPLOYMENT": "other"}),
    "largest event": ("event.max_bytes", {"BROADCASTER_EVENT__MAX_BYTES": "1000"}),
}


def test_a_hub_of_another_deployment_is_no_guest(steady_redis: RedisServer) -> None:
    """Another Redis, database or settings: exit 78, with the process that is there and the key that differs."""
    port = Port(steady_redis.url, 3)
    database = {"BROADCASTER_REDIS__URL": steady_redis.url.removesuffix("/0") + "/1"}
    with port.process(1) as hub:
        until_ready(port.alone(1))
        for key, variables in DIFFERENT.values():
            with port.thread(2, **(variables or database)) as other:
                assert other.wait() == 78
                said = f"port {port.port} is another deployment's: the hub with pid {hub.process.pid} has another"
                assert other.lines == [f"error: {said} {key}"]
        with port.thread(3):  # one of the same is let in
            until_ready(port.alone(3))


def test_who_does_not_share_is_not_joined(steady_redis: RedisServer) -> None:
    """A hub alone on the port (as an older one) keeps it, and gets no guests: exit 69 in one line, both ways."""
    port = Port(steady_redis.url, 2)
    with HubThread(steady_redis.url, port.port) as alone:
        alone.until_ready()
        with port.thread(1) as other:
            assert other.wait() == 69
            [line] = other.lines
            assert f"127.0.0.1:{port.port}: address already in use (by a process that does not share it" in line
    with port.thread(1) as sharing:
        until_ready(port.alone(1))
        with HubThread(steady_redis.url, port.port) as other:
            assert other.wait() == 69
        with port.process(1) as twin:
            assert twin.wait() == 69
            assert f"127.0.0.1:{port.own}: address already in use" in twin.output
        assert_calm(sharing)


def test_a_system_that_cannot_share_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS the last one to bind a port would get all connections."""
    who = Identity.of(settings_of(variables_of("redis://127.0.0.1:1/0", 8765, BROADCASTER_HUB__PROCESSES="2")))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigurationError, match=r"cannot share a port .* give each hub a port of its own"):
        listening.claim("127.0.0.1", who)


@pytest.mark.parametrize(
    ("number", "honcho", "processes", "expected"),
    [("0", "", "1", 1), ("0", "hub.3", "4", 3), ("2", "hub.3", "4", 2), ("0", "publisher.2", "4", 1)],
)
def test_the_number_of_a_hub(
    number: str, honcho: str, processes: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hub.number`, else what honcho says, else 1; its own port follows from it."""
    variables = variables_of(
        "redis://127.0.0.1:1/0", 8765, BROADCASTER_HUB__NUMBER=number, BROADCASTER_HUB__PROCESSES=processes
    )
    settings = settings_of(variables)
    monkeypatch.setenv("HONCHO_PROCESS_NAME", honcho)
    who = Identity.of(settings)
    assert who.number == expected
    own_port = 9764 + expected if processes != "1" else 8765
    assert who.address == f"http://127.0.0.1:{own_port}"

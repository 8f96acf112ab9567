"""A hub behind a real nginx: the location of docs/security.md as it stands, kept-alive connections, and TLS."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from broadcaster.redis.server import RedisServer
from tests.clients.conftest import Kit
from tests.clients.nginx import certificate, nginx
from tests.clients.programs import Script, until_opened
from tests.clients.publishing import as_published, assert_got, events_of, on_the_wire, publish
from tests.support import UNIT_S, Hub, HubThread, RawClient, assert_calm, eventually

ROUNDS = 100


@pytest.fixture(scope="module")
def busy_hub(steady_redis: RedisServer) -> Iterator[Hub]:
    """A hub that answers as many requests as come."""
    with HubThread(steady_redis.url, BROADCASTER_HUB__REQUESTS_PER_S="100000") as hub:
        yield hub.until_ready()


class Askers:
    """SubscribeRequest for /health and /stats all the time, over kept connections, from threads of their own."""

    def __init__(self, port: int, count: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self.statuses: Counter[object] = Counter()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10 * UNIT_S)
        for path in itertools.cycle(("/health", "/stats", "/health/live")):
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                self.statuses[response.status] += 1
            except OSError as error:
                self.statuses[type(error).__name__] += 1
                connection.close()
            if self._stop.wait(0.002):
                break
        connection.close()

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_the_location_works_word_for_word(
    kit: Kit, busy_hub: Hub, steady_redis: RedisServer, tmp_path: Path
) -> None:
    """Only the port differs from what docs/security.md shows: a node script and a browser get their events."""
    with (
        nginx(tmp_path, busy_hub.port, upstream=f"http://127.0.0.1:{busy_hub.port}") as port,
        kit.subscribe("ws", port) as script,
        kit.subscribe("chromium", port, ("broadcaster.v1",)) as page,
    ):
        until_opened(script, page)
        published = publish(steady_redis.url, *({"number": number} for number in range(20)))
        assert_got(script, published)
        assert_got(page, published)


def test_an_upgrade_never_lands_on_a_used_connection(
    busy_hub: Hub, steady_redis: RedisServer, tmp_path: Path
) -> None:
    """Between requests for which nginx would keep connections, 100 upgrades: no 404, no lost event."""
    with (
        nginx(tmp_path, busy_hub.port) as port,
        Askers(port, 4) as askers,
        RawClient(port) as stayer,
    ):
        published = []
        quiet = http.client.HTTPConnection("127.0.0.1", port, timeout=10 * UNIT_S)
        for number in range(ROUNDS):
            quiet.request("GET", ("/health", "/stats")[number % 2])
            response = quiet.getresponse()
            response.read()
            assert response.status == 200
            with RawClient(port) as client:
                assert client.response.startswith(b"HTTP/1.1 101 "), (number, client.response)
                published += publish(steady_redis.url, {"number": number})
                assert as_published(client.event()) == on_the_wire(published[-1])
                client.send(8, b"\x03\xe8")
                assert client.close_code() == 1000
        quiet.close()
        assert [as_published(stayer.event()) for _ in published] == [on_the_wire(event) for event in published]
    assert set(askers.statuses) == {200}, askers.statuses
    assert askers.statuses[200] > ROUNDS
    log = (tmp_path / "access.log").read_text().splitlines()
    upgrades = [line.split()[2:4] for line in log if line.startswith("GET /ws ")]
    assert upgrades == [["101", "101"]] * (ROUNDS + 1), "nginx has tried more than once"
    busy_hub.until_connected(0)
    assert_calm(busy_hub)


def test_nginx_ends_tls_for_the_hub(kit: Kit, busy_hub: Hub, steady_redis: RedisServer, tmp_path: Path) -> None:
    """wss:// outside and ws:// inside: the client trusts the certificate; a page of https:// is the hub's own."""
    cert, _ = certificate(tmp_path)
    with nginx(tmp_path, busy_hub.port, tls=True) as port:
        url = f"wss://127.0.0.1:{port}/ws"
        tab = kit.browser.open(f"https://127.0.0.1:{port}/health/live")
        with (
            Script(kit.packages, url, protocols=("broadcaster.v1",), NODE_EXTRA_CA_CERTS=str(cert)) as script,
            tab.subscribe(url) as page,
        ):
            until_opened(script, page)
            published = publish(steady_redis.url, *({"number": number} for number in range(20)))
            assert_got(script, published)
            assert_got(page, published)
        with Script(kit.packages, url) as distrustful:
            assert "self-signed" in eventually(distrustful.refused, "it trusts anybody")
            assert events_of(distrustful) == []

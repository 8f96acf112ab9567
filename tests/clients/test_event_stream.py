"""Server-Sent Events with other people's clients: curl and a browser's EventSource, also through a real nginx."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.redis.server import RedisServer
from tests.clients.browser import Tab
from tests.clients.conftest import Kit, Open
from tests.clients.haproxy import haproxy
from tests.clients.programs import program
from tests.clients.publishing import WRITING, as_published, of_size, on_the_wire, publish
from tests.support import Hub, HubThread, Proxy, Running, StreamClient, eventually

STREAM_JS = Path(__file__).with_name("stream.js")


@pytest.fixture(scope="module")
def port(way_to: Open, steady_hub: Hub) -> Iterator[int]:
    """Where the clients connect to reach the steady hub."""
    with way_to(steady_hub.port) as port:
        yield port


def until_streams(hub: Hub, count: int) -> None:
    """Wait until so many listen."""
    eventually(lambda: hub.stats()["formats"]["sse"] == count, f"never {count} streams")


class Page:
    """An EventSource in a tab."""

    def __init__(self, tab: Tab, url: str) -> None:
        self._tab = tab
        self._told: list[dict[str, Any]] = []
        tab.evaluate(
            f"{STREAM_JS.read_text()}; window.told = []; window.source = new EventSource({json.dumps(url)});"
            "listenToStream(window.source, (happening) => window.told.push(happening)); 0"
        )

    def told(self) -> list[dict[str, Any]]:
        self._told += json.loads(self._tab.evaluate(f"JSON.stringify(window.told.slice({len(self._told)}))"))
        return self._told

    @property
    def state(self) -> int:
        state: int = self._tab.evaluate("window.source.readyState")
        return state

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(happening["text"]) for happening in self.told() if "text" in happening]

    def kinds(self) -> list[str]:
        return [happening["kind"] for happening in self.told() if "kind" in happening]


def test_curl_shows_events_as_they_come(port: int, steady_hub: Hub, steady_redis: RedisServer) -> None:
    """`curl -N`, and nothing else."""
    until_streams(steady_hub, 0)
    with Running(program("curl"), "-sN", "--noproxy", "*", f"http://127.0.0.1:{port}/sse") as curl:
        until_streams(steady_hub, 1)
        for data in ({"number": 1}, {"text": WRITING}, of_size(60_000)):
            [event] = publish(steady_redis.url, data)

            def came(said: str = event.event_id) -> bool:
                return any(said in line for line in list(curl.lines))

            eventually(came, "it does not come at once")
            [line] = [line for line in curl.lines if event.event_id in line]
            assert as_published(json.loads(line.removeprefix("data: "))) == on_the_wire(event)
            assert f"id: {event.position}" in curl.lines
    until_streams(steady_hub, 0)


def test_a_page_gets_every_event_once_in_order_and_intact(
    kit: Kit, port: int, steady_hub: Hub, steady_redis: RedisServer
) -> None:
    """Small ones, one of all kinds of writing, and the largest there may be."""
    tab = kit.browser.open(f"http://127.0.0.1:{port}/health/live")
    try:
        page = Page(tab, f"http://127.0.0.1:{port}/sse?severity=critical")
        eventually(lambda: "welcome" in page.kinds(), "it is not connected")
        small = [{"number": number} for number in range(10)]
        published = publish(steady_redis.url, *small, {"text": WRITING}, of_size(65_536), {"last": True})
        eventually(lambda: len(page.events()) >= len(published), "they do not come")
        assert [as_published(event) for event in page.events()] == [on_the_wire(event) for event in published]
    finally:
        tab.close()


def test_through_haproxy_an_event_comes_at_once(
    steady_hub: Hub, steady_redis: RedisServer, tmp_path: Path
) -> None:
    """It waits for no more than there is."""
    with haproxy(tmp_path, steady_hub.port) as port, StreamClient(port) as client:
        client.until("welcome")
        for number in range(3):
            [event] = publish(steady_redis.url, {"number": number})
            *_, sent = client.until("message", number + 1)
            assert (as_published(sent.fields), sent.last_id) == (on_the_wire(event), str(event.position))


def test_a_page_comes_back_by_itself_and_has_missed_nothing(kit: Kit, redis: RedisServer) -> None:
    """A hub drains and another one begins; what was published meanwhile comes, once and in order."""
    with contextlib.ExitStack() as stack:
        with HubThread(redis.url) as hub:
            port = hub.until_ready().port
            tab = kit.browser.open(f"http://127.0.0.1:{port}/health/live")
            stack.callback(tab.close)
            page = Page(tab, f"http://127.0.0.1:{port}/sse")
            eventually(lambda: "welcome" in page.kinds(), "it is not connected")
            published = publish(redis.url, {"number": 1}, {"number": 2})
            eventually(lambda: len(page.events()) == 2, "they do not come")
            hub.signal(signal.SIGTERM)
            assert hub.wait() == 0
            eventually(lambda: page.kinds()[-1] == "close", "it is not told")
        published += publish(redis.url, {"number": 3}, {"number": 4})
        with HubThread(redis.url, port) as hub:
            hub.until_ready()
            published += publish(redis.url, {"number": 5})
            eventually(lambda: len(page.events()) >= 5, "they do not come", 20)
            assert [as_published(event) for event in page.events()] == [on_the_wire(event) for event in published]


def test_a_page_that_must_not_come_back_does_not(kit: Kit, steady_hub: Hub) -> None:
    """It was closed for good, as something was said on its connection: the answer to its return ends it (204)."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(steady_hub.port))
        tab = kit.browser.open(f"http://127.0.0.1:{proxy.port}/health/live")
        stack.callback(tab.close)
        page = Page(tab, f"http://127.0.0.1:{proxy.port}/sse")
        eventually(lambda: "welcome" in page.kinds(), "it is not connected")
        eventually(lambda: len(proxy.links) == 1, "other connections of the page are open")
        proxy.inject("spoken")
        eventually(lambda: page.kinds()[-1] == "close", "it is not told")
        eventually(lambda: page.state == 2, "it goes on trying")
        told = [happening for happening in page.told() if happening.get("kind") == "close"]
        assert [json.loads(happening["data"])["code"] for happening in told] == [1008]
        until_streams(steady_hub, 0)

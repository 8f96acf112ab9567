"""The JavaScript client, in node and in a real Chromium: nothing is lost, nothing comes twice, gaps are told."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest

from broadcaster import Position, PublisherSync
from broadcaster.redis.server import RedisServer
from tests.clients.browser import Tab
from tests.clients.conftest import Kit
from tests.clients.programs import HERE, NO_PROXY, node_packages, program
from tests.clients.publishing import publish
from tests.faults.ledger import settings_for
from tests.support import (
    ROOT,
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    Proxy,
    Running,
    clean_environment,
    eventually,
    redis_client,
)

CLIENT = ROOT / "broadcaster/hub/web/client/client.js"
CONSUME = HERE / "consume.mjs"
KINDS = ("node", "chromium")
BEAT = {"BROADCASTER_HUB__BEAT_INTERVAL_S": "0.2"}


def ran(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program that was run to its end, whatever that was."""
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=50 * UNIT_S, check=False
    )


def test_the_parts_that_need_no_hub() -> None:
    """`node --test`."""
    done = ran(program("node"), "--test", str(HERE / "client.test.mjs"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout


TYPES = CLIENT.with_suffix(".d.ts")


def test_its_types_are_what_a_strict_compiler_takes(tmp_path: Path) -> None:
    """A program that uses all of it compiles, and what is wrong in it does not: types.mts."""
    for path in (CLIENT, TYPES, CLIENT.with_name("package.json"), HERE / "types.mts"):
        shutil.copy(path, tmp_path)
    flags = ("--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom")
    done = ran(node_packages() / ".bin/tsc", *flags, "types.mts", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_its_types_promise_is_there() -> None:
    """Each class and function, and each member of a subscriber."""
    text = TYPES.read_text()
    exported = re.findall(r"^export (?:class|function|const) (\w+)", text, re.MULTILINE)
    of_subscriber = text.partition("export class Subscriber")[2]
    members = re.findall(r"^  (?:readonly )?(\w+)[<(:]", of_subscriber, re.MULTILINE)
    assert {"Subscriber", "HubRefused"} <= set(exported)
    assert {"constructor", "positions", "items", "close"} <= set(members)
    script = (
        f"const client = await import({json.dumps(CLIENT.as_uri())}); const subscriber = new client.Subscriber();"
        f"console.log(JSON.stringify([{json.dumps(exported)}.filter((name) => !(name in client)),"
        f"{json.dumps(members)}.filter((name) => !(name in subscriber))]))"
    )
    done = ran(program("node"), "--input-type=module", "-e", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == [[], []]


class Consumer(Protocol):
    """The client, at work."""

    def said(self) -> list[dict[str, Any]]:
        """What it has given out, and how its connection is."""


class InNode:
    """consume.mjs in node."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def said(self) -> list[dict[str, Any]]:
        lines = list(self._running.lines)
        assert all(line.startswith("{") for line in lines), "\n".join(lines)
        return [json.loads(line) for line in lines]


class InPage:
    """consume.mjs in a page of the hub's, with the client that the hub serves."""

    def __init__(self, tab: Tab) -> None:
        self._tab = tab
        self._said: list[dict[str, Any]] = []

    def said(self) -> list[dict[str, Any]]:
        self._said += json.loads(self._tab.evaluate(f"JSON.stringify(window.said.slice({len(self._said)}))"))
        return self._said


@contextlib.contextmanager
def in_node(kit: Kit, options: dict[str, Any], *, web_sockets: bool = True) -> Iterator[Consumer]:
    if web_sockets:
        options = {"packages": str(kit.packages), **options}
    command = (program("node"), str(CONSUME), CLIENT.as_uri(), json.dumps(options))
    with Running(*command, **NO_PROXY) as running:
        yield InNode(running)


@contextlib.contextmanager
def in_page(kit: Kit, origin: str, options: dict[str, Any]) -> Iterator[Consumer]:
    tab = kit.browser.open(f"{origin}/health/live")
    try:
        script = CONSUME.read_text().partition("\n// In node:")[0].replace("export ", "")
        tab.evaluate(
            f"{script}; window.said = []; window.consume = consume;"
            "import('/client.js').then(({ Subscriber }) =>"
            f" window.consume(Subscriber, {json.dumps(options)}, (said) => window.said.push(said))); 0"
        )
        yield InPage(tab)
    finally:
        tab.close()


def consuming(kit: Kit, kind: str, port: int, **options: Any) -> AbstractContextManager[Consumer]:
    """The client at work on what listens at a port."""
    options = {"url": f"ws://127.0.0.1:{port}/ws", "reconnectMaxS": 0.5, **options}
    return in_node(kit, options) if kind == "node" else in_page(kit, f"http://127.0.0.1:{port}", options)


class Books:
    """Publishes all the time; then everything has been delivered once, in order, or was told to be missing."""

    def __init__(self, redis_url: str) -> None:
        self._settings = settings_for(redis_url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.published: dict[str, Position] = {}

    def _run(self) -> None:
        with PublisherSync(self._settings) as publisher:
            while not self._stop.wait(0.01):
                published = publisher.publish("SERVER_DOWN", "server-a", data={"rack": len(self.published)})
                assert published.position is not None
                self.published[published.event.event_id] = published.position

    def __enter__(self) -> Books:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def close(self, consumer: Consumer) -> list[dict[str, Any]]:
        """Stop publishing, wait for the last event, and compare; returns the gaps."""
        self._stop.set()
        self._thread.join()
        last = list(self.published)[-1]
        eventually(
            lambda: any(said.get("event") == last for said in consumer.said()),
            "the last event does not come",
            20,
        )
        got = [said for said in consumer.said() if "event" in said]
        places = [(said["epoch"], said["offset"]) for said in got]
        assert places == sorted(set(places)), "twice, or out of order"
        gaps = [said for said in consumer.said() if said.get("kind") == "gap"]
        assert not [gap for gap in gaps if gap["cause"] == "unexplained"], gaps
        begin = places[0]
        missing = {
            position
            for event_id, position in self.published.items()
            if position >= begin and event_id not in {said["event"] for said in got}
        }
        untold = [position for position in missing if not any(_is_told(position, gap) for gap in gaps)]
        assert not untold, f"{len(untold)} of {len(self.published)} are lost in silence: {untold[:5]}; {gaps}"
        return gaps

    def until(self, consumer: Consumer, more: int = 20) -> None:
        """Wait until the consumer has had so many more events."""
        before = _count(consumer)
        eventually(lambda: _count(consumer) >= before + more, "no events", 20)


def _count(consumer: Consumer) -> int:
    return sum("event" in said for said in consumer.said())


def _is_told(position: Position, gap: dict[str, Any]) -> bool:
    if gap["epoch"] != position.epoch or gap["first"] is None:
        return False
    return bool(gap["first"] <= position.offset and (gap["last"] is None or position.offset <= gap["last"]))


def states(consumer: Consumer) -> list[str]:
    return [said["state"] for said in consumer.said() if "state" in said]


def has(consumer: Consumer, kind: str) -> bool:
    return any(said.get("kind") == kind for said in consumer.said())


@pytest.mark.parametrize("kind", KINDS)
def test_cut_again_and_again(kit: Kit, kind: str, steady_redis: RedisServer, steady_hub: Hub) -> None:
    """Connections that are reset while events come: each is resumed, and there is no gap."""
    with (
        Proxy(steady_hub.port) as proxy,
        Books(steady_redis.url) as books,
        consuming(kit, kind, proxy.port) as consumer,
    ):
        books.until(consumer)
        for _ in range(3):
            proxy.cut()
            books.until(consumer)
        assert books.close(consumer) == []
        assert states(consumer).count("open") >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_is_killed(kit: Kit, kind: str, redis: RedisServer) -> None:
    """SIGKILL, and another hub at the same port a while later: nothing is lost."""
    with Books(redis.url) as books, Proxy(0) as proxy, contextlib.ExitStack() as stack:
        with HubProcess(redis.url) as hub:
            proxy.target_port = hub.until_ready().port
            consumer = stack.enter_context(consuming(kit, kind, proxy.port))
            books.until(consumer)
            hub.signal(signal.SIGKILL)
        eventually(lambda: "waiting" in states(consumer), "it does not notice")
        with HubThread(redis.url) as hub:
            proxy.target_port = hub.until_ready().port
            books.until(consumer)
            assert books.close(consumer) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_drains(kit: Kit, kind: str, redis: RedisServer) -> None:
    """SIGTERM beside a second hub: the client waits as it is asked to, and goes on there; nothing is lost."""
    with (
        Books(redis.url) as books,
        HubThread(redis.url) as other,
        HubThread(redis.url) as hub,
        Proxy(hub.until_ready().port) as proxy,
        consuming(kit, kind, proxy.port) as consumer,
    ):
        other.until_ready()
        books.until(consumer)
        proxy.target_port = other.port
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        books.until(consumer)
        assert books.close(consumer) == []
        reasons = [said.get("reason") for said in consumer.said() if said.get("state") == "waiting"]
        assert "the hub is restarting" in reasons


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_swallows_everything(kit: Kit, kind: str, steady_redis: RedisServer) -> None:
    """Half-open: it says that it is blind, opens another connection, sees again, and has lost nothing."""
    with (
        HubThread(steady_redis.url, None, **BEAT) as hub,
        Proxy(hub.until_ready().port) as proxy,
        Books(steady_redis.url) as books,
        consuming(kit, kind, proxy.port) as consumer,
    ):
        books.until(consumer)
        proxy.swallow()
        eventually(lambda: has(consumer, "fresh"), "it stays blind", 20)
        assert has(consumer, "stale")
        books.until(consumer)
        assert books.close(consumer) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_is_frozen(kit: Kit, kind: str, redis: RedisServer) -> None:
    """SIGSTOP: the client is blind, and when the hub goes on it has everything."""
    with (
        HubProcess(redis.url, None, **BEAT) as hub,
        Books(redis.url) as books,
        consuming(kit, kind, hub.until_ready().port) as consumer,
    ):
        books.until(consumer)
        hub.signal(signal.SIGSTOP)
        eventually(lambda: has(consumer, "stale"), "it does not notice", 20)
        hub.signal(signal.SIGCONT)
        eventually(lambda: has(consumer, "fresh"), "it stays blind", 20)
        books.until(consumer)
        assert books.close(consumer) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_expired_is_told(kit: Kit, kind: str, redis: RedisServer) -> None:
    """Away for longer than events are kept: the gap has exactly what is missing."""
    with (
        HubThread(redis.url, None, BROADCASTER_HUB__RING_BYTES="262144") as hub,
        Proxy(hub.until_ready().port) as proxy,
        Books(redis.url) as books,
        consuming(kit, kind, proxy.port) as consumer,
    ):
        books.until(consumer)
        position = next(said for said in reversed(consumer.said()) if "event" in said)
        proxy.refuses = True
        proxy.cut()
        publish(redis.url, *[{"text": "x" * 2_000}] * 200)
        with redis_client(redis) as client:
            client.command("XTRIM", "{events.critical}:log", "MAXLEN", "5")
        proxy.refuses = False
        books.until(consumer)
        gaps = books.close(consumer)
        assert gaps, "it was to miss some"
        assert position["offset"] < gaps[0]["first"] <= gaps[0]["last"]


def test_a_page_keeps_its_position(kit: Kit, steady_redis: RedisServer, steady_hub: Hub) -> None:
    """In localStorage: another page goes on where the one before was closed."""
    options = {"storage": "localStorage", "storageKey": "wall"}
    with Books(steady_redis.url) as books, consuming(kit, "chromium", steady_hub.port, **options) as consumer:
        books.until(consumer)
        books.close(consumer)
        time.sleep(0.5)  # until it is written, which is not done for each event
        before = list(books.published)
    with Books(steady_redis.url) as books:
        eventually(lambda: len(books.published) > 20, "nothing is published")
        with consuming(kit, "chromium", steady_hub.port, **options) as consumer:
            assert books.close(consumer) == []
            got = [said["event"] for said in consumer.said() if "event" in said]
    assert got == list(books.published)
    assert not set(got) & set(before)


def test_events_come_over_a_stream_where_there_is_no_websocket(
    kit: Kit, steady_redis: RedisServer, steady_hub: Hub
) -> None:
    """SSE over fetch, cut again and again: nothing is lost, and there is no gap."""
    if steady_hub.get("/sse?nonsense=")[0] == 404:
        pytest.skip("this hub has no /sse")
    with (
        Proxy(steady_hub.port) as proxy,
        Books(steady_redis.url) as books,
        in_node(kit, {"url": f"ws://127.0.0.1:{proxy.port}/ws"}, web_sockets=False) as consumer,
    ):
        books.until(consumer)
        for _ in range(3):
            proxy.cut()
            books.until(consumer)
        assert books.close(consumer) == []
        assert {said["transport"] for said in consumer.said() if said.get("state") == "open"} == {"sse"}


def test_what_is_packed_for_npm(tmp_path: Path) -> None:
    """`npm pack` takes the client with its types, and nothing else."""
    done = ran(program("npm"), "pack", "--dry-run", "--json", str(CLIENT.parent), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [packed] = json.loads(done.stdout)
    assert {file["path"] for file in packed["files"]} == {"client.js", "client.d.ts", "package.json"}

"""Other people's clients, as they are: straight at the hub, and again through a real nginx."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broadcaster.auth.tokens import create_token
from broadcaster.redis.server import RedisServer
from broadcaster.settings import AuthTable, JwtKey
from tests.clients.conftest import Kit, Open
from tests.clients.programs import (
    Client,
    Terminal,
    curl,
    missing,
    node_has_websocket,
    program,
    python_client,
    until_opened,
)
from tests.clients.publishing import WRITING, assert_got, of_size, publish
from tests.support import Hub, HubThread, assert_calm, eventually, free_port

KINDS = ("python -m websockets", "wscat", "ws", "node", "chromium")
V1 = "broadcaster.v1"
PLAIN = "broadcaster.plain"

API_KEY = "wall-0123456789_~+/abcd="
SECRET = "a secret of thirty-two characters"
AUTH: dict[str, Any] = {
    "BROADCASTER_AUTH__MODE": "token",
    "BROADCASTER_AUTH__API_KEYS": json.dumps([{"name": "wall", "key": API_KEY, "subscribe": ["events.*"]}]),
    "BROADCASTER_AUTH__JWT_KEYS": json.dumps([{"algorithm": "HS256", "key": SECRET}]),
}


@pytest.fixture(scope="module")
def port(way_to: Open, steady_hub: Hub) -> Iterator[int]:
    """Where the clients connect to reach the steady hub."""
    with way_to(steady_hub.port) as port:
        yield port


@contextlib.contextmanager
def everybody(kit: Kit, port: int) -> Iterator[dict[str, Client]]:
    """One plain client of each kind that can be run here, all connected."""
    kinds = [kind for kind in KINDS if kind != "node" or node_has_websocket()]
    with contextlib.ExitStack() as stack:
        clients = {kind: stack.enter_context(kit.subscribe(kind, port)) for kind in kinds}
        until_opened(*clients.values())
        yield clients


# Events

SPEAKING = {kind: (kind, ()) for kind in KINDS} | {
    f"{kind}, {name}": (kind, (name,)) for kind in KINDS[1:] for name in (V1, PLAIN)
}


@pytest.mark.parametrize(("kind", "protocols"), SPEAKING.values(), ids=SPEAKING.keys())
def test_every_event_comes_once_in_order_and_intact(
    kit: Kit, port: int, steady_hub: Hub, steady_redis: RedisServer, kind: str, protocols: tuple[str, ...]
) -> None:
    """Several events, one of all kinds of writing, one of 60,000 bytes, the largest there may be, and another."""
    before = steady_hub.stats()["connected"]
    with kit.subscribe(kind, port, protocols) as client:
        until_opened(client)
        steady_hub.until_connected(before + 1)
        if not isinstance(client, Terminal):
            assert client.opened() == "".join(protocols)
        small = [{"number": number} for number in range(10)]
        published = publish(
            steady_redis.url, *small, {"text": WRITING}, of_size(60_000), of_size(65_536), {"last": True}
        )
        assert [len(event.payload) for event in published[11:13]] == [60_000, 65_536]
        assert_got(client, published)
        controls = [json.loads(text)["control"] for text in client.texts() if '"control"' in text[:20]]
        assert controls[:1] == (["welcome"] if V1 in protocols else [])
        assert client.closed() is None
    steady_hub.until_connected(before)
    assert_calm(steady_hub)


# A life


def test_pings_are_answered_and_the_close_at_a_restart_is_understood(
    kit: Kit, way_to: Open, redis: RedisServer
) -> None:
    """After several rounds of pings all are the ones that came; on SIGTERM each one sees 1012."""
    with (
        HubThread(redis.url, BROADCASTER_HUB__PING_INTERVAL_S="1") as hub,
        way_to(hub.until_ready().port) as port,
        everybody(kit, port) as clients,
    ):
        hub.until_connected(len(clients))
        since = hub.stats()["uptime_s"]
        eventually(lambda: hub.stats()["uptime_s"] > since + 4.5, "time does not pass")
        stats = hub.stats()
        counts = {key: stats[key] for key in ("connected", "peak", "ping_timeouts", "aborted")}
        assert counts == {"connected": len(clients), "peak": len(clients), "ping_timeouts": 0, "aborted": 0}
        published = publish(redis.url, *({"number": number} for number in range(5)))
        for client in clients.values():
            assert_got(client, published)
        hub.signal(signal.SIGTERM)
        for kind, client in clients.items():
            code = eventually(client.closed, f"{kind} does not see the close")
            assert code == 1012, kind
        assert hub.wait() == 0


# Tokens


def in_subprotocol(token: str) -> str:
    return "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


class Shown(NamedTuple):
    """How a token is shown: in a header, or among the subprotocols."""

    kind: str
    beside: str | None

    def __str__(self) -> str:
        return f"{self.kind}, {'header' if self.beside is None else f'beside {self.beside}'}"

    def subscribe(self, kit: Kit, port: int, token: str) -> contextlib.AbstractContextManager[Client]:
        if self.beside is None:
            return kit.subscribe(self.kind, port, headers={"Authorization": f"Bearer {token}"})
        return kit.subscribe(self.kind, port, (in_subprotocol(token), self.beside))


SHOWN = [Shown("wscat", None), Shown("ws", None)]
SHOWN += [Shown(kind, beside) for kind in KINDS[1:] for beside in (V1, PLAIN)]


def token_of(secret: str) -> str:
    table = AuthTable(mode="token", jwt_keys=(JwtKey.model_validate({"algorithm": "HS256", "key": secret}),))
    return create_token(table, "wall", subscribe=["events.*"], publish=["events.*"], lasts_s=3600)


@pytest.fixture(scope="module")
def guarded_hub(steady_redis: RedisServer) -> Iterator[Hub]:
    """A hub that asks for a token."""
    with HubThread(steady_redis.url, **AUTH) as hub:
        yield hub.until_ready()


@pytest.fixture(scope="module")
def guarded_port(way_to: Open, guarded_hub: Hub) -> Iterator[int]:
    """Where the clients connect to reach it."""
    with way_to(guarded_hub.port) as port:
        yield port


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_who_shows_a_token_gets_events(
    kit: Kit, guarded_port: int, guarded_hub: Hub, steady_redis: RedisServer, shown: Shown
) -> None:
    """An API key and a JWT both let in; the token is not echoed as the subprotocol."""
    for token in (API_KEY, token_of(SECRET)):
        with shown.subscribe(kit, guarded_port, token) as client:
            until_opened(client)
            if not isinstance(client, Terminal):
                assert client.opened() == (shown.beside or "")
            assert_got(client, publish(steady_redis.url, *({"number": number} for number in range(5))))
    guarded_hub.until_connected(0)
    assert_calm(guarded_hub)


WRONG = {
    "wrong key": ("another-key-0123456789", "token_unknown_key"),
    "wrong signature": (None, "token_signature"),
}


@pytest.mark.parametrize(("token", "cause"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_who_shows_a_wrong_token_is_refused(
    kit: Kit, guarded_port: int, guarded_hub: Hub, shown: Shown, token: str | None, cause: str
) -> None:
    """It never connects, sees 401 where it can see anything, and is counted by its cause."""
    before = guarded_hub.stats()["refused"][cause]
    with shown.subscribe(kit, guarded_port, token or token_of(SECRET[::-1])) as client:
        said = eventually(client.refused, "it is not refused")
        assert "401" in said or shown.kind in ("chromium", "node"), said
        assert client.opened() is None
    assert guarded_hub.stats()["refused"][cause] == before + 1


def test_who_shows_no_token_is_refused(kit: Kit, guarded_port: int, guarded_hub: Hub) -> None:
    """Also by the client that cannot show one."""
    before = guarded_hub.stats()["refused"]["token_missing"]
    with python_client(f"ws://127.0.0.1:{guarded_port}/ws") as client:
        assert "401" in eventually(client.refused, "it is not refused")
    with kit.subscribe("chromium", guarded_port, (V1,)) as page:
        eventually(page.refused, "it is not refused")
        assert page.opened() is None
    assert guarded_hub.stats()["refused"]["token_missing"] == before + 2


# PageCache of other sites


class _Page(http.server.BaseHTTPRequestHandler):
    """One page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing."""


@pytest.fixture(scope="module")
def other_site() -> Iterator[str]:
    """The origin of a site that is not the hub's."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_page_of_another_site_is_refused(kit: Kit, port: int, steady_hub: Hub, other_site: str) -> None:
    """A browser says where its page comes from: it never connects, and is counted."""
    before = steady_hub.stats()["refused"]["origin"]
    with kit.browser.open(other_site).subscribe(f"ws://127.0.0.1:{port}/ws") as page:
        assert eventually(page.closed, "it is not refused") == 1006
        assert page.opened() is None
    assert steady_hub.stats()["refused"]["origin"] == before + 1


def test_a_page_of_an_allowed_site_gets_events(
    kit: Kit, way_to: Open, steady_redis: RedisServer, other_site: str
) -> None:
    """`hub.allowed_origins` has its site."""
    origins = json.dumps(["https://wall.example", other_site])
    with (
        HubThread(steady_redis.url, BROADCASTER_HUB__ALLOWED_ORIGINS=origins) as hub,
        way_to(hub.until_ready().port) as port,
        kit.browser.open(other_site).subscribe(f"ws://127.0.0.1:{port}/ws") as page,
    ):
        until_opened(page)
        assert_got(page, publish(steady_redis.url, *({"number": number} for number in range(5))))
        assert hub.stats()["refused"]["origin"] == 0


# curl


UPGRADE = [
    *("-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Version: 13"),
    *("-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
]

REQUESTS: dict[str, tuple[str, list[str], int, str]] = {
    "live": ("/health/live", [], 200, '{"live":true}'),
    "ready": ("/health/ready", [], 200, '"ready":true'),
    "health": ("/health", [], 200, '"ready":true'),
    "statistics": ("/stats", [], 200, '"deliveries":'),
    "HTTP/1.0": ("/health", ["--http1.0"], 200, '"ready":true'),
    "offers HTTP/2": ("/health", ["--http2"], 200, '"ready":true'),
    "asks for keep-alive": ("/health", ["-H", "Connection: keep-alive"], 200, '"ready":true'),
    "compressed": ("/stats", ["--compressed"], 200, '"deliveries":'),
    "no such page": ("/health/nothing", [], 404, ""),
    "no upgrade": ("/ws", [], 426, ""),
    "another channel": ("/ws?channel=other", UPGRADE, 404, "no such channel here: other"),
    "wrong query": ("/ws?sinse=1", UPGRADE, 400, "unknown query parameter"),
    "wrong position": ("/ws?since=1", UPGRADE, 400, "since is a position"),
    "another method": ("/health", ["-X", "POST", "-d", "{}"], 405, ""),
    "publishing without access control": ("/publish", ["-d", "{}"], 403, "auth.mode"),
}


@pytest.mark.parametrize(("path", "options", "status", "words"), REQUESTS.values(), ids=REQUESTS.keys())
def test_curl_is_answered(port: int, path: str, options: list[str], status: int, words: str) -> None:
    """The status and the body that the contract names, and a connection that ends as announced."""
    done = curl(*options, "-w", "\n%{http_code}", f"http://127.0.0.1:{port}{path}")
    assert done.returncode == 0, done
    body, _, code = done.stdout.rpartition("\n")
    assert int(code) == status, done.stdout
    assert words in body


def test_curl_asks_several_things_at_a_time(port: int, steady_hub: Hub) -> None:
    """A client that would keep its connection asks ten times: ten answers."""
    urls = [f"http://127.0.0.1:{port}{path}" for path in ("/health/live", "/health", "/stats") * 4]
    done = curl("-w", "\n%{http_code}\n", *urls)
    assert done.returncode == 0, done
    assert done.stdout.count("\n200\n") == len(urls)
    assert_calm(steady_hub)


def test_curl_upgrades(port: int, steady_hub: Hub, steady_redis: RedisServer, tmp_path: Path) -> None:
    """With the headers of a WebSocket, curl shows 101 and then the bytes of the frames."""
    program("curl")  # or it would be missed in the thread
    before = steady_hub.stats()["connected"]
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(curl("-iN", *UPGRADE, "--max-time", "2", f"http://127.0.0.1:{port}/ws"))
    )
    thread.start()
    steady_hub.until_connected(before + 1)
    [event] = publish(steady_redis.url, {"number": 1})
    thread.join()
    assert answers[0].returncode == 28, "the hub has ended the connection"
    assert answers[0].stdout.startswith("HTTP/1.1 101 ")
    assert "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answers[0].stdout
    assert event.event_id in answers[0].stdout


PUBLISHING: dict[str, tuple[str, dict[str, object], int]] = {
    "an event": (token_of(SECRET), {"event_type": "SERVER_DOWN", "source": "a", "data": {"text": WRITING}}, 201),
    "a large one": (token_of(SECRET), {"event_type": "SERVER_DOWN", "source": "a", "data": of_size(60_000)}, 201),
    "too large": (token_of(SECRET), {"event_type": "SERVER_DOWN", "source": "a", "data": of_size(70_000)}, 413),
    "of no type": (token_of(SECRET), {"source": "a"}, 400),
    "wrong token": (token_of(SECRET[::-1]), {"event_type": "SERVER_DOWN", "source": "a"}, 401),
    "only to subscribe": (API_KEY, {"event_type": "SERVER_DOWN", "source": "a"}, 403),
}


@pytest.mark.parametrize(("token", "event", "status"), PUBLISHING.values(), ids=PUBLISHING.keys())
def test_curl_publishes(
    kit: Kit, guarded_port: int, tmp_path: Path, token: str, event: dict[str, object], status: int
) -> None:
    """Who may publish does it with `curl --json`; a subscriber gets it; who may not is told."""
    (tmp_path / "event.json").write_text(json.dumps(event))
    options = ("-H", f"Authorization: Bearer {token}", "--json", f"@{tmp_path}/event.json", "-w", "\n%{http_code}")
    with kit.subscribe("ws", guarded_port, headers={"Authorization": f"Bearer {API_KEY}"}) as client:
        until_opened(client)
        done = curl(*options, f"http://127.0.0.1:{guarded_port}/publish")
        assert done.returncode == 0, done
        body, _, code = done.stdout.rpartition("\n")
        assert int(code) == status, done.stdout
        if status == 201:
            [text] = eventually(client.texts, "it does not arrive")
            got, said = json.loads(text), json.loads(body)
            assert said["event_id"] == got["event_id"]
            assert said["position"] == f"{got['epoch']}-{got['offset']}"
            assert got["data"] == event["data"]
        else:
            assert client.texts() == []


def test_what_is_missing_is_skipped_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything has to be run, nothing is passed over in silence."""
    monkeypatch.delenv("REQUIRE_REAL_CLIENTS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nobody is not installed"):
        missing("nobody is not installed")
    monkeypatch.setenv("REQUIRE_REAL_CLIENTS", "1")
    with pytest.raises(pytest.fail.Exception, match="nobody is not installed, and REQUIRE_REAL_CLIENTS is set"):
        missing("nobody is not installed")

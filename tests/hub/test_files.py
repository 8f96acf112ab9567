"""The files that a hub serves: the JavaScript client and the live page."""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from email.message import Message
from pathlib import Path

import pytest

from broadcaster.hub import serve
from broadcaster.hub.web.files import File
from broadcaster.redis.server import RedisServer
from tests.support import ROOT, Hub, HubThread, eventually

WEB = ROOT / "broadcaster/hub/web"
PATHS = {
    **{f"/{name}": WEB / "client" / name for name in ("client.js", "client.d.ts")},
    **{
        "/" if path.name == "index.html" else f"/page/{path.name}": path
        for path in sorted((WEB / "page").iterdir())
    },
}
TYPES = {
    ".js": "text/javascript",
    ".html": "text/html",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".ts": "text/plain",
}


def ask(hub: Hub, path: str, method: str = "GET", **headers: str) -> tuple[int, Message, bytes]:
    url = f"http://127.0.0.1:{hub.port}{path}"
    request = urllib.request.Request(
        url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.mark.parametrize("path", PATHS)
def test_a_file_is_served_as_it_is(steady_hub: Hub, path: str) -> None:
    """With its type, which a browser may not guess; unchanged, it is answered with 304."""
    status, headers, body = ask(steady_hub, path)
    assert (status, body) == (200, PATHS[path].read_bytes())
    assert headers["Content-Type"].split(";")[0] == TYPES[PATHS[path].suffix]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-cache"
    for known in (headers["ETag"], f'"other", W/{headers["ETag"]}', "*"):
        assert ask(steady_hub, path, If_None_Match=known)[::2] == (304, b"")
    assert ask(steady_hub, path, If_None_Match='"other"')[0] == 200
    status, head, body = ask(steady_hub, path, "HEAD")
    assert (status, body, head["Content-Length"]) == (200, b"", headers["Content-Length"])
    assert ask(steady_hub, path, "OPTIONS")[0] == 204
    assert ask(steady_hub, path, "POST")[0] == 405


def test_the_page_may_do_nothing_but_ask_its_hub(steady_hub: Hub) -> None:
    """A strict Content-Security-Policy: own scripts and styles, no inline ones, no text as markup, no frame."""
    _, headers, body = ask(steady_hub, "/")
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    host = f"127.0.0.1:{steady_hub.port}"
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"]) == ("'self'", "'self'")
    assert policy["connect-src"] == f"'self' ws://{host} wss://{host}"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["frame-ancestors"] == "'none'"
    markup = body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=|https?://", markup)


def test_a_host_with_other_characters_changes_no_policy(steady_hub: Hub) -> None:
    """What a client says is its host does not get into a header, unless it is one."""
    for host in ("a; script-src *", "a\tb", "é"):
        with socket.create_connection(("127.0.0.1", steady_hub.port)) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        assert b"connect-src 'self' ;" in answer, host


def test_all_files_of_the_page_are_small() -> None:
    """60 KB gzipped, with the client: on a slow link it is there at once."""
    sizes = {path: len(gzip.compress(file.read_bytes())) for path, file in PATHS.items() if path != "/client.d.ts"}
    assert sum(sizes.values()) < 60_000, sizes


def test_no_limit_refuses_a_file(steady_redis: RedisServer) -> None:
    """1,500 at once, where 100 other requests a second are allowed: each is answered with the file."""
    with HubThread(
        steady_redis.url, BROADCASTER_HUB__REQUESTS_PER_S="100", BROADCASTER_HUB__REQUESTS_PER_ADDRESS="100"
    ) as hub:
        hub.until_ready()
        statuses: Counter[int] = Counter()

        def load() -> None:
            for _ in range(50):
                statuses[ask(hub, "/client.js")[0]] += 1

        threads = [threading.Thread(target=load) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == {200: 1_500}


def is_open(port: int, client: socket.socket) -> bool:
    """Whether the hub's end of a connection is (ESTABLISHED, in the system's table)."""
    ends = [f":{port:04X}", f":{client.getsockname()[1]:04X}"]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any([row[1][-5:], row[2][-5:], row[3]] == [*ends, "01"] for row in rows)


def test_who_does_not_take_a_file_is_cut(steady_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is not read holds its connection no longer than a request that is not complete."""
    monkeypatch.setattr(serve, "CLIENT", {"/client.js": File(bytes(2**24), "", '"large"')})
    with HubThread(steady_redis.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S="0.5") as hub:
        hub.until_ready()
        with socket.create_connection(("127.0.0.1", hub.port)) as connection:
            connection.sendall(b"GET /client.js HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: not is_open(hub.port, connection), "it is held")
            assert not any(hub.stats()["refused"].values()), "its request was let in"
            got = b"x"
            taken = 0
            with contextlib.suppress(ConnectionResetError):
                while got := connection.recv(2**20):
                    taken += len(got)
            assert taken < 2**24


def test_without_the_page_there_is_the_client_only(steady_redis: RedisServer) -> None:
    """`page.enabled = false`."""
    with HubThread(steady_redis.url, BROADCASTER_PAGE__ENABLED="false") as hub:
        hub.until_ready()
        assert {path: ask(hub, path)[0] for path in PATHS} == {
            path: 200 if path.startswith("/client") else 404 for path in PATHS
        }

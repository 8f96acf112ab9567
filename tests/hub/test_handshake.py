"""The first bytes of a connection: what becomes a WebSocket, what goes to Sanic, what is refused and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from sanic import HTTPResponse, Request, Sanic, text
from sanic.config import Config

from broadcaster.hub.connections.handshake import HandshakeProtocol
from broadcaster.redis.server import RedisServer
from tests.hub.house import House
from tests.support import (
    ROOT,
    UNIT_S,
    Hub,
    HubThread,
    RawClient,
    Running,
    assert_calm,
    client_frame,
    eventually,
    free_port,
    next_but_ping,
    server_frames,
    upgrade_request,
)

DEADLINE_S = 0.3 * UNIT_S


@pytest.fixture(scope="module")
def patient() -> Iterator[Hub]:
    """A hub for all tests of this file: they leave nothing behind."""
    with RedisServer.start() as server, HubThread(server.url) as process:
        yield process.until_ready()
        assert_calm(process)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Hub]:
    """The same with little time for a request's head."""
    with (
        RedisServer.start() as server,
        HubThread(server.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S=str(DEADLINE_S)) as process,
    ):
        yield process.until_ready()
        assert_calm(process)


@contextlib.contextmanager
def dialled(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10 * UNIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def rest(connection: socket.socket) -> bytes:
    """Everything until the hub closes; fails when it does not."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65_536):
            answer += more
    return answer


def exchange(port: int, *parts: bytes) -> bytes:
    """Send the parts one by one; all that comes back until the hub closes."""
    with dialled(port) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(0.02 if len(parts) < 10 else 0)  # so that they are parts on the wire, too
        return rest(connection)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: hub", *headers, "", ""]).encode()


def singly(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


# What is let in


def test_a_head_may_come_in_single_bytes(patient: Hub) -> None:
    """An upgrade is understood however it is cut into segments."""
    with dialled(patient.port) as connection:
        for byte in singly(upgrade_request(patient.port)):
            connection.sendall(byte)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(65_536)
        assert status(answer) == 101
        connection.sendall(client_frame(9, b"hi"))
        frames = b""
        while (10, b"hi") not in server_frames(frames):
            more = connection.recv(100)
            assert more, "closed without an answer"
            frames += more


def test_a_request_for_sanic_may_come_in_single_bytes(patient: Hub) -> None:
    """So is any other request."""
    assert status(exchange(patient.port, *singly(get("/health/live")))) == 200


PADDING = ["X-Padding: " + "x" * 4000] * 3


def test_a_head_of_almost_16_kib_is_let_in(patient: Hub) -> None:
    """The bound is the documented one, not a smaller one of some part behind it."""
    head = upgrade_request(patient.port)[:-2] + "\r\n".join(PADDING).encode() + b"\r\n"
    head += b"X-Last: " + b"x" * (16_384 - len(head) - 12) + b"\r\n\r\n"
    assert len(head) == 16_384
    with dialled(patient.port) as connection:
        connection.sendall(head)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 101 ")


PATHS = [
    "/ws",
    "/ws?",
    "/ws?channel=events.critical",
    "/ws?channel=events%2Ecritical",
    "/ws?channel=events.critical&channel=events.audit",
    "/ws?since=a-5",
    "/ws?channel=events.critical&since=a-5&type=A&type=B&source=S%C3%BCd&severity=info",
]


@pytest.mark.parametrize("path", PATHS)
def test_the_websocket_has_one_path(patient: Hub, path: str) -> None:
    """With or without channels, positions and filters."""
    with RawClient(patient.port, path=path) as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")


# What is refused


def upgrade(path: str = "/ws", **headers: str) -> bytes:
    return upgrade_request(0, path=path, **headers)


WEBSOCKET_REFUSALS: dict[str, tuple[bytes, int]] = {
    "plain GET": (get("/ws"), 426),
    "plain GET with a query": (get("/ws?channel=events.critical"), 426),
    "POST": (get("/ws", "Content-Length: 0", method="POST"), 405),
    "HEAD": (get("/ws", method="HEAD"), 405),
    "other channel": (upgrade("/ws?channel=other"), 404),
    "this channel and another": (upgrade("/ws?channel=events.critical&channel=other"), 404),
    "channel of hubs": (upgrade("/ws?channel=broadcaster.hub.x"), 404),
    "empty channel": (upgrade("/ws?channel="), 400),
    "pattern": (upgrade("/ws?channel=events.*"), 400),
    "channel twice": (upgrade("/ws?channel=events.critical&channel=events.critical"), 400),
    "channel of other case": (upgrade("/ws?channel=Events.Critical"), 404),
    "channel that is no text": (upgrade("/ws?channel=%ff%00"), 400),
    "17 channels": (upgrade("/ws?" + "&".join(f"channel=events.{n}" for n in range(17))), 400),
    "wrong position": (upgrade("/ws?since=5"), 400),
    "position before its channel": (upgrade("/ws?since=a-5&channel=events.critical"), 400),
    "unknown severity": (upgrade("/ws?severity=fatal"), 400),
    "unknown query": (upgrade("/ws?debug=1"), 400),
    "unknown query beside a known one": (upgrade("/ws?channel=events.critical&token=secret"), 400),
    "query without a value": (upgrade("/ws?debug"), 400),
    "200 query parameters": (upgrade("/ws?" + "a=b&" * 200), 400),
    "broken key": (upgrade(Sec_WebSocket_Key="x"), 400),
    "header without a colon": (upgrade(Host="a\r\nnonsense"), 400),
    "NUL in a header": (upgrade(X_Note="a\0b"), 400),
    "announced body": (upgrade(Content_Length="3"), 400),
    "path beyond ASCII": (upgrade("/ws?channel=ü"), 400),
}


@pytest.mark.parametrize(("request_", "code"), WEBSOCKET_REFUSALS.values(), ids=WEBSOCKET_REFUSALS.keys())
def test_a_request_that_cannot_become_a_websocket_is_told_so(patient: Hub, request_: bytes, code: int) -> None:
    """One complete answer with the right status, then the end; and nobody is connected."""
    answer = exchange(patient.port, request_)
    assert answer, "the client is left without any answer"
    assert status(answer) == code
    assert b"connection: close" in answer.lower()


GARBAGE: dict[str, bytes] = {
    "text": b"hello?\r\n\r\n",
    "nothing but the end": b"\r\n\r\n",
    "bytes": bytes(range(256)) + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"r" * 32 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /ws\r\n\r\n",
    "HTTP/3.0": b"GET /ws HTTP/3.0\r\nHost: a\r\n\r\n",
    "lower case": b"get /ws HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  /ws HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the path": b"GET /w s HTTP/1.1\r\nHost: a\r\n\r\n",
    "a very long method": b"G" * 100 + b" /ws HTTP/1.1\r\n\r\n",
    "bare newlines": b"GET /ws HTTP/1.1\nHost: a\n\n\r\n\r\n",
    "Redis": b"*1\r\n$4\r\nPING\r\n\r\n",
    "a frame": client_frame(1, b"hi\r\n\r\n"),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_answered_400(patient: Hub, garbage: bytes) -> None:
    """What is no HTTP request gets one answer and the end."""
    answer = exchange(patient.port, garbage)
    assert status(answer) == 400
    assert b"Connection: close" in answer


EARLY: dict[str, bytes] = {
    "a ping": client_frame(9, b"early"),
    "a text": client_frame(1, b"early"),
    "a second request": get("/stats"),
    "one byte": b"\0",
}


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY.keys())
def test_bytes_after_the_request_are_refused(patient: Hub, early: bytes) -> None:
    """Who talks before the 101 may be smuggling a second request."""
    answer = exchange(patient.port, upgrade_request(patient.port) + early)
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1


TOO_LONG: dict[str, list[bytes]] = {
    "no end at all": [b"x" * 16_385],
    "one endless line": [b"GET /ws HTTP/1.1\r\nX-Long: " + b"x" * 16_384],
    "an endless path": [b"GET /" + b"w" * 16_384],
    "complete, one byte too long": [get("/health", "X: " + "x" * (16_385 - len(get("/health", "X: "))))],
    "complete, far too long": [get("/health", "X-Long: " + "x" * 40_000)],
    "many headers": [get("/ws", *[f"X-{number}: {number}" for number in range(2000)])],
    "in two parts": [b"GET /ws HTTP/1.1\r\nX-Long: ", b"x" * 10_000, b"x" * 10_000],
    "in small parts": [b"x" * 100] * 200,
}


@pytest.mark.parametrize("parts", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_head_over_16_kib_is_answered_431(patient: Hub, parts: list[bytes]) -> None:
    """Beyond the bound nothing more is read, finished or not."""
    answer = exchange(patient.port, *parts)
    assert status(answer) == 431


HALVES: dict[str, bytes] = {
    "nothing": b"",
    "the request line": b"GET /ws HTTP/1.1\r\n",
    "all but the last byte": upgrade_request(1)[:-1],
    "half a request for Sanic": get("/health")[:-2],
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES.keys())
def test_half_a_head_is_answered_408_at_its_deadline(hasty: Hub, half: bytes) -> None:
    """Not before the deadline, and soon after it; who has sent nothing is not kept either."""
    started = time.monotonic()
    answer = exchange(hasty.port, half)
    waited = time.monotonic() - started
    assert status(answer) == 408
    assert 0.9 * DEADLINE_S < waited < DEADLINE_S + 3 * UNIT_S


def test_a_dripping_head_does_not_get_more_time(hasty: Hub) -> None:
    """The deadline is for the whole head: bytes in between do not move it."""
    with dialled(hasty.port) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 5 * UNIT_S:
                connection.sendall(b"G")
                time.sleep(0.05)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    assert connection.recv(12) == b"HTTP/1.1 408"
                    return
                connection.settimeout(10 * UNIT_S)
        pytest.fail("it was never told")


def test_a_complete_head_ends_the_deadline(hasty: Hub) -> None:
    """A WebSocket that was let in in time is not cut by the handshake's deadline."""
    with RawClient(hasty.port) as client:
        time.sleep(2 * DEADLINE_S)
        client.send(9, b"hi")
        assert next_but_ping(client) == (10, b"hi")


def test_many_half_heads_hold_up_nobody_and_are_all_ended(hasty: Hub) -> None:
    """200 unfinished requests: others are served at once, and at the deadline all are gone."""
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(dialled(hasty.port)) for _ in range(200)]
        for half in halves:
            half.sendall(b"GET /ws HTTP/1.1\r\n")
        assert hasty.get("/health/live")[0] == 200
        with RawClient(hasty.port) as client:
            client.send(9)
            assert next_but_ping(client) == (10, b"")
            assert [status(rest(half)) for half in halves] == [408] * 200


def test_who_leaves_before_the_head_is_complete_leaves_nothing(hasty: Hub) -> None:
    """A connection that ends in the middle of its head is forgotten, with or without an error."""
    for _ in range(20):
        with dialled(hasty.port) as connection:
            connection.sendall(b"GET /ws HTTP/1.1\r\n")
    with dialled(hasty.port) as connection:
        connection.sendall(b"GET /ws HTTP/1.1\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    time.sleep(1.5 * DEADLINE_S)
    assert hasty.stats()["connected"] == 0


# What is Sanic's

SANICS: dict[str, tuple[bytes, int]] = {
    "GET /health": (get("/health"), 200),
    "GET /health/live": (get("/health/live"), 200),
    "GET /health/ready": (get("/health/ready"), 200),
    "GET /stats": (get("/stats"), 200),
    "HTTP/1.0": (get("/health").replace(b"1.1", b"1.0"), 200),
    "unknown path": (get("/nothing"), 404),
    "HEAD of an unknown path": (get("/nothing", method="HEAD"), 404),
    "a path that begins like ours": (get("/wsx"), 404),
    "a path below ours": (get("/ws/events"), 404),
    "ours, in other case": (get("/WS"), 404),
    "an upgrade elsewhere": (upgrade("/socket"), 404),
    "wrong method": (get("/health", "Content-Length: 0", method="POST"), 405),
}


@pytest.mark.parametrize(("request_", "code"), SANICS.values(), ids=SANICS.keys())
def test_every_other_request_is_answered_by_sanic(patient: Hub, request_: bytes, code: int) -> None:
    """The front hands it on with all its bytes; after one answer the connection ends."""
    answer = exchange(patient.port, request_)
    assert status(answer) == code
    assert b"connection: close" in answer.lower()


def test_a_body_may_come_in_parts(patient: Hub) -> None:
    """A request whose body arrives after its head is one request, and is answered once."""
    head = get("/health", "Content-Length: 30", method="POST")
    answer = exchange(patient.port, head[:40], head[40:] + b"x" * 10, b"y" * 10, b"z" * 10)
    assert status(answer) == 405
    assert answer.count(b"HTTP/1.1") == 1


def test_an_upgrade_on_a_used_connection_is_not_lost_in_sanic(patient: Hub) -> None:
    """Sanic closes after each answer, so that a proxy opens a new connection for the WebSocket."""
    with dialled(patient.port) as connection:
        connection.sendall(get("/health", "Connection: keep-alive"))
        first = connection.recv(65_536)
        assert status(first) == 200
        with contextlib.suppress(ConnectionError):
            connection.sendall(upgrade_request(patient.port))
        assert b"HTTP/1.1" not in rest(connection)


# The contract with Sanic (pin: sanic>=25.12,<26)


async def serve_echo(port: int) -> None:
    """A Sanic application of the test's own behind a front, put together as the hub is."""
    house = House()
    roster = house.registry
    app: Sanic[Config, SimpleNamespace] = Sanic("echo", configure_logging=False)
    app.config.KEEP_ALIVE = False
    app.config.ACCESS_LOG = False

    @app.post("/echo")
    async def echo(request: Request) -> HTTPResponse:
        return text(f"{request.ip} {len(request.body)} {request.body[-3:].decode()}")

    @app.get("/stream")
    async def stream(request: Request) -> None:
        response = await request.respond(content_type="text/plain")
        for number in range(3):
            await response.send(f"part {number} ")
        await response.eof()

    @app.get("/connected")
    async def connected(request: Request) -> HTTPResponse:
        return text(f"{roster.connected} of {roster.peak}")

    server: Any = await app.create_server(
        "127.0.0.1",
        port,
        protocol=HandshakeProtocol.bound(house.admission, house.context, house.channels),
        asyncio_server_kwargs={"start_serving": False},
    )
    await server.startup()
    await server.before_start()
    await server.start_serving()
    await server.after_start()
    print("serving", flush=True)
    await asyncio.Event().wait()


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    """The port of `serve_echo`, in a process of its own: Sanic can start one application per process."""
    port = free_port()
    with Running(sys.executable, "-W", "error", "-m", "tests.hub.test_handshake", str(port), cwd=ROOT) as process:
        process.said("serving")
        yield port
        assert process.output == "serving"


POSTS: dict[str, tuple[list[bytes], bytes]] = {
    "whole": ([get("/echo", "Content-Length: 3", method="POST") + b"abc"], b"3 abc"),
    "body apart": ([get("/echo", "Content-Length: 3", method="POST"), b"abc"], b"3 abc"),
    "body in bytes": ([get("/echo", "Content-Length: 3", method="POST"), b"a", b"b", b"c"], b"3 abc"),
    "head in two": ([b"POST /echo HT", b"TP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab", b"c"], b"3 abc"),
    "large": (
        [get("/echo", "Content-Length: 300003", method="POST") + b"x" * 100_000, b"x" * 200_000, b"end"],
        b"300003 end",
    ),
    "chunked": (
        [get("/echo", "Transfer-Encoding: chunked", method="POST") + b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"],
        b"3 abc",
    ),
    "asked to continue": (
        [get("/echo", "Content-Length: 3", "Expect: 100-continue", method="POST"), b"abc"],
        b"3 abc",
    ),
}


@pytest.mark.parametrize(("parts", "words"), POSTS.values(), ids=POSTS.keys())
def test_sanics_protocol_takes_over_a_connection_with_its_first_bytes(
    echo: int, parts: list[bytes], words: bytes
) -> None:
    """HttpProtocol, made by the front, reads bodies of all kinds and knows its peer."""
    answer = exchange(echo, *parts)
    assert b"HTTP/1.1 200 OK" in answer
    assert answer.endswith(b"127.0.0.1 " + words)


def test_sanics_protocol_streams_through_the_front(echo: int) -> None:
    """A response in parts arrives whole."""
    answer = exchange(echo, get("/stream"))
    for number in range(3):
        assert f"part {number} ".encode() in answer
    assert answer.endswith(b"0\r\n\r\n")


def test_a_websocket_never_reaches_sanic(echo: int) -> None:
    """The transport of an upgrade belongs to the roster at once, and leaves it with its end."""
    with RawClient(echo) as client:
        assert exchange(echo, get("/connected")).endswith(b"1 of 1")
        client.send(8, b"\x03\xe8")
        assert next_but_ping(client) == (8, b"\x03\xe8")
        with pytest.raises(EOFError):
            client.next_frame()
    eventually(lambda: exchange(echo, get("/connected")).endswith(b"0 of 1"), "the connection was not forgotten")


def test_the_hub_counts_only_websockets(patient: Hub) -> None:
    """HTTP requests and refused upgrades are no subscribers."""
    eventually(lambda: patient.stats()["connected"] == 0, "somebody is left")
    peak = patient.stats()["peak"]
    exchange(patient.port, get("/health"))
    exchange(patient.port, upgrade("/ws?channel=other"))
    with RawClient(patient.port):
        patient.until_connected(1)
    patient.until_connected(0)
    assert patient.stats()["peak"] == max(peak, 1)


if __name__ == "__main__":
    uvloop.run(serve_echo(int(sys.argv[1])))


# What every HTTP answer has in common


@pytest.mark.parametrize(
    "path", ["/ws/", "/ws/?channel=events.critical", "http://hub.example/ws", "HTTP://h:1/ws/?_=1"]
)
def test_the_path_of_the_websocket_may_end_with_a_slash_and_be_a_whole_url(patient: Hub, path: str) -> None:
    with RawClient(patient.port, path=path) as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize(
    "path", ["/ws?since=", "/ws?channel=events.critical&since=&_=1700000000", "/ws?_cache=%41"]
)
def test_what_asks_for_nothing_is_no_mistake(patient: Hub, path: str) -> None:
    """An empty position, and what libraries add against caches."""
    with RawClient(patient.port, path=path) as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")


METHODS = {
    # path, method, status, Allow
    "/health": ("/health", "HEAD", 200, None),
    "/health/ready": ("/health/ready", "HEAD", 200, None),
    "/health/live, options": ("/health/live", "OPTIONS", 204, "GET, HEAD, OPTIONS"),
    "/health, deleted": ("/health", "DELETE", 405, "GET, HEAD, OPTIONS"),
    "/stats": ("/stats", "HEAD", 200, None),
    "/stats, options": ("/stats", "OPTIONS", 204, "GET, HEAD, OPTIONS"),
    "/stats, deleted": ("/stats", "DELETE", 405, "GET, HEAD, OPTIONS"),
    "/publish, options": ("/publish", "OPTIONS", 204, "POST, OPTIONS"),
    "/publish, got": ("/publish", "GET", 405, "POST, OPTIONS"),
}


@pytest.mark.parametrize(("path", "method", "code", "allow"), METHODS.values(), ids=METHODS.keys())
def test_methods_are_answered_as_http_has_them(
    patient: Hub, path: str, method: str, code: int, allow: str | None
) -> None:
    answer = exchange(patient.port, get(path, "Connection: close", method=method))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == code, answer
    said = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n"))
    }
    assert allow is None or set(said["allow"].split(", ")) == set(allow.split(", "))
    assert (body == b"") is (method == "HEAD" or code == 204)
    assert code == 204 or said["content-type"] == "application/json"


REASONS = {
    "garbage": (b"nonsense\r\n\r\n", 400),
    "a head that is too large": (get("/ws", "X: " + "x" * 20_000), 431),
    "bytes after the request": (upgrade("/ws") + b"x", 400),
    "no upgrade": (get("/ws"), 426),
    "an old version": (upgrade("/ws", Sec_WebSocket_Version="8"), 400),
    "an unknown channel": (upgrade("/ws?channel=other"), 404),
    "half an escape": (upgrade("/ws?source=%zz"), 400),
    "an unknown parameter": (upgrade("/ws?tpye=A"), 400),
    "an unknown path": (get("/nothing"), 404),
    "a wrong method": (get("/stats", method="DELETE"), 405),
    "no JSON": (get("/publish", "Content-Length: 1", method="POST") + b"x", 403),
}


@pytest.mark.parametrize(("request_", "code"), REASONS.values(), ids=REASONS.keys())
def test_every_refusal_says_why_in_json(patient: Hub, request_: bytes, code: int) -> None:
    answer = exchange(patient.port, request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == code, answer
    assert b"content-type: application/json" in head.lower()
    assert b"content-length: %d" % len(body) in head.lower()
    assert json.loads(body)["error"]


@pytest.mark.parametrize("origin", ["ws://127.0.0.1:{port}", "127.0.0.1:{port}", "HTTP://127.0.0.1:{port}"])
def test_clients_that_are_no_browsers_say_their_origin_in_other_words(patient: Hub, origin: str) -> None:
    said = upgrade_request(patient.port, Origin=origin.replace("{port}", str(patient.port)))
    with RawClient(patient.port, request=said) as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")

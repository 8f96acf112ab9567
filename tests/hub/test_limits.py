"""Limits on real sockets: who is beyond one is refused as documented, counted, and harms nobody else."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from broadcaster.redis.server import RedisServer
from broadcaster.wire import read_control
from tests import certificates
from tests.hub.test_handshake import dialled, exchange, get, rest, status
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    Running,
    assert_calm,
    client_frame,
    cpu_s,
    event_payload,
    eventually,
    free_port,
    memory_bytes,
    next_but_ping,
    upgrade_request,
)

MIB = 1 << 20
KEY = "0123456789abcdef"
UNFINISHED = b"POST /publish HTTP/1.1\r\nHost: hub\r\nContent-Length: 9\r\n\r\nhalf"


def refused(hub: Hub) -> dict[str, int]:
    """Who was refused so far, by cause, without what never happened."""
    return {cause: count for cause, count in hub.stats()["refused"].items() if count}


def open_files(hub: Running) -> int:
    return len(os.listdir(f"/proc/{hub.process.pid}/fd"))


def header(answer: bytes, name: str) -> str | None:
    """A header of a response; None if it is not there."""
    for line in answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name.lower():
            return value.strip()
    return None


def knock(port: int, path: str = "/ws", **headers: str) -> bytes:
    """SubscribeRequest for an upgrade that is refused: the whole answer."""
    return exchange(port, upgrade_request(port, path=path, **headers))


def gets_in(port: int, path: str = "/ws") -> bool:
    """Whether somebody new is let in now."""
    with RawClient(port, path=path) as client:
        return client.response.startswith(b"HTTP/1.1 101 ")


# What is wrong with a request


@pytest.fixture(scope="module")
def strict(steady_redis: RedisServer) -> Iterator[Hub]:
    """A hub with access control; nobody who comes here is let in."""
    key = {"name": "wall", "key": KEY, "subscribe": ["events.*", "other"]}
    access: dict[str, Any] = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__API_KEYS": json.dumps([key])}
    with HubThread(steady_redis.url, **access) as hub:
        yield hub.until_ready()
        assert hub.stats()["peak"] == 0
        assert_calm(hub)


def wrong(path: str = "/ws", **headers: str) -> bytes:
    return upgrade_request(0, path=path, **({"Authorization": f"Bearer {KEY}"} | headers))


FAULTS: dict[str, tuple[list[bytes], int, str]] = {
    "no HTTP": ([b"hello\r\n\r\n"], 400, "malformed"),
    "HTTP/0.9": ([b"GET /ws\r\n\r\n"], 400, "malformed"),
    "a frame behind the request": ([wrong() + client_frame(9)], 400, "malformed"),
    "a second request behind it": ([wrong() + get("/health")], 400, "malformed"),
    "a header without a colon": ([wrong(X_Note="a\r\nnonsense")], 400, "malformed"),
    "a broken key": ([wrong(Sec_WebSocket_Key="x")], 400, "malformed"),
    "a body": ([wrong(Content_Length="3")], 400, "malformed"),
    "two hosts": ([wrong(X_Note="a\r\nHost: b")], 400, "malformed"),
    "300 parameters": ([wrong("/ws?" + "a=b&" * 300)], 400, "malformed"),
    "an unknown parameter": ([wrong("/ws?debug=1")], 400, "query"),
    "17 channels": ([wrong("/ws?" + "&".join(f"channel=events.{n}" for n in range(17)))], 400, "query"),
    "a page of another site": ([wrong(Origin="https://evil.example")], 403, "origin"),
    "no token": ([upgrade_request(0)], 401, "token_missing"),
    "an unknown token": ([wrong(Authorization="Bearer fedcba9876543210")], 401, "token_unknown_key"),
    "a channel that the token is not for": ([wrong("/ws?channel=secret")], 403, "forbidden_channel"),
    "a channel that is not here": ([wrong("/ws?channel=other")], 404, "unknown_channel"),
    "POST": ([get("/ws", "Content-Length: 0", method="POST")], 405, "malformed"),
    "no upgrade": ([get("/ws")], 426, "malformed"),
    "an endless head": ([get("/ws", "X-Long: " + "x" * 20_000)], 431, "malformed"),
}


@pytest.mark.parametrize(("parts", "code", "cause"), FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_is_told_by_its_status_and_counted_by_its_cause(
    strict: Hub, parts: list[bytes], code: int, cause: str
) -> None:
    """One answer, one count, of this cause and no other; nobody is told to try again, and nobody is let in."""
    before = Counter(refused(strict))
    answer = exchange(strict.port, *parts)
    assert status(answer) == code
    assert answer.count(b"HTTP/1.1 ") == 1
    assert header(answer, "Retry-After") is None
    assert Counter(refused(strict)) - before == {cause: 1}


def test_who_talks_before_the_answer_is_counted_as_well(strict: Hub) -> None:
    """Bytes behind the request are refused however they come, and each time they are counted."""
    before = refused(strict).get("malformed", 0)
    for _ in range(20):
        assert status(exchange(strict.port, upgrade_request(0) + b"early")) == 400
    assert refused(strict).get("malformed", 0) == before + 20


# Limits that are reached

PLACES: dict[str, tuple[dict[str, Any], str, str]] = {
    "full": ({"BROADCASTER_HUB__MAX_CONNECTIONS": "3"}, "/ws", "/ws"),
    "address_full": ({"BROADCASTER_HUB__MAX_PER_ADDRESS": "3"}, "/ws", "/ws"),
    "no_room": (
        {"BROADCASTER_CHANNELS__MAX_OPEN": "2", "BROADCASTER_CHANNELS__LINGER_S": "0.1"},
        "/ws?channel=events.a",
        "/ws?channel=events.b",
    ),
}


@pytest.mark.parametrize(
    ("variables", "held", "asked", "cause"),
    [(*place, cause) for cause, place in PLACES.items()],
    ids=PLACES.keys(),
)
def test_without_room_the_answer_is_come_later_and_later_there_is(
    steady_redis: RedisServer, variables: dict[str, str], held: str, asked: str, cause: str
) -> None:
    """503 with Retry-After: 5 before the upgrade, each counted; who is in stays, and who leaves makes room."""
    with HubThread(steady_redis.url, None, **variables) as hub:
        hub.until_ready()
        with contextlib.ExitStack() as stack:
            inside = [stack.enter_context(RawClient(hub.port, path=held)) for _ in range(3)]
            hub.until_connected(3)
            for count in range(1, 4):
                answer = knock(hub.port, asked)
                assert (status(answer), header(answer, "Retry-After")) == (503, "5")
                assert refused(hub) == {cause: count}
            assert hub.get("/health")[0] == 200
            for client in inside:
                client.send(9, b"hi")
                assert next_but_ping(client) == (10, b"hi")
        eventually(lambda: gets_in(hub.port, asked), "there is no room again")
        assert hub.stats()["peak"] == 3
        assert_calm(hub)


def asking_at_once(port: int, words: bytes, count: int) -> list[bytes]:
    """So many ask in the same moment: the first bytes that each of them gets."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(dialled(port)) for _ in range(count)]
        for connection in connections:
            connection.sendall(words)
        return [connection.recv(65_536) for connection in connections]


RATES: dict[str, tuple[str, bytes, int, int]] = {
    "handshakes": ("BROADCASTER_HUB__HANDSHAKES_PER_S", upgrade_request(0), 101, 503),
    "requests": ("BROADCASTER_HUB__REQUESTS_PER_S", get("/stats"), 200, 429),
    "address_requests": ("BROADCASTER_HUB__REQUESTS_PER_ADDRESS", get("/nothing"), 404, 429),
}


@pytest.mark.parametrize(
    ("variable", "words", "success", "refusal", "cause"),
    [(*rate, cause) for cause, rate in RATES.items()],
    ids=RATES.keys(),
)
def test_more_than_so_many_a_second_are_told_to_come_in_a_second(
    steady_redis: RedisServer, variable: str, words: bytes, success: int, refusal: int, cause: str
) -> None:
    """A second's worth is served at once, the rest gets Retry-After: 1, and in a second there is more."""
    limit: dict[str, Any] = {variable: "10"}
    with HubThread(steady_redis.url, **limit) as hub:
        hub.said("events get through")
        time.sleep(1.1)  # whoever asked for its health before: now the bucket is full
        began_at = time.monotonic()
        answers = asking_at_once(hub.port, words, 60)
        took_s = time.monotonic() - began_at
        served = [answer for answer in answers if status(answer) == success]
        turned_away = [answer for answer in answers if status(answer) == refusal]
        assert len(served) + len(turned_away) == 60
        assert 10 <= len(served) <= 10 + 10 * took_s + 1
        assert {header(answer, "Retry-After") for answer in turned_away} == {"1"}
        time.sleep(1.0)  # what a client is told to wait
        assert status(asking_at_once(hub.port, words, 1)[0]) == success
        other, success_there = (get("/nothing"), 404) if cause == "handshakes" else (upgrade_request(0), 101)
        assert status(asking_at_once(hub.port, other, 1)[0]) == success_there
        time.sleep(0.2)  # so that the next request is not one too many
        assert hub.stats()["refused"][cause] == len(turned_away)
        assert_calm(hub)


def test_health_is_answered_in_a_flood_of_other_requests(steady_redis: RedisServer) -> None:
    """Whoever supervises the hub must not take a busy one for a dead one: never refused, whatever the limits."""
    with HubThread(
        steady_redis.url, BROADCASTER_HUB__REQUESTS_PER_S="1", BROADCASTER_HUB__REQUESTS_PER_ADDRESS="1"
    ) as hub:
        hub.until_ready()
        for path in ("/health", "/health/live", "/health/ready", "/health/"):
            answers = asking_at_once(hub.port, get("/nothing"), 20)
            assert sum(status(answer) == 429 for answer in answers) >= 18
            assert [status(answer) for answer in asking_at_once(hub.port, get(path), 20)] == [200] * 20
        assert_calm(hub)


HEALTH: dict[str, tuple[bytes, int, bytes]] = {
    "HEAD": (get("/health/ready", method="HEAD"), 200, b""),
    "OPTIONS": (get("/health", method="OPTIONS"), 204, b""),
    "POST": (get("/health/live", method="POST"), 405, b'{"error": "/health/live takes GET, HEAD and OPTIONS"}'),
    "with a query": (get("/health/live?verbose=1"), 200, b'{"live":true}'),
    "absolute": (get("http://hub.example:8765/health/live"), 200, b'{"live":true}'),
}


@pytest.mark.parametrize(("words", "code", "body"), HEALTH.values(), ids=HEALTH.keys())
def test_every_way_to_ask_for_the_health(strict: Hub, words: bytes, code: int, body: bytes) -> None:
    """As probes and load balancers ask; the connection ends with the answer."""
    head, _, got = exchange(strict.port, words).partition(b"\r\n\r\n")
    assert (status(head), got) == (code, body)
    if code in (204, 405):
        assert header(head + b"\r\n\r\n", "Allow") == "GET, HEAD, OPTIONS"


# Half-open connections

FLOODS: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"GET /ws HTTP/1.1\r\n",
    "half a body": UNFINISHED,
}


AT_ONCE = 30
"""Fewer connections than any of these hubs lets wait to be accepted."""


class Flood:
    """Many connections that say something and wait."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.connections: list[socket.socket] = []

    def grow(self, *words: bytes) -> None:
        """One more connection for each of these, which says its words; the hub has taken them all."""
        for first in range(0, len(words), AT_ONCE):
            self.rush(*words[first : first + AT_ONCE])
            assert status(exchange(self._port, get("/health/live"))) == 200  # it was behind them in the queue

    def rush(self, *words: bytes) -> None:
        """The same, all at once."""
        new = []
        for _ in words:
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", self._port))
            new.append(connection)
        self.connections += new
        with selectors.DefaultSelector() as selector:
            for connection, said in zip(new, words, strict=True):
                selector.register(connection, selectors.EVENT_WRITE, said)
            deadline = time.monotonic() + 10 * UNIT_S
            while selector.get_map():
                assert time.monotonic() < deadline, "nobody takes these connections"
                for key, _ in selector.select(0.1):
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(ConnectionError):
                        assert isinstance(key.fileobj, socket.socket)
                        key.fileobj.send(key.data)

    def ended(self, connection: socket.socket) -> bytes | None:
        """What a connection was answered before it was ended; None while it is open."""
        try:
            answer = connection.recv(65_536, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""
        return answer

    def answers(self) -> list[bytes | None]:
        return [self.ended(connection) for connection in self.connections]

    def count(self, code: int) -> int:
        """How many were answered with a status."""
        return sum(answer is not None and answer.startswith(b"HTTP/1.1 %d " % code) for answer in self.answers())

    def leave(self) -> None:
        for connection in self.connections:
            connection.close()
        self.connections.clear()

    def __enter__(self) -> Flood:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def assert_served(hub: Hub, publish: RedisClient) -> None:
    """Somebody honest gets in at once, gets his event, and the hub says that it is well."""
    with RawClient(hub.port) as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")
        eventually(lambda: hub.stats()["connected"] >= 1, "he is not there")
        payload = event_payload()
        publish.publish(payload)
        assert next_but_ping(client) == (1, payload)
    assert hub.get("/health")[0] == 200


@pytest.mark.parametrize("words", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_of_half_open_connections_costs_the_oldest_of_them_their_place(
    steady_redis: RedisServer, client: RedisClient, words: bytes
) -> None:
    """Of 600 with room for 50 the oldest are answered 408 and cut, each counted; the honest get in meanwhile."""
    with (
        HubProcess(
            steady_redis.url,
            BROADCASTER_HUB__MAX_HANDSHAKES="50",
            BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S="60",
            BROADCASTER_HUB__REQUESTS_PER_S="100000",
            BROADCASTER_HUB__REQUESTS_PER_ADDRESS="100000",
        ) as hub,
        Flood(hub.until_ready().port) as flood,
    ):
        before = open_files(hub)
        for _ in range(6):
            flood.grow(*[words] * 100)
            assert_served(hub, client)
            assert open_files(hub) <= before + 50 + 10
        eventually(lambda: flood.count(408) >= 550, "too many are kept")
        ends = [answer is not None for answer in flood.answers()]
        assert ends[:500] == [True] * 500, "somebody old was kept"
        assert ends[-20:] == [False] * 20, "somebody new was cut"
        counts = refused(hub)
        assert set(counts) == {"half_open"}
        assert counts["half_open"] == flood.count(408)
        flood.leave()
        eventually(lambda: open_files(hub) <= before + 1, "connections are kept open")
        assert_calm(hub)


# Requests that never end

DEADLINE_S = 0.6 * UNIT_S

ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "a head by the byte": (b"G", b"E"),
    "a body that never comes": (UNFINISHED, b""),
    "a body by the byte": (b"POST /publish HTTP/1.1\r\nHost: hub\r\nContent-Length: 60000\r\n\r\n", b"x"),
    "chunks without end": (
        b"POST /publish HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n",
    ),
    "leave to go on": (
        b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n",
        b"",
    ),
}


@pytest.fixture(scope="module")
def impatient(steady_redis: RedisServer) -> Iterator[HubProcess]:
    """A hub that gives nobody much time."""
    with HubProcess(steady_redis.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S=str(DEADLINE_S)) as hub:
        yield hub.until_ready()
        assert_calm(hub)


@pytest.mark.parametrize(("begin", "drip"), ENDLESS.values(), ids=ENDLESS.keys())
def test_a_request_that_never_ends_is_cut_at_the_deadline(
    impatient: HubProcess, begin: bytes, drip: bytes
) -> None:
    """30 at once, also those that send a little all the time: 408, each counted as too late; nothing is left."""
    files, before = open_files(impatient), refused(impatient).get("too_late", 0)
    with Flood(impatient.port) as flood:
        flood.grow(*[begin] * 30)
        began_at = time.monotonic()
        while None in [
            flood.ended(connection) for connection in flood.connections if not is_continued(connection)
        ]:
            assert time.monotonic() - began_at < DEADLINE_S + 4 * UNIT_S, "they are kept"
            for connection in flood.connections if drip else ():
                with contextlib.suppress(OSError):
                    connection.send(drip, socket.MSG_DONTWAIT)
            time.sleep(0.03)
        eventually(lambda: open_files(impatient) <= files, "something is kept open", 4.0)
        assert time.monotonic() - began_at > 0.7 * DEADLINE_S
        assert refused(impatient)["too_late"] == before + 30
    assert impatient.get("/health")[0] == 200


def is_continued(connection: socket.socket) -> bool:
    """Whether it was told to go on, and nothing else yet."""
    with contextlib.suppress(OSError):
        return connection.recv(65_536, socket.MSG_PEEK) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return False


def test_an_answer_that_nobody_reads_holds_nothing(impatient: HubProcess) -> None:
    """100 ask for statistics and never read them: the hub has forgotten them soon."""
    files = open_files(impatient)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(contextlib.closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", impatient.port))
            connection.sendall(get("/stats"))
        eventually(lambda: open_files(impatient) <= files + 1, "they are kept", 4.0)


# TLS

SILENCES: dict[str, bytes] = {
    "nothing": b"",
    "half a hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a hub that speaks TLS."""
    made = certificates.make(tmp_path_factory.mktemp("tls"))
    return {"BROADCASTER_HUB__TLS_CERT": made.certificate, "BROADCASTER_HUB__TLS_KEY": made.key}


def tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def dialled_tls(port: int) -> Iterator[ssl.SSLSocket]:
    plain = socket.create_connection(("127.0.0.1", port), timeout=10 * UNIT_S)
    with plain, tls_context().wrap_socket(plain) as connection:
        yield connection


def test_behind_tls_too_a_request_has_its_deadline(steady_redis: RedisServer, tls: dict[str, Any]) -> None:
    """Who has said nothing, or not all of a hello, or half a head, is cut at the deadline, and nothing is left."""
    with HubProcess(steady_redis.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S=str(DEADLINE_S), **tls) as hub:
        hub.said("events get through")
        before = open_files(hub)
        with contextlib.ExitStack() as stack:
            half = stack.enter_context(dialled_tls(hub.port))
            half.sendall(b"GET /ws HTTP/1.1\r\n")
            assert rest(half).startswith(b"HTTP/1.1 408 ")
            silent = {name: stack.enter_context(dialled(hub.port)) for name in SILENCES}
            for name, words in SILENCES.items():
                silent[name].sendall(words)
            for name, connection in silent.items():
                connection.settimeout(DEADLINE_S + 4 * UNIT_S)
                with contextlib.suppress(ConnectionError):
                    try:
                        assert connection.recv(1) == b""
                    except TimeoutError:
                        pytest.fail(f"who has said {name} is kept")
        eventually(lambda: open_files(hub) <= before, "something is kept open", 4.0)
        assert not any(word in hub.output for word in ("Traceback", "Error", "exception")), hub.output


def test_who_never_answers_a_goodbye_of_tls_is_not_kept(steady_redis: RedisServer, tls: dict[str, Any]) -> None:
    """A refused request is gone soon, whether its client closes its end or just stays there."""
    deadline_s = 6 * DEADLINE_S  # ten handshakes of TLS have to fit into it
    with HubProcess(steady_redis.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S=str(deadline_s), **tls) as hub:
        hub.said("events get through")
        before = open_files(hub)
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(dialled_tls(hub.port)).sendall(b"GET /ws HTTP/1.1\r\n")
            eventually(lambda: open_files(hub) >= before + 10, "they are not there")
            eventually(lambda: open_files(hub) <= before, "they are kept", 8.0)


# Talkers

TALKERS = 40


class Bystander:
    """A subscriber that must get everything, and somebody who publishes all the time."""

    def __init__(self, hub: Hub, publish: RedisClient) -> None:
        self._client = RawClient(hub.port)
        self._publish = publish
        self._sent: list[bytes] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for number in itertools.count():
            if self._stop.wait(0.02):
                return
            self._sent.append(event_payload(number))
            self._publish.publish(self._sent[-1])

    def assert_served(self) -> None:
        """It has got every event in order."""
        got: list[bytes] = []
        while len(got) < len(self._sent):
            opcode, payload = self._client.next_frame()
            if opcode == 1 and not read_control(payload):
                got.append(payload)
        assert got == self._sent
        assert got

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while error is None and not self._sent:
            time.sleep(0.01)
        self._stop.set()
        self._thread.join()
        try:
            if error is None:
                self.assert_served()
        finally:
            self._client.socket.close()


def in_one_go(client: RawClient, frame: bytes, count: int) -> None:
    client.socket.sendall(frame * count)


def awaiting_each_pong(client: RawClient, frame: bytes, count: int) -> None:
    """As fast as they are answered."""
    for _ in range(count):
        client.socket.sendall(frame)
        while (answer := client.next_frame()[0]) != 10:
            if answer == 8:
                return


def one_by_one(client: RawClient, frame: bytes, count: int) -> None:
    """Each in a packet of its own: ten times as fast as is allowed."""
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(count):
        client.socket.sendall(frame)
        time.sleep(0.001)


Talk = Callable[[RawClient, bytes, int], None]

PING, TEXT, PONG = client_frame(9, b"hi"), client_frame(1, b"hi"), client_frame(10, b"hi")
TALKS: dict[str, tuple[int, Talk, bytes, int, int | None]] = {
    "pings, as many as allowed": (TALKERS, in_one_go, PING, 100, None),
    "texts, as many as allowed": (TALKERS, in_one_go, TEXT, 100, None),
    "pings in one go": (TALKERS, in_one_go, PING, 300, 1008),
    "texts in one go": (TALKERS, in_one_go, TEXT, 300, 1008),
    "pongs in one go": (TALKERS, in_one_go, PONG, 300, 1008),
    "garbage": (TALKERS, in_one_go, b"\xde\xad\xbe\xef", 300, 1002),
    "texts one by one": (3, one_by_one, TEXT, 300, 1008),
    "pings one by one": (3, awaiting_each_pong, PING, 1000, 1008),
    "pongs one by one": (3, one_by_one, PONG, 300, 1008),
}


@pytest.fixture(scope="module")
def listening(steady_redis: RedisServer) -> Iterator[HubProcess]:
    """A hub that listens to everybody, within limits."""
    with HubProcess(steady_redis.url, BROADCASTER_HUB__CLOSE_TIMEOUT_S="0.5") as hub:
        yield hub.until_ready()
        assert_calm(hub)


@pytest.mark.parametrize(("count", "talk", "frame", "frames", "code"), TALKS.values(), ids=TALKS.keys())
def test_who_talks_too_much_is_closed_and_nobody_else_notices(
    listening: HubProcess, client: RedisClient, count: int, talk: Talk, frame: bytes, frames: int, code: int | None
) -> None:
    """All that are beyond the limit are told 1008, those within it stay, and the hub is as it was before."""
    listening.until_connected(0)
    files, memory, closed = open_files(listening), memory_bytes(listening), listening.stats()["talkers_closed"]
    with Bystander(listening, client), contextlib.ExitStack() as stack:
        talkers = [stack.enter_context(RawClient(listening.port)) for _ in range(count)]
        listening.until_connected(count + 1)
        threads = [threading.Thread(target=suppressed, args=(talk, one, frame, frames)) for one in talkers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if code is None:
            time.sleep(0.1)  # then ten more are allowed
            for talker in talkers:
                talker.send(9, b"last")
                while (answer := talker.next_frame()) != (10, b"last"):
                    assert answer[0] != 8, f"closed: {answer}"
        else:
            assert [closed_with(talker) for talker in talkers] == [code] * count
        assert listening.stats()["talkers_closed"] == closed + (count if code == 1008 else 0)
    listening.until_connected(0)
    eventually(lambda: open_files(listening) <= files + 1, "connections are kept open")
    assert memory_bytes(listening) - memory < 8 * MIB


def closed_with(client: RawClient) -> int | None:
    """The code with which it was closed, or is in the next seconds; None if it is not."""
    deadline = time.monotonic() + 3 * UNIT_S
    while time.monotonic() < deadline:
        if closes := [payload for opcode, payload in client.frames if opcode == 8]:
            return int.from_bytes(closes[0][:2], "big")
        client.next_frame()  # events come all the time
    return None


def suppressed(talk: Talk, client: RawClient, frame: bytes, count: int) -> None:
    with contextlib.suppress(OSError):  # it was closed while it talked
        talk(client, frame, count)


def test_who_keeps_to_the_limit_may_talk_for_ever(listening: Hub) -> None:
    """A client that pings 80 times a second stays, however long it goes on."""
    with RawClient(listening.port) as client:
        began_at = time.monotonic()
        for number in range(130):
            client.send(9, b"%d" % number)
            assert next_but_ping(client) == (10, b"%d" % number)
            time.sleep(max(0.0, began_at + number / 80 - time.monotonic()))


# The limit of open files

FILES = 256


class TightHub(HubProcess):
    """A hub that may open only a few files."""

    def __init__(self, redis_url: str, **variables: str) -> None:
        self.port = free_port()
        Running.__init__(
            self,
            *("bash", "-c", f'ulimit -n {FILES}; exec "$@"', "bash"),
            *(sys.executable, "-m", "broadcaster", "hub"),
            BROADCASTER_REDIS__URL=redis_url,
            BROADCASTER_HUB__PORT=str(self.port),
            **({"BROADCASTER_HUB__DRAIN_S": "0.1"} | variables),
        )

    def __enter__(self) -> TightHub:
        return self


UPGRADE = upgrade_request(0)
CROWDS: dict[str, list[bytes]] = {
    "nothing": [b""],
    "subscribers": [UPGRADE],
    "of every kind": [b"", b"GET /ws HTTP/1.1\r\n", UNFINISHED, UPGRADE, b"\xde\xad\r\n\r\n"],
}


def assert_idle(hub: Running) -> None:
    """It does not turn in a circle while nothing happens."""
    before = cpu_s(hub)
    time.sleep(0.5)
    assert cpu_s(hub) - before < 0.25


@pytest.mark.parametrize("words", CROWDS.values(), ids=CROWDS.keys())
def test_more_connections_than_open_files(
    steady_redis: RedisServer, client: RedisClient, words: list[bytes]
) -> None:
    """500 come where 256 files may be open: refused as the limits say, nobody is harmed, and it serves on."""
    with TightHub(steady_redis.url) as hub, Flood(hub.port) as flood:
        hub.said("events get through")
        before = open_files(hub)
        for _ in range(10):
            flood.grow(*itertools.islice(itertools.cycle(words), 50))
            assert open_files(hub) < FILES
        if UPGRADE not in words:
            eventually(lambda: None not in flood.answers()[:100], "the oldest are kept")
        assert open_files(hub) < FILES
        assert_idle(hub)
        eventually(lambda: flood.count(101) == hub.stats()["connected"], "some have no answer")
        assert hub.get("/health")[0] == 200
        if words == CROWDS["subscribers"]:
            counts = {"full": flood.count(503), "half_open": flood.count(408)}
            assert sum(counts.values()) + flood.count(101) == 500
            assert refused(hub) == {cause: count for cause, count in counts.items() if count}
            assert flood.count(101) > FILES / 3
        else:
            assert gets_in(hub.port)
        flood.leave()
        eventually(lambda: open_files(hub) <= before + 1, "connections are kept open")
        assert_served(hub, client)
        assert_calm(hub)


def test_with_tls_too_a_flood_cannot_take_all_open_files(
    steady_redis: RedisServer, tls: dict[str, Any], tmp_path: Path
) -> None:
    """420 that never begin to speak TLS: once their time is over, others are served again."""
    with (
        TightHub(steady_redis.url, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S=str(DEADLINE_S), **tls) as hub,
        Flood(hub.port) as flood,
    ):
        hub.said("events get through")
        for _ in range(14):
            flood.rush(*[b""] * AT_ONCE)
            time.sleep(0.1)  # the hub takes as many as it can: it says nothing to them, nor they to it

        def answers() -> bool:
            with contextlib.suppress(OSError), dialled_tls(hub.port) as connection:
                connection.settimeout(1 * UNIT_S)
                connection.sendall(get("/health"))
                return b" 200 " in connection.recv(100)
            return False

        assert_idle(hub)
        eventually(answers, "the hub cannot be reached", 5.0)
        assert not any(word in hub.output for word in ("Traceback", "Error", "exception")), hub.output

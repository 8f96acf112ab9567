"""Server-Sent Events: the same events, bounds and promises as over a WebSocket, on an answer of plain HTTP."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from broadcaster import wire
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import LIMITS
from broadcaster.publish.publisher import Publisher
from broadcaster.redis.server import RedisServer
from broadcaster.settings import ChannelsTable, Settings
from broadcaster.wire import CloseCode
from tests.certificates import make
from tests.hub.house import HIGH_WATER, House, Peer, store_by_script
from tests.hub.house import payload as event
from tests.support import (
    UNIT_S,
    Hub,
    HubThread,
    RawClient,
    Reader,
    RedisClient,
    StreamClient,
    assert_calm,
    event_payload,
    eventually,
    frozen,
    in_loop,
    redis_client,
)
from tests.support.event_stream import Sent

STREAM = "text/event-stream"


def read(peer: Peer) -> Reader:
    """What a client was sent."""
    reader = Reader()
    reader.feed(b"".join(peer.socket.writes))
    return reader


def texts(peer: Peer) -> list[bytes]:
    return [sent.data.encode() for sent in read(peer).events if sent.kind == "message"]


def kinds(peer: Peer) -> list[str]:
    return [sent.kind for sent in read(peer).events]


# Framing

BROKEN = [
    ("line feeds", b'{\n"a":1,\n"b":2}', '{\n"a":1,\n"b":2}'),
    ("carriage returns", b'{\r"a":1}', '{\n"a":1}'),
    ("both", b'{\r\n"a":1\n\r}', '{\n"a":1\n\n}'),
    ("at both ends", b'\n\n{"a":1}\r', '\n\n{"a":1}\n'),
    (
        "what looks like an event",
        b"{\n\nevent: gap\ndata: {}\nid: x\n\n}",
        "{\n\nevent: gap\ndata: {}\nid: x\n\n}",
    ),
    ("a colon", b':{"a":1}', ':{"a":1}'),
    ("a space", b' {"a":1}', ' {"a":1}'),
    ("nothing", b"", ""),
    ("other line breaks", '{"a":"\u2028\x85\x0b"}'.encode(), '{"a":"\u2028\x85\x0b"}'),
]


@pytest.mark.parametrize(("payload", "data"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_no_payload_breaks_the_framing(payload: bytes, data: str) -> None:
    """Line breaks are data, whatever stands behind them; the id is the position, or none."""
    reader = Reader()
    reader.feed(wire.sse_event(wire.text_frame(payload), Position("e1", 7)))
    reader.feed(wire.sse_event(wire.text_frame(payload), None))
    assert reader.events == [Sent("message", data, "e1-7")] * 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_in_a_payload_comes_out_as_lines(seed: int) -> None:
    """Any text at all."""
    chance = random.Random(seed)
    for _ in range(50):
        text = "".join(chance.choices(['"', "{", "\n", "\r", ":", " ", "data", "id", "é", "\u2028"], k=12))
        reader = Reader()
        reader.feed(wire.sse_event(wire.text_frame(text.encode()), None))
        assert [sent.data for sent in reader.events] == [text.replace("\r\n", "\n").replace("\r", "\n")]


@in_loop
async def test_the_same_events_as_over_a_websocket() -> None:
    """Live, with their positions as ids; an event that is not stored has none, and the last one stays."""
    house = await House.opened()
    stream, socket = house.stream(), house.connect(v1=True)
    sent = house.publish(3) + house.unstored(1) + house.publish(1, 100_000)
    assert texts(stream) == sent == socket.events()
    assert [event.last_id for event in read(stream).events] == ["e1-0", "e1-1", "e1-2", "e1-3", "e1-3", "e1-4"]
    assert kinds(stream)[0] == "welcome"
    assert house.fanout.deliveries == 10


@in_loop
async def test_line_breaks_between_the_tokens_of_an_event_do_no_harm() -> None:
    """An event of a foreign publisher, written over several lines."""
    house = await House.opened()
    stream = house.stream()
    indented = json.dumps(json.loads(event()), indent=1).replace("\n", "\r\n").encode()
    stored = house.redis.store(indented)
    house.hear([stored])
    [text] = texts(stream)
    assert b"\r" in stored
    assert json.loads(text) == json.loads(stored)


@in_loop
async def test_a_filter_and_a_position_hold() -> None:
    """From the log, from the ring, and live."""
    house = await House.opened(1 << 18, stored=0)
    house.publish(100, 4096)
    since = house.redis.head()
    wanted = house.publish(1, severity="warning")
    house.publish(150, 4096)
    stream = house.stream("since=e1-0&severity=warning")
    late = house.stream(f"since={since}")
    await house.until_live(stream, late)
    wanted += house.publish(1, severity="warning")
    assert house.pages.read > 0
    assert texts(stream) == wanted
    assert len(texts(late)) == 152
    assert [sent.fields["recovered"] for sent in read(late).events[:1]] == [True]
    assert read(late).last_id == read(stream).last_id == "e1-252"


@in_loop
async def test_a_gap_and_a_heartbeat_are_events_of_their_kind() -> None:
    """With the position that a client has then, from which it can resume."""
    house = await House.opened()
    stream = house.stream()
    gone = house.redis.next()
    house.store(1)
    house.fanout.announce(Gap(house.fanout.channel, Cause.EXPIRED, gone.epoch, gone.offset, gone.offset, gone))
    house.be_proven()
    stream.connection.beat()
    assert kinds(stream) == ["welcome", "gap", "beat"]
    _, gap, beat = read(stream).events
    assert (gap.last_id, gap.fields["cause"], gap.fields["first"]) == ("e1-1", "expired", 1)
    assert (beat.last_id, beat.fields["position"]) == ("e1-1", "e1-1")


@in_loop
async def test_a_client_that_is_cut_before_the_gap_of_its_welcome_stays_where_it_was() -> None:
    """A welcome that something is missing moves no position, or a browser would come back behind the gap."""
    house = await House.opened(stored=3)
    stream = house.stream("since=e1-100")
    await house.settle()
    assert kinds(stream) == ["welcome", "gap"]
    welcome, gap = read(stream).events
    assert (welcome.fields["recovered"], welcome.last_id, gap.last_id) == (False, "", "e1-3")


@in_loop
async def test_an_event_is_framed_once_for_all_streams() -> None:
    """They get the same object, beside the WebSockets, which get theirs."""
    house = await House.opened()
    streams = [house.stream() for _ in range(3)]
    plain, agreed = house.connect(), house.connect(deflate=True)
    sent = house.publish(5, 2000)
    assert len({peer.socket.writes[-1] for peer in streams}) == 1
    assert plain.events() == sent == texts(streams[0])
    assert house.context.formats.deflate.made == 5
    assert agreed.socket.writes[-1] != plain.socket.writes[-1]


@in_loop
async def test_who_is_slow_is_fed_from_the_ring_and_closed_like_others() -> None:
    """4008 with the reason, and when to come back; then the stream ends."""
    house = await House.opened(behind_max_ms=1000)
    house.clock.stop()
    slow, patient = house.stream(reads_along=False), house.stream(reads_along=False)
    sent = house.publish(100, 4096)
    assert slow.connection in house.registry.behind
    patient.socket.read_all()
    await house.until_live(patient)
    assert texts(patient) == sent
    house.clock.move(1.5)
    house.timer.tick()
    last = read(slow).events[-1]
    assert (last.kind, last.fields["code"]) == ("close", 4008)
    assert "too slow" in last.fields["reason"]
    assert 1000 <= (read(slow).retry_ms or 0) <= 5000
    assert slow.socket.closing
    assert house.registry.closed[CloseCode.SLOW] == 1
    house.clock.move(10)
    house.timer.tick()
    assert slow.socket.aborted, "it reads nothing, not even its end"


@in_loop
async def test_on_a_channel_that_drops_the_oldest_a_stream_stays() -> None:
    """It can be told: what it loses is a gap in its place."""
    house = await House.opened(behind_max_events=20, channels=ChannelsTable(drop_oldest=("events.*",)))
    slow = house.stream(reads_along=False)
    house.publish(3 * HIGH_WATER // 4096, 4096)
    house.publish(60, 4096)
    slow.socket.read_all()
    await house.until_live(slow)
    assert "gap" in kinds(slow)
    offsets = [sent.fields["offset"] for sent in read(slow).events if sent.kind == "message"]
    told = [
        range(sent.fields["first"], sent.fields["last"] + 1) for sent in read(slow).events if sent.kind == "gap"
    ]
    assert sorted([*offsets, *(offset for gap in told for offset in gap)]) == list(range(1, house.count + 1))


@in_loop
async def test_a_comment_comes_every_15_seconds_and_no_ping() -> None:
    """However silent it is, and whatever the interval of pings; it needs no sign of life."""
    for interval in (1, 20, 60):
        house = await House.opened(ping_interval_s=interval)
        stream = house.stream()
        for _ in range(600):
            house.timer.tick()
        assert read(stream).comments == 4
        assert not stream.connection.closing
        assert b"\x89\x00" not in b"".join(stream.socket.writes)
    assert LIMITS.comment_every_s == 15


@in_loop
async def test_who_talks_is_closed_for_good() -> None:
    """Nothing may follow the request; the id of the close says that it must not come back."""
    house = await House.opened()
    stream, careless = house.stream(), house.stream()
    careless.connection.data_received(b"\r\n")
    assert not careless.connection.closing
    stream.connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
    assert read(stream).events[-1].fields["code"] == 1008
    assert read(stream).last_id == "!1008"
    assert house.registry.closed[CloseCode.POLICY] == 1


@in_loop
async def test_what_is_over_is_forgotten() -> None:
    """Nothing of a stream stays, however it has ended."""
    house = await House.opened()
    for end in ("left", "closed", "half-closed"):
        stream = house.stream()
        if end == "closed":
            stream.connection.close(CloseCode.RESTART, "bye")
        elif end == "half-closed":
            assert not stream.connection.eof_received()
        stream.connection.connection_lost(None)
    assert (house.registry.connected, house.registry.by_format["sse"]) == (0, 0)
    assert (house.registry.opened, house.registry.left, house.registry.closed.total()) == (3, 2, 1)
    assert house.channel().listeners == 0
    assert len(house.fanout._audiences) == 1


# On real sockets


class Scene:
    """A hub, and one who publishes."""

    def __init__(self, hub: Hub, publish: RedisClient) -> None:
        self.hub = hub
        self.publish = publish
        self.port = hub.port
        self.count = 0

    def store(self) -> str:
        """Store and publish the next event; its position."""
        self.count += 1
        return store_by_script(self.publish, event(self.count))[0]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with (
        RedisServer.start() as server,
        redis_client(server) as publish,
        HubThread(
            server.url,
            BROADCASTER_HUB__BEAT_INTERVAL_S="0.1",
            BROADCASTER_HUB__ALLOWED_ORIGINS='["https://wall.example"]',
            BROADCASTER_HUB__MAX_CONNECTIONS="5",
        ) as hub,
    ):
        hub.until_ready()
        yield Scene(hub, publish)
        hub.until_connected(0)
        assert_calm(hub)


def test_a_stream_begins_at_once_and_is_delimited_by_its_end(scene: Scene) -> None:
    """No length, nothing in chunks, nothing that a proxy might keep or collect; also for HTTP/1.0."""
    for version in ("1.0", "1.1"):
        with StreamClient(scene.port, version=version) as client:
            assert (client.status, client.headers["content-type"]) == (200, STREAM)
            assert client.headers["x-accel-buffering"] == "no"
            assert client.headers["connection"] == "close"
            assert "no-store" in client.headers["cache-control"]
            assert not {"content-length", "transfer-encoding"} & client.headers.keys()
            client.until("welcome")
            assert 1000 <= (client.reader.retry_ms or 0) <= 5000
            position = scene.store()
            [sent] = client.until("message")
            assert sent.last_id == position
            client.until("beat", 2)
            assert scene.hub.stats()["formats"] == {"plain": 0, "deflate": 0, "sse": 1}
        scene.hub.until_connected(0)


def test_who_comes_back_goes_on_after_the_last_id(scene: Scene) -> None:
    """`Last-Event-ID` stands above the `since` of the URL, which a browser sends again; nothing lost or twice."""
    first, number = scene.store(), scene.count
    with StreamClient(scene.port, f"?since={first}") as client:
        assert client.until("welcome")[0].fields["recovered"] is True
        scene.store()
        [sent] = client.until("message")
    scene.store()
    scene.store()
    query = f"?_=1&since={first}&channel=events.critical&severity=critical"
    for url in (f"?since={first}", "", "?last=1", query.replace(f"since={first}&", "")):
        with StreamClient(scene.port, url, f"Last-Event-ID: {sent.last_id}") as client:
            assert [event.fields["sequence"] for event in client.until("message", 2)] == [
                number + 2,
                number + 3,
            ]
            assert client.reader.events[0].fields["recovered"] is True
    with StreamClient(scene.port, f"?since={first}", "Last-Event-ID: ") as client:
        assert client.until("message", 3)[0].fields["sequence"] == number + 1


NO_POSITION = "Last-Event-ID: a position is <epoch>-<offset>"
REFUSED: list[tuple[str, tuple[str, ...], int, str]] = [
    ("?since=x", (), 400, "since is a position"),
    ("?channel=events.a&channel=events.b", (), 400, "more than 1 channel"),
    ("?channels=events.a", (), 400, "unknown query parameter 'channels'"),
    ("?severity=low", (), 400, "severity is one of"),
    ("?source=%zz", (), 400, "a % in the query"),
    ("?channel=other", (), 404, "no such channel here: other"),
    ("", ("Last-Event-ID: 17",), 400, NO_POSITION),
    ("", ("Last-Event-ID: é",), 400, NO_POSITION),
    ("", ("Last-Event-ID: e1-1", "Last-Event-ID: e1-1"), 400, "Last-Event-ID is given twice"),
    ("", ("Accept: text/html, application/json",), 406, "Accept"),
    ("", ("Accept: text/event-stream;q=0, */*",), 406, "Accept"),
    ("", ("Origin: https://evil.example",), 403, "origin"),
    ("", ("Origin: null",), 403, "origin"),
    ("", ("-Host: evil.example:8765",), 403, "origin"),
    ("", ("-Host: 127.0.0.1.evil.example",), 403, "origin"),
    ("", ("-Host: a..b",), 403, "origin"),
    ("", ("Content-Length: 3",), 400, "with a body"),
    ("", ("Transfer-Encoding: chunked",), 400, "with a body"),
    ("", ("Upgrade: websocket", "Connection: Upgrade"), 400, "/ws"),
    ("", ("nonsense",), 400, "no HTTP request"),
    ("", ("X-Note : a",), 400, "no HTTP request"),
    ("", ("Host: two",), 400, "bad request"),
    ("", tuple(f"X-{number}: a" for number in range(200)), 431, "headers"),
    ("", ("Cookie: " + "x" * 9000,), 431, "headers"),
    ("?type=" + "x" * 9000, (), 414, "URL"),
    ("", ("Cookie: " + "x" * 8000, "Other: " + "x" * 8000, "Third: x" + "x" * 8000), 431, "head of the request"),
]


@pytest.mark.parametrize(("query", "headers", "status", "said"), REFUSED)
def test_a_wrong_request_is_told_what_is_wrong(
    scene: Scene, query: str, headers: tuple[str, ...], status: int, said: str
) -> None:
    """JSON with one sentence, before any stream begins; counted."""
    before = sum(scene.hub.stats()["refused"].values())
    with StreamClient(scene.port, query, *headers) as client:
        assert (client.status, said in client.error) == (status, True), client.error
    assert sum(scene.hub.stats()["refused"].values()) == before + 1


ACCEPTED = ["text/event-stream", "*/*", "text/*", "TEXT/Event-Stream; q=0.5", "text/html, */*;q=0.1", ""]


@pytest.mark.parametrize("accept", ACCEPTED)
def test_whoever_accepts_a_stream_gets_one(scene: Scene, accept: str) -> None:
    """By its own name or another one that means it; `curl` says */*."""
    with StreamClient(scene.port, "", *([f"Accept: {accept}"] if accept else [])) as client:
        assert client.status == 200
        client.until("welcome")
    scene.hub.until_connected(0)


def test_other_methods(scene: Scene) -> None:
    """HEAD is a stream's head and OPTIONS what there is; nothing else is taken."""
    with StreamClient(scene.port, method="HEAD") as client:
        assert (client.status, client.headers["content-type"]) == (200, STREAM)
        assert client.socket.recv(100) == b""
    with StreamClient(scene.port, "?since=x", method="HEAD") as client:
        assert client.status == 400
    with StreamClient(scene.port, method="OPTIONS") as client:
        assert (client.status, client.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
    for method in ("POST", "PUT", "DELETE", "BREW"):
        with StreamClient(scene.port, method=method) as client:
            assert (client.status, client.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
            assert client.error == "/sse takes GET, HEAD, OPTIONS"
    assert scene.hub.stats()["connected"] == 0


def test_a_page_of_an_allowed_site_may_read_it(scene: Scene) -> None:
    """As it may connect over /ws; also its refusals; and it is told which headers it may send."""
    ours = "Origin: https://wall.example"
    with StreamClient(scene.port, "", ours) as client:
        assert client.headers["access-control-allow-origin"] == "https://wall.example"
        assert client.headers["vary"] == "Origin"
        client.until("welcome")
    with StreamClient(scene.port, "?since=x", ours) as client:
        assert (client.status, client.headers["access-control-allow-origin"]) == (400, "https://wall.example")
    with StreamClient(scene.port, "", ours, "Access-Control-Request-Method: GET", method="OPTIONS") as client:
        assert client.status == 204
        assert client.headers["access-control-allow-origin"] == "https://wall.example"
        assert "GET" in client.headers["access-control-allow-methods"]
        assert {"Authorization", "Last-Event-ID"} <= set(
            client.headers["access-control-allow-headers"].split(", ")
        )
    with StreamClient(scene.port, "", "Origin: https://evil.example", method="OPTIONS") as client:
        assert client.status == 403
        assert "access-control-allow-origin" not in client.headers
    with StreamClient(scene.port, "", f"Origin: http://127.0.0.1:{scene.port}", "Host: x") as client:
        assert client.status == 400  # two Hosts
    scene.hub.until_connected(0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8765", "wall.example", "WALL.example:443"])
def test_the_page_of_a_known_host_needs_no_origin(scene: Scene, host: str) -> None:
    """A browser sends none to the page itself. A name that was made to point here (DNS rebinding) is not ours."""
    with StreamClient(scene.port, "", f"-Host: {host}") as client:
        assert client.status == 200
        assert "access-control-allow-origin" not in client.headers
    scene.hub.until_connected(0)


def test_who_was_closed_for_good_is_sent_away(scene: Scene) -> None:
    """204 is the end for a browser, which comes back by itself with the id of the close."""
    with StreamClient(scene.port) as client:
        client.until("welcome")
        client.socket.sendall(b"hello")
        *_, last = client.to_end()
        assert (last.kind, last.fields["code"], last.last_id) == ("close", 1008, "!1008")
    with StreamClient(scene.port, "", f"Last-Event-ID: {last.last_id}") as client:
        assert client.status == 204
        assert client.socket.recv(100) == b""
    scene.hub.until_connected(0)


def test_streams_and_websockets_are_counted_together(scene: Scene) -> None:
    """`hub.max_connections` is for both; one more is 503, and when to try again."""
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(StreamClient(scene.port))
        for _ in range(2):
            stack.enter_context(RawClient(scene.port))
        scene.hub.until_connected(5)
        more = stack.enter_context(StreamClient(scene.port))
        assert (more.status, more.headers["retry-after"], more.error) == (503, "5", "too many subscribers")
        assert scene.hub.stats()["formats"] == {"plain": 2, "deflate": 0, "sse": 3}
    scene.hub.until_connected(0)


def test_a_token_is_taken_from_the_header_only(redis: RedisServer) -> None:
    """Without one 401, with a good one the channels of its bearer."""
    keys = json.dumps([{"name": "wall", "key": "wall-key_0123456789", "subscribe": ["events.critical"]}])
    with HubThread(redis.url, BROADCASTER_AUTH__MODE="token", BROADCASTER_AUTH__API_KEYS=keys) as hub:
        port = hub.until_ready().port
        with StreamClient(port) as client:
            assert (client.status, client.headers["www-authenticate"]) == (401, "Bearer")
            assert client.error == "access denied: missing"
        with StreamClient(port, "?access_token=wall-key_0123456789") as client:
            assert client.status == 401
        bearer = "Authorization: Bearer wall-key_0123456789"
        with StreamClient(port, "?channel=events.info", bearer) as client:
            assert (client.status, client.error) == (403, "not for you: events.info")
        for host in ("-Host: 127.0.0.1", "-Host: hub.example"):
            with StreamClient(port, "", bearer, host) as client:
                client.until("welcome")
        hub.until_connected(0)


def test_a_hub_that_stops_drains_its_streams(redis: RedisServer) -> None:
    """They are told when to come back, and closed with what a WebSocket sees as 1012."""
    with HubThread(redis.url, BROADCASTER_HUB__DRAIN_S="0.3") as hub, contextlib.ExitStack() as stack:
        port = hub.until_ready().port
        clients = [stack.enter_context(StreamClient(port)) for _ in range(5)]
        hub.until_connected(5)
        hub.signal(signal.SIGTERM)
        for client in clients:
            welcome, *others, close = client.to_end()
            assert "drain" in [sent.kind for sent in others]
            assert (close.kind, close.fields["code"], close.last_id) == ("close", 1012, welcome.last_id)
        assert hub.wait() == 0


def test_a_real_socket_that_is_full_ends_in_time(redis: RedisServer) -> None:
    """4008 cannot be read by who reads nothing: it is cut; a reader beside it gets everything."""
    with (
        HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="1000", BROADCASTER_HUB__CLOSE_TIMEOUT_S="0.3") as hub,
        redis_client(redis) as publish,
        StreamClient(hub.until_ready().port) as reader,
        StreamClient(hub.port) as stuck,
    ):
        hub.until_connected(2)
        payload = event_payload(data={"text": "x" * 60_000})
        for number in range(200):  # more than the sockets of who reads nothing hold
            publish.publish(payload)
            assert len(reader.until("message", number + 1)) == number + 1
        eventually(lambda: hub.stats()["connected"] == 1, "it is still there")
        assert hub.stats()["slow_closed"] == 1
        stuck.socket.close()
        assert_calm(hub)


def test_nothing_may_come_with_the_request(scene: Scene) -> None:
    """It may be smuggled through a proxy."""
    with StreamClient(scene.port, "", "", "more bytes") as client:
        assert (client.status, client.error) == (400, "there are bytes after the request")


@in_loop
async def test_the_library_publishes_what_a_stream_brings(redis: RedisServer) -> None:
    """From `Publisher` to a stream: the id is the position that the publisher was told."""
    with HubThread(redis.url) as hub, StreamClient(hub.until_ready().port) as client:
        client.until("welcome")
        settings = Settings.model_validate({"redis": {"url": redis.url}})
        async with Publisher(settings) as publisher:
            published = await publisher.publish("A", "b", data={"text": "é\r\n\n"})
        [sent] = client.until("message")
        assert sent.last_id == str(published.position)
        assert sent.fields["data"] == {"text": "é\r\n\n"}


def test_a_client_may_be_behind_for_ever(redis: RedisServer) -> None:
    """As many milliseconds as a setting can say, which are more than the system can be told."""
    with HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS=str(2**31 - 1)) as hub:
        with StreamClient(hub.until_ready().port) as client:
            assert client.until("welcome")
        assert_calm(hub)


def test_a_stream_over_tls(redis: RedisServer, tmp_path: Path) -> None:
    """Encrypted, live and drained as any other."""
    certificates = make(tmp_path)
    tls = ssl.create_default_context(cafile=certificates.authority)
    with (
        HubThread(
            redis.url,
            BROADCASTER_HUB__TLS_CERT=certificates.certificate,
            BROADCASTER_HUB__TLS_KEY=certificates.key,
        ) as hub,
        redis_client(redis) as publish,
        contextlib.ExitStack() as stack,
    ):
        hub.said("ready: ")
        client = stack.enter_context(StreamClient(hub.port, tls=tls))
        client.until("welcome")
        payload = event_payload(data={"text": "x" * 50_000})
        for _ in range(20):
            publish.publish(payload)
        assert {sent.data.encode() for sent in client.until("message", 20)} == {payload}
        hub.signal(signal.SIGTERM)
        assert client.to_end()[-1].fields["code"] == 1012
        assert hub.wait() == 0


def test_a_frozen_redis_silences_the_heartbeats_of_a_stream(redis: RedisServer) -> None:
    """As over a WebSocket: no `beat` says that all is well when nobody knows."""
    with (
        HubThread(
            redis.url, BROADCASTER_HUB__BEAT_INTERVAL_S="0.1", BROADCASTER_HUB__PROVE_INTERVAL_S="0.1"
        ) as hub,
        StreamClient(hub.until_ready().port) as client,
    ):
        client.until("beat", 3)
        with frozen(redis):
            eventually(lambda: not hub.stats()["ready"], "it does not notice")
            before = len(client.until("beat"))
            client.socket.settimeout(0.5 * UNIT_S)
            with contextlib.suppress(TimeoutError):
                while client.read():
                    pass
            assert len(client.until("beat")) <= before + 20
        client.socket.settimeout(10 * UNIT_S)
        client.until("beat", len(client.until("beat")) + 1)

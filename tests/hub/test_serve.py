"""The hub as a process: when it is ready, what it counts, how it starts, refuses to, and ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from broadcaster.core.event import CAUSES
from broadcaster.core.version import VERSION
from broadcaster.hub.connections.admission import REFUSALS
from broadcaster.hub.stats import ChannelStatistics, HubStatistics
from broadcaster.redis.server import RedisServer
from tests.hub.house import store_by_script
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    client_frame,
    crashed,
    event_payload,
    eventually,
    free_port,
    next_but_ping,
    unstamped,
    upgrade_request,
)

# Health


def test_ready_follows_redis_and_live_does_not() -> None:
    """503 before Redis is there, 200 while events get through, 503 after it is gone; live is always 200."""
    port = free_port()

    def readiness(hub: Hub) -> tuple[int, bool]:
        code, body = hub.get("/health/ready")
        assert hub.get("/health")[0] == code
        assert hub.get("/health/live") == (200, {"live": True})
        assert set(body) == {"ready", "redis", "stopping", "trouble"}
        assert hub.stats()["ready"] == body["ready"]
        assert bool(body["trouble"]) != body["ready"]
        assert body["stopping"] is False
        assert body["redis"] or not body["ready"]
        return code, body["ready"]

    with HubThread(f"redis://127.0.0.1:{port}/0") as hub:
        eventually(lambda: hub.get("/health/live")[0] == 200, "the hub did not start without Redis")
        assert readiness(hub) == (503, False)
        with RedisServer.start(port) as server:
            hub.until_ready()
            assert readiness(hub) == (200, True)
            with crashed(server) as revive:
                eventually(lambda: hub.get("/health/ready")[0] == 503, "still ready without Redis")
                assert readiness(hub) == (503, False)
                revive()
                hub.until_ready()
                assert readiness(hub) == (200, True)
                assert_calm(hub)


# Statistics


def test_every_counter_is_exact(redis: RedisServer, publish: RedisClient) -> None:
    """Events, deliveries, bytes, refusals and subscribers are counted one by one."""
    with HubProcess(redis.url) as hub, contextlib.ExitStack() as stack:
        hub.until_ready()
        clients = [stack.enter_context(RawClient(hub.port)) for _ in range(2)]
        clients.append(stack.enter_context(RawClient(hub.port, subprotocol="broadcaster.v1")))
        hub.until_connected(3)
        payloads = [event_payload(number) for number in range(4)] + [event_payload(4, data={"text": "x" * 70})]
        for payload in payloads:
            assert publish.publish(payload) == 1
        for payload in (
            b"nonsense",
            b"[]",
            b"\xff",
            event_payload(severity="bad"),
            event_payload(source=""),
            b"{}",
        ):
            publish.publish(payload)
        for client in clients:
            while client.event().get("sequence") != 4:
                pass
        clients[0].vanish()
        hub.until_connected(2)
        frames = sum(len(payload) + (2 if len(payload) < 126 else 4) for payload in payloads)

        stats = eventually(
            lambda: (s := hub.stats())["invalid"]["field"] == 3 and s, f"not counted: {hub.stats()}"
        )
        uptime = stats.pop("uptime_s")
        assert 0 < uptime < 60 * UNIT_S
        assert stats.pop("proofs") >= 1
        channels = stats.pop("channels")
        assert list(channels) == ["events.critical"]
        position = channels["events.critical"].pop("position")
        assert position.endswith("-0"), "nothing was stored"
        assert channels["events.critical"] == {
            "trouble": "",
            "listeners": 2,
            "behind": 0,
            "received": 5,
            "recovered": 0,
            "twins": 0,
            "forged": 0,
            "gaps": {},
            "deliveries": 15,
            "filtered": 0,
            "sent_bytes": 3 * frames,
            "shed": {},
            "resumed": 0,
            "resumed_whole": 0,
            "ring_bytes": frames,
        }
        assert stats == {
            "name": f"{socket.gethostname()}:{hub.port}#1",
            "address": f"http://127.0.0.1:{hub.port}",
            "version": VERSION,
            "pid": hub.process.pid,
            "ready": True,
            "stopping": False,
            "trouble": "",
            "channel": "events.critical",
            "connected": 2,
            "formats": {"plain": 2, "deflate": 0, "sse": 0},
            "ending": 0,
            "peak": 3,
            "opened": 3,
            "left": 1,
            "closed": {},
            "behind": 0,
            "recovered": 0,
            "twins": 0,
            "forged": 0,
            "gaps": {},
            "resumed": 0,
            "resumed_whole": 0,
            "events_received": 5,
            "invalid": dict.fromkeys(CAUSES, 0) | {"not_json": 1, "not_object": 1, "not_utf8": 1, "field": 3},
            "deliveries": 15,
            "filtered": 0,
            "sent_bytes": 3 * frames,
            "compressed": 0,
            "pages_read": 0,
            "ring_bytes": frames,
            "shed": 0,
            "published": 0,
            "refused": dict.fromkeys(REFUSALS, 0),
            "slow_closed": 0,
            "talkers_closed": 0,
            "ping_timeouts": 0,
            "expired": 0,
            "aborted": 0,
            "redis_reconnects": 0,
            "redis_node": "",
            "redis_moves": 0,
            "redis_moved": "",
        }


def test_stats_show_every_counter_there_is(hub: Hub) -> None:
    """`/stats` is the statistics of the hub, field by field, and time passes in it."""
    stats = hub.stats()
    assert set(stats) == set(HubStatistics.__dataclass_fields__)
    eventually(lambda: hub.stats()["uptime_s"] > stats["uptime_s"], "the uptime stands still")


def test_the_channels_stand_in_the_statistics(hub: Hub, publish: RedisClient) -> None:
    """Per open channel, field by field; filtered, refused, twins, forged and told are counted apart."""
    path = "/ws?channel=events.critical&channel=events.audit"
    with (
        RawClient(hub.port, path=path) as both,
        RawClient(hub.port, path="/ws?severity=info") as filtering,
        RawClient(hub.port, path="/ws?since=zz-5", subprotocol="broadcaster.v1") as v1,
    ):
        hub.until_connected(3)
        assert v1.event()["control"] == "welcome"
        assert v1.event()["control"] == "gap"
        eventually(lambda: hub.stats()["channels"].get("events.audit", {}).get("position"), "it was not opened")
        payloads = [event_payload(n, severity="info" if n % 2 else "critical") for n in range(4)]
        positions = [store_by_script(publish, payload)[0] for payload in payloads]
        stored = [both.text() for _ in payloads]
        assert [filtering.event()["sequence"] for _ in range(2)] == [1, 3]
        store_by_script(publish, event_payload(9), "events.audit")
        assert both.event()["sequence"] == 9
        publish.publish(stored[0].encode())
        publish.publish(stored[0].replace('"offset":1', '"offset":77').encode())
        assert [v1.event()["sequence"] for _ in payloads] == [0, 1, 2, 3]
        stats = eventually(
            lambda: (s := hub.stats())["channels"]["events.critical"]["forged"] and s, "the forged one not counted"
        )
        critical, audit = stats["channels"]["events.critical"], stats["channels"]["events.audit"]
        assert set(critical) == set(audit) == set(ChannelStatistics.__dataclass_fields__)
        shown = {key: critical[key] for key in ("position", "listeners", "received", "twins", "forged", "gaps")}
        assert shown == {
            "position": positions[-1],
            "listeners": 3,
            "received": 6,
            "twins": 1,
            "forged": 1,
            "gaps": {},
        }
        assert (critical["deliveries"], critical["filtered"]) == (10, 2)
        assert (critical["resumed"], critical["resumed_whole"], critical["recovered"]) == (1, 0, 0)
        assert (audit["listeners"], audit["received"], audit["deliveries"], audit["filtered"]) == (1, 1, 1, 0)
        assert (stats["deliveries"], stats["filtered"], stats["events_received"]) == (11, 2, 7)
        assert stats["ring_bytes"] == critical["ring_bytes"] + audit["ring_bytes"]


def test_stored_events_pass_as_they_are_stored(hub: Hub, publish: RedisClient) -> None:
    """Channel, epoch and offset in front, then the bytes of the publisher, the same for everybody."""
    payload = event_payload(3, note="unknown field", data={"text": "Süd 🔥"})
    with RawClient(hub.port) as plain, RawClient(hub.port, subprotocol="broadcaster.v1") as v1:
        hub.until_connected(2)
        welcome = v1.event()
        position, heard = store_by_script(publish, payload)
        epoch = position.partition("-")[0]
        assert heard == 1
        assert welcome["position"] == f"{epoch}-0"
        front = f'{{"channel":"events.critical","epoch":"{epoch}","offset":1,'
        text = plain.text()
        assert unstamped(text.encode()).decode() == front + payload.decode()[1:]
        assert v1.text() == text


def test_events_pass_as_they_are(hub: Hub, publish: RedisClient) -> None:
    """A subscriber gets the very bytes that were published, in their order, one text frame per event."""
    payloads = [
        event_payload(1, note="unknown field"),
        b" \n" + event_payload(2) + b"\n",
        json.dumps(json.loads(event_payload(3)), indent=2).encode(),
        json.dumps(json.loads(event_payload(4, source="Süd 🔥")), ensure_ascii=False).encode(),
        event_payload(5, data={"text": "x" * 65_000}),
    ]
    with RawClient(hub.port) as client, connect(hub.url, compression=None, proxy=None) as stock:
        hub.until_connected(2)
        for payload in payloads:
            publish.publish(payload)
        assert [client.text().encode() for _ in payloads] == payloads
        assert [stock.recv(timeout=5 * UNIT_S) for _ in payloads] == [payload.decode() for payload in payloads]


# Two hubs


def test_a_hub_starts_without_its_source(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sanic guesses from a handler's source what it answers, and fails at that where two hubs start at once."""

    def parse(source: str) -> None:
        raise AssertionError(f"parsed: {source}")

    monkeypatch.setattr("sanic.mixins.routes.parse", parse)
    with HubThread(redis.url) as hub:
        hub.until_ready()


def test_two_hubs_give_the_same_positions_and_one_can_go_on_at_the_other(
    hub: Hub, redis: RedisServer, publish: RedisClient
) -> None:
    """What one hub has given, the other one knows: nothing is missing, and nothing comes twice."""
    with HubThread(redis.url) as other:
        other.until_ready()
        with RawClient(hub.port) as here, RawClient(other.port) as there:
            hub.until_connected(1)
            other.until_connected(1)
            sent = [store_by_script(publish, event_payload(n))[0] for n in range(20)]
            given = [here.text() for _ in sent]
            assert [there.text() for _ in sent] == given
            publish.publish(event_payload(99))
            assert here.event()["sequence"] == there.event()["sequence"] == 99
        for number, hub_then in ((5, other), (12, hub)):
            with RawClient(hub_then.port, path=f"/ws?since={sent[number]}", subprotocol="broadcaster.v1") as back:
                welcome = back.event()
                assert (welcome["position"], welcome["recovered"]) == (sent[number], True)
                # The one that was not stored stands in the ring, too: it comes with the rest.
                assert [back.text() for _ in given[number + 1 :]] == given[number + 1 :]


def test_a_hub_that_is_started_anew_gives_what_was_published_before(
    redis: RedisServer, publish: RedisClient
) -> None:
    """It has seen nothing of it, and reads it from the log; who comes without a position begins now."""
    with HubThread(redis.url) as first:
        first.until_ready()
        sent = [store_by_script(publish, event_payload(n))[0] for n in range(300)]
    with HubThread(redis.url, first.port) as second:
        second.until_ready()
        path = f"/ws?since={sent[9]}"
        with RawClient(second.port, path=path) as back, RawClient(second.port) as newcomer:
            second.until_connected(2)
            assert [back.event()["sequence"] for _ in range(290)] == list(range(10, 300))
            store_by_script(publish, event_payload(300))
            assert back.event()["sequence"] == newcomer.event()["sequence"] == 300
            assert second.stats()["pages_read"] == 2


# The limit of connections


def rest_of(client: RawClient) -> bytes:
    """What follows the head of a refusal, until the hub closes."""
    body = client._buffer
    while more := client.socket.recv(65_536):
        body += more
    return body


def test_connections_beyond_the_limit_are_told_to_come_later(redis: RedisServer) -> None:
    """The limit answers 503 with Retry-After, keeps whom it has, and lets in the next one when one leaves."""
    with HubThread(redis.url, BROADCASTER_HUB__MAX_CONNECTIONS="2") as hub:
        hub.until_ready()
        with RawClient(hub.port) as first, RawClient(hub.port) as second:
            hub.until_connected(2)
            for _ in range(3):
                with RawClient(hub.port) as third:
                    assert third.response.startswith(b"HTTP/1.1 503 ")
                    assert b"\r\nRetry-After: 5" in third.response
                    assert b"too many subscribers" in rest_of(third)
            assert hub.get("/health/ready")[0] == 200
            for client in (first, second):
                client.send(9)
                assert next_but_ping(client) == (10, b"")
            first.send(8, b"\x03\xe8")
            hub.until_connected(1)
            with RawClient(hub.port) as fourth:
                assert fourth.response.startswith(b"HTTP/1.1 101 ")
                hub.until_connected(2)
        assert_calm(hub)


def test_the_limits_of_channels(redis: RedisServer) -> None:
    """Too many channels of one connection are 400, too many open ones 503, others than allowed 404."""
    limits: dict[str, Any] = {
        "BROADCASTER_CHANNELS__MAX_OPEN": "3",
        "BROADCASTER_CHANNELS__MAX_PER_CONNECTION": "2",
        "BROADCASTER_CHANNELS__ALLOW": '["*"]',
        "BROADCASTER_CHANNELS__LINGER_S": "0.2",
    }
    with HubThread(redis.url, **limits) as hub:
        hub.until_ready()

        def refused(path: str) -> bytes:
            with RawClient(hub.port, path=path) as client:
                return client.response.split(b"\r\n")[0] + b" " + rest_of(client)

        assert b" 400 " in refused("/ws?channel=a&channel=b&channel=c")
        assert b" 404 " in refused("/ws?channel=broadcaster.hub.0123456789abcdef")
        with RawClient(hub.port, path="/ws?channel=a&channel=b") as client:
            assert client.response.startswith(b"HTTP/1.1 101 ")
            with RawClient(hub.port, path="/ws?channel=c") as further:
                assert further.response.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nRetry-After: 5" in further.response
            with RawClient(hub.port, path="/ws?channel=a&channel=events.critical") as welcome:
                assert welcome.response.startswith(b"HTTP/1.1 101 ")
        eventually(lambda: list(hub.stats()["channels"]) == ["events.critical"], "they were not closed")
        with RawClient(hub.port, path="/ws?channel=c") as further:
            assert further.response.startswith(b"HTTP/1.1 101 ")
        assert_calm(hub)


def test_opening_channels_does_not_turn_the_hub_red(redis: RedisServer) -> None:
    """A channel that has just been opened is not expected to be there yet."""
    quick: dict[str, Any] = {"BROADCASTER_HUB__PROVE_INTERVAL_S": "0.02"}
    with HubThread(redis.url, **quick) as hub:
        hub.until_ready()
        for number in range(30):
            with RawClient(hub.port, path=f"/ws?channel=events.{number}", subprotocol="broadcaster.v1") as client:
                assert client.event()["control"] == "welcome"
                assert hub.get("/health/ready")[1]["trouble"] == ""
        assert not any("not ready" in line for line in hub.lines), hub.output


# The end


def stops_within(hub: Hub, seconds: float, number: signal.Signals = signal.SIGTERM) -> int:
    """The exit code after a signal; fails when it took longer."""
    started = time.monotonic()
    hub.signal(number)
    code = hub.wait(seconds + 5)
    assert time.monotonic() - started < seconds * UNIT_S
    assert "Traceback" not in hub.output, hub.output
    assert "Error" not in hub.output, hub.output
    return code


ENDS = [("SIGTERM", signal.SIGTERM, 0), ("Ctrl-C", signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), [case[1:] for case in ENDS], ids=[case[0] for case in ENDS])
def test_everybody_is_told_of_the_restart(hub_process: HubProcess, number: signal.Signals, code: int) -> None:
    """The end is a close 1012 for every subscriber, whatever it speaks, and an orderly exit."""
    with (
        RawClient(hub_process.port) as plain,
        RawClient(hub_process.port, subprotocol="broadcaster.v1") as v1,
        connect(hub_process.url, compression=None, proxy=None) as stock,
        ThreadPoolExecutor() as threads,
    ):
        hub_process.until_connected(3)
        waiting = threads.submit(stock.recv, timeout=10 * UNIT_S)
        hub_process.signal(number)
        for client in (plain, v1):
            assert client.close_code() == 1012
            client.send(8, b"\x03\xf4")
        closed = waiting.exception()
        assert isinstance(closed, ConnectionClosed)
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1012
        assert hub_process.wait(4) == code
    assert "Traceback" not in hub_process.output


def test_a_hub_without_redis_ends_as_well() -> None:
    """Between two attempts, or in the middle of one."""
    with HubThread(f"redis://127.0.0.1:{free_port()}/0") as hub:
        eventually(lambda: hub.get("/health/live")[0] == 200, "the hub did not start")
        with RawClient(hub.port) as client:
            hub.signal(signal.SIGTERM)
            assert client.close_code() == 1012
        assert hub.wait(2) == 0


@contextlib.contextmanager
def stuck(hub: Hub, publish: RedisClient) -> Iterator[None]:
    """Somebody of every kind who will not leave: silent, with a full socket, half a head, half a body."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(RawClient(hub.port))
        full = stack.enter_context(RawClient(hub.port, receive_buffer=4096))
        full.socket.settimeout(None)
        hub.until_connected(2)
        while not hub.stats()["behind"]:
            for number in range(20):
                publish.publish(event_payload(number, data={"text": "x" * 60_000}))
        for words in (b"", b"GET /ws HTTP/1.1\r\n", b"POST /stats HTTP/1.1\r\nContent-Length: 9\r\n\r\n"):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", hub.port)))
            connection.sendall(words)
        broken = stack.enter_context(RawClient(hub.port))
        broken.socket.sendall(client_frame(1, b"\xff"))
        yield


def test_nobody_can_keep_the_hub_from_ending(hub_process: HubProcess, publish: RedisClient) -> None:
    """SIGTERM ends the hub within 4 s, exit code 0, whoever does not read, answer or finish."""
    with stuck(hub_process, publish):
        assert stops_within(hub_process, 4.0) == 0


def test_two_signals_are_one(hub_process: HubProcess) -> None:
    """A second SIGTERM, as a shell and honcho may both send one, changes nothing."""
    with RawClient(hub_process.port) as client:
        hub_process.until_connected(1)
        hub_process.signal(signal.SIGTERM)
        assert client.close_code() == 1012
        hub_process.signal(signal.SIGTERM)
        client.send(8, b"\x03\xf4")
        assert hub_process.wait(4) == 0
    assert "Traceback" not in hub_process.output


def test_while_it_ends_nobody_is_let_in(redis: RedisServer) -> None:
    """From SIGTERM on no new subscriber is admitted, also on a connection that was open before."""
    with HubThread(redis.url) as hub:
        hub.until_ready()
        with RawClient(hub.port) as client, socket.create_connection(("127.0.0.1", hub.port), 5 * UNIT_S) as early:
            hub.until_connected(1)
            head = upgrade_request(hub.port)
            early.sendall(head[:20])
            time.sleep(0.1)
            hub.signal(signal.SIGTERM)
            assert client.close_code() == 1012
            early.sendall(head[20:])
            answer = early.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After" in answer
            assert hub.get("/health/ready")[0] in (0, 503)
            client.send(8, b"\x03\xf4")
        assert hub.wait(4) == 0


# Refusing to start


def assert_one_line(hub: Hub, code: int, *words: str) -> None:
    """The process ended with this code and said one line, which has these words."""
    assert hub.wait() == code
    assert len(hub.lines) == 1, hub.output
    assert hub.lines[0].startswith("error: ")
    for word in words:
        assert word in hub.lines[0]


def test_a_port_that_is_taken_is_one_line_and_exit_69(hub: Hub, redis: RedisServer) -> None:
    """The second hub says which address is taken; the first one does not notice."""
    with HubProcess(redis.url, hub.port) as second:
        assert_one_line(second, 69, f"127.0.0.1:{hub.port}", "in use")
    assert_calm(hub)


def test_a_hub_is_one_too_many(redis: RedisServer) -> None:
    """`honcho start -c hub=2` without `hub.processes`: the second one exits 78, before it touches anything."""
    with HubProcess(redis.url, HONCHO_PROCESS_NAME="hub.2") as hub:
        assert_one_line(hub, 78, "this is hub.2, but hub.processes is 1", "-c hub=N")


def test_the_first_hub_starts_and_ends_at_once_when_nobody_is_there(redis: RedisServer) -> None:
    """honcho's hub.1 is a hub like any other; nobody to wait for, no wait."""
    with HubProcess(redis.url, HONCHO_PROCESS_NAME="hub.1") as hub:
        hub.until_ready()
        assert stops_within(hub, 1.0) == 0


def test_a_wrong_password_is_one_clear_line_and_the_end() -> None:
    """Redis will not have us, for good: the hub says so without telling the password, and exits 69."""
    with (
        RedisServer.start(None, "--requirepass", "right") as server,
        HubProcess(server.url.replace("redis://", "redis://:s3cret@")) as hub,
    ):
        assert hub.wait() == 69
        errors = [line for line in hub.lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Redis says: " in errors[0]
        assert "s3cret" not in hub.output
        assert "Traceback" not in hub.output


def test_a_password_that_is_changed_is_told_and_mended(redis: RedisServer, hub: Hub, publish: RedisClient) -> None:
    """The hub says why it is not ready, and keeps its subscribers; changed back, all goes on."""
    with RawClient(hub.port) as client:
        hub.until_connected(1)
        publish.command("CONFIG", "SET", "requirepass", "new")
        publish.command("CLIENT", "KILL", "TYPE", "pubsub")
        publish.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        eventually(lambda: "NOAUTH" in hub.get("/health/ready")[1]["trouble"], "not told", within=5.0)
        hub.said("NOAUTH")  # by the link of the subscription, which has a time of its own
        publish.command("CONFIG", "SET", "requirepass", "")
        hub.until_ready()
        store_by_script(publish, event_payload())
        assert client.event()["offset"]
    said = [line for line in hub.lines if "NOAUTH" in line]
    assert said
    assert len(said) == len(set(said)), hub.output
    assert "Traceback" not in hub.output

"""One subscriber: signs of life, the two ways to close, and what a talker may cost."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from broadcaster.redis.server import RedisServer
from broadcaster.wire import CloseCode
from tests.hub.house import House, turns
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    client_frame,
    event_payload,
    eventually,
    in_loop,
    memory_bytes,
    next_but_ping,
    read_to_end,
    redis_client,
)

PING_S = 0.3 * UNIT_S
CLOSE_S = 0.3 * UNIT_S


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Hub, RedisClient]]:
    """A hub that pings often and cuts soon, and somebody who publishes."""
    with (
        RedisServer.start() as server,
        redis_client(server) as client,
        HubThread(
            server.url,
            BROADCASTER_HUB__PING_INTERVAL_S=str(PING_S),
            BROADCASTER_HUB__CLOSE_TIMEOUT_S=str(CLOSE_S),
        ) as process,
    ):
        yield process.until_ready(), client
        assert_calm(process)


@pytest.fixture
def pinging(house: tuple[Hub, RedisClient]) -> Hub:
    """That hub, without anybody else."""
    house[0].until_connected(0)
    return house[0]


@pytest.fixture
def publish(house: tuple[Hub, RedisClient]) -> RedisClient:
    return house[1]


@pytest.fixture(scope="module")
def quiet() -> Iterator[HubProcess]:
    """A hub that does not ping within a test, for all tests that leave nothing behind."""
    with RedisServer.start() as server, HubProcess(server.url) as process:
        yield process.until_ready()
        assert_calm(process)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Hub]:
    """The same with little time to answer a close."""
    with (
        RedisServer.start() as server,
        HubThread(server.url, BROADCASTER_HUB__CLOSE_TIMEOUT_S=str(CLOSE_S)) as process,
    ):
        yield process.until_ready()
        assert_calm(process)


# Signs of life


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 125], ids=["empty", "short", "longest"])
def test_a_ping_is_answered_with_its_payload(quiet: Hub, payload: bytes) -> None:
    """The hub answers the pings of its clients, as often as they come."""
    with RawClient(quiet.port) as client:
        for _ in range(3):
            client.send(9, payload)
            assert next_but_ping(client) == (10, payload)


def test_a_ping_cut_in_pieces_is_answered(quiet: Hub) -> None:
    """A frame may arrive byte by byte, and together with others."""
    with RawClient(quiet.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in client_frame(9, b"hello"):
            client.socket.sendall(bytes([byte]))
            time.sleep(0.005)
        assert next_but_ping(client) == (10, b"hello")
        client.socket.sendall(
            client_frame(10) + client_frame(9, b"a") + client_frame(1, b"talk") + client_frame(9, b"b")
        )
        assert next_but_ping(client) == (10, b"a")
        assert next_but_ping(client) == (10, b"b")


SIGNS: dict[str, tuple[int, bytes]] = {
    "pong": (10, b""),
    "pong with a payload of its own": (10, b"here"),
    "ping": (9, b""),
    "text": (1, b"still here"),
    "binary": (2, b"\xff"),
}


def test_whoever_gives_a_sign_of_life_stays_and_who_gives_none_is_cut(pinging: Hub, publish: RedisClient) -> None:
    """Anything a client sends keeps it, as does a stock library; silence for two rounds is closed 1011 and cut."""
    before = pinging.stats()
    with contextlib.ExitStack() as stack:
        talkers = {name: stack.enter_context(RawClient(pinging.port)) for name in SIGNS}
        silent = stack.enter_context(RawClient(pinging.port))
        stock = stack.enter_context(connect(pinging.url, compression=None, proxy=None, ping_interval=None))
        started = time.monotonic()
        while time.monotonic() < started + 4 * PING_S:
            for name, client in talkers.items():
                client.send(*SIGNS[name])
            time.sleep(PING_S / 10)
        assert silent.close_code() == 1011
        assert silent.frames[0] == (9, b"")
        read_to_end(silent)
        eventually(
            lambda: pinging.stats()["connected"] == len(talkers) + 1, "a talker was cut, or the silent one not"
        )
        publish.publish(event_payload(7))
        for client in talkers.values():
            assert client.event()["sequence"] == 7
            assert (9, b"") in client.frames
        assert json.loads(stock.recv(timeout=5 * UNIT_S))["sequence"] == 7
        stats = pinging.stats()
        assert stats["ping_timeouts"] == before["ping_timeouts"] + 1
        assert stats["aborted"] == before["aborted"] + 1


def test_who_answers_the_close_of_a_ping_timeout_is_not_aborted(pinging: Hub) -> None:
    """The close of a ping timeout can be answered like any other."""
    before = pinging.stats()
    with RawClient(pinging.port) as client:
        assert client.close_code() == 1011
        client.send(8, b"\x03\xf3")
        read_to_end(client)
        eventually(lambda: pinging.stats()["connected"] == 0, "the connection is kept")
        stats = pinging.stats()
        assert stats["ping_timeouts"] == before["ping_timeouts"] + 1
        assert stats["aborted"] == before["aborted"]


# The close handshake

CLOSES: dict[str, tuple[bytes, bytes]] = {
    "1000": (b"\x03\xe8", b"\x03\xe8"),
    "1001 with a reason": (b"\x03\xe9going away", b"\x03\xe9going away"),
    "a code of the client's own": (b"\x0f\xa1", b"\x0f\xa1"),
    "no code": (b"", b""),
}


@pytest.mark.parametrize("talked", [False, True], ids=["silent before", "talked before"])
@pytest.mark.parametrize(("sent", "answered"), CLOSES.values(), ids=CLOSES.keys())
def test_a_close_is_answered_and_the_connection_ended(
    impatient: Hub, sent: bytes, answered: bytes, talked: bool
) -> None:
    """A client that closes gets its code back and the end of the connection, at once and orderly."""
    aborted = impatient.stats()["aborted"]
    with RawClient(impatient.port) as client:
        if talked:
            client.send(1, b"hello")
        client.send(8, sent)
        assert next_but_ping(client) == (8, answered)
        read_to_end(client)
    impatient.until_connected(0)
    assert impatient.stats()["aborted"] == aborted


def test_a_stock_client_closes_cleanly(quiet: Hub) -> None:
    """A client library sees its own code come back."""
    with connect(quiet.url, compression=None, proxy=None) as client:
        client.close(1000, "bye")
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(timeout=5 * UNIT_S)
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1000, "bye")


BREACHES: dict[str, tuple[bytes, int]] = {
    "unmasked": (client_frame(1, b"hi", mask=False), 1002),
    "bad text": (client_frame(1, b"\xff"), 1007),
    "too big": (client_frame(1, b"x" * 4097), 1009),
}


@pytest.mark.parametrize(("data", "code"), BREACHES.values(), ids=BREACHES.keys())
def test_who_answers_the_hubs_close_is_let_go_at_once(quiet: Hub, data: bytes, code: int) -> None:
    """A client closed for its mistake that answers the close does not have to wait for the deadline."""
    aborted = quiet.stats()["aborted"]
    with RawClient(quiet.port) as client:
        client.socket.sendall(data)
        assert client.close_code() == code
        client.send(8, code.to_bytes(2, "big"))
        read_to_end(client, within=1.0)  # the deadline is 2 s
    quiet.until_connected(0)
    assert quiet.stats()["aborted"] == aborted


def test_who_is_closed_and_stays_silent_is_cut_at_the_deadline(impatient: Hub) -> None:
    """Nobody keeps a connection by not answering the close."""
    with RawClient(impatient.port) as client:
        client.socket.sendall(client_frame(1, b"x" * 4097))
        assert client.close_code() == 1009
        read_to_end(client)
    impatient.until_connected(0)


def test_who_is_closed_and_talks_on_is_cut_at_the_deadline(impatient: Hub) -> None:
    """Neither does talking on: what comes after the mistake is not read, and not answered."""
    with RawClient(impatient.port) as client:
        client.socket.sendall(client_frame(1, b"\xff"))
        assert client.close_code() == 1007
        deadline = time.monotonic() + 5 * UNIT_S
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                client.socket.sendall(client_frame(9, b"more") + client_frame(1, b"x" * 100))
                time.sleep(0.01)
            pytest.fail("it could talk on after the deadline")
        read_to_end(client)
        assert [opcode for opcode, _ in client.frames if opcode != 9] == [8]
    impatient.until_connected(0)


def test_a_closed_connection_gets_no_more_events(pinging: Hub, publish: RedisClient) -> None:
    """The close frame is the last frame, whatever is broadcast after it."""
    before = pinging.stats()
    with RawClient(pinging.port) as client:
        client.socket.sendall(client_frame(1, b"\xff"))
        assert client.close_code() == 1007
        already = len(client.frames)
        assert publish.publish(event_payload()) == 1
        eventually(
            lambda: pinging.stats()["events_received"] > before["events_received"], "the event did not come"
        )
        read_to_end(client)
        assert len(client.frames) == already
        assert pinging.stats()["deliveries"] == before["deliveries"]


# What a talker may cost


def test_messages_are_drained_and_change_nothing(quiet: Hub) -> None:
    """A subscriber may talk: all of it is read and dropped, pings in between are answered."""
    with RawClient(quiet.port) as client:
        for _ in range(9):
            client.socket.sendall(client_frame(1, b"x" * 4000) * 10 + client_frame(9, b"?"))
            assert next_but_ping(client) == (10, b"?")


TOO_MUCH: dict[str, bytes] = {
    "messages": client_frame(1, b"hello"),
    "pings": client_frame(9),
    "pongs": client_frame(10),
    "fragments": client_frame(1, fin=False) + client_frame(0),
}


@pytest.mark.parametrize("data", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_who_says_too_much_is_closed_1008(quiet: Hub, data: bytes) -> None:
    """Far more frames than inbound_max_per_s allows are a policy violation, and counted."""
    before = quiet.stats()["talkers_closed"]
    with RawClient(quiet.port) as client:
        client.socket.sendall(data * 5000)
        assert client.close_code() == 1008
        assert b"frames a second" in client.frames[-1][1]
        assert quiet.stats()["talkers_closed"] == before + 1


@in_loop
async def test_a_talker_has_a_first_second_free_and_then_its_rate() -> None:
    """Only beyond both it says too much: within its first second, and for all the time since."""
    house = await House.opened()
    peer = house.connect()
    peer.connection.data_received(client_frame(1, b"x") * 50 + client_frame(9) * 50)
    await turns(50)
    assert not [word for word in peer.told if isinstance(word, str) and word.startswith("close")]
    peer.connection.data_received(client_frame(1) * 500)
    await turns(50)
    assert peer.told[-1] == "close 1008"
    assert house.registry.closed[CloseCode.POLICY] == 1


@pytest.fixture(scope="module")
def taciturn() -> Iterator[Hub]:
    """A hub that allows 20 frames a second."""
    with (
        RedisServer.start() as server,
        HubThread(server.url, BROADCASTER_HUB__INBOUND_MAX_PER_S="20") as process,
    ):
        yield process.until_ready()
        assert_calm(process)


def test_who_talks_steadily_within_the_rate_is_kept(taciturn: Hub) -> None:
    """Messages and pings at less than the rate, for longer than the first second, are welcome."""
    with RawClient(taciturn.port) as client:
        for number in range(13):
            client.socket.sendall(client_frame(1, b"hello") + client_frame(9, b"%d" % number))
            assert next_but_ping(client) == (10, b"%d" % number)
            time.sleep(0.12)


def test_silence_is_not_saved_up(taciturn: Hub) -> None:
    """Whoever was silent for long may not flood the hub for long afterwards."""
    with RawClient(taciturn.port) as client:
        client.send(1, b"hello")
        client.send(2, b"hello")
        time.sleep(1.2)
        client.socket.sendall(client_frame(1, b"hello") * 40)
        client.socket.settimeout(2 * UNIT_S)
        assert client.close_code() == 1008


TOO_BIG: dict[str, list[bytes]] = {
    "one frame": [client_frame(1, b"x" * 4097)],
    "one binary frame": [client_frame(2, b"\xff" * 4097)],
    "two fragments": [client_frame(1, b"x" * 4000, fin=False), client_frame(0, b"x" * 97)],
    "many fragments": [client_frame(1, b"x", fin=False), *[client_frame(0, b"x" * 100, fin=False)] * 41],
    "announced only": [b"\x82\xff" + (1 << 62).to_bytes(8, "big") + b"\0\0\0\0"],
}


@pytest.mark.parametrize("parts", TOO_BIG.values(), ids=TOO_BIG.keys())
def test_a_message_over_the_limit_is_closed_1009(quiet: Hub, parts: list[bytes]) -> None:
    """Neither a frame nor a sum of fragments may hold more than inbound_max_bytes of the hub's memory."""
    with RawClient(quiet.port) as client:
        for part in parts:
            client.socket.sendall(part)
        assert client.close_code() == 1009


def test_a_message_of_exactly_the_limit_passes(quiet: Hub) -> None:
    """The limit itself is allowed, whole and in fragments."""
    with RawClient(quiet.port) as client:
        client.send(1, b"x" * 4096)
        client.send(1, b"x" * 4000, fin=False)
        client.send(0, b"x" * 96)
        client.send(9)
        assert next_but_ping(client) == (10, b"")


def test_unfinished_messages_hold_no_more_than_the_limit_each(quiet: HubProcess) -> None:
    """200 talkers with a message that is almost complete: the hub holds about 200 times the limit."""
    before = memory_bytes(quiet)
    with contextlib.ExitStack() as stack:
        talkers = [stack.enter_context(RawClient(quiet.port)) for _ in range(200)]
        for client in talkers:
            client.socket.sendall(client_frame(1, b"x" * 2000, fin=False) + client_frame(0, b"x" * 2096)[:-1])
        with RawClient(quiet.port) as other:
            other.send(9)
            assert next_but_ping(other) == (10, b"")
        assert memory_bytes(quiet) - before < 200 * (4096 + 40_960)
    quiet.until_connected(0)

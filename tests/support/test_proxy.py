"""The proxy passes bytes on, and does to them what it is told, and nothing else."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Self

import pytest

from tests.support import UNIT_S, Proxy, eventually


class Pair:
    """A client of the proxy, and what it is connected to."""

    def __init__(self, proxy: Proxy, server: socket.socket) -> None:
        self.client = socket.create_connection(("127.0.0.1", proxy.port), timeout=5 * UNIT_S)
        self.target, _ = server.accept()
        self.target.settimeout(5 * UNIT_S)
        self.client.sendall(b"!")  # then the proxy has both ends
        assert self.target.recv(1) == b"!"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.target.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5 * UNIT_S)
        yield listening


@pytest.fixture
def proxy(server: socket.socket) -> Iterator[Proxy]:
    with Proxy(server.getsockname()[1]) as proxy:
        yield proxy


@pytest.fixture
def pair(proxy: Proxy, server: socket.socket) -> Iterator[Pair]:
    with Pair(proxy, server) as pair:
        yield pair


def nothing_comes(to: socket.socket) -> None:
    to.settimeout(0.1)
    with pytest.raises(TimeoutError):
        to.recv(1)
    to.settimeout(5 * UNIT_S)


def read(of: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = of.recv(size - len(data))
        assert more, data
        data += more
    return data


def test_both_directions_and_the_end(pair: Pair) -> None:
    pair.client.sendall(b"question")
    assert read(pair.target, 8) == b"question"
    pair.target.sendall(b"answer")
    assert read(pair.client, 6) == b"answer"
    pair.target.close()
    assert pair.client.recv(1) == b""


@pytest.mark.parametrize("direction", ["requests", "answers"])
def test_a_black_hole_of_one_direction_loses_nothing(direction: str, proxy: Proxy, pair: Pair) -> None:
    """What was said in it comes when it ends, the end of the connection last; the other direction is open."""
    ends = [pair.client, pair.target] if direction == "requests" else [pair.target, pair.client]
    one, other = ends
    way = getattr(proxy, direction)
    proxy.change(way, blocked=True)
    one.sendall(b"one")
    other.sendall(b"other")
    assert read(one, 5) == b"other"
    nothing_comes(other)
    one.close()
    nothing_comes(other)
    proxy.change(way, blocked=False)
    assert read(other, 3) == b"one"
    assert other.recv(1) == b""


def test_who_sends_into_a_black_hole_has_to_wait(proxy: Proxy, pair: Pair) -> None:
    """Little is held; and all of it comes."""
    proxy.change(proxy.requests, blocked=True)
    data = bytes(range(256)) * 65_536
    sent = threading.Event()

    def send() -> None:
        pair.client.settimeout(20 * UNIT_S)
        pair.client.sendall(data)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.3)
    proxy.change(proxy.requests, blocked=False)
    assert read(pair.target, len(data)) == data
    thread.join()


def test_a_throttled_direction_takes_its_time(proxy: Proxy, pair: Pair) -> None:
    proxy.change(proxy.answers, bytes_per_s=20_000)
    begin = time.monotonic()
    pair.target.sendall(b"x" * 6_000)
    read(pair.client, 6_000)
    assert time.monotonic() - begin > 0.25
    pair.target.sendall(b"x" * 2_000_000)
    proxy.change(proxy.answers, bytes_per_s=math.inf)
    read(pair.client, 2_000_000)


def test_what_is_delayed_comes_late_and_in_order(proxy: Proxy, pair: Pair) -> None:
    proxy.change(proxy.answers, delay_s=0.2)
    begin = time.monotonic()
    pair.target.sendall(b"ab")
    proxy.change(proxy.answers, delay_s=0.1)
    pair.target.sendall(b"cd")
    assert read(pair.client, 4) == b"abcd"
    assert time.monotonic() - begin > 0.09


def test_what_is_split_comes_in_pieces(proxy: Proxy, pair: Pair) -> None:
    proxy.change(proxy.requests, proxy.answers, split=3)
    data = bytes(range(200))
    pair.client.sendall(data)
    pieces = list[bytes]()
    while sum(map(len, pieces)) < len(data):
        pieces.append(pair.target.recv(1000))
    assert b"".join(pieces) == data
    assert len(pieces) > 10


@pytest.mark.parametrize("at_client", [True, False], ids=["client", "target"])
def test_half_open(at_client: bool, proxy: Proxy, pair: Pair) -> None:
    """One side has a reset; the other one may say what it wants. New connections work."""
    lost, left = (pair.client, pair.target) if at_client else (pair.target, pair.client)
    proxy.half_open(at_client=at_client)
    with pytest.raises(ConnectionResetError):
        lost.recv(1)
    left.sendall(b"is anybody there?")
    nothing_comes(left)


def test_after_it_a_new_connection_works(proxy: Proxy, pair: Pair, server: socket.socket) -> None:
    proxy.half_open(at_client=True)
    with Pair(proxy, server) as other:
        other.client.sendall(b"a")
        assert read(other.target, 1) == b"a"


def test_refused(proxy: Proxy, pair: Pair, server: socket.socket) -> None:
    """New connections are reset; those that were there stay."""
    proxy.refuses = True

    def connect() -> None:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5 * UNIT_S) as refused:
            refused.recv(1)

    with pytest.raises(ConnectionResetError):  # sooner or later
        connect()
    pair.client.sendall(b"a")
    assert read(pair.target, 1) == b"a"


def test_one_beside_another_is_in_its_thread(proxy: Proxy, server: socket.socket) -> None:
    """And leaves no connection when it ends."""
    threads = threading.active_count()
    with Proxy(server.getsockname()[1], beside=proxy) as beside, Pair(beside, server) as pair:
        assert threading.active_count() == threads
        pair.client.sendall(b"a")
        assert read(pair.target, 1) == b"a"
        assert len(beside.links) == 1
        assert not proxy.links
        pair.client.close()
        assert pair.target.recv(1) == b""
        pair.target.close()
        eventually(lambda: not beside.links, "a connection is left")

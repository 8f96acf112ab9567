"""What the tests stand on: hubs in threads that leave nothing behind, and ports of their own."""

from __future__ import annotations

import gc
import resource
import signal
import socket
import threading
from typing import Any

import pytest
from sanic import Sanic

from broadcaster.hub.channels import delivery_probe
from broadcaster.redis.server import RedisServer
from tests.support import HubThread, RawClient, eventually, frames_from, free_port, server_frames
from tests.support.ports import LAST, SIZE, WORKERS, Ports


def test_hubs_in_threads_leave_the_process_as_it_was(steady_redis: RedisServer) -> None:
    """Two at once, and one after them: no thread, no setting of the garbage collector, no app stays."""
    threads, thresholds, frozen = threading.active_count(), gc.get_threshold(), gc.get_freeze_count()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with HubThread(steady_redis.url) as first, HubThread(steady_redis.url) as second:
        for hub in (first, second):
            assert f"listening on ws://127.0.0.1:{hub.port}/ws" in hub.until_ready().lines
            assert hub.said("events get through")
    with HubThread(steady_redis.url) as third:
        third.until_ready()
    assert threading.active_count() == threads
    assert (gc.get_threshold(), gc.get_freeze_count()) == (thresholds, frozen)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == files
    assert not Sanic._app_registry


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_hub_in_a_thread_ends_as_a_process_does(
    number: signal.Signals, code: int, steady_redis: RedisServer
) -> None:
    """Everybody is told 1012, who has not finished a request is cut, and the exit code is that of the command."""
    with HubThread(steady_redis.url) as hub:
        with (
            RawClient(hub.until_ready().port) as client,
            socket.create_connection(("127.0.0.1", hub.port), timeout=5) as half,
        ):
            half.sendall(b"GET /ws HTTP/1.1\r\n")
            hub.signal(number)
            assert client.close_code() == 1012
            client.send(8, b"\x03\xf4")
            assert hub.wait() == code
            assert half.recv(1) == b""
        assert "Error" not in hub.output


def test_a_hub_that_cannot_start_says_so_in_a_thread_too(steady_redis: RedisServer) -> None:
    """One line and the exit code of the command."""
    with HubThread(steady_redis.url) as first, HubThread(steady_redis.url, first.until_ready().port) as second:
        assert second.wait() == 69
        assert [line for line in second.lines if line.startswith("error: hub: cannot listen on ")] == second.lines


def test_a_hub_that_blocks_its_loop_fails_its_test(
    steady_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that blocks in a part of the hub is an error, and the block that has the hub fails."""
    # As code of the product, which is what is watched.
    source = "import time\nasync def run(probe):\n    time.sleep(0.01)\n"
    names: dict[str, Any] = {}
    exec(compile(source, delivery_probe.__file__, "exec"), names)
    monkeypatch.setattr(delivery_probe.DeliveryProbe, "run", names["run"])
    with pytest.raises(AssertionError, match=r"Blocking call to time\.sleep"), HubThread(steady_redis.url) as hub:
        eventually(lambda: hub.ended, "it goes on")


def test_every_worker_has_ports_of_its_own() -> None:
    """Below those of outgoing connections, also with the 10,000 of a cluster's bus; each is free."""
    ranges = [range(ports.first, ports.first + SIZE) for ports in map(Ports, range(WORKERS))]
    numbers = [number for each in ranges for number in each]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) <= LAST < 32_768 - 10_000
    port = free_port()
    assert any(port in each for each in ranges)
    with socket.create_server(("127.0.0.1", port)):
        assert port not in {free_port() for _ in range(SIZE - 1)}


CUT = b"\x81\x03abc\x8a\x00\x81\x7e\x00\x7e" + b"x" * 126 + b"\x81\x05hel"


def test_frames_are_read_and_the_cut_one_is_left() -> None:
    """Short and long ones, and where the first begins that is not whole."""
    frames = [(1, b"abc"), (10, b""), (1, b"x" * 126)]
    assert frames_from(CUT) == (frames, len(CUT) - 5)
    assert frames_from(CUT, 5) == (frames[1:], len(CUT) - 5)
    assert server_frames(CUT) == frames


WRONG = {
    "masked": b"\x81\x80\0\0\0\0",
    "a part": b"\x01\x00",
    "a reserved bit": b"\xc1\x00",
    "binary": b"\x82\x00",
    "a long ping": b"\x89\x7e\x00\x7e" + b"x" * 126,
    "a length that is longer than need be": b"\x81\x7e\x00\x01x",
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_a_frame_that_no_server_may_send_fails_the_test(data: bytes) -> None:
    """Whoever reads frames is strict."""
    with pytest.raises(AssertionError):
        server_frames(data)

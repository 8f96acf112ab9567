"""Stored events through a hub that does not answer as it should."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time

import pytest

from broadcaster.core.errors import HubUnavailable
from broadcaster.subscribe import stored_events
from tests.support import broadcaster, run_async


def test_ctrl_c_does_not_wait_for_a_silent_hub() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with broadcaster("events", "--url", url) as running, silent.accept()[0] as connection:
            assert connection.recv(4096).startswith(b"GET /events")
            running.signal(signal.SIGINT)
            assert running.wait(within=5) == 130
    assert "Traceback" not in running.output


def test_an_answer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However regularly a byte comes; and the connection is ended."""
    monkeypatch.setattr(stored_events, "_WHOLE_S", 1.0)
    ended = threading.Event()

    def trickle() -> None:
        with listening.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(300):
                connection.sendall(b" ")
                time.sleep(0.05)
            return
        ended.set()

    async def read() -> None:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async for _ in stored_events.stored_pages(url, "events.critical", "all"):
            pytest.fail("there is no page")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=trickle)
        server.start()
        with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:\d+: no answer \(it was not complete after 1 s\)"):
            run_async(read())
        server.join()
    assert ended.is_set()

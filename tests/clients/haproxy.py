"""A real HAProxy in front of a hub."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.clients.programs import program
from tests.support import Running, eventually, free_port

_CONFIGURATION = """\
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    timeout tunnel 1h
frontend all
    bind 127.0.0.1:{port}
    default_backend hub
backend hub
    server hub 127.0.0.1:{hub}
"""


@contextlib.contextmanager
def haproxy(folder: Path, hub_port: int) -> Iterator[int]:
    """On a free port; yields the port."""
    path, port = program("haproxy", "/usr/sbin/haproxy"), free_port()
    configuration = folder / "haproxy.cfg"
    configuration.write_text(_CONFIGURATION.format(port=port, hub=hub_port))
    with Running(path, "-f", str(configuration), "-db") as running:

        def listens() -> bool:
            assert running.process.poll() is None, f"haproxy has ended:\n{running.output}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        eventually(listens, "haproxy does not listen")
        yield port

"""Ports to listen on that nobody else takes meanwhile."""

from __future__ import annotations

import os
import secrets
import socket

FIRST, LAST = 10_000, 22_767
"""Below 32,768, where the kernel takes the ports of outgoing connections, also with the 10,000 that the bus of a
Redis Cluster lies above its node."""

WORKERS = 16
SIZE = (LAST + 1 - FIRST) // WORKERS


class Ports:
    """The ports of one of the processes that share the tests, each given out once in a round.

    Two suites on one machine have the same ranges: each begins somewhere else.
    """

    def __init__(self, worker: int) -> None:
        self.first = FIRST + worker % WORKERS * SIZE
        self._at = secrets.randbelow(SIZE)

    def take(self) -> int:
        """The next port on which nobody listens, on no address."""
        for _ in range(SIZE):
            self._at = (self._at + 1) % SIZE
            port = self.first + self._at
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
            return port
        raise AssertionError(f"all ports from {self.first} to {self.first + SIZE - 1} are taken")


_PORTS = Ports(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def free_port() -> int:
    """A TCP port below 32,768 that is free, and that no other worker of this suite takes."""
    return _PORTS.take()


def free_ports(count: int) -> int:
    """The first of so many free ports that follow one another."""
    taken = [free_port()]
    while len(taken) < count:
        port = free_port()
        taken = [*taken, port] if port == taken[-1] + 1 else [port]
    return taken[0]

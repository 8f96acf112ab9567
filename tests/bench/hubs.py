"""The hubs that are measured, all behind the same interface: /ws and /health/ready on one port."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from broadcaster.redis.server import free_port
from tests.bench.processes import ROOT, Process, TrialError
from tests.bench.tools import Tools

PRODUCT: Final = "broadcaster"
NAIVE: Final = "naive"
FLOOR: Final = "floor"
HUBS: Final = (PRODUCT, NAIVE, FLOOR)

_READY_S: Final = 15.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Hub(Process):
    """A running hub that is ready for subscribers."""

    def __init__(self, kind: str, port: int, redis_port: int, tools: Tools, env: Mapping[str, str]) -> None:
        self.port = port
        environment = {
            **hub_environment(port, redis_port),
            **env,
        }
        super().__init__(f"hub {kind}", _command(kind, port, redis_port, tools), env=environment)


@contextmanager
def running_hub(kind: str, redis_port: int, tools: Tools, env: Mapping[str, str] | None = None) -> Iterator[Hub]:
    """Start one of HUBS on a free port, wait until it is ready, end it afterwards."""
    with Hub(kind, free_port(), redis_port, tools, env or {}) as hub:
        _await_ready(hub)
        try:
            yield hub
        except TrialError:
            hub.check_alive()  # its own end is the better explanation
            raise
        hub.check_alive()


def hub_environment(port: int, redis_port: int) -> dict[str, str]:
    """The environment of a hub, and of those who look for it."""
    return {
        **clean_environment(redis_port),
        "BROADCASTER_HUB__HOST": "127.0.0.1",
        "BROADCASTER_HUB__PORT": str(port),
    }


def clean_environment(redis_port: int) -> dict[str, str]:
    """The caller's environment with the address of this Redis and nobody else's BROADCASTER_ settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BROADCASTER_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
        "BROADCASTER_REDIS__URL": redis_url(redis_port),
    }


def redis_url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def statistics(port: int) -> dict[str, Any]:
    """What `/stats` of the product's hub says; asking costs it about a millisecond."""
    try:
        with _direct.open(f"http://127.0.0.1:{port}/stats?scope=self", timeout=5) as answer:
            said: dict[str, Any] = json.load(answer)
            return said
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TrialError(f"/stats: {error}") from None


def _command(kind: str, port: int, redis_port: int, tools: Tools) -> list[str]:
    return {
        PRODUCT: [sys.executable, "-m", "broadcaster", "hub"],
        NAIVE: [sys.executable, "-m", "tests.bench.naive"],
        FLOOR: [tools.floor, "--port", str(port), "--redis-port", str(redis_port)],
    }[kind]


def _await_ready(hub: Hub) -> None:
    deadline = time.monotonic() + _READY_S
    while not _is_ready(hub.port):
        hub.check_alive()
        if time.monotonic() > deadline:
            raise TrialError(f"{hub.name} was not ready within {_READY_S:.0f} s")
        time.sleep(0.02)


def _is_ready(port: int) -> bool:
    try:
        with _direct.open(f"http://127.0.0.1:{port}/health/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

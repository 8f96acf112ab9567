"""A hub for the tests."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any

from broadcaster.redis.server import free_port
from tests.support.process import Running
from tests.support.timing import eventually


class HubProcess(Running):
    """A real `broadcaster hub` on a free port."""

    def __init__(self, redis_url: str, port: int | None = None, **variables: str) -> None:
        self.port = port or free_port()
        super().__init__(
            *(sys.executable, "-m", "broadcaster", "hub"),
            BROADCASTER_REDIS__URL=redis_url,
            BROADCASTER_HUB__PORT=str(self.port),
            **({"BROADCASTER_HUB__DRAIN_S": "0.1"} | variables),
        )

    def __enter__(self) -> HubProcess:
        return self

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of a GET; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=3) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except OSError:
            return 0, {}

    def stats(self) -> dict[str, Any]:
        return self.get("/stats")[1]

    def until_ready(self, within: float = 10.0) -> HubProcess:
        eventually(lambda: self.get("/health/ready")[0] == 200, f"hub not ready:\n{self.output}", within)
        return self

    def until_connected(self, count: int) -> None:
        eventually(lambda: self.stats().get("connected") == count, f"never {count} connected: {self.stats()}")


def assert_calm(hub: HubProcess, since: int = 0) -> None:
    """The hub lives, answers, and has no error in its log from this line on."""
    assert hub.get("/health/live")[0] == 200, hub.output
    said = "\n".join(hub.lines[since:])
    assert not any(word in said for word in ("Traceback", "Error", "exception")), said

"""Fixtures: the clients of others, each started when a test wants it, and the two ways to the hub."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.clients import programs
from tests.clients.browser import Browser
from tests.clients.nginx import nginx

Subscribed = AbstractContextManager[programs.Client]
Open = Callable[..., AbstractContextManager[int]]


class Kit:
    """All clients; what they need is looked for, installed and started when it is needed for the first time."""

    def __init__(self, profile: Path, stack: contextlib.ExitStack) -> None:
        self._profile = profile
        self._stack = stack

    @functools.cached_property
    def packages(self) -> Path:
        return programs.node_packages()

    @functools.cached_property
    def browser(self) -> Browser:
        return self._stack.enter_context(Browser.start(self._profile))

    def subscribe(
        self, kind: str, port: int, protocols: tuple[str, ...] = (), headers: dict[str, str] | None = None
    ) -> Subscribed:
        """A client of this kind, connecting to what listens at a port."""
        url = f"ws://127.0.0.1:{port}/ws"
        if kind == "python -m websockets":
            assert not protocols
            assert not headers
            return programs.python_client(url)
        if kind == "wscat":
            return programs.wscat(self.packages, url, protocols, headers)
        if kind == "ws":
            return programs.Script(self.packages, url, protocols=protocols, headers=headers)
        assert not headers, "a browser cannot set headers"
        if kind == "node":
            if not programs.node_has_websocket():
                pytest.skip("this node has no WebSocket of its own: version 22 has")
            return programs.Script(self.packages, url, own=True, protocols=protocols)
        assert kind == "chromium", kind
        return self.browser.open(f"http://127.0.0.1:{port}/health/live").subscribe(url, protocols)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """All clients."""
    with contextlib.ExitStack() as stack:
        yield Kit(tmp_path_factory.mktemp("profile"), stack)


@pytest.fixture(scope="module", params=["direct", "through nginx"])
def way_to(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a way to the hub at a port: `with way_to(hub.port) as port`, and the clients connect to that."""
    if request.param == "direct":
        return contextlib.nullcontext
    return lambda hub_port: nginx(tmp_path_factory.mktemp("nginx"), hub_port)

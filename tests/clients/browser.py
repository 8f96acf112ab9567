"""A real Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import contextlib
import itertools
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.clients.programs import LISTEN, Happenings, program
from tests.support import UNIT_S, Running, eventually

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--remote-debugging-port=0",
)


class Browser:
    """One Chromium with a profile of its own."""

    def __init__(self, running: Running, port: int) -> None:
        self._running = running
        self._port = port

    @classmethod
    @contextlib.contextmanager
    def start(cls, profile: Path) -> Iterator[Browser]:
        """Start it, and end it with the block."""
        path = program("chromium", "chromium-browser", "google-chrome")
        with Running(path, *FLAGS, f"--user-data-dir={profile}", "about:blank") as running:
            file = profile / "DevToolsActivePort"

            def port() -> int:
                assert running.process.poll() is None, f"chromium has ended:\n{running.output}"
                lines = file.read_text().splitlines() if file.exists() else []
                return int(lines[0]) if len(lines) == 2 else 0

            yield cls(running, eventually(port, f"chromium does not start:\n{running.output}", 30))

    def open(self, url: str) -> Tab:
        """A new tab with the page of a URL."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/json/new?{urllib.parse.quote('about:blank')}", method="PUT"
        )
        with urllib.request.urlopen(request, timeout=20 * UNIT_S) as response:
            target = json.load(response)
        return Tab(target["webSocketDebuggerUrl"], url)


class Tab:
    """A tab."""

    def __init__(self, debugger_url: str, url: str) -> None:
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()
        self._devtools: ClientConnection = self._stack.enter_context(
            connect(debugger_url, proxy=None, compression=None, max_size=None, open_timeout=20 * UNIT_S)
        )
        try:
            self.call("Security.setIgnoreCertificateErrors", ignore=True)  # for this tab: ours are self-signed
            said = self.call("Page.navigate", url=url)
            assert "errorText" not in said, f"{url}: {said}"
            origin = "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))
            eventually(
                lambda: self.evaluate("document.readyState + ' ' + location.origin") == f"complete {origin}",
                f"{url} is not loaded",
            )
        except BaseException:
            self._stack.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        number = next(self._numbers)
        self._devtools.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self._devtools.recv(timeout=20 * UNIT_S))).get("id") != number:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def evaluate(self, script: str) -> Any:
        """What a script in the page comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def subscribe(self, url: str, protocols: tuple[str, ...] = ()) -> Page:
        """Have the page connect."""
        script = LISTEN.read_text()
        self.evaluate(
            f"{script}; window.told = [];"
            f"window.socket = new WebSocket({json.dumps(url)}, {json.dumps(protocols)});"
            "listen(window.socket, (happening) => window.told.push(happening)); 0"
        )
        return Page(self)

    def close(self) -> None:
        """Close the tab, and with it what it has open."""
        with self._stack:
            self.call("Page.close")


class Page(Happenings):
    """listen.js in a tab, which is closed with the block."""

    def __init__(self, tab: Tab) -> None:
        self._tab = tab
        self._told: list[dict[str, Any]] = []

    def told(self) -> list[dict[str, Any]]:
        self._told += json.loads(self._tab.evaluate(f"JSON.stringify(window.told.slice({len(self._told)}))"))
        return self._told

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tab.close()

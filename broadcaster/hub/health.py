"""The health of a hub over HTTP: `/health/live` and `/health/ready` (also `/health`), answered without Sanic."""

from __future__ import annotations

import json
from typing import Any, Final

from broadcaster import wire
from broadcaster.hub.hub import Hub

_ALLOWED: Final = "Allow: GET, HEAD, OPTIONS\r\n"


class Health:
    """Answers health checks: in the turn of the event loop in which they are complete, however many there are."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def answer(self, method: str, path: str) -> bytes | None:
        """The response to a request; None if it does not ask for the hub's health."""
        path = path.rstrip("/")
        if path == "/health/live":
            status, body = 200, {"live": True}  # the event loop turns
        elif path in ("/health", "/health/ready"):
            status, body = 200 if self._hub.ready else 503, self._readiness()
        else:
            return None
        if method == "OPTIONS":
            return wire.response_head(204, 0, _ALLOWED)
        if method not in ("GET", "HEAD"):
            return wire.refusal(405, f"{path} takes GET, HEAD and OPTIONS", _ALLOWED)
        data = json.dumps(body, separators=(",", ":")).encode()
        head = wire.response_head(status, len(data), "Cache-Control: no-store\r\n")
        return head if method == "HEAD" else head + data

    def _readiness(self) -> dict[str, Any]:
        """Ready while it is proven that events of the default channel get through, and the hub is not stopping."""
        hub = self._hub
        broker = hub.broker
        replica = {"redis_node": broker.node, "redis_moved": broker.moved} if broker.node else {}
        return {
            "ready": hub.ready,
            "redis": hub.channels.default in hub.broker.confirmed,
            "stopping": hub.admission.stopping,
            "trouble": hub.probe.problem or hub.probe.warning,
            **replica,
        }

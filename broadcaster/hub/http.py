"""The hub's HTTP side: `/stats`, `/publish`. `/health` is answered before it (`health.py`), and so is `/ws`.

The home of Sanic, with `connections/handshake.py`, which borrows its protocol.
"""

from __future__ import annotations

from dataclasses import asdict
from math import ceil
from types import SimpleNamespace

from sanic import HTTPResponse, Request, Sanic, json
from sanic.config import Config

from broadcaster.hub.hub import Hub
from broadcaster.hub.stats import HubStatistics

App = Sanic[Config, SimpleNamespace]


def create_app(hub: Hub) -> App:
    """The routes of one hub."""
    app = Sanic(f"broadcaster-{id(hub):x}", configure_logging=False)
    app.config.KEEP_ALIVE = False  # an upgrade on a connection that Sanic has used would reach Sanic
    app.config.ACCESS_LOG = False
    # The deadline of admission control comes first.
    app.config.REQUEST_TIMEOUT = ceil(hub.settings.hub.handshake_timeout_s) + 1
    app.config.REQUEST_MAX_SIZE = 65_536

    @app.get("/stats")
    async def stats(request: Request) -> HTTPResponse:
        return json(asdict(HubStatistics.of(hub)))

    @app.post("/publish")
    async def publish(request: Request) -> HTTPResponse:
        """201 with what became of the event."""
        if hub.admission.stopping:
            return json({"error": "the hub is stopping"}, status=503, headers={"Retry-After": "1"})
        reply = await hub.publisher.answer(request.headers.getall("Authorization", []), request.body)
        return json(reply.body, status=reply.status, headers=reply.headers)

    return app

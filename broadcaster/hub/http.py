"""The hub's HTTP side: `/stats`, `/publish`. `/health` is answered before it (`health.py`), and so is `/ws`.

The home of Sanic, with `connections/handshake.py`, which borrows its protocol.
"""

from __future__ import annotations

import logging
from math import ceil
from types import SimpleNamespace
from typing import Final

from sanic import HTTPResponse, Request, Sanic, empty, json
from sanic.config import Config
from sanic.exceptions import SanicException

from broadcaster.hub.deployment.announcer import Announcer
from broadcaster.hub.hub import Hub

App = Sanic[Config, SimpleNamespace]

log = logging.getLogger("broadcaster.hub")

_BYTES_AROUND_DATA: Final = 65_536
"""The most of a published body that is not the event's `data`: other fields, white space, escapes."""


def create_app(hub: Hub, announcer: Announcer) -> App:
    """The routes of one hub. Each answer is JSON; each refusal says `error`."""
    app = Sanic(f"broadcaster-{id(hub):x}", configure_logging=False)
    app.config.KEEP_ALIVE = False  # an upgrade on a connection that Sanic has used would reach Sanic
    app.config.ACCESS_LOG = False
    # The deadline of admission control comes first.
    app.config.REQUEST_TIMEOUT = ceil(hub.settings.hub.handshake_timeout_s) + 1
    app.config.REQUEST_MAX_SIZE = hub.settings.event.max_bytes + _BYTES_AROUND_DATA

    @app.route("/stats", methods=["GET", "HEAD"])
    async def stats(request: Request) -> HTTPResponse:
        scope = request.args.get("scope", "all")
        if scope not in ("all", "self"):
            return json({"error": "scope is all or self"}, status=400)
        return json(announcer.own_statistics() if scope == "self" else await announcer.statistics())

    @app.post("/publish")
    async def publish(request: Request) -> HTTPResponse:
        """201 with what became of the event."""
        if hub.admission.stopping:
            return json({"error": "the hub is stopping"}, status=503, headers={"Retry-After": "1"})
        reply = await hub.publisher.answer(request.headers.getall("Authorization", []), request.body)
        if reply.status != 201:
            why = str(reply.body["error"])
            hub.admission.note_refused(request.ip, f"publish {reply.status}", reply.status, f"/publish: {why}")
        return json(reply.body, status=reply.status, headers=reply.headers)

    @app.options("/stats", name="stats_options")
    async def stats_options(request: Request) -> HTTPResponse:
        return empty(headers={"Allow": "GET, HEAD, OPTIONS"})

    @app.options("/publish", name="publish_options")
    async def publish_options(request: Request) -> HTTPResponse:
        return empty(headers={"Allow": "POST, OPTIONS"})

    @app.exception(SanicException)
    async def refuse(request: Request, error: SanicException) -> HTTPResponse:
        return json({"error": str(error)}, status=error.status_code, headers=error.headers)

    @app.exception(Exception)
    async def fail(request: Request, error: Exception) -> HTTPResponse:
        log.error("cannot answer %s %s", request.method, request.path, exc_info=error)
        return json({"error": "internal error"}, status=500)

    return app

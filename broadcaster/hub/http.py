"""The hub's HTTP side: `/stats`, `/trace`, `/time`, `/events`, `/publish`.

`/health` is answered before it (`health.py`), and so is `/ws`.

The home of Sanic, with `connections/handshake.py`, which borrows its protocol.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from json import dumps
from math import ceil
from types import SimpleNamespace
from typing import Final, cast

from sanic import HTTPResponse, Request, Sanic, empty, json
from sanic.config import Config
from sanic.exceptions import SanicException

from broadcaster import wire
from broadcaster.auth.access import Denied
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.event import channel_name
from broadcaster.core.position import Position
from broadcaster.hub.catchup.history import Busy
from broadcaster.hub.connections.handshake import SanicProtocol
from broadcaster.hub.deployment.announcer import Announcer
from broadcaster.hub.hub import Hub

App = Sanic[Config, SimpleNamespace]
Answer = Callable[[Request], Awaitable[HTTPResponse]]

log = logging.getLogger("broadcaster.hub")

_BYTES_AROUND_DATA: Final = 65_536
"""The most of a published body that is not the event's `data`: other fields, white space, escapes."""

_MOST_TRACED: Final = 1000
"""Events in one answer: some 2 ms of the hub's time."""


def create_app(hub: Hub, announcer: Announcer) -> App:
    """The routes of one hub. Each answer is JSON; each refusal says `error`.

    Each says its `error_format`, or Sanic parses the source of the handler to find it out: that takes time,
    and two hubs that do so at once in one process fail (`SystemError`: CPython 3.11 cannot parse in two threads).
    """
    app = Sanic(f"broadcaster-{id(hub):x}", configure_logging=False)
    app.config.KEEP_ALIVE = False  # an upgrade on a connection that Sanic has used would reach Sanic
    app.config.ACCESS_LOG = False
    # The deadline of admission control comes first.
    app.config.REQUEST_TIMEOUT = ceil(hub.settings.hub.handshake_timeout_s) + 1
    app.config.REQUEST_MAX_SIZE = hub.settings.event.max_bytes + _BYTES_AROUND_DATA

    for path, answer in _monitoring(hub, announcer).items():
        _add_monitored(app, hub, path, answer)

    _add_events(app, hub)

    @app.post("/publish", error_format="json")
    async def publish(request: Request) -> HTTPResponse:
        """201 with what became of the event."""
        if hub.admission.stopping:
            return json({"error": "the hub is stopping"}, status=503, headers={"Retry-After": "1"})
        cast(SanicProtocol, request.protocol).on_publish()
        reply = await hub.publisher.answer(request.headers.getall("Authorization", []), request.body)
        if reply.status != 201:
            why = str(reply.body["error"])
            hub.admission.note_refused(request.ip, f"publish {reply.status}", reply.status, f"/publish: {why}")
        return json(reply.body, status=reply.status, headers=reply.headers)

    @app.options("/publish", name="publish_options", error_format="json")
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


def _monitoring(hub: Hub, announcer: Announcer) -> dict[str, Answer]:
    """What a hub says of itself, by path."""

    async def stats(request: Request) -> HTTPResponse:
        scope = request.args.get("scope", "all")
        if scope not in ("all", "self"):
            return json({"error": "scope is all or self"}, status=400)
        return json(announcer.own_statistics() if scope == "self" else await announcer.statistics())

    async def trace(request: Request) -> HTTPResponse:
        return _trace(hub, request)

    async def time(request: Request) -> HTTPResponse:
        return _clocks(hub)

    return {"/stats": stats, "/trace": trace, "/time": time}


def _add_monitored(app: App, hub: Hub, path: str, answer: Answer) -> None:
    """A route that asks for a token that may monitor, if tokens are asked for."""

    async def get(request: Request) -> HTTPResponse:
        refusal = _refusal(hub, request)
        if refusal is None:
            return await answer(request)
        hub.admission.note_refused(request.ip, f"monitor {refusal.status}", refusal.status, path)
        return refusal

    async def options(request: Request) -> HTTPResponse:
        return empty(headers={"Allow": "GET, HEAD, OPTIONS"})

    app.add_route(get, path, methods=["GET", "HEAD"], name=path[1:], error_format="json")
    app.add_route(options, path, methods=["OPTIONS"], name=f"{path[1:]}_options", error_format="json")


def _add_events(app: App, hub: Hub) -> None:
    """`/events`: what is stored of a channel, for those who may subscribe to it."""

    async def get(request: Request) -> HTTPResponse:
        target = _target(request)
        headers = {"Cache-Control": "private, no-cache"} | _allow_origin(hub, target)
        status, body, more = await _stored_events(hub, target, request.ip)
        if status == 200:
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            known = ",".join(request.headers.getall("If-None-Match", []))
            if known.strip() == "*" or headers["ETag"] in known:
                return HTTPResponse(status=304, headers=headers)
        return HTTPResponse(body, status, headers | more, content_type="application/json")

    async def options(request: Request) -> HTTPResponse:
        headers = {"Allow": "GET, HEAD, OPTIONS"}
        if allow := _allow_origin(hub, _target(request)):
            headers |= allow | {
                "Access-Control-Allow-Methods": "GET, HEAD",
                "Access-Control-Allow-Headers": "Authorization, If-None-Match",
                "Access-Control-Max-Age": "600",
            }
        return empty(headers=headers)

    app.add_route(get, "/events", methods=["GET", "HEAD"], name="events", error_format="json")
    app.add_route(options, "/events", methods=["OPTIONS"], name="events_options", error_format="json")


async def _stored_events(hub: Hub, target: wire.Target, address: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and further headers of the answer."""
    asked = hub.admission.admit_reader(target, address)
    if isinstance(asked, wire.Refusal):
        headers = {} if asked.retry_after_s is None else {"Retry-After": str(asked.retry_after_s)}
        if asked.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return asked.status, dumps({"error": asked.reason}).encode(), headers
    if not hub.settings.history.enabled:
        return 404, dumps({"error": "events are not stored here (history.enabled = false)"}).encode(), {}
    try:
        found = await hub.history.read(asked.channel, asked.begins, asked.filter, asked.limit)
    except Busy:
        error = "too many requests for stored events at once"
    except (RedisUnavailable, RedisRefused) as refusal:
        error = str(refusal)
    else:
        position = None if found.position is None else str(found.position)
        said = {"channel": asked.channel, "position": position, "next": position if found.more else None}
        front = dumps(said | {"complete": found.complete})[:-1].encode()
        return 200, front + b', "events": [' + b",".join(found.payloads) + b"]}", {}
    hub.admission.note_refused(address, "events 503", 503, f"/events: {error}")
    return 503, dumps({"error": error}).encode(), {"Retry-After": "1"}


def _target(request: Request) -> wire.Target:
    """What is asked for, and by which page and token; what is wrong with it is its `fault`."""
    headers = request.headers
    try:
        target = wire.Target.parse(request.raw_url.decode())
        origins = headers.getall("Origin", [])
        if len(origins) > 1:
            raise ValueError("Origin is given twice")
        token = wire.token_in(headers.getall("Authorization", []))
    except ValueError as error:
        return wire.Target("", (), fault=str(error))
    return replace(
        target, host=target.host or headers.get("Host", ""), origin=next(iter(origins), None), token=token
    )


def _allow_origin(hub: Hub, target: wire.Target) -> dict[str, str]:
    """What lets the page of another site read the answer, if it is one that may."""
    if target.origin is None or not target.origin.isascii() or not hub.admission.allows_origin(target):
        return {}
    return {
        "Access-Control-Allow-Origin": target.origin,
        "Access-Control-Expose-Headers": "ETag",
        "Vary": "Origin",
    }


def _trace(hub: Hub, request: Request) -> HTTPResponse:
    """When the last events of a channel were read, and first written."""
    try:
        channel, after, count = _asked(request, hub.channels.default)
    except ValueError as error:
        return json({"error": str(error)}, status=400)
    events, complete = hub.channels.trace.after(channel, after, count)
    rows = [event._asdict() | {"position": str(event.position)} for event in events]
    return json({"instance": hub.instance, "channel": channel, "events": rows, "complete": complete})


def _clocks(hub: Hub) -> HTTPResponse:
    """The clocks of the hub, read one after the other; of many answers the quickest says how far they are."""
    monotonic_ns, wall_ns = hub.clock.monotonic_ns(), hub.clock.wall_ns()
    return json({"instance": hub.instance, "monotonic_ns": monotonic_ns, "wall_ns": wall_ns})


def _refusal(hub: Hub, request: Request) -> HTTPResponse | None:
    """The answer to a request that may not monitor; None if it may."""
    try:
        may = hub.access.grant(wire.token_in(request.headers.getall("Authorization", []))).monitor
    except ValueError as error:
        return json({"error": str(error)}, status=400)
    except Denied as denied:
        return json({"error": str(denied)}, status=401, headers={"WWW-Authenticate": "Bearer"})
    return None if may else json({"error": "the token is not good for monitoring"}, status=403)


def _asked(request: Request, default: str) -> tuple[str, Position | None, int]:
    """Channel, position and number of events that are asked for.

    Raises:
        ValueError: One of them is wrong; the message says which.
    """
    asked = {name: values[-1] for name, values in request.args.items()}
    channel = channel_name(asked.get("channel", default))
    after = Position.parse(asked["after"]) if asked.get("after") else None
    count = asked.get("count", str(_MOST_TRACED))
    if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count) > 0):
        raise ValueError(f"count is a number of events from 1, got {count[:40]!r}")
    return channel, after, min(int(count), _MOST_TRACED)

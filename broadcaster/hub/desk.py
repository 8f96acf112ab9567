"""Takes events over HTTP, from those who do not talk to Redis, and publishes them as any publisher does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from broadcaster import wire
from broadcaster.access import ANYBODY, Access, Denied
from broadcaster.errors import InvalidEvent, RedisRefused, RedisUnavailable
from broadcaster.event import check_channel
from broadcaster.hub.channels import OWN
from broadcaster.publisher import Published, Publisher
from broadcaster.settings import Settings

_FIELDS: Final = ("event_type", "source", "severity", "data", "channel")

_SPARE_S: Final = 1.0
"""So many seconds before the front's deadline it is known what became of an event."""


class Forbidden(Exception):
    """Who asks may not publish there."""


class Reply(NamedTuple):
    """What is answered: HTTP status, JSON body, further headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


class Desk:
    """Publishes what comes over HTTP, over one link to Redis that is made when it is needed.

    Attributes:
        published: Events that Redis has taken.
    """

    def __init__(self, settings: Settings, access: Access) -> None:
        longest_s = max(0.1, settings.hub.handshake_timeout_s - _SPARE_S)
        deadline_s = min(settings.publisher.publish_deadline_s, longest_s)
        limits = settings.publisher.model_copy(update={"publish_deadline_s": deadline_s})
        self._publisher = Publisher(settings.model_copy(update={"publisher": limits}))
        self._channel = settings.event.channel
        self._access = access
        self.published = 0

    async def answer(self, authorization: Sequence[str], body: bytes) -> Reply:
        """Publish what a request brings, and say what became of it.

        Args:
            authorization: The `Authorization` headers.
            body: See `take`.
        """
        try:
            token = wire.token_in(", ".join(authorization)) if authorization else None
        except ValueError as error:
            return Reply(400, {"error": str(error)}, {})
        try:
            published = await self.take(token, body)
        except Denied as denied:
            return Reply(401, {"error": str(denied)}, {"WWW-Authenticate": "Bearer"})
        except Forbidden as error:
            return Reply(403, {"error": str(error)}, {})
        except InvalidEvent as error:
            return Reply(413 if error.cause == "too_large" else 400, {"error": error.detail}, {})
        except (RedisUnavailable, RedisRefused) as error:
            return Reply(503, {"error": str(error)}, {"Retry-After": "1"})
        position = published.position and str(published.position)
        fields = {"event_id": published.event.event_id, "position": position, "heard": published.heard}
        return Reply(201, fields, {})

    async def take(self, token: str | None, body: bytes) -> Published:
        """Publish an event.

        Args:
            token: What the publisher shows.
            body: A JSON object with `event_type` and `source`, and perhaps `severity`, `data` and `channel`.

        Raises:
            Denied: The token is not valid.
            Forbidden: It is not good for publishing on this channel; or there is no access control.
            InvalidEvent: The body is no such object, or the event is too large.
            RedisUnavailable: It is not known whether the event was published.
            RedisRefused: The hub itself may not publish there.
        """
        grant = self._access.grant(token)
        if grant is ANYBODY:
            raise Forbidden('publishing over HTTP needs auth.mode = "token"')
        fields = _read(body)
        channel = check_channel(fields.get("channel", self._channel))
        if channel.startswith(OWN) or not grant.may_publish(channel):
            raise Forbidden(f"not for you: {channel}")
        published = await self._publisher.publish(
            fields.get("event_type", ""),
            fields.get("source", ""),
            severity=fields.get("severity", "critical"),
            data=fields.get("data"),
            to=channel,
        )
        self.published += 1
        return published

    def close(self) -> None:
        self._publisher.close()


def _read(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidEvent("not_json", "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise InvalidEvent("not_object", "the body is not a JSON object")
    for name in fields:
        if name not in _FIELDS:
            raise InvalidEvent("field", f"{name[:40]!r} is not one of {', '.join(_FIELDS)}")
    return fields

"""Takes events over HTTP, from publishers that do not talk to Redis, and publishes them as any publisher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from broadcaster import wire
from broadcaster.auth.access import UNRESTRICTED, Access, Denied
from broadcaster.core.errors import InvalidEvent, RedisRefused, RedisUnavailable
from broadcaster.core.event import check_channel
from broadcaster.core.subscription import HUB_CHANNELS
from broadcaster.core.text import json_object
from broadcaster.hub.broker.broker import Broker
from broadcaster.publish.publisher import Published

_FIELDS: Final = ("event_type", "source", "severity", "data", "channel")


class Forbidden(Exception):
    """The token does not allow to publish there."""


class Reply(NamedTuple):
    """What is answered: HTTP status, JSON body, further headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


class HttpPublisher:
    """Publishes what comes over HTTP.

    Attributes:
        published: Events that Redis has taken.
    """

    def __init__(self, channel: str, broker: Broker, access: Access) -> None:
        """Prepare.

        Args:
            channel: Where to publish what names no other one.
            broker: Publishes.
            access: Which tokens allow what.
        """
        self._channel = channel
        self._broker = broker
        self._access = access
        self.published = 0

    async def answer(self, authorization: Sequence[str], body: bytes) -> Reply:
        """Publish what a request brings, and say what became of it.

        Args:
            authorization: The `Authorization` headers.
            body: See `take`.
        """
        try:
            token = wire.token_in(authorization)
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
            token: The publisher's; None if it has shown none.
            body: A JSON object with `event_type` and `source`, and perhaps `severity`, `data` and `channel`.

        Raises:
            Denied: The token is not valid.
            Forbidden: It does not allow to publish on this channel; or there is no access control.
            InvalidEvent: The body is no such object, or the event is too large.
            RedisUnavailable: It is not known whether the event was published.
            RedisRefused: The hub itself may not publish there.
        """
        grant = self._access.grant(token)
        if grant is UNRESTRICTED:
            raise Forbidden('publishing over HTTP needs auth.mode = "token"')
        fields = _read(body)
        channel = check_channel(fields.get("channel", self._channel))
        if channel.startswith(HUB_CHANNELS) or not grant.may_publish(channel):
            raise Forbidden(f"not for you: {channel}")
        published = await self._broker.publish(
            fields.get("event_type", ""),
            fields.get("source", ""),
            severity=fields.get("severity", "critical"),
            data=fields.get("data"),
            to=channel,
        )
        self.published += 1
        return published


def _read(body: bytes) -> dict[str, Any]:
    fields = json_object(body, "the body")
    for name in fields:
        if name not in _FIELDS:
            raise InvalidEvent("field", f"{name[:40]!r} is not one of {', '.join(_FIELDS)}")
    return fields

"""The status of a hub over HTTP: whether it is ready, its counters, its trace and its clocks."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlencode, urlsplit

from broadcaster.core import dialing
from broadcaster.core.errors import HubUnavailable
from broadcaster.core.position import Position
from broadcaster.core.redaction import redact
from broadcaster.core.runtime import CLOCK
from broadcaster.wire import tls

_POLL_S: Final = 0.05

_READINESS: Final = "/health/ready"


def base_url(websocket_url: str) -> str:
    """`http://host:port` of the hub behind a ws:// URL, with its user and password if it has them."""
    parts = urlsplit(websocket_url)
    return f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc}"


class MonitoringRefused(HubUnavailable):
    """The hub shows its counters, trace and clocks only to tokens that may monitor, and this one may not."""


async def statistics(url: str, timeout_s: float = 2.0, tls_ca: str = "", token: str = "") -> dict[str, Any]:
    """What a hub's `/stats` says of its whole deployment.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        MonitoringRefused: The token may not monitor.
        HubUnavailable: It did not answer.
    """
    body = await asyncio.to_thread(_get, f"{url}/stats", timeout_s, tls.client_context(url, tls_ca), token)
    if not {"ready", "connected"} <= body.keys():
        raise HubUnavailable("what answers there is no hub")
    return body


async def trace(
    url: str, channel: str, after: Position | None, *, tls_ca: str = "", token: str = "", timeout_s: float = 5.0
) -> dict[str, Any]:
    """A page of the hub's `/trace`: events of a channel behind a position, or from the oldest that is kept.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        MonitoringRefused: The token may not monitor.
        HubUnavailable: It did not answer, or has no trace.
    """
    query = urlencode({"channel": channel, "after": str(after or "")})
    context = tls.client_context(url, tls_ca)
    body = await asyncio.to_thread(_get, f"{url}/trace?{query}", timeout_s, context, token)
    if not {"instance", "events", "complete"} <= body.keys():
        raise HubUnavailable("the hub has no trace")
    return body


@dataclass(frozen=True, slots=True)
class ClockReading:
    """The clocks of a hub, compared with the CLOCK_MONOTONIC of this process; nanoseconds.

    Attributes:
        instance: Which hub has answered.
        ahead_ns: How far its CLOCK_MONOTONIC is ahead ...
        error_ns: ... by so much more or less: half of the shortest round trip, in the middle of which it is
            taken to have read its clock.
        wall_ahead_ns: How far its wall clock is ahead of its CLOCK_MONOTONIC.
    """

    instance: str
    ahead_ns: int
    error_ns: int
    wall_ahead_ns: int


async def clock(
    url: str, *, exchanges: int = 20, tls_ca: str = "", token: str = "", timeout_s: float = 2.0
) -> ClockReading:
    """Compare the hub's clock with that of this process: of some exchanges the one with the shortest round trip.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        MonitoringRefused: The token may not monitor.
        HubUnavailable: It did not answer, has no `/time`, or several hubs answer in turns.
    """
    context = tls.client_context(url, tls_ca)
    return await asyncio.to_thread(_compare, url, exchanges, timeout_s, context, token)


def _compare(
    url: str, exchanges: int, timeout_s: float, context: ssl.SSLContext | None, token: str
) -> ClockReading:
    readings = []
    for _ in range(exchanges):
        body, (sent_ns, received_ns) = _exchange(f"{url}/time", timeout_s, context, token)
        try:
            instance, hub_ns, wall_ns = str(body["instance"]), int(body["monotonic_ns"]), int(body["wall_ns"])
        except (KeyError, TypeError, ValueError):
            raise HubUnavailable("the hub does not tell its clocks") from None
        ahead_ns, error_ns = midpoint(sent_ns, received_ns, hub_ns)
        readings.append(ClockReading(instance, ahead_ns, error_ns, wall_ns - hub_ns))
    if len({reading.instance for reading in readings}) > 1:
        raise HubUnavailable("several hubs answer at this address in turns")
    return min(readings, key=lambda reading: reading.error_ns)


def midpoint(sent_ns: int, received_ns: int, its_ns: int) -> tuple[int, int]:
    """How far another clock was ahead when it was read between two instants, and how far from that it may be."""
    error_ns = (received_ns - sent_ns + 1) // 2
    return its_ns - (sent_ns + error_ns), error_ns


async def settled_statistics(url: str, within_s: float = 3.0, tls_ca: str = "", token: str = "") -> dict[str, Any]:
    """The same, when every hub of the deployment has announced itself once more: what was before now is counted.

    Raises:
        ConfigurationError, MonitoringRefused, HubUnavailable: As `statistics`.
    """
    numbers = await statistics(url, tls_ca=tls_ca, token=token)
    before, deadline = _serials(numbers), CLOCK.loop_s() + within_s
    # On a shared port each answer may be another hub's, which knows the others by what they have announced.
    while len(before) > 1 and CLOCK.loop_s() < deadline:
        now = _serials(numbers)
        if all(now.get(name, serial + 1) > serial for name, serial in before.items()):
            break
        await asyncio.sleep(_POLL_S)
        numbers = await statistics(url, tls_ca=tls_ca, token=token)
    return numbers


def _serials(numbers: dict[str, Any]) -> dict[str, int]:
    return {hub["name"]: hub["serial"] for hub in numbers.get("deployment", {}).get("hubs", ())}


def taken_by(url: str, numbers: dict[str, Any]) -> str:
    """Whose port the one in `url` is, by the counters of the hub that answers there."""
    who = f"pid {numbers.get('pid', 'unknown')}, version {numbers.get('version', 'unknown')}"
    return f"{urlsplit(url).port} is taken by another hub ({who}); --port takes another one"


async def wait_until_ready(
    url: str,
    *,
    subscribers: int = 0,
    within_s: float,
    tls_ca: str = "",
    token: str = "",
    is_ours: Callable[[int], bool] | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Wait until the hub is ready and has at least `subscribers` connected; return its counters.

    Where it does not show them to the token, wait until it is ready; nothing is known of its subscribers, and
    nothing is returned.

    Args:
        url: See `base_url`.
        subscribers: How many must be connected.
        within_s: The deadline.
        tls_ca: As `subscriber.tls_ca`.
        token: Good for monitoring.
        is_ours: Whether the hub with a process id is the one that is meant; None: any is.
        whole: Whether all hubs of its deployment have to be there, and be as they should.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        HubUnavailable: Not within `within_s` seconds; the message says what is missing. Or at once: another hub
            answers there.
    """
    deadline = CLOCK.loop_s() + within_s
    while True:
        try:
            numbers = await statistics(url, min(2.0, within_s), tls_ca, token)
        except MonitoringRefused as error:
            if await _is_ready(url, min(2.0, within_s), tls_ca):
                return {}
            missing = str(error)
        except HubUnavailable as error:
            missing = str(error)
        else:
            if is_ours is not None and not await asyncio.to_thread(is_ours, numbers.get("pid", 0)):
                raise HubUnavailable(taken_by(url, numbers))
            if not (missing := _missing(numbers, subscribers, whole)):
                return numbers
        if CLOCK.loop_s() > deadline:
            raise HubUnavailable(f"waited {within_s:g} s for the hub at {redact(url)}: {missing}")
        await asyncio.sleep(_POLL_S)


def _missing(numbers: dict[str, Any], subscribers: int, whole: bool) -> str:
    if not numbers["ready"]:
        return "it is not ready (see /health/ready)"
    problems = numbers.get("deployment", {}).get("problems", ())
    if whole and problems:
        return "; ".join(problems)
    if numbers["connected"] < subscribers:
        return f"{numbers['connected']} of {subscribers} subscribers are connected"
    return ""


async def _is_ready(url: str, timeout_s: float, tls_ca: str) -> bool:
    try:
        context = tls.client_context(url, tls_ca)
        body = await asyncio.to_thread(_get, url + _READINESS, timeout_s, context)
    except HubUnavailable:
        return False
    return body.get("ready") is True


def _get(url: str, timeout_s: float, context: ssl.SSLContext | None, token: str = "") -> dict[str, Any]:
    return _exchange(url, timeout_s, context, token)[0]


def connect_to(
    url: str, timeout_s: float, context: ssl.SSLContext | None, token: str
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """An open connection; and target and headers of the request for what is at the URL.

    Raises:
        OSError, ValueError: It cannot be opened.
    """
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    headers = {"Host": parts.netloc.rpartition("@")[2]}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif user:
        headers["Authorization"] = f"Basic {b64encode(unquote(user).encode()).decode()}"
    host, port = parts.hostname or "", parts.port or (443 if context else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = dialing.connect_blocking(host, port, timeout_s)
    if context:
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
    return connection, parts._replace(scheme="", netloc="").geturl(), headers


def _exchange(
    url: str, timeout_s: float, context: ssl.SSLContext | None, token: str
) -> tuple[dict[str, Any], tuple[int, int]]:
    """A JSON object, and the instants (CLOCK_MONOTONIC, ns) before it was asked for and after it began to come."""
    try:
        connection, target, headers = connect_to(url, timeout_s, context, token)
        with contextlib.closing(connection):
            sent_ns = CLOCK.monotonic_ns()
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            received_ns = CLOCK.monotonic_ns()
            if response.status in (401, 403):
                raise MonitoringRefused(f"it asks for a token that may monitor (HTTP {response.status})")
            if response.status != 200 and target != _READINESS:
                raise HubUnavailable(f"no answer (HTTP {response.status} {response.reason})")
            body = json.load(response)
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise HubUnavailable(f"no answer ({tls.why_not_connected(error)})") from None
    if not isinstance(body, dict):
        raise HubUnavailable("what answers there is no hub")
    return body, (sent_ns, received_ns)

"""The status of a hub over HTTP: whether it is ready, and its counters."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from broadcaster.core.errors import HubUnavailable
from broadcaster.core.redaction import redact
from broadcaster.core.runtime import CLOCK
from broadcaster.core.text import reason
from broadcaster.wire import tls

_POLL_S: Final = 0.05


def base_url(websocket_url: str) -> str:
    """`http://host:port` of the hub behind a ws:// URL, with its user and password if it has them."""
    parts = urlsplit(websocket_url)
    return f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc}"


async def statistics(url: str, timeout_s: float = 2.0, tls_ca: str = "") -> dict[str, Any]:
    """What a hub's `/stats` says of its whole deployment.

    Raises:
        ConfigurationError: `tls_ca` cannot be read.
        HubUnavailable: It did not answer.
    """
    return await asyncio.to_thread(_get, f"{url}/stats", timeout_s, tls.client_context(url, tls_ca))


async def settled_statistics(url: str, within_s: float = 3.0, tls_ca: str = "") -> dict[str, Any]:
    """The same, when every hub of the deployment has announced itself once more: what was before now is counted.

    Raises:
        ConfigurationError, HubUnavailable: As `statistics`.
    """
    numbers = await statistics(url, tls_ca=tls_ca)
    before, deadline = _serials(numbers), CLOCK.loop_s() + within_s
    # On a shared port each answer may be another hub's, which knows the others by what they have announced.
    while len(before) > 1 and CLOCK.loop_s() < deadline:
        now = _serials(numbers)
        if all(now.get(name, serial + 1) > serial for name, serial in before.items()):
            break
        await asyncio.sleep(_POLL_S)
        numbers = await statistics(url, tls_ca=tls_ca)
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
    is_ours: Callable[[int], bool] | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Wait until the hub is ready and has at least `subscribers` connected; return its counters.

    Args:
        url: See `base_url`.
        subscribers: How many must be connected.
        within_s: The deadline.
        tls_ca: As `subscriber.tls_ca`.
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
            numbers = await statistics(url, min(2.0, within_s), tls_ca)
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


def _get(url: str, timeout_s: float, tls: ssl.SSLContext | None) -> dict[str, Any]:
    # No proxy: that of the environment would be used even for localhost.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
    parts = urlsplit(url)
    user, _, address = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=address).geturl())
    if user:
        request.add_header("Authorization", f"Basic {b64encode(unquote(user).encode()).decode()}")
    try:
        with opener.open(request, timeout=timeout_s) as response:
            body = json.load(response)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise HubUnavailable(f"no answer ({reason(cause) if isinstance(cause, Exception) else cause})") from None
    if not isinstance(body, dict) or not {"ready", "connected"} <= body.keys():
        raise HubUnavailable("what answers there is no hub")
    return body

"""Who is let in: limits, origin, token and channels are checked before the upgrade, the cheapest first."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

from broadcaster import wire
from broadcaster.access import ANYBODY, Access, Denied, Grant
from broadcaster.access import CAUSES as DENIALS
from broadcaster.hub.channels import Channels
from broadcaster.hub.request import Ask, read_query
from broadcaster.settings import Settings, is_loopback

REFUSALS: Final = (
    *("half_open", "too_late", "handshakes", "requests"),
    *("stopping", "full", "address_full", "malformed", "origin"),
    *(f"token_{cause}" for cause in DENIALS),
    *("query", "forbidden_channel", "unknown_channel", "no_room"),
)
"""Why somebody may be refused, in the order in which it is looked at; every one is a counter."""

_RETRY_S: Final = 5


@dataclass(frozen=True, slots=True)
class Admission:
    """Somebody who is let in: what he asks for, and until when (seconds since 1970; None: for good)."""

    ask: Ask
    address: str
    expires_at: float | None


class Visitor(Protocol):
    """A connection whose request is not complete, or not answered; all wait equally long."""

    deadline: float

    def expire(self) -> None:
        """It has to go."""


class Gate:
    """Admits subscribers.

    Attributes:
        access: Who may do what.
        stopping: Nobody is let in any more.
        connected: How many are connected per address.
        refused: How many were not let in, by cause; every cause is present.
    """

    def __init__(self, settings: Settings, channels: Channels) -> None:
        """Read the keys.

        Raises:
            ConfigurationError: See `Access`.
        """
        self._settings = settings
        self._channels = channels
        self.access = Access(settings.auth)
        self._handshakes = Rate(settings.hub.handshakes_per_s)
        self._requests = Rate(settings.hub.requests_per_s)
        self._clock = asyncio.get_running_loop().time
        self._visitors: dict[Visitor, None] = {}  # in the order of their deadlines
        self._all = 0
        self.stopping = False
        self.connected: Counter[str] = Counter()
        self.refused: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))

    # Before anything is known of them

    def watch(self, visitor: Visitor) -> None:
        """Hold a request to its deadline, beginning now; of too many the oldest has to go."""
        self._visitors.pop(visitor, None)
        visitor.deadline = self._clock() + self._settings.hub.handshake_timeout_s
        self._visitors[visitor] = None
        if len(self._visitors) > self._settings.hub.max_handshakes:
            # Whoever means it is through long before those who came after him.
            self._show_out("half_open")

    def forget(self, visitor: Visitor) -> None:
        """Its request is complete, or it has gone; does nothing the second time."""
        self._visitors.pop(visitor, None)

    def tick(self) -> None:
        """Whose deadline has passed has to go."""
        now = self._clock()
        while (oldest := next(iter(self._visitors), None)) and oldest.deadline <= now:
            self._show_out("too_late")

    def _show_out(self, cause: str) -> None:
        oldest = next(iter(self._visitors))
        del self._visitors[oldest]
        self.refused[cause] += 1
        oldest.expire()

    def may_shake_hands(self) -> bool:
        """Whether one more handshake may be looked at now; looking costs more than all the rest."""
        return self._allows(self._handshakes, "handshakes")

    def may_ask(self) -> bool:
        """Whether one more plain HTTP request may be answered now."""
        return self._allows(self._requests, "requests")

    def _allows(self, rate: Rate, cause: str) -> bool:
        allowed = rate.allows_one()
        self.refused[cause] += not allowed
        return allowed

    # What they ask for

    def admit(self, target: wire.Target, address: str) -> Admission | wire.Refusal:
        """Let a well-formed request in, or say why not."""
        hub = self._settings.hub
        if self.stopping:
            return self._refuse("stopping", 503, "the hub is stopping", retry_after_s=1)
        if self._all >= hub.max_connections:
            return self._refuse("full", 503, "too many subscribers", retry_after_s=_RETRY_S)
        address = _neighbourhood(address)
        if self.connected[address] >= hub.max_per_address:
            return self._refuse("address_full", 503, "too many of this address", retry_after_s=_RETRY_S)
        if target.fault:
            return self._refuse("malformed", 400, f"bad request: {target.fault}")
        if not self._is_welcome(target):
            return self._refuse("origin", 403, "this origin is not allowed")
        try:
            grant = self.access.grant(target.token)
        except Denied as denied:
            return self._refuse(f"token_{denied.cause}", 401, str(denied))
        try:
            ask = read_query(target.query, self._channels.default)
        except ValueError as error:
            return self._refuse("query", 400, str(error))
        if refusal := self._refuse_channels(ask, grant):
            return refusal
        return Admission(ask, address, grant.expires_at)

    def _refuse_channels(self, ask: Ask, grant: Grant) -> wire.Refusal | None:
        names = [name for name, _ in ask.channels]
        most = self._settings.channels.max_per_connection
        if len(names) > most:
            return self._refuse("query", 400, f"more than {most} channels")
        for name in names:
            if grant is not ANYBODY and not grant.may_subscribe(name):
                return self._refuse("forbidden_channel", 403, f"not for you: {name}")
            if not self._channels.is_allowed(name):
                return self._refuse("unknown_channel", 404, f"no such channel here: {name}")
        if not self._channels.has_room_for(*names):
            return self._refuse("no_room", 503, "too many channels are open", retry_after_s=_RETRY_S)
        return None

    def _is_welcome(self, target: wire.Target) -> bool:
        """Only a browser sends an origin, on behalf of whatever page: it must be our own, or one we know.

        A page whose name was made to resolve to this machine (DNS rebinding) believes that it talks to its own
        site, and `Host` says so. Where a token is asked for, it has none; else only this machine's names are ours.
        """
        origin, allowed = target.origin, self._settings.hub.allowed_origins
        if origin is None or origin in allowed or "*" in allowed:
            return True
        scheme, _, host = origin.lower().partition("://")
        if scheme not in ("http", "https") or not host or host != target.host.lower():
            return False
        auth = self._settings.auth
        return auth.mode == "token" or auth.open_to_network or is_loopback(_name_of(host))

    def _refuse(self, cause: str, status: int, reason: str, *, retry_after_s: int | None = None) -> wire.Refusal:
        self.refused[cause] += 1
        return wire.Refusal(status, reason, retry_after_s)

    # Who is in

    def enter(self, address: str) -> None:
        """Somebody who was admitted is connected."""
        self._all += 1
        self.connected[address] += 1

    def leave(self, address: str) -> None:
        """He is gone."""
        self._all -= 1
        self.connected[address] -= 1
        if not self.connected[address]:
            del self.connected[address]


def _name_of(host: str) -> str:
    """The name or address in `name:port`; empty if it is no such thing."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _neighbourhood(address: str) -> str:
    """Whom the limit per address counts together: of IPv6 everybody gets a whole /64."""
    if ":" not in address:
        return address
    host = ipaddress.IPv6Address(address.partition("%")[0])
    return str(host.ipv4_mapped or ipaddress.IPv6Network((int(host) >> 64 << 64, 64)))


class Rate:
    """A token bucket: so many per second, and a second's worth at once."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left = per_s
        self._asked_at = time.monotonic()

    def allows_one(self) -> bool:
        now = time.monotonic()
        self._left = min(self._per_s, self._left + (now - self._asked_at) * self._per_s)
        self._asked_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

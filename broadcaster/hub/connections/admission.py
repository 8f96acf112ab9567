"""Admission control: limits, origin, token and channels are checked before the upgrade, the cheapest first."""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from broadcaster import wire
from broadcaster.auth.access import CAUSES as DENIALS
from broadcaster.auth.access import UNRESTRICTED, Access, Denied, Grant
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.ratelimit import TokenBucket, TokenBuckets
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.text import printable
from broadcaster.hub.channels.channels import Channels
from broadcaster.hub.connections.registry import ConnectionRegistry
from broadcaster.hub.connections.request import (
    EventsRequest,
    SubscribeRequest,
    read_events_query,
    read_query,
)
from broadcaster.settings import Settings, is_loopback, origin

log = logging.getLogger("broadcaster.hub")

REFUSALS: Final = (
    *("half_open", "too_late", "handshakes", "address_requests", "requests"),
    *("stopping", "full", "address_full", "malformed", "origin"),
    *(f"token_{cause}" for cause in DENIALS),
    *("query", "forbidden_channel", "unknown_channel", "channel_unavailable", "no_room", "channel_share"),
)
"""Why a client may be refused, in the order in which it is checked; every one is a counter."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A client that is admitted.

    Attributes:
        request: What it asks for.
        address: Where it comes from, as the limit per address counts.
        grant: What its token allows.
    """

    request: SubscribeRequest
    address: str
    grant: Grant


class PendingHandshake(Protocol):
    """A connection whose request is not complete, or not answered; all may take equally long."""

    deadline: float

    def expire(self) -> bool:
        """End it: it has taken too long, or there are too many. Whether it is refused by that, and not before."""


class AdmissionControl:
    """Admits clients.

    Attributes:
        stopping: Set when the hub stops: no client is admitted any more.
        answering: How many upgrades wait for their turn to be answered.
        refused: How many were not admitted, by cause; every cause is present.
        log: Of what happens to single clients.
    """

    def __init__(
        self,
        settings: Settings,
        channels: Channels,
        access: Access,
        registry: ConnectionRegistry[Any],
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare.

        Args:
            settings: Limits.
            channels: Which exist.
            access: Which tokens allow what.
            registry: Who is connected already.
            runtime: Time and limits.
        """
        self._channels = channels
        self._access = access
        self._registry = registry
        self._limits = runtime.limits
        self._clock = runtime.clock
        self.use(settings)
        self._pending: dict[PendingHandshake, None] = {}  # in the order of their deadlines
        self.log = ThrottledLog(log, clock=runtime.clock)
        self.stopping = False
        self.answering = 0
        self.refused: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))

    def use(self, settings: Settings) -> None:
        """Go by other limits and origins from now on."""
        hub, clock = settings.hub, self._clock
        self._settings = settings
        self._handshakes = TokenBucket(hub.handshakes_per_s, clock=clock)
        self._requests = TokenBucket(hub.requests_per_s, clock=clock)
        self._requests_by_address = TokenBuckets(
            hub.requests_per_address, self._limits.known_addresses, clock=clock
        )

    # Before anything is known of a client

    def watch(self, handshake: PendingHandshake) -> None:
        """Hold a request to its deadline, beginning now; of too many the oldest is evicted."""
        self._pending.pop(handshake, None)
        handshake.deadline = self._clock.loop_s() + self._settings.hub.handshake_timeout_s
        self._pending[handshake] = None
        if len(self._pending) > self._settings.hub.max_handshakes:
            # An honest client is through long before those that came after it.
            self._evict_oldest("half_open")

    def forget(self, handshake: PendingHandshake) -> None:
        """Its request is complete, or it has gone; does nothing the second time."""
        self._pending.pop(handshake, None)

    @property
    def pending(self) -> int:
        """How many requests are not complete, or not answered."""
        return len(self._pending) + self.answering

    def evict_overdue(self) -> None:
        """End the handshakes whose deadline has passed."""
        now = self._clock.loop_s()
        while (oldest := next(iter(self._pending), None)) and oldest.deadline <= now:
            self._evict_oldest("too_late")

    def _evict_oldest(self, cause: str) -> None:
        oldest = next(iter(self._pending))
        del self._pending[oldest]
        self.refused[cause] += oldest.expire()

    def allows_handshake(self) -> bool:
        """Whether one more handshake may be answered now; parsing it costs more than all the rest."""
        return self._count("handshakes", self._handshakes.allows_one())

    def allows_request(self, address: str) -> bool:
        """Whether one more plain HTTP request of an address may be answered now.

        Its own limit comes first: one that asks too much uses up nothing of what all others share.
        """
        allowed = self._requests_by_address.allows_one(_network_of(address))
        return self._count("address_requests", allowed) and self._count("requests", self._requests.allows_one())

    def _count(self, cause: str, allowed: bool) -> bool:
        self.refused[cause] += not allowed
        return allowed

    # What it asks for

    def admit(self, target: wire.Target, address: str, *, is_stream: bool = False) -> Admitted | wire.Refusal:
        """Admit a well-formed request, or say why not; one for an event stream may ask for one channel only."""
        hub, registry = self._settings.hub, self._registry
        if self.stopping:
            return self._refuse(address, "stopping", 503, "the hub is stopping", retry_after_s=1)
        if registry.connected >= hub.max_connections:
            return self._refuse_for_now(address, "full", "too many subscribers")
        address = _network_of(address)
        if registry.by_address[address] >= hub.max_per_address:
            return self._refuse_for_now(address, "address_full", "too many of this address")
        grant = self._grant(target, address, is_plain=is_stream)
        if isinstance(grant, wire.Refusal):
            return grant
        try:
            most_back = self._settings.history.max_events
            request = read_query(target.query, self._channels.default, self._limits, most_back)
        except ValueError as error:
            return self._refuse(address, "query", 400, str(error))
        if refusal := self._refuse_channels(request, grant, address, 1 if is_stream else None):
            return refusal
        return Admitted(request, address, grant)

    def admit_reader(self, target: wire.Target, address: str) -> EventsRequest | wire.Refusal:
        """Admit a request for stored events, or say why not: as for an event stream, but no channel is opened."""
        if self.stopping:
            return self._refuse(address, "stopping", 503, "the hub is stopping", retry_after_s=1)
        grant = self._grant(target, address, is_plain=True)
        if isinstance(grant, wire.Refusal):
            return grant
        try:
            most_back = self._settings.history.max_events
            request = read_events_query(target.query, self._channels.default, self._limits, most_back)
        except ValueError as error:
            return self._refuse(address, "query", 400, str(error))
        return self._refuse_channel(request.channel, grant, address) or request

    def _grant(self, target: wire.Target, address: str, *, is_plain: bool) -> Grant | wire.Refusal:
        """What the token of a request allows, if it is well-formed, and of a page that may ask."""
        if target.fault:
            return self._refuse(address, "malformed", 400, f"bad request: {target.fault}")
        if not self.allows_origin(target) or (is_plain and not self.allows_host(target)):
            page, host = (printable(text or "none")[:200] for text in (target.origin, target.host))
            # A proxy that does not pass Host on has its visitors refused: that has to be seen here.
            said = f"Origin {page}, Host {host}; neither this hub's own site, nor in hub.allowed_origins"
            return self._refuse(address, "origin", 403, "this origin is not allowed", said=said)
        try:
            return self._access.grant(target.token)
        except Denied as denied:
            return self._refuse(address, f"token_{denied.cause}", 401, str(denied), detail=denied.detail)

    def _refuse_channels(
        self, request: SubscribeRequest, grant: Grant, address: str, most: int | None
    ) -> wire.Refusal | None:
        names = [name for name, _ in request.channels]
        most = most or self._settings.channels.max_per_connection
        if len(names) > most:
            return self._refuse(address, "query", 400, f"more than {most} channel{'s'[: most > 1]}")
        for name in names:
            if refusal := self._refuse_channel(name, grant, address):
                return refusal
        if not self._channels.has_room_for(*names):
            return self._refuse_for_now(address, "no_room", "too many channels are open")
        if not self._channels.may_open(address, *names):
            return self._refuse_for_now(
                address, "channel_share", "this address has its share of the open channels"
            )
        return None

    def _refuse_channel(self, name: str, grant: Grant, address: str) -> wire.Refusal | None:
        if grant is not UNRESTRICTED and not grant.may_subscribe(name):
            return self._refuse(address, "forbidden_channel", 403, f"not for you: {name}")
        if not self._channels.is_allowed(name):
            return self._refuse(address, "unknown_channel", 404, f"no such channel here: {name}")
        if self._channels.is_unavailable(name):
            reason = f"Redis refuses this channel to the hub: {name}"
            return self._refuse_for_now(address, "channel_unavailable", reason)
        return None

    def allows_origin(self, target: wire.Target) -> bool:
        """Only a browser sends an origin, on behalf of whatever page: it must be the hub's own, or a known one.

        A page whose name was made to resolve to this machine (DNS rebinding) believes that it talks to its own
        site, and `Host` says so. Where a token is asked for, it has none; else only this machine's names are ours.
        """
        return target.origin is None or self._is_known(target.origin, target.host)

    def allows_host(self, target: wire.Target) -> bool:
        """Over plain HTTP a browser sends no origin to the page's own site: there the host stands for it."""
        return target.origin is not None or any(
            self._is_known(f"{scheme}://{target.host}", target.host) for scheme in ("http", "https")
        )

    def _is_known(self, page: str, host: str) -> bool:
        allowed = self._settings.hub.allowed_origins
        if origin.ANY in allowed:
            return True
        try:
            site = origin.canonical_origin(page)
        except ValueError:
            return False
        if origin.matches(site, allowed):
            return True
        auth = self._settings.auth
        is_ours = auth.mode == "token" or auth.open_to_network or is_loopback(_name_of(host))
        return is_ours and origin.is_own(site, host)

    def _refuse_for_now(self, address: str, cause: str, reason: str) -> wire.Refusal:
        return self._refuse(address, cause, 503, reason, retry_after_s=self._limits.retry_after_s)

    def _refuse(
        self,
        address: str,
        cause: str,
        status: int,
        reason: str,
        *,
        detail: str = "",
        said: str = "",
        retry_after_s: int | None = None,
    ) -> wire.Refusal:
        """Count and log it; `detail` is one of a few and logged apart, what the client `said` may be anything."""
        self.refused[cause] += 1
        more = detail or said
        self.note_refused(address, f"{cause} {detail}", status, f"{reason}: {more}" if more else reason)
        return wire.Refusal(status, reason, retry_after_s)

    def note_refused(self, address: str, cause: str, status: int, reason: str) -> None:
        """Log why a client was refused; once a minute for each cause."""
        self.log.log(
            logging.WARNING, f"refused {cause}", "refused %s: %d %s", address or "a client", status, reason
        )


def _name_of(host: str) -> str:
    """The name or address in `name:port`; empty if it is no such thing."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _network_of(address: str) -> str:
    """What the limit per address counts together: an IPv6 client has a whole /64."""
    if ":" not in address:
        return address
    host = ipaddress.IPv6Address(address.partition("%")[0])
    return str(host.ipv4_mapped or ipaddress.IPv6Network((int(host) >> 64 << 64, 64)))

"""Where a hub listens: on the port, which several hubs of a machine share, and then also on one of its own.

Hubs share a port by SO_REUSEPORT: the kernel gives each new connection to one of them, by a hash of its addresses.
It gives 1/N to every socket that listens, also to one of a hub that is going: so that one leaves the port first. A
connection that waits in the queue of a socket that is closed is reset: the queue is emptied before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import ConfigurationError, PortTaken
from broadcaster.core.runtime import Clock
from broadcaster.core.text import reason
from broadcaster.hub.deployment.identity import DIGEST_LENGTH, Identity, differing, own_port_of
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")

_LEAVE_S: Final = 1.0
"""For so long a queue is emptied that others fill as fast."""

_CLAIM: Final = "broadcaster-hub.1"
"""How the names begin with which hubs of one machine say that they share a port, with the layout's number."""

_HOST_LENGTH: Final = 32
"""Characters of a host in such a name, which has room for 107 bytes."""

_WILDCARDS: Final = ("0.0.0.0", "::")
_NAMES: Final = Path("/proc/net/unix")


class Listening:
    """The sockets of one hub that listen.

    Attributes:
        connections: Those of Sanic.
    """

    def __init__(self, clock: Clock) -> None:
        """Prepare; nothing listens yet."""
        self._clock = clock
        self._servers: list[Any] = []  # Sanic's, untyped
        self._shared: list[tuple[socket.socket, Any]] = []
        self._claim: socket.socket | None = None

    @property
    def connections(self) -> list[Any]:
        return [connection for server in self._servers for connection in list(server.connections)]

    async def begin(
        self,
        app: Any,
        protocol: type[asyncio.Protocol],
        settings: Settings,
        who: Identity,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Take connections from now on.

        Raises:
            PortTaken: Another process listens there, and does not share.
            ConfigurationError: A hub of another deployment shares the port, or this system can share none.
        """
        hub, own_port = settings.hub, own_port_of(settings, who.number)
        places: list[tuple[int, dict[str, Any]]] = [(hub.port, {"host": hub.host, "port": hub.port})]
        unused: list[socket.socket] = []
        if own_port:
            self._claim = await asyncio.to_thread(claim, hub.host, who)
            unused = await asyncio.to_thread(_shared_sockets, hub.host, hub.port)
            # Its own first: until it answers there, it is not on the port.
            places = [
                (own_port, {"host": hub.host, "port": own_port}),
                *((hub.port, {"sock": each}) for each in unused),
            ]
        for port, where in places:
            try:
                server: Any = await app.create_server(
                    **where,
                    protocol=protocol,
                    backlog=min(hub.backlog, hub.max_handshakes),
                    ssl=tls,
                    asyncio_server_kwargs={"start_serving": False, **_tls_deadlines(settings)},
                )
                self._servers.append(server)
                unused = unused[1:] if "sock" in where else unused  # the server's from now on
                if len(self._servers) == 1:
                    await server.startup()
                    await server.before_start()
                await server.start_serving()
            except OSError as error:
                for each in unused:
                    each.close()
                raise PortTaken(hub.host, port, reason(error)) from None
            if "sock" in where:
                self._shared.append((where["sock"], server))
        await self._servers[0].after_start()
        scheme = "wss" if hub.tls_cert else "ws"
        host = f"[{hub.host}]" if ":" in hub.host else hub.host
        log.info("listening on %s://%s:%d/ws", scheme, host, hub.port)
        if own_port:
            log.info("hub.%d of %d; alone on port %d", who.number, who.processes, own_port)

    async def leave_port(self, is_idle: Callable[[], bool]) -> None:
        """Take what waits on the shared port, close it, and let those in who have come; nothing if there is none.

        Args:
            is_idle: Whether every connection that was taken has been answered.
        """
        if not self._shared:
            return
        until = self._clock.loop_s() + _LEAVE_S
        for waiting, server in self._shared:
            while _has_waiting(waiting) and self._clock.loop_s() < until:
                await asyncio.sleep(0)
            server.close()  # in the same turn: nothing comes between
        self._shared.clear()
        until = self._clock.loop_s() + _LEAVE_S / 2
        await asyncio.sleep(0.01)  # what was taken last is known a turn later
        while not is_idle() and self._clock.loop_s() < until:
            await asyncio.sleep(0.01)
        log.info("left the shared port")

    def close(self) -> None:
        """Take no more connections."""
        for server in self._servers:
            server.close()
        if self._claim is not None:
            self._claim.close()

    async def end(self) -> None:
        """End what is left of Sanic's connections, and Sanic."""
        for connection in self.connections:
            if not connection.close_if_idle():
                connection.abort()
        for server in self._servers[:1]:
            with contextlib.suppress(Exception):
                await server.before_stop()
                await server.after_stop()


def claim(host: str, who: Identity) -> socket.socket:
    """Say that this hub shares a port, as long as the socket that is returned is open.

    Its name is seen in the same network namespace as the port, and goes with the process. First it is bound, then
    the others are looked at: of two that come at once, one at least sees the other.

    Raises:
        ConfigurationError: A hub of another deployment does, or this system cannot share a port.
    """
    if sys.platform != "linux" or not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigurationError(
            f"hub.processes is {who.processes}, but this system cannot share a port among processes (Linux can: "
            "SO_REUSEPORT); give each hub a port of its own (--port) and put a proxy in front (config/nginx.conf)"
        )
    facts = "".join(who.facts.values())
    claimed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claimed.bind(f"\0{_CLAIM}/{who.port}/{os.getpid()}/{who.number}/{facts}/{host[:_HOST_LENGTH]}")
        for pid, their_facts, their_host in _claims(who.port):
            theirs = dict(zip(who.facts, _split(their_facts), strict=False))
            other = differing(who.facts, theirs)
            if other and (their_host == host[:_HOST_LENGTH] or {their_host, host} & {*_WILDCARDS}):
                keys = ", ".join(other)
                raise ConfigurationError(
                    f"port {who.port} is another deployment's: the hub with pid {pid} has another {keys}"
                )
    except OSError as error:
        claimed.close()
        raise PortTaken(host, who.port, f"hub.{who.number} is there already: {reason(error)}") from None
    except BaseException:
        claimed.close()
        raise
    return claimed


def _split(facts: str) -> Iterator[str]:
    return (facts[at : at + DIGEST_LENGTH] for at in range(0, len(facts), DIGEST_LENGTH))


def _claims(port: int) -> Iterator[tuple[str, str, str]]:
    """Process, facts and host of every hub that shares a port."""
    try:
        lines = _NAMES.read_text(errors="replace").splitlines()
    except OSError as error:
        log.warning("cannot look who shares port %d: %s: %s", port, _NAMES, reason(error))
        return
    for line in lines:
        parts = line.rpartition(" ")[2].split("/", 5)
        if parts[:2] == [f"@{_CLAIM}", str(port)] and len(parts) == 6:
            yield parts[2], parts[4], parts[5]


def _shared_sockets(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of a host, bound to the port as others are.

    Raises:
        PortTaken: A process has it that does not share.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            bound = socket.socket(family, kind, protocol)
            sockets.append(bound)
            bound.setblocking(False)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(address)
        return sockets
    except OSError as error:
        for each in sockets:
            each.close()
        shares = " (by a process that does not share it, such as a hub with hub.processes = 1)"
        why = reason(error)
        raise PortTaken(host, port, why + shares if "in use" in why else why) from None


def _has_waiting(listening: socket.socket) -> bool:
    """Whether a connection waits to be accepted."""
    poll = select.poll()
    poll.register(listening, select.POLLIN)
    return bool(poll.poll(0))


def _tls_deadlines(settings: Settings) -> dict[str, float]:
    """Seconds for the handshake of TLS, before which no request can come, and for its goodbye."""
    hub = settings.hub
    if not hub.tls_cert:
        return {}
    return {"ssl_handshake_timeout": hub.handshake_timeout_s, "ssl_shutdown_timeout": hub.close_timeout_s}

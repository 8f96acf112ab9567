"""TCP connections to host names: an address that does not answer delays none of the others (RFC 8305).

The system gives all addresses of a name, and the first may be a black hole: no route back, a node that is gone.
asyncio and uvloop try one after another, each for as long as the caller is patient. Here the next one is tried
after 250 ms (Happy Eyeballs), by sockets of the system: asyncio's own `happy_eyeballs_delay` is none of uvloop's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from typing import Final, TypeVar

from aiohappyeyeballs import start_connection

P = TypeVar("P", bound=asyncio.BaseProtocol)

_NEXT_ADDRESS_S: Final = 0.25


async def connect(
    factory: Callable[[], P], host: str, port: int, tls: ssl.SSLContext | None = None
) -> tuple[asyncio.BaseTransport, P]:
    """Connect a protocol, as the event loop's `create_connection`.

    Raises:
        OSError: There is no such host, no address of it takes a connection, or there is no TLS with it.
    """
    loop = asyncio.get_running_loop()
    connected = await connected_socket(host, port)
    if connected is None:
        return await loop.create_connection(factory, host, port, ssl=tls)
    # From here on the socket is the loop's, whatever becomes of it.
    return await loop.create_connection(factory, sock=connected, ssl=tls, server_hostname=host if tls else None)


async def connected_socket(host: str, port: int) -> socket.socket | None:
    """A socket that is connected to the first address of a host name that answers.

    Returns:
        None for an address: there is nothing to choose from, and the event loop connects to it.

    Raises:
        OSError: There is no such host, or no address of it takes a connection.
    """
    if _is_address(host):
        return None
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return await start_connection(found, happy_eyeballs_delay=_NEXT_ADDRESS_S)


def connect_blocking(host: str, port: int, timeout_s: float) -> socket.socket:
    """The same for code without an event loop, as `socket.create_connection`.

    Raises:
        OSError: As `connect`; or no address has answered in time.
    """
    if _is_address(host):
        return socket.create_connection((host, port), timeout_s)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    async def connected() -> socket.socket:
        async with asyncio.timeout(timeout_s):
            return await start_connection(found, happy_eyeballs_delay=_NEXT_ADDRESS_S)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        connection = runner.run(connected())
    connection.settimeout(timeout_s)
    return connection


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

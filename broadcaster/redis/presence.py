"""Whether a Redis answers at an address, asked without an event loop: before anything runs."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from urllib.parse import unquote, urlsplit

from broadcaster.core import dialing
from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.redaction import redact
from broadcaster.core.text import reason


def answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether a Redis answers at `url` now, whatever it says: that it is full, or asks for a password."""
    try:
        return bool(_pong(url, timeout_s))
    except OSError:
        return False


def _pong(url: str, timeout_s: float = 1.0) -> str:
    """What a Redis at `url` says to a PING, which it may not know; empty if it is none that answers.

    Raises:
        OSError: There is no connection.
    """
    said = ask(url, b"*1\r\n$4\r\nPING\r\n", timeout_s).partition("\r\n")[0]
    return said if re.match(r"\+PONG$|-[A-Z]+\b", said) else ""


def address(url: str) -> tuple[str, int]:
    """Host and port of a redis:// URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 6379


def what_it_says(url: str) -> str:
    """The same as `_pong`; empty as well if there is no connection.

    Raises:
        RedisUnavailable: Something listens there, and TLS with it fails.
    """
    try:
        return _pong(url)
    except ssl.SSLError as error:
        raise RedisUnavailable(f"no TLS with what listens at {redact(url)}: {reason(error)}") from None
    except OSError:
        return ""


def ask(url: str, command: bytes, timeout_s: float = 1.0) -> str:
    """The first 64 KiB of the reply to a command.

    Raises:
        OSError: There is no connection, or nothing comes over it.
    """
    with contextlib.closing(_connection(url, timeout_s)) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(command)  # a server that has no room for us says so, and hangs up
        return connection.recv(65_536).decode(errors="replace")


def _connection(url: str, timeout_s: float) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(unquote(parts.path))
        except OSError:
            connection.close()
            raise
        return connection
    connection = dialing.connect_blocking(*address(url), timeout_s)
    if parts.scheme != "rediss":
        return connection
    from broadcaster.redis.connection import connection_options
    from broadcaster.redis.tls import tls_context

    try:
        return tls_context(connection_options(url)).wrap_socket(connection, server_hostname=address(url)[0])
    except OSError:
        connection.close()
        raise

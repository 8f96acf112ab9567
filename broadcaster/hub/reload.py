"""SIGHUP: a hub re-reads its keys, origins, limits, certificates and the password of Redis, and goes on."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.text import reason
from broadcaster.hub.hub import Hub
from broadcaster.hub.open_files import within_open_files
from broadcaster.settings import RedisTable, Settings, without_credentials

log = logging.getLogger("broadcaster.hub")

_RELOADED: Final = {
    "auth": None,  # every key of the table
    "hub": {
        "allowed_origins",
        "handshake_timeout_s",
        "handshakes_per_s",
        "max_connections",
        "max_handshakes",
        "max_per_address",
        "requests_per_address",
        "requests_per_s",
        "tls_cert",
        "tls_key",
    },
    "redis": {"password"},
}
"""What can change while a hub runs; of a URL of Redis user and password."""


@dataclass(frozen=True, slots=True)
class Reload:
    """How a hub is asked to re-read its settings.

    Attributes:
        asked: Set for each time; cleared by the hub.
        load: Reads them again, and may raise ConfigurationError.
    """

    asked: asyncio.Event
    load: Callable[[], Settings]

    async def run(self, hub: Hub, tls: ssl.SSLContext | None) -> None:
        """Re-read whenever it is asked for, until cancelled; what is wrong is said, and changes nothing."""
        while True:
            await self.asked.wait()
            self.asked.clear()
            try:
                said = self._once(hub, tls)
            except ConfigurationError as error:
                log.error("SIGHUP: nothing has changed: %s", error)
            else:
                read = "keys, origins, limits, certificates and the password of Redis"
                log.info("SIGHUP: %s were read again%s", read, said)

    def _once(self, hub: Hub, tls: ssl.SSLContext | None) -> str:
        before, settings = hub.settings, within_open_files(self.load())
        if bool(settings.hub.tls_cert) != (tls is not None):
            raise ConfigurationError("a hub with TLS and one without are two: hub.tls_cert needs a restart")
        if tls is not None:
            load_certificate(tls, settings)
        redis = _with_credentials(before.redis, settings.redis)
        hub.use(settings.model_copy(update={"redis": redis}))
        without = before.model_copy(update={"redis": redis})
        kept = [name for name in _changed(without, settings) if not _is_reloaded(name)]
        return f"; a restart is needed for {', '.join(kept)}" if kept else ""


def load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Use the certificate of the settings for connections from now on.

    Raises:
        ConfigurationError: It cannot be read, or is not the key's.
    """
    try:
        # A password that is no password: else the library asks for one on the terminal, and waits.
        context.load_cert_chain(settings.hub.tls_cert, settings.hub.tls_key, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigurationError(
            f"hub.tls_cert, hub.tls_key: {settings.hub.tls_cert}, {settings.hub.tls_key}: {reason(error)}"
        ) from None


def _with_credentials(before: RedisTable, after: RedisTable) -> RedisTable:
    """The table of the Redis that is used, with the users and passwords that were read again."""
    changes: dict[str, Any] = {"password": after.password}
    for key in ("url", "subscribe_url"):
        if without_credentials(getattr(before, key)) == without_credentials(getattr(after, key)):
            changes[key] = getattr(after, key)
    return before.model_copy(update=changes)


def _changed(before: Settings, after: Settings) -> list[str]:
    """The keys, such as `hub.port`, that have another value."""

    def flat(settings: Settings) -> dict[str, Any]:
        tables: dict[str, dict[str, Any]] = settings.model_dump()
        return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}

    old = flat(before)
    return [name for name, value in flat(after).items() if value != old[name]]


def _is_reloaded(name: str) -> bool:
    table, _, key = name.partition(".")
    keys = _RELOADED.get(table, set())
    return keys is None or key in keys

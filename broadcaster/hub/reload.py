"""SIGHUP: a hub re-reads its keys, origins, limits, certificates and the password of Redis, and goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.hub.deployment import certificate
from broadcaster.hub.deployment.certificate import Certificate
from broadcaster.hub.hub import Hub
from broadcaster.hub.open_files import within_open_files
from broadcaster.settings import RedisTable, Settings, without_credentials

log = logging.getLogger("broadcaster.hub")

_RELOADED: Final = {
    "auth": {"api_keys", "audience", "issuer", "jwt_keys", "leeway_s", "open_to_network"},
    "hub": {
        "allowed_origins",
        "handshakes_per_s",
        "max_connections",
        "max_handshakes",
        "max_per_address",
        "requests_per_address",
        "requests_per_s",
        "tls_cert",
        "tls_key",
    },
}
"""What can change while a hub runs, with the password of Redis; of a URL of it user and password."""


@dataclass(frozen=True, slots=True)
class Reload:
    """How a hub is asked to re-read its settings.

    Attributes:
        asked: Set for each time; cleared by the hub.
        load: Reads them again, and may raise ConfigurationError.
    """

    asked: asyncio.Event
    load: Callable[[], Settings]

    async def run(self, hub: Hub, shown: Certificate | None) -> None:
        """Re-read whenever it is asked for, until cancelled; what is wrong is said, and changes nothing."""
        while True:
            await self.asked.wait()
            self.asked.clear()
            try:
                said = self._once(hub, shown)
            except ConfigurationError as error:
                log.error("SIGHUP: nothing has changed: %s", error)
            except Exception:
                log.exception("SIGHUP: this is a bug; the hub goes on")
            else:
                read = "keys, origins, limits, certificates and the password of Redis"
                log.info("SIGHUP: %s were read again%s", read, said)

    def _once(self, hub: Hub, shown: Certificate | None) -> str:
        before, settings = hub.settings, within_open_files(self.load())
        if bool(settings.hub.tls_cert) != (shown is not None):
            raise ConfigurationError("a hub with TLS and one without are two: hub.tls_cert needs a restart")
        if settings.auth.mode != before.auth.mode:
            # Whether it may listen where it does depends on it, and hubs of one deployment have the same.
            raise ConfigurationError("with access control and without are two: auth.mode needs a restart")
        context = certificate.read(settings.hub)
        used = _reloaded(before, settings)
        hub.use(used)
        if shown is not None and context is not None:
            shown.use(context)
        kept = _changed(used, settings)
        return f"; a restart is needed for {', '.join(kept)}" if kept else ""


def _reloaded(before: Settings, after: Settings) -> Settings:
    """The settings of a hub with those that it reads again."""
    tables: dict[str, Any] = {"redis": _with_credentials(before.redis, after.redis)}
    for table, keys in _RELOADED.items():
        values = {key: getattr(getattr(after, table), key) for key in keys}
        tables[table] = getattr(before, table).model_copy(update=values)
    return before.model_copy(update=tables)


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

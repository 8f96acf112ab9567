"""The identity of a hub: its name in its deployment, its address, and what all hubs of a deployment share."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.settings import Settings, redis_database, redis_server

DIGEST_LENGTH: Final = 4
"""Characters of a digest: these tell settings apart, and keep no secret."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which hub this is.

    Attributes:
        name: In its deployment, the same after a restart: `machine:port#number`.
        machine: Name of the host.
        port: Where clients connect, shared by all hubs of the machine.
        number: Which of them it is, from 1.
        processes: How many there are to be.
        address: `http://host:port` that only this hub answers.
        facts: What has to be the same for all of a deployment, as `facts_of` says.
    """

    name: str
    machine: str
    port: int
    number: int
    processes: int
    address: str
    facts: dict[str, str]

    @classmethod
    def of(cls, settings: Settings) -> Identity:
        """The identity that settings and honcho give a hub.

        Raises:
            ConfigurationError: Its number is greater than `hub.processes`.
        """
        hub = settings.hub
        number = hub.number or _number_of_honcho()
        if number > hub.processes:
            raise ConfigurationError(
                f"this is hub.{number}, but hub.processes is {hub.processes}; honcho's -c hub=N must say the same "
                "(BROADCASTER_HUB__PROCESSES=N)"
            )
        machine = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "localhost"
        own_port = own_port_of(settings, number) or hub.port
        address = f"{settings.hub_url.rpartition(':')[0]}:{own_port}"
        name = f"{machine}:{hub.port}#{number}"
        return cls(name, machine, hub.port, number, hub.processes, address, facts_of(settings))


def own_port_of(settings: Settings, number: int) -> int:
    """The port on which hub `number` listens alone; 0 if there is one hub, whose port is its own."""
    return settings.hub.first_own_port + number - 1 if settings.hub.processes > 1 else 0


def is_under_honcho() -> bool:
    """Whether honcho has started this process as one of its hubs."""
    return os.environ.get("HONCHO_PROCESS_NAME", "").startswith("hub.")


def _number_of_honcho() -> int:
    """2 for hub.2; 1 outside honcho."""
    kind, _, number = os.environ.get("HONCHO_PROCESS_NAME", "").partition(".")
    return int(number) if kind == "hub" and number.isdigit() else 1


def facts_of(settings: Settings) -> dict[str, str]:
    """By key, a digest of what two hubs must agree in to give one client the same answer.

    Not the keys of access control, nor limits: these change while a deployment runs, one hub after another.
    """
    redis, hub = settings.redis, settings.hub
    values = {
        "redis.url": redis_server(redis.url),
        "the database in redis.url": redis_database(redis.url),
        "hub.deployment": hub.deployment,
        "event.channel": settings.event.channel,
        "event.max_bytes": settings.event.max_bytes,
        "history.enabled": settings.history.enabled,
        "channels.allow": sorted(settings.channels.allow),
        "auth.mode": settings.auth.mode,
        "hub.tls_cert": bool(hub.tls_cert),
    }
    size = DIGEST_LENGTH // 2
    return {key: blake2b(repr(value).encode(), digest_size=size).hexdigest() for key, value in values.items()}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The keys in which two hubs do not agree; one that either does not know is no difference."""
    return [key for key, value in ours.items() if theirs.get(key, value) != value]

"""What a hub announces of itself in Redis, and what all announcements of a deployment say together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broadcaster.core.subscription import ANNOUNCEMENT_LASTS_S
from broadcaster.core.text import printable
from broadcaster.hub.deployment.identity import Identity, differing

_MAX_BYTES: Final = 65_536
_MAX_TEXT: Final = 300
_MAX_COUNT: Final = 2**63

_OF_ONE: Final = (
    *("name", "address", "version", "pid", "uptime_s", "ready", "stopping", "trouble", "channel", "channels"),
    *("redis_node", "redis_moved"),
)
"""What `/stats` says of the hub that was asked, also where it sums up all others."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """One hub, as it announces itself.

    Attributes:
        serial: Number of the announcement: who reads a later one knows that it is newer.
        trouble: Why it is not ready; empty if it is.
        counters: As in `/stats`, but for what that says of a single hub.
    """

    name: str
    machine: str
    port: int
    number: int
    processes: int
    address: str
    version: str
    serial: int
    uptime_s: float
    ready: bool
    stopping: bool
    trouble: str
    facts: dict[str, str] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, who: Identity, statistics: Mapping[str, Any], serial: int) -> Announcement:
        """That of a hub with these statistics."""
        return cls(
            name=who.name,
            machine=who.machine,
            port=who.port,
            number=who.number,
            processes=who.processes,
            address=who.address,
            version=statistics["version"],
            serial=serial,
            uptime_s=statistics["uptime_s"],
            ready=statistics["ready"],
            stopping=statistics["stopping"],
            trouble=statistics["trouble"],
            facts=who.facts,
            counters={key: value for key, value in statistics.items() if key not in _OF_ONE},
        )

    def encode(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}  # once a second: `asdict` would copy all
        return json.dumps(fields, separators=(",", ":")).encode()

    @property
    def state(self) -> str:
        return "ready" if self.ready else "draining" if self.stopping else "not ready"


def decode(name: str, data: bytes) -> Announcement:
    """The announcement of a hub; every client that may write to Redis may have written it.

    Raises:
        ValueError: It is none.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    found: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        value: Any = fields.get(key)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise ValueError(f"its {key} is no {kind.__name__}")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ValueError(f"its {key} is too long")
        if isinstance(value, int | float) and not 0 <= value < _MAX_COUNT:
            raise ValueError(f"its {key} is no count")
        found[key] = value
    if found["name"] != name:
        raise ValueError("it is that of another hub")
    facts = {str(key): str(value) for key, value in list(found["facts"].items())[:64]}
    return Announcement(**found | {"facts": facts})


_KINDS: Final[dict[str, type]] = {
    **dict.fromkeys(("name", "machine", "address", "version", "trouble"), str),
    **dict.fromkeys(("port", "number", "processes", "serial"), int),
    **dict.fromkeys(("ready", "stopping"), bool),
    **dict.fromkeys(("facts", "counters"), dict),
    "uptime_s": float,
}


@dataclass(frozen=True, slots=True)
class Announced:
    """All that is announced in a deployment.

    Attributes:
        hubs: Those that are there, by name.
        missing: Names of those that were there in the last minutes, and did not say that they go.
        corrupt: What is wrong with announcements that cannot be read, by name.
        trouble: Why others than the asked one are not known; empty if they are.
        databases: Other databases of this Redis in which there are hubs.
    """

    hubs: dict[str, Announcement] = field(default_factory=dict)
    missing: Sequence[str] = ()
    corrupt: dict[str, str] = field(default_factory=dict)
    trouble: str = ""
    databases: Sequence[int] = ()

    @classmethod
    def read(cls, found: Mapping[str, tuple[bytes | None, float]], databases: Iterable[int] = ()) -> Announced:
        """Read announcements.

        Args:
            found: By the name of a hub what it has announced, and how many seconds ago; None if that is no text.
            databases: See above.
        """
        hubs, missing, corrupt = {}, [], {}
        for name, (data, age_s) in sorted(found.items()):
            try:
                if data is None:
                    raise ValueError("it is no text")
                hub = decode(name, data)
            except (ValueError, RecursionError) as error:
                corrupt[name] = str(error) if isinstance(error, ValueError) else "it is no JSON"
            else:
                if age_s > ANNOUNCEMENT_LASTS_S:
                    missing.append(name)
                else:
                    hubs[name] = hub
        return cls(hubs, missing, corrupt, databases=sorted(databases))


def problems_of(ours: Announcement, announced: Announced) -> list[str]:
    """What is not as it should be in a deployment, one line each; the hub that was asked is `ours`."""
    hubs = announced.hubs | {ours.name: ours}
    found = [f"other hubs are not known: {announced.trouble}"] if announced.trouble else []
    for name, hub in sorted(hubs.items()):
        if not hub.ready:
            found.append(f"{name} is {hub.state}" + (f": {hub.trouble}" if hub.trouble else ""))
        if hub.version != ours.version:
            found.append(f"{name} has version {hub.version}, {ours.name} has {ours.version}")
        if other := differing(ours.facts, hub.facts):
            found.append(f"{name} has another {', '.join(other)} than {ours.name}")
        if (hub.machine, hub.port) == (ours.machine, ours.port) and hub.processes != ours.processes:
            found.append(f"{name} has hub.processes = {hub.processes}, {ours.name} has {ours.processes}")
    found += [f"{name} is missing" for name in missing_of(ours, announced)]
    found += [f"the announcement of {name} is ignored: {why}" for name, why in sorted(announced.corrupt.items())]
    return [printable(problem) for problem in found]


def missing_of(ours: Announcement, announced: Announced) -> list[str]:
    """The hubs that were there, or that there are to be by `hub.processes` of those that are, and are not."""
    names = set(announced.missing)
    if not announced.trouble:
        for hub in (ours, *announced.hubs.values()):
            names |= {f"{hub.machine}:{hub.port}#{number}" for number in range(1, min(hub.processes, 256) + 1)}
    return sorted(names - {ours.name, *announced.hubs, *announced.corrupt})


def summed_up(
    name: str, statistics: Mapping[str, Any], ours: Announcement, announced: Announced
) -> dict[str, Any]:
    """The statistics of all hubs of a deployment: counters and gauges are sums, the rest is of the asked hub."""
    hubs = announced.hubs | {ours.name: ours}
    others = [hub.counters for hub in hubs.values() if hub.name != ours.name]
    problems = problems_of(ours, announced)
    ready = sum(hub.ready for hub in hubs.values())
    return {
        **{key: value if key in _OF_ONE else _sum(value, [each.get(key) for each in others])
           for key, value in statistics.items()},
        "deployment": {
            "name": name,
            "status": "red" if not ready else "yellow" if problems else "green",
            "ready": ready,
            "problems": problems,
            "databases": list(announced.databases),
            "hubs": [_shown(hub) for _, hub in sorted(hubs.items())],
            "missing": missing_of(ours, announced),
        },
    }  # fmt: skip


def _sum(value: Any, others: Iterable[Any]) -> Any:
    """Of a counter, or of counters by cause; what is neither is left out, as a hub of another version may send."""
    if isinstance(value, dict):
        tables = [value, *(other for other in others if isinstance(other, dict))]
        keys = dict.fromkeys(key for table in tables for key in table)
        return {key: sum(count for table in tables if _is_count(count := table.get(key, 0))) for key in keys}
    return value + sum(other for other in others if _is_count(other))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _shown(hub: Announcement) -> dict[str, Any]:
    counts = {key: hub.counters.get(key) for key in ("connected", "behind", "events_received", "deliveries")}
    return {
        "name": hub.name,
        "address": hub.address,
        "version": hub.version,
        "state": hub.state,
        "trouble": hub.trouble,
        "uptime_s": hub.uptime_s,
        "serial": hub.serial,
        **{key: count if _is_count(count) else 0 for key, count in counts.items()},
    }

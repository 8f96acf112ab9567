"""What a report reads of the files of a run that are no CSV: each is there and of its type, or it is named."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import records
from broadcaster.loadtest.run import Run
from broadcaster.settings import LoadtestTable, ReportTable

Shape = dict[str, Callable[[Any], bool]]


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is(int, float), pair)) for pair in value
    )


_CONFIG: Final[Shape] = dict.fromkeys(("fleet", "loadtest", "report"), _is(dict))
_CLIENTS: Final[Shape] = dict.fromkeys(("processes", "clients"), _is(int))
_LAG: Final[Shape] = {
    **dict.fromkeys(("lag_p50_ms", "lag_p99_ms", "lag_max_ms", "lag_usual_ms", "busy_pct"), _is(int, float)),
    "stalls": _are_pairs,
}
_FLEET: Final[Shape] = {
    **dict.fromkeys(("clients", "connected", "reconnects", "deliveries", "losses"), _is(int)),
    **dict.fromkeys(("disconnects", "failures"), _are_counts),
    **_LAG,
}
_PUBLISHER: Final[Shape] = {"late_max_ms": _is(int, float), "lag": _is(dict)}
_HUB: Final[Shape] = {
    **dict.fromkeys(("events_received", "deliveries", "slow_closed", "redis_reconnects"), _is(int)),
    "invalid": _are_counts,
}
_MACHINE: Final[Shape] = {
    **dict.fromkeys(("broadcaster", "system", "cpu", "python"), _is(str)),
    **dict.fromkeys(("sanic", "uvloop", "websockets", "redis_server", "commit"), _is(str)),
    **dict.fromkeys(("cores", "load_1m"), _is(int, float)),
}
"""What a report reads of the files that are no CSV."""


def shaped(value: Any, shape: Shape) -> dict[str, Any]:
    """`value`, which has all that a report reads.

    Raises:
        ValueError: It has not.
    """
    if not isinstance(value, dict):
        raise ValueError("is another file")
    for name, fits in shape.items():
        if name not in value or not fits(value[name]):
            raise ValueError(f"has {'a wrong' if name in value else 'no'} {name}")
    return value


def hub_numbers(value: Any) -> dict[str, Any]:
    """The counters of a hub, or why there are none.

    Raises:
        ValueError: It is neither.
    """
    return value if isinstance(value, dict) and isinstance(value.get("error"), str) else shaped(value, _HUB)


def read_settings(run: Run) -> dict[str, Any]:
    """The settings of a run: `loadtest` and `report` as tables, the others as they are."""
    return _parsed(run.config, tomllib.loads, _settings)


def read_fleet(run: Run, process: int) -> dict[str, Any]:
    return _parsed(run.fleet(process), json.loads, lambda value: shaped(value, _FLEET))


def read_publisher(run: Run) -> dict[str, Any]:
    return _parsed(run.publisher, json.loads, _publisher)


def _publisher(value: Any) -> dict[str, Any]:
    shaped(shaped(value, _PUBLISHER)["lag"], _LAG)
    return dict(value)


def read_hub(run: Run) -> dict[str, Any]:
    return _parsed(run.hub, json.loads, hub_numbers)


def read_machine(run: Run) -> dict[str, Any]:
    return _parsed(run.machine, json.loads, lambda value: shaped(value, _MACHINE))


def _parsed(path: Path, parse: Callable[[str], Any], check: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check(parse(records.read_text(path)))
    except json.JSONDecodeError as error:
        raise RunDamaged(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise RunDamaged(f"{path}: {error}") from None


def _settings(value: Any) -> dict[str, Any]:
    tables = shaped(value, _CONFIG)
    shaped(tables["fleet"], _CLIENTS)
    try:
        return tables | {
            "report": ReportTable(**tables["report"]),
            "loadtest": LoadtestTable(**tables["loadtest"]),
        }
    except ValueError:
        raise ValueError("has settings of [report] or [loadtest] that this version does not know") from None

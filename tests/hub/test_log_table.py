"""docs/operating.md says of each line that the hub's log may warn of what it means, and what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCES = [
    *sorted((ROOT / "broadcaster" / "hub").rglob("*.py")),
    *sorted((ROOT / "broadcaster" / "redis").glob("*.py")),
    ROOT / "broadcaster" / "publish" / "pipeline.py",
]
TABLE = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
PLACEHOLDER = re.compile(r"%[-+0-9.]*[sdgrf]")


def warnings(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file's calls that may log a warning or an error, and the text of each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, written = node.func.attr, ast.unparse(node)
        if "log" not in ast.unparse(node.func.value).lower() and "throttled" not in written.lower():
            continue
        if name in ("warning", "error", "exception") or (
            name == "log" and "INFO" not in ast.unparse(node.args[0])
        ):
            texts = [
                each.value for each in node.args if isinstance(each, ast.Constant) and type(each.value) is str
            ]
            formats = [text for text in texts if PLACEHOLDER.search(text) or name != "log"]
            yield node.lineno, formats[-1] if formats else ""


LOGGED = [
    pytest.param(text, id=f"{path.name}:{line}")
    for path in SOURCES
    for line, text in warnings(path)
    if re.search(r"[a-z]", PLACEHOLDER.sub("", text))  # else all of it is made elsewhere
]


def test_there_are_lines() -> None:
    """The test looks where they are."""
    assert len(LOGGED) > 12


@pytest.mark.parametrize("text", LOGGED)
def test_each_line_of_the_log_is_explained(text: str) -> None:
    """As it stands in the source, with an ellipsis for what is put in; in the first column."""
    first = [line.split(" | ")[0] for line in TABLE.splitlines() if line.startswith("| `")]
    assert any(f"`{PLACEHOLDER.sub('…', text)}`" in cell for cell in first), text

"""The tables and pictures of docs/scale.md, written by `python -m tests.scale draw`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_END: Final = '[end]: # "end"'
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "scale.md"


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A text with the tables between its marks `[table]: # "name"` and `[end]: # "end"`, which no reader sees.

    Raises:
        KeyError: A mark names no table.
        ValueError: A table has no mark.
    """

    def replaced(match: re.Match[str]) -> str:
        found.add(match[1])
        return f'[table]: # "{match[1]}"\n\n{tables[match[1]]}\n\n{_END}'

    found: set[str] = set()
    text = re.sub(rf'\[table\]: # "(\w+)"\n.*?{re.escape(_END)}', replaced, text, flags=re.DOTALL)
    if missing := set(tables) - found:
        raise ValueError(f"no place for {', '.join(sorted(missing))}")
    return text

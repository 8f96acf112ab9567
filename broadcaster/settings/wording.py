"""What is wrong with a value, in words: the validating library's own speak of its types and patterns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final

_SAID: Final = {
    "int": "should be a whole number",
    "float": "should be a number",
    "finite_number": "should be a finite number",
    "bool": "should be true or false",
    "tuple": "should be a list",
    "string": "should be a text",
    "model": "should be a table with keys and values",
    "dict": "should be a table with keys and values",
    "greater_than": "should be more than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "string_too_short": "should be at least {min_length} characters long",
    "too_short": "should be at least {min_length} characters long",
    "string_too_long": "should be at most {max_length} characters long",
    "too_long": "should have at most {max_length} of them",
    "missing": "is missing",
}
"""By the kind of problem, or the first word of it."""


def in_words(problem: Mapping[str, Any]) -> str:
    """What one problem that the library has found is."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        options = [option.strip(" '") for option in context["expected"].replace(" or ", ",").split(",")]
        return f"should be {' or '.join(options)}{did_you_mean(str(problem.get('input')), options, cutoff=0.6)}"
    said = _SAID.get(kind) or (_SAID.get(kind.partition("_")[0]) if kind.endswith(("_type", "_parsing")) else None)
    if kind == "int_from_float":
        said = _SAID["int"]
    if said is None:
        return str(problem["msg"]).removeprefix("Value error, ")
    return said.format(**{name: _number(value) for name, value in context.items()})


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def place(where: Iterable[str | int]) -> str:
    """Where a problem is: `auth.api_keys, item 1, name`."""
    table, *inside = where
    key = "".join(f".{part}" for part in inside[:1])
    return f"{table}{key}" + "".join(
        f", item {part + 1}" if isinstance(part, int) else f", {part}" for part in inside[1:]
    )


QUOTED: Final = "the quotes are a part of the value (Docker's --env-file keeps them): leave them out"


def is_quoted(value: object) -> bool:
    """Whether a value begins and ends with the same quotation mark."""
    return isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.85) -> str:
    """The known name that is most like this one, as the end of a complaint; empty if none is."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""

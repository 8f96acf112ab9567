"""The extras of this package: what is installed only for some of its parts (pyproject.toml)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from broadcaster.core.errors import ExtraNotInstalled

EXTRAS: Final = {
    "httptools": "hub",
    "jwt": "hub",
    "sanic": "hub",
    "honcho": "loadtest",
    "matplotlib": "report",
    "numpy": "loadtest",
    "rich": "loadtest",
    "tabulate": "loadtest",
}
"""The modules that are not of the base, and which extra brings each."""


def extra_of(error: ModuleNotFoundError) -> ExtraNotInstalled | None:
    """The error that says what to install; None if the module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    return ExtraNotInstalled(module, EXTRAS[module]) if module in EXTRAS else None


def require(extras: str) -> None:
    """Look, before anything is started, whether these extras (`"hub loadtest"`) are there; nothing is imported.

    Raises:
        ExtraNotInstalled: One is not.
    """
    for module, extra in EXTRAS.items():
        if extra in extras.split() and find_spec(module) is None:
            raise ExtraNotInstalled(module, "all" if " " in extras else extra)

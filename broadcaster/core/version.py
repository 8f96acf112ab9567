"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

DISTRIBUTION: Final = "critical-event-broadcaster"


def _installed() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a bare checkout
        return "0+unknown"


VERSION: Final = _installed()

"""Open files: each connection is one, and the system bounds how many a process may have."""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import Final

from broadcaster.settings import Settings

_OTHER_FILES: Final = 100
"""Open files that are no connections of clients."""


def within_open_files(settings: Settings) -> Settings:
    """The settings with no more connections than there can be open files."""
    files = _open_files()
    handshakes = min(settings.hub.max_handshakes, max(1, files // 4))
    connections = min(settings.hub.max_connections, max(1, files - handshakes))
    limits = {"max_handshakes": handshakes, "max_connections": connections}
    return settings.model_copy(update={"hub": settings.hub.model_copy(update=limits)})


def _open_files() -> int:
    """How many connections may be open files: the soft limit, raised to the hard one, less a few for the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(1, soft - _OTHER_FILES) if soft != resource.RLIM_INFINITY else sys.maxsize

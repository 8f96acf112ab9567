"""The transport of a connection that has ended."""

from __future__ import annotations

import asyncio
from typing import Final


class _Closed(asyncio.Transport):
    """What a connection that has ended would write to."""

    def is_closing(self) -> bool:
        return True

    def _ignore(self, data: bytes | bytearray | memoryview = b"") -> None:
        pass

    write = pause_reading = resume_reading = close = abort = _ignore


CLOSED: Final = _Closed()

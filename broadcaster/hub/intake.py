"""Takes events off the subscription: checks them, builds each frame once, hands them to the fan-out."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from broadcaster import wire
from broadcaster.errors import InvalidEvent
from broadcaster.event import CAUSES, check
from broadcaster.hub.fanout import Fanout

log = logging.getLogger("broadcaster.hub")

_LOG_EVERY_S: Final = 1.0


class Intake:
    """What stands between Redis and the fan-out.

    Attributes:
        received: Valid events taken in.
        invalid: Refused ones by cause; every cause is present.
    """

    def __init__(self, fanout: Fanout, max_bytes: int) -> None:
        self._fanout = fanout
        self._max_bytes = max_bytes
        self._clock = asyncio.get_running_loop().time
        self._logged_at = -_LOG_EVERY_S
        self._unlogged = 0
        self.received = 0
        self.invalid: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))

    def take(self, payloads: list[bytes]) -> None:
        """Take what one read from Redis brought. Bytes pass as they are; nothing is encoded again."""
        frames = []
        for payload in payloads:
            try:
                check(payload, max_bytes=self._max_bytes)
            except InvalidEvent as error:
                self._refuse(error)
            else:
                frames.append(wire.text_frame(payload))
        if frames:
            self.received += len(frames)
            self._fanout.broadcast(frames)

    def _refuse(self, error: InvalidEvent) -> None:
        """Count, and log at most once a second: a flood of bad events must not become a flood of lines."""
        self.invalid[error.cause] += 1
        now = self._clock()
        if now - self._logged_at < _LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" (and {self._unlogged} more)" if self._unlogged else ""
        log.warning("refused: %s%s", error.detail, more)
        self._logged_at, self._unlogged = now, 0

"""Takes what the subscription brings: checks each event once, and hands it to its channel."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from broadcaster.errors import InvalidEvent
from broadcaster.event import CAUSES
from broadcaster.hub.arrival import Arrival, read
from broadcaster.hub.channels import Channels
from broadcaster.hub.freshness import Freshness

log = logging.getLogger("broadcaster.hub")

_LOG_EVERY_S: Final = 1.0


class Intake:
    """What stands between Redis and the channels.

    Attributes:
        invalid: Refused payloads by cause; every cause is present.
    """

    def __init__(self, channels: Channels, freshness: Freshness, max_bytes: int) -> None:
        self._channels = channels
        self._freshness = freshness
        self._probes = freshness.channel.encode()
        self._max_bytes = max_bytes
        self._clock = asyncio.get_running_loop().time
        self._logged_at = -_LOG_EVERY_S
        self._unlogged = 0
        self.invalid: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))

    def take(self, messages: dict[bytes, list[bytes]]) -> None:
        """Take what one read from Redis brought; the channel of the highest priority goes first."""
        if len(messages) > 1:
            messages = dict(sorted(messages.items(), key=lambda item: self._channels.rank_of(item[0])))
        for name, payloads in messages.items():
            channel = self._channels.by_key.get(name)
            if channel is not None:
                if arrivals := self._read(payloads):
                    channel.take(arrivals)
            elif name == self._probes:
                self._freshness.take(payloads)

    def _read(self, payloads: list[bytes]) -> list[Arrival]:
        arrivals = []
        for payload in payloads:
            try:
                arrivals.append(read(payload, self._max_bytes))
            except InvalidEvent as error:
                self._refuse(error)
        return arrivals

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

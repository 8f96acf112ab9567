"""Dispatch: what a broker's subscription brings is checked once per event, and handed to its channel."""

from __future__ import annotations

import logging
from collections import Counter

from broadcaster.core.errors import InvalidEvent
from broadcaster.core.event import CAUSES
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.channels.channels import Channels
from broadcaster.hub.channels.delivery_probe import DeliveryProbe
from broadcaster.hub.fanout.message import Message, read_message

log = logging.getLogger("broadcaster.hub")


class Dispatcher:
    """Takes what the broker says: the `SubscriptionHandlers` of a hub.

    Attributes:
        invalid: Refused payloads by cause; every cause is present.
    """

    def __init__(
        self, channels: Channels, probe: DeliveryProbe, max_bytes: int, runtime: Runtime = RUNTIME
    ) -> None:
        """Prepare: `channels` take the events of at most `max_bytes`, `probe` what comes over its own channel."""
        self._channels = channels
        self._probe = probe
        self._probe_key = probe.channel.encode()
        self._max_bytes = max_bytes
        self._log = ThrottledLog(log, clock=runtime.clock)
        self.invalid: Counter[str] = Counter(dict.fromkeys(CAUSES, 0))

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        """Take what one read from Redis brought; the channel of the highest priority goes first."""
        self._channels.trace.on_read()
        if len(messages) > 1:
            messages = dict(sorted(messages.items(), key=lambda item: self._channels.rank_of(item[0])))
        for name, payloads in messages.items():
            channel = self._channels.by_key.get(name)
            if channel is not None:
                if valid := self._read(payloads):
                    channel.take(valid)
            elif name == self._probe_key:
                self._probe.take(payloads)

    def on_confirmed(self, channel: str) -> None:
        self._channels.on_confirmed(channel)
        self._probe.probe_now()

    def on_lost(self, channel: str) -> None:
        self._channels.on_lost(channel)
        self._probe.on_lost(channel)

    def _read(self, payloads: list[bytes]) -> list[Message]:
        messages = []
        for payload in payloads:
            try:
                messages.append(read_message(payload, self._max_bytes))
            except InvalidEvent as error:
                self._refuse(error)
        return messages

    def _refuse(self, error: InvalidEvent) -> None:
        self.invalid[error.cause] += 1
        self._log.log(logging.WARNING, error.cause, "refused: %s", error.detail)

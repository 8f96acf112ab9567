"""The client library: events as an `async for`, reconnecting by itself, and counting what is missing."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from types import TracebackType
from typing import Final

from broadcaster import event as events
from broadcaster.errors import HubRefused, InvalidEvent
from broadcaster.event import Event
from broadcaster.settings import Settings, load
from broadcaster.wire import client, read_control

log = logging.getLogger("broadcaster.subscriber")

_SOURCES: Final = 10_000
"""Sources whose last number is remembered; the one heard of longest ago is forgotten first."""


class Subscriber:
    """A subscriber: `async with Subscriber() as subscriber: async for event in subscriber: ...`.

    The iteration does not end by itself: when the connection is lost, a new one is made, with full-jitter
    back-off. Between the two events may be missed; `missing` and `gaps` tell.

    Attributes:
        received: Events received.
        missing: Per source: numbers of its `sequence` that were skipped.
        gaps: Holes the hub has announced.
        reconnects: Connections made after the first.
        invalid: Messages that were no events.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        """Prepare a subscriber; nothing is connected yet.

        Args:
            url: ws:// or wss:// address of a hub, such as `ws://127.0.0.1:8765/ws`; None takes the configured.
            settings: None reads broadcaster.toml and the environment.
        """
        settings = settings or load().settings
        self._url = url or settings.subscriber_url
        self._settings = settings.subscriber
        self._max_bytes = settings.event.max_bytes
        self._last_sequence: dict[str, int] = {}
        self._connection: client.ClientConnection | None = None
        self._connected_before = False
        self._failures = 0
        self._complained = False
        self._left = False
        self.received = 0
        self.missing: Counter[str] = Counter()
        self.gaps = 0
        self.reconnects = 0
        self.invalid = 0

    async def __aenter__(self) -> Subscriber:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._connection is not None:
            await self._connection.close()

    def __aiter__(self) -> Subscriber:
        return self

    async def __anext__(self) -> Event:
        """The next event; a wait that is cancelled loses none.

        Raises:
            HubRefused: The hub will not have us, and trying again will not help.
        """
        while not self._left:
            connection = self._connection or await self._connect()
            try:
                message = await connection.recv(decode=False)
            except client.ConnectionClosed as error:
                log.warning("connection closed: %s; connecting again", error)
                self._connection = None
                self._complained = True
                self._failures = 1  # also the first attempt waits a little: everybody else comes back, too
                continue
            if (event := self._read(message, received_us=time.time_ns() // 1000)) is not None:
                return event
        raise StopAsyncIteration

    async def _connect(self) -> client.ClientConnection:
        while True:
            longest_s = min(self._settings.reconnect_max_s, 0.1 * 2 ** min(self._failures, 10))
            await asyncio.sleep(random.uniform(0, longest_s) if self._failures else 0)
            try:
                self._connection = await client.open_connection(
                    self._url,
                    timeout_s=self._settings.connect_timeout_s,
                    max_queue=self._settings.queue_events,
                )
            except (OSError, TimeoutError, client.InvalidHandshake) as error:
                if isinstance(error, client.InvalidHandshake) and (said := client.refused_for_good(error)):
                    raise HubRefused(f"{self._url}: {said}") from None
                if not self._complained:
                    log.warning("%s: %s; trying again", self._url, error)
                self._complained = True
                self._failures += 1
            else:
                log.info("connected to %s", self._url)
                self.reconnects += self._connected_before
                self._connected_before = True
                self._failures = 0
                self._complained = False
                return self._connection

    def _read(self, message: bytes, received_us: int) -> Event | None:
        if (control := read_control(message)) is not None:
            self._on_control(control)
            return None
        try:
            event = events.decode(message, max_bytes=self._max_bytes, received_at_us=received_us)
        except InvalidEvent as error:
            self.invalid += 1
            log.warning("not an event: %s", error.detail)
            return None
        self._count(event)
        return event

    def _on_control(self, control: dict[str, object]) -> None:
        if control["control"] == "gap":
            self.gaps += 1
            log.warning("gap on %s: %s; events may be missing", control.get("channel"), control.get("cause"))

    def _count(self, event: Event) -> None:
        """Count holes in the numbers of a source; a smaller number is a source that began anew."""
        self.received += 1
        last = self._last_sequence.get(event.source)
        if last is not None and event.sequence > last + 1:
            self.missing[event.source] += event.sequence - last - 1
        self._last_sequence.pop(event.source, None)  # to the end: the one heard of longest ago is first
        self._last_sequence[event.source] = event.sequence
        if len(self._last_sequence) > _SOURCES:
            del self._last_sequence[next(iter(self._last_sequence))]

"""One subscriber of the fleet: its connections, which only stamp what arrives, and its possible losses."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from broadcaster.core.backoff import LONGEST_WAIT_S, TRY_LATER_S, ReconnectBackoff
from broadcaster.core.event import Event
from broadcaster.core.position import Gap
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest.records import DISCONNECTED, NEVER_CONNECTED, LossRecord
from broadcaster.subscribe.resume_state import ResumeState
from broadcaster.wire import PING, TRY_LATER, V1, CloseCode, Outbound

_HEADER_BYTES: Final = 4
"""Of a frame of 126 bytes to 64 KiB, as nearly all events are."""


class Inbox:
    """The data of all clients that has arrived and is not parsed yet.

    Attributes:
        arrivals: Time in ns (CLOCK_MONOTONIC), connection, bytes; no bytes mean that the connection was lost.
        bytes: Size of all arrivals.
        lost: How many of the arrivals are a lost connection, or may be a close frame that waits for its answer.
    """

    def __init__(self) -> None:
        self.arrivals: deque[tuple[int, Connection, bytes]] = deque()
        self.bytes = 0
        self.lost = 0
        self._events = self._event_bytes = 0  # parsed so far

    def note_event(self, size: int) -> None:
        """An event of so many bytes was parsed."""
        self._events += 1
        self._event_bytes += size + _HEADER_BYTES

    @property
    def events(self) -> int | None:
        """About how many events are in it, if they are as large as those before them; None: there were none."""
        return self.bytes * self._events // self._event_bytes if self._events else None


def may_close(data: bytes) -> bool:
    """Whether what has arrived may end with a close frame, of at most 127 bytes: nothing follows it."""
    return b"\x88" in data[-127:]


class Client:
    """One subscriber over all of its connections.

    Attributes:
        number: Its number in the whole fleet.
        connection: The open one; None while there is none.
        gone: Whether it will not reconnect: the hub has refused it permanently.
        received: Events received, without duplicates and late ones.
        backoff: How long it waits before it connects again.
        hint_s: How much longer the server has asked it to stay away.
        losses: Gaps that were announced to it and times without a connection, in order.
    """

    def __init__(
        self, number: int, url: str, *, only_count: bool = False, reconnect_max_s: float = LONGEST_WAIT_S
    ) -> None:
        """Prepare a client.

        Args:
            number: Its number in the whole fleet.
            url: ws:// address of the hub.
            only_count: Keep no losses but the last: it may run for days.
            reconnect_max_s: Longest backoff while there is no connection.

        Raises:
            ValueError: The address has a `since` that is no position.
        """
        self.number = number
        self.connection: Connection | None = None
        self.gone = False
        self.received = 0
        self.backoff = ReconnectBackoff(reconnect_max_s)
        self.hint_s = 0.0
        self.losses: list[LossRecord] = []
        self._url = url
        self._only_count = only_count
        self._resume_state = ResumeState(url, (), None, (), (), ())
        self._since = ""
        self._away = False
        self._connected_ns = 0
        self._brought_event = False
        self._highest: int | None = None
        self._unclosed: list[int] = []  # losses after which no event has arrived yet

    @property
    def highest_sequence(self) -> int | None:
        """Of the events that it has received; None: none."""
        return self._highest

    def url(self) -> str:
        """The URL to connect to, so that it resumes at its position if that is known."""
        positions = self._resume_state.positions
        self._since = " ".join(map(str, positions.values()))
        return self._resume_state.url() if positions else self._url

    def on_connected(self, connection: Connection, stamp_ns: int) -> None:
        """The hub has accepted, for the first time or again."""
        self.connection = connection
        self._connected_ns, self._brought_event = stamp_ns, False
        if self._away:
            self._away = False
            since = self._since if connection.outbound.speaks_v1 else ""
            self.losses[-1] = replace(self.losses[-1], to_mono_ns=stamp_ns, resumed_after=since)

    def on_lost(self, close_code: int, stamp_ns: int, *, may_resume: bool) -> None:
        """The connection was lost, and everything received on it is parsed."""
        self._away = True
        self.backoff.on_lost((stamp_ns - self._connected_ns) / 1e9, brought_event=self._brought_event)
        self.hint_s = TRY_LATER_S if close_code == TRY_LATER else 0.0
        self._note(Gap("", f"{DISCONNECTED} {close_code}"), stamp_ns, None)
        if not may_resume or close_code == CloseCode.GAP:
            self._resume_state.forget()

    def on_never_connected(self, stamp_ns: int) -> None:
        self._note(Gap("", NEVER_CONNECTED), stamp_ns, None)

    def on_event(self, event: Event) -> None:
        self._brought_event = True
        if self._highest is None or event.sequence > self._highest:
            self._highest = event.sequence
            self.received += 1
            for at in self._unclosed:
                self.losses[at] = replace(self.losses[at], before_sequence=event.sequence)
            self._unclosed.clear()
        self._resume_state.on_event(event)  # a hole that was not announced is found by the ledger

    def on_other(self, event: Event) -> None:
        """An event of another source, whose sequences mean nothing here: only the position moves."""
        self._brought_event = True
        self._resume_state.on_event(event)

    def on_control(self, frame: dict[str, Any], stamp_ns: int) -> None:
        """Handle a control frame; those with neither gap nor position are ignored."""
        kind = frame["control"]
        if kind == "welcome":
            self._resume_state.on_welcome(frame)
        elif kind == "beat":
            self._resume_state.on_beat(frame)
        elif kind == "gap":
            gap = Gap.from_fields(frame)
            self._note(gap, stamp_ns, stamp_ns)
            self._resume_state.on_gap(gap)

    def _note(self, gap: Gap, from_ns: int, to_ns: int | None) -> None:
        if self._only_count:
            self.losses.clear()
            self._unclosed.clear()
        self._unclosed.append(len(self.losses))
        self.losses.append(
            LossRecord(
                client=self.number,
                cause=gap.cause,
                epoch=gap.epoch or "",
                first=gap.first,
                last=gap.last,
                after_sequence=self._highest,
                before_sequence=None,
                resumed_after="",
                from_mono_ns=from_ns,
                to_mono_ns=to_ns,
            )
        )


class Connection(asyncio.Protocol):
    """One connection of a client: answers pings, stamps what arrives."""

    def __init__(
        self, client: Client, inbox: Inbox, record: Callable[[int, Client, list[bytes]], None], token: str = ""
    ) -> None:
        """Prepare a connection.

        Args:
            client: Its client.
            inbox: Takes what arrives.
            record: Called with the messages that arrive together with the response to the handshake.
            token: Sent to the hub.
        """
        self.client = client
        self.outbound = Outbound(client.url(), V1, token)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox = inbox
        self._arrivals = inbox.arrivals
        self._record = record
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.write(self.outbound.request())

    def data_received(self, data: bytes) -> None:
        now_ns = CLOCK.monotonic_ns()  # the receive has just returned: nothing comes before this line
        if not self.outbound.connected:
            self._shake_hands(now_ns, data)
            return
        self._arrivals.append((now_ns, self, data))
        self._inbox.lost += may_close(data)
        self._inbox.bytes += len(data)
        if PING in data:  # not inside an event, which has no NUL; in a frame's length it costs one pong too many
            self.write(self.outbound.pong())

    def _shake_hands(self, now_ns: int, data: bytes) -> None:
        messages = self.outbound.feed(data)
        if self.outbound.connected:
            self.client.on_connected(self, now_ns)
        self._record(now_ns, self.client, messages)
        self.write(self.outbound.to_send())
        if not self.ready.done() and (self.outbound.connected or self.outbound.failure):
            self.ready.set_result(None)

    def write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
        if self.outbound.connected:
            self.client.connection = None
            self._arrivals.append((CLOCK.monotonic_ns(), self, b""))
            self._inbox.lost += 1

"""The connection of a subscriber to its hub, opened again with backoff whenever it was lost."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Callable, Iterator
from typing import Final

from broadcaster.core.backoff import backoff_s
from broadcaster.core.errors import HubRefused
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.redaction import redact, scrub
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.text import reason
from broadcaster.settings import SubscriberTable
from broadcaster.wire import client

log = logging.getLogger("broadcaster.subscriber")

_SHORTEST_WAIT_S: Final = 0.2
_LONGEST_WAIT_S: Final = 102.4
_LONGEST_HINT_S: Final = 60.0
_PONG_S: Final = 2.0

_GOOD_S: Final = 5.0
"""A connection has been good when it has lasted so long, or has brought an event."""

_LONGEST_FACTOR: Final = 6
"""While no connection is good the longest wait is so many times `subscriber.reconnect_max_s`."""

_LEAST_SHARE: Final = 0.25
"""Then a wait is at least this share of its bound: of full jitter some are no waits at all."""

_TRY_LATER: Final = 1013
_TRY_LATER_S: Final = 5.0


class Connector:
    """Opens the connection to a hub, one at a time, in a task of its own.

    Attributes:
        connection: The open one; None while there is none.
        reconnects: Connections made after the first.
    """

    def __init__(
        self,
        settings: SubscriberTable,
        url: Callable[[], str],
        token: str | Callable[[], str],
        tls: ssl.SSLContext | None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            settings: Deadlines, and how many messages may wait.
            url: Called before each attempt: where to connect, with the positions after which to resume.
            token: Sent to the hub; a function is called before each attempt.
            tls: TLS context for wss://.
            runtime: Chance for the backoff.
        """
        self._settings = settings
        self._url = url
        self._token = token
        self._tls = tls
        self._chance = runtime.chance
        self._dialing: asyncio.Task[None] | None = None  # until `connect` has seen how it ended
        self._probing: asyncio.Task[None] | None = None
        self._hint_s = 0.0
        self._clock = runtime.clock
        self._log = ThrottledLog(log, 30.0, clock=runtime.clock)
        self._bad_waits_s = self._new_bad_waits()
        self._bad = 0  # connections in a row that were not good
        self._opened_at = math.inf
        self._ever_connected = False
        self._connected_to = ""  # between the handshake and the hub's first welcome
        self.connection: client.ClientConnection | None = None
        self.reconnects = 0

    def hint(self, delay_s: object) -> None:
        """Wait so many seconds before the next attempt, as the hub asks; what is no such number is no hint."""
        self._hint_s = 0.0
        if isinstance(delay_s, int | float) and delay_s > 0:
            self._hint_s = float(min(delay_s, _LONGEST_HINT_S))

    def on_welcome(self) -> None:
        """The hub has begun to deliver a channel: it is connected, which is said once per connection."""
        if self._connected_to:
            self._say_connected(self._connected_to)
            self._connected_to = ""

    def on_event(self) -> None:
        """The connection has brought an event: it is good."""
        if self._bad:
            self._be_good()

    def _be_good(self) -> None:
        self._bad = 0
        self._bad_waits_s = self._new_bad_waits()

    def _new_bad_waits(self) -> Iterator[float]:
        longest_s = min(_LONGEST_FACTOR * self._settings.reconnect_max_s, _LONGEST_WAIT_S)
        return backoff_s(_SHORTEST_WAIT_S, longest_s, self._chance, least=_LEAST_SHARE)

    def _say_connected(self, where: str) -> None:
        if self._bad > 1:  # at once, and again and again: a line for each would fill the log
            self._log.log(logging.INFO, "connected", "connected to %s", where)
        else:
            log.info("connected to %s", where)

    def on_lost(self, code: int | None, why: str) -> None:
        """The connection has ended: begin to open another one.

        Args:
            code: With which close code; None: without a closing handshake.
            why: Code and reason, for the log.
        """
        if self._clock.loop_s() - self._opened_at >= _GOOD_S:
            self._be_good()
        if code == _TRY_LATER and self._hint_s == 0.0:
            self._hint_s = self._chance.uniform(_TRY_LATER_S / 2, _TRY_LATER_S)
        said = "connection closed: %s; connecting again"
        if self._bad > 1:
            self._log.log(logging.WARNING, f"closed {code}", said, why)
        else:
            log.warning(said, why)
        self.connection = None
        self.stop_probing()
        self._dialing = asyncio.create_task(self._dial(again=True))

    def probe(self) -> None:
        """Find out by a ping whether the connection is half-open: one that does not answer is aborted."""
        if self.connection is not None and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._ping(self.connection))

    def stop_probing(self) -> None:
        """The connection was heard of."""
        if self._probing is not None:
            self._probing.cancel()

    async def _ping(self, connection: client.ClientConnection) -> None:
        try:
            async with asyncio.timeout(_PONG_S):
                await (await connection.ping())
        except TimeoutError:
            connection.transport.abort()
        except client.ConnectionClosed:
            pass  # which the next `receive` finds out, too

    async def connect(self) -> client.ClientConnection | None:
        """The open connection, once there is one; None after `close`.

        A wait that is cancelled neither ends nor delays the attempts.

        Raises:
            HubRefused: The hub refuses, and a retry would not help. Another call begins anew.
            ConfigurationError: No header can carry the token.
        """
        if self.connection is None:
            dialing = self._dialing = self._dialing or asyncio.create_task(self._dial(again=False))
            await asyncio.wait([dialing])
            self._dialing = None
            if not dialing.cancelled():
                dialing.result()
        return self.connection

    async def _dial(self, *, again: bool) -> None:
        """Connect, retrying until it succeeds.

        Args:
            again: A connection was lost, and said so: even the first attempt waits, as all clients reconnect now.
        """
        longest_s = min(self._settings.reconnect_max_s, _LONGEST_WAIT_S)
        waits_s = backoff_s(_SHORTEST_WAIT_S, longest_s, self._chance)
        has_failed = False
        while True:
            if again:
                hint_s, self._hint_s = self._hint_s, 0.0
                await asyncio.sleep(hint_s + next(waits_s if has_failed or not self._bad else self._bad_waits_s))
            url = self._url()
            try:
                connection = await client.open_connection(
                    url,
                    timeout_s=self._settings.connect_timeout_s,
                    max_queue=self._settings.queue_events,
                    token=self._token() if callable(self._token) else self._token,
                    tls=self._tls,
                )
            except (OSError, TimeoutError, client.InvalidHandshake) as error:
                if isinstance(error, client.InvalidHandshake):
                    if answer := client.final_refusal(error):
                        raise HubRefused(f"{redact(url)}: {answer}") from None
                    self.hint(client.retry_after_s(error))
                if not again:
                    log.warning("waiting for the hub at %s: %s; trying again", redact(url), scrub(reason(error)))
                again = has_failed = True
            else:
                if client.can_beat(connection):
                    self._connected_to = redact(url)  # which is said with the first welcome
                else:
                    self._say_connected(redact(url))
                self._bad += 1  # until it is known to be good
                self._opened_at = self._clock.loop_s()
                self.reconnects += self._ever_connected
                self._ever_connected = True
                self.connection = connection
                return

    async def close(self) -> None:
        """End the connection with a closing handshake, or the attempts to open one."""
        try:
            tasks = [task for task in (self._dialing, self._probing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.connection is not None:
                await self.connection.close()
        finally:
            if self.connection is not None:
                self.connection.transport.abort()  # only where closing was cancelled is there anything left

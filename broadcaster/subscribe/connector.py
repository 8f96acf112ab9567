"""The connection of a subscriber to its hub, opened again with backoff whenever it was lost."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final

from broadcaster.core.backoff import LONGEST_HINT_S, TRY_LATER_S, ReconnectBackoff
from broadcaster.core.errors import HubRefused
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.redaction import redact, scrub
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.settings import SubscriberTable
from broadcaster.wire import client
from broadcaster.wire.tls import why_not_connected

log = logging.getLogger("broadcaster.subscriber")

_LONGEST_WAIT_S: Final = 102.4
_LOG_EVERY_S: Final = 30.0
_PONG_S: Final = 2.0


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
            runtime: Time, and chance for the backoff.
        """
        self._settings = settings
        self._url = url
        self._token = token
        self._tls = tls
        self._clock = runtime.clock
        self._log = ThrottledLog(log, _LOG_EVERY_S, clock=runtime.clock)
        self._backoff = ReconnectBackoff(min(settings.reconnect_max_s, _LONGEST_WAIT_S), runtime.chance)
        self._dialing: asyncio.Task[None] | None = None  # until `connect` has seen how it ended
        self._probing: asyncio.Task[None] | None = None
        self._hint_s = 0.0
        self._ever_connected = False
        self._connected_to = ""  # between the handshake and the hub's first welcome
        self._connected_at = 0.0
        self._brought_event = False
        self._says_connected = True
        self.connection: client.ClientConnection | None = None
        self.reconnects = 0

    def hint(self, delay_s: object) -> None:
        """Wait so many seconds before the next attempt, as the hub asks; what is no such number is no hint."""
        self._hint_s = 0.0
        if isinstance(delay_s, int | float) and delay_s > 0:
            self._hint_s = float(min(delay_s, LONGEST_HINT_S))

    def on_welcome(self) -> None:
        """The hub has begun to deliver a channel: it is connected, which is said once per connection."""
        if self._connected_to:
            self._say_connected(self._connected_to)
            self._connected_to = ""

    def on_event(self) -> None:
        """The connection has brought an event: it is a good one, whatever becomes of it."""
        self._brought_event = True

    def on_lost(self, error: client.ConnectionClosed) -> None:
        """The connection has ended: begin to open another one."""
        why = client.close_reason(error)
        self._says_connected = self._log.log(
            logging.WARNING, why.partition(" ")[0], "connection closed: %s; connecting again", why
        )
        if client.asks_to_try_later(error):
            self._hint_s = max(self._hint_s, TRY_LATER_S)
        self._backoff.on_lost(self._clock.loop_s() - self._connected_at, brought_event=self._brought_event)
        self.connection = None
        self.stop_probing()
        self._dialing = asyncio.create_task(self._dial(again=True))

    def _say_connected(self, url: str) -> None:
        if self._says_connected:  # a loss that was not said needs no end
            log.info("connected to %s", url)

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
        timeout_s, waits_s = self._settings.connect_timeout_s, self._backoff.waits_s()
        while True:
            if again:
                hint_s, self._hint_s = self._hint_s, 0.0
                await asyncio.sleep(hint_s + next(waits_s))
            url = self._url()
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await client.open_connection(
                        url,
                        close_timeout_s=timeout_s,
                        max_queue=self._settings.queue_events,
                        token=self._token() if callable(self._token) else self._token,
                        tls=self._tls,
                    )
            except (OSError, TimeoutError, client.InvalidHandshake) as error:
                if isinstance(error, client.InvalidHandshake):
                    if answer := client.final_refusal(error):
                        raise HubRefused(f"{redact(url)}: {answer}") from None
                    self.hint(client.retry_after_s(error))
                why = scrub(why_not_connected(error))
                self._log.log(
                    logging.WARNING, why, "waiting for the hub at %s: %s; trying again", redact(url), why
                )
                again = True
            else:
                if client.can_beat(connection):
                    self._connected_to = redact(url)  # which is said with the first welcome
                else:
                    self._say_connected(redact(url))
                self.reconnects += self._ever_connected
                self._ever_connected = True
                self._connected_at, self._brought_event = self._clock.loop_s(), False
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

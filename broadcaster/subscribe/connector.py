"""The connection of a subscriber to its hub, opened again with backoff whenever it was lost."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Final

from broadcaster.core.backoff import backoff_s
from broadcaster.core.errors import HubRefused
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.settings import SubscriberTable
from broadcaster.wire import client

log = logging.getLogger("broadcaster.subscriber")

_SHORTEST_WAIT_S: Final = 0.2
_LONGEST_WAIT_S: Final = 102.4
_LONGEST_HINT_S: Final = 60.0


class Connector:
    """Opens the connection to a hub, one at a time.

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
            runtime: Time and chance for the backoff.
        """
        self._settings = settings
        self._url = url
        self._token = token
        self._tls = tls
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._waits_s: Iterator[float] | None = None  # while attempts fail
        self._not_before = 0.0  # loop time of the next attempt: a wait that is cancelled is not begun anew
        self._hint_s = 0.0
        self._failure_logged = False
        self._ever_connected = False
        self.connection: client.ClientConnection | None = None
        self.reconnects = 0

    def hint(self, delay_s: object) -> None:
        """Wait so many seconds after the connection has ended, as the hub asks."""
        self._hint_s = min(float(delay_s), _LONGEST_HINT_S) if isinstance(delay_s, int | float) else 0.0

    def on_lost(self) -> None:
        """The connection has ended. Even the first attempt to reconnect waits: all clients reconnect now."""
        self.connection = None
        self._failure_logged = True
        self._waits_s = None
        self._wait()

    def _wait(self) -> None:
        """Let the next attempt wait, each time longer."""
        if self._waits_s is None:
            longest_s = min(self._settings.reconnect_max_s, _LONGEST_WAIT_S)
            self._waits_s = backoff_s(_SHORTEST_WAIT_S, longest_s, self._chance)
        self._not_before = self._clock.loop_s() + self._hint_s + next(self._waits_s)
        self._hint_s = 0.0

    async def connect(self) -> client.ClientConnection:
        """Connect, retrying until it succeeds.

        Raises:
            HubRefused: The hub refuses, and a retry would not help.
        """
        while True:
            if self._waits_s is not None:
                await asyncio.sleep(max(0.0, self._not_before - self._clock.loop_s()))
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
                        raise HubRefused(f"{url}: {answer}") from None
                    self.hint(client.retry_after_s(error))
                if not self._failure_logged:
                    log.warning("%s: %s; trying again", url, error)
                self._failure_logged = True
                self._wait()
            else:
                log.info("connected to %s", url)
                self.reconnects += self._ever_connected
                self._ever_connected = True
                self._waits_s = None
                self._failure_logged = False
                self.connection = connection
                return connection

    async def close(self) -> None:
        """End the connection, if there is one, with a closing handshake."""
        if self.connection is not None:
            await self.connection.close()

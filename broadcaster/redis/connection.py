"""One connection to Redis: sends commands, returns their replies in order, hands messages to a callback.

An `asyncio.Protocol` around hiredis' parser. redis-py's own listener reconnects silently (what was published
meanwhile is lost without a sign), never notices a frozen Redis, and costs a task switch per message; here a
connection lives once, reports its end, and hands over everything that one read brought as one batch.

A connection that owes replies and brings nothing for `silence_s` is at its end, however soon its callers give up:
it is half-open, or Redis is frozen. Large replies on a slow link are no silence, however long they take.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import hiredis
from redis.connection import SSLConnection, parse_url

from broadcaster.core import dialing
from broadcaster.core.errors import ConfigurationError, RedisUnavailable, RedisUnreachable
from broadcaster.core.redaction import redact, scrub
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.core.text import reason
from broadcaster.redis.error_replies import read_error
from broadcaster.redis.tls import tls_context

Command = tuple[Any, ...]
"""The words of a command: str, bytes or int; or `RUN_ID`, see `CommandLink`."""

RUN_ID: Final = object()
"""Stands in a command for the run_id of the Redis process that it is sent to; for nothing if that is not known."""

Reply = Any
"""bytes, int, None, or a list of these, as RESP2 has them."""

OnMessages = Callable[[dict[bytes, list[bytes]]], None]
"""Called with what one read brought: per channel its payloads, in order."""

OnSubscribed = Callable[[bytes, bool], None]
"""Called for each confirmed (un)subscription, in order with the messages: channel, whether it is subscribed."""

_MOMENT_S: Final = 0.01


class RedisConnection(asyncio.Protocol):
    """One connection, from `open` to its end. Not reused, not reconnected.

    Attributes:
        lost: Done when the connection has ended, for whatever reason.
        why: The reason.
    """

    def __init__(
        self,
        on_messages: OnMessages | None = None,
        on_subscribed: OnSubscribed | None = None,
        silence_s: float = math.inf,
        clock: Clock = CLOCK,
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._clock = clock
        self._on_messages = on_messages
        self._on_subscribed = on_subscribed
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        # Replies that are due, in order; for an (un)subscription also how its confirmation begins.
        self._waiting: deque[tuple[asyncio.Future[Reply], list[bytes] | None]] = deque()
        self._silence_s = silence_s
        self._silence_check: asyncio.TimerHandle | None = None  # while replies are due, and a while longer
        self._heard_at = clock.loop_s()  # the last bytes; or a command was sent when no reply was due
        self.lost: asyncio.Future[None] = loop.create_future()
        self.why = "Redis closed the connection"

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        timeout_s: float,
        silence_s: float = math.inf,
        on_messages: OnMessages | None = None,
        on_subscribed: OnSubscribed | None = None,
        clock: Clock = CLOCK,
    ) -> RedisConnection:
        """Connect, log in and select the database.

        Args:
            url: redis://, rediss:// or unix://, as redis-py reads it.
            timeout_s: For all steps together.
            silence_s: For how long nothing may come while replies are due.
            on_messages: See `OnMessages`.
            on_subscribed: See `OnSubscribed`.
            clock: For the silence.

        Raises:
            RedisUnavailable: No answer in time, or one that may change.
            RedisRefused: An answer that will not change: wrong password, missing right.
        """
        options = connection_options(url)
        try:
            async with asyncio.timeout(timeout_s):
                connection = await cls._connect(
                    options, partial(cls, on_messages, on_subscribed, silence_s, clock)
                )
                try:
                    await connection._log_in(options)
                except BaseException:
                    connection.abort()
                    raise
        except TimeoutError:
            raise RedisUnavailable(f"Redis did not answer within {timeout_s} s") from None
        except OSError as error:
            raise RedisUnreachable(redact(url), reason(error)) from None
        except ConfigurationError as error:  # a file of it is of no use now; it was when this process began
            raise RedisUnreachable(redact(url), str(error)) from None
        return connection

    @classmethod
    async def _connect(cls, options: dict[str, Any], protocol: Callable[[], RedisConnection]) -> RedisConnection:
        if "path" in options:
            loop = asyncio.get_running_loop()
            return (await loop.create_unix_connection(protocol, options["path"]))[1]
        tls = None
        if options.get("connection_class") is SSLConnection:
            tls = tls_context(options)
        host, port = options.get("host", "127.0.0.1"), options.get("port", 6379)
        return (await dialing.connect(protocol, host, port, tls))[1]

    async def _log_in(self, options: dict[str, Any]) -> None:
        if password := options.get("password"):
            user = [options["username"]] if options.get("username") else []
            await self.execute("AUTH", *user, password)
        if (database := options.get("db")) and self._on_messages is None:
            await self.execute("SELECT", database)

    def send(self, *commands: Command) -> list[asyncio.Future[Reply]]:
        """Send commands in one write; return their replies as futures, in order.

        A future raises RedisRefused or RedisErrorReply for an error reply, RedisUnavailable when the connection
        ends first.
        """
        return self._send(commands, [None] * len(commands))

    def subscribe(self, *channels: str) -> list[asyncio.Future[Reply]]:
        """Subscribe to channels; one reply each, see `send`."""
        return self._send_for_channels("SUBSCRIBE", channels)

    def unsubscribe(self, *channels: str) -> list[asyncio.Future[Reply]]:
        """Unsubscribe from channels; one reply each, see `send`."""
        return self._send_for_channels("UNSUBSCRIBE", channels)

    def _send_for_channels(self, word: str, channels: Sequence[str]) -> list[asyncio.Future[Reply]]:
        confirmations = [[word.lower().encode(), channel.encode()] for channel in channels]
        return self._send([(word, channel) for channel in channels], confirmations)

    def _send(
        self, commands: Sequence[Command], confirmations: Sequence[list[bytes] | None]
    ) -> list[asyncio.Future[Reply]]:
        replies: list[asyncio.Future[Reply]] = [self._loop.create_future() for _ in commands]
        if self._transport is None or self.lost.done():
            for reply in replies:
                fail(reply, RedisUnavailable("the link to Redis is gone"))
            return replies
        if not self._waiting:
            self._heard_at = self._clock.loop_s()
            if self._silence_check is None and self._silence_s < math.inf:
                self._silence_check = self._loop.call_later(self._silence_s, self._check_silence)
        self._waiting.extend(zip(replies, confirmations, strict=True))
        self._transport.write(b"".join(hiredis.pack_command(command) for command in commands))
        return replies

    def _check_silence(self, *, again: bool = False) -> None:
        """Every now and then while replies are due: whether the other end is still there."""
        self._silence_check = None
        if not self._waiting or self.lost.done():
            return
        left_s = self._heard_at + self._silence_s - self._clock.loop_s()
        if left_s > 0:
            self._silence_check = self._loop.call_later(left_s, self._check_silence)
        elif not again:  # if this loop was stalled, what has come is read a moment later
            self._silence_check = self._loop.call_later(_MOMENT_S, partial(self._check_silence, again=True))
        else:
            self.why = f"Redis did not answer within {self._silence_s:g} s"
            self.abort()

    async def execute(self, *command: str | bytes | int) -> Reply:
        """Send one command and wait for its reply.

        Raises:
            RedisRefused, RedisUnavailable: See `send`.
        """
        return await self.send(command)[0]

    def abort(self) -> None:
        """End the connection at once; nothing is flushed."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        messages: dict[bytes, list[bytes]] = {}
        gets = self._reader.gets
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _MORE:
                if type(reply) is list and reply and reply[0] == b"message":
                    if reply[1] in messages:
                        messages[reply[1]].append(reply[2])
                    else:
                        messages[reply[1]] = [reply[2]]
                else:
                    messages = self._hand_over(messages)
                    self._settle(reply)
        except hiredis.ProtocolError:
            self.abort()  # the peer is not Redis, or the position in its stream is lost
        self._hand_over(messages)
        self._heard_at = self._clock.loop_s()  # last: nothing is to come before the first subscriber

    def connection_lost(self, error: Exception | None) -> None:
        for reply, _ in self._waiting:
            if not reply.done():
                fail(reply, RedisUnavailable(self.why))
        self._waiting.clear()
        if self._silence_check is not None:
            self._silence_check.cancel()
        if not self.lost.done():
            self.lost.set_result(None)

    def _hand_over(self, messages: dict[bytes, list[bytes]]) -> dict[bytes, list[bytes]]:
        if messages and self._on_messages is not None:
            self._on_messages(messages)
        return {}

    def _settle(self, reply: Reply) -> None:
        if type(reply) is list and reply and reply[0] in (b"subscribe", b"unsubscribe"):
            if self._on_subscribed is not None:
                self._on_subscribed(reply[1], reply[0] == b"subscribe")
            if not self._waiting or self._waiting[0][1] != reply[:2]:
                return  # unsolicited: no reply to a command
        if not self._waiting:
            return
        future, _ = self._waiting.popleft()
        if future.done():
            return
        if isinstance(reply, hiredis.ReplyError):
            # A server that does not know AUTH would quote the password.
            said = scrub(str(reply).partition(" with args beginning with")[0].rstrip(","))
            fail(future, read_error(said))
        else:
            future.set_result(reply)


def connection_options(url: str) -> dict[str, Any]:
    """What a URL says as redis-py reads it: `host`, `port`, `path`, `username`, `password`, `db`, `ssl_…`."""
    options: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    return options


def check_tls(key: str, url: str) -> None:
    """Whether the files that a URL names for TLS can be used: before anything runs, a wrong one is said once.

    Raises:
        ConfigurationError: One cannot; the message begins with `key`.
    """
    options = connection_options(url)
    if options.get("connection_class") is SSLConnection:
        try:
            tls_context(options)
        except ConfigurationError as error:
            raise ConfigurationError(f"{key}: {error}") from None


def fail(reply: asyncio.Future[Reply], error: Exception) -> None:
    """Fail a reply without a warning if its exception is never retrieved."""
    reply.set_exception(error)
    reply.exception()  # marks it as retrieved


_MORE: Final = object()

"""Commands to Redis over one connection, and the fields of `INFO server`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from broadcaster.core.errors import RedisErrorReply, RedisRefused, RedisUnavailable
from broadcaster.core.runtime import CLOCK, RUNTIME, Clock, Runtime
from broadcaster.redis.connection import RUN_ID, Command, RedisConnection
from broadcaster.settings import RedisTable

_ERRORS_OF_A_CONNECTION: Final = ("NOSCRIPT", "READONLY", "MASTERDOWN")
"""Codes of error replies after which a new connection helps: a flushed script, a master that was demoted."""

_IDENTITY: Final = ("INFO", "server")

_IDENTITY_S: Final = 1.0
"""For so many seconds the process to which a connection leads is taken to be the one that it was.

A proxy can keep a connection open while what is behind it becomes another process.
"""


class CommandLink:
    """Sends commands to Redis over one connection, opened when it is needed and again when it was lost.

    Attributes:
        closed: Whether it was closed: no connection is opened any more.
    """

    def __init__(
        self,
        redis: RedisTable,
        *greeting: Command,
        runtime: Runtime = RUNTIME,
        url: Callable[[], str] | None = None,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            redis: Address and deadlines.
            greeting: Commands that are sent first on every new connection, and must succeed. With a greeting
                `RUN_ID` can be used.
            runtime: For the connection.
            url: What a new connection leads to, if that is not `redis.url`.
        """
        self._redis = redis
        self._url = url or (lambda: self._redis.command_url)
        self._clock = runtime.clock
        self._greeting = greeting
        self._run_id = ""
        self._asked_at = 0.0  # for the run_id
        self._link: RedisConnection | None = None
        self._connecting = asyncio.Lock()
        self.closed = False

    def use(self, redis: RedisTable) -> None:
        """Log in as this table says on new connections; one that is open stays."""
        self._redis = redis

    @property
    def run_id(self) -> str:
        """The run_id of the process to which the connection led when that was asked last; empty: not known now."""
        return self._run_id

    @property
    def link(self) -> RedisConnection | None:
        """The open connection; None if there is none."""
        return None if self._link is None or self._link.lost.done() else self._link

    async def connect(self) -> RedisConnection:
        """The connection, opened now if there is none.

        Raises:
            RedisUnavailable, RedisRefused: See `RedisConnection.open`; or this was closed.
        """
        async with self._connecting:
            if self.closed:
                raise RedisUnavailable("the connection to Redis was closed")
            if (link := self.link) is None:
                timeout_s = self._redis.connect_timeout_s
                link = await RedisConnection.open(
                    self._url(),
                    timeout_s=timeout_s,
                    silence_s=self._redis.silence_timeout_s,
                    clock=self._clock,
                )
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._greet(link)
                except TimeoutError:
                    link.abort()
                    raise RedisUnavailable(f"Redis did not answer within {timeout_s} s") from None
                except BaseException:
                    link.abort()
                    raise
                self._link = link
                if self.closed:
                    link.abort()
        return link

    async def _greet(self, link: RedisConnection) -> None:
        if self._greeting:
            self._asked_at = self._clock.loop_s()
            info, *_ = await asyncio.gather(*link.send(_IDENTITY, *self._greeting))
            self._run_id = server_info(info).get("run_id", "")

    def send(self, *commands: Command) -> list[asyncio.Future[Any]]:
        """Send commands in one write over the connection there is; see `RedisConnection.send`."""
        assert self._link is not None
        if not any(RUN_ID in command for command in commands):
            return self._link.send(*commands)
        if self._clock.loop_s() - self._asked_at < _IDENTITY_S:
            return self._link.send(*map(self._complete, commands))
        self._asked_at, self._run_id = self._clock.loop_s(), ""
        *replies, identity = self._link.send(*map(self._complete, commands), _IDENTITY)
        identity.add_done_callback(partial(self._identify, self._link))
        return replies

    def _identify(self, link: RedisConnection, info: asyncio.Future[Any]) -> None:
        if not info.cancelled() and info.exception() is None and link is self._link:
            self._run_id = server_info(info.result()).get("run_id", "")

    def _complete(self, command: Command) -> Command:
        if RUN_ID not in command:
            return command
        at = command.index(RUN_ID)
        return (*command[:at], self._run_id, *command[at + 1 :])

    async def execute(self, *commands: Command) -> list[Any]:
        """Send commands in one write and wait for all replies.

        Raises:
            RedisUnavailable, RedisRefused: No connection, no answer in time, or an error reply.
        """
        replies = await self.execute_each(*commands)
        if error := next((reply for reply in replies if isinstance(reply, Exception)), None):
            raise error
        return replies

    async def execute_each(self, *commands: Command) -> list[Any]:
        """The same, but an error reply fails nothing but its own command.

        Returns:
            Per command its reply, or a RedisErrorReply or RedisRefused.

        Raises:
            RedisUnavailable, RedisRefused: No connection, or no answer in time.
        """
        link = await self.connect()
        replies = await asyncio.gather(*self.send(*commands), return_exceptions=True)
        for error in (reply for reply in replies if isinstance(reply, BaseException)):
            if not isinstance(error, RedisErrorReply | RedisRefused):
                link.abort()
                raise error
            if isinstance(error, RedisErrorReply) and error.code in _ERRORS_OF_A_CONNECTION:
                link.abort()
        return replies

    async def reset(self) -> None:
        """End the connection, if there is one; the next command opens a new one."""
        if (link := self.link) is not None:
            link.abort()
            await link.lost

    def close(self) -> None:
        """End the connection; no other one will be opened."""
        self.closed = True
        if self._link is not None:
            self._link.abort()


async def server_version(redis: RedisTable) -> str:
    """The version Redis reports, such as `7.0.15`, or `7.2.4 (Valkey 9.1.2)`: of which Redis it does the same.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`.
    """
    fields = await _server(redis)
    version = fields.get("redis_version", "unknown")
    return f"{version} (Valkey {fields['valkey_version']})" if "valkey_version" in fields else version


async def server_pid(redis: RedisTable) -> int:
    """The process id of Redis, on its own machine; 0 if it does not say.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`.
    """
    pid = (await _server(redis)).get("process_id", "")
    return int(pid) if pid.isdigit() else 0


async def server_clock(redis: RedisTable, exchanges: int = 20, clock: Clock = CLOCK) -> tuple[int, int]:
    """How many ns the wall clock of Redis is ahead of CLOCK_MONOTONIC here, and how far from that it may be.

    Of some exchanges the one with the shortest round trip, in the middle of which it is taken to have been read.

    Raises:
        RedisUnavailable, RedisRefused: See `CommandLink.execute`; or it does not tell the time.
    """
    commands, readings = CommandLink(redis), []
    try:
        await commands.connect()
        for _ in range(exchanges):
            sent_ns = clock.monotonic_ns()
            [reply] = await commands.execute(("TIME",))
            error_ns = (clock.monotonic_ns() - sent_ns + 1) // 2
            its_ns = (int(reply[0]) * 1_000_000 + int(reply[1])) * 1000
            readings.append((error_ns, its_ns - (sent_ns + error_ns)))
    except (TypeError, ValueError, IndexError):
        raise RedisUnavailable("Redis gave an unexpected answer to TIME") from None
    finally:
        commands.close()
    error_ns, ahead_ns = min(readings)
    return ahead_ns, error_ns


async def _server(redis: RedisTable) -> dict[str, str]:
    commands = CommandLink(redis)
    try:
        [info] = await commands.execute(("INFO", "server"))
    finally:
        commands.close()
    return server_info(info)


def server_info(info: bytes) -> dict[str, str]:
    """The fields of Redis' `INFO server`, such as `redis_version` and `run_id`."""
    lines = str(info, "utf-8", "replace").splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines)}

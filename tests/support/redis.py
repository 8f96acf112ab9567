"""A plain Redis client, what may happen to a Redis, and a server in its place."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import hiredis

from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable
from tests.support.ports import free_port
from tests.support.timing import UNIT_S


class RedisClient:
    """A plain Redis client, for what somebody else's publisher might do."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._reader = hiredis.Reader()

    def command(self, *words: Any) -> Any:
        self._socket.sendall(hiredis.pack_command(words))
        return self.reply()

    def reply(self) -> Any:
        """What Redis says next, asked or not."""
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(65_536))
        return reply

    def publish(self, payload: bytes, channel: str = "events.critical") -> int:
        """PUBLISH; how many subscriptions heard it."""
        heard: int = self.command("PUBLISH", channel, payload)
        return heard

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def redis_client(server: RedisServer | int) -> Iterator[RedisClient]:
    """A client of a Redis of ours, or of whatever listens on a port."""
    client = RedisClient(server if isinstance(server, int) else server.port)
    try:
        yield client
    finally:
        client.close()


def next_reply(client: RedisClient) -> Any:
    """What Redis says next to `client`, asked or not."""
    return client.reply()


def next_message(client: RedisClient) -> bytes:
    """The next payload on the channels that `client` has subscribed to."""
    message: bytes = next_reply(client)[2]
    return message


def connections_taken(client: RedisClient) -> int:
    """How many connections Redis has accepted since it was started, this client's included."""
    statistics: bytes = client.command("INFO", "stats")
    lines = dict(line.partition(b":")[::2] for line in statistics.splitlines())
    return int(lines[b"total_connections_received"])


@contextlib.contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Redis stands still: connections stay open, nothing is answered."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextlib.contextmanager
def crashed(server: RedisServer) -> Iterator[Callable[[], RedisServer]]:
    """Redis dies at once; calling what is given starts another one at the same port, until the block ends."""
    server.kill()
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(RedisServer.start(server.port))


@contextlib.asynccontextmanager
async def dead(server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[RedisServer]]]:
    """`crashed`, for a coroutine."""
    with contextlib.ExitStack() as stack:
        revive = await asyncio.to_thread(stack.enter_context, crashed(server))
        try:
            yield lambda: asyncio.to_thread(revive)
        finally:
            await asyncio.to_thread(stack.close)


def hasty(url: str, **changes: float) -> RedisTable:
    """Settings that notice and retry soon."""
    times = {
        "connect_timeout_s": 1.0 * UNIT_S,
        "ping_interval_s": 0.1,
        "silence_timeout_s": 0.5 * UNIT_S,
        "reconnect_max_s": 0.1,
    }
    return RedisTable.model_validate({"url": url, **times, **changes})


def stored_events(client: RedisClient, channel: str) -> list[tuple[int, bytes]]:
    """Offset and payload of everything that is stored."""
    entries = client.command("XRANGE", f"{{{channel}}}:log", "-", "+")
    return [(int(id_.partition(b"-")[0]), fields[1]) for id_, fields in entries]


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def stand_in(talk: Talk) -> AsyncIterator[str]:
    """A server that says what the test wants, for what no real Redis would do on demand; yields its URL."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await talk(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", free_port())
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        for writer in writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()

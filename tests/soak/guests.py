"""Those who come and go: well-behaved, slow, talkative, rude, and wrong; each checks what it is given."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from broadcaster.core.position import Position
from broadcaster.wire import PLAIN, V1, read_control
from tests.support import UNIT_S, client_frame, opened_by_library, upgrade_request

SEVERITIES: Final = ("critical", "warning", "info")


CLOSE_1008: Final = b"\x03\xf0more than "


def severity_at(offset: int) -> str:
    """Which severity the event at an offset has: whoever filters knows what was held back rightly."""
    return SEVERITIES[offset % 3]


class Unexpected(Exception):
    """Somebody was given what the contract does not allow."""


class Books:
    """One subscriber's account: every event that it wants, once and in order.

    Attributes:
        last: The offset up to which everything was given or rightly held back; None before the first.
        given: How many events it was given.
    """

    def __init__(self, severity: str = "", last: int | None = None) -> None:
        self._severity = severity
        self.last = last
        self.given = 0

    def read(self, message: bytes) -> dict[str, Any] | None:
        """Enter a message; a control frame is returned.

        Raises:
            Unexpected: An event is missing, comes twice, or is not wanted.
        """
        control = read_control(message)
        if control is not None:
            if control["control"] == "beat":
                self._reach(Position.parse(control["position"]).offset)
            return control
        event = json.loads(message)
        offset = event["offset"]
        if self._severity and event["severity"] != self._severity:
            raise Unexpected(f"the event {offset} is {event['severity']}, wanted is {self._severity}")
        if self.last is not None and offset <= self.last:
            raise Unexpected(f"the event {offset} comes after {self.last}")
        self._reach(offset - 1)
        self.last = offset
        self.given += 1
        return None

    def _reach(self, offset: int) -> None:
        """Nothing more comes up to this offset."""
        if self.last is not None:
            missing = [one for one in range(self.last + 1, offset + 1) if self.wants(one)]
            if missing:
                raise Unexpected(f"{missing[:5]} are missing after {self.last}")
            self.last = max(self.last, offset)

    def wants(self, offset: int) -> bool:
        """Whether the event at an offset is one that it asked for."""
        return self._severity in ("", severity_at(offset))


class Town:
    """What the guests have in common.

    Attributes:
        position: Of the last event that was published.
        epoch: Of the channel.
        connects: Connections made.
        ended: How often each guest's story has come to its end.
        complaints: What they have seen that must not be.
        leaving: Set when everybody is to go home.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.epoch = ""
        self.position = 0
        self.connects = 0
        self.ended: Counter[str] = Counter(dict.fromkeys(GUESTS, 0))
        self.complaints: list[str] = []
        self.leaving = asyncio.Event()

    async def come(self, kind: str) -> None:
        """One guest's story."""
        self.connects += 1
        try:
            async with asyncio.timeout(30 * UNIT_S):
                await GUESTS[kind][1](self)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.complaints.append(
                f"{kind}: {place.name}:{place.lineno}: {type(error).__name__}: {str(error)[:300]}"
            )
        else:
            self.ended[kind] += 1

    @contextlib.asynccontextmanager
    async def subscribed(self, query: str = "", subprotocol: str = "") -> AsyncIterator[ClientConnection]:
        """A subscription through the library; it says goodbye."""
        async with await opened_by_library(
            f"ws://127.0.0.1:{self.port}/ws{query}",
            subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
            ping_interval=None,
            open_timeout=10 * UNIT_S,
            max_queue=4096,
        ) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def dialled(
        self, receive_buffer: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection down at the bytes; it goes away without a goodbye."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            limit = 1024 if receive_buffer else 65_536
            reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def asked(self, request: bytes) -> int:
        """The status that a request is answered with."""
        async with self.dialled() as (reader, writer):
            writer.write(request)
            return int((await reader.readuntil(b"\r\n")).split()[1])


async def listen(connection: ClientConnection, books: Books, for_s: float) -> None:
    """Read for so long.

    Raises:
        Unexpected: Something is wrong with what comes; or the hub ends it.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            while True:
                control = books.read(await connection.recv(decode=False))
                if control is not None and control["control"] == "gap":
                    raise Unexpected(f"a gap: {control}")


def _stay_s() -> float:
    return random.uniform(0.1, 2.0)


# The guests


async def plain(town: Town) -> None:
    """Listens for a while, and says goodbye."""
    async with town.subscribed(subprotocol=random.choice(("", PLAIN))) as connection:
        await listen(connection, Books(), _stay_s())


async def v1(town: Town) -> None:
    """The same, and is told where it stands."""
    async with town.subscribed(subprotocol=V1) as connection:
        await listen(connection, await _welcomed(connection), _stay_s())


async def _welcomed(connection: ClientConnection, severity: str = "") -> Books:
    welcome = json.loads(await connection.recv())
    if welcome["control"] != "welcome":
        raise Unexpected(f"begins with {welcome}")
    return Books(severity, Position.parse(welcome["position"]).offset)


async def choosy(town: Town) -> None:
    """Wants only one severity."""
    severity = random.choice(SEVERITIES)
    async with town.subscribed(f"?severity={severity}", V1) as connection:
        await listen(connection, await _welcomed(connection, severity), _stay_s())


async def returning(town: Town) -> None:
    """Comes back from an interruption, short or long: everything after it comes."""
    since = max(1, town.position - random.choice((0, 5, 100, 700)))
    async with town.subscribed(f"?since={town.epoch}-{since}", random.choice((V1, PLAIN))) as connection:
        await listen(connection, Books(last=since), _stay_s())


async def late(town: Town) -> None:
    """Comes back when what it has missed has been thrown away: that is told first, and then it goes on."""
    async with town.subscribed(f"?since={town.epoch}-1", V1) as connection:
        welcome, gap = json.loads(await connection.recv()), json.loads(await connection.recv())
        if welcome["recovered"] is not False or (gap.get("cause"), gap.get("first")) != ("expired", 2):
            raise Unexpected(f"begins with {welcome} and {gap}")
        books = Books(last=gap["last"])
        for _ in range(300):
            books.read(await connection.recv(decode=False))


async def talker(town: Town) -> None:
    """Says something now and then, and is answered its pings."""
    async with town.subscribed(subprotocol=PLAIN) as connection:
        books = Books()
        for _ in range(5):
            await connection.send("hello")
            pong = await connection.ping()
            await listen(connection, books, 0.1)
            await pong


async def babbler(town: Town) -> None:
    """Talks without end: 1008. Half of them answer that, the others are cut."""
    async with town.dialled() as (reader, writer):
        writer.write(upgrade_request(town.port))
        data = await reader.readuntil(b"\r\n\r\n")
        writer.write(client_frame(9, b"babble") * 1000)
        while CLOSE_1008 not in data:
            if not (more := await reader.read(65_536)):
                raise Unexpected(f"is not closed with 1008: {data[-100:]!r}")
            data += more
        if random.random() < 0.5:
            writer.write(client_frame(8, b"\x03\xf0"))
        with contextlib.suppress(ConnectionResetError):
            await reader.read(-1)


async def vanishing(town: Town) -> None:
    """Is gone all of a sudden (RST)."""
    async with town.dialled() as (reader, writer):
        writer.write(upgrade_request(town.port, subprotocol=random.choice((V1, PLAIN))))
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_stay_s()):
                await reader.read(-1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def deaf(town: Town) -> None:
    """Asks for all there is, and does not read: it is closed, does not notice, and is cut."""
    async with town.dialled(receive_buffer=4096) as (_, writer):
        writer.write(upgrade_request(town.port, path=f"/ws?since={town.epoch}-{town.position - 7500}"))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4.0):
                await town.leaving.wait()


async def half(town: Town) -> None:
    """Sends half of a handshake, and waits for the 408; or does not even wait."""
    async with town.dialled() as (reader, writer):
        request = upgrade_request(town.port)
        writer.write(request[: random.randrange(len(request))])
        if random.random() < 0.5:
            status = await reader.readuntil(b"\r\n")
            if b" 408 " not in status:
                raise Unexpected(f"half a handshake is answered {status!r}")


def _wrong(town: Town) -> list[tuple[bytes, int]]:
    good = upgrade_request(town.port)
    return [
        (b"NONSENSE\r\n\r\n", 400),
        (good + b"more", 400),
        (upgrade_request(town.port, path="/ws?channel=elsewhere"), 404),
        (upgrade_request(town.port, path="/ws?since=nowhere"), 400),
        (upgrade_request(town.port, Origin="http://elsewhere.example"), 403),
        (upgrade_request(town.port, X_Long="x" * 20_000), 431),
        (b"GET /ws HTTP/1.1\r\nHost: a\r\n\r\n", 426),
    ]


async def refused(town: Town) -> None:
    """Asks for what it cannot have."""
    request, expected = random.choice(_wrong(town))
    if (status := await town.asked(request)) != expected:
        raise Unexpected(f"{request[:80]!r} is answered {status}, not {expected}")


async def curious(town: Town) -> None:
    """Asks how the hub is."""
    path = random.choice(("/health", "/health/live", "/stats"))
    if (status := await town.asked(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())) != 200:
        raise Unexpected(f"{path} is answered {status}")


async def elsewhere(town: Town) -> None:
    """Wants a channel that hardly anybody wants beside the one with the events: it is opened, and closed again."""
    hall = f"events.hall-{random.randrange(8)}"
    async with town.subscribed(f"?channel={hall}&channel=events.critical", V1) as connection:
        welcomed: set[str] = set()
        while welcomed != {hall, "events.critical"}:
            message = json.loads(await connection.recv())
            if message.get("control") == "welcome":
                welcomed.add(message["channel"])
            elif message["channel"] not in welcomed:
                raise Unexpected(f"{message} comes before the welcome")


Story = Callable[[Town], Awaitable[None]]

GUESTS: Final[dict[str, tuple[float, Story]]] = {
    "plain": (10, plain),
    "v1": (8, v1),
    "choosy": (6, choosy),
    "returning": (6, returning),
    "late": (0.5, late),
    "talker": (4, talker),
    "babbler": (1, babbler),
    "vanishing": (5, vanishing),
    "deaf": (0.5, deaf),
    "half": (3, half),
    "refused": (3, refused),
    "curious": (2, curious),
    "elsewhere": (1, elsewhere),
}
"""Who comes, and how many a second: 50 in all."""


# Those who stay


async def stay(town: Town, query: str, subprotocol: str, books: Books) -> None:
    """Stay to the end; whatever ends it before is a complaint."""
    try:
        async with town.subscribed(query, subprotocol) as connection:
            while True:
                books.read(await connection.recv(decode=False))
    except (Unexpected, ConnectionClosed, OSError, ValueError) as error:
        town.complaints.append(f"one who stayed: {type(error).__name__}: {error}")

"""Connections between the processes of a simulation, and what can happen to them.

A connection is two directions. In each, bytes wait at the sender (the transport's buffer), travel (at most a
window of them at a time), and wait at a receiver that does not read. What happens to a link happens to all
connections between two processes, in one direction or both.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.simulation.loop import VirtualLoop
from tests.simulation.process import PROCESS, Process

Factory = Callable[[], Any]

_WIDE: Final = (16_384, 262_144)
_UPGRADED: Final = b"HTTP/1.1 101 "


@dataclass(slots=True)
class Link:
    """The way from one process to another; the way back is a link of its own.

    Attributes:
        delay_s: The shortest and the longest time that bytes travel.
        bytes_per_s: How many get through.
        blocked: Whether nothing gets through (black hole); what was sent waits.
        refuses: Whether new connections are refused.
        splits: Whether what is written arrives in pieces that are cut at any byte.
    """

    delay_s: tuple[float, float] = (0.0001, 0.001)
    bytes_per_s: float = math.inf
    blocked: bool = False
    refuses: bool = False
    splits: bool = False


class Direction:
    """One direction of a connection, in order and without loss."""

    def __init__(self, network: Network, sender: Endpoint, receiver: Endpoint, window: int) -> None:
        self._network = network
        self._sender = sender
        self._receiver = receiver
        self._window = window
        self._travelling = 0  # bytes, with those that wait at the receiver
        self._on_the_way: deque[bytes] = deque()  # empty: the end
        self._unread: deque[bytes] = deque()
        self._free_at = 0.0
        self._hurries = 0  # how often it was made to
        self._ends = False
        self._ended = False
        self.waiting = bytearray()
        self.link = network.link(sender.process.name, receiver.process.name)

    def end(self) -> None:
        """After what is waiting there is nothing more."""
        self._ends = True
        self.pump()

    def pump(self) -> None:
        """Send what can be sent."""
        network, link = self._network, self.link
        if self._ended or self._sender.vanished:
            network.unsent.pop(self, None)
            return
        network.unsent[self] = None
        if link.blocked:
            return
        while self.waiting and self._travelling < self._window:
            size = min(len(self.waiting), self._window - self._travelling)
            if link.splits:
                size = network.chance.randint(1, size)
            data = bytes(self.waiting[:size])
            del self.waiting[:size]
            self._travelling += size
            self._arrive_later(data, size / link.bytes_per_s)
        if self._ends and not self.waiting:
            self._ended = True
            self._arrive_later(b"", 0.0)
        if not self.waiting:
            network.unsent.pop(self, None)
        self._sender.on_written()

    def _arrive_later(self, data: bytes, transfer_s: float) -> None:
        loop, (shortest_s, longest_s) = self._network.loop, self.link.delay_s
        delay_s = shortest_s + (longest_s - shortest_s) * self._network.chance.random()
        self._free_at = max(self._free_at, loop.now + delay_s) + transfer_s
        self._on_the_way.append(data)
        self._network.flowing[self] = None
        loop.call_at(self._free_at, self._arrive, self._hurries, context=self._receiver.context)

    def widen(self, window: int) -> None:
        """Let at least so many bytes travel."""
        self._window = max(self._window, window)
        self.pump()

    def hurry(self) -> None:
        """The link is as fast as ever again: what is on the way need not wait for what was slow."""
        self._hurries += 1
        self._free_at = self._network.loop.now
        on_the_way = list(self._on_the_way)
        self._on_the_way.clear()
        for data in on_the_way:
            self._arrive_later(data, len(data) / self.link.bytes_per_s)

    def _arrive(self, hurries: int) -> None:
        if hurries != self._hurries:
            return
        data = self._on_the_way.popleft()
        if not self._on_the_way:
            self._network.flowing.pop(self, None)
        if self._sender.vanished or self._receiver.closed:
            return
        self._unread.append(data)
        self.read()

    def read(self) -> None:
        """Give the receiver what has arrived."""
        while self._unread and not self._receiver.paused and not self._receiver.closed:
            data = self._unread.popleft()
            if not data:
                self._receiver.on_end()
                return
            self._travelling -= len(data)
            if self in self._network.unsent:
                self._network.loop.call_outside(self._network.loop.now, self.pump)
            self._receiver.protocol.data_received(data)


class Endpoint(asyncio.Transport):
    """One end of a connection: the transport of a protocol.

    Attributes:
        closed: Whether `connection_lost` is due or was called.
        paused: Whether reading is paused.
        vanished: Whether its packets reach nobody any more, the end of the connection included (half-open).
        upgraded_at: When a hub has answered it that this is a WebSocket.
        lost_at: When it was gone.
    """

    def __init__(self, network: Network, process: Process, name: tuple[str, int], peer: tuple[str, int]) -> None:
        super().__init__({"peername": peer, "sockname": name})
        self.process = process
        self.context = process.context
        self.protocol: Any = None
        self.closed = self.paused = self.vanished = False
        self.upgraded_at = self.lost_at = math.inf
        self.out: Direction
        self.back: Direction
        self._network = network
        self._high, self._low = 65_536, 16_384
        self._writing_paused = False
        self._closing = False
        self._eof = False

    @property
    def peer_name(self) -> str:
        """The name of the process at the other end."""
        return self.out._receiver.process.name

    # asyncio.Transport

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self._closing or self.closed

    def is_reading(self) -> bool:
        return not self.paused and not self.is_closing()

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        if self.paused:
            self.paused = False
            self._network.loop.call_soon(self.back.read, context=self.context)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65_536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return len(self.out.waiting)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_closing() or not data:
            return
        if self._eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if data[: len(_UPGRADED)] == _UPGRADED:
            self._network.on_upgraded(self)
        self.out.waiting += data
        self.out.pump()
        if len(self.out.waiting) > self._high and not self._writing_paused:
            self._writing_paused = True
            self.protocol.pause_writing()

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._eof and not self.is_closing():
            self._eof = True
            self.out.end()

    def close(self) -> None:
        if not self.is_closing():
            self._closing = True
            self._eof = True
            self.out.end()
            self.on_written()

    def abort(self) -> None:
        self.lose(None)

    # What the network does

    def on_written(self) -> None:
        """Bytes have left."""
        size = len(self.out.waiting)
        if self._writing_paused and size <= self._low and not self.closed:
            self._writing_paused = False
            self._network.loop.call_soon(self._resume_writing, context=self.context)
        if self._closing and not size and not self.closed:
            self.lose(None)

    def _resume_writing(self) -> None:
        if not self.closed:
            self.protocol.resume_writing()

    def on_end(self) -> None:
        """The peer has ended its output, or is gone."""
        if self.out._ended and self._eof:
            self.lose(None)
        elif not self.protocol.eof_received():
            self.close()

    def lose(self, error: Exception | None) -> None:
        """This end is gone: its protocol learns of it, and in order the other end."""
        if not self.closed:
            self.closed, self.lost_at = True, self._network.loop.now
            self._network.forget(self)
            self.out.waiting.clear()
            self.out.end()
            self._network.loop.call_soon(self._call_connection_lost, error, context=self.context)

    def _call_connection_lost(self, error: Exception | None) -> None:
        if self.protocol is not None:  # else it had not been accepted
            self.protocol.connection_lost(error)


class Server:
    """What `loop.create_server` returns."""

    sockets: tuple[Any, ...] = ()

    def __init__(self, network: Network, factory: Factory, address: tuple[str, int], process: Process) -> None:
        self.factory = factory
        self.process = process
        self.serving = False
        self._network = network
        self._address = address

    async def start_serving(self) -> None:
        self.serving = True

    def is_serving(self) -> bool:
        return self.serving

    def close(self) -> None:
        self.serving = False
        self._network.unlisten(self._address, self)

    async def wait_closed(self) -> None:
        return None

    def get_loop(self) -> VirtualLoop:
        return self._network.loop


class Network:
    """All addresses, links and connections.

    Attributes:
        chance: Draws delays, windows and where pieces are cut.
        counts: What has happened.
        windows: The smallest and the largest number of bytes that may travel in one direction of a connection.
        balanced: An address behind which there are several others of its host (load balancer); None: none is.
        balance: Called with the name of who connects to it; the port to which that is led.
        narrow: To which processes, by their names, connections have such windows; others have wide ones.
        usual: How a link is before anything has happened to it.
        websockets: Per process the ends that it has, and has had, of its WebSockets.
        unsent: Directions in which something waits.
        flowing: Directions in which something is on its way.
    """

    def __init__(self, loop: VirtualLoop, chance: random.Random) -> None:
        self.loop = loop
        self.chance = chance
        self.counts: Counter[str] = Counter()
        self.windows = _WIDE
        self.balanced: tuple[str, int] | None = None
        self.balance: Callable[[str], int] = lambda client: 0
        self.narrow: Callable[[str], bool] = lambda server: True
        self.usual = Link()
        self.websockets = defaultdict[str, list[Endpoint]](list)
        self._links: dict[tuple[str, str], Link] = {}
        self._servers: dict[tuple[str, int], Server] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._open: dict[Endpoint, Endpoint] = {}
        self._known: set[Process] = set()
        self._ports = 40_000
        self.unsent: dict[Direction, None] = {}
        self.flowing: dict[Direction, None] = {}

    def link(self, sender: str, receiver: str) -> Link:
        """The way from one process to another, by their names."""
        if (sender, receiver) not in self._links:
            self._links[sender, receiver] = replace(self.usual)
        return self._links[sender, receiver]

    def listen(self, factory: Factory, host: str, port: int) -> Server:
        """Listen as the process that is running.

        Raises:
            OSError: Another one listens there.
        """
        process = PROCESS.get()
        assert process is not None
        if (host, port) in self._servers:
            raise OSError(98, "Address already in use")
        self._names[host, port] = process.name
        server = self._servers[host, port] = Server(self, factory, (host, port), process)
        process.on_kill.append(server.close)
        self._close_with(process)
        return server

    def unlisten(self, address: tuple[str, int], server: Server) -> None:
        if self._servers.get(address) is server:
            del self._servers[address]

    def unlisten_all(self, process: Process) -> None:
        """A process takes no more connections; those that there are stay."""
        for server in [each for each in self._servers.values() if each.process is process]:
            server.close()

    async def connect(self, factory: Factory, host: str, port: int) -> tuple[Endpoint, Any]:
        """Connect as the process that is running.

        Raises:
            ConnectionRefusedError: Nobody listens there, or the link refuses.
        """
        process = PROCESS.get()
        assert process is not None
        loop = self.loop
        if (host, port) == self.balanced:
            port = self.balance(process.name)
        while True:
            await asyncio.sleep(self.chance.uniform(*self.link(process.name, self._name(host, port)).delay_s))
            server = self._servers.get((host, port))
            there = self._name(host, port)
            way, back = self.link(process.name, there), self.link(there, process.name)
            if not way.blocked and not back.blocked:
                break
            await asyncio.sleep(0.2)  # the first packet is sent again and again
        if server is None or not server.serving or way.refuses:
            self.counts["refused"] += 1
            raise ConnectionRefusedError(111, f"Connect call failed ({host!r}, {port})")
        self._ports += 1
        mine, theirs = ("10.0.0.1", self._ports), (host, port)
        client = Endpoint(self, process, mine, theirs)
        other = Endpoint(self, server.process, theirs, mine)
        window = self.chance.randint(*(self.windows if self.narrow(there) else _WIDE))
        client.out = other.back = Direction(self, client, other, window)
        other.out = client.back = Direction(self, other, client, window)
        self._open[client], self._open[other] = other, client
        self.counts["connections"] += 1
        self._close_with(process)
        client.protocol = factory()
        client.protocol.connection_made(client)
        loop.call_at(loop.now, self._accept, server, other, context=server.process.context)
        return client, client.protocol

    def _close_with(self, process: Process) -> None:
        if process not in self._known:
            self._known.add(process)
            process.on_kill.append(lambda: self.close_all_of(process))

    def _accept(self, server: Server, endpoint: Endpoint) -> None:
        if endpoint.closed:
            return
        endpoint.protocol = server.factory()
        endpoint.protocol.connection_made(endpoint)

    def _name(self, host: str, port: int) -> str:
        return self._names.get((host, port), f"{host}:{port}")

    def on_upgraded(self, endpoint: Endpoint) -> None:
        """A hub answers a handshake."""
        if (peer := self._open.get(endpoint)) is not None:
            peer.upgraded_at = self.loop.now
            self.websockets[peer.process.name].append(peer)

    def forget(self, endpoint: Endpoint) -> None:
        self._open.pop(endpoint, None)

    def pump(self) -> None:
        """Links have changed: what waited is sent."""
        for direction in list(self.unsent):
            direction.pump()

    def widen(self) -> None:
        """From now on no connection is slow because of its window."""
        self.windows = _WIDE
        for end in list(self._open):
            end.out.widen(_WIDE[0])

    def hurry(self, sender: str, receiver: str) -> None:
        """A link has become faster; what an end has sent that is gone since comes faster, too."""
        link = self.link(sender, receiver)
        for direction in [each for each in self.flowing if each.link is link]:
            direction.hurry()

    def close_all_of(self, process: Process) -> None:
        """Its kernel closes its connections: the peers read what had been sent, and then the end."""
        for endpoint in [each for each in self._open if each.process is process]:
            endpoint.lose(None)

    def between(self, one: str, other: str) -> list[Endpoint]:
        """The ends at `one` of the connections between two processes."""
        return [end for end, peer in self._open.items() if end.process.name == one and peer.process.name == other]

    def cut(self, one: str, other: str) -> None:
        """Reset all connections between two processes."""
        for end in self.between(one, other):
            peer = self._open.get(end)
            end.lose(ConnectionResetError(104, "Connection reset by peer"))
            if peer is not None:
                peer.lose(ConnectionResetError(104, "Connection reset by peer"))
            self.counts["cut"] += 1

    def half_open(self, lost_at: str, other: str) -> None:
        """The connections between two processes end for one of them; the other does not learn of it."""
        for end in self.between(lost_at, other):
            peer = self._open.get(end)
            end.vanished = True
            if peer is not None:
                peer.vanished = True
            end.lose(ConnectionResetError(104, "Connection reset by peer"))
            self.counts["half-open"] += 1

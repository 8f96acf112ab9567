"""A hub without sockets and without Redis: its real parts, on a wire and a memory that the test commands."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from broadcaster import wire
from broadcaster.auth.access import Access
from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.position import Position, is_timed
from broadcaster.core.runtime import Limits, Runtime
from broadcaster.hub.broker.redis_broker import RedisBroker
from broadcaster.hub.catchup.event_log import EventLog
from broadcaster.hub.catchup.page_cache import PageCache
from broadcaster.hub.catchup.sequencer import Sequencer
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.channels.channels import Channels, Work
from broadcaster.hub.channels.delivery_probe import DeliveryProbe
from broadcaster.hub.channels.dispatch import Dispatcher
from broadcaster.hub.connections.admission import AdmissionControl, Admitted
from broadcaster.hub.connections.connection import Connection, ConnectionContext
from broadcaster.hub.connections.event_stream import EventStream
from broadcaster.hub.connections.registry import ConnectionRegistry, ticks
from broadcaster.hub.connections.timer import Timer
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.format import PLAIN
from broadcaster.hub.fanout.message import Message, read_message
from broadcaster.hub.fanout.scheduler import Scheduler
from broadcaster.publish.publisher import Publisher
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.settings import (
    ChannelsTable,
    EventTable,
    HistoryTable,
    HubTable,
    RedisTable,
    Settings,
)
from tests.support import UNIT_S, Clock, RedisClient, server_frames, until

CHANNEL = "events.critical"

HASTY: dict[str, Any] = {
    "BROADCASTER_HUB__PROVE_INTERVAL_S": "0.2",
    "BROADCASTER_HUB__BEAT_INTERVAL_S": "0.1",
    "BROADCASTER_REDIS__PING_INTERVAL_S": "0.1",
    "BROADCASTER_REDIS__SILENCE_TIMEOUT_S": str(0.6 * UNIT_S),
    "BROADCASTER_REDIS__RECONNECT_MAX_S": "0.1",
}
"""The environment of a hub in a process of its own that finds out soon whatever happens to its Redis."""

HIGH_WATER = 65_536
"""Bytes a transport holds before it asks for a pause, as asyncio's and uvloop's do."""

AT_ONCE = Runtime(limits=Limits(slice_s=math.inf))
"""For a log whose pages are checked in one turn: tests count turns, and not how fast this machine is."""

Told = bytes | str
"""What a client was sent: the payload of an event, or the name of a control frame, or `close 4008`."""


def payload(number: int = 1, size: int = 0, **labels: Any) -> bytes:
    """A valid event, not stored yet; as stored in the default channel it has `size` bytes, if that is enough."""
    fields = {
        "event_id": f"00000000-0000-4000-8000-{number:012d}",
        "event_type": "SERVER_DOWN",
        "source": "server-a",
        "sequence": number,
        "published_at_ms": 1,
        **labels,
        "data": {"pad": ""},
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text.replace(b'"pad":""', b'"pad":"%b"' % (b"." * (size - len(text))))


INVALID = b'{"no":"event"}'
"""What the script would store, and the hub must refuse."""


def splice(channel: str, position: Position, event: bytes) -> bytes:
    """An event as it is stored."""
    front = f'{{"channel":"{channel}","epoch":"{position.epoch}","offset":{position.offset},'.encode()
    return front + event[1:]


def sized(number: int, size: int, channel: str, position: Position) -> bytes:
    """A stored event of exactly `size` bytes."""
    least = len(splice(channel, position, payload(number)))
    assert size >= least, f"an event has at least {least} bytes"
    stored = splice(channel, position, payload(number, len(payload(number)) + size - least))
    assert len(stored) == size
    return stored


@dataclass
class Shelf:
    """One channel in Redis.

    Attributes:
        epochs: All there ever were.
        oldest: Per epoch the first offset in the log when it began; epochs that had ended by then are not listed.
        offset: Of the last event.
        began_by: Which process began the last epoch.
        log: What can be found.
        gone: What no longer can: per offset, where the channel stood when it went, and the event.
        ids: Positions by the ids of what the script has stored.
    """

    epochs: list[Position]
    offset: int
    began_by: int
    oldest: dict[str, int] = field(default_factory=dict)
    log: dict[int, bytes] = field(default_factory=dict)
    gone: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    ids: dict[str, Position] = field(default_factory=dict)


class Memory:
    """What the hub asks of Redis, answered from memory: the script, pages; with faults on command.

    test_memory.py holds it against real servers. It knows no time (nothing expires), no `history.max_events`, and
    no counter that was set by hand.

    Attributes:
        failures: So many of the next commands find no Redis.
        asked: How many commands have been answered.
        errors: Per channel the words of commands that are answered with an error, and which.
        on_publish: Called with what is published.
        on_the_way: Called when an answer has been given and has not arrived yet.
        between: Called between two commands that are sent together.
        gate: Answers arrive only while it is set.
        opened_to: The process to which the connection was opened, if another one answers there now.
        looks, pages: How often each was asked for.
        now_us: Its clock.
        rising: Since which offset events of all channels are in the order of their stamps; 0: not known.
    """

    def __init__(self, *, timed: bool = False) -> None:
        """Nothing is stored. Epochs are e1, e2, ... as in earlier versions, or `timed` as the script does it."""
        self._epoch_name = "T{:09}000000".format if timed else "e{}".format
        self.shelves: dict[str, Shelf] = {}
        self.run = 1
        self.failures = 0
        self.asked = 0
        self.errors: dict[str, dict[str, Exception]] = {}
        self.on_the_way: Callable[[], None] | None = None
        self.between: Callable[[], None] | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.on_publish: Callable[[bytes], object] = len
        self.opened_to: int | None = None
        self.looks = 0
        self.pages: list[tuple[str, int]] = []
        self.now_us = 0
        self.rising = 0
        self._epochs = 0

    # As a publisher

    def shelf(self, channel: str = CHANNEL, floor: Position | None = None) -> Shelf:
        """A channel; its epoch is begun if that is due."""
        shelf = self.shelves.get(channel)
        if shelf is None:
            shelf = self.shelves[channel] = Shelf([], 0, 0)
        if shelf.began_by != self.run or (floor is not None and _is_before(shelf, floor)):
            self._epochs += 1
            name = self._epoch_name(self._epochs)
            shelf.epochs.append(Position(name, shelf.offset + 1))
            shelf.oldest[name] = min(shelf.log, default=shelf.offset + 1)
            shelf.began_by = self.run
        return shelf

    def next(self, channel: str = CHANNEL) -> Position:
        """The position that the next event will be given."""
        shelf = self.shelf(channel)
        return Position(shelf.epochs[-1].epoch, shelf.offset + 1)

    def head(self, channel: str = CHANNEL) -> Position:
        return self.next(channel)._replace(offset=self.shelf(channel).offset)

    def store(self, event: bytes, channel: str = CHANNEL) -> bytes:
        """Store an event (what begins with `channel` is stored already, but for its place); the stored bytes."""
        position = self.next(channel)
        stored = event if event.startswith(b'{"channel"') else splice(channel, position, event)
        shelf = self.shelf(channel)
        shelf.offset += 1
        shelf.log[shelf.offset] = stored
        return stored

    # What may happen to it

    def restart(self, kept: int | None = None, channel: str = CHANNEL) -> None:
        """Another process, with all data; or a channel is as it last was when it stood at the offset `kept`."""
        self.run += 1
        if kept is not None:
            self.set_back(kept, channel)

    def set_back(self, kept: int, channel: str = CHANNEL) -> None:
        """The same process; a channel is as it last was when it stood at the offset `kept`."""
        shelf = self.shelves[channel]
        shelf.offset = kept
        log = shelf.log | {offset: event for offset, (head, event) in shelf.gone.items() if head > kept}
        shelf.log = {offset: event for offset, event in log.items() if offset <= kept}
        shelf.gone = {offset: gone for offset, gone in shelf.gone.items() if gone[0] <= kept}
        shelf.ids = {key: position for key, position in shelf.ids.items() if position.offset <= kept}
        shelf.epochs = [epoch for epoch in shelf.epochs if epoch.offset <= kept + 1]

    def forget(self, channel: str = CHANNEL) -> None:
        """All that was known of a channel is gone."""
        self.shelves.pop(channel, None)

    def trim(self, first: int, channel: str = CHANNEL) -> None:
        """What comes before an offset has left the retention window."""
        if channel in self.shelves:
            self.delete(*[offset for offset in self.shelves[channel].log if offset < first], channel=channel)

    def delete(self, *offsets: int, channel: str = CHANNEL) -> None:
        """These events are no longer in the log."""
        shelf = self.shelves[channel]
        for offset in offsets:
            shelf.gone[offset] = (shelf.offset, shelf.log.pop(offset))

    # As `CommandLink`

    @property
    def run_id(self) -> str:
        return str(self.opened_to or self.run)

    async def reset(self) -> None:
        self.opened_to = None

    async def execute(self, *commands: tuple[Any, ...]) -> list[Any]:
        replies = await self.execute_each(*commands)
        if error := next((reply for reply in replies if isinstance(reply, Exception)), None):
            raise error
        return replies

    async def execute_each(self, *commands: tuple[Any, ...]) -> list[Any]:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise RedisUnavailable("there is no Redis")
        replies = list[Any]()
        for command in commands:
            if replies and self.between is not None:
                self.between()
            replies.append(self._answer(command))
        await asyncio.sleep(0)
        if self.on_the_way is not None:
            self.on_the_way()
        await self.gate.wait()
        return replies

    def _answer(self, command: tuple[Any, ...]) -> Any:
        self.asked += 1
        word = "XRANGE" if stream.PAGE_SHA in command else command[0]
        for channel, errors in self.errors.items():
            if word in errors and f"{{{channel}}}" in " ".join(map(str, command)):
                return errors[word]
        answers: dict[str, Callable[..., Any]] = {
            "XRANGE": lambda: self._page(*command[3:]),
            "EVALSHA": lambda: self._run_script(command[3 + command[2] :]),
            "SET": lambda: b"OK",
            "INFO": lambda: b"# Server\r\nrun_id:%d\r\n" % self.run,
            "COMMAND": lambda: [b"known"] * len(command[2:]),
            "CONFIG": list[bytes],
            "PUBLISH": lambda: self._publish(command[2]),
            "HMGET": lambda: self._peek(_channel_of(command[1]), command[2:]),
            "TIME": lambda: [b"%d" % part for part in divmod(self.now_us, 1_000_000)],
        }
        return answers[word]()

    def _peek(self, channel: str, names: Sequence[str]) -> list[bytes | None]:
        known = self.shelves.get(channel)
        if known is None or not known.epochs:
            return [None] * len(names)
        values = {
            "epoch": known.epochs[-1].epoch,
            "offset": known.offset,
            "run_id": known.began_by,
            "epochs": " ".join(f"{epoch}:{first}" for epoch, first in _listed(known)),
            "rising": f"{self.rising}:{known.offset}:1" if self.rising else "",
        }
        return [str(values[name]).encode() for name in names]

    def _page(self, log_key: str, meta_key: str, first: int, count: int, max_bytes: int) -> list[Any]:
        """As `page.lua` does."""
        channel = _channel_of(log_key)
        self.pages.append((channel, first))
        log = self.shelves[channel].log if channel in self.shelves else {}
        reply: list[Any] = [1, self._peek(_channel_of(meta_key), ("epoch", "offset"))]
        size = 0
        for offset in sorted(offset for offset in log if offset >= first):
            size += len(log[offset])
            if size > max_bytes and len(reply) > 2:
                reply[0] = 0
                break
            reply += [b"%d-0" % offset, log[offset]]
            if len(reply) > 2 * count + 1:
                reply[0] = 0  # it has not looked for another one
                break
        return reply

    def _run_script(self, arguments: Sequence[Any]) -> list[Any]:
        """As `stream.lua` does, but that an epoch has a name of ours."""
        channel, floor, rest = arguments[0], arguments[3], arguments[9:]
        ids, after, payloads = rest[: len(rest) // 2], rest[len(rest) // 2], rest[len(rest) // 2 + 1 :]
        self.looks += not payloads
        if not all(event.startswith(b'{"') for event in payloads):
            raise RedisUnavailable('Redis says: BADEVENT the payload of an event begins with {"')
        if after and not (channel in self.shelves and after in self.shelves[channel].ids):
            raise RedisUnavailable("Redis says: ORDER what comes before it was not stored")
        shelf = self.shelf(channel, Position.parse(floor) if floor else None)
        replies: list[Any] = []
        for event_id, event in zip(ids, payloads, strict=True):
            heard = -1
            if event_id not in shelf.ids:
                shelf.ids[event_id] = self.next(channel)
                heard = self._publish(self.store(event, channel))
            replies += [str(shelf.ids[event_id]).encode(), heard]
        epochs = "" if payloads else " ".join(f"{epoch}:{first}" for epoch, first in _listed(shelf))
        return [epochs.encode(), b"%d" % shelf.offset, *replies]

    def _publish(self, payload: bytes) -> int:
        asyncio.get_running_loop().call_soon(self.on_publish, payload)
        return 1

    def event_log(self, max_bytes: int = 131_072) -> EventLog:
        return EventLog(self.broker(Settings()), max_bytes, AT_ONCE)

    def broker(self, settings: Settings, link: Link | None = None) -> RedisBroker:
        return RedisBroker(
            settings.history,
            commands=cast(CommandLink, self),
            pages=cast(CommandLink, self),
            pubsub=cast(PubSubLink, link or Link()),
            publisher=Publisher(settings),
        )

    def close(self) -> None:
        """Nothing is open."""


def _is_before(shelf: Shelf, floor: Position) -> bool:
    """Whether a channel does not stand yet where somebody has seen it: its memory is an older one."""
    ours, seen = [int(name[1:10]) for name in (shelf.epochs[-1].epoch, floor.epoch)]
    return seen > ours or (seen == ours and floor.offset > shelf.offset)


def _listed(shelf: Shelf) -> list[Position]:
    """Those epochs of which there were events when the last one began, and that one; all that have no time."""
    *others, last = shelf.epochs
    ended = [index for index, epoch in enumerate(others) if epoch.offset <= shelf.oldest[last.epoch]]
    start = ended[-1] if ended and is_timed(last.epoch) else 0
    return [*others[start:], last]


def _channel_of(key: str) -> str:
    return key.removeprefix("{").rpartition("}:")[0]


class Socket(asyncio.Transport):
    """A transport whose peer reads only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.Protocol = asyncio.Protocol()
        self.writes: list[bytes] = []
        self.held = 0
        self.reads_along = True
        self.paused = False
        self.reading = True
        self.closing = False
        self.aborted = False
        self.ended = False

    def write(self, data: Any) -> None:
        if self.closing:
            raise RuntimeError("the handler is closed")
        self.writes.append(bytes(data))
        if not self.reads_along:
            self.held += len(data)
            if self.held > HIGH_WATER and not self.paused:
                self.paused = True
                self.protocol.pause_writing()

    def read(self, size: int = 1 << 40) -> None:
        """The peer reads so many bytes."""
        self.held = max(0, self.held - size)
        if self.paused and self.held <= HIGH_WATER // 4:
            self.paused = False
            self.protocol.resume_writing()

    def read_all(self) -> None:
        """The peer reads everything, and from now on all that comes."""
        self.reads_along = True
        self.read()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == HIGH_WATER

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


@dataclass
class Peer:
    """A connection and its end of the wire."""

    connection: Connection
    socket: Socket
    expected: list[Told] = field(default_factory=list)

    @property
    def told(self) -> list[Told]:
        """Everything but pings and pongs, in order."""
        told: list[Told] = []
        for opcode, data in server_frames(b"".join(self.socket.writes)):
            if opcode == 8:
                told.append(f"close {int.from_bytes(data[:2], 'big')}")
            elif opcode in (9, 10):
                continue
            elif control := wire.read_control(data):
                told.append(str(control["control"]))
            else:
                told.append(data)
        return told

    def events(self) -> list[bytes]:
        return [word for word in self.told if isinstance(word, bytes)]

    def controls(self, kind: str) -> list[dict[str, Any]]:
        """All control frames of a kind, without `control`."""
        found = []
        for opcode, data in server_frames(b"".join(self.socket.writes)):
            if opcode == 1 and (control := wire.read_control(data)) and control.pop("control") == kind:
                found.append(control)
        return found

    @property
    def story(self) -> list[Any]:
        """What a v1 client understands: offsets, and gaps as (epoch, first, last, cause)."""
        story: list[Any] = []
        for opcode, data in server_frames(b"".join(self.socket.writes)):
            if opcode != 1:
                continue
            if (control := wire.read_control(data)) is None:
                story.append(json.loads(data).get("offset"))
            elif control["control"] == "gap":
                story.append(tuple(control[key] for key in ("epoch", "first", "last", "cause")))
        return story


class Link:
    """A subscription that only remembers what it holds; what comes over it is `House.hear`.

    Attributes:
        meanwhile: Awaited in the middle of each proof.
    """

    def __init__(self) -> None:
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        self.channels: dict[str, None] = {}
        self.refused: set[str] = set()
        self.released: list[str] = []
        self.confirmed: set[str] = set()
        self.reconnects = 0

    def subscribe(self, channel: str) -> None:
        self.channels[channel] = None

    async def verify(self) -> None:
        if self.meanwhile is not None:
            await self.meanwhile()

    def unsubscribe(self, channel: str) -> None:
        del self.channels[channel]
        self.released.append(channel)


class Tasks:
    """Tasks as the task group of a hub has them, but that a test sees which has failed."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spawn(self, work: Work, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not self.failed.done():
            self.failed.set_exception(task.exception() or RuntimeError(f"the task {task.get_name()!r} has ended"))

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class House:
    """A hub: its channels, its connections, its pages, and peers. Redis is a `Memory`.

    Attributes:
        socket: What the next peers connect with.
    """

    def __init__(
        self,
        ring_bytes: int = 16 << 20,
        *,
        history: bool | HistoryTable = True,
        channels: ChannelsTable | None = None,
        timed: bool = False,
        **hub: Any,
    ) -> None:
        self.settings = Settings(
            event=EventTable(max_bytes=min(ring_bytes // 4, 131_072)),
            history=HistoryTable(enabled=history) if isinstance(history, bool) else history,
            channels=channels or ChannelsTable(),
            hub=HubTable(ring_bytes=ring_bytes, **hub),
        )
        self.socket: type[Socket] = Socket
        self.clock = Clock()
        runtime = Runtime(self.clock)
        self.redis = Memory(timed=timed)
        self.tasks = Tasks()
        self.link = Link()
        broker = self.redis.broker(self.settings, self.link)
        self.pages = PageCache(EventLog(broker, self.settings.event.max_bytes, AT_ONCE), runtime)
        self.scheduler = Scheduler()
        self.registry = ConnectionRegistry[Connection](
            ticks(self.settings.hub.ping_interval_s), self.settings.hub.drain_s
        )
        self.channels = Channels(
            self.settings,
            broker,
            self.pages,
            self.scheduler,
            self.tasks.spawn,
            self.registry.unsettled,
            runtime,
        )
        self.probe = DeliveryProbe(self.settings, broker, self.channels, runtime)
        self.link.unsubscribe(self.probe.channel)  # tests look at what clients have asked for
        self.link.released.clear()
        self.admission = AdmissionControl(
            self.settings, self.channels, Access(self.settings.auth), self.registry, runtime
        )
        self.context = ConnectionContext(
            self.registry,
            self.scheduler,
            self.settings.hub,
            lambda: self.probe.proven,
            self.admission.log,
            runtime,
        )
        self.timer = Timer(self.settings.hub, self.context, self.channels, self.admission)
        self.dispatcher = Dispatcher(self.channels, self.probe, self.settings.event.max_bytes, runtime)
        self.tasks.spawn(self.pages.run, "pages")
        self.tasks.spawn(self.pages.times.run, "times")
        # A loop knows its tasks but weakly: a house that a test has left would be collected with its tasks in it.
        asyncio.get_running_loop().call_later(3600, lambda: self)
        self.count = 0

    @classmethod
    async def opened(cls, ring_bytes: int = 16 << 20, stored: int = 0, **arguments: Any) -> House:
        """A hub that is ready; so many events had been stored before it came."""
        house = cls(ring_bytes, **arguments)
        for _ in range(stored):
            house.store(1)
        house.channels.on_confirmed(CHANNEL)
        await house.settle()
        assert house.channel().sequencer.caught_up
        return house

    def channel(self, name: str = CHANNEL) -> Channel:
        return self.channels.open[name]

    @property
    def fanout(self) -> Fanout:
        return self.channel().fanout

    @property
    def sequencer(self) -> Sequencer:
        sequencer = self.channel().sequencer
        assert isinstance(sequencer, Sequencer)
        return sequencer

    def connect(
        self,
        query: str = "",
        *,
        v1: bool = False,
        deflate: bool = False,
        reads_along: bool = True,
        address: str = "192.0.2.1",
    ) -> Peer:
        """Somebody who has asked for `/ws?query`."""
        socket = self.socket()
        socket.reads_along = reads_along
        admitted = self.admission.admit(wire.Target.parse(f"/ws?{query}"), address)
        assert isinstance(admitted, Admitted), admitted
        connection = Connection(
            socket,
            self.context,
            wants_control=v1,
            address=admitted.address,
            grant=admitted.grant,
            form=self.context.formats.deflate if deflate else PLAIN,
        )
        socket.protocol = connection
        names, begins = zip(*admitted.request.channels, strict=True)
        channels = self.channels.get(*names, address=admitted.address)
        connection.open(zip(channels, begins, strict=True), admitted.request.filter)
        return Peer(connection, socket)

    def stream(self, query: str = "", *, reads_along: bool = True, address: str = "192.0.2.1") -> Peer:
        """Somebody who has asked for `/sse?query`."""
        target = replace(wire.Target.parse(f"/sse?{query}"), host="127.0.0.1")
        socket = self.socket()
        socket.reads_along = reads_along
        admitted = self.admission.admit(target, address, is_stream=True)
        assert isinstance(admitted, Admitted), admitted
        connection = socket.protocol = EventStream(socket, self.context, admitted)
        [(name, since)] = admitted.request.channels
        [channel] = self.channels.get(name, address=admitted.address)
        connection.open([(channel, since)], admitted.request.filter)
        return Peer(connection, socket)

    def be_proven(self) -> None:
        """As after a round of the delivery probe that has found nothing wrong."""
        self.probe.proven, self.probe._problem = True, ""
        for channel in self.channels.open.values():
            channel.trouble = ""

    # Events

    def store(self, count: int, size: int = 252, channel: str = CHANNEL, **labels: Any) -> list[bytes]:
        """Events that are in the log, and have not come over the subscription."""
        stored = []
        for _ in range(count):
            self.count += 1
            if labels or channel != CHANNEL:
                stored.append(self.redis.store(payload(self.count, **labels), channel))
            else:
                position = self.redis.next(channel)
                stored.append(self.redis.store(sized(self.count, size, channel, position), channel))
        return stored

    async def prove(self) -> None:
        """Begin with the proofs, and wait until one has succeeded."""
        self.redis.on_publish = lambda probe: self.probe.take([probe])
        self.tasks.spawn(self.probe.run, "proofs")
        await until(lambda: self.probe.healthy, self.probe.problem)

    def hear(self, payloads: Iterable[bytes], channel: str = CHANNEL) -> None:
        """What one read of the subscription brings."""
        self.dispatcher.on_messages({channel.encode(): list(payloads)})
        self.registry.settle()  # as at the end of a turn of the loop

    def publish(self, count: int, size: int = 252, channel: str = CHANNEL, **labels: Any) -> list[bytes]:
        """Events that are stored, and come over the subscription in one read."""
        stored = self.store(count, size, channel, **labels)
        self.hear(stored, channel)
        return stored

    def unstored(self, count: int, **labels: Any) -> list[bytes]:
        """Events without a position, as somebody else's PUBLISH brings them."""
        first, self.count = self.count + 1, self.count + count
        payloads = [payload(number, 200, **labels) for number in range(first, self.count + 1)]
        self.hear(payloads)
        return payloads

    async def settle(self) -> None:
        """Let everything happen that can happen by itself."""
        await turns()
        assert not self.tasks.failed.done(), self.tasks.failed

    async def until_live(self, *peers: Peer, within: int = 20_000) -> None:
        """Let the loop turn until nobody of these is behind, or waits."""
        for _ in range(within):
            if not any(peer.connection in self.registry.behind for peer in peers):
                return
            await asyncio.sleep(0)
        raise AssertionError("somebody is behind for ever")


def messages(payloads: Iterable[bytes]) -> list[Message]:
    return [read_message(data, 1 << 20) for data in payloads]


async def turns(count: int = 200) -> None:
    """Let the loop turn, so that whoever is behind is fed."""
    for _ in range(count):
        await asyncio.sleep(0)


def store_by_script(client: RedisClient, event: bytes, channel: str = CHANNEL) -> tuple[str, int]:
    """Store and publish an event as the product does: its position, and how many subscriptions heard it."""
    event_id = json.loads(event)["event_id"]

    async def store() -> list[stream.Stored]:
        commands = CommandLink(
            RedisTable(url=f"redis://127.0.0.1:{client._socket.getpeername()[1]}/0"), stream.LOAD
        )
        try:
            [reply] = await commands.execute(stream.store(channel, [(event_id, event)], HistoryTable()))
        finally:
            commands.close()
        return stream.read_stored(reply)

    [stored] = asyncio.run(store())
    return str(stored.position), stored.receivers or 0

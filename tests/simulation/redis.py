"""A Redis that speaks RESP2 over the simulated network. It knows of the product nothing but the names of its keys,
and these only to write the journal."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import hiredis

from tests.simulation.journal import Journal, Loss
from tests.simulation.loop import EPOCH_S, VirtualLoop
from tests.simulation.lua import Scripts
from tests.simulation.memory import COMMANDS, OK, Entry, Failure, Memory, Status, run
from tests.simulation.network import Network
from tests.simulation.process import Process

HOST: Final = "10.9.0.1"
PORT: Final = 6379
REPLICA_PORT: Final = 6380
_MORE: Final = object()
_OOM: Final = Failure("OOM command not allowed when used memory > 'maxmemory'.")


def encode(reply: Any) -> bytes:
    """A reply in RESP2."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, Failure):
        return b"-" + " ".join(reply.split()).encode() + b"\r\n"
    if isinstance(reply, Status):
        return b"+" + reply.encode() + b"\r\n"
    return b"*%d\r\n" % len(reply) + b"".join(map(encode, reply))


class RedisProcess:
    """One process: a memory, its clients, a run_id.

    Attributes:
        run_id: Of the process.
        memory: Its keys.
        process: Where it runs; its wall clock is that of TIME and of all expiry.
        out_of_memory: The share of the commands that may grow memory which are refused.
        denied: Names of commands, and of channels to publish or subscribe to, that are refused.
        output_limit: Bytes that may wait for a client that subscribes; then it is cut.
        on_cut: Called with the name of the process to which that has happened.
        followers: Replicas, which are told each command that has changed something, and each publish.
        master: Whether it takes writes.
        replid: Of its history; a replica has that of its master.
        linked: As a replica: whether it says that it has a master.
        upstream: As a replica: its master.
        replica_port: Where it listens since it was a replica; 0: nowhere.
    """

    def __init__(
        self, process: Process, network: Network, memory: Memory, scripts: Scripts, journal: Journal, run_id: str
    ) -> None:
        self.process = process
        self.run_id = run_id
        self.memory = memory
        self.journal = journal
        self.out_of_memory = 0.0
        self._chance = random.Random(run_id)
        self.denied: set[bytes] = set()
        self.output_limit = 2**20
        self.counts: Counter[str] = Counter()
        self.on_cut: Callable[[str], object] = lambda peer: None
        self.subscribers: dict[bytes, dict[_Client, None]] = {}
        self.master = True
        self.replid = run_id[::-1]
        self.linked = False
        self.replica_port = 0
        self.upstream: RedisProcess | None = None
        self.followers: list[Replica] = []
        self._in_script: list[list[bytes]] | None = None
        self._scripts = scripts
        self._loop: VirtualLoop = network.loop
        self._loaded: set[str] = set()
        self._evicts = self._withdraws = False
        self._network = network
        self._watch(memory)

    def _watch(self, memory: Memory) -> None:
        memory.on_removed, memory.on_entries_removed = self._on_removed, self._on_entries_removed

    def _on_entries_removed(self, entries: list[Entry]) -> None:
        self.journal.on_removed(entries, self._loop.now, withdrawn=self._withdraws)

    def listen(self, host: str = HOST, port: int = PORT) -> None:
        """Take connections from now on."""
        self.process.context.run(self._network.listen, lambda: _Client(self), host, port).serving = True

    def set_back(self, memory: Memory) -> None:
        """Have another memory, as the same process."""
        self._watch(memory)
        self.memory = memory

    def evict(self, key: bytes) -> None:
        """Lose a key for want of memory."""
        self._evicts = True
        self.memory.remove(key)
        self._evicts = False
        self._pass_on([b"DEL", key])

    def _on_removed(self, key: bytes, value: Any) -> None:
        self.journal.on_key_removed(key, value, self._loop.now)
        if key.endswith(b":meta"):
            self.journal.losses.append(Loss(self._loop.now, heads_of(self.memory), not self._evicts))

    def execute(self, words: Sequence[bytes], *, in_script: bool = False, oom: bool | None = None) -> Any:
        """The reply to a command on keys, or one of a few others."""
        name = words[0].upper()
        if not in_script:
            self.counts[name.decode("latin-1")] += 1
        if name in self.denied:
            return _denied(name, in_script=in_script)
        if name in (b"EVAL", b"EVALSHA") and not in_script:
            return self._evaluate(name, words[1:])
        if name == b"PUBLISH":
            return self._publish(words[1], words[2], in_script=in_script)
        if name == b"INFO":
            return self._info()
        command = COMMANDS.get(name)
        if command is None:
            return Failure(f"ERR unknown command '{name.decode('latin-1')}', with args beginning with: ")
        if command.writes and not self.master:
            return Failure("READONLY You can't write against a read only replica.")
        if command.grows and (self._is_short() if oom is None else oom):
            return _OOM
        self.memory.now_ms = self._now_ms()
        self.memory.on_hidden = None if self.master else self._on_hidden
        if not command.writes:
            return run(self.memory, command, name, words[1:])
        return self._write(name, words)

    def _is_short(self) -> bool:
        """Whether there is no memory for the command that comes now."""
        return self.out_of_memory > 0 and self._chance.random() < self.out_of_memory

    def _info(self) -> bytes:
        lines = ["# Server", "redis_version:7.0.15", f"run_id:{self.run_id}"]
        lines += [f"role:{'master' if self.master else 'slave'}", f"master_replid:{self.replid}"]
        if not self.master:
            lines += [f"master_host:{HOST}", f"master_link_status:{'up' if self.linked else 'down'}"]
        return "\r\n".join([*lines, ""]).encode()

    def _on_hidden(self, key: bytes) -> None:
        """As a replica: it has expired, which the journal is told by the master."""
        if self.upstream is not None:
            self.upstream.expire(key)

    def expire(self, key: bytes) -> None:
        """Lose a key if its time has come."""
        self.memory.now_ms = self._now_ms()
        self.memory.get(key)

    def _now_ms(self) -> int:
        return int((EPOCH_S + self._loop.now + self.process.wall_offset_s) * 1000)

    def _write(self, name: bytes, words: Sequence[bytes]) -> Any:
        """Run a command that changes something, and tell the journal."""
        key = words[1]
        is_log, is_meta = key.endswith(b":log"), key.endswith(b":meta")
        self._withdraws = name == b"XDEL"
        epoch_before = head_of(self.memory, _channel_of(key))[0] if is_meta else ""
        reply = run(self.memory, COMMANDS[name], name, words[1:])
        if not isinstance(reply, Failure):
            self._pass_on(list(words))
        if is_log and not isinstance(reply, Failure) and name == b"XADD":
            self.journal.on_stored(words[-1], self.run_id, self._loop.now)
        elif is_meta and name == b"HSET" and not isinstance(reply, Failure):
            pairs = dict(zip(words[2::2], words[3::2], strict=True))
            if b"epoch" in pairs and pairs.get(b"offset", b"").isdigit():
                epoch, offset = pairs[b"epoch"].decode(), int(pairs[b"offset"])
                self.journal.on_epoch(_channel_of(key), epoch, offset, self._loop.now, epoch_before)
        return reply

    def _evaluate(self, name: bytes, words: Sequence[bytes]) -> Any:
        if name == b"EVALSHA":
            sha = words[0].decode().lower()
            if sha not in self._loaded:
                return Failure("NOSCRIPT No matching script. Please use EVAL.")
        else:
            sha = self.load(words[0])
        count = int(words[1])
        oom = self._is_short()
        dirty = False

        def call(words: list[bytes]) -> Any:
            nonlocal dirty
            reply = self.execute(words, in_script=True, oom=oom and not dirty)
            command = COMMANDS.get(words[0].upper())
            dirty |= command is not None and command.writes and not isinstance(reply, Failure)
            return reply

        self._in_script = []
        reply = self._scripts.run(sha, words[2 : 2 + count], words[2 + count :], call)
        effects, self._in_script = self._in_script, None
        self._pass_on(*effects)
        return reply

    def load(self, text: bytes) -> str:
        """SCRIPT LOAD."""
        sha = self._scripts.load(text)
        self._loaded.add(sha)
        return sha

    def _publish(self, channel: bytes, payload: bytes, *, in_script: bool) -> Any:
        if channel in self.denied:
            return _denied(b"PUBLISH", in_script=in_script, channel=True)
        self._pass_on([b"PUBLISH", channel, payload])
        if not in_script:
            self.journal.on_published(channel.decode(), payload, self.run_id, self._loop.now)
        return self.announce(channel, payload)

    def _pass_on(self, *effects: list[bytes]) -> None:
        """What was done goes to the replicas; what a script does, in one piece, as in MULTI and EXEC."""
        if self._in_script is not None:
            self._in_script.extend(effects)
        elif effects:
            for replica in self.followers:
                replica.on_effects(effects, self.memory.now_ms)

    def replicate(self, effects: Sequence[list[bytes]], at_ms: int) -> None:
        """As a replica: do what the master has done at a time; keys expire by its clock."""
        for words in effects:
            self._replicate(words, at_ms)

    def _replicate(self, words: list[bytes], at_ms: int) -> None:
        name = words[0].upper()
        if name == b"PUBLISH":
            self.announce(words[1], words[2])
        else:
            self.memory.now_ms, self.memory.on_hidden = at_ms, None
            run(self.memory, COMMANDS[name], name, words[1:])

    def announce(self, channel: bytes, payload: bytes) -> int:
        """Send a message to who has subscribed; how many these are."""
        listeners = list(self.subscribers.get(channel, ()))
        message = encode([b"message", channel, payload])
        for client in listeners:
            client.send(message)
        return len(listeners)


def head_of(memory: Memory, channel: str) -> tuple[str, int]:
    """Where a channel stands in a memory: epoch and offset; no epoch: nothing is known of it."""
    meta = memory.values.get(b"{%b}:meta" % channel.encode())
    if not isinstance(meta, dict) or b"epoch" not in meta or not meta.get(b"offset", b"").isdigit():
        return "", 0
    return meta[b"epoch"].decode("utf-8", "replace"), int(meta[b"offset"])


def heads_of(memory: Memory) -> dict[str, tuple[str, int]]:
    """The same of all channels."""
    channels = [_channel_of(key) for key in memory.values if key.endswith(b":meta")]
    return {channel: head_of(memory, channel) for channel in channels}


def _channel_of(key: bytes) -> str:
    return key[key.find(b"{") + 1 : key.find(b"}")].decode("utf-8", "replace")


def _denied(name: bytes, *, in_script: bool, channel: bool = False) -> Failure:
    if in_script:
        what = "publish to the channel mentioned in the command" if channel else "run this command or subcommand"
        return Failure(f"ERR The user executing the script can't {what}")
    if channel:
        return Failure("NOPERM this user has no permissions to access one of the channels used as arguments")
    return Failure(f"NOPERM this user has no permissions to run the '{name.decode().lower()}' command")


class _Client(asyncio.Protocol):
    """A connection to a RedisProcess."""

    def __init__(self, server: RedisProcess) -> None:
        self._server = server
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: Any = None
        self._channels: dict[bytes, None] = {}
        self._output: list[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        for channel in self._channels:
            self._server.subscribers.get(channel, {}).pop(self, None)
        self._channels.clear()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._output = []
        while (words := self._reader.gets()) is not _MORE:
            for reply in self._answer([bytes(word) for word in words]):
                self._output.append(encode(reply))
        output, self._output = self._output, None
        self._write(b"".join(output))

    def send(self, message: bytes) -> None:
        """A message of a channel."""
        if self._output is not None:
            self._output.append(message)
        else:
            self._write(message)

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._channels and self._transport.get_write_buffer_size() > self._server.output_limit:
            self._server.counts["output limit"] += 1
            self._server.on_cut(self._transport.peer_name)
            self._transport.abort()

    def _answer(self, words: list[bytes]) -> Iterable[Any]:
        name = words[0].upper()
        server = self._server
        if name in (b"SUBSCRIBE", b"UNSUBSCRIBE"):
            return self._subscribe(name, words[1:])
        if name == b"PING":
            return [[b"pong", b""]] if self._channels else [Status("PONG")]
        if name == b"SCRIPT" and words[1].upper() == b"LOAD":
            if b"SCRIPT" in server.denied:
                return [_denied(b"SCRIPT|LOAD", in_script=False)]
            try:
                return [server.load(words[2]).encode()]
            except ValueError as error:
                return [Failure(f"ERR Error compiling script (new function): {error}")]
        if name in (b"AUTH", b"SELECT", b"CLIENT"):
            return [OK]
        if name == b"HELLO":
            return [[b"server", b"redis", b"version", b"7.0.15", b"proto", 2, b"role", b"master"]]
        if name == b"PUBSUB" and words[1].upper() == b"NUMSUB":
            return [[each for word in words[2:] for each in (word, len(server.subscribers.get(word, ())))]]
        if name == b"PUBSUB" and words[1].upper() == b"CHANNELS":
            heard = (channel for channel, listeners in server.subscribers.items() if listeners)
            return [[channel for channel in heard if channel.startswith(words[2].rstrip(b"*"))]]
        return [server.execute(words)]

    def _subscribe(self, name: bytes, channels: list[bytes]) -> Iterable[Any]:
        server, adds = self._server, name == b"SUBSCRIBE"
        for channel in channels or list(self._channels):
            if name in server.denied or (adds and channel in server.denied):
                yield _denied(name, in_script=False, channel=channel in server.denied)
                continue
            if adds:
                self._channels[channel] = None
                server.subscribers.setdefault(channel, {})[self] = None
            else:
                self._channels.pop(channel, None)
                server.subscribers.get(channel, {}).pop(self, None)
            yield [name.lower(), channel, len(self._channels)]


class Replica:
    """A replica, to which hubs subscribe: what its master does comes to it late, and in order. It may be promoted.

    Attributes:
        server: Its process.
        port: Where it listens.
        longest_lag_s: Seconds by which it is late at most.
        stalled: Whether nothing comes any more, whatever it says.
    """

    def __init__(
        self, server: RedisProcess, port: int, loop: VirtualLoop, chance: random.Random, longest_lag_s: float
    ) -> None:
        self.server = server
        self.port = port
        self.longest_lag_s = longest_lag_s
        self.stalled = False
        server.master = False
        self._loop = loop
        self._chance = chance
        self._due: deque[tuple[Sequence[list[bytes]], int]] = deque()
        self._follows = 0
        self._free_at = 0.0

    @property
    def is_fed(self) -> bool:
        """Whether what its master does comes to it."""
        return self.server.upstream is not None and not self.stalled

    def follow(self, master: RedisProcess) -> None:
        """Be the replica of another process, with its memory: what had not been passed on by now is lost."""
        self.leave()
        self.server.set_back(master.memory.copy())
        self.server.master, self.server.replid, self.server.linked = False, master.replid, True
        self.server.upstream = master
        master.followers.append(self)

    def leave(self) -> None:
        """Follow nobody."""
        self._due.clear()
        self._follows += 1
        self.stalled = self.server.linked = False
        if self.server.upstream is not None:
            self.server.upstream.followers.remove(self)
            self.server.upstream = None

    def on_effects(self, effects: Sequence[list[bytes]], at_ms: int) -> None:
        """The master has done something."""
        if self.stalled:
            return
        self._due.append((effects, at_ms))
        lag_s = self._chance.uniform(0, self.longest_lag_s)
        self._free_at = max(self._free_at, self._loop.now + lag_s)
        self._loop.call_at(self._free_at, self._pass_on, self._follows, context=self.server.process.context)

    def _pass_on(self, follows: int) -> None:
        if follows == self._follows and self._due:
            self.server.replicate(*self._due.popleft())


class Redis:
    """What stands at the address of Redis: one process after the other, with snapshots of their memory.

    Attributes:
        server: The process at the address; None: there is none.
        older: Processes that were replaced, and still serve their connections.
        snapshots: Earlier memories with their loop time.
        on_cut: See `RedisProcess`.
        replicas: Of the process at the address.
        replica_ports: Where there is to be one.
        replica_lag_s: Seconds by which they are late at most.
        clock_s: By how much the wall clock of its host is wrong, in seconds.
    """

    def __init__(
        self, network: Network, scripts: Scripts, journal: Journal, chance: random.Random, node_entries: int
    ) -> None:
        self.server: RedisProcess | None = None
        self.older: list[RedisProcess] = []
        self.snapshots: list[tuple[float, Memory]] = []
        self.clock_s = 0.0
        self.output_limit = 2**20
        self.counts: Counter[str] = Counter()
        self.on_cut: Callable[[str], object] = lambda peer: None
        self._network = network
        self._scripts = scripts
        self._journal = journal
        self._chance = chance
        self._node_entries = node_entries
        self.replicas: list[Replica] = []
        self.replica_ports: tuple[int, ...] = ()
        self.replica_lag_s = 0.0

    def start(self, memory: Memory | None = None) -> RedisProcess:
        """Start a process with a memory (a copy is made), or none."""
        memory = Memory() if memory is None else memory.copy()
        memory.node_entries = self._node_entries
        process = Process("redis", self._network.loop)
        process.wall_offset_s = self.clock_s
        run_id = self._chance.randbytes(20).hex()
        self.server = RedisProcess(process, self._network, memory, self._scripts, self._journal, run_id)
        self.server.output_limit = self.output_limit
        self.server.counts, self.server.on_cut = self.counts, self.on_cut
        self.server.listen()
        self.follow()
        for port in self.replica_ports:
            self.start_replica(port)
        return self.server

    def follow(self) -> None:
        """All replicas follow the process at the address."""
        if self.replicas:
            self._journal.resyncs.append(self._network.loop.now)
        for replica in self.replicas:
            if self.server is not None:
                replica.follow(self.server)

    def promote(self, replica: Replica) -> None:
        """A replica takes the address: it knows what had come to it by now. The others follow it."""
        self.replicas.remove(replica)
        replica.leave()
        self.server = replica.server
        self.server.master, self.server.journal = True, self._journal
        self.server.replid = self._chance.randbytes(20).hex()
        self.server.memory.on_hidden = None
        self.server.listen()
        self.follow()

    def depose(self) -> None:
        """The process at the address goes on to serve its connections, and no others (split brain)."""
        assert self.server is not None
        old, self.server = self.server, None
        self._leave_all()
        self.older.append(old)
        self._network.unlisten_all(old.process)

    def _leave_all(self) -> None:
        for replica in self.replicas:
            replica.leave()

    def set_back(self, memory: Memory) -> None:
        """The process at the address has another memory, and its replicas get that: another history."""
        assert self.server is not None
        self.server.set_back(memory)
        self.server.replid = self._chance.randbytes(20).hex()
        self.follow()

    def start_replica(self, port: int) -> None:
        """Have a replica at a port, to which others subscribe, if nobody is there."""
        if port in [replica.port for replica in self.replicas] or (
            self.server and self.server.replica_port == port
        ):
            return
        process = Process("redis", self._network.loop)
        process.wall_offset_s = self.clock_s
        run_id = self._chance.randbytes(20).hex()
        server = RedisProcess(process, self._network, Memory(), self._scripts, Journal(), run_id)
        server.output_limit, server.counts, server.on_cut = self.output_limit, self.counts, self.on_cut
        server.listen(HOST, port)
        server.replica_port = port
        replica = Replica(server, port, self._network.loop, self._chance, self.replica_lag_s)
        self.replicas.append(replica)
        if self.server is not None:
            replica.follow(self.server)

    def snapshot(self) -> None:
        """Remember how memory is now."""
        if self.server is not None:
            self.snapshots.append((self._network.loop.now, self.server.memory.copy()))

    def kill(self) -> Memory:
        """Kill the process; its last memory."""
        assert self.server is not None
        server, self.server = self.server, None
        server.process.kill()
        self._leave_all()
        return server.memory

    def end_older(self) -> None:
        """The replaced processes are gone."""
        for server in self.older:
            server.process.kill()
        self.older.clear()

    def step_clock(self, seconds: float) -> None:
        """The wall clock of the host is wrong by so much from now on."""
        self.clock_s = seconds
        replicas = [replica.server for replica in self.replicas]
        for server in [self.server, *self.older, *replicas]:
            if server is not None:
                server.process.wall_offset_s = seconds

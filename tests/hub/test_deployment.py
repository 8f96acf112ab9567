"""Many hubs, one answer: what hubs announce of themselves, and what whichever is asked says of all."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broadcaster.cli.status import screen
from broadcaster.hub.deployment.announcement import Announced, Announcement, decode, problems_of, summed_up
from broadcaster.redis.server import RedisServer
from tests.hub.test_many_hubs import Port, opened, until_ready
from tests.support import (
    UNIT_S,
    CommandLine,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    eventually,
    frozen,
)

KEY = "broadcaster.hub.{%s}"

OURS = Announcement(
    name="a:1#1",
    machine="a",
    port=1,
    number=1,
    processes=2,
    address="http://a:1001",
    version="1.0",
    serial=3,
    uptime_s=5.0,
    ready=True,
    stopping=False,
    trouble="",
    facts={"event.channel": "aaaa", "channels.allow": "bbbb"},
    counters={"connected": 2, "refused": {"full": 1}},
)
OTHER = replace(OURS, name="a:1#2", number=2, address="http://a:1002")


def with_others(*others: Announcement, **fields: Any) -> Announced:
    return Announced({hub.name: hub for hub in (OURS, *others)}, **fields)


PROBLEMS = {
    "all well": (with_others(OTHER), []),
    "another machine": (with_others(OTHER, replace(OTHER, name="b:1#1", machine="b", processes=1)), []),
    "missing by count": (with_others(), ["a:1#2 is missing"]),
    "missing by silence": (with_others(OTHER, missing=["b:1#1"]), ["b:1#1 is missing"]),
    "red": (
        with_others(replace(OTHER, ready=False, trouble="no Redis")),
        ["a:1#2 is not ready: no Redis"],
    ),
    "draining": (with_others(replace(OTHER, ready=False, stopping=True)), ["a:1#2 is draining"]),
    "another version": (with_others(replace(OTHER, version="0.9")), ["a:1#2 has version 0.9, a:1#1 has 1.0"]),
    "other settings": (
        with_others(replace(OTHER, facts={"event.channel": "cccc", "channels.allow": "dddd", "new": "e"})),
        ["a:1#2 has another event.channel, channels.allow than a:1#1"],
    ),
    "another count": (
        with_others(replace(OTHER, processes=1)),
        ["a:1#2 has hub.processes = 1, a:1#1 has 2"],
    ),
    "corrupt": (
        with_others(OTHER, corrupt={"x\x1b": "it is no text"}),
        ["the announcement of x? is ignored: it is no text"],
    ),
    "corrupt, and not missing as well": (
        with_others(corrupt={"a:1#2": "it is no JSON"}),
        ["the announcement of a:1#2 is ignored: it is no JSON"],
    ),
    "Redis is silent": (
        Announced(trouble="Redis does not answer"),
        ["other hubs are not known: Redis does not answer"],
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_in_a_deployment_is_named(name: str) -> None:
    """Each problem by the hub that has it; one is enough for yellow."""
    announced, expected = PROBLEMS[name]
    assert problems_of(OURS, announced) == expected
    total = summed_up("d", {"connected": 2, "refused": {"full": 1}, "name": "a:1#1"}, OURS, announced)
    assert total["deployment"]["status"] == ("yellow" if expected else "green")
    assert screen(total | dict.fromkeys(("behind", "events_received", "deliveries"), 0)).count("\n! ") == len(
        expected
    )


def test_counters_are_summed_up() -> None:
    """Numbers and causes; what another version sends instead is left out; what is of one hub is its own."""
    odd = replace(OTHER, counters={"connected": "3", "refused": {"full": 2, "new": 1, "odd": None}, "unknown": 7})
    statistics = {"name": "a:1#1", "connected": 2, "refused": {"full": 1}, "uptime_s": 1.5}
    total = summed_up("d", statistics, OURS, with_others(odd))
    total.pop("deployment")
    assert total == {"name": "a:1#1", "connected": 2, "refused": {"full": 3, "new": 1, "odd": 0}, "uptime_s": 1.5}


def test_red_is_when_no_hub_is_ready() -> None:
    down = replace(OURS, ready=False, trouble="no Redis")
    announced = Announced({OTHER.name: replace(OTHER, ready=False)})
    assert summed_up("d", {}, down, announced)["deployment"]["status"] == "red"
    announced = Announced({OTHER.name: OTHER})
    assert summed_up("d", {}, down, announced)["deployment"]["status"] == "yellow"


GOOD = json.loads(OURS.encode())
CORRUPT = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe\xfd",
    "a list": b"[]",
    "deep": b"[" * 30_000,
    "large": b" " * 70_000,
    "nothing in it": b"{}",
    "another's": json.dumps(GOOD | {"name": "b:1#1"}).encode(),
    "no count": json.dumps(GOOD | {"processes": -1}).encode(),
    "not finite": json.dumps(GOOD | {"uptime_s": float("nan")}).encode(),
    "a number as a truth": json.dumps(GOOD | {"ready": 1}).encode(),
    "endless digits": b'{"serial": ' + b"9" * 5000 + b"}",
    "a long text": json.dumps(GOOD | {"trouble": "x" * 1000}).encode(),
    "counters that are none": json.dumps(GOOD | {"counters": [1]}).encode(),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_announcement_is_refused(name: str) -> None:
    """Whatever has been written into its key."""
    with pytest.raises((ValueError, RecursionError)):
        decode("a:1#1", CORRUPT[name])
    announced = Announced.read({"a:1#1": (CORRUPT[name], 0.1), "a:1#2": (OTHER.encode(), 0.1)})
    assert list(announced.corrupt) == ["a:1#1"]
    assert list(announced.hubs) == ["a:1#2"]


def test_an_announcement_holds_for_five_seconds() -> None:
    """What is older is of a hub that is missing."""
    assert decode(OURS.name, OURS.encode()) == OURS
    found = {"a:1#1": (OURS.encode(), 4.9), "a:1#2": (OTHER.encode(), 5.1), "c": (None, 1.0)}
    announced = Announced.read(found, {3, 1})
    assert announced == Announced({"a:1#1": OURS}, ["a:1#2"], {"c": "it is no text"}, databases=[1, 3])


# Real hubs


class Deployment:
    """Two hubs on one port, and what either says of both."""

    def __init__(self, port: Port, first: HubThread, second: HubThread) -> None:
        self.port, self.hubs = port, [first, second]
        self.first, self.second = port.alone(1), port.alone(2)
        self.key = KEY % f"test-{port.port}"

    def says(self, number: int = 1) -> dict[str, Any]:
        return self.port.alone(number).get("/stats")[1]

    def is_green(self, number: int) -> bool:
        return bool(self.says(number)["deployment"]["status"] == "green")

    def counts(self, number: int, key: str, count: int) -> bool:
        return bool(self.says(number)[key] == count)

    def until(self, status: str, *words: str, within: float = 20.0) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            said: dict[str, Any] = self.says()["deployment"]
            fits = said["status"] == status and all(word in str(said["problems"]) for word in words)
            return said if fits else {}

        return eventually(look, f"never {status} {words}: {self.says()['deployment']}", within)


@pytest.fixture
def deployment(redis: RedisServer) -> Iterator[Deployment]:
    port = Port(redis.url, 2)
    with port.thread(1) as first, port.thread(2) as second:
        until_ready(port.alone(1), port.alone(2))
        found = Deployment(port, first, second)
        for number in (1, 2):  # each knows the other by what that has announced last
            eventually(partial(found.is_green, number), f"{number} is not green")
        yield found


def test_whichever_hub_is_asked_answers_for_all(deployment: Deployment, publish: RedisClient) -> None:
    """Both say the same sums, each its own with ?scope=self; nothing else is a scope."""
    with opened(deployment.port.port, 40):
        publish.publish(event_payload(1))
        for number in (1, 2):
            eventually(partial(deployment.counts, number, "deliveries", 40), f"{deployment.says(number)}")
            assert deployment.says(number)["connected"] == 40
        alone = [hub.stats()["connected"] for hub in (deployment.first, deployment.second)]
        assert sum(alone) == 40
        assert all(alone)
    shown = deployment.says()["deployment"]
    assert [hub["address"] for hub in shown["hubs"]] == [
        f"http://127.0.0.1:{deployment.port.own}",
        f"http://127.0.0.1:{deployment.port.own + 1}",
    ]
    assert "deployment" not in deployment.first.stats()
    assert deployment.first.get("/stats?scope=other") == (400, {"error": "scope is all or self"})


def test_a_hub_that_goes_is_draining_and_then_missing_by_count(deployment: Deployment) -> None:
    """It is named while it drains, and when it is gone, as its port expects two."""
    with RawClient(deployment.second.port), RawClient(deployment.second.port):
        deployment.hubs[1].signal(signal.SIGTERM)
        assert deployment.hubs[1].wait() == 0
    said = deployment.until("yellow", "#2 is missing")
    assert len(said["hubs"]) == 1
    assert said["ready"] == 1
    with deployment.port.thread(2):
        deployment.until("green")


def test_a_killed_hub_is_missing_within_seconds(redis: RedisServer) -> None:
    """No hub says good-bye for it: 5 s after its last announcement its subscribers are not counted any more."""
    port = Port(redis.url, 2)
    with port.thread(1) as first, port.process(2) as second:
        until_ready(port.alone(1), port.alone(2))
        found = Deployment(port, first, first)
        found.until("green")
        with RawClient(port.own + 1):
            eventually(lambda: found.says()["connected"] == 1, "not counted")
            second.signal(signal.SIGKILL)
            second.wait()
            killed = time.monotonic()
            found.until("yellow", "#2 is missing", within=7 / UNIT_S + 3)
            assert time.monotonic() - killed < 7 + UNIT_S
            assert found.says()["connected"] == 0
        assert_calm(first)


def test_a_red_hub_turns_the_sum_yellow(redis: RedisServer, publish: RedisClient) -> None:
    """A hub with another channel, which is refused to it: named with its difference; the other serves on."""
    port = Port(redis.url, 2)
    with port.thread(1) as first:
        until_ready(port.alone(1))
        found = Deployment(port, first, first)
        publish.command("SET", "{events.second}:meta", "no hash")
        other = {"BROADCASTER_EVENT__CHANNEL": "events.second", "BROADCASTER_HUB__DEPLOYMENT": f"test-{port.port}"}
        elsewhere = Port(redis.url, 1)
        with elsewhere.thread(1, **other):
            name = f"{elsewhere.port}#1"
            said = found.until("yellow", f"{name} is not ready: ", f"{name} has another event.channel than ")
            assert said["ready"] == 1
            assert port.alone(1).get("/health/ready")[0] == 200


def test_strange_announcements_harm_no_hub(deployment: Deployment, publish: RedisClient) -> None:
    """Garbage, a key of another kind, another version: named, ignored, and mended where it is a hub's own."""
    key = deployment.key
    names = [name.decode() for name in publish.command("SMEMBERS", key)]
    for member, value in (("old", OTHER.encode()), ("evil\x1b[2J", b"\x00garbage")):
        publish.command("SADD", key, member)
        publish.command("SET", f"{key}.{member}", value, "EX", "60")
    publish.command("SADD", key, "listed")
    publish.command("RPUSH", f"{key}.listed", "x")
    publish.command("SET", f"{key}.{names[0]}", "garbage")
    aged = replace(OTHER, name="b:1#1", machine="b", processes=1, version="0.0.1", facts={})
    publish.command("SADD", key, "b:1#1")
    words = ("of old is ignored", "evil?[2J is ignored", "of listed is ignored", "version 0.0.1")

    def all_told() -> bool:
        publish.command("SET", f"{key}.b:1#1", aged.encode(), "EX", "600")
        said = deployment.says()["deployment"]
        states = [hub["state"] for hub in said["hubs"]]
        return states == ["ready"] * 3 and all(word in str(said["problems"]) for word in words)

    try:
        eventually(all_told, "not told")
    except AssertionError as error:
        raise AssertionError(f"not told: {deployment.says()['deployment']}") from error
    publish.command("SET", key, "no set")
    deployment.until("yellow", "other hubs are not known: Redis says: WRONGTYPE")
    assert deployment.says()["connected"] == 0
    publish.command("DEL", key)
    deployment.until("green")
    assert_calm(deployment.first)
    assert_calm(deployment.second)


def test_a_silent_redis_delays_no_answer(deployment: Deployment, redis: RedisServer) -> None:
    """/stats answers within a second for the hub that is asked, and says that it does not know of the others."""
    with frozen(redis):
        begun = time.monotonic()
        said = deployment.says()
        assert time.monotonic() - begun < UNIT_S
        assert said["deployment"]["problems"][0].startswith("other hubs are not known: ")
    deployment.until("green")


def test_a_hub_that_may_not_announce_itself_serves(redis: RedisServer, publish: RedisClient) -> None:
    """With the rights of an earlier version: it says so in its log and in /stats, and is ready."""
    publish.command("ACL", "SETUSER", "default", "-sadd", "-smembers", "-mget")
    with HubThread(redis.url) as hub:
        hub.until_ready()
        hub.said("this hub cannot be announced to the others: Redis says: NOPERM")
        assert "other hubs are not known: Redis says: NOPERM" in hub.get("/stats")[1]["deployment"]["problems"][0]
        publish.command("ACL", "SETUSER", "default", "+sadd", "+smembers", "+mget")
        eventually(lambda: hub.get("/stats")[1]["deployment"]["status"] == "green", "not announced")


def test_hubs_of_another_database_are_told(redis: RedisServer) -> None:
    """They hear the same channels, and store elsewhere: not a problem by itself, but to be known."""
    with HubThread(redis.url) as hub, HubThread(redis.url.removesuffix("/0") + "/5") as other:
        hub.until_ready()
        other.until_ready()
        said = hub.get("/stats")[1]["deployment"]
        assert (said["status"], said["databases"]) == ("green", [5])
        assert "There are hubs in database 5 of the same Redis" in screen(hub.get("/stats")[1])


# broadcaster status


def test_status_is_one_screen(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Green is 0, yellow is 1, nobody there is 69; --json is what /stats says."""
    run = CommandLine(tmp_path, monkeypatch, capsys)
    url = f"ws://127.0.0.1:{deployment.port.port}/ws"
    shown = run("status", "--url", url)
    assert shown.code == 0, shown
    lines = shown.stdout.splitlines()
    assert lines[0] == f"deployment test-{deployment.port.port}: green, 2 of 2 hubs ready"
    assert len(lines) == 5
    assert [line.split()[2] for line in lines[2:4]] == ["ready", "ready"]
    deployment.hubs[1].signal(signal.SIGTERM)
    deployment.hubs[1].wait()
    shown = run("status", "--url", url)
    assert shown.code == 1
    assert "missing" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("! ")
    said = json.loads(run("status", "--url", url, "--json").stdout)
    assert said["deployment"]["status"] == "yellow"
    deployment.hubs[0].signal(signal.SIGTERM)
    deployment.hubs[0].wait()
    assert run("status", "--url", url).code == 69

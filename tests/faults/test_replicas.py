"""A hub at one of two replicas: what happens to that one, to its master, and what subscribers notice: nothing.

`FAULT_TABLE=faults.jsonl` writes what was measured, a line per case.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broadcaster.redis.server import RedisServer
from tests.faults.ledger import Ledger, Library, Raw, settings_for
from tests.support import ROOT, HubThread, Proxy, assert_calm, eventually, finished, frozen, redis_client

HASTY = {"BROADCASTER_REDIS__RECONNECT_MAX_S": "0.2"}
AT_ONCE = ("--hz", "500", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")


@dataclass
class Replica:
    """A replica, with a link to its master in which things go wrong."""

    server: RedisServer
    link: Proxy

    def command(self, *words: Any) -> Any:
        with redis_client(self.server) as client:
            return client.command(*words)

    def until_linked(self) -> None:
        eventually(lambda: b"master_link_status:up" in self.command("INFO", "replication"), "no replication")


@dataclass
class Scene:
    """A master, its replicas, and a hub at one of these."""

    folder: Path
    master: RedisServer
    replicas: list[Replica]
    hub: HubThread
    stack: contextlib.ExitStack
    moves: int = 0

    def begin(self) -> Replica:
        """From now on it counts whether the hub moves; the replica at which it is."""
        self.moves = self.hub.stats()["redis_moves"]
        return self.used

    @property
    def used(self) -> Replica:
        """The one at which the hub subscribes."""
        node = self.hub.stats()["redis_node"]
        [used] = [replica for replica in self.replicas if replica.server.url == node]
        return used

    def moved(self) -> bool:
        return bool(self.hub.stats()["redis_moves"] > self.moves)

    def trouble(self) -> str:
        return str(self.hub.get("/health/ready")[1]["trouble"])


@contextlib.contextmanager
def master_of_two(folder: Path) -> Iterator[tuple[RedisServer, list[Replica]]]:
    """A master and two replicas, each in a folder of its own: a replication leaves files behind."""
    with contextlib.ExitStack() as stack:
        (folder / "master").mkdir()
        master = stack.enter_context(RedisServer.start(None, "--dir", str(folder / "master"), *AT_ONCE))
        replicas = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            link = stack.enter_context(Proxy(master.port))
            at = ("--dir", str(folder / name), "--replicaof", "127.0.0.1", str(link.port))
            replicas.append(Replica(stack.enter_context(RedisServer.start(None, *AT_ONCE, *at)), link))
        for replica in replicas:
            replica.until_linked()
        with redis_client(master) as client:  # only then it sends them what is written
            online = lambda: client.command("INFO", "replication").count(b"state=online") == len(replicas)  # noqa: E731
            eventually(online, "a replica is not online")
        yield master, replicas


@contextlib.contextmanager
def at_work(folder: Path, **variables: str) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        master, replicas = stack.enter_context(master_of_two(folder))
        urls = ",".join(replica.server.url for replica in replicas)
        variables = {**HASTY, "BROADCASTER_REDIS__SUBSCRIBE_URL": urls, **variables}
        hub = stack.enter_context(HubThread(master.url, None, **variables))
        hub.until_ready()
        yield Scene(folder, master, replicas, hub, stack)


# What happens to the replica in use


def it_is_killed(scene: Scene, replica: Replica) -> None:
    replica.server.kill()


def it_stands_still(scene: Scene, replica: Replica) -> None:
    scene.stack.enter_context(frozen(replica.server))


def it_lags(scene: Scene, replica: Replica) -> None:
    replica.link.change(replica.link.answers, delay_s=1.7)


def its_stream_stops(scene: Scene, replica: Replica) -> None:
    """For a minute it says that it is connected."""
    replica.link.withhold()
    assert b"master_link_status:up" in replica.command("INFO", "replication")


def it_loses_its_master(scene: Scene, replica: Replica) -> None:
    replica.link.refuses = True
    replica.link.cut()


def it_is_promoted(scene: Scene, replica: Replica) -> None:
    assert replica.command("REPLICAOF", "NO", "ONE") == b"OK"


def it_follows_another_master(scene: Scene, replica: Replica) -> None:
    (scene.folder / "other").mkdir()
    other = scene.stack.enter_context(RedisServer.start(None, "--dir", str(scene.folder / "other"), *AT_ONCE))
    assert replica.command("REPLICAOF", "127.0.0.1", str(other.port)) == b"OK"


CASES: list[tuple[str, Callable[[Scene, Replica], None], str]] = [
    ("replica of the hub killed, another one", it_is_killed, "Redis closed the connection"),
    ("replica of the hub stopped, another one", it_stands_still, "did not answer within 2 s"),
    ("replica of the hub lags by 1.7 s, another one", it_lags, "did not come within 1 s"),
    ("replica's stream stops, and it says `connected`", its_stream_stops, "did not come within 1 s"),
    ("replica of the hub loses its master, another one", it_loses_its_master, "it has lost its master"),
    ("replica of the hub promoted, another one", it_is_promoted, "it is no replica"),
    ("replica of the hub follows another master", it_follows_another_master, "it "),
]


@pytest.mark.parametrize(("name", "act", "why"), CASES, ids=[act.__name__ for _, act, _ in CASES])
def test_a_hub_moves_to_another_replica(
    tmp_path: Path, name: str, act: Callable[[Scene, Replica], None], why: str
) -> None:
    """It says which one it uses, and why; nothing is lost, and nobody is told anything: the log has all."""
    with at_work(tmp_path) as scene, Ledger() as ledger:
        settings = settings_for(scene.master.url)
        ledger.subscribe(
            Library("library", scene.hub.url, settings),
            Raw("v1", scene.hub.url),
            Raw("plain", scene.hub.url, v1=False),
        )
        scene.hub.until_connected(3)
        ledger.publish(settings)
        used = scene.begin()
        ledger.broken()
        act(scene, used)
        ledger.noticed(scene.moved, "it does not move", within=6.0)
        ledger.repaired()
        scene.hub.until_ready()
        ledger.flows(30)
        stats, readiness = scene.hub.stats(), scene.hub.get("/health/ready")[1]
        for account in ledger.close(name):
            assert account.told == 0
        assert all(not reader.gaps for reader in ledger.readers)
        spare = scene.used
        assert spare is not used
        assert any(
            all(word in line for word in (why, used.server.url, spare.server.url)) for line in scene.hub.lines
        )
        for said in (stats, readiness):
            assert said["redis_node"] == spare.server.url
            if stats["redis_moves"] == scene.moves + 1:  # on a busy machine it may have tried the other one again
                assert said["redis_moved"].startswith(f"{used.server.url}: ")
                assert why in said["redis_moved"]
        assert_calm(scene.hub)


def test_a_frozen_master_is_seen_through_a_replica_that_looks_well(tmp_path: Path) -> None:
    """It says `connected` and answers PING: only the proof through the master notices. Nobody moves for it."""
    with at_work(tmp_path) as scene, Ledger() as ledger:
        settings = settings_for(scene.master.url)
        ledger.subscribe(Library("library", scene.hub.url, settings), Raw("v1", scene.hub.url))
        scene.hub.until_connected(2)
        ledger.publish(settings)
        used = scene.begin()
        ledger.broken()
        with frozen(scene.master):
            ledger.noticed(lambda: scene.hub.get("/health/ready")[0] == 503, "still ready", within=5.0)
            assert b"master_link_status:up" in used.command("INFO", "replication")
            assert used.command("PING") == b"PONG"
            eventually(lambda: "the master did not answer" in scene.trouble(), scene.trouble())
        ledger.repaired()
        scene.hub.until_ready()
        ledger.flows(30)
        for account in ledger.close("master of the hub's replica stopped"):
            assert account.told == 0
        assert scene.used is used
        assert not scene.moved()
        assert_calm(scene.hub)


def test_a_master_that_is_restarted_is_told_as_without_replicas(tmp_path: Path) -> None:
    """Its replicas follow it again with what it has: a new epoch, one gap, and no event of it is missing."""
    with at_work(tmp_path) as scene, Ledger() as ledger:
        settings = settings_for(scene.master.url)
        v1, plain = Raw("v1", scene.hub.url), Raw("plain", scene.hub.url, v1=False)
        ledger.subscribe(v1, plain)
        scene.hub.until_connected(2)
        ledger.publish(settings)
        with redis_client(scene.master) as client:
            client.command("SAVE")
        ledger.broken()
        scene.master.kill()
        ledger.noticed(lambda: scene.hub.get("/health/ready")[0] == 503, "still ready", within=5.0)
        at = ("--dir", str(tmp_path / "master"), *AT_ONCE)
        scene.stack.enter_context(RedisServer.start(scene.master.port, *at))
        ledger.repaired()
        scene.hub.until_ready(within=15.0)
        ledger.flows(30)
        ledger.close("master of the hub's replicas killed, an older snapshot")
        assert [gap.cause for gap in v1.gaps] == ["redis_restarted"]
        assert plain.has("close 4009")
        assert_calm(scene.hub)


def test_without_history_each_move_is_a_gap(tmp_path: Path) -> None:
    """Nothing proves that nothing was missed: `redis_link_lost`, and 4009 for plain clients."""
    variables = {"BROADCASTER_HISTORY__ENABLED": "false"}
    with at_work(tmp_path, **variables) as scene, Ledger() as ledger:
        v1, plain = Raw("v1", scene.hub.url), Raw("plain", scene.hub.url, v1=False)
        ledger.subscribe(v1, plain)
        scene.hub.until_connected(2)
        it_is_killed(scene, scene.begin())
        eventually(scene.moved, "it does not move")
        scene.hub.until_ready()
        eventually(lambda: v1.gaps and plain.has("close 4009"), "nobody is told")
        moves = scene.hub.stats()["redis_moves"] - scene.moves  # more than one only on a busy machine
        eventually(lambda: len(v1.gaps) >= moves, "a move is not told")
        assert {gap.cause for gap in v1.gaps} == {"redis_link_lost"}
        assert_calm(scene.hub)


def test_without_history_another_history_of_the_master_is_a_gap(tmp_path: Path) -> None:
    """A replica that copies its master anew keeps its connections, and drops what had not come to it."""
    variables = {**HASTY, "BROADCASTER_HISTORY__ENABLED": "false"}
    with master_of_two(tmp_path) as (master, [replica, _]), Ledger() as ledger:
        variables["BROADCASTER_REDIS__SUBSCRIBE_URL"] = replica.server.url
        with HubThread(master.url, None, **variables) as hub:
            v1, plain = Raw("v1", hub.until_ready().url), Raw("plain", hub.url, v1=False)
            ledger.subscribe(v1, plain)
            hub.until_connected(2)
            master.kill()
            at = ("--dir", str(tmp_path / "master"), *AT_ONCE)
            with RedisServer.start(master.port, *at):
                eventually(lambda: v1.gaps and plain.has("close 4009"), "nobody is told", within=20.0)
                hub.until_ready()
                assert {gap.cause for gap in v1.gaps} == {"redis_link_lost"}
            assert_calm(hub)


@pytest.mark.parametrize("sees_it", [True, False], ids=["", "while the hub has lost it, too"])
def test_without_history_a_replica_that_had_lost_its_master_is_a_gap(tmp_path: Path, sees_it: bool) -> None:
    """It keeps its connections while it copies its master anew, and what was published meanwhile never comes."""
    variables = {**HASTY, "BROADCASTER_HISTORY__ENABLED": "false"}
    with master_of_two(tmp_path) as (master, [replica, _]), Ledger() as ledger:
        variables["BROADCASTER_REDIS__SUBSCRIBE_URL"] = replica.server.url
        with (
            Proxy(master.port) as way,
            HubThread(f"redis://127.0.0.1:{way.port}/0", None, **variables) as hub,
            redis_client(master) as client,
        ):
            v1, plain = Raw("v1", hub.until_ready().url), Raw("plain", hub.url, v1=False)
            ledger.subscribe(v1, plain)
            hub.until_connected(2)
            for link in [replica.link] if sees_it else [replica.link, way]:
                link.refuses = True
                link.cut()
            eventually(lambda: hub.get("/health/ready")[0] == 503, "still ready", within=5.0)
            client.command("SET", "large", b"x" * 3_000_000)  # more than the backlog: it has to copy all of it
            replica.link.refuses = False
            replica.until_linked()
            way.refuses = False
            eventually(lambda: v1.gaps and plain.has("close 4009"), "nobody is told", within=20.0)
            hub.until_ready()
            assert b"sync_partial_err:1" in client.command("INFO", "stats")
            assert {gap.cause for gap in v1.gaps} == {"redis_link_lost"}
            assert_calm(hub)


def test_when_all_are_late_the_hub_stays(tmp_path: Path) -> None:
    """It tries the other one once, and not again and again; it is ready as long as events come within 1.5 s."""
    with at_work(tmp_path) as scene:
        scene.begin()
        for replica in scene.replicas:
            replica.link.change(replica.link.answers, delay_s=1.2)
        eventually(scene.moved, "it does not move", within=6.0)
        scene.hub.until_ready()
        proofs = scene.hub.stats()["proofs"]
        eventually(lambda: scene.hub.stats()["proofs"] > proofs + 1, "no proof", within=8.0)
        assert scene.hub.stats()["redis_moves"] == scene.moves + 1
        assert_calm(scene.hub)


def test_who_publishes_is_told_of_hubs_at_replicas(tmp_path: Path) -> None:
    """Redis counts none; by what they announce they are there. Who may not read that is not told "nobody"."""
    with at_work(tmp_path) as scene, redis_client(scene.master) as client:
        variables = {
            "BROADCASTER_REDIS__URL": scene.master.url,
            "BROADCASTER_HUB__DEPLOYMENT": f"test-{scene.hub.port}",
        }
        publish = ("publish", "--type", "A", "--source", "b")
        eventually(lambda: client.command("KEYS", "broadcaster.hub.{*}.*"), "the hub does not announce itself")
        ended = finished(*publish, cwd=None, within=20, **variables)
        assert (ended.code, "WARNING" in ended.stdout) == (0, False)
        assert "heard by nobody at this Redis; 1 hub is there (" in ended.stdout
        assert f":{scene.hub.port}#1): one at a replica is not counted" in ended.stdout
        client.command("ACL", "SETUSER", "default", "-smembers")
        at_replicas = {"BROADCASTER_REDIS__SUBSCRIBE_URL": scene.replicas[0].server.url}
        ended = finished(*publish, cwd=None, within=20, **variables, **at_replicas)
        assert "hubs at replicas are not counted, and which there are is not known: " in ended.stdout
        assert "is a hub running?" in finished(*publish, cwd=None, within=20, **variables).stdout
        client.command("ACL", "SETUSER", "default", "+@all")


RIGHTS = "+auth +select +ping +info +evalsha +script|load +hmget +xrange +subscribe +unsubscribe"
"""As docs/security.md has them."""


def test_few_rights_are_enough_at_a_replica_and_one_that_refuses_is_left(tmp_path: Path) -> None:
    """A user of its own may subscribe and read; a replica that does not know it is no reason to end."""
    assert all(right in (ROOT / "docs/security.md").read_text() for right in RIGHTS.split())
    user = ("ACL", "SETUSER", "hub", "on", ">word", "resetkeys", "~{*}:meta", "~{*}:log", "resetchannels")
    channels = "&events.*", "&broadcaster.hub.*"
    with master_of_two(tmp_path) as (master, replicas), Ledger() as ledger:
        good, other = replicas
        assert good.command(*user, *channels, "-@all", *RIGHTS.split()) == b"OK"
        urls = ",".join(replica.server.url.replace("//", "//hub:word@") for replica in (good, other))
        with HubThread(master.url, None, **HASTY, BROADCASTER_REDIS__SUBSCRIBE_URL=urls) as hub:
            hub.until_ready()
            settings = settings_for(master.url)
            ledger.subscribe(Library("library", hub.url, settings), away := Library("away", hub.url, settings))
            hub.until_connected(2)
            ledger.publish(settings)
            eventually(lambda: away.got, "nothing comes")
            ledger.send_away(away)
            ledger.flows(30)
        with HubThread(master.url, hub.port, **HASTY, BROADCASTER_REDIS__SUBSCRIBE_URL=urls) as another:
            another.until_ready()  # it has no ring: who resumes is served from the log
            ledger.call_back(away)
            ledger.flows(30)
            for account in ledger.close("hub at a replica with few rights restarted"):
                assert account.told == 0
            assert another.stats()["pages_read"]
            assert str(good.server.port) in another.stats()["redis_node"]
            assert_calm(another)


def test_stored_events_and_times_are_read_at_the_replica(tmp_path: Path) -> None:
    """`/events`, and a `since` that is a time: all that the master has, also where the replica lags."""

    def served(server: RedisServer) -> int:
        """How many scripts it has run: pages, and what is stored."""
        with redis_client(server) as client:
            found = re.search(rb"cmdstat_evalsha:calls=(\d+)", client.command("INFO", "commandstats"))
        return int(found[1]) if found else 0

    with at_work(tmp_path) as scene, Ledger() as ledger:
        used, settings = scene.used, settings_for(scene.master.url)
        ledger.publish(settings)
        ledger.flows(30)
        before = served(used.server)
        used.link.change(used.link.answers, delay_s=0.3)
        ledger.flows(10)
        ledger.subscribe(raw := Raw("v1", f"{scene.hub.url}?since=1h"))
        eventually(lambda: len(raw.got) > 40, "what was stored does not come")
        status, body = scene.hub.get("/events?limit=1000", timeout_s=20)
        assert (status, body.get("error"), body.get("complete")) == (200, None, True)
        assert [event["offset"] for event in body["events"]] == [*range(1, len(body["events"]) + 1)]
        assert len(body["events"]) > 40
        status, body = scene.hub.get("/events?last=5&limit=5", timeout_s=20)
        assert (status, len(body["events"])) == (200, 5)
        assert served(used.server) >= before + 3
        assert_calm(scene.hub)

"""Publishing from code that is not asynchronous: from any thread, before and after a fork, and to the end."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from broadcaster import Published, PublisherSync, Settings
from broadcaster.core.errors import InvalidEvent, RedisRefused, RedisUnavailable
from broadcaster.redis.server import RedisServer
from broadcaster.settings import PublisherTable, RedisTable
from tests.support import (
    UNIT_S,
    RedisClient,
    clean_environment,
    crashed,
    eventually,
    free_port,
    frozen,
    redis_client,
    stored_events,
)


def settings_for(redis_url: str, *, deadline_s: float = 15.0) -> Settings:
    """The defaults with another Redis."""
    return Settings.model_construct(
        redis=RedisTable(url=redis_url, silence_timeout_s=0.6),
        publisher=PublisherTable(publish_deadline_s=deadline_s),
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "broadcaster-publisher"]


def test_an_event_is_published(steady_redis: RedisServer, client: RedisClient) -> None:
    """Without `with` and without a loop: it is stored, `Published` says where, and sequences count on."""
    publisher = PublisherSync(settings_for(steady_redis.url), channel="events.sync")
    assert not threads()
    published = [publisher.publish("T", "s", data={"n": n}) for n in range(3)]
    elsewhere = publisher.publish("T", "s", severity="info", to="events.other")
    publisher.close()
    assert [each.event.sequence for each in (*published, elsewhere)] == [1, 2, 3, 1]
    positions = [each.position.offset if each.position else None for each in published]
    assert positions == [offset for offset, _ in stored_events(client, "events.sync")] == [1, 2, 3]
    assert (elsewhere.event.severity, elsewhere.heard, elsewhere.error) == ("info", 0, None)
    assert not threads()


def test_all_threads_may_use_one(steady_redis: RedisServer, client: RedisClient) -> None:
    """Eight at once: every event has a sequence and a place of its own, and there is one connection."""
    with PublisherSync(settings_for(steady_redis.url), channel="events.threads") as publisher:
        assert len(threads()) == 1

        def publish(_: int) -> Published:
            return publisher.publish("T", "s")

        with ThreadPoolExecutor(8) as pool:
            published = list(pool.map(publish, range(200)))
        assert len(threads()) == 1
    assert sorted(each.event.sequence for each in published) == list(range(1, 201))
    assert {each.position.offset for each in published if each.position} == set(range(1, 201))
    assert len(stored_events(client, "events.threads")) == 200


def test_its_errors_are_those_of_publisher(steady_redis: RedisServer, client: RedisClient) -> None:
    """What is wrong with an event or a channel, a Redis that is not there, and one that refuses."""
    with PublisherSync(settings_for(steady_redis.url)) as publisher:
        with pytest.raises(InvalidEvent):
            publisher.publish("", "s")
        with pytest.raises(InvalidEvent):
            publisher.publish("T", "s", to="not a channel")
        assert publisher.publish("T", "s").event.sequence == 1
    with pytest.raises(InvalidEvent):
        PublisherSync(settings_for(steady_redis.url), channel="not a channel")
    client.command("ACL", "SETUSER", "deaf", "reset", "on", ">p", "~*", "&*", "+@all", "-publish")
    refused = PublisherSync(settings_for(f"redis://deaf:p@127.0.0.1:{steady_redis.port}/0"))
    with pytest.raises(RedisRefused):
        refused.publish("T", "s")
    refused.close()


def test_a_redis_that_is_not_there() -> None:
    """`with` fails at once; a publish tries until its deadline; neither leaves a thread."""
    nobody = settings_for(f"redis://127.0.0.1:{free_port()}/0", deadline_s=0.3)
    began = time.monotonic()
    with pytest.raises(RedisUnavailable), PublisherSync(nobody):
        pass
    assert not threads()
    publisher = PublisherSync(nobody)
    with pytest.raises(RedisUnavailable, match="may not have been published"):
        publisher.publish("T", "s")
    assert time.monotonic() - began > 0.3
    publisher.close()
    assert not threads()


def test_a_redis_that_comes_back(redis: RedisServer) -> None:
    """A connection that breaks is opened again, and the event is published."""
    with PublisherSync(settings_for(redis.url)) as publisher:
        publisher.publish("T", "s")
        with crashed(redis) as revive:
            threading.Timer(0.3, revive).start()
            assert publisher.publish("T", "s").position is not None


def test_a_closed_one_publishes_nothing(steady_redis: RedisServer) -> None:
    """Closing twice does nothing; publishing afterwards is an error and starts no thread."""
    publisher = PublisherSync(settings_for(steady_redis.url))
    publisher.close()
    with pytest.raises(RedisUnavailable, match="closed"):
        publisher.publish("T", "s")
    publisher.close()
    assert not threads()


def test_closing_ends_a_publish_that_waits(redis: RedisServer) -> None:
    """With a Redis that stands still the other thread is told at once, not after its deadline."""
    publisher = PublisherSync(settings_for(redis.url, deadline_s=60.0))
    publisher.publish("T", "s")
    with frozen(redis), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(publisher.publish, "T", "s")
        time.sleep(0.1)
        assert not waiting.done()
        publisher.close()
        with pytest.raises(RedisUnavailable, match="closed"):
            waiting.result(5 * UNIT_S)
    assert not threads()


def test_one_that_is_forgotten_ends(steady_redis: RedisServer) -> None:
    """Without `close` the thread ends when the object does."""
    publisher = PublisherSync(settings_for(steady_redis.url))
    publisher.publish("T", "s")
    gone = weakref.ref(publisher)
    del publisher
    gc.collect()
    assert gone() is None
    eventually(lambda: not threads(), "the thread is still there")


def test_it_works_where_a_loop_runs(steady_redis: RedisServer) -> None:
    """Also inside of a coroutine, which it blocks, it does not wait for the loop that it blocks."""

    async def story() -> Published:
        with PublisherSync(settings_for(steady_redis.url)) as publisher:
            return publisher.publish("T", "s")

    assert asyncio.run(story()).error is None


PRELUDE = """
import os, sys, threading
from broadcaster import PublisherSync
publisher = PublisherSync()
def publish(source):
    return publisher.publish("T", source).position.offset
"""

PROGRAMS = {
    "forked before the first event": """
if not (pid := os.fork()):
    assert publish("child") == 1
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert publish("parent") == 2
publisher.close()
""",
    "forked between two events": """
assert publish("parent") == 1
if not (pid := os.fork()):
    assert threading.active_count() == 1
    assert [publish("child"), publish("child")] == [2, 3]
    publisher.close()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert [publish("parent"), publish("parent")] == [4, 5]
""",
    "forked while another thread publishes": """
import time
def work():
    for _ in range(300):
        publish("thread")
thread = threading.Thread(target=work)
thread.start()
children = []
for _ in range(5):
    time.sleep(0.02)
    if not (pid := os.fork()):
        publish("child")
        sys.exit(0)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 5
thread.join()
assert publish("parent") == 306
""",
    "never closed": "assert publish('parent') == 1",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_whole_programs(program: str, redis: RedisServer) -> None:
    """A forked process publishes by itself and leaves its parent's connection alone; each ends in silence."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + program],
        cwd=tempfile.gettempdir(),
        env=clean_environment(BROADCASTER_REDIS__URL=redis.url),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


class PublishingHandler(logging.Handler):
    """Publishes what is logged, as a service may want to."""

    def __init__(self, publisher: PublisherSync) -> None:
        super().__init__()
        self._publisher = publisher
        self.refused = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._publisher.publish("LOGGED", "log")
        except RedisUnavailable as error:
            self.refused.append(str(error))


def test_who_publishes_what_the_publisher_logs_is_told_that_it_cannot(redis: RedisServer) -> None:
    """On its own thread it would wait for itself: the publish that is logged about ends in time."""
    with (
        redis_client(redis) as client,
        PublisherSync(settings_for(redis.url, deadline_s=1.0 * UNIT_S)) as publisher,
    ):
        publisher.publish("A", "a")
        handler = PublishingHandler(publisher)
        logging.getLogger().addHandler(handler)
        client.command("CONFIG", "SET", "maxmemory", "1")
        try:
            with ThreadPoolExecutor(1) as pool:
                outcome = pool.submit(publisher.publish, "B", "b")
                with pytest.raises(RedisUnavailable, match="OOM"):
                    outcome.result(timeout=10 * UNIT_S)
        finally:
            client.command("CONFIG", "SET", "maxmemory", "0")
            logging.getLogger().removeHandler(handler)
    assert handler.refused
    assert "it would wait for itself" in handler.refused[0]

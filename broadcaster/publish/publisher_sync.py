"""The publisher library for code that is not asynchronous: Django, Flask, scripts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.publish.publisher import Published, Publisher
from broadcaster.settings import Settings, load

T = TypeVar("T")


class PublisherSync:
    """Publishes events: `PublisherSync().publish(...)`. One is enough for a process; all its threads may use it.

    A thread of its own runs a `Publisher`, whose promises and errors hold here, too. It is started by the first
    publish, so an object at the top of a module costs nothing before. A process that is forked (gunicorn, uWSGI,
    Celery) starts its own, with a connection and sequence numbers of its own. Coroutines use `Publisher`: this one
    stops their event loop until Redis has answered.
    """

    def __init__(
        self, settings: Settings | None = None, *, channel: str | None = None, runtime: Runtime = RUNTIME
    ) -> None:
        """Prepare a publisher; nothing is connected yet.

        Args:
            settings: Where Redis is; None reads broadcaster.toml and the environment.
            channel: For events that are given no other; None takes the configured one.
            runtime: Time, chance and limits.

        Raises:
            ConfigurationError, InvalidEvent: A setting, or the name of the channel, is wrong.
        """
        self._prepare = partial(Publisher, settings or load().settings, channel=channel, runtime=runtime)
        self._prepare()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False
        _PUBLISHERS.add(self)

    def publish(
        self,
        event_type: str,
        source: str,
        *,
        severity: str = "critical",
        data: Mapping[str, Any] | None = None,
        to: str | None = None,
    ) -> Published:
        """Publish one event now, and wait for Redis: at most `publisher.publish_deadline_s`.

        Args:
            event_type: Of the event.
            source: Of the event; its sequence is one more than the last of this source on this channel here.
            severity: `critical`, `warning` or `info`.
            data: Any JSON object of the publisher's own.
            to: The channel; None takes the publisher's.

        Raises:
            InvalidEvent: A field or the name of the channel is wrong, or the event is too large.
            RedisUnavailable: It is not known whether it was published; or this publisher is closed.
            RedisRefused: Redis does not permit publishing; what it has not answered may be published.
        """
        return self._run(lambda it: it.publish(event_type, source, severity=severity, data=data, to=to))

    def __enter__(self) -> PublisherSync:
        """Connect.

        Raises:
            RedisUnavailable, RedisRefused: Redis does not answer, or refuses this client.
        """
        try:
            self._run(Publisher.__aenter__)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End connection and thread; a publish that waits fails: it stays unknown whether it was published."""
        with self._lock:
            self._closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
            worker.join()

    def _run(self, work: Callable[[Publisher], Coroutine[Any, Any, T]]) -> T:
        """Do something with the publisher on its thread, and wait for it."""
        if self._worker is not None and self._worker.is_this_thread:
            raise RedisUnavailable(
                "what handles its own log records cannot publish through it: it would wait for itself"
            )
        with self._lock:  # nothing begins on a thread that ends
            if self._closed:
                raise RedisUnavailable("the publisher is closed")
            if self._worker is None:
                self._worker = _Worker(self._prepare())
                weakref.finalize(self, self._worker.close).atexit = False
            begun = self._worker.begin(work)
        try:
            return begun.result()
        except CancelledError:
            raise RedisUnavailable("the publisher was closed; the event may not have been published") from None
        finally:
            begun.cancel()  # if the caller was interrupted

    def _begin_anew(self) -> None:
        """In a forked process: the thread is not there, and its lock may be held for ever."""
        if self._worker is not None:
            _OF_PARENTS.append(self._worker)
        self._worker = None
        self._lock = threading.Lock()


class _Worker:
    """A publisher on an event loop in a thread of its own."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._closing = asyncio.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="broadcaster-publisher", daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[Publisher], Coroutine[Any, Any, T]]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work(self._publisher), self._loop)

    def close(self) -> None:
        """Have the thread end, from any thread, also from that of the garbage collector."""
        if self._pid == os.getpid():  # the loop of another process is woken by what both have open
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._closing.set)

    def join(self) -> None:
        self._thread.join()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs on the thread of the publisher: a handler of what that logs, perhaps."""
        return threading.current_thread() is self._thread

    def _serve(self) -> None:
        with self._runner as runner:  # leaving it cancels what has begun
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._closing.wait()
        self._publisher.close()


_PUBLISHERS: Final = weakref.WeakSet[PublisherSync]()
_OF_PARENTS: Final = list[_Worker]()
"""In a forked process, the workers of its parent: if they were collected, they would end what the parent uses."""


def _after_fork() -> None:
    for publisher in _PUBLISHERS:
        publisher._begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

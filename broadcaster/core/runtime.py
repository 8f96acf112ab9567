"""Time, randomness and internal limits: what every part is run with.

The only module that reads a clock or draws a random number. Every other part takes a `Runtime`, or the parts of
one that it needs, as an argument, so a test or a simulation can pass its own.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
import uuid
from collections.abc import MutableSequence
from dataclasses import dataclass
from typing import Any, Final


class Clock:
    """The clocks of this host."""

    def loop_s(self) -> float:
        """Seconds on the clock of the running event loop, which is constant within one iteration (uvloop)."""
        return asyncio.get_running_loop().time()

    def monotonic_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def monotonic_ns(self) -> int:
        """Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share on Linux."""
        return time.monotonic_ns()

    def wall_s(self) -> float:
        """Seconds since 1970 (UTC)."""
        return time.time()

    def wall_ns(self) -> int:
        """Nanoseconds since 1970 (UTC)."""
        return time.time_ns()

    def wall_ahead_ns(self) -> int:
        """Nanoseconds that the wall clock is ahead of CLOCK_MONOTONIC, the surest of three readings.

        A reading is as sure as it is short: a process that is interrupted between the two clocks reads nonsense.
        """
        readings = []
        for _ in range(3):
            before_ns, wall_ns, after_ns = self.monotonic_ns(), self.wall_ns(), self.monotonic_ns()
            readings.append((after_ns - before_ns, wall_ns - (before_ns + after_ns) // 2))
        return min(readings)[1]

    def thread_cpu_s(self) -> float:
        """Seconds of CPU time that this thread has used."""
        return time.thread_time()

    def date(self, pattern: str, at_s: float | None = None) -> str:
        """Local date and time of an instant (seconds since 1970; None: now) in the notation of `time.strftime`."""
        return time.strftime(pattern, time.localtime(at_s))

    def block(self, seconds: float) -> None:
        """Block the whole thread, event loop included."""
        time.sleep(seconds)


class Chance:
    """Random numbers: `uniform` and `shuffle` to spread load, the others for names that cannot be guessed."""

    def uniform(self, low: float, high: float) -> float:
        """A number between `low` and `high`."""
        return random.uniform(low, high)

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Shuffle `items` in place."""
        random.shuffle(items)

    def hex(self, size: int) -> str:
        """`size` random bytes as hexadecimal digits."""
        return secrets.token_hex(size)

    def bytes(self, size: int) -> bytes:
        """`size` random bytes."""
        return secrets.token_bytes(size)

    def uuid(self) -> str:
        """A new random UUID (version 4)."""
        return str(uuid.uuid4())


CLOCK: Final = Clock()
CHANCE: Final = Chance()


@dataclass(frozen=True, slots=True)
class Limits:
    """Internal limits; those that a user may want to change are settings.

    Attributes:
        write_bytes: Largest write to one connection (one larger frame excepted).
        unsent_bytes: Bytes that wait for one socket; beyond them (the write high-water mark) its subscriptions are
            behind.
        read_bytes: Bytes of one client that are parsed in one piece, before those of others. A frame may be as
            short as 6 bytes and costs some 15 µs: a flood of pings must not delay events.
        slice_s: Seconds of deferrable work per iteration of the event loop: the delay it may cause an event ...
        slice_share: ... or this share of the CPU time of the rest of the iteration if that is more: with too much
            to send, handshakes must still be answered.
        page_events: Events of one page of the log: some 2 ms of the hub's time, in slices, and 0.4 ms of Redis'.
        page_bytes: Bytes of their payloads, one larger event excepted: on a link of 5 MB/s, 0.1 s.
        kept_pages: Pages that are cached for other readers.
        kept_page_bytes: Bytes of these pages; the least recently used are dropped first.
        page_give_up_s: Seconds after which who waits for a page that cannot be read is closed (4010).
        page_retry_s: Seconds until a page is read again that did not hold what was missing.
        early_bytes: Bytes of events that a channel keeps which came while it read the log before them.
        known_epochs: Epochs without a time that a hub remembers of a channel.
        known_gaps: Gaps of a ring buffer that are remembered by their number.
        known_labels: Distinct labels per channel that are one object each, and whose matching filters are known.
        compress_bytes: Largest event that is compressed: some 10 ms, in which the hub does nothing else.
        made_bytes: Bytes of frames in another format (compressed, or Server-Sent Events) that are kept for other
            clients, with those that they were made of: per format.
        ring_slack: Dropped entries at the front of a ring buffer's list before it is compacted.
        warn_at: Share of the allowed lag (`hub.behind_max_*`) at which a slow consumer is warned.
        warn_every_s: Seconds between two such warnings.
        unavailable_s: Seconds that Redis may refuse a channel before its clients are closed (4010).
        probe_pause_s: Least seconds between two delivery probes.
        announce_every_s: Seconds between two announcements of a hub in Redis.
        touch_every_s: Seconds after which a delivery probe renews the expiry of the channels in Redis; or
            `history.dedupe_s` if that is less.
        comment_every_s: Seconds between two comments in an event stream (SSE), however much else is in it: proxies
            cut what is silent, some after 30 s.
        expiry_ticks: In one of so many ticks of the timer a connection's token is checked for expiry.
        retry_after_s: Seconds that a client is asked to stay away when the hub is full.
        known_addresses: Addresses whose rate of requests is remembered.
        filter_values: Values of one filter of a subscription; more are refused.
        known_tokens: Verified tokens that are cached; some 100 bytes each.
        store_events: Events stored in one script call of Redis, which is blocked meanwhile: some 0.5 ms.
        store_bytes: Bytes of such a call, one larger event excepted.
        publish_sources: Sources whose last sequence number a publisher remembers.
        recent_ids: Events whose id a subscriber remembers, to drop duplicates.
        recent_sources: Sources whose last sequence number a subscriber remembers.
    """

    write_bytes: int = 65_536
    unsent_bytes: int = 65_536
    read_bytes: int = 512
    slice_s: float = 0.0003
    slice_share: float = 0.25
    page_events: int = 256
    page_bytes: int = 524_288
    kept_pages: int = 32
    kept_page_bytes: int = 16 * 2**20
    page_give_up_s: float = 10.0
    page_retry_s: float = 0.05
    early_bytes: int = 2**20
    known_epochs: int = 64
    known_gaps: int = 1000
    known_labels: int = 4096
    compress_bytes: int = 2**20
    made_bytes: int = 16 * 2**20
    ring_slack: int = 1024
    warn_at: float = 0.5
    warn_every_s: float = 1.0
    unavailable_s: float = 1.0
    probe_pause_s: float = 0.01
    announce_every_s: float = 1.0
    touch_every_s: float = 60.0
    comment_every_s: float = 15.0
    expiry_ticks: int = 10
    retry_after_s: int = 5
    known_addresses: int = 10_000
    filter_values: int = 32
    known_tokens: int = 20_000
    store_events: int = 64
    store_bytes: int = 262_144
    publish_sources: int = 10_000
    recent_ids: int = 1024
    recent_sources: int = 10_000

    def slice_after(self, rest_s: float) -> float:
        """Seconds that deferrable work may take in a turn of the loop whose rest has used so much CPU time."""
        return max(self.slice_s, self.slice_share * rest_s)


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Runtime:
    """The clock, the randomness and the limits of a part."""

    clock: Clock = CLOCK
    chance: Chance = CHANCE
    limits: Limits = LIMITS


RUNTIME: Final = Runtime()

"""Real parts for the tests: hubs, clients, a Redis and what may happen to it, waiting with a deadline.

Every wait is a multiple of `UNIT_S`; `TEST_TIME_SCALE=3` triples them on a slow machine.
"""

from tests.support.clock import Clock
from tests.support.event_stream import Reader, StreamClient
from tests.support.events import event_payload, unstamped
from tests.support.hub import MONITOR_KEY, Hub, HubProcess, HubThread, assert_calm
from tests.support.loop import in_loop, run_async, unblocked
from tests.support.ports import free_port
from tests.support.process import (
    ROOT,
    CommandLine,
    Finished,
    Running,
    broadcaster,
    clean_environment,
    cpu_s,
    finished,
    memory_bytes,
)
from tests.support.proxy import Proxy
from tests.support.redis import (
    RedisClient,
    Talk,
    connections_taken,
    crashed,
    dead,
    frozen,
    hasty,
    next_message,
    next_reply,
    redis_client,
    stand_in,
    stored_events,
)
from tests.support.timing import UNIT_S, WHOLE_RUN_S, eventually, until
from tests.support.websocket import (
    Frame,
    RawClient,
    client_frame,
    frames_from,
    next_but_ping,
    opened_by_library,
    read_to_end,
    server_frames,
    upgrade_request,
)

__all__ = [
    "MONITOR_KEY",
    "ROOT",
    "UNIT_S",
    "WHOLE_RUN_S",
    "Clock",
    "CommandLine",
    "Finished",
    "Frame",
    "Hub",
    "HubProcess",
    "HubThread",
    "Proxy",
    "RawClient",
    "Reader",
    "RedisClient",
    "Running",
    "StreamClient",
    "Talk",
    "assert_calm",
    "broadcaster",
    "clean_environment",
    "client_frame",
    "connections_taken",
    "cpu_s",
    "crashed",
    "dead",
    "event_payload",
    "eventually",
    "finished",
    "frames_from",
    "free_port",
    "frozen",
    "hasty",
    "in_loop",
    "memory_bytes",
    "next_but_ping",
    "next_message",
    "next_reply",
    "opened_by_library",
    "read_to_end",
    "redis_client",
    "run_async",
    "server_frames",
    "stand_in",
    "stored_events",
    "unblocked",
    "unstamped",
    "until",
    "upgrade_request",
]

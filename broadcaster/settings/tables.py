"""The tables of broadcaster.toml with their defaults and bounds, typed and frozen."""

from __future__ import annotations

from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broadcaster.errors import InvalidEvent
from broadcaster.event import check_channel

ENVIRONMENT: Final = "BROADCASTER_"
"""Prefix of the environment variables: `BROADCASTER_HUB__PORT`."""


def _channel(name: str) -> str:
    try:
        return check_channel(name)
    except InvalidEvent as error:
        raise ValueError(error.detail) from None


def _redis_url(url: str) -> str:
    return _checked_url(url, "redis", "rediss", "unix")


def _optional_redis_url(url: str) -> str:
    return _redis_url(url) if url else url


def _websocket_url(url: str) -> str:
    return _checked_url(url, "ws", "wss") if url else url


def _checked_url(url: str, *schemes: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in schemes:
        raise ValueError("must begin with " + " or ".join(f"{scheme}://" for scheme in schemes))
    if parts.scheme != "unix" and not parts.hostname:
        raise ValueError("has no host")
    try:
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ValueError("has no valid port") from None
    return url


Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Glob = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:*?\[\]!-]{1,128}$")]
WebSocketUrl = Annotated[str, AfterValidator(_websocket_url)]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EventTable(Table):
    channel: Annotated[str, AfterValidator(_channel)] = "events.critical"
    max_bytes: Annotated[int, Field(ge=256, le=16 * 2**20)] = 65_536


class RedisTable(Table):
    url: Annotated[str, AfterValidator(_redis_url), Field(repr=False)] = "redis://127.0.0.1:6390/0"
    subscribe_url: Annotated[str, AfterValidator(_optional_redis_url), Field(repr=False)] = ""
    connect_timeout_s: Seconds = 2.0
    ping_interval_s: Seconds = 0.5
    silence_timeout_s: Seconds = 2.0
    reconnect_max_s: Seconds = 1.0


class HistoryTable(Table):
    enabled: bool = True
    max_events: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    idle_expire_s: Annotated[int, Field(ge=1, le=31_536_000)] = 86_400
    dedupe_s: Annotated[int, Field(ge=1, le=86_400)] = 60


class ChannelsTable(Table):
    allow: Annotated[tuple[Glob, ...], Field(max_length=100)] = ("events.*",)
    priority: Annotated[tuple[Glob, ...], Field(max_length=100)] = ("events.critical",)
    max_open: Positive = 64
    max_per_connection: Annotated[int, Field(ge=1, le=64)] = 16
    linger_s: Seconds = 60.0


class HubTable(Table):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8765
    max_connections: Positive = 15_000
    backlog: Positive = 4096
    header_max_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 16_384
    handshake_timeout_s: Seconds = 5.0
    inbound_max_bytes: Annotated[int, Field(ge=128, le=2**20)] = 4096
    inbound_max_per_s: Annotated[float, Field(gt=0)] = 100.0
    ring_bytes: Annotated[int, Field(ge=2**18)] = 16 * 2**20
    behind_max_ms: Positive = 5000
    ping_interval_s: Seconds = 20.0
    beat_interval_s: Seconds = 2.0
    prove_interval_s: Seconds = 1.0
    close_timeout_s: Seconds = 2.0
    shutdown_s: Seconds = 2.0


class PublisherTable(Table):
    source: str = "server-a"
    event_type: str = "SERVER_DOWN"
    rate_hz: Annotated[float, Field(gt=0, le=100_000)] = 1.0
    payload_bytes: Annotated[int, Field(ge=0)] = 200
    publish_deadline_s: Seconds = 15.0
    max_unanswered: Positive = 10_000
    start_timeout_s: Seconds = 30.0


class SubscriberTable(Table):
    url: WebSocketUrl = ""
    queue_events: Positive = 4096
    connect_timeout_s: Seconds = 5.0
    reconnect_max_s: Seconds = 5.0


class FleetTable(Table):
    url: WebSocketUrl = ""
    clients: Positive = 50
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    ramp_per_s: Annotated[float, Field(gt=0)] = 1000.0
    drain_s: Seconds = 2.0


class LoadtestTable(Table):
    events: Positive = 50
    rate_hz: Annotated[float, Field(ge=0, le=100_000)] = 10.0
    results: str = "results"
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    start_timeout_s: Seconds = 30.0


class ReportTable(Table):
    timeout_s: Seconds = 30.0
    max_dropped: Count = 0
    max_duplicates: Count = 0
    max_out_of_order: Count = 0
    max_disconnects: Count = 0
    max_p99_ms: Annotated[float, Field(ge=0)] = 0.0


class Settings(BaseSettings):
    """All settings of all parts; frozen."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT, env_nested_delimiter="__"
    )

    event: EventTable = EventTable()
    redis: RedisTable = RedisTable()
    history: HistoryTable = HistoryTable()
    channels: ChannelsTable = ChannelsTable()
    hub: HubTable = HubTable()
    publisher: PublisherTable = PublisherTable()
    subscriber: SubscriberTable = SubscriberTable()
    fleet: FleetTable = FleetTable()
    loadtest: LoadtestTable = LoadtestTable()
    report: ReportTable = ReportTable()

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.hub.ring_bytes < 4 * self.event.max_bytes:
            raise ValueError("hub.ring_bytes must hold at least 4 events of event.max_bytes")
        if self.publisher.payload_bytes > self.event.max_bytes:
            raise ValueError("publisher.payload_bytes must not exceed event.max_bytes")
        if self.redis.silence_timeout_s <= self.redis.ping_interval_s:
            raise ValueError("redis.silence_timeout_s must be longer than redis.ping_interval_s")
        if self.history.dedupe_s <= self.publisher.publish_deadline_s:
            raise ValueError("history.dedupe_s must be longer than publisher.publish_deadline_s")
        if self.fleet.processes > self.fleet.clients:
            raise ValueError("fleet.processes must not exceed fleet.clients")
        return self

    @property
    def hub_url(self) -> str:
        """`http://host:port` at which processes of this machine reach the hub."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.hub.host, self.hub.host)
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.hub.port}"

    @property
    def local_websocket_url(self) -> str:
        return "ws" + self.hub_url.removeprefix("http") + "/ws"

    @property
    def subscriber_url(self) -> str:
        return self.subscriber.url or self.local_websocket_url

    @property
    def fleet_url(self) -> str:
        return self.fleet.url or self.local_websocket_url

"""The tables of broadcaster.toml with their defaults and bounds, typed and frozen."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from broadcaster.core.event import LARGEST_BYTES, MAX_BYTES, channel_name
from broadcaster.core.redaction import split_urls
from broadcaster.settings.secret_files import with_secrets_of_files
from broadcaster.settings.types import (
    Count,
    Glob,
    Origin,
    PemFile,
    Port,
    Positive,
    RunName,
    Seconds,
    Secret,
    Table,
    Token,
    WebSocketUrl,
    is_loopback,
    listening_host,
    only,
)
from broadcaster.settings.urls import (
    joined_urls,
    named_database,
    redis_database,
    redis_url,
    redis_urls,
    with_password,
)

ENVIRONMENT: Final = "BROADCASTER_"
"""Prefix of the environment variables: `BROADCASTER_HUB__PORT`."""


class EventTable(Table):
    channel: Annotated[str, AfterValidator(channel_name)] = "events.critical"
    max_bytes: Annotated[int, Field(ge=256, le=LARGEST_BYTES)] = MAX_BYTES


class RedisTable(Table):
    url: Annotated[str, AfterValidator(redis_url), Field(repr=False)] = "redis://127.0.0.1:6390/0"
    subscribe_url: Annotated[str, BeforeValidator(joined_urls), AfterValidator(redis_urls), Field(repr=False)] = ""
    password: Secret = SecretStr("")
    connect_timeout_s: Seconds = 2.0
    ping_interval_s: Seconds = 0.5
    silence_timeout_s: Seconds = 2.0
    reconnect_max_s: Seconds = 1.0
    replica_lag_max_s: Seconds = 1.0

    @model_validator(mode="after")
    def _agree(self) -> RedisTable:
        ours = redis_database(self.url)
        for url in split_urls(self.subscribe_url) if self.subscribe_url else ():
            if (theirs := named_database(url)) not in (None, ours):
                raise ValueError(
                    f"subscribe_url names database {theirs}, url {ours}: a replica has the numbers of its master"
                )
        return self

    @property
    def command_url(self) -> str:
        """The URL to connect to for commands, with the password."""
        return with_password(self.url, self.password.get_secret_value())

    @property
    def node_urls(self) -> tuple[str, ...]:
        """The URLs at which a hub may subscribe, with the password: replicas of `url`, or that itself."""
        urls = split_urls(self.subscribe_url or self.url)
        return tuple(with_password(url, self.password.get_secret_value()) for url in urls)


class HistoryTable(Table):
    enabled: bool = True
    max_events: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    idle_expire_s: Annotated[int, Field(ge=1, le=31_536_000)] = 86_400
    dedupe_s: Annotated[int, Field(ge=1, le=86_400)] = 60

    @property
    def position_expire_s(self) -> int:
        """Seconds after which the position of a silent channel expires: it outlives the events."""
        return 7 * self.idle_expire_s


class ChannelsTable(Table):
    allow: Annotated[tuple[Glob, ...], Field(max_length=100)] = ("events.*",)
    priority: Annotated[tuple[Glob, ...], Field(max_length=100)] = ("events.critical",)
    drop_oldest: Annotated[tuple[Glob, ...], Field(max_length=100)] = ()
    max_open: Positive = 64
    max_per_connection: Annotated[int, Field(ge=1, le=64)] = 16
    max_per_address: Positive = 32
    linger_s: Seconds = 60.0


class ApiKey(Table):
    """One static API key: its holder, and its rights."""

    name: Annotated[str, AfterValidator(only("A-Za-z0-9._@-", 1, 64))]
    key: Annotated[Secret, Field(min_length=16, max_length=512)]
    subscribe: tuple[Glob, ...] = ()
    publish: tuple[Glob, ...] = ()
    monitor: bool = False

    @field_validator("key")
    @classmethod
    def _no_token(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[A-Za-z0-9_~+/=-]+", key.get_secret_value()):
            raise ValueError("may have A-Z a-z 0-9 _ ~ + / = - only")
        return key


class JwtKey(Table):
    """One key that tokens are signed with: a secret (HS256), or an Ed25519 key as PEM (EdDSA)."""

    algorithm: Literal["HS256", "EdDSA"]
    key: Annotated[Secret, Field(min_length=32)]
    kid: Annotated[str, AfterValidator(only("A-Za-z0-9._-", 0, 64))] = ""


class AuthTable(Table):
    mode: Literal["none", "token"] = "none"
    open_to_network: bool = False
    api_keys: Annotated[tuple[ApiKey, ...], Field(repr=False)] = ()
    jwt_keys: Annotated[tuple[JwtKey, ...], Field(repr=False)] = ()
    issuer: str = ""
    audience: str = "broadcaster"
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 5.0


class HubTable(Table):
    host: Annotated[str, AfterValidator(listening_host), Field(min_length=1)] = "127.0.0.1"
    port: Port = 8765
    processes: Annotated[int, Field(ge=1, le=256)] = 1
    number: Annotated[int, Field(ge=0, le=256)] = 0
    own_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    deployment: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    tls_cert: PemFile = ""
    tls_key: PemFile = ""
    allowed_origins: tuple[Origin, ...] = ()
    max_connections: Positive = 15_000
    max_per_address: Positive = 15_000
    max_handshakes: Positive = 5_000
    handshakes_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = 5_000.0
    requests_per_s: Annotated[float, Field(ge=1, le=1_000_000)] = 500.0
    requests_per_address: Annotated[float, Field(ge=1, le=1_000_000)] = 250.0
    backlog: Positive = 4096
    header_max_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 16_384
    handshake_timeout_s: Seconds = 5.0
    inbound_max_bytes: Annotated[int, Field(ge=128, le=2**20)] = 4096
    inbound_max_per_s: Annotated[float, Field(ge=1)] = 100.0
    compress: bool = True
    compress_min_bytes: Annotated[int, Field(ge=64, le=2**20)] = 1024
    ring_bytes: Annotated[int, Field(ge=2**18)] = 16 * 2**20
    behind_max_ms: Positive = 5000
    behind_max_events: Positive = 50_000
    behind_max_bytes: Annotated[int, Field(ge=2**16)] = 16 * 2**20
    ping_interval_s: Seconds = 20.0
    beat_interval_s: Seconds = 2.0
    prove_interval_s: Seconds = 1.0
    close_timeout_s: Seconds = 2.0
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    shutdown_s: Seconds = 1.0
    trace_events: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000

    @property
    def first_own_port(self) -> int:
        """The port of hub.1 alone, where several hubs share `port`; that of hub.2 is the next one."""
        return self.own_port or self.port + 1000


class PageTable(Table):
    enabled: bool = True


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
    token: Token = SecretStr("")
    tls_ca: PemFile = ""
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
    warmup_events: Annotated[int, Field(ge=0, le=10_000)] = 10
    results: str = "results"
    run: RunName = ""
    start_timeout_s: Seconds = 30.0
    progress: bool = True


class ReportTable(Table):
    timeout_s: Seconds = 30.0
    max_dropped: Count = 0
    max_duplicates: Count = 0
    max_out_of_order: Count = 0
    max_disconnects: Count = 0
    max_p50_ms: Annotated[float, Field(ge=0)] = 0.0
    max_p99_ms: Annotated[float, Field(ge=0)] = 0.0
    max_last_p99_ms: Annotated[float, Field(ge=0)] = 0.0
    allow_invalid: bool = False
    pictures: bool = True


class Settings(BaseSettings):
    """All settings of all parts; frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENVIRONMENT,
        env_nested_delimiter="__",
        hide_input_in_errors=True,
    )

    event: EventTable = EventTable()
    redis: RedisTable = RedisTable()
    history: HistoryTable = HistoryTable()
    channels: ChannelsTable = ChannelsTable()
    auth: AuthTable = AuthTable()
    hub: HubTable = HubTable()
    page: PageTable = PageTable()
    publisher: PublisherTable = PublisherTable()
    subscriber: SubscriberTable = SubscriberTable()
    fleet: FleetTable = FleetTable()
    loadtest: LoadtestTable = LoadtestTable()
    report: ReportTable = ReportTable()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """For programs that build them without `load`: arguments above the environment, which may name files."""
        environment = with_secrets_of_files("environment", env_settings(), SECRETS)
        return init_settings, InitSettingsSource(settings_cls, environment)

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
        if self.auth.mode == "none" and not self.auth.open_to_network and not is_loopback(self.hub.host):
            raise ValueError(
                f"hub.host is {self.hub.host}, which is open to the network, and there is no access control: "
                "set auth.mode to token, or auth.open_to_network to true if everybody may connect"
            )
        if bool(self.hub.tls_cert) != bool(self.hub.tls_key):
            raise ValueError("hub.tls_cert and hub.tls_key belong together")
        if self.hub.processes > 1:
            first, last = self.hub.first_own_port, self.hub.first_own_port + self.hub.processes - 1
            if last > 65_535 or first <= self.hub.port <= last:
                raise ValueError(
                    f"hub.own_port: {self.hub.processes} hubs take the ports {first} to {last} for themselves, "
                    "which have to be below 65536 and to leave hub.port out"
                )
        if self.fleet.processes > self.fleet.clients:
            raise ValueError("fleet.processes must not exceed fleet.clients")
        return self

    def allows(self, channel: str) -> bool:
        """Whether a hub opens a channel that a client asks for."""
        patterns = self.channels.allow
        return channel == self.event.channel or any(fnmatchcase(channel, pattern) for pattern in patterns)

    @property
    def hub_url(self) -> str:
        """`http://host:port` at which processes of this machine reach the hub."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.hub.host, self.hub.host)
        scheme = "https" if self.hub.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.hub.port}"

    @property
    def local_websocket_url(self) -> str:
        return "ws" + self.hub_url.removeprefix("http") + "/ws"

    @property
    def subscriber_url(self) -> str:
        return self.subscriber.url or self.local_websocket_url

    @property
    def fleet_url(self) -> str:
        return self.fleet.url or self.local_websocket_url


SECRETS: Final = frozenset(
    f"{table}.{key}"
    for table, found in Settings.model_fields.items()
    if isinstance(found.annotation, type) and issubclass(found.annotation, Table)
    for key, field in found.annotation.model_fields.items()
    if not field.repr
)
"""The keys, such as `redis.url`, whose values are secret or may have a secret in them."""

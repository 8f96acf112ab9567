"""Typed, frozen settings and where each of them came from.

Five layers, the later one wins:

    defaults < broadcaster.toml < config/<preset>.toml < BROADCASTER_* environment < command line

`broadcaster.toml` explains every key; the defaults here and there are held together by a test.
*Config* always means files, *settings* the typed object.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final
from urllib.parse import urlsplit, urlunsplit

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import TomlConfigSettingsSource as TomlSource

from broadcaster.errors import ConfigurationError, InvalidEvent
from broadcaster.event import check_channel

CONFIG_FILE: Final = "broadcaster.toml"
_ENVIRONMENT: Final = "BROADCASTER_"
_SELECTORS: Final = ("BROADCASTER_CONFIG", "BROADCASTER_PRESET")
"""Variables that choose files; all others with the prefix must name a key."""


def _channel(name: str) -> str:
    try:
        return check_channel(name)
    except InvalidEvent as error:
        raise ValueError(error.detail) from None


def _redis_url(url: str) -> str:
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    return url


def _websocket_url(url: str) -> str:
    if url and urlsplit(url).scheme not in ("ws", "wss"):
        raise ValueError("must begin with ws:// or wss://, or be empty for the local hub")
    return url


Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
WebSocketUrl = Annotated[str, AfterValidator(_websocket_url)]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EventTable(Table):
    channel: Annotated[str, AfterValidator(_channel)] = "events.critical"
    max_bytes: Annotated[int, Field(ge=256, le=16 * 2**20)] = 65_536


class RedisTable(Table):
    url: Annotated[str, AfterValidator(_redis_url), Field(repr=False)] = "redis://127.0.0.1:6390/0"
    connect_timeout_s: Seconds = 2.0
    ping_interval_s: Seconds = 0.5
    silence_timeout_s: Seconds = 2.0
    reconnect_max_s: Seconds = 1.0


class HubTable(Table):
    host: str = "127.0.0.1"
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
    close_timeout_s: Seconds = 2.0
    shutdown_s: Seconds = 2.0


class PublisherTable(Table):
    source: str = "server-a"
    event_type: str = "SERVER_DOWN"
    rate_hz: Annotated[float, Field(gt=0, le=100_000)] = 1.0
    payload_bytes: Annotated[int, Field(ge=0)] = 200
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
        frozen=True, extra="forbid", env_prefix=_ENVIRONMENT, env_nested_delimiter="__"
    )
    _layers: ClassVar[tuple[PydanticBaseSettingsSource, ...]] = ()

    event: EventTable = EventTable()
    redis: RedisTable = RedisTable()
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """The effective settings, and per key (`hub.port`) the layer it came from."""

    settings: Settings
    origins: Mapping[str, str]


def load(
    *,
    config: Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Loaded:
    """Read all layers.

    Args:
        config: The TOML file; None takes `$BROADCASTER_CONFIG`, or `broadcaster.toml` in the current
            folder if there is one, or defaults only.
        preset: Name of a file in the folder `config/` beside it; None takes `$BROADCASTER_PRESET`, or none.
        overrides: The command line's layer: table → key → value.

    Raises:
        ConfigurationError: A named file is missing or no TOML, a key or variable is unknown, a value is bad.
    """
    _refuse_unknown_variables()
    files = _config_files(config, preset)
    layers: list[tuple[str, Mapping[str, Any]]] = []

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            from_files = [TomlSource(settings_cls, file) for file in files]
            layers.append(("command line", init_settings()))
            layers.append(("environment", env_settings()))
            layers.extend((file.name, source()) for file, source in zip(files, from_files, strict=True))
            return (init_settings, env_settings, *from_files)

    try:
        settings = Layered(**(overrides or {}))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError(_explain(error, layers)) from None
    except ValueError as error:  # TOMLDecodeError, and an environment value that is no JSON table
        raise ConfigurationError(str(error)) from None
    return Loaded(settings, {key: _origin(key, layers) for key, _ in _flatten(settings.model_dump())})


def dump(settings: Settings, origins: Mapping[str, str] | None = None) -> str:
    """The settings as TOML, the password of `redis.url` struck out, each line with its origin if given."""
    tables = settings.model_dump()
    tables["redis"]["url"] = redact(settings.redis.url)
    text = tomli_w.dumps(tables)
    if origins is None:
        return text
    lines, table = [], ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            table = heading[1]
        key = line.partition(" = ")[0]
        origin = origins.get(f"{table}.{key}")
        lines.append(f"{line:<44} # {origin}" if origin else line)
    return "\n".join(lines) + "\n"


def redact(url: str) -> str:
    """The URL without its password, for logs and archives."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def assignment(text: str) -> dict[str, dict[str, str]]:
    """Read `table.key=value`, as `--set` takes it.

    Raises:
        ConfigurationError: If `text` has another form.
    """
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
    if not match:
        raise ConfigurationError(f"--set takes table.key=value, got {text!r}")
    return {match[1]: {match[2]: match[3]}}


def _config_files(config: Path | None, preset: str | None) -> list[Path]:
    """The preset's file, if any, before the base file, if any: the order of pydantic's sources."""
    named = config or (Path(value) if (value := os.environ.get("BROADCASTER_CONFIG")) else None)
    base = named or Path(CONFIG_FILE)
    files = []
    if preset := preset or os.environ.get("BROADCASTER_PRESET"):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", preset):
            raise ConfigurationError(f"a preset is a name such as 'burst', got {preset!r}")
        file = base.parent / "config" / f"{preset}.toml"
        if not file.is_file():
            known = ", ".join(sorted(other.stem for other in file.parent.glob("*.toml"))) or "none"
            raise ConfigurationError(f"preset {preset!r}: there is no {file} (presets there: {known})")
        files.append(file)
    if base.is_file():
        files.append(base)
    elif named:
        raise ConfigurationError(f"there is no config file {base}")
    return files


def _refuse_unknown_variables() -> None:
    keys = {key.replace(".", "__").upper() for key, _ in _flatten(Settings.model_construct().model_dump())}
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith(_ENVIRONMENT) or name in _SELECTORS:
            continue
        if name.removeprefix(_ENVIRONMENT) not in keys:
            raise ConfigurationError(f"unknown environment variable {variable} (see broadcaster config show)")


def _flatten(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for table, keys in tables.items():
        for key, value in keys.items():
            yield f"{table}.{key}", value


def _origin(key: str, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    table, name = key.split(".")
    for layer, tables in layers:
        if isinstance(tables.get(table), Mapping) and name in tables[table]:
            if layer == "environment":
                return f"{_ENVIRONMENT}{table}__{name}".upper()
            return layer
    return "default"


def _explain(error: ValidationError, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    """One line per problem: which key, what is wrong, what was given, where it was given."""
    lines = []
    for problem in error.errors(include_url=False):
        where = [str(part) for part in problem["loc"][:2]]
        message = problem["msg"].removeprefix("Value error, ")
        if not where:
            lines.append(message)
        elif problem["type"] == "extra_forbidden":
            origin = _origin(".".join(where), layers) if len(where) == 2 else _table_origin(where[0], layers)
            kind = "key" if len(where) == 2 else "table"
            lines.append(f"{'.'.join(where)}: no such {kind} (from {origin})")
        else:
            given = repr(problem.get("input"))[:80]
            if where == ["redis", "url"]:
                given = "a value that may hold a password"
            origin = _origin(".".join(where), layers) if len(where) == 2 else _table_origin(where[0], layers)
            lines.append(f"{'.'.join(where)}: {message} (got {given}, from {origin})")
    return "\n".join(lines)


def _table_origin(table: str, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    return next((layer for layer, tables in layers if table in tables), "default")

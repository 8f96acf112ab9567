"""The layers of the settings: files, environment and command line, one above the other."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomli_w
from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.files import STARTER
from broadcaster.core.redaction import HIDDEN, redact, scrub
from broadcaster.settings.secret_files import FILE, with_secrets_of_files
from broadcaster.settings.tables import ENVIRONMENT, SECRETS, Settings
from broadcaster.settings.wording import QUOTED, did_you_mean, in_words, is_quoted, place

log = logging.getLogger("broadcaster")

_OF_A_SERVICE: Final = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)"
).fullmatch
_URL_OF_A_SERVICE: Final = re.compile(r"(tcp|udp|sctp)://").match

CONFIG_FILE: Final = "broadcaster.toml"
TRACEBACK: Final = "BROADCASTER_TRACEBACK"
"""If this variable is set, an unforeseen error shows its traceback."""

_SELECTORS: Final = ("BROADCASTER_CONFIG", "BROADCASTER_PRESET", TRACEBACK)
"""Variables that choose files, or what is shown; all others with the prefix must name a key."""

_NAME: Final = re.compile(r"[a-z][a-z_]{0,39}").fullmatch
"""What looks like a key; a secret in the place of one is not shown."""

_HARMLESS_URL: Final = re.compile(r"'[a-z]+://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/ws)?/?'").fullmatch


@dataclass(frozen=True, slots=True)
class Loaded:
    """The effective settings, per key (`hub.port`) the layer it came from, and the files that were read."""

    settings: Settings
    origins: Mapping[str, str]
    files: tuple[Path, ...]


def load(
    *,
    config: Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> Loaded:
    """Read all layers.

    Args:
        config: The TOML file; None takes `$BROADCASTER_CONFIG`, or `broadcaster.toml` in the current
            folder if there is one, or defaults only.
        preset: Name of a file in the folder `config/` beside it, or in that of this package; None takes
            `$BROADCASTER_PRESET`, or none.
        overrides: The command line's layer: table → key → value.
        strict: Whether an unknown variable is an error. Else it is logged: a program that has this package as a
            library does not end for it.

    Raises:
        ConfigurationError: A named file is missing or no TOML, a key or variable is unknown, a value is bad.
    """
    _check_variables(strict)
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
            from_files = [(file.name, _read(settings_cls, file)) for file in files]
            for name, source in (("command line", init_settings), ("environment", env_settings), *from_files):
                tables = source()
                if name == "environment":  # what is in it, and unknown, has been told
                    tables = _known_keys(tables)
                layers.append((name, with_secrets_of_files(name, tables, SECRETS)))
            return tuple(InitSettingsSource(settings_cls, dict(tables)) for _, tables in layers)

    try:
        settings = Layered(**(overrides or {}))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError(_explain(error, layers)) from None
    except ValueError as error:  # an environment value that is no JSON table
        raise ConfigurationError(str(error)) from None
    origins = {key: _origin(key, layers) for key, _ in _flatten(settings.model_dump())}
    return Loaded(settings, origins, tuple(files))


def dump(settings: Settings, origins: Mapping[str, str] | None = None) -> str:
    """The settings as TOML, with passwords, keys and tokens redacted, each line with its origin if given."""
    text = tomli_w.dumps(_without_secrets(settings.model_dump()))
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


def _without_secrets(value: Any) -> Any:
    """A copy of tables, lists and values in which every secret is redacted."""
    if isinstance(value, SecretStr):
        return HIDDEN if value.get_secret_value() else ""
    if isinstance(value, str):
        return redact(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def assignment(text: str) -> dict[str, dict[str, Any]]:
    """Parse `table.key=value`, as `--set` takes it; a list is written as in JSON.

    Raises:
        ConfigurationError: `text` has another form.
    """
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
    if not match:
        named = re.split(r"[=:\s]", text, maxsplit=1)[0]  # what comes after it may be secret
        raise ConfigurationError(f"--set takes table.key=value, got {named!r}{' ...' if named != text else ''}")
    value: Any = match[3]
    if value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # what is no list is refused later
            value = json.loads(value)
    return {match[1]: {match[2]: value}}


def _read(settings_cls: type[BaseSettings], file: Path) -> InitSettingsSource:
    try:
        data = file.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigurationError(f"{file} is UTF-16: save it as UTF-8")
        return InitSettingsSource(settings_cls, tomllib.loads(data.decode("utf-8-sig")))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is no UTF-8, at byte {error.start}") from None
    except ValueError as error:
        raise ConfigurationError(f"{file}: {error}") from None


def _config_files(config: Path | None, preset: str | None) -> list[Path]:
    """The preset's file, if any, before the base file, if any: the order of pydantic's sources."""
    named = config or (Path(value) if (value := os.environ.get("BROADCASTER_CONFIG")) else None)
    base = named or Path(CONFIG_FILE)
    files = []
    if preset := preset or os.environ.get("BROADCASTER_PRESET"):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", preset):
            hint = f": {QUOTED}" if is_quoted(preset) else ""
            raise ConfigurationError(f"a preset is a name such as burst, got {preset!r}{hint}")
        folders = (base.parent / "config", STARTER / "config")
        presets = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.toml")}
        if preset not in presets:
            known = ", ".join(sorted(presets))
            there = f"there is no {folders[0] / preset}.toml (known: {known})"
            raise ConfigurationError(f"preset {preset!r}: {there}{did_you_mean(preset, presets, cutoff=0.6)}")
        files.append(presets[preset])
    try:
        if base.is_file():
            files.append(base)
        elif named:
            raise ConfigurationError(f"{base} is no file" if base.exists() else f"there is no config file {base}")
    except OSError as error:  # its folder may not be looked into
        raise ConfigurationError(f"{base} cannot be read: {error.strerror}") from None
    return files


def _refuse_no_list(key: str, variable: str, text: str) -> None:
    """Refuse a value that is no JSON list; the library's own error does not name the key."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), list):
            return
    given = "a value that may be secret" if _may_be_secret(key.split(".")) else repr(scrub(text)[:80])
    raise ConfigurationError(f"{key}: should be a list as in JSON (got {given}, from {variable})")


def _check_variables(strict: bool) -> None:
    """Refuse variables with our prefix that name no key. Without `__` they are not ours, but for near misses."""
    defaults = dict(_flatten(Settings.model_construct().model_dump()))
    lists = {key for key, value in defaults.items() if isinstance(value, tuple)}
    keys = {key.replace(".", "__").upper() for key in defaults}
    tables = {key.partition(".")[0].upper() for key in defaults}
    files = {f"{key}{FILE}".replace(".", "__").upper() for key in SECRETS}
    known = {*_SELECTORS, *(f"{ENVIRONMENT}{key}" for key in keys | files)}
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith(ENVIRONMENT) or name in _SELECTORS or _is_of_a_service(name, os.environ[variable]):
            continue
        if name not in known:
            suggestion = did_you_mean(name, known)
            if suggestion or "__" in name or name.removeprefix(ENVIRONMENT) in tables:
                unknown = f"unknown environment variable {variable}"
                unknown += suggestion or " (see broadcaster config show)"
                if strict:
                    raise ConfigurationError(unknown)
                log.warning("%s", unknown)
            continue
        key = name.removeprefix(ENVIRONMENT).lower().replace("__", ".")
        if is_quoted(os.environ[variable]) and key != "redis.password":  # which may be any text
            raise ConfigurationError(f"{key}: {QUOTED} (from {variable})")
        if key in lists:
            _refuse_no_list(key, variable, os.environ[variable])


def _known_keys(tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those keys of some tables that there are."""
    known = {*dict(_flatten(Settings.model_construct().model_dump())), *(f"{key}{FILE}" for key in SECRETS)}
    tables = {table: keys for table, keys in tables.items() if isinstance(keys, Mapping)}
    return {
        table: {key: value for key, value in keys.items() if f"{table}.{key}" in known}
        for table, keys in tables.items()
    }


def _is_of_a_service(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker has set it: in every container, for a service that is called `broadcaster…`."""
    is_url = name.endswith("_PORT") and _URL_OF_A_SERVICE(value)
    return "__" not in name and bool(is_url or _OF_A_SERVICE(name))


def _flatten(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for table, keys in tables.items():
        for key, value in keys.items():
            yield f"{table}.{key}", value


def _origin(key: str, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    table, _, name = key.partition(".")  # a key in quotes may have another point
    for layer, tables in layers:
        if isinstance(tables.get(table), Mapping) and name in tables[table]:
            return _variable_of(table, name) if layer == "environment" else layer
    return "default"


def _variable_of(table: str, name: str) -> str:
    """The environment variable that this key came from."""
    variable = f"{ENVIRONMENT}{table}__{name}".upper()
    of_file = f"{variable}{FILE.upper()}"
    return of_file if of_file in {other.upper() for other in os.environ} else variable


def _explain(error: ValidationError, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    """One line per key that is wrong: what is wrong, what was given, where it was given."""
    lines: dict[object, str] = {}
    for problem in error.errors(include_url=False):
        where = [str(part) for part in problem["loc"][:2]]
        message = in_words(problem)
        if not where:
            lines[message] = message + _where_from(message, layers)
        elif tuple(where) not in lines:  # the first item of a list that is wrong
            origin = _origin(".".join(where), layers) if len(where) == 2 else _table_origin(where[0], layers)
            if problem["type"] == "extra_forbidden":
                lines[tuple(where)] = _unknown(problem["loc"], origin)
                continue
            whole = repr(problem.get("input"))
            given = whole[:80]
            if _may_be_secret(where) and not _HARMLESS_URL(given):
                given = "a value that may be secret"
            elif scrub(whole) != whole:  # a secret that was put into another key, which would be shown in part
                given, message = "a value that may be secret", message.partition(", got ")[0]
            else:
                message = message.removesuffix(f", got {whole}")  # once is enough
            lines[tuple(where)] = f"{place(problem['loc'])}: {message} (got {given}, from {origin})"
    return "\n".join(lines.values())


def _unknown(where: tuple[str | int, ...], origin: str) -> str:
    """What is said of a name that is none of ours; what is no name may be a secret."""
    keys = dict(_flatten(Settings.model_construct().model_dump()))
    names = [str(part) if isinstance(part, int) or _NAME(part) else HIDDEN for part in where]
    if len(where) > 2:
        return f"{place((*where[:2], *where[2:-1]))}: no such key: {names[-1]} (from {origin})"
    named = ".".join(names)
    known = keys if len(where) == 2 else {key.partition(".")[0] for key in keys}
    kind = "key" if len(where) == 2 else "table"
    return f"{named}: no such {kind} (from {origin}){did_you_mean(named, known, cutoff=0.6)}"


def _where_from(message: str, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Where the keys that a message names have their values from."""
    keys = dict(_flatten(Settings.model_construct().model_dump()))
    named = [key for key in dict.fromkeys(re.findall(r"[a-z]+\.[a-z_]+", message)) if key in keys]
    origins = {key: _origin(key, layers) for key in named}
    return f" ({', '.join(f'{key} from {origin}' for key, origin in origins.items())})" if named else ""


def _may_be_secret(where: list[str]) -> bool:
    """Whether the value of this key, or a table with such values in it, must not be shown."""
    return any(secret.split(".")[: len(where)] == where for secret in SECRETS)


def _table_origin(table: str, layers: list[tuple[str, Mapping[str, Any]]]) -> str:
    return next((layer for layer, tables in layers if table in tables), "default")

"""Secrets from files: in every layer `KEY_file` names a file that holds the value of KEY.

`BROADCASTER_SUBSCRIBER__TOKEN_FILE=/run/secrets/token`, `token_file = "/run/secrets/token"`; also of each key in a
list: `{ kid = "2026", key_file = "/run/secrets/jwt.pem" }`. So for all keys that may be secret, and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.redaction import hide, hide_url

FILE: Final = "_file"

_LARGEST_BYTES: Final = 2**20
_LISTS: Final = ("auth.api_keys", "auth.jwt_keys")


def with_secrets_of_files(layer: str, tables: Mapping[str, Any], secrets: Iterable[str]) -> dict[str, Any]:
    """The tables of a layer, with the contents of the files that it names; from now on all of them are hidden.

    Args:
        layer: Its name, for messages.
        tables: Table → key → value, of whatever shape.
        secrets: The keys, such as `redis.url`, that may be secret.

    Raises:
        ConfigurationError: A file cannot be read, or there is a value beside it; nothing of its text is shown.
    """
    found = {
        name: dict(table) if isinstance(table, Mapping) else table
        for name, table in tables.items()
    }  # fmt: skip
    for key in secrets:
        table, name = key.split(".")
        if isinstance(values := found.get(table), dict):
            _replace(values, name, key, layer)
            if key in _LISTS:
                values.update(_with_keys(values, name, key, layer))
            if name in values:
                _hide_all(values[name])
        elif isinstance(values, str):
            _hide_all(values)
    return found


def _with_keys(values: dict[str, Any], name: str, key: str, layer: str) -> dict[str, Any]:
    """The list of keys, with those that stand in files of their own; the list itself, as JSON, may be in one."""
    items = values.get(name)
    if isinstance(items, str):
        try:
            items = json.loads(items)
        except (ValueError, RecursionError):
            raise ConfigurationError(f"{key}: is no list as in JSON (from {layer})") from None
    if not isinstance(items, list):
        return {}
    copies = [dict(item) if isinstance(item, dict) else item for item in items]
    for copy in copies:
        if isinstance(copy, dict):
            _replace(copy, "key", f"{key}: key", layer)
    return {name: copies}


def _replace(values: dict[str, Any], name: str, key: str, layer: str) -> None:
    """Put the text of a file in the place of its name."""
    if name + FILE not in values:
        return
    path = values.pop(name + FILE)
    if name in values:
        raise ConfigurationError(f"{key} and {key}{FILE} are both given (from {layer}): give one")
    values[name] = _read(path, key, layer)


def _read(path: object, key: str, layer: str) -> str:
    try:
        # Where the secret itself was given instead of its file, it must not be shown: no path here.
        if not isinstance(path, str) or not path.strip():
            raise ValueError("it is no name of a file")
        with Path(path.strip()).expanduser().open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
        if len(data) > _LARGEST_BYTES:
            raise ValueError("it is larger than 1 MiB")
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except OSError as error:
        why = error.strerror or type(error).__name__
    except (ValueError, RuntimeError) as error:
        why = "it is no name of a file" if "null" in str(error) else str(error)
    else:
        if text:
            return text
        why = "it is empty"
    raise ConfigurationError(f"{key}{FILE}: the file cannot be read: {why} (from {layer})")


def _hide_all(value: Any) -> None:
    """Every secret in a value of whatever shape, valid or not."""
    if isinstance(value, str):
        if "://" in value:
            hide_url(value)
        else:
            hide(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("name", "kid", "algorithm", "subscribe", "publish"):
                _hide_all(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _hide_all(item)

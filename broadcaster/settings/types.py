"""The types of the keys: bounds, what may be written, and what is never shown."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from broadcaster.core.redaction import legal_token
from broadcaster.settings.origin import canonical_pattern
from broadcaster.settings.urls import websocket_url


def _optional_websocket_url(url: str) -> str:
    return websocket_url(url) if url.strip() else ""


def _stripped(secret: object) -> object:
    """A secret that was read from a file ends with a newline."""
    if isinstance(secret, SecretStr):
        secret = secret.get_secret_value()
    return secret.strip() if isinstance(secret, str) else secret


def _pem_file(name: str) -> str:
    if "-----BEGIN" in name:
        raise ValueError("takes the name of a PEM file, not what is in it")
    return name


def _token(token: SecretStr) -> SecretStr:
    return SecretStr(legal_token(token.get_secret_value()))


def only(characters: str, shortest: int, longest: int) -> Callable[[str], str]:
    """A check of a name; `characters` as a regular expression has them between brackets."""
    fits = re.compile(rf"[{characters.replace('[]', re.escape('[]'))}]{{{shortest},{longest}}}").fullmatch
    shown = " ".join(["A-Z", "a-z", "0-9", *characters.removeprefix("A-Za-z0-9")])

    def check(name: str) -> str:
        if not fits(name):
            raise ValueError(f"should be {shortest} to {longest} of {shown}")
        return name

    return check


def _run_name(name: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?", name) or name == "archive.csv":
        raise ValueError(
            "should be a name for a folder, of A-Z a-z 0-9 . _ - only, at most 64 long, not beginning with a point"
        )
    return name


Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Glob = Annotated[str, AfterValidator(only("A-Za-z0-9._:*?[]!-", 1, 128))]
PemFile = Annotated[str, AfterValidator(_pem_file)]
Origin = Annotated[str, AfterValidator(canonical_pattern)]

# What may hold a secret has no `repr`: these keys can be read from a file, and their values are never shown.
WebSocketUrl = Annotated[str, AfterValidator(_optional_websocket_url), Field(repr=False)]
Secret = Annotated[SecretStr, BeforeValidator(_stripped), Field(repr=False)]
Token = Annotated[Secret, AfterValidator(_token)]
RunName = Annotated[str, AfterValidator(_run_name)]


def listening_host(host: str) -> str:
    """A name or an address to listen on; one of IPv6 also in brackets, as a URL has it."""
    host = host.strip()
    try:
        if host[:1] == "[" and host[-1:] == "]":
            return str(ipaddress.IPv6Address(host[1:-1]))
        if "[" not in host and "]" not in host:
            return host
    except ValueError:
        pass
    raise ValueError("should be a name or an address, such as 127.0.0.1 or ::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address of this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Table(BaseModel):
    # An input that is refused may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

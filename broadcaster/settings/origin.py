"""The origin of a request (RFC 6454): the site of the page on whose behalf a browser connects."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}

_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*").fullmatch

ANY: Final = "*"
NO_SITE: Final = "null"
"""The origin of a page without a site, such as a file."""


def canonical_origin(text: str) -> str:
    """An origin in one of its many forms, such as `https://wall.example`.

    Scheme and host are in small letters, an international name is in ASCII, and a port that the scheme has anyway
    is left out. `file://` has no host, `localhost:8765` (some libraries say so) no scheme.

    Raises:
        ValueError: It is no origin.
    """
    if text == NO_SITE:
        return text
    before, mark, rest = text.partition("://")
    scheme, address = (before.lower(), rest) if mark else ("", text)
    if mark and not _SCHEME(scheme):
        raise ValueError(f"{text!r} has no valid scheme")
    if mark and not address and scheme not in _DEFAULT_PORTS:
        return f"{scheme}://"
    if not address or any(character in "/?#@\\,*" or character.isspace() for character in address):
        raise ValueError(f"{text!r} is not of the form scheme://host or scheme://host:port")
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "", parts.port
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
    except ValueError:
        raise ValueError(f"{text!r} has no valid host and port") from None
    if not name or (not mark and port is None):
        raise ValueError(f"{text!r} has no scheme, such as https://{text}")
    shown_port = "" if port is None or port == _DEFAULT_PORTS.get(scheme) else f":{port}"
    return f"{scheme}{mark}{name}{shown_port}"


def canonical_pattern(text: str) -> str:
    """What `hub.allowed_origins` may have, in one of its many forms: an origin, `*`, or `https://*.example.com`.

    Raises:
        ValueError: No origin can match.
    """
    text = text.strip()
    if text == ANY:
        return text
    before, mark, rest = text.partition("://")
    one_label = rest.startswith("*.")
    if rest.endswith("/") and rest.rstrip("/"):
        rest = rest.removesuffix("/")
    origin = canonical_origin(f"{before}{mark}{rest.removeprefix('*.')}")
    return origin.replace("://", "://*.", 1) if one_label else origin


def matches(origin: str, patterns: tuple[str, ...]) -> bool:
    """Whether a canonical origin is one of some canonical patterns; `*.` stands for one label."""
    scheme, mark, address = origin.partition("://")
    label, dot, rest = address.partition(".")
    return origin in patterns or bool(label and dot and f"{scheme}{mark}*.{rest}" in patterns)


def is_own(origin: str, host: str) -> bool:
    """Whether a canonical origin is the site to whose `Host` the request was sent, over whatever of HTTP."""
    scheme, mark, _ = origin.partition("://")
    if mark and scheme not in _DEFAULT_PORTS:
        return False
    try:
        return canonical_origin(f"{scheme}://{host}" if mark else host) == origin
    except ValueError:
        return False

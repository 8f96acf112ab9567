"""The URLs of the settings: what cannot be parsed with certainty, or would be ignored, is refused by name.

No message shows anything of the URL but the names of options.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote

from broadcaster.core.redaction import PERCENT_ENCODE, hide_url, split_url, split_urls

_NUMBER: Final = re.compile(r"[0-9]{1,6}").fullmatch
_YES_OR_NO: Final = re.compile(r"true|false|yes|no|1|0", re.IGNORECASE).fullmatch
_VERIFY: Final = re.compile(r"none|optional|required").fullmatch

Check = Callable[[str], object]

_OPTIONS: Final[Mapping[str, tuple[Check, str]]] = {
    "db": (_NUMBER, "the number of a database"),
    "username": (bool, "a name"),
    "password": (bool, "a password"),
    "ssl_cert_reqs": (_VERIFY, "none, optional or required"),
    "ssl_check_hostname": (_YES_OR_NO, "true or false"),
    "ssl_ca_certs": (bool, "a PEM file"),
    "ssl_ca_path": (bool, "a folder of certificates"),
    "ssl_certfile": (bool, "a PEM file"),
    "ssl_keyfile": (bool, "a PEM file"),
    "ssl_password": (bool, "the password of ssl_keyfile"),
}
"""The options of a Redis URL: what they take."""

_PASSWORDS: Final = {"password", "ssl_password"}

_PLAIN: Final = re.compile(r"([^+%]|%[0-9A-Fa-f]{2})*").fullmatch
"""A query without a + (which would be a space), and in which each % begins an escape."""

_INSTEAD: Final = {
    "socket_timeout": "redis.silence_timeout_s",
    "socket_connect_timeout": "redis.connect_timeout_s",
    "timeout": "redis.connect_timeout_s",
    "health_check_interval": "redis.ping_interval_s",
}
"""Settings that stand for options of other clients."""


def redis_url(url: str) -> str:
    """Check redis://, rediss:// or unix://; return it without surrounding white space.

    Raises:
        ValueError: It cannot be parsed with certainty, or has an option that would be ignored.
    """
    url = url.strip()
    parts = _split(url, "redis", "rediss", "unix")
    if parts.fragment or url.endswith("#"):
        raise ValueError(f"has a #, which begins a fragment: {PERCENT_ENCODE}")
    options = parse_qsl(parts.query, keep_blank_values=True)
    names = [name for name, _ in options]
    if _PASSWORDS & set(names) and not (_OPTIONS.keys() >= set(names) and _PLAIN(parts.query)):
        raise ValueError(f"has a password that may go on behind a & or a +, or has a % in it: {PERCENT_ENCODE}")
    for name, value in options:
        _check_option(name, value)
        if names.count(name) > 1:
            raise ValueError(f"has the option {name} more than once")
        if name.startswith("ssl_") and parts.scheme != "rediss":
            raise ValueError(f"has the option {name}, which is for rediss:// only")
    if parts.scheme == "unix":
        if not parts.path or parts.netloc.rpartition("@")[2]:  # what stands there would be ignored
            raise ValueError("has no path of a socket, such as unix:///run/redis.sock")
        return url
    database = re.fullmatch(r"/?([0-9]{0,6})/?", parts.path)
    if not database:
        raise ValueError("has something behind the host that is no number of a database, such as /0")
    if database[1] and int(dict(options).get("db", database[1])) != int(database[1]):
        raise ValueError("has two databases, in the path and as the option db")
    return url


def joined_urls(urls: object) -> object:
    """A list of URLs, also as JSON, as one text with commas between them; all else as it is."""
    if isinstance(urls, str) and urls.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # what is no list is no URL either
            urls = json.loads(urls)
    if isinstance(urls, list | tuple) and all(isinstance(url, str) for url in urls):
        return ",".join(urls)
    return urls


def redis_urls(urls: str) -> str:
    """Check several URLs with commas between them, each as `redis_url` does, or none; return them without spaces.

    Raises:
        ValueError: One of them is not valid, or stands there twice.
    """
    if not urls.strip():
        return ""
    checked = [redis_url(url) for url in split_urls(urls.strip())]
    if len(set(checked)) < len(checked):
        raise ValueError("has the same URL twice")
    return ",".join(checked)


def named_database(url: str) -> int | None:
    """The number of the database that a valid URL of Redis names; None if it names none."""
    parts = split_url(url)
    in_path = "" if parts.scheme == "unix" else parts.path.strip("/")
    number = in_path or dict(parse_qsl(parts.query)).get("db")
    return None if number is None else int(number)


def redis_database(url: str) -> int:
    """The same; 0 if it names none."""
    return named_database(url) or 0


def redis_server(url: str) -> str:
    """Where the server of a valid URL of Redis listens, with no user and no password: `host:port`, or a path."""
    parts = split_url(url)
    if parts.scheme == "unix":
        return parts.path
    host = "127.0.0.1" if parts.hostname in (None, "localhost") else parts.hostname
    return f"{host}:{parts.port or 6379}"


def _check_option(name: str, value: str) -> None:
    if name not in _OPTIONS:
        shown = name if re.fullmatch(r"[a-z_]{1,32}", name) else "an option"
        instead = f" (the setting is {_INSTEAD[name]})" if name in _INSTEAD else ""
        raise ValueError(f"has {shown}, which is not taken here{instead}; options are {', '.join(_OPTIONS)}")
    check, takes = _OPTIONS[name]
    if not check(value):
        raise ValueError(f"has a wrong {name}: it takes {takes}")


def websocket_url(url: str) -> str:
    """Check ws:// or wss://; return it without surrounding white space.

    Raises:
        ValueError: It cannot be parsed with certainty, or a client could not connect to it.
    """
    url = url.strip()
    parts = _split(url, "ws", "wss")
    if parts.fragment or url.endswith("#"):
        raise ValueError("has a #, which begins a fragment: write %23, or leave it out")
    if parts.username is not None and parts.password is None:
        raise ValueError("has a user without a password")
    return url


def _split(url: str, *schemes: str) -> SplitResult:
    hide_url(url)
    if url.partition("://")[0].lower() not in schemes or "://" not in url:
        raise ValueError("must begin with " + " or ".join(f"{scheme}://" for scheme in schemes))
    parts = split_url(url)
    if parts.scheme != "unix":
        if not parts.hostname:
            raise ValueError("has no host")
        try:
            unquote(parts.hostname).encode("idna")
        except UnicodeError:
            raise ValueError("has no valid host") from None
    return parts


def without_credentials(url: str) -> str:
    """A valid URL of Redis, or several, without users and passwords: what is left says where it is, and how."""
    if len(urls := split_urls(url)) > 1:
        return ",".join(map(without_credentials, urls))
    parts = split_url(url)
    pairs = [pair for pair in parts.query.split("&") if pair.partition("=")[0] not in _PASSWORDS | {"username"}]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="&".join(pairs)).geturl()


def with_password(url: str, password: str) -> str:
    """A Redis URL with this password, if it has none of its own."""
    scheme, mark, rest = url.partition("://")
    parts = split_url(url)
    if not password or not url or parts.password or "password" in dict(parse_qsl(parts.query)):
        return url
    user, _, address = rest.rpartition("@") if "@" in parts.netloc else ("", "", rest)
    return f"{scheme}{mark}{user.partition(':')[0]}:{quote(password, safe='')}@{address}"

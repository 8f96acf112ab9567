"""Text that leaves the process: without control characters on a terminal, without passwords in a log."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit, urlunsplit

_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def escaped(text: str) -> str:
    r"""`text` with its control characters, newline excepted, written as escapes such as `\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def printable(text: str) -> str:
    """`text` with a question mark for each character that cannot be printed."""
    return "".join(character if character.isprintable() else "?" for character in text)


def printable_or_repr(text: str) -> str:
    """`text`, or its `repr` if it holds a character that cannot be printed."""
    return text if text.isprintable() else repr(text)


def redact(url: str) -> str:
    """The URL without its password, for logs and archives."""
    parts = urlsplit(url)
    if parts.password is None and "password=" not in parts.query.lower():
        return url
    user, at, address = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:***{at}{address}" if ":" in user else parts.netloc
    query = re.sub(r"(?i)((?:^|&)password=)[^&]*", r"\1***", parts.query)
    return urlunsplit(parts._replace(netloc=netloc, query=query))

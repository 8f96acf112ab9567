"""Text for people: nothing of it drives a terminal, and an error of a connection is said in words."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from typing import Any, Final

from broadcaster.core.errors import InvalidEvent

_CONTROL: Final = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f"  # control characters, newline excepted
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what reverses the text around it
    r"\u2028\u2029\ufeff\ud800-\udfff]"  # line separators, byte-order mark, halves of a surrogate pair
)

_OF_OPENSSL: Final = re.compile(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$")
_NO_PEM: Final = re.compile(r"PEM lib|no certificate or crl found|no start line", re.IGNORECASE)


def escaped(text: str) -> str:
    r"""`text` with its control characters, newline excepted, written as escapes such as `\x1b`.

    So are characters that reverse the text around them, and whatever else would not show what is there.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def printable(text: str) -> str:
    """`text` with a question mark for each character that cannot be printed."""
    return "".join(character if character.isprintable() else "?" for character in text)


def printable_or_repr(text: str) -> str:
    """`text`, or its `repr` if it holds a character that cannot be printed."""
    return text if text.isprintable() else repr(text)


def reason(error: Exception) -> str:
    """Why a connection failed, in the system's words, without its number and the address."""
    numbers = re.findall(r"\[Errno (\d+)\]", str(error))  # asyncio tries each address, and joins what it gets
    if (
        isinstance(error, OSError)
        and not isinstance(error, ssl.SSLError | socket.gaierror)
        and (error.errno or numbers)
    ):
        words = ", ".join(dict.fromkeys(map(os.strerror, [error.errno] if error.errno else map(int, numbers))))
    elif isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        words = error.strerror
    elif isinstance(error, ssl.SSLError):
        words = _OF_OPENSSL.sub("", str(error))
        words = "there is no certificate in it as PEM" if _NO_PEM.search(words) else words
    else:
        words = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return words if words[1:2].isupper() else words[:1].lower() + words[1:]


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object from outside; no key may occur twice.

    Args:
        text: JSON.
        what: Its name in an error, such as `the body`.

    Raises:
        InvalidEvent: It is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            raise InvalidEvent("duplicate_key", f"{what} has a key twice in one object")
        return fields

    try:
        fields = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise InvalidEvent("too_deep", f"{what} is nested too deeply") from None
    except ValueError as error:
        raise InvalidEvent("not_json", f"{what} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidEvent("not_object", f"{what} must be a JSON object")
    return fields

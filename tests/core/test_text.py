"""Text for people: nothing of it drives a terminal, and an error of a connection is said in words."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadcaster.core.text import escaped, reason
from tests.support import free_port

ESCAPED = {
    "\x1b[31m": r"\x1b[31m",
    "\r": r"\r",
    "\t": r"\t",
    "\x7f\x9b": r"\x7f\x9b",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2028": r"\u2028",
    "\ud800": r"\ud800",
}


@pytest.mark.parametrize(("text", "shown"), ESCAPED.items(), ids=map(ascii, ESCAPED))
def test_what_drives_a_terminal_is_escaped(text: str, shown: str) -> None:
    """Control characters, what reverses the text after it, and what cannot be encoded are seen as escapes."""
    assert escaped(text) == shown


@pytest.mark.parametrize("text", ["two\nlines", "dömäne", "可用", "🚨", "می\u200cخواهم"])
def test_what_can_be_read_stays(text: str) -> None:
    """Letters of any script, their joiners, and new lines are left as they are."""
    assert escaped(text) == text


@given(st.text())
def test_any_text_can_be_printed(text: str) -> None:
    """It can be encoded, has no control character, and escaping it again changes nothing."""
    shown = escaped(text)
    assert shown.encode().decode() == shown
    assert not [character for character in shown if ord(character) < 32 and character != "\n"]
    assert escaped(shown) == shown


REASONS: dict[str, tuple[Exception, str]] = {
    "uvloop": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
    "asyncio": (OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
    "two addresses": (
        OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1, 0, 0), [Errno 111] Connect"),
        os.strerror(111).lower(),
    ),
    "name": (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
    "no file": (FileNotFoundError(errno.ENOENT, "No such file or directory"), "no such file or directory"),
    "time": (TimeoutError(), "no answer in time"),
    "time, with words": (TimeoutError("timed out during opening handshake"), "timed out during opening handshake"),
    "certificate": (ssl.SSLError(1, "[SSL] certificate verify failed (_ssl.c:1006)"), "certificate verify failed"),
    "no PEM": (ssl.SSLError(9, "[SSL] PEM lib (_ssl.c:3905)"), "there is no certificate in it as PEM"),
    "nothing": (EOFError(), "EOFError"),
    "other": (ValueError("HTTP 503"), "HTTP 503"),
}


@pytest.mark.parametrize(("error", "words"), REASONS.values(), ids=REASONS)
def test_a_reason_is_words(error: Exception, words: str) -> None:
    """Of an error of a connection the words are told, without the system's number."""
    assert reason(error) == words


def test_a_refused_connection_has_no_number() -> None:
    """Of a real one, to one address and to several."""
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(OSError) as refused:  # noqa: PT011
            asyncio.run(asyncio.open_connection(host, free_port()))
        assert "refused" in reason(refused.value)
        assert "Errno" not in reason(refused.value)

"""The JavaScript client and the live page: files of the package, answered without Sanic and before any limit."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from broadcaster import wire

_ALLOWED: Final = "Allow: GET, HEAD, OPTIONS\r\n"
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".ts": "text/plain; charset=utf-8",
}
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self' {websockets}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""What the page may do: load and ask this hub only, and never take a text for markup or for a program."""

_IF_NONE_MATCH: Final = re.compile(rb"\r\nif-none-match:([^\r\n]*)", re.IGNORECASE)
_HOST: Final = re.compile(rb"\r\nhost:[ \t]*([A-Za-z0-9.:\[\]-]{1,255})[ \t]*\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is answered with: its bytes, the headers that say what they are, and their name for caches."""

    body: bytes
    headers: str
    etag: str


class Files:
    """Answers requests for files."""

    def __init__(self, by_path: dict[str, File]) -> None:
        self._files = by_path

    def answer(self, method: str, path: str, head: bytes) -> bytes | None:
        """The response to a request head; None if it does not ask for a file."""
        if (file := self._files.get(path)) is None:
            return None
        if method == "OPTIONS":
            return wire.response_head(204, 0, _ALLOWED)
        if method not in ("GET", "HEAD"):
            return wire.refusal(405, f"{path} takes GET, HEAD and OPTIONS", _ALLOWED)
        headers = file.headers
        if path == "/":
            headers += f"Content-Security-Policy: {_POLICY.format(websockets=_websockets(head))}\r\n"
        known = _IF_NONE_MATCH.search(head)
        if known and (file.etag in known[1].decode("latin-1") or known[1].strip() == b"*"):
            return f"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n{headers}\r\n".encode()
        response = (
            f"HTTP/1.1 200 OK\r\nConnection: close\r\n{headers}Content-Length: {len(file.body)}\r\n\r\n".encode()
        )
        return response if method == "HEAD" else response + file.body


def _read(file: Traversable, more: str = "") -> File:
    body = file.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    kind = next(kind for ending, kind in _TYPES.items() if file.name.endswith(ending))
    headers = (
        f"Content-Type: {kind}\r\nETag: {etag}\r\nCache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n"
        f"Referrer-Policy: no-referrer\r\n{more}"
    )
    return File(body, headers, etag)


def _websockets(head: bytes) -> str:
    """This hub's WebSockets as a source of the policy: not every browser takes 'self' for them."""
    host = _HOST.search(head)
    return f"ws://{host[1].decode()} wss://{host[1].decode()}" if host else ""


# They are read when the hub starts: an installation may be replaced under it.
_FOLDER: Final = files("broadcaster.hub.web")

CLIENT: Final = {
    f"/{name}": _read(_FOLDER / "client" / name, "Access-Control-Allow-Origin: *\r\n")
    for name in ("client.js", "client.d.ts")
}
"""The JavaScript client, which pages of other sites may load, too."""

PAGE: Final = {
    "/" if file.name == "index.html" else f"/page/{file.name}": _read(file)
    for file in (_FOLDER / "page").iterdir()
}
"""The live page."""

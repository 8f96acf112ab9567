"""A client of Server-Sent Events down at the bytes, which reads a stream by the letter of the standard."""

from __future__ import annotations

import json
import socket
import ssl
from types import TracebackType
from typing import Any, NamedTuple

from tests.support.timing import UNIT_S


class Sent(NamedTuple):
    """One event as a browser dispatches it: its type, its data, and the last id by then."""

    kind: str
    data: str
    last_id: str

    @property
    def fields(self) -> dict[str, Any]:
        """Its data, which is JSON."""
        fields: dict[str, Any] = json.loads(self.data)
        return fields


class Reader:
    """WHATWG HTML 9.2.6: fed with bytes, cut anywhere.

    Attributes:
        events: Those that were dispatched.
        comments: How many there were.
        retry_ms: The last reconnection time.
        last_id: What a browser would bring along now.
    """

    def __init__(self) -> None:
        self.events: list[Sent] = []
        self.comments = 0
        self.retry_ms: int | None = None
        self.last_id = ""
        self._buffer = b""
        self._data: list[str] = []
        self._kind = ""
        self._id = ""

    def feed(self, data: bytes) -> None:
        # Only \n ends a line of the hub: \r would be one as well, and must never be in what it sends.
        assert b"\r" not in data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._take(line.decode())

    def _take(self, line: str) -> None:
        if not line:
            self.last_id = self._id
            if self._data:
                self.events.append(Sent(self._kind or "message", "\n".join(self._data), self.last_id))
            self._data, self._kind = [], ""
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments += 1
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id":
            assert "\0" not in value
            self._id = value
        else:
            assert name == "retry", line
            self.retry_ms = int(value)


class StreamClient:
    """Somebody who has asked for a stream; a header `-Host: …` stands in the place of its own.

    Attributes:
        status: Of the answer.
        headers: Of the answer, by lower-case name.
        reader: What has come.
        body: What has come, if it is no stream.
    """

    def __init__(
        self,
        port: int,
        query: str = "",
        *headers: str,
        method: str = "GET",
        version: str = "1.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.reader = Reader()
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10 * UNIT_S)
        replaced = [line.removeprefix("-") for line in headers if line.startswith("-Host:")]
        others = [line for line in headers if not line.startswith("-Host:")]
        lines = [f"{method} /sse{query} HTTP/{version}", *(replaced or ["Host: 127.0.0.1"]), *others, "", ""]
        try:
            if tls:
                self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
            self.socket.sendall("\r\n".join(lines).encode("latin-1"))
            read = b""
            while b"\r\n\r\n" not in read:
                more = self.socket.recv(65_536)
                assert more, f"no answer but {read!r}"
                read += more
        except BaseException:
            self.socket.close()
            raise
        head, _, rest = read.partition(b"\r\n\r\n")
        first, *rest_of_head = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest_of_head)}
        self.body = rest
        if self.headers.get("content-type") == "text/event-stream":
            self.reader.feed(rest)

    @property
    def error(self) -> str:
        """What a refusal says; it ends the connection."""
        while more := self.socket.recv(65_536):
            self.body += more
        assert self.headers["content-type"] == "application/json"
        assert int(self.headers["content-length"]) == len(self.body)
        said: str = json.loads(self.body)["error"]
        return said

    def read(self) -> bool:
        """Read what is there, or wait for it; whether the stream goes on."""
        more = self.socket.recv(1 << 20)
        self.reader.feed(more)
        return bool(more)

    def until(self, kind: str, count: int = 1) -> list[Sent]:
        """All events of a type, once there are so many."""
        while len(found := [event for event in self.reader.events if event.kind == kind]) < count:
            assert self.read(), f"the stream has ended: {self.reader.events}"
        return found

    def to_end(self) -> list[Sent]:
        """All events, once the stream has ended."""
        while self.read():
            pass
        return self.reader.events

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

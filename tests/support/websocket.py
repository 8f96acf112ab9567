"""A WebSocket client down at the bytes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from types import TracebackType
from typing import Any

from tests.support.timing import UNIT_S


class RawClient:
    """A WebSocket client down at the bytes, for what a well-behaved library would not send.

    `text` and `close_code` wait for the next frame of that kind; `frames` keeps all, as (opcode, payload).
    """

    def __init__(self, port: int, *, path: str = "/ws", subprotocol: str = "", receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(10 * UNIT_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(upgrade_request(port, path=path, subprotocol=subprotocol))
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            more = self.socket.recv(65_536)
            assert more, f"closed during the handshake: {self._buffer!r}"
            self._buffer += more
        self.response, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        self.frames: list[tuple[int, bytes]] = []

    def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> None:
        """Send one frame, right or wrong."""
        self.socket.sendall(client_frame(opcode, payload, fin=fin, mask=mask))

    def next_frame(self) -> tuple[int, bytes]:
        """The next whole frame; raises EOFError when the hub has closed the connection."""
        head = self._take(2)
        length = head[1] & 0x7F
        if length == 126:
            length = int.from_bytes(self._take(2), "big")
        elif length == 127:
            length = int.from_bytes(self._take(8), "big")
        frame = (head[0] & 0x0F, self._take(length))
        self.frames.append(frame)
        return frame

    def text(self) -> str:
        while True:
            opcode, payload = self.next_frame()
            if opcode == 1:
                return payload.decode()

    def event(self) -> dict[str, Any]:
        """The next text frame as JSON."""
        fields: dict[str, Any] = json.loads(self.text())
        return fields

    def close_code(self) -> int:
        while True:
            opcode, payload = self.next_frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                more = self.socket.recv(1 << 20)
            except ConnectionResetError:
                more = b""
            if not more:
                raise EOFError("the hub closed the connection")
            self._buffer += more
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def vanish(self) -> None:
        """Go away without a close frame (RST)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def upgrade_request(port: int, *, path: str = "/ws", subprotocol: str = "", **headers: str) -> bytes:
    """A correct upgrade request; `headers` (with _ for -) replace or add."""
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
    }
    if subprotocol:
        fields["Sec-WebSocket-Protocol"] = subprotocol
    fields |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode()


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
    """A frame as a client sends it, masked with zeros unless `mask` is off (which is an error)."""
    first = bytes([opcode | (0x80 if fin else 0)])
    bit = 0x80 if mask else 0
    if len(payload) < 126:
        head = first + bytes([bit | len(payload)])
    elif len(payload) < 65_536:
        head = first + bytes([bit | 126]) + len(payload).to_bytes(2, "big")
    else:
        head = first + bytes([bit | 127]) + len(payload).to_bytes(8, "big")
    return head + (b"\0\0\0\0" if mask else b"") + payload


def server_frames(data: bytes) -> list[tuple[int, bytes]]:
    """Whole frames as a hub sends them, as (opcode, payload); what is cut at the end is left out."""
    frames = []
    at = 0
    while len(data) >= at + 2:
        start, length = at + 2, data[at + 1] & 0x7F
        if width := {126: 2, 127: 8}.get(length, 0):
            length, start = int.from_bytes(data[start : start + width], "big"), start + width
        if len(data) < start + length:
            break
        frames.append((data[at] & 0x0F, data[start : start + length]))
        at = start + length
    return frames


def read_to_end(client: RawClient, within: float = 5.0) -> None:
    """Read all frames until the hub has ended the connection; fails when it has not in so many time units."""
    client.socket.settimeout(within * UNIT_S)
    try:
        with contextlib.suppress(EOFError):
            while True:
                client.next_frame()
    except TimeoutError:
        raise AssertionError(f"the hub has not ended the connection after {within} units") from None


def next_but_ping(client: RawClient) -> tuple[int, bytes]:
    """The next frame that is no ping of the hub's own: those may come at any time."""
    while (frame := client.next_frame())[0] == 9:
        pass
    return frame

"""A WebSocket client down at the bytes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import ssl
from types import TracebackType
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.timing import UNIT_S

Frame = tuple[int, bytes]
"""Opcode and payload."""

BEAT = b'{"control": "beat"'
"""So a beat begins."""


class RawClient:
    """A WebSocket client down at the bytes, for what a well-behaved library would not send.

    It is strict with what a server sends. `text` and `close_code` wait for the next frame of that kind; `frames`
    keeps all.

    Args:
        request: Instead of a correct upgrade request with `path` and `subprotocol`.
        tls: The connection is encrypted.
    """

    def __init__(
        self,
        port: int,
        *,
        path: str = "/ws",
        subprotocol: str = "",
        receive_buffer: int = 0,
        request: bytes = b"",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.frames: list[Frame] = []
        self.socket = socket.socket()
        try:
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(10 * UNIT_S)
            self.socket.connect(("127.0.0.1", port))
            if tls:
                self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
            self.socket.sendall(request or upgrade_request(port, path=path, subprotocol=subprotocol))
            self.response, self._buffer = self._read_response()
        except BaseException:
            self.socket.close()
            raise

    def _read_response(self) -> tuple[bytes, bytes]:
        """The head of the response, and what has come after it."""
        read = b""
        while b"\r\n\r\n" not in read:
            more = self.socket.recv(65_536)
            assert more, f"closed during the handshake: {read!r}"
            read += more
        head, _, rest = read.partition(b"\r\n\r\n")
        return head, rest

    def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> None:
        """Send one frame, right or wrong."""
        self.socket.sendall(client_frame(opcode, payload, fin=fin, mask=mask))

    def next_frame(self) -> Frame:
        """The next whole frame; raises EOFError when the hub has closed the connection."""
        while (found := frame_at(self._buffer)) is None:
            try:
                more = self.socket.recv(1 << 20)
            except ConnectionResetError:
                more = b""
            if not more:
                raise EOFError("the hub closed the connection")
            self._buffer += more
        frame, end = found
        self._buffer = self._buffer[end:]
        assert not self.frames or self.frames[-1][0] != 8, "something follows the close frame"
        self.frames.append(frame)
        return frame

    def text(self) -> str:
        """The next text frame that is no beat: these come whenever they are due."""
        while True:
            opcode, payload = self.next_frame()
            if opcode == 1 and not payload.startswith(BEAT):
                return payload.decode()

    def beat(self, channel: str) -> None:
        """Wait for the next beat of a channel."""
        while not ((frame := self.next_frame())[1].startswith(BEAT) and f'"{channel}"'.encode() in frame[1]):
            pass

    def event(self) -> dict[str, Any]:
        """The next text frame that is no beat, as JSON."""
        fields: dict[str, Any] = json.loads(self.text())
        return fields

    def close_code(self) -> int:
        while True:
            opcode, payload = self.next_frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")

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


def frame_at(data: bytes | bytearray, at: int = 0) -> tuple[Frame, int] | None:
    """The frame of a server that begins at an offset, and where it ends; None if it is cut.

    Fails if it is not as RFC 6455 (5.1 to 5.5) and docs/contract.md want the frames of a server.
    """
    if len(data) < at + 2:
        return None
    first, length, start = data[at], data[at + 1], at + 2
    opcode = first & 0x0F
    assert first & 0xF0 == 0x80, "a server sends whole frames, without reserved bits"
    assert opcode in (1, 8, 9, 10), "a server sends text and control frames"
    assert length < 128, "a server does not mask"
    assert opcode < 8 or length <= 125, "a control frame is short"
    if width := {126: 2, 127: 8}.get(length, 0):
        if len(data) < start + width:
            return None
        length, start = int.from_bytes(data[start : start + width], "big"), start + width
        assert length > (125 if width == 2 else 65_535), "a length is written as short as can be"
    if len(data) < start + length:
        return None
    return (opcode, bytes(data[start : start + length])), start + length


def frames_from(data: bytes | bytearray, at: int = 0) -> tuple[list[Frame], int]:
    """Whole frames as a hub sends them, from an offset on, and where the first begins that is cut."""
    frames = []
    while found := frame_at(data, at):
        frame, at = found
        frames.append(frame)
    return frames, at


def server_frames(data: bytes) -> list[Frame]:
    """Whole frames as a hub sends them, as (opcode, payload); what is cut at the end is left out."""
    return frames_from(data)[0]


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


async def opened_by_library(url: str, **options: Any) -> ClientConnection:
    """A connection of the library's client, without compression and proxy.

    With uvloop it fails in two more ways than it says if the hub hangs up before the request is sent: these are
    `ConnectionAbortedError` here.
    """
    try:
        return await connect(url, compression=None, proxy=None, **options)
    except (ConnectionClosed, AssertionError) as error:
        raise ConnectionAbortedError("the hub has hung up") from error

"""The server side of an open connection: what a subscriber sends to the hub."""

from __future__ import annotations

import codecs
from typing import Final

from websockets.exceptions import PayloadTooBig
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from broadcaster.wire.deflate import inflation
from broadcaster.wire.dispose import QUIET, dispose
from broadcaster.wire.frames import CloseCode

MOST_CONTROL_BYTES: Final = 125


class Inbound:
    """Parser of what a subscriber sends: answers what the protocol demands, drops the rest.

    Attributes:
        frames: Number of frames received.
        ignoring: Whether further input is ignored, because there was too much.

    Created only when a subscriber sends (see `is_whole_control_frame`): silent connections do not pay for it.
    """

    def __init__(self, max_bytes: int, *, compressed: bool = False) -> None:
        """Prepare: no message may have more than `max_bytes`, nor inflate to more if it may be `compressed`."""
        self._protocol = _Listening(max_bytes)
        if compressed:
            self._protocol.extensions = [inflation(max_bytes + MOST_CONTROL_BYTES)]
        self.ignoring = False
        self.frames = 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the client; return what is to be written back (pongs, a close frame)."""
        protocol = self._protocol
        if self.ignoring:
            return b""
        protocol.receive_data(data)
        self.frames += len(protocol.events_received())
        return b"".join(protocol.data_to_send())

    def dispose(self) -> None:
        """Free the memory now; `feed` must not be called any more."""
        dispose(self._protocol)

    def ignore(self) -> None:
        """Ignore all further input."""
        self.ignoring = True

    @property
    def ended(self) -> bool:
        """Whether the connection is over: the client closed it, or violated the protocol."""
        return self._protocol.state is not OPEN

    @property
    def closed_with(self) -> CloseCode | None:
        """With which code the connection was closed because of an error of the client; None if it was not."""
        sent = self._protocol.close_sent
        return None if sent is None or self.closed_by_client else CloseCode(sent.code)

    @property
    def closed_by_client(self) -> bool:
        return self._protocol.close_rcvd is not None


class _Listening(ServerProtocol):
    """The library's server, strict frame by frame: what follows an error, even in the same read, is ignored."""

    def __init__(self, max_bytes: int) -> None:
        # A control frame between two fragments is no part of their message, but the library counts it.
        super().__init__(state=OPEN, max_size=max_bytes + MOST_CONTROL_BYTES, logger=QUIET)
        self._max_bytes = max_bytes
        self._size = 0
        self._text: codecs.IncrementalDecoder | None = None

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None  # an incomplete message may be abandoned (RFC 6455 5.4)
        super().recv_frame(frame)
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._size = 0
            self._text = codecs.getincrementaldecoder("utf-8")() if frame.opcode is Opcode.TEXT else None
        self._size += len(frame.data)
        if self._size > self._max_bytes:
            raise PayloadTooBig(self._size, self._max_bytes)
        if self._text is not None:
            # Text must be UTF-8, also when a character is split between two fragments (RFC 6455 8.1): else 1007
            self._text.decode(bytes(frame.data), final=frame.fin)

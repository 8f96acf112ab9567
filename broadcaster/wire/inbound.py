"""What a subscriber sends to the hub."""

from __future__ import annotations

import codecs
import time

from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from broadcaster.wire.frames import CloseCode
from broadcaster.wire.quiet import QUIET, let_go


class Inbound:
    """Reads what a subscriber sends, answers what the protocol demands, drops the rest.

    Attributes:
        frames: How many frames have come.
        ignoring: Whether it has said too much.

    Made only when a subscriber talks (see `is_whole_control_frame`): silent connections do not pay for it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._protocol = ServerProtocol(state=OPEN, max_size=max_bytes, logger=QUIET)
        self._text: codecs.IncrementalDecoder | None = None
        self.ignoring = False
        self.frames = 0
        self._counted = 0
        self._said = 0.0
        self._asked_at = time.monotonic()

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the client; return what is to be written back (pongs, a close frame)."""
        protocol = self._protocol
        if self.ignoring:
            return b""
        protocol.receive_data(data)
        for frame in protocol.events_received():
            assert isinstance(frame, Frame)
            self.frames += 1
            if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._check_text(frame)
        return b"".join(protocol.data_to_send())

    def let_go(self) -> None:
        """Free the memory now; nothing can be fed any more."""
        let_go(self._protocol)

    def says_more_than(self, max_per_s: float) -> bool:
        """Whether it has sent more frames than that; asked after every `feed`.

        A second's worth may come at once, and silence is not saved up for later (a token bucket).
        """
        now = time.monotonic()
        self._said = max(0.0, self._said - (now - self._asked_at) * max_per_s) + self.frames - self._counted
        self._asked_at, self._counted = now, self.frames
        return self._said > max_per_s

    def ignore(self) -> None:
        """What comes from here on is not to be heard."""
        self.ignoring = True

    @property
    def ended(self) -> bool:
        """Whether the conversation is over: the client closed, or broke the protocol."""
        return self._protocol.state is not OPEN

    @property
    def closed_by_client(self) -> bool:
        return self._protocol.close_rcvd is not None

    def _check_text(self, frame: Frame) -> None:
        """Text must be UTF-8, also when a character is split between two fragments (RFC 6455 8.1)."""
        if frame.opcode is Opcode.TEXT:
            self._text = codecs.getincrementaldecoder("utf-8")()
        elif frame.opcode is Opcode.BINARY:
            self._text = None
        try:
            if self._text is not None:
                self._text.decode(bytes(frame.data), final=frame.fin)
        except UnicodeDecodeError:
            if self._protocol.state is OPEN:
                self._protocol.fail(CloseCode.INVALID_TEXT, "text is not UTF-8")

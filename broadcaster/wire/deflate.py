"""Compression of messages (permessage-deflate, RFC 7692), such that equal messages have equal bytes.

Neither side keeps a window from one message to the next: an event is compressed once for all clients that have
agreed, and an idle connection owns no memory for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from websockets.exceptions import NegotiationError, PayloadTooBig
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import CONT, CTRL_OPCODES, Frame
from websockets.typing import ExtensionParameter

from broadcaster.wire.frames import payload_of, text_frame

WINDOW_BITS: Final = 12
"""The window of the compressed events (4 KiB): a client that allows only a smaller one is not sent any."""

_LEVEL: Final = 3
"""Of 4 KB of hosts 20 % remain in 27 µs; at the default, 6, 18 % in 45 µs, for which every subscriber waits."""

_MEMORY_LEVEL: Final = 6
_SYNC_END: Final = 4
"""Bytes that end each flush, and are not sent (RFC 7692 7.2.1)."""

_COMPRESSED_TEXT: Final = b"\xc1"
"""The first byte of a whole text message that is compressed (RSV1)."""


def deflated_frame(frame: bytes) -> bytes:
    """A whole text frame, compressed; the same frame if it would not be shorter."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -WINDOW_BITS, _MEMORY_LEVEL)
    data = compressor.compress(payload_of(frame)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    compressed = text_frame(data[:-_SYNC_END])
    return frame if len(compressed) >= len(frame) else _COMPRESSED_TEXT + compressed[1:]


def inflation(max_bytes: int) -> Extension:
    """What inflates the messages of one client, none of which may have more than so many bytes."""
    return _Inflation(max_bytes)


class _Inflation(PerMessageDeflate):
    """The library's, with a window no larger than a message, and with a limit of what comes, too.

    What inflates to nothing (bytes behind the end of the deflate stream, empty blocks) has no size, but is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(True, True, min(15, max(9, max_bytes.bit_length())), WINDOW_BITS)
        self._most = max_bytes + max_bytes // 8 + 256  # what cannot be compressed becomes a little longer
        self._came = 0

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        if frame.opcode not in CTRL_OPCODES:
            self._came = len(frame.data) + (self._came if frame.opcode is CONT else 0)
            if self._came > self._most:
                raise PayloadTooBig(self._came, self._most)
        return super().decode(frame, max_size=max_size)


class Compression(ServerPerMessageDeflateFactory):
    """What a hub answers to an offer of compression."""

    def __init__(self) -> None:
        super().__init__(
            server_no_context_takeover=True, client_no_context_takeover=True, server_max_window_bits=WINDOW_BITS
        )

    def process_request_params(
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], PerMessageDeflate]:
        answer, extension = super().process_request_params(params, accepted_extensions)
        if extension.local_max_window_bits < WINDOW_BITS:
            raise NegotiationError("the bytes that all get are not for a smaller window")
        return answer, extension


COMPRESSION: Final = Compression()

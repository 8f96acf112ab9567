"""Compression of messages (permessage-deflate, RFC 7692), such that equal messages have equal bytes.

Neither side keeps a window from one message to the next: an event is compressed once for all clients that have
agreed, and an idle connection owns no memory for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from websockets.exceptions import NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.typing import ExtensionParameter

from broadcaster.wire.frames import payload_of, text_frame

WINDOW_BITS: Final = 12
"""The window of the compressed events (4 KiB): a client that allows only a smaller one is not sent any."""

_LEVEL: Final = 6
_MEMORY_LEVEL: Final = 5
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
    """What inflates the messages of one client, none of which may have more than so many bytes.

    Its window is no larger than such a message. A client without a sense of measure finds nothing further back.
    """
    bits = min(15, max(9, max_bytes.bit_length()))
    return PerMessageDeflate(True, True, bits, WINDOW_BITS)


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

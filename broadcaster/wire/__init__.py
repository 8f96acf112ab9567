"""The wire: WebSocket and Server-Sent Events, handshake, frames, close codes; the only importer of `websockets`.

Does no input or output (except `client`), and knows neither Redis nor settings nor the hub. Nothing is masked and
no side keeps a window, so a frame, compressed or not, is the same for every subscriber and built once per event.
"""

from broadcaster.wire.bearer import token_in
from broadcaster.wire.control import (
    Terms,
    beat_frame,
    drain_frame,
    gap_frame,
    lag_frame,
    read_control,
    welcome_frame,
)
from broadcaster.wire.deflate import deflated_frame
from broadcaster.wire.frames import (
    PING,
    PLAIN,
    TRY_LATER,
    V1,
    CloseCode,
    close_frame,
    is_close,
    is_final_refusal,
    is_pong,
    is_whole_control_frame,
    text_frame,
)
from broadcaster.wire.handshake import (
    HEAD_END,
    Answer,
    Refusal,
    Target,
    answer_upgrade,
    refusal,
    response_head,
)
from broadcaster.wire.inbound import Inbound
from broadcaster.wire.outbound import Outbound
from broadcaster.wire.sse import (
    COMMENT,
    STREAM_HEAD,
    STREAM_METHODS,
    StreamRequest,
    read_stream_request,
    sse_close,
    sse_control,
    sse_event,
    sse_retry,
)

__all__ = [
    "COMMENT",
    "HEAD_END",
    "PING",
    "PLAIN",
    "STREAM_HEAD",
    "STREAM_METHODS",
    "TRY_LATER",
    "V1",
    "Answer",
    "CloseCode",
    "Inbound",
    "Outbound",
    "Refusal",
    "StreamRequest",
    "Target",
    "Terms",
    "answer_upgrade",
    "beat_frame",
    "close_frame",
    "deflated_frame",
    "drain_frame",
    "gap_frame",
    "is_close",
    "is_final_refusal",
    "is_pong",
    "is_whole_control_frame",
    "lag_frame",
    "read_control",
    "read_stream_request",
    "refusal",
    "response_head",
    "sse_close",
    "sse_control",
    "sse_event",
    "sse_retry",
    "text_frame",
    "token_in",
    "welcome_frame",
]

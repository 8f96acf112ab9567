"""The WebSocket wire: handshake, frames, control frames, close codes.

Sole home of the `websockets` package. The hub offers no extensions, so a frame is the same for every
subscriber and is built once per event.
"""

from broadcaster.wire.bearer import token_in
from broadcaster.wire.frames import (
    PING,
    PLAIN,
    V1,
    CloseCode,
    close_frame,
    control_frame,
    is_close,
    is_pong,
    is_whole_control_frame,
    read_control,
    text_frame,
)
from broadcaster.wire.inbound import Inbound
from broadcaster.wire.outbound import Outbound
from broadcaster.wire.upgrade import HEAD_END, Answer, Refusal, Target, answer_upgrade, plain_response

__all__ = [
    "HEAD_END",
    "PING",
    "PLAIN",
    "V1",
    "Answer",
    "CloseCode",
    "Inbound",
    "Outbound",
    "Refusal",
    "Target",
    "answer_upgrade",
    "close_frame",
    "control_frame",
    "is_close",
    "is_pong",
    "is_whole_control_frame",
    "plain_response",
    "read_control",
    "text_frame",
    "token_in",
]

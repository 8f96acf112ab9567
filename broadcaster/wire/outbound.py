"""The client side of a connection, without a socket (sans-I/O)."""

from __future__ import annotations

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN, State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from broadcaster.core.redaction import scrub
from broadcaster.wire.bearer import authorization
from broadcaster.wire.dispose import QUIET, dispose
from broadcaster.wire.frames import PLAIN, V1, CloseCode, is_final_refusal
from broadcaster.wire.retry_after import retry_after_s


class Outbound:
    """The client side of one connection, for a caller that stamps first and parses later (the fleet).

    Attributes:
        connected: Whether the hub has accepted; stays true when it closes.
        failure: Why it has not; None if it has, or has not answered yet.
        status: The HTTP status of its answer; None before it.
        retry_after_s: Seconds that a refusal asks the client to stay away; 0 if it does not say.
    """

    def __init__(self, url: str, subprotocol: str = PLAIN, token: str = "") -> None:
        self._token = token
        self._protocol = ClientProtocol(
            parse_uri(url), subprotocols=[Subprotocol(subprotocol)], max_size=None, logger=QUIET
        )
        self._fragments: list[bytes] = []
        self.connected = False
        self.failure: str | None = None
        self.status: int | None = None
        self.retry_after_s = 0.0

    def request(self) -> bytes:
        """The upgrade request."""
        request = self._protocol.connect()
        request.headers.update(authorization(self._token))
        self._protocol.send_request(request)
        return b"".join(self._protocol.data_to_send())

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes from the hub; return the messages that they complete."""
        protocol = self._protocol
        protocol.receive_data(data)
        messages = []
        for event in protocol.events_received():
            if isinstance(event, Response):
                self.connected = protocol.handshake_exc is None  # it may be closed already, by the same read
                self.status = event.status_code
                if not self.connected:
                    self.failure = scrub(f"refused: {event.status_code} {event.reason_phrase}")
                    self.retry_after_s = retry_after_s(event.headers.get("Retry-After", ""))
            elif isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._fragments.append(bytes(event.data))
                if event.fin:
                    messages.append(b"".join(self._fragments))
                    self._fragments.clear()
        if protocol.handshake_exc and not self.failure:
            self.failure = scrub(str(protocol.handshake_exc))  # it may quote the request
        return messages

    def pong(self) -> bytes:
        """An answer to an empty ping, given before the ping is parsed."""
        if self._protocol.state not in (State.OPEN, State.CLOSING):
            return b""
        self._protocol.send_pong(b"")
        return self.to_send()

    def close(self) -> bytes:
        """A close frame (1000), once."""
        if self._protocol.state is OPEN:
            self._protocol.send_close(CloseCode.NORMAL)
        return self.to_send()

    def to_send(self) -> bytes:
        """Bytes that the protocol has to write: pongs, the answer to a close."""
        return b"".join(self._protocol.data_to_send())

    def dispose(self) -> None:
        """Free the memory now; `feed` must not be called any more."""
        dispose(self._protocol)

    @property
    def speaks_v1(self) -> bool:
        """Whether the hub has selected `broadcaster.v1`: others give no positions to resume from."""
        return self._protocol.subprotocol == V1

    @property
    def is_final_refusal(self) -> bool:
        """Whether the hub has refused the handshake, and would refuse it again."""
        return self.status is not None and is_final_refusal(self.status)

    @property
    def close_code(self) -> int | None:
        """The close code of the hub; None if it has not closed."""
        close = self._protocol.close_rcvd
        return close.code if close else None

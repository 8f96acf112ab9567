"""What is told of a subscription to channels, whatever stands behind it."""

from __future__ import annotations

from typing import Protocol


class SubscriptionHandlers(Protocol):
    """Called in the order in which it happened."""

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        """Per channel the payloads that one read brought."""

    def on_confirmed(self, channel: str) -> None:
        """The subscription to a channel holds: from here on nothing is missed."""

    def on_lost(self, channel: str) -> None:
        """From here on, until confirmed again, messages of a channel may be missed."""

"""The callbacks of a subscription to channels, independent of the broker."""

from __future__ import annotations

from typing import Final, Protocol

HUB_CHANNELS: Final = "broadcaster.hub."
"""How the channels of hubs' own probes begin; the number of the hub's database follows, and a name by chance."""


class SubscriptionHandlers(Protocol):
    """Callbacks for messages and changes of the subscription, called in the order of these."""

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        """One read brought these payloads per channel."""

    def on_confirmed(self, channel: str) -> None:
        """The subscription to a channel is established: from here on nothing is missed."""

    def on_lost(self, channel: str) -> None:
        """From here on, until confirmed again, messages of a channel may be missed."""

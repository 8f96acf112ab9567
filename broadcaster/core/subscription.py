"""The callbacks of a subscription to channels, independent of the broker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

HUB_CHANNELS: Final = "broadcaster.hub."
"""How the channels of hubs' own probes begin; the number of the hub's database follows, and a name by chance."""


def hub_databases(channels: Iterable[bytes]) -> set[int]:
    """The databases of the hubs to which these channels for probes belong."""
    names = [channel.decode(errors="replace").removeprefix(HUB_CHANNELS) for channel in channels]
    return {int(number) for number in (name.partition(".")[0] for name in names) if number.isdecimal()}


class SubscriptionHandlers(Protocol):
    """Callbacks for messages and changes of the subscription, called in the order of these."""

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        """One read brought these payloads per channel."""

    def on_confirmed(self, channel: str) -> None:
        """The subscription to a channel is established: from here on nothing is missed."""

    def on_lost(self, channel: str) -> None:
        """From here on, until confirmed again, messages of a channel may be missed."""

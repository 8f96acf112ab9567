"""What is known of hubs in Redis by name, and the callbacks of a subscription, independent of the broker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

HUB_CHANNELS: Final = "broadcaster.hub."
"""How the channels of hubs' own probes begin; the number of the hub's database follows, and a name by chance."""


ANNOUNCED_S: Final = 600
"""Seconds for which Redis knows which hubs there were: the keys of their announcements expire after so many."""

ANNOUNCEMENT_LASTS_S: Final = 5.0
"""Seconds for which an announcement holds; a hub that has not announced itself again is missing."""


def announcements_key(deployment: str) -> str:
    """The key of the names of a deployment's hubs; a dot and a name is that of what one announces."""
    return f"{HUB_CHANNELS}{{{deployment}}}"


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

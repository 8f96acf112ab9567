"""The resume state of a subscriber: its positions, the URL to resume with, and gaps that were not announced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from broadcaster.core.event import Event
from broadcaster.core.position import Cause, Gap, Instant, Position, is_within, read_position, read_since


class ResumeState:
    """Positions per channel, updated by every frame. No input or output.

    Attributes:
        positions: Up to where everything has arrived, or was announced as a gap.
        channel_count: How many channels it asks for.
        has_one_channel: Whether all events are of one channel.
        sees_everything: Whether there is one channel and no filter, so that every hole is a loss.
    """

    def __init__(
        self,
        url: str,
        channels: Sequence[str],
        since: Position | str | Mapping[str, Position] | None,
        types: Sequence[str],
        sources: Sequence[str],
        severities: Sequence[str],
        last: int | None = None,
    ) -> None:
        """Parse the URL; for the arguments see `Subscriber`.

        Raises:
            ValueError: `since` says no place to begin, or a position for several channels; `last` is no number of
                events.
        """
        if last is not None and last < 0:
            raise ValueError("last is a number of events")
        self._parts = urlsplit(url)
        given = parse_qsl(self._parts.query, keep_blank_values=True)
        self._channels = list(channels) or [value for key, value in given if key == "channel"]
        self._filters = [pair for pair in given if pair[0] not in ("channel", "since", "last")]
        for key, values in (("type", types), ("source", sources), ("severity", severities)):
            self._filters += [(key, value) for value in values]
        given_last = next((value for key, value in given if key == "last" and value), None)
        number = given_last if last is None else str(last)
        self._begin = None if number is None else ("last", number)  # of channels whose positions are not known yet
        self._begun: set[str] = set()
        since = since or next((value for key, value in given if key == "since"), None)
        self.positions: dict[str, Position] = {}
        self._welcomed: set[str] = set()
        if isinstance(since, Mapping):
            self.positions.update(since)
            self._channels = self._channels or list(since)
        elif since is not None:
            begins = _read(str(since))
            if isinstance(begins, Instant):
                self._begin = ("since", str(since))
            elif len(self._channels) > 1:
                raise ValueError("one position cannot be that of several channels")
            else:
                self.positions["".join(self._channels)] = begins
        self.channel_count = max(1, len(set(self._channels)))
        self.has_one_channel = len(self._channels) <= 1
        self.sees_everything = self.has_one_channel and not self._filters

    def named(self) -> dict[str, Position]:
        """The positions of those channels whose names are known."""
        return {channel: position for channel, position in self.positions.items() if channel}

    def url(self) -> str:
        """The URL to connect to, so that nothing is missed."""
        query: list[tuple[str, str]] = []
        for channel in self._channels:
            query.append(("channel", channel))
            if channel in self.positions:
                query.append(("since", str(self.positions[channel])))
            elif self._begin is not None and channel not in self._begun:
                query.append(self._begin)
        if not self._channels and self.positions:
            query.append(("since", str(next(iter(self.positions.values())))))
        elif not self._channels and self._begin is not None and not self._begun:
            query.append(self._begin)
        return urlunsplit(self._parts._replace(query=urlencode(query + self._filters)))

    def on_welcome(self, frame: Mapping[str, Any]) -> Gap | None:
        """Handle a `welcome` frame: the hub begins to deliver a channel, for the first time or again.

        Returns:
            The gap between the connection before and this one, if it could not be asked to resume.
        """
        channel, position = str(frame.get("channel")), read_position(frame.get("position"))
        asked = channel in self.positions or "" in self.positions
        asked |= self._begin is not None and channel not in self._begun  # the gap of the one before has not come
        gap = None if asked or channel not in self._welcomed else Gap(channel, Cause.NO_HISTORY, position=position)
        self._welcomed.add(channel)
        if frame.get("recovered") is not False:  # else its gap moves: the connection may end between the two
            self._begun.add(channel)
            self._move(channel, position)
        return gap

    def has(self, event: Event) -> bool:
        """Whether an event lies before the known position: it was given, or announced as a gap."""
        if event.position is None or event.channel is None:
            return False
        known = self.positions.get(event.channel)
        return known is not None and is_within(event.position, known)

    def on_event(self, event: Event) -> Gap | None:
        """Handle an event, new or duplicate; return the gap before it if there is one that was not announced."""
        if event.position is None or event.channel is None:
            return None
        epoch, offset = event.position
        known = self.positions.get(event.channel)
        if known is not None and known.epoch == epoch and known.offset + 1 == offset:
            self.positions[event.channel] = event.position  # the next one: no need to look further
            return None
        if self.has(event):
            return None
        gap = self._unexplained(event.channel, Position(epoch, offset - 1))
        self._move(event.channel, event.position)
        return gap

    def on_refused(self, channel: str, position: Position) -> list[Gap]:
        """Handle a stored event that cannot be given out; return the gap before it, and the one that it is."""
        epoch, offset = position
        known = self.positions.get(channel)
        if known is not None and is_within(position, known):
            return []
        before = self._unexplained(channel, Position(epoch, offset - 1))
        gap = self.on_gap(Gap(channel, Cause.REFUSED, epoch, offset, offset, position))
        return [gap for gap in (before, gap) if gap is not None]

    def on_beat(self, frame: Mapping[str, Any]) -> Gap | None:
        """Handle a heartbeat: all before it should have arrived; return the unannounced gap if it has not."""
        channel, position = str(frame.get("channel")), read_position(frame.get("position"))
        gap = None if position is None else self._unexplained(channel, position)
        self._move(channel, position)
        return gap

    def on_gap(self, gap: Gap) -> Gap | None:
        """Handle a `gap` frame; return it without what lies before the known position.

        That had arrived, perhaps from another hub, or was announced before.
        """
        known = self.positions.get(gap.channel)
        if known and gap.epoch and gap.first is not None and is_within(Position(gap.epoch, gap.first), known):
            end = gap.position if gap.last is None else Position(gap.epoch, gap.last)
            if end is not None and is_within(end, known):
                return None
            gap = replace(gap, epoch=known.epoch, first=known.offset + 1)
        self._begun.add(gap.channel)
        self._move(gap.channel, gap.position)
        return gap

    def forget(self) -> list[Gap]:
        """The hub has closed as it cannot deliver what follows: resume with new events; return the gaps."""
        gaps = []
        for channel in dict.fromkeys([*self._channels, *self.positions]) or [""]:
            known = self.positions.get(channel)
            first = None if known is None else known.offset + 1
            gaps.append(Gap(channel, Cause.CLOSED, known and known.epoch, first))
        self._begin = None
        self.positions.clear()
        self._welcomed.clear()  # what is missed before the next welcome lies in these gaps
        return gaps

    def _unexplained(self, channel: str, position: Position) -> Gap | None:
        """The gap between the known position and one up to which everything should have arrived."""
        known = self.positions.get(channel)
        if known is None or not self.sees_everything:
            return None
        if known.epoch != position.epoch:
            return Gap(channel, Cause.UNEXPLAINED, known.epoch, known.offset + 1, None, position)
        if known.offset < position.offset:
            return Gap(channel, Cause.UNEXPLAINED, known.epoch, known.offset + 1, position.offset, position)
        return None

    def _move(self, channel: str, position: Position | None) -> None:
        if position is not None:
            if "" in self.positions:  # given before the name of the channel was known
                del self.positions[""]
            self.positions[channel] = position


def _read(since: str) -> Position | Instant:
    try:
        return read_since(since)
    except ValueError as error:
        raise ValueError(f"since {error}") from None

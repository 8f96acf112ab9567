"""What a subscriber asks for: the query of its URL, read and checked before the upgrade."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from broadcaster.core.event import SEVERITIES, channel_name
from broadcaster.core.position import Beginning, Last, read_since
from broadcaster.core.runtime import LIMITS, Limits
from broadcaster.hub.fanout.filters import EVERYTHING, Filter

DEFAULT_EVENTS: Final = 100
MOST_EVENTS: Final = 1000
"""Of one answer with stored events."""

_BEGINNINGS: Final = ("since", "last")


@dataclass(frozen=True, slots=True)
class SubscribeRequest:
    """Channels, each with where it is to begin (None: now), and one filter for all of them."""

    channels: tuple[tuple[str, Beginning], ...]
    filter: Filter


@dataclass(frozen=True, slots=True)
class EventsRequest:
    """A channel, where to begin in what is stored of it (None: with the oldest), a filter, the most events."""

    channel: str
    begins: Beginning
    filter: Filter
    limit: int


def read_events_query(
    query: tuple[tuple[str, str], ...], default: str, limits: Limits = LIMITS, most_back: int = 10_000
) -> EventsRequest:
    """Read the parameters of a request for stored events: as `read_query`, of one channel, and `limit`.

    Raises:
        ValueError: As of `read_query`; or `limit` is no number of events.
    """
    given = [value for key, value in query if key == "limit"] or [str(DEFAULT_EVENTS)]
    if len(given) > 1:
        raise ValueError("limit is given twice")
    [number] = given
    if not (number.isascii() and number.isdecimal() and len(number) < 8 and 1 <= int(number) <= MOST_EVENTS):
        raise ValueError(f"limit is a number of events from 1 to {MOST_EVENTS}, got {number[:40]!r}")
    asked = read_query(tuple(pair for pair in query if pair[0] != "limit"), default, limits, most_back)
    if len(asked.channels) > 1:
        raise ValueError("channel is given twice: an answer has the events of one channel")
    [(channel, begins)] = asked.channels
    return EventsRequest(channel, begins, asked.filter, int(number))


def read_query(
    query: tuple[tuple[str, str], ...], default: str, limits: Limits = LIMITS, most_back: int = 10_000
) -> SubscribeRequest:
    """Read the parameters of a URL.

    `channel` may be repeated; a `since`, or `last`, belongs to the channel before it; without a channel it is the
    default one; an empty one is none. `type`, `source` and `severity` may be repeated: any of the
    values is wanted. What begins with `_` is ignored (some libraries add it against caches). Any other parameter
    is refused: a filter with a wrong name would let everything through.

    Args:
        query: The parameters, in order.
        default: The channel if none is named.
        limits: How many values one filter may have.
        most_back: The most that `last` may be.

    Raises:
        ValueError: A parameter is unknown, stands in the wrong place, or has a wrong value.
    """
    names = [value for key, value in query if key == "channel"]
    since: dict[str, Beginning] = dict.fromkeys(names or [default])
    if len(since) < len(names):
        raise ValueError("a channel is asked for twice")
    wanted: dict[str, set[str]] = {"type": set(), "source": set(), "severity": set()}
    current = None if names else default
    for key, value in query:
        if key.startswith("_") or (key in _BEGINNINGS and not value):
            continue
        if key == "channel":
            current = channel_name(value)
        elif key in _BEGINNINGS:
            if current is None:
                raise ValueError(f"{key} belongs to the channel before it")
            if since[current] is not None:
                raise ValueError(f"{key} is given twice for one channel, or since and last")
            since[current] = _since(value) if key == "since" else _last(value, most_back)
        elif key in wanted:
            wanted[key].add(_label(key, value))
        else:
            raise ValueError(f"unknown query parameter {key[:40]!r}")
    if any(len(values) > limits.filter_values for values in wanted.values()):
        raise ValueError(f"a filter has more than {limits.filter_values} values")
    filtered = Filter(*(frozenset(wanted[key]) for key in ("type", "source", "severity")))
    return SubscribeRequest(tuple(since.items()), filtered or EVERYTHING)


def _since(value: str) -> Beginning:
    try:
        return read_since(value)
    except ValueError as error:
        raise ValueError(f"since {error}") from None


def _last(value: str, most: int) -> Last:
    if not (value.isascii() and value.isdecimal() and len(value) <= 8 and int(value) <= most):
        raise ValueError(f"last is a number of events up to {most}, got {value[:40]!r}")
    return Last(int(value))


def _label(key: str, value: str) -> str:
    if key == "severity" and value not in SEVERITIES:
        raise ValueError(f"severity is one of {', '.join(SEVERITIES)}, got {value[:40]!r}")
    if not 1 <= len(value) <= 256:
        raise ValueError(f"{key} has 1 to 256 characters")
    return value

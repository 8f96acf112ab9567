"""The query of a subscriber: what it may say, and what is refused."""

from __future__ import annotations

import pytest

from broadcaster.core.position import MAX_OFFSET, OLDEST, Beginning, Instant, Last, Position
from broadcaster.core.runtime import LIMITS
from broadcaster.hub.connections.request import SubscribeRequest, read_query
from broadcaster.hub.fanout.filters import EVERYTHING, Filter
from broadcaster.wire import Target

DEFAULT = "events.critical"
P = Position.parse


def ask(query: str) -> SubscribeRequest:
    return read_query(Target.parse(f"/ws?{query}").query, DEFAULT)


CHANNELS: list[tuple[str, str, list[tuple[str, Beginning]]]] = [
    ("nothing", "", [(DEFAULT, None)]),
    ("only a position", "since=a-5", [(DEFAULT, P("a-5"))]),
    ("only a filter", "type=A", [(DEFAULT, None)]),
    ("a channel", "channel=x", [("x", None)]),
    ("the default one by name", f"channel={DEFAULT}", [(DEFAULT, None)]),
    ("a channel with a position", "channel=x&since=a-0", [("x", P("a-0"))]),
    ("two, the first with a position", "channel=x&since=a-5&channel=y", [("x", P("a-5")), ("y", None)]),
    ("two, the second with a position", "channel=x&channel=y&since=a-5", [("x", None), ("y", P("a-5"))]),
    ("two positions", "channel=x&since=a-5&channel=y&since=b-6", [("x", P("a-5")), ("y", P("b-6"))]),
    ("a filter between", "channel=x&type=A&since=a-5", [("x", P("a-5"))]),
    ("percent-encoded", "channel=a%3Ab%2Dc&since=a%2D5", [("a:b-c", P("a-5"))]),
    ("the longest name", "channel=" + "x" * 128, [("x" * 128, None)]),
    ("the highest position", f"since=a-{MAX_OFFSET}", [(DEFAULT, Position("a", MAX_OFFSET))]),
    ("the last few", "last=50", [(DEFAULT, Last(50))]),
    (
        "of each channel another number",
        "channel=x&last=0&channel=y&last=10000",
        [("x", Last(0)), ("y", Last(10_000))],
    ),
    ("an empty number", "last=&since=a-5", [(DEFAULT, P("a-5"))]),
    ("a duration", "since=10m", [(DEFAULT, Instant(600_000_000, ago=True))]),
    (
        "seconds, hours, days",
        "channel=x&since=30s&channel=y&since=2h&channel=z&since=1d",
        [
            ("x", Instant(30_000_000, ago=True)),
            ("y", Instant(7_200_000_000, ago=True)),
            ("z", Instant(86_400_000_000, ago=True)),
        ],
    ),
    ("a time", "since=2026-11-27T02:00:00Z", [(DEFAULT, Instant(1_795_744_800_000_000))]),
    ("a time of a zone", "since=2026-11-27T02:00:00.5%2B02:00", [(DEFAULT, Instant(1_795_737_600_500_000))]),
    ("its + not escaped", "since=2026-11-27T02:00:00+02:00", [(DEFAULT, Instant(1_795_737_600_000_000))]),
    ("a time before all times", "since=1066-10-14T09:00:00Z", [(DEFAULT, Instant(0))]),
    ("all", "since=all", [(DEFAULT, OLDEST)]),
    ("empty parts", "&&channel=x&", [("x", None)]),
]


@pytest.mark.parametrize(("query", "channels"), [case[1:] for case in CHANNELS], ids=[c[0] for c in CHANNELS])
def test_channels_and_their_positions(query: str, channels: list[tuple[str, Beginning]]) -> None:
    """In the order of asking; a position belongs to the channel before it, or to the default one."""
    assert ask(query).channels == tuple(channels)


FILTERS: list[tuple[str, str, Filter]] = [
    ("none", "channel=x", EVERYTHING),
    ("one type", "type=A", Filter(types=frozenset("A"))),
    ("two types", "type=A&type=B", Filter(types=frozenset("AB"))),
    ("the same twice", "type=A&type=A", Filter(types=frozenset("A"))),
    ("a source with spaces", "source=rack+4%20left", Filter(sources=frozenset({"rack 4 left"}))),
    ("a source beyond ASCII", "source=S%C3%BCd", Filter(sources=frozenset({"Süd"}))),
    (
        "all severities",
        "severity=info&severity=warning&severity=critical",
        Filter(severities=frozenset({"info", "warning", "critical"})),
    ),
    (
        "all of them",
        "type=A&source=s&severity=info",
        Filter(frozenset("A"), frozenset("s"), frozenset({"info"})),
    ),
    ("as long as a label may be", "source=" + "s" * 256, Filter(sources=frozenset({"s" * 256}))),
]


@pytest.mark.parametrize(("query", "wanted"), [case[1:] for case in FILTERS], ids=[case[0] for case in FILTERS])
def test_filters(query: str, wanted: Filter) -> None:
    """One filter for all channels of the connection; the order of its values means nothing."""
    assert ask(query).filter == wanted


def test_as_many_values_as_allowed() -> None:
    """The limit itself passes, per label."""
    values = [f"{key}={number}" for key in ("type", "source") for number in range(LIMITS.filter_values - 8)]
    assert len(ask("&".join(values)).filter.types) == LIMITS.filter_values - 8
    types = "&".join(f"type={number}" for number in range(LIMITS.filter_values))
    assert len(ask(types).filter.types) == LIMITS.filter_values


REFUSED: list[tuple[str, str, str]] = [
    ("an unknown parameter", "debug=1", "unknown query parameter 'debug'"),
    ("one without a value", "debug", "unknown query parameter"),
    ("a token", "channel=x&token=secret", "unknown query parameter 'token'"),
    ("a parameter in other case", "Channel=x", "unknown query parameter"),
    ("a very long parameter", "x" * 5000 + "=1", "unknown query parameter"),
    ("an empty channel", "channel=", "channel must be"),
    ("a channel with a space", "channel=a+b", "channel must be"),
    ("a pattern", "channel=events.*", "channel must be"),
    ("a character that no name has", "channel=%00", "channel must be"),
    ("too long a name", "channel=" + "x" * 129, "channel must be"),
    ("the same channel twice", "channel=x&channel=x", "asked for twice"),
    ("the same channel twice, with positions", "channel=x&since=a-1&channel=x&since=a-2", "asked for twice"),
    ("a position before its channel", "since=a-5&channel=x", "belongs to the channel before it"),
    ("two positions of one channel", "channel=x&since=a-5&since=a-6", "given twice"),
    ("two positions of the default one", "since=a-5&since=a-6", "given twice"),
    ("the same position twice", "since=a-5&since=a-5", "given twice"),
    ("a number", "since=5", "^since is a position, a duration such as 10m, a time such as .*, or all, got '5'$"),
    ("a unit that there is not", "since=2w", "^since is a position"),
    ("a negative duration", "since=-10m", "^since is a position"),
    ("a duration of two units", "since=1h30m", "^since is a position"),
    ("all in other case", "since=ALL", "^since is a position"),
    ("a time without a zone", "since=2026-01-10T12:00:00", "^since is a time without its zone"),
    ("a day", "since=2026-01-10", "^since is a time without its zone"),
    ("a time that there is not", "since=2026-02-30T12:00:00Z", "^since is a position"),
    ("digits of another script", "since=٣m", "^since is a position"),
    ("a position that is too high", f"since=a-{MAX_OFFSET + 1}", "^since is a position"),
    ("a negative position", "since=a--1", "^since is a position"),
    ("an unknown severity", "severity=fatal", "severity is one of critical, warning, info"),
    ("a severity in other case", "severity=Critical", "severity is one of"),
    ("an empty severity", "severity=", "severity is one of"),
    ("an empty type", "type=", "type has 1 to 256 characters"),
    ("an empty source", "source", "source has 1 to 256 characters"),
    ("too long a type", "type=" + "x" * 257, "type has 1 to 256 characters"),
    ("too many values", "&".join(f"type={n}" for n in range(LIMITS.filter_values + 1)), "more than 32 values"),
]


@pytest.mark.parametrize(("query", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_wrong_is_named(query: str, words: str) -> None:
    """The refusal is short, whatever was sent, and says what is wrong."""
    with pytest.raises(ValueError, match=words) as caught:
        ask(query)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("wrong", ["-1", "10001", "1e3", "5.0", "%20", "٣", "all", "9" * 30])
def test_last_is_a_number_of_events(wrong: str) -> None:
    """Up to `history.max_events`; the refusal names the parameter."""
    with pytest.raises(ValueError, match=r"^last is a number of events up to 10000, got"):
        ask(f"last={wrong}")


@pytest.mark.parametrize("query", ["since=a-5&last=5", "last=5&since=a-5", "last=5&last=5", "last=5&channel=x"])
def test_a_channel_begins_at_one_place(query: str) -> None:
    """Either after a position or so many events back, said once and behind the channel."""
    with pytest.raises(ValueError, match=r"since|last"):
        ask(query)

"""Who is let in: each limit, the order in which they are looked at, what is counted, and that nothing is left."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from broadcaster import wire
from broadcaster.auth.access import Access, Grant
from broadcaster.core.runtime import CLOCK, LIMITS, Runtime
from broadcaster.hub.connections.admission import REFUSALS, AdmissionControl, Admitted, PendingHandshake
from broadcaster.hub.connections.connection import Connection
from broadcaster.hub.connections.registry import ConnectionRegistry
from broadcaster.hub.connections.request import read_query
from broadcaster.hub.fanout.format import PLAIN
from broadcaster.settings import ApiKey, AuthTable, ChannelsTable
from broadcaster.wire import CloseCode, Refusal, Target
from tests.hub.house import CHANNEL, House, Socket
from tests.support import Clock, in_loop

ADDRESS = "192.0.2.1"
KEY = "0123456789abcdef"


class Visitor:
    """What the registry knows of a connection."""

    slot = 0
    format = PLAIN

    def __init__(self, address: str) -> None:
        self.address = address

    def settle(self) -> None:
        """It never becomes unwritable."""

    def close(self, code: CloseCode, reason: str) -> None:
        """Nothing closes it."""


class Gate(AdmissionControl):
    """Admission control, and who has come in through it."""

    def enter(self, address: str) -> None:
        self._registry.add(Visitor(address))

    def leave(self, address: str) -> None:
        self._registry.remove(next(each for each in self._registry.everyone() if each.address == address))

    @property
    def connected(self) -> Counter[str]:
        return self._registry.by_address


class Guest:
    """Somebody whose request is not complete."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self.expired = 0

    def expire(self) -> bool:
        self.expired += 1
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


async def gate_of(
    *,
    channels: ChannelsTable | None = None,
    auth: AuthTable | None = None,
    clock: Clock | None = None,
    **hub: Any,
) -> Gate:
    """A gate with these limits, before the channels of a hub."""
    house = await House.opened(channels=channels, **hub)
    settings = house.settings.model_copy(update={"auth": auth or AuthTable()})
    registry = ConnectionRegistry[Any](1)
    return Gate(settings, house.channels, Access(settings.auth), registry, Runtime(clock or CLOCK))


def ask(gate: AdmissionControl, query: str = "", address: str = ADDRESS) -> Admitted | Refusal:
    return gate.admit(Target.parse(f"/ws?{query}"), address)


def come_in(gate: Gate, address: str = ADDRESS) -> str:
    """Somebody who is admitted, and enters; the address under which he is counted."""
    admission = ask(gate, address=address)
    assert isinstance(admission, Admitted), admission
    gate.enter(admission.address)
    return admission.address


def counted(gate: AdmissionControl) -> dict[str, int]:
    """What was refused, by cause, without what never happened."""
    assert set(gate.refused) == set(REFUSALS)
    return {cause: count for cause, count in gate.refused.items() if count}


# The order of the checks

Mend = Callable[[Gate, Target], Target]


def query(text: str) -> Mend:
    return lambda gate, target: replace(target, query=Target.parse(f"/ws?{text}").query)


def start(gate: Gate, target: Target) -> Target:
    gate.stopping = False
    return target


def make_room(gate: Gate, target: Target) -> Target:
    gate.leave("198.51.100.1")
    return target


def make_room_at_the_address(gate: Gate, target: Target) -> Target:
    gate.leave(ADDRESS)
    return target


STEPS: list[tuple[str, int, int | None, Mend]] = [
    ("stopping", 503, 1, start),
    ("full", 503, 5, make_room),
    ("address_full", 503, 5, make_room_at_the_address),
    ("malformed", 400, None, lambda gate, target: replace(target, fault="")),
    ("origin", 403, None, lambda gate, target: replace(target, origin=None)),
    ("token_missing", 401, None, lambda gate, target: replace(target, token="fedcba9876543210")),
    ("token_unknown_key", 401, None, lambda gate, target: replace(target, token=KEY)),
    ("query", 400, None, query("channel=secret&channel=a&channel=b")),
    ("query", 400, None, query("channel=secret")),
    ("forbidden_channel", 403, None, query("channel=other")),
    ("unknown_channel", 404, None, query("channel=events.audit")),
    ("no_room", 503, 5, query(f"channel={CHANNEL}")),
]
"""Everything that is wrong, in the order in which it is told, and how it is mended."""


@in_loop
async def test_of_all_that_is_wrong_the_first_is_told_and_counted() -> None:
    """One cause per refusal, always in the same order; when all is mended, the door is open."""
    gate = await gate_of(
        channels=ChannelsTable(max_open=1, max_per_connection=2),
        auth=AuthTable(
            mode="token",
            api_keys=(ApiKey(name="wall", key=SecretStr(KEY), subscribe=("events.*", "other")),),
        ),
        max_connections=2,
        max_per_address=1,
    )
    for address in ("198.51.100.1", ADDRESS):
        gate.enter(address)
    gate.stopping = True
    target = Target("/ws", (("debug", "1"),), "hub", "https://evil.example", None, "broken")
    expected: Counter[str] = Counter()
    for cause, status, retry_after_s, mend in STEPS:
        refusal = gate.admit(target, ADDRESS)
        assert isinstance(refusal, Refusal), f"let in in spite of {cause}"
        expected[cause] += 1
        assert counted(gate) == expected
        assert (refusal.status, refusal.retry_after_s) == (status, retry_after_s), cause
        target = mend(gate, target)
    admission = gate.admit(target, ADDRESS)
    assert isinstance(admission, Admitted)
    assert [name for name, _ in admission.request.channels] == [CHANNEL]
    assert counted(gate) == expected


def test_every_cause_of_a_refusal_is_a_counter_from_the_beginning() -> None:
    """An operator finds all of them in `/stats` before anything has happened; each once."""
    assert len(set(REFUSALS)) == len(REFUSALS)
    documented = {"half_open", "too_late", "handshakes", "requests", "full", "address_full", "malformed", "query"}
    documented |= {"origin", "forbidden_channel", "unknown_channel", "no_room", "stopping", "token_missing"}
    documented |= {"address_requests", "channel_unavailable", "channel_share"}
    assert documented <= set(REFUSALS)


# Connections


@in_loop
async def test_no_more_are_let_in_than_there_may_be() -> None:
    """The limit itself is allowed, one more is not; each who leaves makes room for one."""
    gate = await gate_of(max_connections=3)
    for number in range(3):
        come_in(gate, f"192.0.2.{number}")
    for refusals in range(1, 4):
        refusal = ask(gate, address="192.0.2.9")
        assert refusal == Refusal(503, "too many subscribers", 5)
        assert counted(gate) == {"full": refusals}
    gate.leave("192.0.2.1")
    come_in(gate, "192.0.2.9")
    assert isinstance(ask(gate), Refusal)
    assert counted(gate) == {"full": 4}


NEIGHBOURS: dict[str, tuple[str, str, bool]] = {
    "the same IPv4": ("192.0.2.1", "192.0.2.1", True),
    "the next IPv4": ("192.0.2.1", "192.0.2.2", False),
    "the same IPv6": ("2001:db8::1", "2001:db8::1", True),
    "the same, written otherwise": ("2001:db8::1", "2001:0DB8:0:0:0:0:0:1", True),
    "the same /64": ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
    "the next /64": ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
    "another network": ("2001:db8::1", "2001:db9::1", False),
    "a mapped IPv4 and itself": ("::ffff:192.0.2.1", "192.0.2.1", True),
    "two mapped IPv4": ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    "a mapped IPv4 and an IPv6": ("::ffff:192.0.2.1", "::1", False),
    "link-local with a scope": ("fe80::1%eth0", "fe80::2%eth0", True),
    "with and without a scope": ("fe80::1%2", "fe80::1", True),
}


@pytest.mark.parametrize(("one", "other", "together"), NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_who_counts_as_the_same_address(one: str, other: str, together: bool) -> None:
    """IPv4 singly, IPv6 by the /64 that anybody has, and an IPv4 in IPv6's clothes as the IPv4 it is."""

    @in_loop
    async def story() -> None:
        gate = await gate_of(max_per_address=2)
        addresses = [come_in(gate, one), come_in(gate, one)]
        answer = ask(gate, address=other)
        assert isinstance(answer, Refusal) == together
        assert counted(gate) == ({"address_full": 1} if together else {})
        if together:
            assert answer == Refusal(503, "too many of this address", 5)
        for address in addresses:
            gate.leave(address)
        assert gate.connected == {}
        come_in(gate, other)

    story()


@pytest.mark.parametrize("seed", range(5))
def test_the_limits_hold_in_any_order_of_coming_and_going(seed: int) -> None:
    """Never more than allowed, in all and per address; whoever could be let in is; at the end nothing is left."""
    chance = random.Random(seed)
    most, per_address = chance.randrange(5, 30), chance.randrange(1, 8)

    @in_loop
    async def story() -> None:
        gate = await gate_of(max_connections=most, max_per_address=per_address)
        inside: list[str] = []
        expected: Counter[str] = Counter()
        for _ in range(3000):
            if inside and chance.random() < 0.45:
                gate.leave(inside.pop(chance.randrange(len(inside))))
                continue
            network = chance.randrange(8)
            address = chance.choice(
                [f"192.0.2.{network}", f"::ffff:192.0.2.{network}", f"2001:db8:0:{network}::5"]
            )
            mine = come_in_or_not(gate, address)
            counts = Counter(inside)
            if len(inside) >= most:
                expected["full"] += 1
                assert mine is None
            elif counts[key_of(address)] >= per_address:
                expected["address_full"] += 1
                assert mine is None
            else:
                assert mine == key_of(address)
                inside.append(mine)
            assert gate.connected == Counter(inside)
            assert counted(gate) == +expected
        assert min(expected.values()) > 10, "the limits were hardly reached"
        for address in inside:
            gate.leave(address)
        assert gate.connected == {}
        for number in range(most):
            come_in(gate, f"198.51.100.{number}")
        assert ask(gate) == Refusal(503, "too many subscribers", 5)

    story()


def key_of(address: str) -> str:
    """Under which an address of the test above is counted."""
    if address.startswith("2001:"):
        return address.removesuffix("5") + "/64" if not address.startswith("2001:db8:0:0:") else "2001:db8::/64"
    return address.removeprefix("::ffff:")


def come_in_or_not(gate: Gate, address: str) -> str | None:
    answer = ask(gate, address=address)
    if isinstance(answer, Refusal):
        return None
    gate.enter(answer.address)
    return answer.address


# Channels

CHANNEL_LIMITS: dict[str, tuple[int, str, int | None]] = {
    "as many as allowed": (16, "", None),
    "one more": (17, "query", 400),
    "many more": (60, "query", 400),
}


@pytest.mark.parametrize(("count", "cause", "status"), CHANNEL_LIMITS.values(), ids=CHANNEL_LIMITS.keys())
def test_the_channels_of_one_connection(count: int, cause: str, status: int | None) -> None:
    """`channels.max_per_connection` is allowed; more is an error of the client."""

    @in_loop
    async def story() -> None:
        gate = await gate_of()
        answer = ask(gate, "&".join(f"channel=events.{number}" for number in range(count)))
        assert (answer.status if isinstance(answer, Refusal) else None) == status
        assert counted(gate) == ({cause: 1} if cause else {})

    story()


@in_loop
async def test_asking_opens_nothing() -> None:
    """A channel is opened for whoever enters, not for whoever asks: asking alone takes no room."""
    house = await House.opened(channels=ChannelsTable(max_open=2))
    for number in range(100):
        assert isinstance(ask(house.admission, f"channel=events.{number}"), Admitted)
    assert set(house.channels.open) == {CHANNEL}
    assert counted(house.admission) == {}


# Shares of the open channels


def listing(*names: str) -> str:
    return "&".join(f"channel=events.{name}" for name in names)


@in_loop
async def test_one_address_cannot_hold_all_channels() -> None:
    """It may hold its share, however many connections it has; another address still finds room."""
    house = await House.opened(channels=ChannelsTable(max_open=8, max_per_connection=3, max_per_address=4))
    house.connect(listing("a", "b", "c"))
    refusal = ask(house.admission, listing("d", "e"))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after_s) == (503, LIMITS.retry_after_s)
    assert counted(house.admission) == {"channel_share": 1}
    house.connect(listing("d"))
    assert isinstance(ask(house.admission, listing("e")), Refusal)
    assert isinstance(ask(house.admission, listing("e"), "192.0.2.2"), Admitted)


@in_loop
async def test_a_channel_that_is_open_already_is_in_nobody_elses_share() -> None:
    """Who joins what others have opened takes no room."""
    house = await House.opened(channels=ChannelsTable(max_open=8, max_per_address=2))
    house.connect(listing("a", "b"), address="192.0.2.2")
    house.connect(listing("c", "d"))
    assert isinstance(ask(house.admission, listing("a", "b", "c", "d")), Admitted)
    assert isinstance(ask(house.admission, listing("a", "e")), Refusal)


@in_loop
async def test_a_share_is_free_again_when_nobody_listens() -> None:
    """The channel lingers; it is given to the next address that wants it, and closed first when room is needed."""
    house = await House.opened(channels=ChannelsTable(max_open=3, max_per_address=2))
    first, second = house.connect(listing("a")), house.connect(listing("b"))
    assert isinstance(ask(house.admission, listing("c"), "192.0.2.2"), Refusal)
    first.connection.connection_lost(None)
    assert set(house.channels.open) == {CHANNEL, "events.a", "events.b"}, "it lingers"
    house.connect(listing("c"), address="192.0.2.2")
    assert set(house.channels.open) == {CHANNEL, "events.b", "events.c"}, "its room was needed"
    second.connection.connection_lost(None)
    house.connect(listing("b"), address="192.0.2.2")
    assert house.channel("events.b").opened_by == "192.0.2.2"
    house.connect(listing("b"))
    assert house.channel("events.b").opened_by == "192.0.2.2"


@in_loop
async def test_of_several_idle_channels_the_one_idle_for_the_longest_time_is_closed() -> None:
    """The default one never."""
    house = await House.opened(channels=ChannelsTable(max_open=3))
    for name in ("a", "b"):
        house.connect(listing(name)).connection.connection_lost(None)
        await asyncio.sleep(0.01)
    house.connect(listing("c"))
    assert set(house.channels.open) == {CHANNEL, "events.b", "events.c"}
    house.connect(listing("d"))
    assert set(house.channels.open) == {CHANNEL, "events.c", "events.d"}


# Rates

RATES = [1.0, 2.5, 10.0, 500.0]


def takers(gate: Gate) -> dict[str, Callable[[], bool]]:
    """By cause: one address after another for what all share, the same one for what each has."""
    addresses = (f"192.0.{number // 256}.{number % 256}" for number in itertools.count())
    return {
        "handshakes": gate.allows_handshake,
        "requests": lambda: gate.allows_request(next(addresses)),
        "address_requests": lambda: gate.allows_request("192.0.2.1"),
    }


SETTINGS = {
    "handshakes": "handshakes_per_s",
    "requests": "requests_per_s",
    "address_requests": "requests_per_address",
}


@pytest.mark.parametrize("cause", SETTINGS)
@pytest.mark.parametrize("per_s", RATES)
def test_a_rate_gives_a_seconds_worth_at_once_and_then_so_many_a_second(
    clock: Clock, per_s: float, cause: str
) -> None:
    """Silence is not saved up beyond a second, what is refused costs nothing, and each refusal is counted."""

    @in_loop
    async def story() -> None:
        limits: dict[str, Any] = {"requests_per_s": 1000.0, SETTINGS[cause]: per_s}
        gate = await gate_of(clock=clock, **limits)
        may = takers(gate)[cause]
        burst = int(per_s)
        assert [may() for _ in range(burst + 20)] == [True] * burst + [False] * 20
        assert counted(gate) == {cause: 20}
        clock.move(3600.0)
        assert [may() for _ in range(burst + 5)] == [True] * burst + [False] * 5
        assert counted(gate) == {cause: 25}
        clock.move(2 / per_s + 1e-9)
        allowed = min(burst, int(per_s - burst + 2))
        assert [may() for _ in range(allowed + 3)] == [True] * allowed + [False] * 3
        assert counted(gate) == {cause: 28}

    story()


@pytest.mark.parametrize("seed", range(5))
def test_a_rate_is_never_exceeded(clock: Clock, seed: int) -> None:
    """Whatever the rhythm: in no stretch of time more than a second's worth above the rate."""
    chance = random.Random(seed)
    per_s = chance.choice([1.0, 7.3, 50.0])

    @in_loop
    async def story() -> None:
        gate = await gate_of(clock=clock, handshakes_per_s=per_s)
        allowed: list[float] = []
        refused = 0
        for _ in range(3000):
            clock.move(chance.expovariate(2 * per_s))
            if gate.allows_handshake():
                allowed.append(clock.monotonic_s())
            else:
                refused += 1
        for _ in range(200):
            first = chance.randrange(len(allowed))
            last = chance.randrange(first, len(allowed))
            assert last - first + 1 <= (allowed[last] - allowed[first]) * per_s + per_s + 1e-6
        assert counted(gate) == {"handshakes": refused}
        assert refused + len(allowed) == 3000

    story()


@pytest.mark.parametrize("per_s", RATES)
def test_a_flood_does_not_keep_a_rate_from_being_used(clock: Clock, per_s: float) -> None:
    """However many are refused in between, as many as allowed get through."""

    @in_loop
    async def story() -> None:
        gate = await gate_of(clock=clock, handshakes_per_s=per_s)
        began_at, allowed = clock.monotonic_s(), 0
        for _ in range(5000):
            clock.move(0.02 / per_s)
            allowed += gate.allows_handshake()
        seconds = clock.monotonic_s() - began_at
        assert int(per_s) + (seconds - 1) * per_s - 2 <= allowed <= per_s + seconds * per_s

    story()


@in_loop
async def test_the_two_rates_do_not_know_of_each_other() -> None:
    """Plain requests, such as those of a monitor, do not use up the handshakes, nor the other way round."""
    gate = await gate_of(handshakes_per_s=1.0, requests_per_s=1.0)
    assert gate.allows_handshake()
    assert not gate.allows_handshake()
    assert gate.allows_request("192.0.2.1")
    assert counted(gate) == {"handshakes": 1}


@in_loop
async def test_one_address_does_not_use_up_the_requests_of_the_others() -> None:
    """Its own limit comes first: what it asks beyond that costs nobody anything."""
    gate = await gate_of(requests_per_s=10.0, requests_per_address=4.0)
    assert [gate.allows_request("192.0.2.1") for _ in range(100)] == [True] * 4 + [False] * 96
    assert [gate.allows_request("192.0.2.2") for _ in range(6)] == [True] * 4 + [False] * 2
    assert [gate.allows_request(f"192.0.2.{number}") for number in (3, 4, 5)] == [True, True, False]
    assert counted(gate) == {"address_requests": 98, "requests": 1}


@in_loop
async def test_the_requests_of_one_network_of_ipv6_count_together() -> None:
    """A client has a /64, and may take another address for each request."""
    gate = await gate_of(requests_per_address=2.0)
    addresses = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"]
    assert [gate.allows_request(address) for address in addresses] == [True, True, False, True]


def test_of_too_many_addresses_the_oldest_is_forgotten(clock: Clock) -> None:
    """What is kept per address is bounded; the limit of all of them holds."""

    @in_loop
    async def story() -> None:
        gate = await gate_of(clock=clock, requests_per_s=LIMITS.known_addresses + 1.0, requests_per_address=1.0)
        addresses = [f"10.0.{number // 256}.{number % 256}" for number in range(LIMITS.known_addresses)]
        assert all(gate.allows_request(address) for address in addresses)
        assert not gate.allows_request(addresses[0])
        assert gate.allows_request("192.0.2.1"), "the oldest is forgotten"
        assert not gate.allows_request(addresses[0])
        assert counted(gate) == {"address_requests": 1, "requests": 1}

    story()


# Requests that are not complete, or not answered


async def watching(clock: Clock, **hub: Any) -> Gate:
    """A gate on the test's clock."""
    return await gate_of(clock=clock, **hub)


def watched(gate: Gate, count: int) -> list[Guest]:
    guests = [Guest() for _ in range(count)]
    for guest in guests:
        gate.watch(guest)
    return guests


def who_expired(guests: list[Guest]) -> list[int]:
    assert {guest.expired for guest in guests} <= {0, 1}, "somebody was shown out twice"
    return [number for number, guest in enumerate(guests) if guest.expired]


@in_loop
async def test_of_too_many_the_oldest_goes() -> None:
    """As many as allowed stay; of each one more the oldest is shown out, and counted as half open."""
    gate = await gate_of(max_handshakes=3)
    guests = watched(gate, 3)
    assert (who_expired(guests), counted(gate)) == ([], {})
    guests += watched(gate, 2)
    assert (who_expired(guests), counted(gate)) == ([0, 1], {"half_open": 2})
    gate.forget(guests[3])
    guests += watched(gate, 1)
    assert who_expired(guests) == [0, 1]
    guests += watched(gate, 1)
    assert (who_expired(guests), counted(gate)) == ([0, 1, 2], {"half_open": 3})


@in_loop
async def test_with_room_for_one_the_newcomer_is_it() -> None:
    """The smallest limit still lets somebody in."""
    gate = await gate_of(max_handshakes=1)
    guests = watched(gate, 5)
    assert who_expired(guests) == [0, 1, 2, 3]
    assert counted(gate) == {"half_open": 4}


@in_loop
async def test_who_is_too_late_goes() -> None:
    """At the deadline and not before it, in order; counted as too late, once."""
    clock = Clock(1000.0)
    gate = await watching(clock, handshake_timeout_s=5.0)
    guests = watched(gate, 2)
    clock.move(1.0)
    guests += watched(gate, 2)
    gate.forget(guests[0])
    gate.forget(guests[0])
    clock.move(3.99)
    gate.evict_overdue()
    assert (who_expired(guests), counted(gate)) == ([], {})
    clock.move(0.02)
    gate.evict_overdue()
    assert (who_expired(guests), counted(gate)) == ([1], {"too_late": 1})
    clock.move(1.0)
    gate.evict_overdue()
    gate.evict_overdue()
    assert (who_expired(guests), counted(gate)) == ([1, 2, 3], {"too_late": 3})


@in_loop
async def test_who_is_handed_on_begins_anew_and_counts_once() -> None:
    """A request whose head is complete has the whole time for its body and its answer, and one place."""
    clock = Clock(1000.0)
    gate = await watching(clock, handshake_timeout_s=5.0, max_handshakes=2)
    guests = watched(gate, 2)
    clock.move(4.0)
    gate.watch(guests[0])
    assert counted(gate) == {}
    clock.move(2.0)
    gate.evict_overdue()
    assert (who_expired(guests), counted(gate)) == ([1], {"too_late": 1})
    clock.move(3.0)
    gate.evict_overdue()
    assert (who_expired(guests), counted(gate)) == ([0, 1], {"too_late": 2})


@in_loop
async def test_a_guest_may_be_forgotten_while_he_is_shown_out() -> None:
    """As the front does: to be shown out it lets go of everything, the gate included."""
    gate = await gate_of(max_handshakes=2)

    class Polite(Guest):
        def expire(self) -> bool:
            gate.forget(self)
            return super().expire()

    guests: list[Guest] = [Polite() for _ in range(5)]
    for guest in guests:
        gate.watch(guest)
    assert who_expired(guests) == [0, 1, 2]
    assert counted(gate) == {"half_open": 3}


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_watching_forgetting_and_waiting(seed: int) -> None:
    """Always the same people as in a list that is searched from the front; at the end nobody is left."""
    chance = random.Random(seed)
    most = chance.randrange(1, 20)

    @in_loop
    async def story() -> None:
        clock = Clock(1000.0)
        gate = await watching(clock, handshake_timeout_s=5.0, max_handshakes=most)
        everybody: list[Guest] = []
        model: list[tuple[Guest, float]] = []
        expected: Counter[str] = Counter()
        for _ in range(2000):
            what = chance.random()
            if what < 0.5 or not everybody:
                guest = Guest()
                everybody.append(guest)
            else:
                guest = chance.choice(everybody[-30:])
            if what < 0.6 and not guest.expired:
                model = [(other, deadline) for other, deadline in model if other is not guest]
                model.append((guest, clock.monotonic_s() + 5.0))
                gate.watch(guest)
                if len(model) > most:
                    expected["half_open"] += 1
                    assert model.pop(0)[0].expired == 1
            elif what < 0.9:
                model = [(other, deadline) for other, deadline in model if other is not guest]
                gate.forget(guest)
            else:
                clock.move(chance.expovariate(1.0))
                gate.evict_overdue()
                late = [other for other, deadline in model if deadline <= clock.monotonic_s()]
                expected["too_late"] += len(late)
                assert all(other.expired == 1 for other in late)
                model = model[len(late) :]
            assert not any(other.expired for other, _ in model)
            assert counted(gate) == +expected
        assert sum(guest.expired for guest in everybody) == expected.total()
        clock.move(5.0)
        gate.evict_overdue()
        assert gate._pending == {}

    story()


# Nothing is left


def arrive(house: House, address: str, expires_at: float | None) -> Connection:
    """Somebody who is let in, as the front does it."""
    socket = Socket()
    admitted = house.admission.admit(Target.parse("/ws"), address)
    assert isinstance(admitted, Admitted)
    connection = Connection(
        socket,
        house.context,
        wants_control=False,
        address=admitted.address,
        grant=Grant(("*",), expires_at=expires_at),
    )
    socket.protocol = connection
    names, begins = zip(*admitted.request.channels, strict=True)
    connection.open(zip(house.channels.get(*names), begins, strict=True), admitted.request.filter)
    return connection


def sizes(house: House) -> dict[str, int]:
    """How much is in each table of the gate, the roster and the fan-out; in tables of tables too."""
    found = {}
    for part in (house.admission, house.registry, house.fanout):
        for name, value in vars(part).items():
            if isinstance(value, dict | list | set | tuple) and name not in ("refused", "closed"):
                inner = value.values() if isinstance(value, dict) else value
                found[f"{type(part).__name__}.{name}"] = len(value) + sum(
                    len(table) for table in inner if isinstance(table, dict | list | set)
                )
    return found


@pytest.mark.parametrize("lasts_s", [None, 3600.0, 30 * 86_400.0], ids=["for good", "an hour", "a month"])
def test_thousands_who_have_come_and_gone_leave_nothing(lasts_s: float | None) -> None:
    """Whatever their addresses, and until whenever their tokens would have been valid."""
    chance = random.Random(1)

    @in_loop
    async def story() -> None:
        house = await House.opened()
        before = sizes(house)
        present: list[Connection] = []
        for number in range(5000):
            visitor: PendingHandshake = Guest()
            house.admission.watch(visitor)
            house.admission.forget(visitor)
            address = (
                f"2001:db8:{number % 65_536:x}::{number % 7 + 1}" if number % 2 else f"10.0.{number // 256}.9"
            )
            expires_at = None if lasts_s is None else time.time() + lasts_s + chance.uniform(0, lasts_s)
            present.append(arrive(house, address, expires_at))
            if len(present) > 100:
                leaver = present.pop(chance.randrange(len(present)))
                if chance.random() < 0.5:
                    leaver.close(wire.CloseCode.NORMAL, "")
                leaver.connection_lost(None)
        assert house.registry.connected == house.registry.by_address.total() == len(present) == 100
        for leaver in present:
            leaver.connection_lost(None)
        assert (house.registry.connected, house.registry.by_address, house.admission._pending) == (0, {}, {})
        assert not house.channel().listeners
        house.registry.settle()
        assert sizes(house) == before, "something is kept of those who have gone"
        await house.tasks.cancel()

    story()


@in_loop
async def test_who_expires_in_the_same_second_as_others_is_forgotten_alone() -> None:
    """The others of that second are still closed when it comes."""
    house = await House.opened()
    at = time.time() - 10.0
    staying = [arrive(house, ADDRESS, at) for _ in range(3)]
    leaving = arrive(house, ADDRESS, at)
    leaving.connection_lost(None)
    for _ in range(20):  # a second, and one more
        house.timer.tick()
    assert [connection.close_deadline is not None for connection in staying] == [True] * 3
    assert leaving.close_deadline is None
    assert house.registry.closed[CloseCode.EXPIRED] == 3
    await house.tasks.cancel()


def test_what_is_asked_for_is_read_once() -> None:
    """The admission carries what the query says, and until when the token is valid."""

    @in_loop
    async def story() -> None:
        gate = await gate_of()
        answer = ask(gate, "channel=events.audit&since=a-5&severity=info")
        assert isinstance(answer, Admitted)
        assert answer.request == read_query(
            (("channel", "events.audit"), ("since", "a-5"), ("severity", "info")), CHANNEL
        )
        assert (answer.address, answer.grant.expires_at) == (ADDRESS, None)

    story()

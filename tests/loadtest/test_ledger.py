"""The ledger: every delivery that should have been is counted once, and what nobody has explained is named."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest

from broadcaster.loadtest.ledger import Ledger, Missing, balance, complaint, in_words
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from tests.loadtest import columns
from tests.support import UNIT_S

OLD, NEW = "a1b2", "c3d4"


def event(number: int, position: str = "", *, error: str = "") -> PublishedRecord:
    """Event `e<number>`, stored at `position`."""
    epoch, _, offset = position.partition("-")
    place = (epoch, int(offset)) if offset else ("", None)
    return PublishedRecord(number, f"e{number}", 0, 0, 0, 0, None if error else 1, error, *place)


def stored(*numbers: int, epoch: str = OLD, shift: int = 0) -> list[PublishedRecord]:
    """Events whose offset is their number and `shift`."""
    return [event(number, f"{epoch}-{number + shift}") for number in numbers]


def came(client: int, *numbers: int) -> list[DeliveryRecord]:
    return [DeliveryRecord(client, f"e{number}", number, 0, 0) for number in numbers]


def gap(
    client: int, first: int | None, last: int | None, *, epoch: str = OLD, cause: str = "expired"
) -> LossRecord:
    return LossRecord(client, cause, epoch, first, last, None, None, "", 0, 0)


def between(
    client: int, after: int | None, before: int | None, *, cause: str = "redis_link_lost", resumed: str = ""
) -> LossRecord:
    """A loss that is known only by what came before and after it."""
    return LossRecord(client, cause, "", None, None, after, before, resumed, 0, None)


def away(client: int, after: int | None, before: int | None, *, code: int = 1006, resumed: str = "") -> LossRecord:
    return between(client, after, before, cause=f"disconnected {code}", resumed=resumed)


@dataclass(frozen=True)
class Case:
    """Attributes: `lost` by cause, `unexplained` as `client: sequences`; clients are 0 .. `clients` - 1."""

    published: list[PublishedRecord]
    deliveries: list[DeliveryRecord]
    losses: list[LossRecord] = field(default_factory=list)
    clients: int = 1
    lost: dict[str, int] = field(default_factory=dict)
    unexplained: dict[int, list[int]] = field(default_factory=dict)
    delivered: int = 0
    unconfirmed: int = 0


CASES: dict[str, Case] = {
    "all_came": Case(stored(1, 2), came(0, 1, 2) + came(1, 1, 2), clients=2, delivered=4),
    "nothing_published": Case([], [], clients=3),
    "no_clients": Case(stored(1, 2), came(0, 1), clients=0),
    "nothing_came_and_nobody_said_so": Case(stored(1, 2), [], clients=2, unexplained={0: [1, 2], 1: [1, 2]}),
    "twins_count_once": Case(stored(1, 2), came(0, 1, 1, 1), delivered=1, unexplained={0: [2]}),
    "strangers_do_not_count": Case(stored(1), came(0, 99) + came(7, 1), unexplained={0: [1]}),
    # publish failed
    "publish_failed": Case(
        [event(1), event(2, error="no answer")],
        came(0, 1) + came(1, 1),
        clients=2,
        delivered=2,
        lost={"publish failed": 2},
    ),
    "publish_failed_and_came_to_one_all_the_same": Case(
        [event(1), event(2, error="no answer")],
        came(0, 1, 2) + came(1, 1),
        clients=2,
        delivered=3,
        lost={"publish failed": 1},
        unconfirmed=1,
    ),
    "publish_failed_comes_before_every_other_cause": Case(
        [event(1, error="no answer")],
        [],
        [between(0, None, None), away(0, None, None)],
        lost={"publish failed": 1},
    ),
    # gaps with positions
    "a_gap_explains_its_range_and_no_more": Case(
        stored(*range(1, 9)),
        came(0, 1, 8),
        [gap(0, 3, 5)],
        delivered=2,
        lost={"expired": 3},
        unexplained={0: [2, 6, 7]},
    ),
    "a_gap_counts_what_did_not_come": Case(
        stored(1, 2, 3), came(0, 1, 2), [gap(0, 1, 3)], delivered=2, lost={"expired": 1}
    ),
    "a_gap_is_of_one_client": Case(
        stored(1), [], [gap(0, 1, 1)], clients=2, lost={"expired": 1}, unexplained={1: [1]}
    ),
    "a_gap_is_of_one_epoch": Case(
        stored(1, 2) + stored(3, 4, epoch=NEW, shift=-2),
        [],
        [gap(0, 1, 2, epoch=NEW)],
        lost={"expired": 2},
        unexplained={0: [1, 2]},
    ),
    "a_gap_to_the_end_of_its_epoch": Case(
        stored(1, 2, 3) + stored(4, 5, epoch=NEW),
        came(0, 1),
        [gap(0, 3, None, cause="redis_restarted")],
        delivered=1,
        lost={"redis_restarted": 1},
        unexplained={0: [2, 4, 5]},
    ),
    "a_gap_of_an_epoch_without_events": Case(stored(1), [], [gap(0, 1, None, epoch="x")], unexplained={0: [1]}),
    "gaps_that_overlap_explain_once": Case(
        stored(*range(1, 7)),
        [],
        [gap(0, 1, 4), gap(0, 3, 6, cause="refused")],
        lost={"expired": 4, "refused": 2},
    ),
    "offsets_and_sequences_need_not_agree": Case(
        [event(1, "a1b2-30"), event(2, "a1b2-10"), event(3, "a1b2-20")],
        came(0, 1),
        [gap(0, 10, 20)],
        delivered=1,
        lost={"expired": 2},
    ),
    "a_gap_with_positions_explains_no_event_without": Case(
        [event(1)], [], [gap(0, 1, None), gap(0, 1, None, epoch="")], unexplained={0: [1]}
    ),
    # losses known by their neighbours
    "a_gap_without_numbers_lies_between_its_neighbours": Case(
        [event(number) for number in range(1, 8)],
        came(0, 2, 6),
        [between(0, 2, 6)],
        delivered=2,
        lost={"redis_link_lost": 3},
        unexplained={0: [1, 7]},
    ),
    "a_gap_of_an_epoch_without_numbers": Case(
        stored(1, 2, 3),
        came(0, 1, 3),
        [LossRecord(0, "expired", OLD, None, None, 1, 3, "", 0, 0)],
        delivered=2,
        lost={"expired": 1},
    ),
    "a_window_without_resuming": Case(
        stored(*range(1, 8)),
        came(0, 2, 6),
        [away(0, 2, 6, code=4008)],
        delivered=2,
        lost={"disconnected 4008": 3},
        unexplained={0: [1, 7]},
    ),
    "a_window_open_at_its_end": Case(
        stored(1, 2, 3), came(0, 1), [away(0, 1, None)], delivered=1, lost={"disconnected 1006": 2}
    ),
    "a_window_open_at_its_beginning": Case(
        stored(1, 2, 3), came(0, 3), [away(0, None, 3)], delivered=1, lost={"disconnected 1006": 2}
    ),
    "a_window_with_resuming_explains_nothing": Case(
        stored(1, 2, 3), came(0, 1, 3), [away(0, 1, 3, resumed="a1b2-1")], delivered=2, unexplained={0: [2]}
    ),
    "a_gap_comes_before_the_window_it_lies_in": Case(
        stored(*range(1, 6)),
        came(0, 1, 5),
        [away(0, 1, 5), gap(0, 2, 3)],
        delivered=2,
        lost={"expired": 2, "disconnected 1006": 1},
    ),
    "two_windows": Case(
        stored(*range(1, 8)),
        came(0, 1, 3, 7),
        [away(0, 1, 3, code=1012), away(0, 3, 7)],
        delivered=3,
        lost={"disconnected 1006": 3, "disconnected 1012": 1},
    ),
    "two_windows_with_nothing_between_them": Case(
        stored(1, 2, 3), came(0, 1, 3), [away(0, 1, 3, code=1012), away(0, 1, 3)], delivered=2,
        lost={"disconnected 1012": 1},
    ),
    "never_connected": Case(
        stored(1, 2), came(0, 1, 2), [between(1, None, None, cause="never connected")], clients=2, delivered=2,
        lost={"never connected": 2},
    ),
    "the_order_of_the_rows_is_not_that_of_the_events": Case(
        stored(3, 1, 2), came(0, 2), [away(0, 2, None)], delivered=1, lost={"disconnected 1006": 1},
        unexplained={0: [1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_loss_is_named_once(case: Case) -> None:
    """Each case has exactly the counts that are given, and its ledger adds up."""
    ledger = balance(case.published, columns(case.published, case.deliveries), case.losses, range(case.clients))
    positions = {row.sequence: row.position for row in case.published}
    assert (ledger.delivered, ledger.lost, ledger.unconfirmed) == (case.delivered, case.lost, case.unconfirmed)
    assert ledger.unexplained == [
        Missing(client, number, positions[number])
        for client, numbers in case.unexplained.items()
        for number in numbers
    ]
    assert adds_up(ledger)
    assert ledger.expected == len(case.published) * case.clients


def adds_up(ledger: Ledger) -> bool:
    lost = ledger.named + len(ledger.unexplained)
    return ledger.expected == ledger.delivered + ledger.filtered + lost and ledger.named == sum(
        ledger.lost.values()
    )


def test_causes_are_in_the_order_of_their_weight() -> None:
    """The most frequent cause comes first."""
    losses = [gap(0, 1, 1, cause="refused"), gap(0, 2, 6), away(0, 6, None)]
    ledger = balance(stored(*range(1, 10)), columns([], []), losses, [0])
    assert list(ledger.lost.items()) == [("expired", 5), ("disconnected 1006", 3), ("refused", 1)]


# A model


def explains(loss: LossRecord, row: PublishedRecord) -> bool:
    """The definition, for one loss and one event."""
    if loss.first is not None:
        if row.offset is None or row.epoch != loss.epoch:
            return False
        return loss.first <= row.offset and (loss.last is None or row.offset <= loss.last)
    after = loss.after_sequence is None or loss.after_sequence < row.sequence
    return (
        after and (loss.before_sequence is None or row.sequence < loss.before_sequence) and not loss.resumed_after
    )


def causes_of(row: PublishedRecord, losses: list[LossRecord]) -> set[str]:
    """The causes that may be named for an event that did not come: all those of the first kind that has any."""
    if row.error:
        return {"publish failed"}
    announced = {loss.cause for loss in losses if loss.was_announced and explains(loss, row)}
    return announced or {loss.cause for loss in losses if not loss.was_announced and explains(loss, row)}


@pytest.mark.parametrize("seed", range(200))
def test_against_a_model(seed: int) -> None:
    """Whatever was published, delivered and told, in any combination: it adds up, and is as defined."""
    chance = random.Random(seed)
    published = [a_random_event(chance, number) for number in range(1, chance.randint(1, 30))]
    clients = range(chance.randint(0, 2), chance.randint(2, 6))
    deliveries = [
        delivery
        for client in range(8)
        for row in [*published, event(1000)]
        for delivery in came(client, row.sequence) * chance.choice([0, 1, 1, 1, 2])
    ]
    losses = [a_random_loss(chance) for _ in range(chance.randint(0, 12))]
    chance.shuffle(published)
    chance.shuffle(deliveries)
    ledger = balance(published, columns(published, deliveries), losses, clients)

    arrived = {(row.client, row.event_id) for row in deliveries}
    missing = [(client, row) for client in clients for row in published if (client, row.event_id) not in arrived]
    told = {client: [loss for loss in losses if loss.client == client] for client in clients}
    silent = [(client, row) for client, row in missing if not causes_of(row, told[client])]
    assert adds_up(ledger)
    assert ledger.expected == len(clients) * len(published)
    assert ledger.expected - ledger.delivered == len(missing)
    assert ledger.unexplained == sorted(Missing(client, row.sequence, row.position) for client, row in silent)
    for cause, count in ledger.lost.items():
        possible = [causes_of(row, told[client]) for client, row in missing]
        assert (
            sum(causes == {cause} for causes in possible) <= count <= sum(cause in causes for causes in possible)
        )


def a_random_event(chance: random.Random, number: int) -> PublishedRecord:
    error = "no answer" if chance.random() < 0.1 else ""
    if error or chance.random() < 0.2:
        return event(number, error=error)
    return event(number, f"{chance.choice([OLD, NEW])}-{chance.randint(1, 30)}")


def a_random_loss(chance: random.Random) -> LossRecord:
    client, low = chance.randint(0, 7), chance.choice([None, chance.randint(0, 30)])
    high = chance.choice([None, (low or 0) + chance.randint(0, 10)])
    kind = chance.randint(0, 3)
    if kind == 0 and low is not None:
        return gap(client, low, high, epoch=chance.choice([OLD, NEW]), cause=chance.choice(["expired", "refused"]))
    if kind == 1:
        return between(client, low, high)
    return away(client, low, high, code=chance.choice([1006, 1012]), resumed=chance.choice(["", "a1b2-1"]))


def test_a_large_run_is_fast() -> None:
    """1,000 clients and 2,000 events, of which half came, one tenth were told and the rest is silence: seconds."""
    published = stored(*range(1, 2001))
    deliveries = columns(published, [row for client in range(1000) for row in came(client, *range(1, 1001))])
    losses = [gap(client, first, first + 9) for client in range(1000) for first in range(1001, 1201, 10)]
    began = time.process_time()
    ledger = balance(published, deliveries, losses, range(1000))
    assert time.process_time() - began < 8 * UNIT_S
    assert (ledger.delivered, ledger.lost) == (1_000_000, {"expired": 200_000})
    assert len(ledger.unexplained) == 800_000
    assert adds_up(ledger)


# In words


def ledger_of(lost: dict[str, int], unexplained: list[Missing] | None = None, unconfirmed: int = 0) -> Ledger:
    """A ledger of 2,500 expected deliveries."""
    silent = unexplained or []
    return Ledger(2500, 2500 - sum(lost.values()) - len(silent), 0, lost, silent, unconfirmed)


def test_nothing_lost_is_one_line() -> None:
    """All came: the equation says so."""
    assert in_words(ledger_of({})) == ["Ledger: 2,500 expected = 2,500 delivered + 0 filtered + 0 lost."]


def test_losses_with_a_name_are_explained() -> None:
    """Each cause has a line with its number and what it means."""
    lost = {"redis_restarted": 1030, "disconnected 4008": 20, "publish failed": 6, "disconnected 4321": 4}
    assert in_words(ledger_of(lost, unconfirmed=7)) == [
        "Ledger: 2,500 expected = 1,440 delivered + 0 filtered + 1,060 lost, all named:",
        "  1,030  redis_restarted (gap announced by the hub)",
        "     20  disconnected 4008 (too slow)",
        "      6  publish failed (Redis has not confirmed it, and it did not come)",
        "      4  disconnected 4321 (closed by the hub)",
        "  7 of the delivered came though their publish seemed to have failed.",
    ]


def test_what_a_hub_has_said_does_no_harm_to_a_terminal() -> None:
    """Control characters in a cause are written out."""
    assert in_words(ledger_of({"\x1b[2Jgone": 1}))[1] == "  1  '\\x1b[2Jgone' (gap announced by the hub)"


def test_losses_without_a_name_are_not_hidden() -> None:
    """What nobody has told is a line of its own, and no word of `all named`."""
    missing = [Missing(7, 12, "a1b2-12"), Missing(7, 13, "a1b2-13"), Missing(9, 44, "")]
    ledger = ledger_of({"expired": 10}, missing)
    assert in_words(ledger) == [
        "Ledger: 2,500 expected = 2,487 delivered + 0 filtered + 13 lost, 3 of them without a word:",
        "  10  expired (gap announced by the hub)",
        "   3  unexplained (nobody said so: this must not happen)",
    ]
    assert complaint(ledger) == (
        "the ledger does not close: 3 deliveries are missing and nobody said so: "
        "client 7: a1b2-12, a1b2-13; client 9: #44"
    )


@pytest.mark.parametrize(("count", "words"), [(1, "1 delivery is missing"), (10, "10 deliveries are missing")])
def test_up_to_ten_are_named(count: int, words: str) -> None:
    """One is one, and ten are shown without a rest."""
    said = complaint(ledger_of({}, [Missing(1, number, "") for number in range(1, count + 1)]))
    assert words in said
    assert said.endswith(f"client 1: {', '.join(f'#{number}' for number in range(1, count + 1))}")


def test_of_many_the_first_ten_are_named() -> None:
    """After ten it says how many more there are."""
    missing = [Missing(client, number, "") for client in range(500) for number in (1, 2, 3)]
    said = complaint(ledger_of({}, missing))
    assert said.startswith(
        "the ledger does not close: 1,500 deliveries are missing and nobody said so: client 0: #1, #2"
    )
    assert said.endswith("client 3: #1 and 1,490 more")

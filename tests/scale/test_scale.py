from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.scale.agreement import compare
from tests.scale.costs import Costs
from tests.scale.document import with_tables
from tests.scale.measure import Measured
from tests.scale.model import Deployment, simulate
from tests.scale.scenarios import bottlenecks, storm, tables

COSTS = replace(
    Costs.load(),
    redis_event_us=((1, 10.0), (10, 100.0), (100, 1000.0)),
    redis_wake_us=0.0,
    redis_apply_us=5.0,
    hub_event_us=100.0,
    hub_delivery_us=10.0,
    receive_us=0.0,
    link_us=0.0,
)


@pytest.mark.parametrize(
    ("connections", "us"), [(0, 5), (1, 10), (10, 100), (20, 200), (100, 1000), (1000, 10_000)]
)
def test_redis_costs_are_interpolated_and_go_on_as_they_grew(connections: int, us: float) -> None:
    assert COSTS.redis_us(connections) == pytest.approx(us)


def test_costs_are_the_same_after_they_were_written(tmp_path: Path) -> None:
    COSTS.save(tmp_path / "costs.toml")
    assert Costs.load(tmp_path / "costs.toml") == COSTS


def test_a_delivery_comes_after_all_that_is_before_it() -> None:
    """Redis 10 µs, three links of 1 ms, the event 100 µs, and 10 µs a delivery."""
    (spread,) = simulate(Deployment(1, 1000, events=1, link_ms=1), COSTS).spreads
    assert spread.first_s == pytest.approx(3e-3 + 120e-6)
    assert spread.last_s == pytest.approx(3e-3 + 110e-6 + 1000 * 10e-6)


def test_hubs_that_share_a_core_take_turns() -> None:
    alone = simulate(Deployment(1, 1000, events=3, one_core=True), COSTS)
    four = simulate(Deployment(4, 1000, events=3, one_core=True), COSTS)
    assert four.hub_us == pytest.approx(4 * alone.hub_us)
    for one, many in zip(alone.spreads, four.spreads, strict=True):
        assert 3.9 < (many.last_s - many.first_s) / (one.last_s - one.first_s) < 4.1


def test_an_overloaded_redis_falls_behind() -> None:
    """100 hubs cost it 1 ms an event: at 2,000 a second each event waits for those before it."""
    spreads = simulate(Deployment(100, 1, rate_hz=2000, events=100), COSTS).spreads
    assert spreads[-1].last_s > spreads[0].last_s + 0.045


def test_replicas_take_hubs_off_the_master() -> None:
    assert bottlenecks(COSTS, 100, 0) == {"the master": pytest.approx(1000)}
    assert bottlenecks(COSTS, 100, 10) == {
        "the master": pytest.approx(10_000),
        "a replica": pytest.approx(1e6 / 105),
    }
    done = simulate(Deployment(100, 1, replicas=10, events=10), COSTS)
    assert done.redis_us == pytest.approx(100)


def test_a_storm_that_is_spread_is_served_as_it_comes() -> None:
    costs = replace(COSTS, hub_connect_us=100.0, hub_resume_us=0.0)
    assert max(storm(costs, 10_000, 5.0, busy=False)) == pytest.approx(5.0, rel=0.01)
    assert max(storm(costs, 10_000, 0.1, busy=False)) == pytest.approx(1.0, rel=0.01)
    assert max(storm(costs, 10_000, 0.1, busy=True)) == pytest.approx(4.0, rel=0.01)


def test_the_model_is_compared_with_what_was_measured() -> None:
    measured = Measured(2, 1000, hub_us=20_200, redis_us=17.8, spread_ms=26, first_ms=1, receive_us=0)
    often = Measured(2, 10, hub_us=400, redis_us=17.8, spread_ms=1, first_ms=1, receive_us=0)
    cpu, spread, of_redis = compare(measured, often, COSTS)
    assert (cpu.agrees, spread.agrees, of_redis.agrees) == (True, False, True)
    assert spread.modelled == pytest.approx(20.1, rel=0.02)


def test_every_scenario_has_its_table() -> None:
    found = tables(COSTS, most_hubs=100)
    assert "1,500,000" in found["growth"]
    # 100 hubs cost Redis 1 ms an event; four replicas have 25 each, and 5 µs to apply it.
    assert "|    100 |          0 |               1000 | the master" in found["redis_limit"]
    assert "|    100 |          4 |               3922 | a replica" in found["redis_limit"]
    for name in ("channels", "rolling_restart", "reconnect_storm"):
        assert found[name].count("\n") > 3


def test_tables_are_written_to_their_places() -> None:
    text = 'a\n[table]: # "one"\nold\n[end]: # "end"\nb'
    written = with_tables(text, {"one": "new"})
    assert written == 'a\n[table]: # "one"\n\nnew\n\n[end]: # "end"\nb'
    assert with_tables(written, {"one": "new"}) == written
    with pytest.raises(ValueError, match="no place for two"):
        with_tables(text, {"one": "", "two": ""})

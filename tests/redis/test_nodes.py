"""Which node a hub subscribes at, and what is wrong with one."""

from __future__ import annotations

import pytest

from broadcaster.core.runtime import Chance, Runtime
from broadcaster.redis.nodes import Nodes, why_not_a_replica
from broadcaster.settings import RedisTable
from tests.support import Clock, in_loop

A, B, C = (f"redis://user:word@{name}:6379/0" for name in "abc")


def nodes_of(*urls: str) -> tuple[Nodes, Clock]:
    clock = Clock().stop()
    table = RedisTable.model_validate({"url": "redis://m/0", "subscribe_url": list(urls)})
    return Nodes(table, Runtime(clock=clock)), clock


@in_loop
async def test_the_one_that_was_left_the_longest_time_ago_is_next() -> None:
    """Each is tried before one is tried again; why one was left is known, without its password."""
    nodes, clock = nodes_of(A, B, C)
    seen = []
    for _ in range(7):
        seen.append(nodes.url)
        clock.move(1.0)
        nodes.leave("it is gone")
    assert set(seen[:3]) == {A, B, C}
    assert seen == [*seen[:3], *seen[:3], seen[0]]
    assert nodes.moves == 7
    assert nodes.moved == f"redis://user:***@{seen[-1][18]}:6379/0: it is gone"
    assert "word" not in nodes.address


@in_loop
async def test_one_alone_is_not_left() -> None:
    """There is nowhere to go, and nothing to say."""
    nodes, _ = nodes_of(A)
    nodes.leave("it is gone")
    assert (nodes.url, nodes.moves, nodes.moved) == (A, 0, "")
    assert not nodes.has_another(0.0)


@in_loop
async def test_one_that_was_left_lately_is_no_other_one() -> None:
    """For as long as is asked."""
    nodes, clock = nodes_of(A, B)
    assert nodes.has_another(10.0)
    nodes.leave("it is late")
    clock.move(5.0)
    assert not nodes.has_another(10.0)
    assert nodes.has_another(1.0)
    clock.move(5.1)
    assert nodes.has_another(10.0)


@in_loop
async def test_another_password_changes_neither_the_node_nor_the_order() -> None:
    nodes, clock = nodes_of(A, B, C)
    order = []
    for _ in range(3):
        order.append(nodes.url)
        clock.move(1.0)
        nodes.leave("it is gone")
    others = [url.replace("word", "other") for url in (A, B, C)]
    nodes.use(RedisTable.model_validate({"url": "redis://m/0", "subscribe_url": others}))
    seen = []
    for _ in range(3):
        seen.append(nodes.url)
        clock.move(1.0)
        nodes.leave("it is gone")
    assert seen == [url.replace("word", "other") for url in order]


def test_hubs_with_the_same_list_spread() -> None:
    """Each begins with one by chance."""

    class Drawn(Chance):
        def __init__(self, number: int) -> None:
            self.number = number

        def shuffle(self, items: list[str]) -> None:  # type: ignore[override]
            items[:] = items[self.number :] + items[: self.number]

    table = RedisTable(url="redis://m/0", subscribe_url=f"{A},{B},{C}")
    assert [Nodes(table, Runtime(chance=Drawn(number))).url for number in range(3)] == [A, B, C]


MASTER = {"role": "master", "master_replid": "m"}
REPLICA = {"role": "slave", "master_replid": "m", "master_link_status": "up"}
FAULTS = {
    "": (REPLICA, MASTER),
    "it has lost its master": (REPLICA | {"master_link_status": "down"}, MASTER),
    "it is no replica: it was promoted, or does not replicate": (MASTER | {"master_replid": "x"}, MASTER),
    "it follows another master, other:1": (
        REPLICA | {"master_replid": "x", "master_host": "other", "master_port": "1"},
        MASTER,
    ),
}


@pytest.mark.parametrize(("said", "pair"), FAULTS.items())
def test_what_is_wrong_with_a_node(said: str, pair: tuple[dict[str, str], dict[str, str]]) -> None:
    assert why_not_a_replica(*pair) == said


@pytest.mark.parametrize("pair", [(MASTER, MASTER), (REPLICA, {}), ({}, MASTER)])
def test_the_master_itself_is_as_good_and_who_says_nothing_is_not_judged(
    pair: tuple[dict[str, str], dict[str, str]],
) -> None:
    """The delivery probe proves more than what a node says."""
    assert why_not_a_replica(*pair) == ""

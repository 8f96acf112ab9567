"""When a replica may have copied its master anew, and there is no log: the subscription begins anew."""

from __future__ import annotations

from typing import Any

import pytest

from broadcaster.core.errors import RedisUnavailable
from broadcaster.hub.broker.replica import Replica
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.settings import RedisTable
from tests.support import in_loop


class Scene:
    """A replica whose answers are made up, and the reasons for which it was left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        redis = RedisTable(url="redis://127.0.0.1:1", subscribe_url="redis://127.0.0.1:2")
        self.link = PubSubLink(redis)
        self.replica = Replica(redis, self.link)
        self.left = list[str]()
        self.history = "one"
        self.is_linked = True
        monkeypatch.setattr(self.link, "verify", self._verify)
        monkeypatch.setattr(self.link, "move", self.left.append)
        monkeypatch.setattr(self.replica, "_execute", self._execute)

    async def _verify(self) -> None:
        """The subscription holds."""

    async def _execute(self, *commands: Any) -> list[Any]:
        status = "up" if self.is_linked else "down"
        info = f"role:slave\r\nmaster_replid:{self.history}\r\nmaster_link_status:{status}\r\n"
        return [info.encode()]

    async def prove(self) -> str:
        """A round of the delivery probe; what is wrong, or nothing."""
        self.replica.must_be_proven()
        try:
            await self.replica.check(f"role:master\r\nmaster_replid:{self.history}\r\n".encode())
        except RedisUnavailable as error:
            return str(error).partition(": ")[2]
        return ""


@in_loop
async def test_another_history_of_the_master_between_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: with the next connection it is the history."""
    scene = Scene(monkeypatch)
    assert [await scene.prove(), await scene.prove()] == ["", ""]
    scene.history = "two"
    assert await scene.prove() == "its master has another history than before"
    assert scene.left == ["its master has another history than before"]
    scene.link.reconnects += 1
    assert [await scene.prove(), await scene.prove()] == ["", ""]
    assert len(scene.left) == 1


@in_loop
async def test_a_round_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had lost its master, or the master was not reached: once it is proven again, the subscription is not."""
    scene = Scene(monkeypatch)
    assert await scene.prove() == ""
    scene.is_linked = False
    assert await scene.prove() == "it has lost its master"
    assert scene.left == []
    scene.is_linked = True
    assert await scene.prove() == "it may have lost its master since the last proof"
    scene.link.reconnects += 1
    assert await scene.prove() == ""
    scene.replica.must_be_proven()  # and no more came of that round
    assert await scene.prove() == "it may have lost its master since the last proof"
    assert len(scene.left) == 2


@in_loop
async def test_a_connection_that_was_never_proven_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can have missed anything: rounds that fail while the hub starts are no loss."""
    scene = Scene(monkeypatch)
    scene.is_linked = False
    assert await scene.prove() == "it has lost its master"
    scene.is_linked = True
    assert [await scene.prove(), await scene.prove()] == ["", ""]
    assert scene.left == []

"""What the log of a process has, and has not."""

from __future__ import annotations

import logging

import pytest

from broadcaster.core.logs import ThrottledLog
from tests.support import Clock


def test_each_cause_has_one_line_a_minute_and_the_next_says_how_many_there_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock(1000.0)
    log = ThrottledLog(logging.getLogger("broadcaster.tests"), 60.0, clock=clock)
    caplog.set_level(logging.INFO, "broadcaster.tests")
    for _ in range(5):
        log.log(logging.INFO, "full", "refused %s", "a")
    log.log(logging.WARNING, "token", "refused %s", "b")
    assert [record.getMessage() for record in caplog.records] == ["refused a", "refused b"]
    clock.move(61)
    log.log(logging.INFO, "full", "refused %s", "c")
    clock.move(61)
    log.log(logging.INFO, "full", "refused %s", "d")
    lines = [record.getMessage() for record in caplog.records[2:]]
    assert lines == ["refused c (4 more like this since the last one)", "refused d"]

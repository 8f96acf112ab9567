"""The soak, short: the hub is sound after hundreds have come and gone; and the verdict can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.soak.course import CONNECTS_PER_S, run
from tests.soak.verdict import Sample, Soak, verdict

MIB = 2**20
DURATION_S = 8.0


@pytest.mark.timeout(240)
def test_a_hub_is_sound_after_hundreds_have_come_and_gone() -> None:
    """8 s of churn: nobody who stayed lost anything, and nothing is left of those who went."""
    soak = run(DURATION_S)
    assert verdict(soak) == []
    assert soak.samples[-1].connects > CONNECTS_PER_S * DURATION_S / 2


def sample(minute: float, memory: float) -> Sample:
    """A hub some minutes after the start, with so many MiB."""
    seconds = 60 * minute
    connects = round(50 * seconds)
    return Sample(seconds, round(memory * MIB), 80, 70, round(50 * seconds), round(3000 * seconds), connects)


def measured(last_mib: float = 60.0) -> Soak:
    """A sound soak of 10 minutes; from the warm-up on its memory goes to `last_mib` in a straight line."""
    warming = [sample(minute / 2, 40 + 5 * minute) for minute in range(1, 5)]
    return Soak(
        ready=True,
        published=30_000,
        stayers={"plain 0": 30_000, "the library": 30_000},
        samples=warming
        + [sample(minute / 2, 60 + (last_mib - 60) * (minute - 4) / 16) for minute in range(4, 21)],
        files_before=20,
        files_after=21,
        ended={"plain": 6000, "cut": 3},
        output=["listening on ws://127.0.0.1:8765/ws", "ready: events get through"],
        exit_code=0,
    )


def test_a_sound_soak_is_passed() -> None:
    """Growth before the end of the warm-up, and a little after it, is nothing wrong."""
    assert verdict(measured()) == []
    assert verdict(measured(62)) == []
    assert verdict(measured(50)) == []


BROKEN: dict[str, tuple[Soak, str]] = {
    "not ready": (replace(measured(), ready=False), "not ready"),
    "dead": (replace(measured(), exit_code=70), "ended with 70"),
    "still running": (replace(measured(), exit_code=None), "ended with None"),
    "lost one": (
        replace(measured(), stayers={"v1": 29_999, "plain": 30_000}),
        "v1 stayed, and was given 29999 of",
    ),
    "one twice": (replace(measured(), stayers={"v1": 30_001}), "v1 stayed, and was given 30001 of"),
    "nobody stayed": (replace(measured(), stayers={}), "nobody stayed"),
    "nothing published": (replace(measured(), published=0, stayers={"v1": 0}), "nothing was published"),
    "a complaint": (replace(measured(), complaints=["v1: [7] are missing after 6"]), "[7] are missing after 6"),
    "files": (replace(measured(), files_after=30), "30 files are open"),
    "still there": (replace(measured(), left=2), "2 are still connected"),
    "a leak": (measured(75), "the memory has grown by"),
    "too few samples": (replace(measured(), samples=measured().samples[:4]), "only 4 samples"),
    "a traceback": (replace(measured(), output=["Traceback (most recent call last):"]), "the hub said: Traceback"),
    "an error": (replace(measured(), output=["error: no such thing"]), "the hub said: error"),
    "nobody was slow": (replace(measured(), ended={"plain": 9, "cut": 0}), "nobody was cut"),
}


@pytest.mark.parametrize(("soak", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_measurement_fails(soak: Soak, words: str) -> None:
    """Each thing that is wrong is named, and nothing else."""
    [wrong] = verdict(soak)
    assert words in wrong


def test_a_leak_of_connections_alone_breaks_the_bound() -> None:
    """A leak of 930 bytes for each who is let in, five in six, under noise: in 10 minutes it is found."""
    noise = [0.3, -0.4, 0.1, -0.2, 0.5]
    leaking = measured(60 + 8 * 60 * 50 * 5 / 6 * 930 / MIB)
    samples = [
        replace(one, memory=one.memory + round(noise[number % 5] * MIB))
        for number, one in enumerate(leaking.samples)
    ]
    assert "the memory has grown by" in "".join(verdict(replace(leaking, samples=samples)))

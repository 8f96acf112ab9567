"""The patches with which the simulator is tested fit the product as it is, and each says what it fails with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.bites import FOUND, SHOWN_BY, applies, name_of, patches


@pytest.mark.parametrize("patch", patches(), ids=name_of)
def test_a_patch_applies(patch: Path) -> None:
    """Whoever changes what it changes mends it, too."""
    assert applies(patch)


def test_each_patch_is_found_by_a_seed_or_shown_by_a_test() -> None:
    """One of the two, and nothing else is said to be."""
    assert sorted([*FOUND, *SHOWN_BY]) == sorted(map(name_of, patches()))

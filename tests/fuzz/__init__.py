"""Arbitrary input for everything that reads bytes of strangers; `FUZZ_EXAMPLES=n` tries n random ones per test."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "broadcaster-fuzz")  # nothing is kept in the repository

_ASKED: Final = os.environ.get("FUZZ_EXAMPLES", "")


def fuzzed(examples: int) -> settings:
    """Try so many examples, the same ones each time; with `FUZZ_EXAMPLES` that many, and other ones each time."""
    return settings(
        max_examples=int(_ASKED or examples),
        derandomize=not _ASKED,
        database=None,
        deadline=None,
        print_blob=bool(_ASKED),
        suppress_health_check=list(HealthCheck),
    )


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in parts, cut at these places (each modulo its length)."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


CUTS: Final = st.lists(st.integers(0, 1 << 16), max_size=12)
"""Where `cut` cuts."""


def mutated(valid: st.SearchStrategy[bytes], snippets: list[bytes]) -> st.SearchStrategy[bytes]:
    """Something right with up to four things done to it: bytes replaced, put in, left out or said twice."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        data = draw(valid)
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, len(data)))
            end = min(len(data), start + draw(st.integers(0, 12)))
            piece = draw(st.one_of(st.sampled_from(snippets), st.binary(max_size=4), st.just(data[start:end] * 2)))
            data = data[:start] + piece + data[end:]
        return data

    return mutate()

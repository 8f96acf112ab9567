"""The C programs: built with gcc, once per version of their text, outside the source tree."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.processes import TrialError

_HERE: Final = Path(__file__).resolve().parent
_NAMES: Final = ("floor", "load", "publish", "flood")
_COMPILE: Final = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra")
_LIBRARIES: Final = {"load": ("-lz",)}
"""Of these it does without (`zlib1g-dev`), and cannot inflate then."""


class NoCompilerError(Exception):
    """There is no gcc to build the tools with."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of the built programs."""

    floor: str
    load: str
    publish: str
    flood: str


def build_tools() -> Tools:
    """Build what is not yet in the cache.

    Raises:
        NoCompilerError: gcc is not installed.
        TrialError: gcc refused the text.
    """
    if shutil.which(_COMPILE[0]) is None:
        raise NoCompilerError("gcc is needed to build the measuring tools (Debian, Ubuntu: apt install gcc)")
    folder = _cache() / _version()
    folder.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        if not (folder / name).exists():
            _compile(_HERE / f"{name}.c", folder / name)
    return Tools(*(str(folder / name) for name in _NAMES))


def _compile(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [*_COMPILE, "-o", str(built), str(source)]
        done = subprocess.run(
            [*command, *_LIBRARIES.get(source.stem, ())], capture_output=True, text=True, check=False
        )
        if done.returncode:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrialError(f"gcc {source.name}: {done.stderr.strip().splitlines()[0]}")
        built.replace(target)  # complete or not there, also with two builds at a time


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "broadcaster-bench"


def _version() -> str:
    """A name that changes with the sources and the flags."""
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for file in sorted(_HERE.glob("*.[ch]")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

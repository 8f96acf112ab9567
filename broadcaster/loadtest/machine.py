"""The machine and the versions of a run, so that figures can be compared honestly."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from broadcaster.core.version import VERSION


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a run: `cpu` is the model, `cores` those usable here, `load_1m` the load average.

    `sanic` is empty where only the hub, elsewhere, has it; `commit` where this is no checkout.
    """

    broadcaster: str
    system: str
    cpu: str
    cores: int
    load_1m: float
    python: str
    sanic: str
    uvloop: str
    websockets: str
    redis_py: str
    hiredis: str
    redis_server: str
    commit: str


def describe(redis_server: str) -> Machine:
    """Describe this machine; the version of the Redis server is not known here."""
    return Machine(
        broadcaster=VERSION,
        system=f"{platform.system()} {platform.release()}",
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load_1m=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        sanic=_sanic(),
        uvloop=version("uvloop"),
        websockets=version("websockets"),
        redis_py=version("redis"),
        hiredis=version("hiredis"),
        redis_server=redis_server,
        commit=_commit(Path(__file__).parents[2]),
    )


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or another user's folder
        return ""


def _sanic() -> str:
    try:
        return version("sanic")
    except PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()

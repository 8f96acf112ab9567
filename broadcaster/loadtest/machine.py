"""The machine and the versions of a run, so that figures can be compared honestly."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from broadcaster.core.version import VERSION


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a run: `cpu` is the model, `cores` those usable here, `load_1m` the load average.

    `sanic` is empty where only the hub, elsewhere, has it.
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
    )


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

"""What is shipped: the package and nothing else."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT, WHOLE_RUN_S, clean_environment
from tests.test_honcho import Honcho, table_of

STARTER_FILES = (
    *("Procfile", "Procfile.loadtest", "broadcaster.toml"),
    *("config/burst.toml", "config/fanout.toml", "config/smoke.toml", "config/redis.acl"),
    *("config/nginx.conf", "config/haproxy.cfg", "config/broadcaster-hub@.service"),
)
"""What `broadcaster init` writes: files at the top of the repository, and nowhere else in it."""

NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from the sdist of a copy of the sources (a build leaves files beside them)."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE, symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    built = subprocess.run(
        [*command, str(folder / "source")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = (folder / "dist").glob("*.whl")
    return path


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_package_only(wheel: Path) -> None:
    """Modules, scripts, type marker, what `init` writes, metadata; nothing else of the checkout, and no link."""
    names = names_in(wheel)
    package = {name for name in names if name.startswith("broadcaster/")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "broadcaster").rglob("*.py")}
    scripts = {f"broadcaster/redis/{path.name}" for path in (ROOT / "broadcaster" / "redis").glob("*.lua")}
    folders = ("hub/web/client", "hub/web/page", "loadtest/report/page")
    web = {str(path.relative_to(ROOT)) for name in folders for path in (ROOT / "broadcaster" / name).glob("*.*")}
    starter = {f"broadcaster/starter/{name}": (ROOT / name).read_bytes() for name in STARTER_FILES}
    assert package == {*sources, *scripts, *web, "broadcaster/py.typed", *starter}
    with zipfile.ZipFile(wheel) as archive:
        assert {name: archive.read(name) for name in starter} == starter
    others = {name.partition("/")[0] for name in names - package}
    assert len(others) == 1
    assert others.pop().endswith(".dist-info")


def test_the_wheel_has_a_name_of_its_own(wheel: Path) -> None:
    """`broadcaster` belongs to somebody else on PyPI; the command and the licence come along."""
    assert not wheel.name.startswith("broadcaster-")
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        headers = email.message_from_bytes(archive.read(metadata))
        [scripts] = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        assert "broadcaster = broadcaster.cli:main" in archive.read(scripts).decode()
        assert [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert wheel.name.startswith(headers["Name"].replace("-", "_") + "-" + headers["Version"])
    assert headers["Requires-Python"] == ">=3.11"
    assert {"hub", "loadtest", "server", "all", "dev"} <= set(headers.get_all("Provides-Extra", []))


def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Its package alone answers on the command line and can be imported."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import broadcaster, sys; print(broadcaster.__file__); from broadcaster.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", script, "config", "show"],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(tmp_path / "site")),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    path, *shown = ended.stdout.splitlines()
    assert path == str(tmp_path / "site" / "broadcaster" / "__init__.py")
    assert shown[0] == "[event]"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment with the wheel; what it depends on is lent by this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, str(wheel)], env=clean_environment(), check=True, timeout=55)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_the_wheel_is_enough(environment: Path, tmp_path: Path) -> None:
    """Installed, and in an empty folder: `init` writes its files, and a load test runs without any of them."""

    class Installed(Honcho):
        program = ("/usr/bin/env", "PATH=/usr/bin:/bin", str(environment / "broadcaster"))

    (tmp_path / "empty").mkdir()
    with Installed(tmp_path / "empty", "loadtest", "--preset", "smoke", "--events", "3") as run:
        assert run.wait(within=WHOLE_RUN_S) == 0, run.output
    assert table_of(run.printed("report.1"))["Received deliveries"] == ["15"]
    with Installed(tmp_path, "init", "wall") as init:
        assert init.wait() == 0, init.output
    for name in STARTER_FILES:
        assert (tmp_path / "wall" / name).read_bytes() == (ROOT / name).read_bytes()

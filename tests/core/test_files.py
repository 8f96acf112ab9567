"""Files that are whole whatever happens: to the process that writes them, or to the machine."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from broadcaster.core.files import check_replaceable, flush_to_disk, whole_file


class Disk:
    """What is asked of the operating system, in order; flushes can be made to fail.

    Attributes:
        asked: Names with what was flushed or given: the content of a file, or that it is a folder.
        refusal: The error number with which a flush is refused, by what is flushed.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.refusal: dict[str, int] = {}
        self._fsync, self._replace = os.fsync, os.replace
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            kind, content = "folder", ""
        else:
            kind, content = "file", Path(f"/proc/self/fd/{descriptor}").read_text()
        self.asked.append(f"flush {kind} {content}".rstrip())
        if kind in self.refusal:
            raise OSError(self.refusal[kind], "refused")
        self._fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self.asked.append("rename")
        self._replace(source, target)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def write(path: Path, text: str, *, durable: bool = True) -> None:
    with whole_file(path, durable=durable) as file:
        file.write(text)


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(disk: Disk, tmp_path: Path) -> None:
    """Else a crash of the machine may leave the new name with nothing in it; the name itself comes last."""
    write(tmp_path / "kept", "new")
    assert disk.asked == ["flush file new", "rename", "flush folder"]
    assert (tmp_path / "kept").read_text() == "new"


def test_other_files_do_not_wait_for_the_disk(disk: Disk, tmp_path: Path) -> None:
    """They are whole whatever becomes of the process, and that is all they promise."""
    write(tmp_path / "kept", "new", durable=False)
    assert disk.asked == ["rename"]


@pytest.mark.parametrize("durable", [False, True])
def test_what_fails_leaves_the_old_file_and_no_other(durable: bool, tmp_path: Path) -> None:
    """An error in the block, an interruption included."""
    kept = tmp_path / "kept"
    write(kept, "old")

    def interrupted() -> None:
        with whole_file(kept, durable=durable) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "old"


def test_a_disk_that_fails_leaves_the_old_file(disk: Disk, tmp_path: Path) -> None:
    """What could not be flushed does not get the name."""
    kept = tmp_path / "kept"
    write(kept, "old")
    disk.refusal["file"] = errno.EIO
    with pytest.raises(OSError, match="refused"):
        write(kept, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_system_that_cannot_flush_is_no_error(kind: str, disk: Disk, tmp_path: Path) -> None:
    """Some cannot flush folders."""
    disk.refusal[kind] = errno.EINVAL
    write(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "new"


def test_a_folder_that_may_not_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be written to: that is enough."""

    def refuse(*arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "new"


def test_a_file_is_flushed_with_what_a_buffer_still_holds(disk: Disk, tmp_path: Path) -> None:
    """The file stays open."""
    with (tmp_path / "log").open("a") as file:
        file.write("line")
        flush_to_disk(file)
        assert disk.asked == ["flush file line"]


def test_what_has_no_disk_needs_no_flush() -> None:
    """A pipe, a device."""
    with open("/dev/null", "a") as file:
        flush_to_disk(file)


# What a file is, it stays


def test_a_link_stays_a_link_and_a_mode_is_kept(tmp_path: Path) -> None:
    """A file that others may not read is none that they may read after it was saved."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_file_that_cannot_be_replaced_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is mounted into a container: a rename is refused, since it is busy."""
    path = tmp_path / "mounted"
    path.write_text("a longer text than the new one")

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with whole_file(path, durable=True) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A device, such as /dev/null, stays one: here a named pipe, which is read meanwhile."""
    path = tmp_path / "device"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with whole_file(path, durable=True) as file:
            file.write("all of it")
        assert os.read(reader, 100) == b"all of it"
    finally:
        os.close(reader)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_look_whether_a_file_can_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    for name in ("there", "new"):
        check_replaceable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "old"
    with pytest.raises(FileNotFoundError):
        check_replaceable(tmp_path / "nowhere" / "new")

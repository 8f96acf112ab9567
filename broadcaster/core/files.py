"""Atomic file writes, and the files that this package brings along."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, TextIO

STARTER: Final = Path(__file__).parent.parent / "starter"
"""Procfiles, broadcaster.toml and config/; in a checkout, links to those at its top."""


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[TextIO]:
    """Open a file for writing that replaces `path`, complete, when the block ends without an error.

    A link stays one, and the mode of a file is kept. A file that cannot be replaced, since it is mounted, is
    overwritten; so is a device, such as /dev/null.

    Args:
        path: Its name.
        durable: Whether the old or the new file, whole, is there also after a crash of the machine. That waits for
            the disk twice: 0.7 ms instead of 0.3 where that has a cache of its own, up to 30 ms where it has none.

    Raises:
        OSError: It cannot be written; `path` is left as it was, or replaced and perhaps not on the disk.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("w", newline="", encoding="utf-8") as file:
            yield file
        return
    draft = _draft_of(path)
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            if path.exists():
                draft.chmod(path.stat().st_mode & 0o7777)
            yield file
            if durable:
                flush_to_disk(file)  # before the new name is: else a crash may leave that name, and nothing in it
        _replace(path, draft)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        _flush_folder(path.parent)


def check_replaceable(path: Path) -> None:
    """Try what `whole_file` needs to replace a file, and leave the file as it is.

    Rights say less: root has all of them, also in /proc.

    Raises:
        OSError: No file can be made beside it.
    """
    draft = _draft_of(path.resolve())
    draft.touch()
    draft.unlink()


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _replace(path: Path, draft: Path) -> None:
    try:
        draft.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a file that is mounted, as into a container
            raise
        with path.open("r+b") as file:
            file.write(draft.read_bytes())
            file.truncate()
            os.fsync(file.fileno())
        draft.unlink()


def flush_to_disk(file: IO[str]) -> None:
    """Wait until all that was written to a file is on its disk; a pipe or a terminal has none.

    Raises:
        OSError: The disk has failed.
    """
    file.flush()
    _flush(file.fileno())


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the new name is on the disk a little later
        return
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this kind of file cannot be flushed
            raise

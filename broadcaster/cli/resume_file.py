"""The resume file of `broadcaster subscribe`: its positions, kept from one run to the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Final

from broadcaster.core.errors import ConfigurationError, OutputError
from broadcaster.core.files import check_replaceable, flush_to_disk, whole_file
from broadcaster.core.position import Position
from broadcaster.core.runtime import CLOCK
from broadcaster.core.text import reason

SAVE_EVERY_S: Final = 0.2
"""Seconds between the end of a save and the next one: each waits for the disk, see `whole_file`."""

_NULL: Final = Path(os.devnull)

_MOST_BYTES: Final = 2**20
"""More than any file of positions has: 1024 channels take a tenth of it."""


class ResumeFile:
    """Positions per channel, kept in a file from one run to the next.

    Attributes:
        printed: Up to where everything was printed; what is saved.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved: dict[str, Position] = {}
        self._saved_at = 0.0
        self.printed: dict[str, Position] = {}

    def load(self) -> dict[str, Position]:
        """The saved positions; none if there is no file yet.

        Raises:
            ConfigurationError: The file cannot be read or written, or is no resume file.
        """
        try:
            text = self._read()
            fields = json.loads(text) if text.strip() else {}  # empty: made beforehand, so begin now
            if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
                raise ValueError("it should have a JSON object with a position for each channel")
            self._saved = {channel: Position.parse(position) for channel, position in fields.items()}
        except FileNotFoundError:
            self._saved = {}
        except OSError as error:
            raise ConfigurationError(f"{self._path} cannot be read: {reason(error)}") from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"{self._path} is no file of positions: it is no UTF-8") from None
        except RecursionError:
            raise ConfigurationError(f"{self._path} is no file of positions: it is nested too deeply") from None
        except ValueError as error:
            raise ConfigurationError(f"{self._path} is no file of positions: {error}") from None
        if self._path.resolve() != _NULL:
            self._check_writable()
        self.printed = dict(self._saved)
        return dict(self._saved)

    def _read(self) -> str:
        """What is in the file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is too large, or no UTF-8.
            ConfigurationError: It is something to read from which never ends, such as a pipe; /dev/null does.
        """
        is_special = self._path.exists() and not self._path.is_file()
        if is_special and self._path.resolve() != _NULL:
            raise ConfigurationError(f"{self._path} is no ordinary file; --resume-file needs one")
        with self._path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return content.decode()

    def _check_writable(self) -> None:
        """Find out now, and not when the first events have come.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        try:
            check_replaceable(self._path)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {self._path}: no file can be made in its folder ({reason(error)})"
            ) from None

    def save(self, *, now: bool = False, log_file: IO[str] | None = None) -> None:
        """Save if a position has changed, and not too often; the file is complete at any time.

        Args:
            now: However short a time ago the last save was.
            log_file: Where the events were written, too: they are on the disk before their positions are.

        Raises:
            OutputError: The file cannot be written.
        """
        positions = self.printed
        if positions == self._saved or not (now or CLOCK.monotonic_s() - self._saved_at > SAVE_EVERY_S):
            return
        try:
            if log_file is not None:
                flush_to_disk(log_file)
            with whole_file(self._path, durable=True) as file:
                json.dump({channel: str(position) for channel, position in positions.items()}, file)
        except OSError as error:
            raise OutputError(self._path, error) from None
        self._saved, self._saved_at = positions, CLOCK.monotonic_s()

"""A file of lines that loses none while its disk is full, read-only or away: they wait in memory.

append --> waiting lines --write, whole lines only--> path, which is opened again when it fails

Lines are not synced: what a power cut takes is little, and a sync in each step is not.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import own_name, read_file
from pipeline.log import logger
from pipeline.resilience.bookkeeping import bookkeeping

MAX_WAITING_BYTES = 64 * 2**20
"""Of lines in memory, some hundred thousand logged steps; beyond it the oldest are lost."""
MOST_BYTES = 1 << 30
"""Of a file of lines that is read: a million logged steps."""


class RowFile:
    """Lines appended to a file, in order, as soon as that is possible."""

    def __init__(self, path: Path) -> None:
        """Lines for `path`; its folder is made when it is written, and again when it has gone."""
        self.path = path
        self.num_lost = 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._file: FileIO | None = None

    def append(self, line: bytes) -> None:
        """Write the line, which ends with a line break, and all that wait before it."""
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.num_lost += 1
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, as far as it goes."""
        with bookkeeping(str(self.path)):
            while self._waiting:
                self._write(self._opened(), self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())

    def close(self) -> None:
        """Try a last time; say how many lines are lost."""
        self.flush()
        self._forget()
        if lost := self.num_lost + len(self._waiting):
            logger.warning("%s: %d lines could not be written and are lost", self.path, lost)

    def _opened(self) -> FileIO:
        """The file that has the name now: the one that was opened may have been deleted."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat()):
                    return self._file
            self._forget()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(self.path, "ab+", opener=own_name)
        # A line begins at the start of one: a killed process may have left half of the last.
        if size := self._file.seek(0, os.SEEK_END):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._write(self._file, b"\n")
        return self._file

    def _write(self, file: FileIO, line: bytes) -> None:
        """Append all of the line, or nothing: a full disk takes the first part of one."""
        before, written = os.fstat(file.fileno()).st_size, 0
        try:
            while written < len(line):
                written += file.write(line[written:]) or 0
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), before)
            self._forget()  # a server may have lost the handle: the next try opens anew
            raise

    def _forget(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # some file systems tell of a failed write here
                self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines that are rows: a killed process leaves half a line.

    Raises:
        DataError: the file cannot be read.
    """
    import orjson

    rows = []
    try:
        lines = read_file(path, most=MOST_BYTES).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    for line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows

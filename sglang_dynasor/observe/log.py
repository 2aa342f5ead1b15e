"""Records as lines of a file, written beside the front process's loop: a disk that is slow or full holds nobody up."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Full, Queue
from typing import Any, BinaryIO

from sglang_dynasor.observe.line import read_line

logger = logging.getLogger(__name__)
MOST_FILE_BYTES = 64 << 20  # of FILE; then it becomes FILE.1, FILE.1 becomes FILE.2, and so on
NUM_OLDER = 4  # of these are kept
MOST_READ_BYTES = 64 << 20  # of the ends of files that were there before
MOST_UNWRITTEN = 10_000  # lines; where the disk is slower than programs end, further ones are lost, and counted


class RecordLog:
    """Appends lines of JSON to `path` while `is_on`. It is one server's: two that write to one file are promised nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.is_on = True
        self.num_written = 0
        self.num_lost = 0
        self._lines: Queue[str] = Queue(MOST_UNWRITTEN)
        self._thread: threading.Thread | None = None
        self._may_be_cut = True  # whether the file may end inside a line: by a crash, or a disk that was full
        self._has_warned = False

    def write(self, line: dict[str, Any]) -> None:
        """Have a line written soon; never waits."""
        if not self.is_on:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dynasor-log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(json.dumps(line))
        except Full:
            self.num_lost += 1

    def newest(self, num_lines: int) -> list[dict[str, Any]]:
        """What the last lines of FILE say, and of the files before it, the oldest first; nothing where there is none.

        What is no line of a log is left out. However long the files are, this takes about a second at most. What is no file (a
        pipe, a device) is not read.
        """
        found: list[dict[str, Any]] = []
        num_bytes = MOST_READ_BYTES
        for path in (self.path, *map(self._older, range(1, NUM_OLDER + 1))):
            if len(found) == num_lines or num_bytes <= 0:
                break
            if not path.is_file():
                continue
            try:
                last = _end(path, num_bytes)
            except OSError:
                continue
            num_bytes -= len(last)
            found += _newest_first(last, num_lines - len(found))
        return found[::-1]

    def flush(self) -> None:
        """Wait until what was given is written, or lost."""
        self._lines.join()

    def _older(self, number: int) -> Path:
        """FILE.1, FILE.2, ...; beside the file itself, where FILE is a link to it."""
        return Path(f"{os.path.realpath(self.path)}.{number}")

    def _run(self) -> None:
        while True:
            line = self._lines.get().encode() + b"\n"
            try:
                self._append(line)
                self.num_written += 1
            except OSError as error:
                self.num_lost += 1
                self._may_be_cut = True
                if self.num_lost == 1:
                    logger.error(
                        "dynasor: a record could not be written to --dynasor-log=%s (%s); logged once", self.path, error
                    )
            finally:
                self._lines.task_done()

    def _append(self, line: bytes) -> None:
        with self.path.open("ab") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                file.write(line)
                return
            if not status.st_size or status.st_size + len(line) <= MOST_FILE_BYTES or not self._rotate():
                self._append_to(file, line, status.st_size)
                return
        with self.path.open("ab") as file:
            self._append_to(file, line, os.fstat(file.fileno()).st_size)

    def _append_to(self, file: BinaryIO, line: bytes, size: int) -> None:
        if self._may_be_cut and size and not self._ends_a_line():
            line = b"\n" + line  # else this one would be lost with the one that was cut
        file.write(line)
        file.flush()
        self._may_be_cut = False

    def _ends_a_line(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read() == b"\n"
        except OSError:
            return False  # it may only be written

    def _rotate(self) -> bool:
        """Make FILE the first of the older ones; whether that was done. If not, FILE grows: no line is lost for it."""
        try:
            # No further than where one is missing: what is renamed again and again, because the last step fails, would be lost.
            num_older = next(
                number for number in range(NUM_OLDER + 1) if not self._older(number + 1).exists() or number == NUM_OLDER
            )
            for number in range(min(num_older, NUM_OLDER - 1), 0, -1):
                os.replace(self._older(number), self._older(number + 1))
            os.replace(os.path.realpath(self.path), self._older(1))
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "dynasor: --dynasor-log=%s grows beyond %d MiB: it could not be renamed (%s); logged once",
                    self.path, MOST_FILE_BYTES >> 20, error,
                )  # fmt: skip
            self._has_warned = True
            return False
        return True


def _end(path: Path, num_bytes: int) -> bytes:
    """The end of a file, from the beginning of a line."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > num_bytes:
            file.seek(size - num_bytes - 1)
            file.readline()  # the rest of a line, or the end of one
        return file.read(num_bytes)


def _newest_first(text: bytes, num_lines: int) -> Iterator[dict[str, Any]]:
    """What the last lines say, so many that say something; of ten times as many at most, for a file may be full of nothing."""
    end = len(text)
    for _ in range(10 * num_lines):
        if not num_lines or end < 0:
            return
        begin = text.rfind(b"\n", 0, end)
        if (line := read_line(text[begin + 1 : end])) is not None:
            num_lines -= 1
            yield line
        end = begin

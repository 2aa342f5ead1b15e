"""Records as lines of a file, written beside the front process's loop: a disk that is slow or full holds nobody up."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from pathlib import Path
from queue import Full, Queue
from typing import Any

logger = logging.getLogger(__name__)
MOST_READ_BYTES = 64 << 20  # of the end of a file that was there before
MOST_UNWRITTEN = 10_000  # lines; where the disk is slower than programs end, further ones are lost, and counted


class RecordLog:
    """Appends lines of JSON to `path` while `is_on`."""

    def __init__(self, path: Path):
        self.path = path
        self.is_on = True
        self.num_written = 0
        self.num_lost = 0
        self._lines: Queue[str] = Queue(MOST_UNWRITTEN)
        self._thread: threading.Thread | None = None

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
        """What the file's last lines say, the oldest first; nothing where there is no file. A line that was cut off is left out.

        However long the file is, this takes about a second at most. What is no file (a pipe, a device) is not read.
        """
        if not self.path.is_file():
            return []
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - MOST_READ_BYTES))
                last = deque(file, num_lines)
        except OSError:
            return []
        return [line for text in last if (line := _read(text)) is not None]

    def flush(self) -> None:
        """Wait until what was given is written, or lost."""
        self._lines.join()

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            try:
                with self.path.open("a") as file:
                    file.write(line + "\n")
                self.num_written += 1
            except OSError as error:
                self.num_lost += 1
                if self.num_lost == 1:
                    logger.error(
                        "dynasor: a record could not be written to --dynasor-log=%s (%s); logged once", self.path, error
                    )
            finally:
                self._lines.task_done()


def _read(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return (
        line
        if isinstance(line, dict) and isinstance(line.get("record"), dict) and "program" in line["record"]
        else None
    )

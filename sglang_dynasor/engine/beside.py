"""Questions that are answered beside the scheduler's loop, in threads of the first rank, within a time-out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # a program's number and its branch
Found = TypeVar("Found")
MOST_AT_ONCE = 16


class Beside(Generic[Found]):
    """Whatever goes wrong costs that one answer and nothing else: counted, and logged once per kind.

    The time-out counts from `ask`, also while others are before it.

    Args:
        name: of the threads.
        wrong, then: what the log says went wrong, before the error, and what follows from it.
    """

    def __init__(self, timeout_s: float, name: str, wrong: str, then: str):
        self.timeout_s = timeout_s
        self.num_errors = 0
        self._name = name
        self._wrong = wrong
        self._then = then
        self._asked: dict[Key, float] = {}  # when
        self._given: dict[Key, Found | None] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._logged: set[str] = set()

    def ask(self, key: Key, prepare: Callable[[], Callable[[], Found]] | None) -> None:
        """Have a question answered; the answer is among `given` within the time-out.

        Args:
            prepare: called now; what it returns is called in a thread. None: somebody else answers, and only the time-out is kept.
        """
        self._asked[key] = time.monotonic()
        if prepare is None:
            return
        try:
            find = prepare()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix=f"dynasor-{self._name}")
            self._pool.submit(self._run, key, find)
        except Exception as error:  # of threads, of the tokenizer: this rank must not take another path than the others
            self._log(error)
            self._give(key, None)

    def given(self) -> Iterator[tuple[Key, Found | None]]:
        """Answers that have come, None for those that will not in time, until they are forgotten."""
        if not self._asked:
            return iter(())
        latest = time.monotonic() - self.timeout_s
        for key, asked in self._asked.items():  # in order of asking
            if asked > latest:
                break
            if key not in self._given:
                self._log(TimeoutError("no answer in time"))
                self._give(key, None)
        with self._lock:
            return iter(list(self._given.items()))

    def forget(self, key: Key) -> None:
        """The answer has been used, or is no longer wanted."""
        self._asked.pop(key, None)
        with self._lock:
            self._given.pop(key, None)

    def _give(self, key: Key, found: Found | None) -> None:
        with self._lock:
            if key in self._asked and key not in self._given:
                self.num_errors += found is None
                self._given[key] = found

    def _run(self, key: Key, find: Callable[[], Found]) -> None:
        if key not in self._asked:
            return
        found = None
        try:
            found = find()
        except Exception as error:
            self._log(error)
        self._give(key, found)

    def _log(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error("dynasor: %s (%s: %s); %s. Logged once", self._wrong, kind, error, self._then)

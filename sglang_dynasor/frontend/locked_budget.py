"""A budget that searches of several threads spend together."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.policy.shared_budget import SharedBudget


class LockedBudget:
    """A shared budget behind a lock, and who waits for it.

    Args:
        tokens: of all programs together.
        num_programs: that will come.
        rows: most branches at once.
    """

    def __init__(self, tokens: int, num_programs: int, rows: int):
        self.budget = SharedBudget(tokens, num_programs)
        self.rows = rows
        self._changed = threading.Condition()

    @contextmanager
    def open(self) -> Generator[SharedBudget]:
        """The budget, while nobody else spends of it; what follows from the change is done at the end."""
        with self._changed:
            try:
                yield self.budget
            finally:
                while self.budget.due:
                    self.budget.share_out(self.rows, lambda owner: 0)  # nobody knows how far a request has come
                self._changed.notify_all()

    def leave(self, algorithm: Algorithm) -> None:
        """An algorithm is over. No harm if it never joined."""
        with self.open() as budget:
            for number in [number for number, member in budget.members.items() if member.owner is algorithm]:
                budget.leave(number)

    def wait(self, algorithm: Algorithm, timeout_s: float | None) -> bool:
        """Wait until an algorithm that has nothing in flight may start something, or is over. Returns whether either is so."""
        with self._changed:
            return self._changed.wait_for(lambda: algorithm.reason is not None or algorithm.budget > 0, timeout_s)

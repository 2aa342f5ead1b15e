"""A number of tokens for many programs: each branch goes where it may change most for its price.

Easy questions are decided by a few branches; what they leave, hard ones get, up to each one's cap.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from sglang_dynasor.policy.evidence import Evidence


def branch_worth(evidence: Evidence) -> float:
    """What one more branch brings for the price of a usual one, in [0, 2]: 1 for a program's first, 0 where nothing can change.

    The risk is what all the branches left may change, and each further one changes less. Those in flight are counted as if they
    had come.
    """
    return evidence.risk * evidence.cheapness / (evidence.num_finished + evidence.num_in_flight + 1)


@dataclass(slots=True)
class Budget:
    """Tokens that are left for a set of programs, and who is to spend them.

    A branch is paid for by what it is expected to take when it starts, and by what it took when it has finished. So the budget
    is overdrawn at most by what branches in flight take beyond that.
    """

    left_tokens: float
    offers: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    # ^ by program: what its next branch is worth, and what it is expected to take
    paid_tokens: dict[int, float] = field(default_factory=dict[int, float])  # by program: for its branches in flight
    _ranked: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])  # heap; stale entries are void

    def offer(self, program: int, evidence: Evidence, expected_tokens: float) -> None:
        """A program may start one more branch. Offered again after each change of its evidence."""
        worth = branch_worth(evidence)
        self.offers[program] = worth, expected_tokens
        heapq.heappush(self._ranked, (-worth, program))

    def withdraw(self, program: int) -> None:
        """A program starts no more branches: it was decided, or has used its cap."""
        self.offers.pop(program, None)

    def take(self) -> int | None:
        """The program whose next branch is worth most of those that can be paid for, of equals the first; it is paid for.

        None where no branch is worth anything or can be paid for.
        """
        passed: list[tuple[float, int]] = []
        taken = None
        while self._ranked and taken is None:
            entry = heapq.heappop(self._ranked)
            program = entry[1]
            worth, expected_tokens = self.offers.get(program, (0.0, 0.0))
            if worth != -entry[0] or worth <= 0:
                continue  # void
            if expected_tokens > self.left_tokens:
                passed.append(entry)
                continue
            taken = program
            self.left_tokens -= expected_tokens
            self.paid_tokens[program] = self.paid_tokens.get(program, 0.0) + expected_tokens
            del self.offers[program]
        for entry in passed:
            heapq.heappush(self._ranked, entry)
        return taken

    def settle(self, program: int, expected_tokens: float, num_tokens: int) -> None:
        """A branch that was paid for by `expected_tokens` has taken `num_tokens`."""
        self.paid_tokens[program] -= expected_tokens
        self.left_tokens += expected_tokens - num_tokens

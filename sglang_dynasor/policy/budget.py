"""A number of tokens for many programs: each branch goes where it may change most for its price.

Easy questions are decided by a few branches; what they leave, hard ones get, up to each one's cap.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from math import inf

from sglang_dynasor.policy.evidence import Evidence

MOST_PASSED = 8  # offers that cannot be paid for and are passed over in one look: bounds the look


def branch_worth(evidence: Evidence) -> float:
    """What a program's next branch brings for the price of a usual one, in [0, 2]: 1 for its first, 0 where nothing can change.

    The risk is what all the branches left may change, and each further one changes less.
    """
    return evidence.risk * evidence.cheapness / (evidence.num_finished + 1)


@dataclass(slots=True)
class Budget:
    """Tokens that are left for a set of programs, and who is to spend them; of each program one branch at a time.

    So much is held for a branch when it starts; when it has finished it is paid for by what it took, and the rest comes back. So
    the budget is overdrawn at most by what branches in flight take beyond what is held for them.
    """

    left_tokens: float
    offers: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    # ^ by program: what its next branch is worth, and what is held for it
    held_tokens: dict[int, float] = field(default_factory=dict[int, float])  # by program: for its branch in flight
    _none_at: float = -inf  # tokens that were left when all were looked at and nobody could be paid for
    _ranked: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])  # heap; stale entries are void

    def offer(self, program: int, evidence: Evidence, tokens: float) -> None:
        """A program may start one more branch, for which `tokens` are held. Offered again after each change of its evidence."""
        worth = branch_worth(evidence)
        self.offers[program] = worth, tokens
        if tokens <= self.left_tokens:
            self._none_at = -inf
        heapq.heappush(self._ranked, (-worth, program))

    def withdraw(self, program: int) -> None:
        """A program starts no more branches: it was decided, or has used its cap."""
        self.offers.pop(program, None)

    def take(self) -> int | None:
        """The program whose next branch is worth most of those that can be paid for, of equals the first; its tokens are held.

        None where no branch is worth anything or can be paid for. While tokens are held, which may come back, of the most worth
        MOST_PASSED are looked at; else all, once, as those who are waiting have nothing to wait for.
        """
        looks_at_all = not self.held_tokens and self.left_tokens > self._none_at
        most_passed = len(self._ranked) if looks_at_all else MOST_PASSED
        passed: list[tuple[float, int]] = []
        taken = None
        while self._ranked and taken is None and len(passed) < most_passed:
            entry = heapq.heappop(self._ranked)
            program = entry[1]
            worth, tokens = self.offers.get(program, (0.0, 0.0))
            if worth != -entry[0] or worth <= 0:
                continue  # void
            if tokens > self.left_tokens:
                passed.append(entry)
                continue
            taken = program
            self.hold(program, tokens)
            del self.offers[program]
        for entry in passed:
            heapq.heappush(self._ranked, entry)
        if looks_at_all and taken is None:
            self._none_at = self.left_tokens
        return taken

    def hold(self, program: int, tokens: float) -> None:
        """Let at least `tokens` be held for the program's branch, whatever is left."""
        more = tokens - self.held_tokens.get(program, 0.0)
        if more > 0:
            self.left_tokens -= more
            self.held_tokens[program] = tokens

    def settle(self, program: int, num_tokens: float) -> None:
        """The program's branch has taken `num_tokens`."""
        self.left_tokens += self.held_tokens.pop(program, 0.0) - num_tokens

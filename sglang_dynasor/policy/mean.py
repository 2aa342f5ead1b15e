"""Means that follow a changing load, and what is expected where little has been seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 256  # observations after which a running mean forgets as fast as it learns
STEP_FRAC = 0.2  # by which a mean must have moved before forecasts do
PRIOR_BRANCHES = 2  # a program's own mean length is trusted like the server's after this many branches


@dataclass(slots=True)
class Mean:
    """A running mean that starts from a guess and follows a changing load.

    `value` follows it in steps: were it to move with every observation, programs that are alike would be forecast apart by
    noise, and go in any order instead of in order of arrival.
    """

    value: float
    mean: float = 0.0
    num: int = 0

    def learn(self, x: float) -> None:
        self.num = min(self.num + 1, MEMORY)
        self.mean += (x - self.mean) / self.num
        if abs(self.mean - self.value) > STEP_FRAC * self.value:
            self.value = self.mean


def expected_tokens(lengths: Sequence[int], usual_tokens: float) -> float:
    """Expected length of a program's next branch: the mean of its finished ones, shrunk to what is usual on this server."""
    return (sum(lengths) + PRIOR_BRANCHES * usual_tokens) / (len(lengths) + PRIOR_BRANCHES)


def cheapness(lengths: Sequence[int], usual_tokens: float) -> float:
    """How many of a program's branches the price of a usual one buys, 1/2 to 2; 1 while none has finished.

    A branch that may change the answer is worth more where it is short.
    """
    return min(2.0, max(0.5, usual_tokens / max(1e-9, expected_tokens(lengths, usual_tokens))))

"""How confident a branch is in its own tokens: DeepConf's group confidence, and when a branch is weak.

Source: "Deep Think with Confidence", arXiv 2508.15260, sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

MOST_WARMUP_BRANCHES = 16
FEWEST_WARMUP_BRANCHES = 3


@dataclass(slots=True)
class Confidence:
    """Token confidences of one branch so far, in groups of the last `group_tokens`.

    A token's confidence is minus the mean log-probability of the most likely tokens in its place (nats, 0 or more): high
    where the model sees one way to go on.
    """

    group_tokens: int
    _recent: deque[float] = field(default_factory=deque[float])
    _total: float = 0.0  # of the recent ones
    _lowest_total: float = inf  # of the full groups so far
    _score: float | None = None  # of a branch that has ended

    def add(self, confidence: float) -> None:
        """Take in the next token. One without a number (its logits were not finite) is left out."""
        if confidence != confidence:
            return
        recent = self._recent  # runs for every branch in every step
        recent.append(confidence)
        self._total += confidence
        if len(recent) >= self.group_tokens:
            if len(recent) > self.group_tokens:
                self._total -= recent.popleft()
            if self._total < self._lowest_total:
                self._lowest_total = self._total

    def close(self) -> None:
        """No more tokens come: keep the score, not the tokens."""
        self._score = self.lowest
        self._recent.clear()

    @property
    def group(self) -> float | None:
        """Mean over the last `group_tokens`; None until there are that many."""
        return self._total / self.group_tokens if len(self._recent) == self.group_tokens else None

    @property
    def lowest(self) -> float:
        """The branch's score: its lowest group, or the mean of a branch shorter than a group; 0 without tokens."""
        if self._score is not None:
            return self._score
        if self._lowest_total < inf:
            return self._lowest_total / self.group_tokens
        return self._total / len(self._recent) if self._recent else 0.0


def warmup_branches(cap: int) -> int:
    """Branches that must finish before confidence decides anything: a quarter of the cap, 3 to 16, never above the cap."""
    return min(cap, MOST_WARMUP_BRANCHES, max(FEWEST_WARMUP_BRANCHES, cap // 4))


def weak_level(lowest: Sequence[float], weak_frac: float) -> float | None:
    """The confidence below which a running branch is weak: the quantile `weak_frac` of the warm-up branches' lowest groups.

    Returns:
        None where nothing is weak: no branches, or `weak_frac` 0. Between two of them it is interpolated.
    """
    if not lowest or weak_frac <= 0:
        return None
    ordered = sorted(lowest)
    place = weak_frac * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

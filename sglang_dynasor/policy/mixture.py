"""What branches would answer, before they have: the distributions at their answers' first token, mixed.

The entropy of the mixture is the mean entropy of its parts (each branch's own doubt) plus their disagreement (the
Jensen-Shannon divergence): votes weighed by how sure each branch is of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import NamedTuple

Distribution = Mapping[int, float]  # token id -> log-probability, of the most likely ones


@dataclass(frozen=True, slots=True)
class Mixture:
    """All in nats, 0 or more. `entropy` = `mean_entropy` + `disagreement`."""

    num_branches: int
    entropy: float
    mean_entropy: float

    def agreed(self, num_more: int) -> Mixture:
        """The mixture if `num_more` branches joined that are as sure as can be of one and the same answer (about)."""
        num = self.num_branches + num_more
        share = self.num_branches / num
        return Mixture(num, share * self.entropy, share * self.mean_entropy)

    @property
    def disagreement(self) -> float:
        return max(0.0, self.entropy - self.mean_entropy)


class Part(NamedTuple):
    """One branch's distribution, worked out once."""

    probabilities: dict[int | None, float]  # by token; None: all that the distribution leaves out
    entropy: float


def part_of(distribution: Distribution) -> Part:
    """The distribution as a part of a mixture. What it leaves out counts as one further token, the same for all."""
    parts: dict[int | None, float] = {token: exp(logprob) for token, logprob in distribution.items()}
    parts[None] = max(0.0, 1.0 - sum(parts.values()))
    return Part(parts, _entropy(parts.values()))


def mix(parts: Sequence[Part]) -> Mixture:
    """The mixture in equal parts; all 0 for none."""
    if not parts:
        return Mixture(0, 0.0, 0.0)
    total: dict[int | None, float] = {}
    for part in parts:
        for token, p in part.probabilities.items():
            total[token] = total.get(token, 0.0) + p
    num = len(parts)
    return Mixture(num, _entropy([p / num for p in total.values()]), sum(part.entropy for part in parts) / num)


def _entropy(probabilities: Iterable[float]) -> float:
    return -sum([p * log(p) for p in probabilities if p > 0])

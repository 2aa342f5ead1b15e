"""What branches would answer, before they have: the distributions at their answers' first token, mixed.

The entropy of the mixture is the mean entropy of its parts (each branch's own doubt) plus their disagreement (the
Jensen-Shannon divergence): votes weighed by how sure each branch is of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

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


def mix(distributions: Sequence[Distribution]) -> Mixture:
    """The mixture in equal parts; all 0 for none. What a distribution leaves out counts as one further token, the same for all."""
    if not distributions:
        return Mixture(0, 0.0, 0.0)
    total: dict[int | None, float] = {}
    mean_entropy = 0.0
    for distribution in distributions:
        parts: dict[int | None, float] = {token: exp(logprob) for token, logprob in distribution.items()}
        parts[None] = max(0.0, 1.0 - sum(parts.values()))
        mean_entropy += _entropy(parts) / len(distributions)
        for token, p in parts.items():
            total[token] = total.get(token, 0.0) + p / len(distributions)
    return Mixture(len(distributions), _entropy(total), mean_entropy)


def _entropy(parts: Mapping[int | None, float]) -> float:
    return -sum(p * log(p) for p in parts.values() if p > 0)

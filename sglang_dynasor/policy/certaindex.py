"""How sure a program already is: the paper's normalised entropy, and the risk that more branches change the answer.

Everything is a pure function of counts. The same counts give the same float on every rank, so decisions agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import comb, log
from operator import mul

PRIOR = 0.5  # Jeffreys' Dirichlet prior on each answer seen, on one unseen answer, and on abstention


def answer_entropy(counts: Sequence[int]) -> float:
    """Entropy in nats of answers with these votes; 0 for no votes. Source: arXiv 2412.20993, section 3.1."""
    total = sum(counts)
    return -sum(c / total * log(c / total) for c in counts if c) if total else 0.0


def entropy_certaindex(counts: Sequence[int]) -> float:
    """The paper's certaindex (log n - H) / log n in [0, 1]: 1 = unanimous, 0 = all different; 0 below two votes.

    It is not size-invariant: an even two-way tie scores 0.57 at n=5 and 0.75 at n=16.
    Source: arXiv 2412.20993, section 3.1.
    """
    total = sum(counts)
    return 1.0 - answer_entropy(counts) / log(total) if total > 1 else 0.0


def beta_certainty(first: int, second: int) -> float:
    """P(p > 1/2) under Beta(first + 1, second + 1): Adaptive-Consistency's stopping score, exactly.

    Source: Aggarwal et al., EMNLP 2023, https://github.com/Pranjal2041/AdaptiveConsistency.
    """
    n = first + second + 1
    return sum(comb(n, j) for j in range(first + 1)) / 2**n


@lru_cache(maxsize=65536)
def overtake_risk(counts: tuple[int, ...], abstentions: int, num_left: int) -> float:
    """The chance that the leading answer is not the leader once the branches still left have voted.

    Args:
        counts: votes per answer, descending.
        abstentions: branches that gave no answer.
        num_left: branches the program may still finish.

    Returns:
        A union bound in [0, 1] over every other answer j and one answer not seen yet, of
        P(Yj - Y1 > c1 - cj) + P(Yj - Y1 = c1 - cj) / 2, the future votes Y being Dirichlet-multinomial with prior
        PRIOR. 1 when nobody voted; 0 exactly when the lead exceeds `num_left`.

    Source: docs/architecture.md, "Predictive stopping".
    """
    if not counts:
        return 1.0
    first = counts[0]
    total_alpha = sum(counts) + abstentions + PRIOR * (len(counts) + 2)
    norm = _rising(total_alpha, num_left)[num_left]
    leader = _rising(first + PRIOR, num_left)
    risk = 0.0
    rivals = Counter(counts[1:])
    rivals[0] += 1  # the answer nobody gave yet
    for votes, multiplicity in rivals.items():
        lead = first - votes
        if lead > num_left:
            continue
        rival = _rising(votes + PRIOR, num_left)
        others = _rising(total_alpha - first - votes - 2 * PRIOR, num_left)[::-1]  # by what they leave to these two
        overtaken = 0.0
        for y1 in range((num_left - lead) // 2 + 1):
            tie = y1 + lead  # votes of the rival at which it is level
            ahead = sum(map(mul, rival[tie : num_left - y1 + 1], others[y1 + tie :]))
            overtaken += leader[y1] * (ahead - rival[tie] * others[y1 + tie] / 2)
        risk += multiplicity * overtaken / norm
    return min(1.0, risk)


@lru_cache(maxsize=65536)
def _rising(alpha: float, upto: int) -> tuple[float, ...]:
    """alpha (alpha + 1) ... (alpha + y - 1) / y! for y = 0..upto: the Dirichlet-multinomial's weights."""
    weights = [1.0]
    for y in range(1, upto + 1):
        weights.append(weights[-1] * (alpha + y - 1) / y)
    return tuple(weights)

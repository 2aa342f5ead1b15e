"""How sure a program already is: the paper's normalised entropy, and the risk that more branches change the answer.

Everything is a pure function of counts. The same counts give the same float on every rank, so decisions agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import log, prod

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
    against = term = 1  # of 2**n equally likely outcomes: those with at most `second` heads
    for heads in range(1, second + 1):
        term = term * (n - heads + 1) // heads
        against += term
    return (2**n - against) / 2**n


@lru_cache(maxsize=1024)
def overtake_risk(counts: tuple[int, ...], abstentions: int, num_left: int) -> float:
    """The chance that the leading answer is not the leader once the branches still left have voted.

    Args:
        counts: votes per answer, descending.
        abstentions: branches that gave no answer.
        num_left: branches the program may still finish.

    Returns:
        A union bound in [0, 1] over every other answer j and one answer not seen yet, of
        P(Yj - Y1 > c1 - cj) + P(Yj - Y1 = c1 - cj) / 2, the future votes Y being Dirichlet-multinomial with prior
        PRIOR. 1 when nobody voted, and of far more than a thousand branches, for which floats are too small; 0 exactly when
        the lead exceeds `num_left`. Takes time in proportion to `num_left` times the number of different counts.

    Source: docs/architecture.md, "Predictive stopping".
    """
    if not counts:
        return 1.0
    total_alpha = sum(counts) + abstentions + PRIOR * (len(counts) + 2)
    rivals = Counter(counts[1:])
    rivals[0] += 1  # the answer nobody gave yet
    return min(1.0, sum(num * _overtaken(counts[0], votes, total_alpha, num_left) for votes, num in rivals.items()))


def _overtaken(first: int, second: int, total_alpha: float, num_left: int) -> float:
    """One term of the union bound: half the chance that the rival with `second` votes is ever level with the leader.

    Once they are level the future is the same for both, so of the ways in which they come level the rival stays ahead at
    the end in half (a tie counted half): the reflection principle, which holds for these votes as they are exchangeable.
    The two are level for the first time after m votes of theirs with chance lead / m times that they are level then, as in
    the ballot theorem; and how many of the votes left are theirs is beta-binomial.
    """
    lead = first - second
    if lead == 0:
        return 0.5
    if lead > num_left:
        return 0.0
    both, others = first + second + 2 * PRIOR, total_alpha - first - second - 2 * PRIOR
    share = total = 1.0  # in proportion to the chance that m of the votes left are theirs; the sum of those
    level = prod((second + PRIOR + i) / (both + i) for i in range(lead))  # the chance that m of theirs bring them level
    met = overtaken = 0.0  # the chance that they have been level by m votes of theirs; the sum of share * met
    for m in range(1, num_left + 1):
        share *= (num_left - m + 1) * (both + m - 1) / (m * (others + num_left - m))
        total += share
        if m < lead:
            continue
        if not (m - lead) % 2:
            met += level * lead / m
            up, down = (m + lead) // 2, (m - lead) // 2  # votes left of the rival's and of the leader's
            level *= (m + 1) * (m + 2) * (second + PRIOR + up) * (first + PRIOR + down)
            level /= (up + 1) * (down + 1) * (both + m) * (both + m + 1)
        overtaken += share * met
    return overtaken / total / 2

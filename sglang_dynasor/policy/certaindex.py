"""How sure a program already is: the paper's normalised entropy, and the risk that more branches change the answer.

Everything is a pure function of counts. The same counts give the same float on every rank, so decisions agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import log, prod, sqrt

TRUST_STEPS = 8
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


@lru_cache(maxsize=4096)
def trust(num_finished: int, num_in_flight: int) -> float:
    """What each finished branch counts for as evidence, in eighths: 1 where none is in flight, the less the more are.

    Of branches that started together the first to finish are the short ones, which agree more often than all will.
    Source: docs/architecture.md, "Predictive stopping".
    """
    share = num_finished / max(1, num_finished + num_in_flight)
    return max(1, round(TRUST_STEPS * sqrt(share))) / TRUST_STEPS


@lru_cache(maxsize=1024)
def overtake_risk(counts: tuple[int, ...], abstentions: int, num_left: int, trust: float = 1.0) -> float:
    """The chance that the leading answer is not the leader once the branches still left have voted.

    Args:
        counts: votes per answer, descending.
        abstentions: branches that gave no answer.
        num_left: branches the program may still finish.
        trust: what each branch that finished counts for as evidence of the votes to come; leads are whole all the same.

    Returns:
        A union bound in [0, 1] over every other answer j and one answer not seen yet, of
        P(Yj - Y1 > c1 - cj) + P(Yj - Y1 = c1 - cj) / 2, the future votes Y being Dirichlet-multinomial with prior
        PRIOR. 1 when nobody voted, and of far more than a thousand branches, for which floats are too small; 0 exactly when
        the lead exceeds `num_left`. Takes time in proportion to `num_left` times the number of different counts.

    Source: docs/architecture.md, "Predictive stopping".
    """
    if not counts:
        return 1.0
    total = trust * (sum(counts) + abstentions) + PRIOR * (len(counts) + 2)
    rivals = Counter(counts[1:])
    rivals[0] += 1  # the answer nobody gave yet
    first = counts[0]
    leader = trust * first + PRIOR
    return min(
        1.0,
        sum(
            num * _overtaken(first - votes, leader, trust * votes + PRIOR, total, num_left)
            for votes, num in rivals.items()
        ),
    )


def _overtaken(lead: int, leader: float, rival: float, total: float, num_left: int) -> float:
    """One term of the union bound: the chance that one rival is ahead at the end, a tie counted half.

    `leader`, `rival` and `total` are the prior's and the votes' evidence together; how many of the votes left are the two's is
    beta-binomial. Of m votes of theirs the chance changes with m in two ways only:

    - They may be level for the first time after m votes: with chance lead / m times that they are level then, as in the
      ballot theorem. From there on the rival is ahead in half of the ways, had both the same evidence (the reflection
      principle).
    - Where trust is below 1 the rival has the more evidence once they are level, as votes to come count in full. So it is
      likelier to take the next vote from there, by half of the difference.
    """
    if lead == 0:
        return 0.5
    if lead > num_left:
        return 0.0
    both, others = leader + rival, total - leader - rival
    share = mass = 1.0  # in proportion to the chance that m of the votes left are theirs; the sum of those
    level = prod((rival + i) / (both + i) for i in range(lead))  # the chance that m of theirs bring them level
    bias = (rival + lead - leader) / 2  # half the difference of their evidence when level
    ahead = overtaken = 0.0  # the chance that m of theirs put the rival ahead; the sum of share * ahead
    for m in range(1, num_left + 1):
        share *= (num_left - m + 1) * (both + m - 1) / (m * (others + num_left - m))
        mass += share
        if m < lead:
            continue
        if not (m - lead) % 2:
            ahead += level * lead / (2 * m)
        else:
            ahead += level * bias / (both + m - 1)
            up, down = (m - 1 + lead) // 2, (m - 1 - lead) // 2  # votes left of the rival's and of the leader's
            level *= m * (m + 1) * (rival + up) * (leader + down)
            level /= (up + 1) * (down + 1) * (both + m - 1) * (both + m)
        overtaken += share * ahead
    return overtaken / mass

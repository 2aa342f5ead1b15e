"""How many branches are worth running at once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule


def votes_needed(evidence: Evidence, rule: StopRule) -> int:
    """The fewest further votes, all for the leader, after which `rule` would stop the program.

    More branches in flight than that are spent before the rule can say so: when the first ones agree, the others are
    nearly done. Fewer would wait in turn for a decision that none of them can bring.

    Returns:
        1 to `evidence.num_left`; 0 where even that many would not do, as with the rule `never`, or where that cannot be
        said: another answer leads by weight. Of rewards the best is assumed.
    """
    if not rule.reads_order:  # programs with the same votes share
        evidence = replace(evidence, recent=(None,) * len(evidence.recent))
    return _votes_needed(evidence, rule)


@lru_cache(maxsize=4096)
def _votes_needed(evidence: Evidence, rule: StopRule) -> int:
    if evidence.is_contested:
        return 0
    voted = [key for key in evidence.recent if key is not None]
    leader = max(voted, key=voted.count, default="?")
    counts, recent, num_left = list(evidence.counts) or [0], evidence.recent, evidence.num_left
    weights = list(evidence.weights)
    mean_weight = sum(weights) / max(1, evidence.num_votes)
    for num_votes in range(1, evidence.num_left + 1):
        counts[0] += 1
        if weights:
            weights[0] += mean_weight
        recent, num_left = (*recent, leader), num_left - 1
        agreed = replace(
            evidence,
            counts=tuple(counts),
            weights=tuple(weights),
            rewards=(*evidence.rewards, *[1.0] * num_votes),
            mixture=evidence.mixture.agreed(num_votes),
            recent=recent,
            num_left=num_left,
        )
        if rule.stops(agreed):
            return num_votes
    return 0


def fair_share(num_rows: int, expected: int, all_expected: int) -> int:
    """Rows of a program when live programs share them by the branches each still expects to need, at least 1.

    This is the width that the load allows: an idle engine runs a program wide (latency), a loaded one narrow (compute),
    and among programs the uncertain get more. It is proportional, so there is no threshold to oscillate around, and it
    governs only how many branches start, never ends one.
    """
    return max(1, num_rows * expected // max(1, expected, all_expected))

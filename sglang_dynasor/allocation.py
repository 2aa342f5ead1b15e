"""How many branches are worth running at once."""

from __future__ import annotations

from dataclasses import replace

from sglang_dynasor.stopping import Evidence, StopRule


def votes_needed(evidence: Evidence, rule: StopRule, at_most: int) -> int:
    """The fewest further votes, all for the leader, after which `rule` would stop the program.

    More branches in flight than that would be spent before the rule could say so: when the first ones agree, the others
    are nearly done. Fewer would wait in turn for a decision that none of them can bring.

    Returns:
        1 to `at_most`; `at_most` where even that many would not do, as with the rule `never`.
    """
    voted = [key for key in evidence.recent if key is not None]
    leader = max(voted, key=voted.count, default="?")
    counts, recent, num_left = list(evidence.counts) or [0], evidence.recent, evidence.num_left
    for num_votes in range(1, at_most):
        counts[0] += 1
        recent, num_left = (*recent, leader), num_left - 1
        if num_left < 0 or rule.stops(replace(evidence, counts=tuple(counts), recent=recent, num_left=num_left)):
            return num_votes
    return at_most

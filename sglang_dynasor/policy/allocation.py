"""How many votes could decide."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile
from math import lcm

from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import RULES, StopRule


def votes_needed(evidence: Evidence, rule: StopRule, near: int = 1) -> int:
    """The fewest further votes, all for the leader, after which `rule` would stop the program.

    More branches in flight than that are spent before the rule can say so: when the first ones agree, the others are
    nearly done. Fewer would wait in turn for a decision that none of them can bring.

    Args:
        near: where to look first; a good guess saves time and changes nothing.

    Returns:
        1 to `evidence.num_left`; 0 where even that many would not do, as with the rule `never`, or where that cannot be
        said: another answer leads by weight. Of rewards the best is assumed.
    """
    if evidence.is_contested or (rule.needs_all and rule.uses("never")):
        return 0
    reads_keys = rule.function is not None or rule.uses("window")
    leader = _leader(evidence) if reads_keys else "?"
    if rule.function is not None:
        each = range(1, evidence.num_left + 1)
        return next((num for num in each if rule.stops(agreed(evidence, num, leader))), 0)
    groups = [rule.parts] if rule.needs_all else [(part,) for part in rule.parts]
    return min(filter(None, (_all_hold_after(evidence, parts, leader, near) for parts in groups)), default=0)


def _all_hold_after(evidence: Evidence, parts: Iterable[tuple[str, float]], leader: str, near: int) -> int:
    """The fewest after which all these rules hold; 0: never.

    Every rule but `window` goes on holding while votes agree, so that where it begins is searched for. `window` holds
    again and again, whenever its last window has just become full, from the first one that agrees on.
    """
    num, period = 1, 1
    for name, level in parts:
        if name == "window":
            size = int(level)
            num, period = max(num, size - _num_alike(evidence, leader)), lcm(period, size)
        else:
            num = _first(num, evidence.num_left + 1, near, partial(_holds_after, evidence, leader, name, level))
    num += -(len(evidence.recent) + num) % period
    return num if num <= evidence.num_left else 0


def _holds_after(evidence: Evidence, leader: str, rule: str, level: float, num_more: int) -> bool:
    return RULES[rule].stops(agreed(evidence, num_more, leader), level)


def _first(low: int, high: int, near: int, holds: Callable[[int], bool]) -> int:
    """The first of `low` to `high` from which on it holds, which it does at `high`. `near` and its neighbour are tried first."""
    if low < high:
        near = min(max(low, near), high - 1)
        if holds(near):
            high = near
            if low < near and not holds(near - 1):
                return near
        else:
            low = near + 1
            if low < high and holds(low):
                return low
    return bisect_left(range(high), True, low, high, key=holds)


def agreed(evidence: Evidence, num_more: int, leader: str) -> Evidence:
    """The evidence if `num_more` of the branches left, 1 or more, vote for `leader`, which leads, with the best of rewards.

    Those in flight finish first, and no other starts.
    """
    first, *others = evidence.counts or (0,)
    weights = evidence.weights
    if weights:
        mean_weight = sum(weights) / max(1, evidence.num_votes)
        weights = (weights[0] + num_more * mean_weight, *weights[1:])
    return Evidence(  # not `replace`, which takes twice as long
        (first + num_more, *others),
        evidence.abstentions,
        evidence.num_left - num_more,
        (*evidence.recent, *[leader] * num_more),
        (*evidence.rewards, *[1.0] * num_more),
        weights,
        evidence.is_contested,
        evidence.mixture.agreed(num_more),
        max(0, evidence.num_in_flight - num_more),
        evidence.cheapness,
        evidence.standing,
    )


def _leader(evidence: Evidence) -> str:
    """The answer with the most votes, of equals the one that came first; "?" where nobody voted."""
    voted = Counter(key for key in evidence.recent if key is not None)
    return max(voted, key=voted.__getitem__, default="?")


def _num_alike(evidence: Evidence, leader: str) -> int:
    """Branches that finished last, one after another, with the leader's answer."""
    return sum(1 for _ in takewhile(lambda key: key == leader, reversed(evidence.recent)))

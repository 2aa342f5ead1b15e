"""How many branches of a program are worth running at once: what more of them bring it, against what they cost everybody.

More at once decide sooner, as the shortest few of many are short, and all that run when it is decided were for nothing. A
decode step takes a fixed time and some more for each row, so every row makes all others slower. What is added up is time
that the program and all others wait, in units in which neither the machine's speed nor the branches' length counts: 1 is
what a row adds to a step, times the steps of a usual branch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, lru_cache
from math import erf, inf, log, log2, sqrt

from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule

NEAR_BEST = 1.2  # times the least cost: the narrowest width that does not cost more is taken
HOPELESS = 2.0  # times the least cost so far: wider ones are not looked at
# Of a usual branch, until thoughts that are asked together decide if all run: ten recorded ones had computed 0.48 to 0.56 each.
TOGETHER_FRAC = 0.6
STEP_FRAC = 0.25  # between widths that are compared
CHEAPNESS_STEPS = 4  # of a doubling
POINTS = 16  # of a branch length, in the table of `_finished`
LONGEST = 64  # branch lengths in it
# Standard deviation over mean of the lengths of a program's branches. Recorded ones have 0.43 (R1 on MATH-500). A server cannot
# learn it from what finishes: those are the short ones. From 0.375 to 0.625 it makes little difference (docs/architecture.md).
SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What else an engine does."""

    fixed_rows: float  # rows that take as long as the fixed part of a step, above 0
    num_rows: int  # that run, without the program's own
    num_others: int  # programs and requests that the program makes wait: they run, or stand in line


def best_width(evidence: Evidence, rule: StopRule, drift: float, load: Load, *, decides_together: bool = False) -> int:
    """The narrowest width that costs everybody nearly as little as the best, 1 to `evidence.num_left` (1 where that is 0).

    No narrower than the votes that could decide. That many more are needed the more run at once: the rule trusts the first
    to finish less (certaindex.py). Where no number of votes decides, it takes every branch left.

    Args:
        drift: expected change of the lead by one more branch (forecast.py), above 0 to 1.
        decides_together: whether the branches are thoughts that may decide while they run, if all do (chains.py). Then all
            of them, unless it costs less to wait until some have finished.
    """
    num_left = max(1, evidence.num_left)
    if [name for name, _ in rule.parts] == ["predictive"]:  # alike for many programs, when nothing else is looked at
        cheapness = 2.0 ** (round(CHEAPNESS_STEPS * log2(evidence.cheapness)) / CHEAPNESS_STEPS)
        evidence = Evidence(evidence.counts, evidence.abstentions, evidence.num_left, cheapness=cheapness)
    costs: dict[int, float] = {}
    best, width = inf, 1
    while width <= num_left:
        needed = _needed(evidence, rule, width) or num_left
        if needed > width:
            width = needed
            continue
        costs[width] = cost(width, min(num_left, needed / drift), load)
        best = min(best, costs[width])
        if costs[width] > HOPELESS * best:
            break
        wider = max(width + 1, round((1 + STEP_FRAC) * width))
        width = num_left if width < num_left < wider else wider
    width = next(width for width, value in costs.items() if value <= NEAR_BEST * best)
    if decides_together and _together_cost(num_left, load) <= costs[width]:
        return num_left
    return width


def _together_cost(num_chains: int, load: Load) -> float:
    """`cost` of so many thoughts that decide together."""
    return TOGETHER_FRAC * (load.fixed_rows + load.num_rows + num_chains + num_chains * load.num_others)


@lru_cache(maxsize=8192)
def _needed(evidence: Evidence, rule: StopRule, width: int) -> int:
    """Votes that could decide with so many in flight; 0: none could."""
    return votes_needed(evidence._replace(num_in_flight=width) if rule.uses("predictive") else evidence, rule)


def cost(width: int, num_needed: float, load: Load) -> float:
    """Time that all wait until `num_needed` more have finished with `width` at once: the program for its answer, at the pace
    of a step with all these rows, and each other for what the program's rows add to its steps."""
    step = load.fixed_rows + load.num_rows + width
    return time_to_finish(num_needed, width) * (step + width * load.num_others)


def time_to_finish(num: float, width: int) -> float:
    """Branch lengths until `num` branches have finished where `width` run at once and the next follows each, at least 0."""
    each = max(0.0, num - 0.5) / width
    finished = _finished()
    place = bisect_left(finished, each)
    if place == len(finished):
        return LONGEST + each - finished[-1]
    before = finished[place - 1] if place else 0.0
    return (place + (each - before) / (finished[place] - before)) / POINTS


@cache
def _finished() -> tuple[float, ...]:
    """Branches that one row has finished on average after 1/POINTS, 2/POINTS, ... lengths.

    Lengths are taken for lognormal, and so is the sum of some of them (Fenton and Wilkinson's approximation).
    """
    return tuple(_renewals(point / POINTS) for point in range(1, LONGEST * POINTS + 1))


def _renewals(time: float) -> float:
    """The expected number of lengths, one after another, that end by `time`: the sum of the chances that the first n do."""
    total = 0.0
    for num in range(1, 4 * LONGEST):
        variance = log(1 + SPREAD * SPREAD / num)
        chance = (1 + erf((log(time / num) + variance / 2) / sqrt(2 * variance))) / 2
        total += chance
        if num > time and chance < 1e-6:
            break
    return total

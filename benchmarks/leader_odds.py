"""How likely the answer that leads among recorded thoughts will be their vote in the end: a logistic regression.

Of what the chains say together: the leader's share, for how long it has led, how long they have thought, how often it changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log1p
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from recorded_probes import Asked, Outcome, Weigh, all_to_their_ends, timeline, tokens_at, units_of

from sglang_dynasor.policy.chains import ASKED_FRAC

Floats = npt.NDArray[np.float64]
NUM_STEPS = 25  # of Newton's method, far more than it takes
RIDGE = 1.0  # so that no coefficient grows without bound
UNIT_TOKENS = 512.0  # in which times are told


class Seen(NamedTuple):
    """One time at which a question's chains have been asked, enough of them."""

    time: int
    leader: str
    features: tuple[float, ...]


def seen_of(asked: Asked, weigh: Weigh) -> Iterator[Seen]:
    """What could be known at each time."""
    thoughts = asked.thoughts
    places = [-1] * len(thoughts)
    leader, since, num_changes = "", 0, -1
    for time, chain, place in timeline(thoughts):
        places[chain] = place
        units = units_of(thoughts, places, weigh)
        if sum(at >= 0 for at in places) < ASKED_FRAC * len(thoughts) or not units:
            continue
        first, *others = sorted(units.values(), reverse=True)
        now = max(units, key=units.__getitem__)
        if now != leader:
            leader, since, num_changes = now, time, num_changes + 1
        margin = (first - max(others, default=0.0)) / len(thoughts)
        held, length = log1p((time - since) / UNIT_TOKENS), log1p(time / UNIT_TOKENS)
        yield Seen(time, leader, (1.0, first / len(thoughts), margin, held, length, float(num_changes)))


def fit(questions: Sequence[Asked], weigh: Weigh) -> Floats:
    """The coefficients; each question weighs the same, however often it was asked."""
    rows: list[tuple[float, ...]] = []
    stands: list[bool] = []
    weights: list[float] = []
    for asked in questions:
        seen = list(seen_of(asked, weigh))
        rows += [one.features for one in seen]
        stands += [one.leader == asked.vote for one in seen]
        weights += [10.0 / len(seen)] * len(seen)
    x, y, w = np.array(rows), np.array(stands, float), np.array(weights)
    found = np.zeros(x.shape[1])
    for _ in range(NUM_STEPS):
        p = 1 / (1 + np.exp(-x @ found))
        gradient = x.T @ (w * (y - p)) - RIDGE * found
        curvature = (x.T * (w * p * (1 - p))) @ x + RIDGE * np.eye(len(found))
        found = found + np.linalg.solve(curvature, gradient)
    return found


def run_odds(asked: Asked, weigh: Weigh, coefficients: Floats, probability: float) -> Outcome:
    """Stop once the leader is so likely to stand."""
    for time, leader, features in seen_of(asked, weigh):
        if 1 / (1 + np.exp(-float(np.dot(features, coefficients)))) >= probability:
            return Outcome(leader, tokens_at(asked.thoughts, time), time)
    return all_to_their_ends(asked)

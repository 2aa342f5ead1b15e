"""Figures of runs over the same questions, with 95 % intervals: questions are drawn anew, the same ones for every way.

What is the same for two ways (a hard question, a slow minute within a repeat) then falls out of their difference. What an
interval does not have in it: other questions wait in the same queue, so latencies under load are less certain than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_DRAWS = 1000
INSIDE = 2.5, 97.5  # percentiles


class Runs(NamedTuple):
    """What one way took at one load: repeats x questions each, in the same order of questions."""

    is_right: Floats
    tokens: Floats  # as the engine counts
    latency_s: Floats


FIGURES: dict[str, Callable[[Runs], float]] = {
    "accuracy": lambda runs: 100 * float(runs.is_right.mean()),
    "tokens": lambda runs: float(runs.tokens.mean()),
    "mean": lambda runs: float(runs.latency_s.mean()),
    "p50": lambda runs: float(np.quantile(runs.latency_s, 0.5)),
    "p90": lambda runs: float(np.quantile(runs.latency_s, 0.9)),
    "p99": lambda runs: float(np.quantile(runs.latency_s, 0.99)),
}


class Figure(NamedTuple):
    """A figure, and what it is when other questions are drawn: NUM_DRAWS times, the draws the same for every way."""

    value: float
    draws: Floats


def figures(runs: Runs, num_draws: int = NUM_DRAWS) -> dict[str, Figure]:
    """Each of FIGURES."""
    num_questions = runs.is_right.shape[1]
    picked = np.random.default_rng(0).integers(0, num_questions, (num_draws, num_questions))
    drawn = [Runs(*(values[:, one] for values in runs)) for one in picked]
    return {name: Figure(of(runs), np.array([of(one) for one in drawn])) for name, of in FIGURES.items()}


def inside(draws: Floats) -> tuple[float, float]:
    """The 95 % interval."""
    low, high = np.percentile(draws, INSIDE)
    return float(low), float(high)


def spanned(figure: Figure, digits: int) -> str:
    """A figure with its interval, to read."""
    low, high = inside(figure.draws)
    return f"{figure.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Change(NamedTuple):
    """How much more one way has than another, in points or percent, with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def points(ours: Figure, theirs: Figure) -> Change:
    return Change(ours.value - theirs.value, *inside(ours.draws - theirs.draws))


def percent(ours: Figure, theirs: Figure) -> Change:
    return Change(100 * (ours.value / theirs.value - 1), *inside(100 * (ours.draws / theirs.draws - 1)))


CRITERIA = ("accuracy", "tokens", "mean", "p90")


def changes(ours: dict[str, Figure], theirs: dict[str, Figure]) -> dict[str, Change]:
    """Of each criterion: accuracy in points, the others in percent."""
    return {name: (points if name == "accuracy" else percent)(ours[name], theirs[name]) for name in CRITERIA}


def behind(found: dict[str, Change]) -> list[str]:
    """The criteria in which ours is the worse, by however little."""
    return [name for name, change in found.items() if (change.value < 0 if name == "accuracy" else change.value > 0)]


def best_level(levels: dict[str, dict[str, Figure]], theirs: dict[str, Figure]) -> tuple[str, dict[str, Change]]:
    """The level that is behind this peer in the fewest criteria, of equal ones the fastest, and its changes."""
    found = {level: changes(figures, theirs) for level, figures in levels.items()}
    level = min(found, key=lambda level: (len(behind(found[level])), found[level]["mean"].value))
    return level, found[level]


def told(found: dict[str, Change]) -> str:
    """Where ours is behind: "-", or the criteria, those of less than the noise in brackets."""
    names = [f"({name})" if found[name].is_noise else name for name in behind(found)]
    return ", ".join(names) or "-"


def runs_of(records: Sequence[dict[str, Any]]) -> Runs:
    """The repeats of one way at one load; tokens that clients were not told of are spread over a run's questions by their tokens."""
    tokens = [np.array(one["tokens"], float) * (one["engine_tokens"] / max(1, sum(one["tokens"]))) for one in records]
    return Runs(
        np.array([one["is_right"] for one in records], float),
        np.array(tokens),
        np.array([one["latency_s"] for one in records], float),
    )

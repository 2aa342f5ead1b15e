"""95 % intervals of figures that are paired by question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.96
NUM_DRAWS = 1000
LEAST = 5  # questions, below which a resampled interval says nothing

Floats = npt.NDArray[np.float64]


class Change(NamedTuple):
    """A figure with half the width of its interval; None: too few questions."""

    value: float
    half: float | None

    @property
    def low(self) -> float:
        return self.value - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.half or 0.0)

    def shown(self, unit: str = "") -> str:
        """As in "-43 ± 5 %"."""
        digits = 1 if unit != " %" else 0
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.value:+.{digits}f}{half}{unit}"


def share(hits: Sequence[float]) -> Change:
    """A share in percent. Two hits and two misses are added for its width (Agresti and Coull): all right is not surely right."""
    num = len(hits) + 4
    middle = (sum(hits) + 2) / num
    return Change(100 * sum(hits) / len(hits), 100 * Z * sqrt(middle * (1 - middle) / num))


def points(ours: Sequence[float], base: Sequence[float]) -> Change:
    """Points of a share gained or lost, paired by question.

    Half a question gained and half a one lost, twice, are added for its width (Agresti and Min, Statistics in Medicine 24:729):
    without a difference so far one may yet come.
    """
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    num = len(differences) + 2
    middle = sum(differences) / num
    variance = (sum(d * d for d in differences) + 1) / num - middle**2
    return Change(100 * sum(differences) / len(differences), 100 * Z * sqrt(variance / num))


def mean_of(values: Floats) -> Any:
    """Along the last axis."""
    return values.mean(axis=-1)


def p90_of(values: Floats) -> Any:
    """Along the last axis."""
    return np.quantile(values, 0.9, axis=-1)


def percent(
    ours: Sequence[float],
    base: Sequence[float],
    statistic: Callable[[Floats], Any] = mean_of,
    num_draws: int = NUM_DRAWS,
) -> Change:
    """By how much a statistic differs from `base`'s, in percent of that; questions are drawn again, with both their figures.

    The draws are the same every time.
    """
    mine, other = np.asarray(ours, dtype=np.float64), np.asarray(base, dtype=np.float64)
    below = float(statistic(other))
    value = 100 * (float(statistic(mine)) / below - 1) if below else 0.0
    if len(mine) < LEAST or not below:
        return Change(value, None)
    drawn = np.random.default_rng(0).integers(len(mine), size=(num_draws, len(mine)))
    bases = statistic(other[drawn])
    ratios = statistic(mine[drawn]) / np.where(bases > 0, bases, below)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Change(value, 50 * float(high - low))

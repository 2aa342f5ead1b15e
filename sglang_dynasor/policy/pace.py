"""How many rows of a decode step take as long as its fixed part on this machine: learned from the steps themselves.

A step takes a fixed time (weights read, kernels launched) plus some for each row. On a large GPU the fixed part is as long as
50 rows or more: one more costs next to nothing. On a CPU it is as long as a few. How wide a program runs follows (width.py).

It reads times, so one rank alone measures, and tells the others.
"""

from __future__ import annotations

from dataclasses import dataclass

USUAL_ROWS = 50  # on a large GPU; until the steps say
MOST_ROWS = 1024  # told
FORGET_FRAC = 0.005  # of the past, per step
FEWEST_STEPS = 100
FEWEST_VARIANCE = 4.0  # of the rows: steps that are all alike tell nothing
OUTLIER = 20.0  # times the usual step: something else happened
TOLD_EVERY = 64  # steps
CHANGE_TOLD = 0.25  # of the rows: smaller changes are not worth a message


@dataclass(slots=True)
class Pace:
    """A line fitted to step times: least squares that forget."""

    num_steps: int = 0
    rows: float = 0.0
    step_s: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    def see(self, rows: int, step_s: float) -> None:
        """Take in one decode step."""
        if self.num_steps >= FEWEST_STEPS and step_s > OUTLIER * self.step_s:
            return
        self.num_steps += 1
        share = max(FORGET_FRAC, 1.0 / self.num_steps)
        row_error, time_error = rows - self.rows, step_s - self.step_s
        self.rows += share * row_error
        self.step_s += share * time_error
        self.variance += share * (row_error * (rows - self.rows) - self.variance)
        self.covariance += share * (row_error * (step_s - self.step_s) - self.covariance)

    def fixed_rows(self) -> int | None:
        """Rows that take as long as a step's fixed part, 1 to MOST_ROWS; None: not enough seen to say."""
        if self.num_steps < FEWEST_STEPS or self.variance < FEWEST_VARIANCE:
            return None
        row_s = self.covariance / self.variance
        if row_s <= 0:
            return MOST_ROWS
        fixed_s = self.step_s - row_s * self.rows
        return max(1, min(MOST_ROWS, round(fixed_s / row_s)))

    def news(self, told: int) -> int | None:
        """The fixed rows, where it is time to tell them and they differ from those `told` last; None: nothing to tell."""
        rows = None if self.num_steps % TOLD_EVERY else self.fixed_rows()
        return None if rows is None or abs(rows - told) <= CHANGE_TOLD * told else rows

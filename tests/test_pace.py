"""Rows that take as long as a step's fixed part, learned from step times."""

from __future__ import annotations

import random

import pytest

from sglang_dynasor.policy.pace import CHANGE_TOLD, FEWEST_STEPS, MOST_ROWS, TOLD_EVERY, Pace


def seen(base_s: float, row_s: float, rows: range, num_steps: int = 2000, noise: float = 0.0) -> Pace:
    pace, draw = Pace(), random.Random(1)
    for _ in range(num_steps):
        num_rows = draw.choice(rows)
        pace.see(num_rows, (base_s + row_s * num_rows) * (1 + noise * draw.uniform(-1, 1)))
    return pace


@pytest.mark.parametrize(("base_s", "row_s", "rows"), [(0.005, 0.0003, 17), (0.008, 0.00002, 400), (0.001, 0.001, 1)])
def test_what_a_row_costs_is_learned(base_s: float, row_s: float, rows: int) -> None:
    """From exact times, and nearly so from noisy ones."""
    assert seen(base_s, row_s, range(1, 65)).fixed_rows() == pytest.approx(rows, abs=1)
    assert seen(base_s, row_s, range(1, 65), 20_000, noise=0.2).fixed_rows() == pytest.approx(rows, rel=0.4, abs=1)


def test_it_says_nothing_before_it_can() -> None:
    """Too few steps, or all of one size: unknown."""
    assert seen(0.005, 0.0003, range(1, 65), FEWEST_STEPS - 1).fixed_rows() is None
    assert seen(0.005, 0.0003, range(8, 9)).fixed_rows() is None


def test_free_rows_are_as_many_as_can_be_told() -> None:
    """Rows that cost nothing, or seem to save time."""
    assert seen(0.005, 0.0, range(1, 65)).fixed_rows() == MOST_ROWS
    assert seen(0.009, -0.0001, range(1, 65)).fixed_rows() == MOST_ROWS
    assert seen(0.005, 0.000001, range(1, 65)).fixed_rows() == MOST_ROWS


def test_a_hiccup_does_not_count_and_a_new_speed_does() -> None:
    """One step that took a second is passed over; a machine that becomes slower per row is followed."""
    pace = seen(0.005, 0.0003, range(1, 65))
    before = pace.fixed_rows()
    pace.see(30, 1.0)
    assert pace.fixed_rows() == before
    draw = random.Random(2)
    for _ in range(3000):
        num_rows = draw.randint(1, 64)
        pace.see(num_rows, 0.005 + 0.0006 * num_rows)
    assert pace.fixed_rows() == pytest.approx(8, abs=2)


def test_it_is_told_now_and_then_and_where_it_has_changed() -> None:
    """Not in between, nor a small change, nor before it can be said."""
    pace = seen(0.005, 0.0003, range(1, 65), 31 * TOLD_EVERY)
    rows = pace.fixed_rows()
    assert rows == 17
    assert pace.news(33) == rows
    assert pace.news(20) is None  # a small change
    assert pace.news(rows) is None
    assert pace.news(round(rows / (1 + CHANGE_TOLD))) is None
    pace.see(30, 0.014)
    assert pace.news(33) is None
    assert seen(0.005, 0.0003, range(1, 65), TOLD_EVERY).news(33) is None

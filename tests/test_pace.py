"""Rows that a step carries nearly for free, learned from step times."""

from __future__ import annotations

import random

import pytest

from sglang_dynasor.policy.pace import CHANGE_TOLD, FEWEST_STEPS, TOLD_EVERY, Pace


def seen(base_s: float, row_s: float, rows: range, num_steps: int = 2000, noise: float = 0.0) -> Pace:
    pace, draw = Pace(), random.Random(1)
    for _ in range(num_steps):
        num_rows = draw.choice(rows)
        pace.see(num_rows, (base_s + row_s * num_rows) * (1 + noise * draw.uniform(-1, 1)))
    return pace


@pytest.mark.parametrize(("base_s", "row_s", "rows"), [(0.005, 0.0003, 50), (0.008, 0.00002, 1200), (0.001, 0.001, 3)])
def test_rows_are_cheap_until_three_quarters_of_the_peak(base_s: float, row_s: float, rows: int) -> None:
    """From exact times, and nearly so from noisy ones."""
    assert seen(base_s, row_s, range(1, 65)).cheap_rows(4096) == pytest.approx(rows, abs=1)
    assert seen(base_s, row_s, range(1, 65), 20_000, noise=0.2).cheap_rows(4096) == pytest.approx(rows, rel=0.4, abs=1)


def test_it_says_nothing_before_it_can() -> None:
    """Too few steps, or all of one size: unknown."""
    assert seen(0.005, 0.0003, range(1, 65), FEWEST_STEPS - 1).cheap_rows(64) is None
    assert seen(0.005, 0.0003, range(8, 9)).cheap_rows(64) is None


def test_free_rows_are_bounded_by_the_engine() -> None:
    """Rows that cost nothing, or seem to save time, are all cheap: as many as the engine has."""
    assert seen(0.005, 0.0, range(1, 65)).cheap_rows(64) == 64
    assert seen(0.009, -0.0001, range(1, 65)).cheap_rows(64) == 64
    assert seen(0.005, 0.00001, range(1, 65)).cheap_rows(64) == 64


def test_a_hiccup_does_not_count_and_a_new_speed_does() -> None:
    """One step that took a second is passed over; a machine that becomes slower per row is followed."""
    pace = seen(0.005, 0.0003, range(1, 65))
    before = pace.cheap_rows(64)
    pace.see(30, 1.0)
    assert pace.cheap_rows(64) == before
    draw = random.Random(2)
    for _ in range(3000):
        num_rows = draw.randint(1, 64)
        pace.see(num_rows, 0.005 + 0.0006 * num_rows)
    assert pace.cheap_rows(64) == pytest.approx(25, abs=3)


def test_it_is_told_now_and_then_and_where_it_has_changed() -> None:
    """Not in between, nor a small change, nor before it can be said."""
    pace = seen(0.005, 0.0003, range(1, 65), 31 * TOLD_EVERY)
    rows = pace.cheap_rows(64)
    assert rows == 50
    assert pace.news(100, 100) == rows
    assert pace.news(64, 64) is None  # a small change
    assert pace.news(rows, 64) is None
    assert pace.news(round(rows / (1 + CHANGE_TOLD)), 64) is None
    pace.see(30, 0.014)
    assert pace.news(100, 100) is None
    assert seen(0.005, 0.0003, range(1, 65), TOLD_EVERY).news(100, 100) is None

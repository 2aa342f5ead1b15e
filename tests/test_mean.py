"""Means that follow a load, and what a branch costs beside the usual one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.mean import cheapness, expected_tokens


@pytest.mark.parametrize(
    ("lengths", "usual", "expected", "cheap"),
    [
        ((), 100.0, 100.0, 1.0),  # nothing known
        ((100, 100), 100.0, 100.0, 1.0),
        ((300,), 100.0, 500 / 3, 0.6),
        ((400, 400), 100.0, 250.0, 0.5),  # the least
        ((10_000,), 100.0, 10_200 / 3, 0.5),
        ((50, 50), 100.0, 75.0, 4 / 3),
        ((0,) * 10, 100.0, 200 / 12, 2.0),  # the most
    ],
)
def test_what_a_branch_costs(lengths: tuple[int, ...], usual: float, expected: float, cheap: float) -> None:
    """The program's own mean, shrunk to the server's by two branches of prior; the price within a factor of two."""
    assert expected_tokens(lengths, usual) == pytest.approx(expected)
    assert cheapness(lengths, usual) == pytest.approx(cheap)


@given(st.lists(st.integers(0, 10_000), max_size=20), st.floats(0, 1e6))
def test_the_price_is_bounded(lengths: list[int], usual: float) -> None:
    """Whatever lengths are."""
    assert 0.5 <= cheapness(lengths, usual) <= 2.0

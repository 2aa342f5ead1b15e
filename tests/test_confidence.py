"""Confidence of a branch, weakness, and the mixture of answers: hand-computed cases and what must hold for any."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.confidence import Confidence, warmup_branches, weak_level
from sglang_dynasor.policy.mixture import Distribution, Mixture, mix, part_of


def confidence(values: list[float], group_tokens: int) -> Confidence:
    c = Confidence(group_tokens)
    for value in values:
        c.add(value)
    return c


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 12))
def test_groups_slide_over_the_tokens(values: list[float], size: int) -> None:
    """The current group and the lowest are those of all windows; short of one window, the mean."""
    c = confidence(values, size)
    groups = [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    if groups:
        assert c.group == pytest.approx(groups[-1], abs=1e-9)
        assert c.lowest == pytest.approx(min(groups), abs=1e-9)
    else:
        assert c.group is None
        assert c.lowest == pytest.approx(sum(values) / len(values))
    score = c.lowest
    c.close()
    assert c.lowest == score


def test_a_token_without_a_number_is_left_out() -> None:
    """Logits that were not finite spoil one token, not the branch."""
    assert confidence([2.0, nan, 4.0], 2).lowest == 3.0
    assert confidence([], 4).lowest == 0.0


@pytest.mark.parametrize(("cap", "expected"), [(1, 1), (3, 3), (8, 3), (16, 4), (64, 16), (256, 16)])
def test_warmup_is_a_quarter_of_the_cap(cap: int, expected: int) -> None:
    """Within 3 to 16."""
    assert warmup_branches(cap) == expected


@pytest.mark.parametrize(
    ("lowest", "frac", "expected"),
    [
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([3.0, 1.0], 0.25, 1.5),
        ([5.0], 0.9, 5.0),
        ([1.0, 2.0], 0.0, None),  # off
        ([], 0.5, None),
    ],
)
def test_weak_level(lowest: list[float], frac: float, expected: float | None) -> None:
    """A quantile, interpolated; None where nothing is weak."""
    assert weak_level(lowest, frac) == expected


def mixed(distributions: Sequence[Distribution]) -> Mixture:
    return mix([part_of(distribution) for distribution in distributions])


def test_the_mixture_of_nothing_is_nothing() -> None:
    """No branch at its answer."""
    assert (mix([]).num_branches, mix([]).entropy, mix([]).disagreement) == (0, 0.0, 0.0)


def test_sure_branches_that_differ_disagree() -> None:
    """Each sure of its own: no doubt, log 2 of disagreement; the same doubt in both: no disagreement."""
    split = mixed([{1: 0.0}, {2: 0.0}])
    assert split.entropy == pytest.approx(log(2))
    assert (split.mean_entropy, split.disagreement) == (0.0, pytest.approx(log(2)))
    torn = mixed([{1: log(0.5), 2: log(0.5)}] * 2)
    assert torn.mean_entropy == pytest.approx(log(2))
    assert torn.disagreement == pytest.approx(0.0, abs=1e-12)


def test_what_is_left_out_is_one_more_token() -> None:
    """A cut list of tokens keeps its total of 1; a token of no chance adds nothing."""
    part = mixed([{1: log(0.75), 2: -inf}])
    assert part.entropy == pytest.approx(-0.75 * log(0.75) - 0.25 * log(0.25))


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=6), min_size=1, max_size=6))
def test_disagreement_is_never_negative(rows: list[list[float]]) -> None:
    """Jensen-Shannon: between 0 and log of the number of branches."""
    distributions = []
    for row in rows:
        total = sum(exp(x) for x in row)
        distributions.append({token: x - log(total) for token, x in enumerate(row)})
    found = mixed(distributions)
    assert 0.0 <= found.disagreement <= log(len(rows)) + 1e-9
    assert found.entropy >= found.mean_entropy - 1e-9


def test_agreement_lowers_it() -> None:
    """More branches that are sure of the same bring the mixture down, about in proportion."""
    three = mixed([{1: log(0.5), 2: log(0.5)}] * 3)
    assert three.agreed(3).entropy == pytest.approx(three.entropy / 2)
    assert mix([]).agreed(3).num_branches == 3

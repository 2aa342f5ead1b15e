"""A budget over many programs: whose branch is worth most, and what is left."""

from __future__ import annotations

import pytest
from engines import ROOT
from hypothesis import given
from hypothesis import strategies as st
from recorded import Recorded, read_sets
from replay_budget import replay
from test_replay import has_traces, made

from sglang_dynasor.policy.budget import Budget, branch_worth
from sglang_dynasor.policy.evidence import Evidence

TRACES = ROOT.parent / "shared" / "traces"


@pytest.mark.parametrize(
    ("evidence", "worth"),
    [
        (Evidence((), 0, 16), 1.0),  # a program's first branch
        (Evidence((), 3, 13), 0.25),  # three abstained
        (Evidence((3,), 0, 13), 0.020563 / 4),
        (Evidence((3,), 0, 13, cheapness=2.0), 0.020563 / 2),
        (Evidence((3, 1), 0, 12), 0.135205 / 5),
        (Evidence((4,), 0, 12, num_in_flight=6), 0.020929 / 5),  # trusted by 5/8
        (Evidence((9,), 0, 7), 0.0),  # nothing can change
    ],
)
def test_what_a_branch_is_worth(evidence: Evidence, worth: float) -> None:
    """The risk, by price, over the branches that there would be."""
    assert branch_worth(evidence) == pytest.approx(worth, abs=1e-6)


def test_the_uncertain_go_first() -> None:
    """Of equals the first; each offer is taken once."""
    budget = Budget(1000.0)
    for program, counts in enumerate([(3,), (2, 1), (2, 1)]):
        budget.offer(program, Evidence(counts, 0, 13), 10.0)
    assert [budget.take() for _ in range(4)] == [1, 2, 0, None]
    assert budget.left_tokens == 970


def test_a_new_offer_replaces_the_old_one() -> None:
    """What was said of older evidence is void; what was withdrawn too."""
    budget = Budget(1000.0)
    budget.offer(0, Evidence((2, 1), 0, 13), 10.0)
    budget.offer(1, Evidence((3,), 0, 13), 10.0)
    budget.offer(0, Evidence((9,), 0, 3), 10.0)
    assert [budget.take(), budget.take()] == [1, None]
    budget.offer(1, Evidence((2, 1), 0, 13), 10.0)
    budget.withdraw(1)
    assert budget.take() is None


def test_what_cannot_be_paid_for_waits() -> None:
    """A cheaper one goes first, and what a branch did not take is there for others."""
    budget = Budget(100.0)
    budget.offer(0, Evidence((2, 1), 0, 13), 90.0)
    assert budget.take() == 0
    budget.offer(1, Evidence((2, 1), 0, 13), 50.0)
    budget.offer(2, Evidence((3,), 0, 13), 10.0)
    assert [budget.take(), budget.take()] == [2, None]
    budget.settle(0, 40)
    assert budget.left_tokens == 50
    assert budget.take() == 1
    budget.settle(1, 70)  # longer than expected
    budget.settle(2, 10)
    assert budget.left_tokens == -20
    assert not budget.held_tokens


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=8), st.integers(0, 200))  # fmt: skip
def test_it_is_never_overdrawn_by_what_was_expected(programs: list[tuple[int, int, int]], tokens: int) -> None:
    """Whatever is offered again and again; it ends, and nobody is left who could be paid for and is worth anything."""
    budget, left = Budget(float(tokens)), [12 - first for first, _, _ in programs]

    def offer(program: int) -> None:
        first, second, price = programs[program]
        if left[program]:
            counts = tuple(sorted((num for num in (first, second) if num), reverse=True))
            budget.offer(program, Evidence(counts, 0, left[program]), float(price))

    for program in range(len(programs)):
        offer(program)
    while (program := budget.take()) is not None:
        assert budget.left_tokens >= 0
        left[program] -= 1
        budget.settle(program, programs[program][2])
        offer(program)
    assert all(price > budget.left_tokens or not worth for worth, price in budget.offers.values())


def outcome(recorded: Recorded, share: float, num_orders: int) -> dict[str, tuple[float, float]]:
    """Tokens spent and accuracy by way, in percent."""
    found = replay(recorded, recorded.caps[-1], share, num_orders)
    return {name: (way.spent, way.accuracy) for name, way in found.items()}


def test_hard_questions_get_what_easy_ones_leave() -> None:
    """On samples made here: more right for the same tokens."""
    found = outcome(made(300, 16, 4), 0.25, 2)
    assert found["worth"][0] <= found["uniform"][0] + 0.1
    assert found["worth"][1] > found["uniform"][1] + 1


@has_traces
def test_recorded_questions() -> None:
    """R1 on MATH-500, a fifth of the tokens: at least two points, and no more tokens."""
    sets = {recorded.name: recorded for recorded in read_sets(TRACES)}
    for name in ("MATH-500, R1-Llama-8B x32", "MATH-500, R1-Llama-8B x16"):
        found = outcome(sets[name], 0.2, 4)
        assert found["worth"][0] <= 20.1
        assert found["worth"][1] > found["uniform"][1] + 2

"""Expected remaining tokens: exact numbers, and what must hold for any votes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.certaindex import PRIOR
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.forecast import Forecast, leader_drift
from sglang_dynasor.policy.mean import MEMORY, Mean
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

ANSWERS = st.lists(st.sampled_from(["#### 1", "#### 2", "#### 3", "none"]), max_size=16)


def program(answers: list[str] | str = "", num_tokens: int = 100, **field: object) -> Program:
    """A program of sixteen whose branches finished with these answers, each after so many tokens."""
    p = Program("p", parse_field({"branches": 16, "stop": "beta", "answer": "hash", **field}, 64))
    for answer in answers:
        if p.reason is None:
            p.finish(p.start_branch(), answer if len(answer) > 1 else f"#### {answer}", num_tokens)
    return p


def forecast(branch_tokens: float = 200.0, agreement: float = 0.5) -> Forecast:
    made = Forecast()
    made.branch_tokens.value, made.agreement.value = branch_tokens, agreement
    return made


@pytest.mark.parametrize(
    ("counts", "abstentions", "drift"),
    [
        ((), 0, 0.0),
        ((3,), 0, 3 / (3 + 3 * PRIOR)),
        ((3, 1), 0, 2 / (4 + 4 * PRIOR)),
        ((3, 3), 0, 0.0),
        ((3, 1), 4, 2 / (8 + 4 * PRIOR)),
        ((3, 1, 1), 0, 2 / (5 + 5 * PRIOR)),
    ],
)
def test_drift_is_the_posterior_lead(counts: tuple[int, ...], abstentions: int, drift: float) -> None:
    """Share of the leader minus share of the next; a tie does not drift, abstentions slow it."""
    assert leader_drift(Evidence(counts, abstentions, 5)) == pytest.approx(drift)


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(0, 30))
def test_drift_is_a_share(counts: list[int], abstentions: int) -> None:
    """In [0, 1)."""
    assert 0 <= leader_drift(Evidence(tuple(sorted(counts, reverse=True)), abstentions, 5)) < 1


@given(st.integers(0, 20), st.integers(1, 20))
def test_drift_grows_with_the_lead(second: int, lead: int) -> None:
    """One more vote for the leader, more drift."""
    assert leader_drift(Evidence((second + lead + 1, second), 0, 5)) > leader_drift(
        Evidence((second + lead, second), 0, 5)
    )


def test_wald() -> None:
    """3-1 needs 6-1: three votes at a drift of 2/6 are nine branches."""
    p = program("1121")
    assert p.votes_needed == 3
    assert forecast().branches(p) == pytest.approx(9.0)


def test_agreement_is_expected_to_end_soon_and_a_tie_is_not() -> None:
    """What shortest-first is made from."""
    learned = forecast()
    agreeing, split, tied = program("111"), program("1112"), program("1122")
    assert learned.branches(agreeing) < learned.branches(split) < learned.branches(tied) == 12


def test_a_fresh_program_is_like_those_before_it() -> None:
    """The votes needed over what answers agreed before; at least what could decide. From two finished branches on its own count."""
    assert forecast(agreement=0.5).branches(program()) == 8
    assert forecast(agreement=0.8).branches(program()) == 5
    assert forecast(agreement=0.5).branches(program("1")) == 6
    assert forecast(agreement=0.5).branches(program(["none"] * 2)) == 14  # they agree on nothing
    assert forecast(agreement=1.0).branches(program()) == 4
    assert forecast(agreement=0.0).branches(program()) == 16


def test_without_a_rule_the_whole_cap_is_left() -> None:
    """Nothing short of the cap decides, so nothing less is expected, whatever others used."""
    assert forecast(agreement=0.1).branches(program(stop="never")) == 16
    assert forecast(agreement=0.1).branches(program("111", stop="never")) == 13


def test_a_branch_is_as_long_as_the_program_s_own_shrunk_to_the_server_s() -> None:
    """Two branches' worth of prior: no finished branch gives the server's mean, many the program's own."""
    learned = forecast(branch_tokens=200)
    assert learned.length_tokens(program()) == 200
    assert learned.length_tokens(program("12", num_tokens=100)) == 150
    assert learned.length_tokens(program("1232123", num_tokens=100)) == pytest.approx(1100 / 9)


def test_ended_branches_say_nothing_about_length() -> None:
    """They were cut off."""
    p = program("12", num_tokens=100)
    p.end(p.start_branch(), 1)
    assert forecast(branch_tokens=200).length_tokens(p) == 150


def test_progress_is_subtracted() -> None:
    """Down to nothing, not below."""
    learned, p = forecast(branch_tokens=200), program()
    assert learned.remaining_tokens(p, 0) == 1600
    assert learned.remaining_tokens(p, 600) == 1000
    assert learned.remaining_tokens(p, 5000) == 0


@given(ANSWERS, st.sampled_from(["predictive", "beta", "window", "margin", "never"]), st.floats(0, 1))
def test_it_expects_no_more_than_the_cap_leaves(answers: list[str], rule: str, agreement: float) -> None:
    """Nor fewer than could decide; and the same again from the same votes."""
    p, again = program(answers, stop=rule), program(answers, stop=rule)
    num = forecast(agreement=agreement).branches(p)
    assert 0 <= num <= p.evidence.num_left
    if p.reason is None:
        assert num >= p.votes_needed
        assert num >= min(1, p.evidence.num_left)
    assert forecast(agreement=agreement).remaining_tokens(again, 7) == forecast(agreement=agreement).remaining_tokens(
        p, 7
    )


def test_a_mean_starts_from_its_guess_and_follows() -> None:
    """The first observation replaces the guess; later a changed load is followed within its memory."""
    mean = Mean(256.0)
    mean.learn(100)
    assert mean.value == 100
    mean.learn(200)
    assert mean.value == 150
    for _ in range(10_000):
        mean.learn(50)
    assert mean.value == pytest.approx(50, rel=0.2)
    for _ in range(MEMORY):
        mean.learn(1000)
    assert 500 < mean.value < 1000


def test_noise_does_not_reorder_programs_that_are_alike() -> None:
    """Branches of 90 to 110 tokens: whoever comes is forecast the same, and so goes in order of arrival. A new load is seen."""
    learned = Forecast()
    forecasts: set[float] = set()
    for turn in range(200):
        learned.branch_tokens.learn(90 + 20 * (turn % 7) / 6)
        forecasts.add(learned.remaining_tokens(program(), 0))
    assert len(forecasts) == 1
    for _ in range(MEMORY):
        learned.branch_tokens.learn(300)
    assert learned.remaining_tokens(program(), 0) > 2 * forecasts.pop()


def test_it_learns_how_much_answers_agree() -> None:
    """From programs that were answered: the lead's share of the finished branches. One that finished alone says nothing."""
    learned = Forecast()
    learned.learn(program("1"))
    assert learned.agreement.value == 0.5
    learned.learn(program("1112"))
    assert learned.agreement.value == 0.5
    learned = Forecast()
    learned.learn(program(["#### 1", "#### 1", "#### 1", "#### 1"]))
    assert learned.agreement.value == 1.0

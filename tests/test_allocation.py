"""How many branches are started."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.allocation import votes_needed
from sglang_dynasor.program import BranchState, Program
from sglang_dynasor.spec import parse_field
from sglang_dynasor.stopping import Evidence, parse_stop


def needed(rule: str, counts: tuple[int, ...], num_left: int, at_most: int = 16, recent: str = "") -> int:
    keys = recent or "".join(letter * votes for letter, votes in zip("abcdef", counts, strict=False))
    return votes_needed(Evidence(counts, 0, num_left, tuple(keys)), parse_stop(rule), at_most)


@pytest.mark.parametrize(
    ("rule", "counts", "num_left", "expected"),
    [
        ("beta", (), 16, 4),  # 4-0
        ("beta", (3,), 13, 1),
        ("beta", (3, 1), 12, 3),  # 6-1
        ("beta", (1, 1), 14, 5),
        ("window:5", (), 16, 5),
        ("margin", (), 16, 9),
        ("never", (), 16, 16),
        ("entropy", (), 16, 5),
        ("predictive:0", (), 16, 9),  # no risk at all is the lossless rule
    ],
)
def test_fewest_votes_that_could_decide(rule: str, counts: tuple[int, ...], num_left: int, expected: int) -> None:
    """By each rule's own arithmetic."""
    assert needed(rule, counts, num_left) == expected


def test_disagreement_asks_for_more() -> None:
    """Certain programs are given few branches, uncertain ones more."""
    assert needed("predictive", (3,), 13) < needed("predictive", (2, 1), 13) <= needed("predictive", (1, 1, 1), 13)


def test_the_width_bounds_it() -> None:
    """Never more than asked for."""
    assert needed("margin", (), 16, at_most=4) == 4
    assert needed("beta", (3,), 13, at_most=1) == 1


@given(
    st.lists(st.sampled_from("abc"), max_size=15),
    st.sampled_from(["predictive", "beta", "window", "margin", "entropy", "never"]),
)
def test_it_never_stalls_and_never_starts_too_many(answers: list[str], rule: str) -> None:
    """An undecided program with nothing in flight always starts something; never beyond width or cap."""
    program = Program("p", parse_field({"branches": 16, "width": 8, "stop": rule, "answer": "last_line"}, 64))
    for answer in answers:
        while program.num_to_start:
            program.start_branch()
        if program.reason is not None:
            break
        assert 1 <= program.num_in_flight <= 8
        assert len(program.branches) <= 16
        index = next(i for i, b in enumerate(program.branches) if b.state is BranchState.IN_FLIGHT)
        program.finish(index, answer, 1)

"""Several thoughts are asked together, seldom while nothing can come of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import PRICE_FRAC, Trial, next_probe_tokens
from sglang_dynasor.policy.thought_spec import ThoughtSpec
from sglang_dynasor.policy.wave import GROWTH_FRAC, chains_to_ask, is_far, next_turn_tokens

THOUGHT = ThoughtSpec(agree=2, level=0.99, min_tokens=512, every_tokens=None)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 40), st.booleans())
def test_asking_keeps_to_its_price(costs: list[int], num_suffix_tokens: int, is_far: bool) -> None:
    """Never sooner than a single thought's price allows, so that all probes stay below it; and later the longer the thought is."""
    seen, num_tokens = list[int](), 0
    for cost in costs:
        before = num_tokens
        alone = next_probe_tokens(THOUGHT, num_tokens, seen, num_suffix_tokens)
        num_tokens = next_turn_tokens(THOUGHT, num_tokens, seen, num_suffix_tokens, is_far=is_far)
        assert num_tokens >= alone
        if before:
            assert num_tokens >= (1 + GROWTH_FRAC) * before
        seen.append(cost)
        expected = sum(seen[:-1]) / len(seen[:-1]) if seen[:-1] else num_suffix_tokens + 4
        assert sum(seen) <= PRICE_FRAC * num_tokens + max(0.0, cost - expected) + 1e-9


def test_a_program_far_from_its_end_is_asked_half_as_often() -> None:
    """But not the first time, and not where the client has said how often."""
    costs = [16]
    near, far = (next_turn_tokens(THOUGHT, 1000, costs, 12, is_far=flag) for flag in (False, True))
    assert far - 1000 == 2 * (near - 1000)
    assert len({next_turn_tokens(THOUGHT, 0, [], 12, is_far=flag) for flag in (False, True)}) == 1
    often = ThoughtSpec(agree=2, level=0.99, min_tokens=0, every_tokens=64)
    assert next_turn_tokens(often, 6400, costs, 12, is_far=True) == 6464


@pytest.mark.parametrize(
    ("counts", "num_finished_for_best", "num_open", "expected"),
    [
        ((), 0, 10, False),  # nobody was asked
        ((3, 2), 0, 10, True),  # five below eight
        ((4, 2), 0, 10, False),  # four below
        ((8, 1), 0, 10, False),
        ((6, 2), 2, 5, True),  # of three finished only two agree: seven at most
        ((6, 2), 3, 5, False),
    ],
)
def test_how_far_it_is(counts: tuple[int, ...], num_finished_for_best: int, num_open: int, expected: bool) -> None:
    """Of ten chains eight are to agree."""
    assert is_far(counts, num_finished_for_best, num_open, 10, 0.8) is expected


def test_all_that_are_ready_are_asked_together() -> None:
    """In a stable order; not while more than a fifth of them is still on its way, and nobody where nobody is ready."""
    assert chains_to_ask({3, 1, 2, 0}, range(5)) == [0, 1, 2, 3]
    assert chains_to_ask({1, 2, 3}, range(5)) == []
    assert chains_to_ask(set(), set()) == []
    assert chains_to_ask({4}, {4}) == [4]


def test_chains_that_vote_only_are_asked_as_one_is() -> None:
    """Where what they say together ends nothing, each is asked by itself; a single one always is."""
    for field in ({"branches": 4, "stop": "careful"}, {}):
        program = Program("p", parse_field({"algorithm": "long_cot", "answer": "hash", **field}, 64))
        program.start_branch()
        program.see_trial(0, Trial("7", "7", 0.6, 20_000))
        assert program.chains is not None
        assert program.chains.next_turn_tokens(20_000, [16], 12) == 20_001
        assert not program.chains.is_far


def test_chains_that_decide_together_know_how_far_they_are() -> None:
    """By what they said last, and by what finished ones leave possible."""
    program = Program("p", parse_field({"algorithm": "long_cot", "answer": "hash", "branches": 5}, 64))
    for _ in range(5):
        program.start_branch()
    assert program.chains is not None
    assert not program.chains.is_far
    for index, key in enumerate("78901"):
        program.see_trial(index, Trial(key, key, 0.9, 600))
    assert program.chains.is_far
    for index in (1, 2):
        program.see_trial(index, Trial("7", "7", 0.9, 900))
    assert not program.chains.is_far
    program.finish(0, "#### 1", 950)
    program.finish(1, "#### 2", 950)
    assert not program.chains.is_far  # one of them and the three left
    program.finish(2, "#### 3", 950)
    assert program.chains.is_far  # one and two are no four fifths

"""Confidence of a branch, weakness, and the mixture of answers: hand-computed cases and what must hold for any."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.confidence import Confidence, warmup_branches, weak_level
from sglang_dynasor.policy.mixture import MOST_PLACES, NO_MIXTURE, Answers, Distribution, Mixture


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
    answers = Answers()
    for index, distribution in enumerate(distributions):
        answers.see((), distribution)
        answers.end(index, ())
    return answers.mixture


def test_the_mixture_of_nothing_is_nothing() -> None:
    """No branch at its answer."""
    assert mixed([]) == NO_MIXTURE
    assert NO_MIXTURE.disagreement == 0.0


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
    assert NO_MIXTURE.agreed(3).num_branches == 3


def said(*answers: list[tuple[int, Distribution]]) -> Answers:
    """What branches say that each end with the last of these tokens, drawn from its distribution."""
    made = Answers()
    for index, tokens in enumerate(answers):
        for place, (_, distribution) in enumerate(tokens):
            assert made.see(tuple(token for token, _ in tokens[:place]), distribution)
        made.end(index, tuple(token for token, _ in tokens[:-1]))
    return made


def sure(*tokens: int) -> list[tuple[int, Distribution]]:
    return [(token, {token: 0.0}) for token in tokens]


def test_answers_that_begin_alike_and_differ_disagree() -> None:
    """Halves and thirds part at their fifth token, and by the chain rule that is all they part by, however much follows."""
    half, third = sure(1, 2, 3, 4, 5, 9, 9), sure(1, 2, 3, 4, 6, 8, 9)
    mixture = said(half, third).mixture
    assert mixture.entropy == mixture.disagreement == pytest.approx(log(2))
    assert (mixture.num_branches, mixture.num_tokens, mixture.mean_entropy) == (2, 14, 0.0)
    assert said(half, half, half).mixture.entropy == 0.0
    assert said(half, third, sure(7), sure(1, 7)).mixture.entropy == pytest.approx(log(4))


def test_the_doubt_of_every_token_counts() -> None:
    """Of two tokens that are each a coin's throw the entropy is 2 log 2, and nothing of it disagreement where all throw the same coins."""
    coin = {1: log(0.5), 2: log(0.5)}
    throws = [[(a, coin), (b, coin)] for a in (1, 2) for b in (1, 2)]
    mixture = said(*throws).mixture
    assert mixture.entropy == mixture.mean_entropy == pytest.approx(2 * log(2))


def test_who_is_still_saying_its_answer_takes_nothing_from_the_others() -> None:
    """At each token those count that have said it or ended before."""
    answers = said(sure(1, 2, 9), sure(1, 3, 9))
    assert answers.see((), {1: 0.0})  # a third branch has said its first token
    assert answers.mixture.entropy == pytest.approx(log(2))
    assert answers.mixture.num_branches == 2


def both_of(answers: Answers) -> tuple[float, float]:
    return answers.mixture.mean_entropy, answers.mixture.disagreement


def test_of_cut_distributions_the_doubt_is_whole_and_the_disagreement_at_least() -> None:
    """The entropy of all tokens is known of each; what two cut ones disagree by the host tells from what is there."""
    answers = Answers()
    answers.see((), {1: log(0.5)}, 3.0)
    answers.end(0, ())
    assert both_of(answers) == pytest.approx((3.0, 0.0))
    answers.see((), {2: log(0.5)}, 3.0)
    assert both_of(answers) == pytest.approx((3.0, 0.5 * log(2)))


def test_where_the_device_mixes_who_is_told_counts() -> None:
    """And nobody else; what it tells of fewer, or of what it does not mix, is no news."""
    answers = Answers()
    for index in range(3):
        assert answers.see((), {index: log(0.5)}, 1.0 + index) == index + 1
        if not index:
            answers.mix_on_device(())
        answers.end(index, ())
    assert answers.mixture == NO_MIXTURE
    assert not answers.tell((5,), 1, 0.9)
    assert not answers.tell((), 4, 0.9)
    assert answers.tell((), 2, 1.9)
    assert both_of(answers) == pytest.approx((1.5, 0.4))
    assert (answers.mixture.num_branches, answers.mixture.num_tokens) == (2, 2)
    assert not answers.tell((), 1, 0.9)
    assert answers.tell((), 3, 2.7)
    assert both_of(answers) == pytest.approx((2.0, 0.7))
    assert answers.branches == {0, 1, 2}


def test_what_the_device_gives_up_the_host_has_mixed() -> None:
    """All who came there count at once; who is no longer one of those that decide does not."""
    answers = Answers()
    for index in range(3):
        answers.see((), {index: 0.0})
        answers.mix_on_device(())
        answers.end(index, ())
    answers.forget(1)
    answers.mix_on_host(())
    answers.mix_on_host((7,))  # nobody came there
    assert answers.branches == {0, 2}
    assert answers.mixture.disagreement == pytest.approx(log(3))
    assert not answers.tell((), 3, 0.9)


def test_at_the_end_all_count() -> None:
    """Where something was told that stands, elsewhere the host's word; nothing is told any more."""
    answers = Answers()
    for index in range(2):
        answers.see((), {index: 0.0}, 0.5)
        answers.mix_on_device(())
        answers.see((index,), {9: 0.0}, 0.1)
        answers.mix_on_device((index,))
        answers.end(index, (index,))
        answers.tell((), 1, 0.5)
    assert answers.mixture.num_branches == 0
    answers.close()
    mixture = answers.mixture
    assert (mixture.num_branches, mixture.num_tokens) == (2, 3)
    assert (mixture.mean_entropy, mixture.disagreement) == pytest.approx((0.6, 0.0))
    assert not answers.tell((), 2, 9.9)
    assert not answers.places


def test_a_program_that_rests_keeps_the_first_tokens_only() -> None:
    """A branch that comes later is mixed with those at its first token; what was found at others stays."""
    answers = said(sure(1, 2), sure(1, 3))
    answers.rest()
    assert list(answers.places) == [()]
    answers.see((), {7: 0.0})
    answers.see((7,), {8: 0.0})
    answers.end(2, (7,))
    mixture = answers.mixture
    assert (mixture.num_branches, mixture.num_tokens) == (3, 6)
    first = log(3) - 2 / 3 * log(2)  # two of three said 1
    assert mixture.disagreement == pytest.approx(first + 2 / 3 * log(2))


def test_places_of_a_program_are_bounded() -> None:
    """Beyond, what is said there is left out."""
    answers = Answers()
    assert all(answers.see((token,), {1: 0.0}) for token in range(MOST_PLACES))
    assert not answers.see((), {1: 0.0})
    assert answers.see((0,), {1: 0.0})

"""Stopping rules replayed: on samples made here, and on recorded samples of real models where the traces are at hand."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from engines import ROOT
from hypothesis import given
from hypothesis import strategies as st
from recorded import Question, Recorded, Sample, read_sets
from replay_rules import (
    DOUBLING,
    PEERS,
    WAYS,
    WINDOWS,
    Finish,
    Vote,
    agrees,
    doubled,
    finishes,
    fives,
    is_unanimous,
    macro,
    replay,
    run_order,
    run_waves,
)

from sglang_dynasor.config import LEVELS
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.rules import parse_stop
from sglang_dynasor.policy.spec import ProgramSpec

TRACES = ROOT.parent / "shared" / "traces"
has_traces = pytest.mark.skipif(not TRACES.exists(), reason="the recorded samples are not part of the repository")


def samples(answers: str, tokens: int = 10) -> list[Sample]:
    """One sample per letter; "-" abstains, "a" is right."""
    return [Sample(None if letter == "-" else letter, tokens, letter == "a") for letter in answers]


def test_short_ones_finish_first() -> None:
    """Two at once: the second ends after a step, the third takes its place."""
    assert list(finishes([5, 1, 2], 2)) == [Finish(1, 1, 1, 2), Finish(2, 1, 3, 6), Finish(0, 0, 5, 8)]
    assert [finish.place for finish in finishes([5, 1, 2], 3)] == [1, 2, 0]
    assert [finish.place for finish in finishes([5, 1, 2], 1)] == [0, 1, 2]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 20))
def test_every_sample_finishes_once(tokens: list[int], width: int) -> None:
    """All tokens are spent in the end, never more of them at once than fit, and none ends before it has had its tokens."""
    found = list(finishes(tokens, width))
    assert sorted(finish.place for finish in found) == list(range(len(tokens)))
    assert found[-1].spent_tokens == sum(tokens)
    for finish in found:
        assert finish.num_in_flight < width
        assert finish.step >= tokens[finish.place]
        assert finish.spent_tokens <= width * finish.step


@given(
    st.lists(st.tuples(st.sampled_from("abc-"), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from([*LEVELS, "beta", "window", "margin", "entropy"]),
)
def test_the_replay_decides_as_a_program_does(drawn: list[tuple[str, int]], width: int, rule: str) -> None:
    """The engine's own program, told of the same branches, ends after as many."""
    order = [Sample(None if letter == "-" else letter, tokens, False) for letter, tokens in drawn]
    spec = ProgramSpec("self_consistency", len(order), None, parse_stop(rule), "last_line", None)
    program = Program("p", spec, usual_tokens=Mean(20.0))
    for _ in range(min(width, len(order))):
        program.start_branch()
    for finish in finishes([sample.num_tokens for sample in order], width):
        program.count(finish.place, order[finish.place].key, order[finish.place].num_tokens)
        if program.reason is not None:
            break
        if len(program.branches) < len(order):
            program.start_branch()
    end = run_order(order, width, 20.0)[rule]
    assert end.num_finished == len(program.votes.recent)
    if program.reason is StopReason.CERTAIN and end.risk is not None:
        assert end.risk == program.risk


@pytest.mark.parametrize(
    ("answers", "spent", "is_early"),
    [
        ("aabbbbbb", 20, True),  # two agree
        ("abaabbbb", 40, True),  # three of four
        ("ab-abbbb", 80, False),  # two of three is less
        ("aa", 20, False),  # the cap
        ("----aaaa", 80, False),  # nobody voted in the first four
    ],
)
def test_doubling(answers: str, spent: int, is_early: bool) -> None:
    """its_hub waits for 2, 4, 8, ... samples and wants three quarters of the votes."""
    end = run_waves(samples(answers), doubled(len(answers)), agrees, 10.0)
    assert (end.spent_tokens, end.risk is not None) == (spent, is_early)


@pytest.mark.parametrize(
    ("answers", "spent", "is_early"),
    [("aaaaab", 50, True), ("aaaabaaaaaa", 100, True), ("aaaa-aaaaa", 100, False), ("aaaaaaa"[:4], 40, False)],
)
def test_windows_of_five(answers: str, spent: int, is_early: bool) -> None:
    """ESC wants one whole window of one answer; an abstention breaks it."""
    end = run_waves(samples(answers), fives(len(answers)), is_unanimous, 10.0)
    assert (end.spent_tokens, end.risk is not None) == (spent, is_early)


def test_waves_end_with_the_cap() -> None:
    """The last is what is left."""
    assert list(doubled(16)) == [2, 2, 4, 8]
    assert list(doubled(10)) == [2, 2, 4, 2]
    assert list(doubled(1)) == [1]
    assert list(fives(12)) == [5, 5, 2]


def test_a_tie_counts_its_share() -> None:
    """Of accuracy, and of what changed."""
    vote = Vote()
    for sample in samples("ab"):
        vote.cast(sample)
    assert (vote.accuracy, vote.leaders) == (0.5, ["a", "b"])
    assert Vote().accuracy == 0.0


def made(num_questions: int, num_samples: int, seed: int, short: float = 1.0) -> Recorded:
    """Questions whose answers' shares are drawn as the rule's prior says. `short`: of branches that say anything but the likeliest."""
    rng, questions = random.Random(seed), list[Question]()
    for number in range(num_questions):
        shares = sorted((rng.gammavariate(0.5, 1.0) for _ in "ab"), reverse=True)
        drawn: list[Sample] = []
        for _ in range(num_samples):
            letter = rng.choices("ab", shares)[0]
            length = rng.lognormvariate(4, 0.4) * (1.0 if letter == "a" else short)
            drawn.append(Sample(None if rng.random() < 0.05 else letter, max(1, round(length)), letter == "a"))
        questions.append(Question(str(number), tuple(drawn)))
    return Recorded("made", questions, (num_samples,))


def test_made_samples_change_no_more_than_is_stated() -> None:
    """Where lengths say nothing: at every width and level, but for sampling error."""
    figures = replay(made(400, 16, 0), 16, num_orders=1)
    for width in (1, 4, 8, 0):
        for rule in LEVELS:
            found = figures[rule, width]
            assert found["observed"] <= found["stated"] + 1.5, (rule, width)
            assert found["stopped"] > 50


def test_short_wrong_answers_are_not_believed_too_early() -> None:
    """Where unlikely answers are the short ones, all at once: the tempered rule states what happens, the old one a third of it."""
    figures = replay(made(400, 16, 2, short=0.8), 16, widths=(0,), num_orders=1)
    careful, old = figures["careful", 0], figures["untempered:0.05", 0]
    assert careful["observed"] <= careful["stated"] + 0.5
    assert old["observed"] > 2.5 * old["stated"]
    assert careful["accuracy"] > old["accuracy"]


def test_the_levels_are_in_order() -> None:
    """A higher level saves more, and ends more programs early, whatever the width."""
    figures = replay(made(100, 16, 2), 16, num_orders=1)
    for width in (1, 4, 8, 0):
        for one, other in (("careful", "balanced"), ("balanced", "fast")):
            assert figures[one, width]["saved"] <= figures[other, width]["saved"]
            assert figures[one, width]["stopped"] <= figures[other, width]["stopped"]


def test_what_has_no_lengths_is_replayed_one_by_one() -> None:
    """Nobody knows which branch would have finished first."""
    recorded = made(3, 8, 3)
    figures = replay(Recorded("flat", recorded.questions, (8,), has_lengths=False), 8, num_orders=1)
    assert {width for name, width in figures if name in WAYS} == {1}
    assert {(DOUBLING, -1), (WINDOWS, -1), ("never", 0)} <= set(figures)


def test_a_folder_without_traces() -> None:
    """Is named."""
    with pytest.raises(ValueError, match=r"--traces='.*tests' has no recorded samples; name a folder with"):
        next(read_sets(ROOT / "tests"))


# Where the traces are


@pytest.fixture(scope="module")
def sets() -> dict[str, Recorded]:
    return {recorded.name: recorded for recorded in read_sets(TRACES)}


@has_traces
def test_known_answers(sets: dict[str, Recorded]) -> None:
    """MATH-500, R1-Distill-Llama-8B x32, found apart from this code: a single sample, majority of 32, Beta 0.95 one by one."""
    recorded = sets["MATH-500, R1-Llama-8B x32"]
    figures = replay(recorded, 32, widths=(1,), num_orders=10)
    assert 100 * mean(s.is_correct for q in recorded.questions for s in q.samples) == pytest.approx(73.9, abs=0.5)
    assert figures["never", 0]["accuracy"] == pytest.approx(88.5, abs=0.1)
    assert PEERS["beta", 1] == "Adaptive-Consistency, one by one"
    assert figures["beta", 1]["finished"] == pytest.approx(9.5, abs=0.2)
    assert figures["untempered:0.02", 1]["saved"] == pytest.approx(62.7, abs=0.7)
    assert figures["margin", 1]["against full"] == 0


@has_traces
def test_recorded_samples_change_no_more_than_is_stated(sets: dict[str, Recorded]) -> None:
    """Means over sets, at every width and level; and of each set at most twice what is stated, but for sampling error.

    The old rule, all at once, does not hold what it states.
    """
    names = ("MATH-500, R1-Llama-8B x32", "MATH-500, R1-Llama-8B x16", "MATH-100, Qwen2.5-Math x8", "MMLU-Pro, GPQA, Gemma-12B x10", "GPQA-diamond, Claude-2 x16", "dates, GPT-3.5 x10")  # fmt: skip
    each = {name: replay(sets[name], sets[name].caps[-1], num_orders=2) for name in names}
    letters = sets["last letters, GPT-3.5 x40"]
    each[letters.name] = replay(Recorded(letters.name, letters.questions[::3], (40,)), 40, num_orders=1)
    means = {(name, width): figures for name, width, figures in macro(list(each.values()))}
    for width in (1, 4, 8, 0):
        for level in LEVELS:
            found = means[level, width]
            assert found["observed"] <= found["stated"] + 0.5, (level, width)
            for name, figures in each.items():
                one, num = figures[level, width], len(sets[name].questions)
                error = 196 * (one["observed"] / 100 * (1 - one["observed"] / 100) / num) ** 0.5
                assert one["observed"] <= 2 * one["stated"] + error, (name, level, width)
    old = means["untempered:0.05", 0]
    assert old["observed"] > old["stated"]
    assert old["against full"] < means["careful", 0]["against full"]


@has_traces
def test_ahead_of_the_peers(sets: dict[str, Recorded]) -> None:
    """Means over sets, one by one: a level saves more than each peer and answers no worse."""
    names = ("MATH-500, R1-Llama-8B x32", "MATH-500, R1-Llama-8B x16", "MATH-100, Qwen2.5-Math x8", "MMLU-Pro, GPQA, Gemma-12B x10", "GPQA-diamond, Claude-2 x16", "dates, GPT-3.5 x10")  # fmt: skip
    each = [replay(sets[name], sets[name].caps[-1], widths=(1,), num_orders=4) for name in names]
    means = {(name, width): figures for name, width, figures in macro(each)}
    for peer, level in (((DOUBLING, -1), "fast"), ((WINDOWS, -1), "careful"), (("beta", 1), "careful")):
        assert means[level, 1]["saved"] > means[peer]["saved"] + 1
        assert means[level, 1]["against full"] >= means[peer]["against full"] - 0.3

"""Recorded probes replayed, on thoughts made here: what a program makes of them, and what the replay says of that."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from leader_odds import fit, run_odds
from recorded_probes import (
    Asked,
    Thought,
    all_to_their_ends,
    by_likelihood,
    every,
    likely,
    run_confident,
    run_program,
    run_share,
    spread,
    steady,
    units_of,
)
from replay_probes import DEFAULT, Figures, exit_of, program, read_as, spec_of
from waves import PROBE_TOKENS, run_waves

from sglang_dynasor.policy.rules import parse_stop
from sglang_dynasor.policy.thought import PRICE_FRAC, Trial
from sglang_dynasor.policy.thought_spec import ThoughtSpec

ALL = 10


def thought(answers: str, num_tokens: int, likelihood: float = 0.9, mass: float = 1.0) -> Thought:
    """One with a trial after each of ten equal parts; the last is what it answers."""
    places = range(1, len(answers) + 1)
    trials = tuple(
        Trial(a, a, likelihood, num_tokens * i // len(answers)) for i, a in zip(places, answers, strict=True)
    )
    return Thought(trials, tuple({a: likelihood} for a in answers), (mass,) * len(answers))


def asked(*thoughts: Thought, gold: str = "A") -> Asked:
    return Asked("q", gold, thoughts)


def made(num: int, seed: int = 0) -> list[Asked]:
    """Questions whose chains come to an answer sooner or later, most of them to the same one."""
    random = Random(seed)
    questions: list[Asked] = []
    for i in range(num):
        thoughts: list[Thought] = []
        for _ in range(ALL):
            last, since = random.choices("AB", (0.5 + 0.05 * (i % 10), 0.5))[0], random.randrange(1, 10)
            answers = "".join(random.choice("ABCD") if place < since else last for place in range(10))
            thoughts.append(thought(answers, random.randrange(1000, 8000), random.choice((0.4, 0.7, 0.995))))
        questions.append(Asked(str(i), "A", tuple(thoughts)))
    return questions


def test_what_never_decides_uses_all() -> None:
    """And the vote of all is the answer; of equal votes the one that came first by chain."""
    question = asked(*[thought("ABCABCABC" + answer, 1000 + 100 * i) for i, answer in enumerate("BABABACDCD")])
    whole = all_to_their_ends(question)
    assert whole == ("B", sum(1000 + 100 * i for i in range(10)), 1900)
    assert run_program(question, spec_of("never", agree=64)) == whole
    assert run_share(question, likely, 0.8, 512) == whole


def test_a_program_stops_where_its_chains_agree() -> None:
    """All say A from the first tenth on, and are heard again 512 tokens later."""
    question = asked(*[thought("A" * 10, 10_000)] * 10)
    outcome = run_program(question, spec_of("trials:0.8"))
    assert outcome == ("A", 20_000, 2000)
    assert run_share(question, likely, 0.8, 512) == outcome
    assert run_program(question, spec_of("trials:0.8", hold_tokens=1024)).time == 3000
    doubtful = asked(*[thought("A" * 10, 10_000, 0.4)] * 10)
    assert run_program(doubtful, spec_of("trials:0.8")) == all_to_their_ends(doubtful)
    assert run_share(doubtful, every, 0.8, 512).time == 2000


def test_chains_that_settle_end_there() -> None:
    """They use what they had thought, and vote."""
    question = asked(thought("A" * 10, 10_000, 0.995), *[thought("ABCDABCDAB", 10_000, 0.4)] * 9)
    outcome = run_program(question, spec_of("careful", settles=True))
    assert outcome.tokens == 2000 + 9 * 10_000
    assert run_program(question, spec_of("careful")).tokens == 10 * 10_000


def test_chains_that_start_later() -> None:
    """Where no answer has its share after 1,024 tokens, the others start at the next place where somebody is asked."""
    question = asked(*[thought("A" * 10, 10_000)] * 10)
    assert run_program(question, spec_of("trials:0.8"), first=8, later=1024) == ("A", 16_000, 2000)
    few = run_program(question, spec_of("trials:0.8"), first=7, later=1024)
    assert few.time > 2000
    assert few.answer == "A"
    late = run_program(question, spec_of("never", agree=64), first=4, later=1024)
    assert (late.tokens, late.time) == (question.num_tokens, 12_000)


def test_what_units_are_made_of() -> None:
    """Of a running chain by its weights, of a finished one its answer's."""
    one = thought("AABBB", 500, 0.8)
    assert units_of([one], [-1], every) == {}
    assert units_of([one], [4], by_likelihood) == {"B": 1.0}
    assert units_of([one], [1], by_likelihood) == {"A": 0.8}
    assert units_of([one], [1], spread) == {"A": 0.8}
    assert [units_of([one], [place], steady)["AABB"[place]] for place in range(4)] == pytest.approx(
        [1 / 3, 2 / 3, 1 / 3, 2 / 3]
    )


def test_the_rule_before_took_confident_trials_for_votes() -> None:
    """A few that have just begun decide; unlikely ones do not."""
    sure = asked(*[thought("A" * 10, 10_000, 0.995)] * 5, *[thought("B" * 10, 10_000, 0.6)] * 5)
    stop = parse_stop("careful")
    assert run_confident(sure, stop, 0.99) == ("A", 10_000, 1000)
    assert run_confident(sure, stop, 0.999) == all_to_their_ends(sure)
    assert run_program(sure, spec_of("careful or trials:0.8")) == all_to_their_ends(sure)


def test_likelihoods_may_be_read_otherwise() -> None:
    """Among all tokens a letter may be unlikely."""
    question = asked(*[thought("A" * 10, 10_000, 0.9, mass=0.1)] * 10)
    rule = program(DEFAULT)
    assert rule(question).time == 2000
    assert read_as(question, rule, "tokens") == rule(asked(*[thought("A" * 10, 10_000, 0.09)] * 10))
    assert read_as(question, rule, "listed") == rule(question)


def test_figures_are_of_all_questions_together() -> None:
    """Savings by tokens, accuracy against the whole vote in points, and the same intervals whenever they are drawn."""
    good = asked(*[thought("A" * 10, 10_000)] * 10)
    bad = Asked("other", "B", tuple([thought("A" * 5 + "B" * 5, 20_000)] * 10))
    figures = Figures([good, bad], program("trials:0.8"))
    assert figures.accuracy == -50.0
    assert figures.changed == 50.0
    assert figures.saved == pytest.approx(100 * (1 - (20_000 + 40_000) / 300_000))
    assert figures.time == pytest.approx((0.2 + 0.2) / 2)
    assert figures.drawn() == Figures([good, bad], program("trials:0.8")).drawn()
    assert Figures([good, bad], all_to_their_ends).told("x") == {
        "x saved %": "0.0 (0 to 0)", "x accuracy": "+0.0 (+0.0 to +0.0)", "x changed %": "0.0", "x time": "1.00",
    }  # fmt: skip


def test_odds_that_the_leader_stands() -> None:
    """They rise with its share; what must be likelier stops later."""
    questions = made(60)
    coefficients = fit(questions, likely)
    assert coefficients[1] + coefficients[2] > 0
    assert np.array_equal(coefficients, fit(questions, likely))
    others = made(40, seed=1)
    saved = [Figures(others, lambda q, p=p: run_odds(q, likely, coefficients, p)).saved for p in (0.6, 0.8, 0.95)]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > saved[-1]


@pytest.mark.parametrize("waits", [False, True])
def test_waves_keep_to_their_price(waits: bool) -> None:
    """Of each question; and every chain of a program is asked in the same pass, so that there are far fewer passes."""
    for question in made(20):
        runs = run_waves(question, spec_of(DEFAULT), grows=True, waits=waits)
        assert PROBE_TOKENS * runs.num_probes <= PRICE_FRAC * runs.outcome.tokens + 1e-9
        assert runs.num_waves <= runs.num_probes
        assert runs.num_waves * 4 <= runs.num_probes or runs.num_probes < 20
        assert runs.outcome.tokens <= question.num_tokens
        assert runs.outcome.answer in "ABCD"


def test_a_single_thought_is_closed_from_its_least_length_on() -> None:
    """Trials before that are not asked."""
    trials = thought("A" * 10, 1000).trials
    assert exit_of(trials, ThoughtSpec(2, 0.9, 0, None)).num_tokens == 200
    assert exit_of(trials, ThoughtSpec(2, 0.9, 512, None)).num_tokens == 700
    assert exit_of(trials, ThoughtSpec(2, 0.95, 0, None)).num_tokens == 1000

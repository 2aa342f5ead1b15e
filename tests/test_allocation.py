"""How many branches are worth starting: by the vote, and by the load."""

from __future__ import annotations

from random import Random

import pytest
from bench_votes import LIMITS_MS, VOTES, dearest_ms, finish_ms
from bench_votes import RULES as RULES_ASKED
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mixture import NO_MIXTURE
from sglang_dynasor.policy.program import BranchState, Program
from sglang_dynasor.policy.rules import RULES, parse_stop
from sglang_dynasor.policy.spec import parse_field


def needed(rule: str, counts: tuple[int, ...], num_left: int, recent: str = "") -> int:
    keys = recent or "".join(letter * votes for letter, votes in zip("abcdef", counts, strict=False))
    return votes_needed(Evidence(counts, 0, num_left, tuple(keys)), parse_stop(rule))


@pytest.mark.parametrize(
    ("rule", "counts", "num_left", "expected"),
    [
        ("beta", (), 16, 4),  # 4-0
        ("beta", (3,), 13, 1),
        ("beta", (3, 1), 12, 3),  # 6-1
        ("beta", (1, 1), 14, 5),
        ("window:5", (), 16, 5),
        ("margin", (), 16, 9),
        ("entropy", (), 16, 5),
        ("predictive:0", (), 16, 9),  # no risk at all is the lossless rule
        ("window:5 and margin", (), 16, 10),  # the next full window after the ninth
        ("window:5 or margin", (), 16, 5),
    ],
)
def test_fewest_votes_that_could_decide(rule: str, counts: tuple[int, ...], num_left: int, expected: int) -> None:
    """By each rule's own arithmetic."""
    assert needed(rule, counts, num_left) == expected


@pytest.mark.parametrize(
    ("rule", "counts", "num_left", "expected"),
    [
        ("never", (), 16, 0),
        ("never", (15,), 1, 0),
        ("reward", (3,), 5, 1),  # the next one may bring the best of rewards
        ("beta", (), 4, 4),  # the last one decides
        ("beta", (), 3, 0),  # 3-0 is the cap and not certain
        ("beta", (2, 2), 3, 0),
        ("window:5", (), 4, 0),
        ("predictive", (), 0, 0),  # nothing left
    ],
)
def test_nothing_short_of_the_cap_decides(rule: str, counts: tuple[int, ...], num_left: int, expected: int) -> None:
    """0 where not even all that are left could, and the nearest case where they could."""
    assert needed(rule, counts, num_left) == expected


def test_disagreement_asks_for_more() -> None:
    """Certain programs are given few branches, uncertain ones more."""
    assert needed("predictive", (3,), 13) < needed("predictive", (2, 1), 13) <= needed("predictive", (1, 1, 1), 13)


@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(0, 24),
    st.lists(
        st.sampled_from([*sorted(RULES), "window:2", "window:3", "window:4", "predictive:0.2"]), min_size=1, max_size=4
    ),
    st.sampled_from(["and", "or"]),
    st.randoms(use_true_random=False),
    st.integers(0, 24),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.integers(-1, 30),
)
def test_it_is_the_fewest(
    counts: list[int],
    num_left: int,
    names: list[str],
    joiner: str,
    rng: Random,
    in_flight: int,
    cheap: float,
    near: int,
) -> None:
    """Of one rule or several: so many votes for the leader let it stop, and no fewer do; 0 if none up to the cap does.

    Wherever it is looked for first.
    """
    votes = tuple(sorted(counts, reverse=True))
    keys = [letter for letter, num in zip("abcd", votes, strict=False) for _ in range(num)]
    rng.shuffle(keys)
    leader = max(keys, key=keys.count, default="?")
    rule = parse_stop(f" {joiner} ".join(names))
    in_flight = min(in_flight, num_left)
    evidence = Evidence(
        votes, 0, num_left, tuple(keys), rewards=(0.5,) * len(keys), num_in_flight=in_flight, cheapness=cheap
    )
    num = votes_needed(evidence, rule)
    assert 0 <= num == votes_needed(evidence, rule, near) <= num_left

    def would_stop(more: int) -> bool:
        then = ((votes[0] if votes else 0) + more, *votes[1:])
        return rule.stops(
            Evidence(
                then,
                0,
                num_left - more,
                (*keys, *[leader] * more),
                mixture=NO_MIXTURE.agreed(more),
                rewards=(*evidence.rewards, *[1.0] * more),
                num_in_flight=max(0, in_flight - more),
                cheapness=cheap,
            )
        )

    assert [more for more in range(1, num_left + 1) if would_stop(more)][:1] == ([num] if num else [])


@pytest.mark.parametrize("joiner", ["and", "or"])
def test_few_rules_are_asked(joiner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 branches each rule is asked some nine times, whatever the votes and however many levels were written."""
    asked: list[Evidence] = []

    def counted(evidence: Evidence, level: float) -> bool:
        asked.append(evidence)
        return RULES["margin"].stops(evidence, level)

    monkeypatch.setitem(RULES, "predictive", RULES["predictive"]._replace(stops=counted))
    rule = parse_stop(f" {joiner} ".join(f"predictive:{level}" for level in (0.01, 0.02, 0.03, 0.04)))
    assert votes_needed(Evidence((1,) * 100, 0, 156, tuple(map(str, range(100)))), rule) == 79
    assert len(asked) <= 9


@pytest.mark.parametrize(
    ("rule", "votes", "num_branches"),
    [
        ("predictive", "many counts", 256),
        ("predictive", "many counts", 64),
        ("beta", "two-way tie", 64),
        ("all rules", "all different", 64),
        ("by confidence", "many counts, then new ones", 64),
    ],
)
def test_no_vote_holds_up_the_loop(rule: str, votes: str, num_branches: int) -> None:
    """Ten times the bound of docs/answers.md, whatever the machine; before there was one, the first took twenty times as much."""
    ms = dearest_ms(lambda: finish_ms(num_branches, RULES_ASKED[rule], VOTES[votes](num_branches), closes=False))
    assert ms < 10 * LIMITS_MS[num_branches]


@given(
    st.lists(st.sampled_from("abc"), max_size=15),
    st.sampled_from(["predictive", "beta", "window", "margin", "entropy", "never"]),
    st.lists(st.integers(1, 20), min_size=1, max_size=15),
)
def test_it_never_stalls_and_never_starts_too_many(answers: list[str], rule: str, widths: list[int]) -> None:
    """Under any load an undecided program with nothing in flight starts something; never beyond its width or cap."""
    program = Program("p", parse_field({"branches": 16, "width": 8, "stop": rule, "answer": "last_line"}, 64))
    for turn, answer in enumerate(answers):
        for _ in range(program.num_to_start(widths[turn % len(widths)])[0]):
            program.start_branch()
        if program.reason is not None:
            break
        assert 1 <= program.num_in_flight <= 8
        assert len(program.branches) <= 16
        index = next(i for i, b in enumerate(program.branches) if b.state is BranchState.IN_FLIGHT)
        program.finish(index, answer, 1)

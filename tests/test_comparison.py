"""Answers that are compared beside the loop: what a finding merges, what waits for it, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.comparison import MAX_CHARS, MOST_COMPARED
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.votes import Votes


def program(branches: int = 4, equal: str = "model", **field: Any) -> Program:
    spec = parse_field({"answer": "last_line", "branches": branches, "stop": "never", "equal": equal, **field}, 64)
    made = Program("p", spec)
    for _ in range(branches):
        made.start_branch()
    return made


def say(made: Program, *answers: str | None, first: int = 0) -> None:
    for index, answer in enumerate(answers, first):
        made.count(index, answer, 10)


def votes_of(made: Program) -> dict[str, int]:
    return {vote["answer"]: vote["votes"] for vote in made.record()["votes"]}


def test_a_new_answer_is_compared_with_the_known_ones() -> None:
    """The leading one first; the same answer again is not new, nor is the first of all."""
    made = program(6)
    say(made, "one", "two", "two", "three", None, "one")
    assert made.comparisons.under_way == {1: [0], 3: [1, 0]}
    made.settle(3, None)
    made.settle(3, None)
    assert made.comparisons.num == 1


@pytest.mark.parametrize("equal", ["math", "text"])
def test_nothing_is_compared_by_keys_alone(equal: str) -> None:
    """Where the key says all the program ends with its last branch, and its record has no merges."""
    made = program(2, equal)
    say(made, "one", "two")
    assert made.comparisons.under_way == {}
    assert made.reason is StopReason.CAP
    assert "merges" not in made.record()


def test_a_finding_merges_votes() -> None:
    """The earlier answer stays; later votes for the merged one count for it; the merge is in the record."""
    made = program(5)
    say(made, "one", "uno", "two")
    made.settle(1, 0, 0.75)
    assert votes_of(made) == {"one": 2, "two": 1}
    say(made, "uno", first=3)
    assert votes_of(made) == {"one": 3, "two": 1}
    assert [branch.key for branch in made.branches[:4]] == ["one", "one", "two", "one"]
    assert made.votes.recent == ["one", "one", "two", "one"]
    assert made.record()["merges"] == [{"answer": "uno", "into": "one", "by": "model", "score": 0.75}]
    assert made.record()["num_comparisons"] == 1


def test_a_merge_makes_another_answer_lead() -> None:
    """2-1-1 is 2-2 once the latter two are one, and the earliest branch decides; 2-1-1-1 is 2-3."""
    made = program(5)
    say(made, "a", "b", "b", "c", "d")
    made.settle(1, None)
    assert made.winner == 1
    made.settle(3, 0)
    assert made.reason is None
    made.settle(4, 0)
    assert made.winner == 0
    assert made.reason is StopReason.CAP
    assert votes_of(made) == {"a": 3, "b": 2}


def test_a_merge_makes_the_rule_fire() -> None:
    """Three ways to write one answer are unanimous once that is found."""
    made = program(8, stop="window:3")
    say(made, "one", "uno", "un")
    assert made.reason is None
    made.settle(1, 0)
    assert made.reason is None
    made.settle(2, 0)
    assert made.reason is StopReason.CERTAIN
    assert made.winner == 0


def test_a_rule_waits_for_what_could_overtake() -> None:
    """A rule that would fire on 2-1-1-1 waits while the last three may be one answer; not on what cannot change."""
    made = program(16, stop="entropy:0")
    say(made, "a", "b")
    made.settle(1, None)
    say(made, "c", "d", first=2)
    say(made, "a", first=4)
    assert made.reason is None  # 2-1-1-1 with two open
    made.settle(3, None)
    assert made.reason is None  # c may still join b: 2-2
    made.settle(2, None)
    assert made.reason is StopReason.CERTAIN


def test_the_end_waits_for_findings_that_could_change_it() -> None:
    """All branches are in: 2-1-1 waits, and ends by whatever is found."""
    for into, winner in ((1, 1), (None, 0)):
        made = program(5)
        say(made, "a", "b", "c", "a", "b")
        made.settle(1, None)
        assert made.reason is None
        made.settle(2, into)
        assert (made.reason, made.winner) == (StopReason.CAP, winner)


@pytest.mark.parametrize(
    "answers",
    [
        ("a", "a", "a", "b"),  # one may join nobody but the leader
        ("a", "a", "a", "b", "c"),  # 3-2 at most
        ("a", "b", "a", "a"),
        ("a", "a", None),
        ("a",),
    ],
)
def test_a_leader_that_no_merge_can_overtake_does_not_wait(answers: tuple[str | None, ...]) -> None:
    """It ends with its last branch, while findings are under way."""
    made = program(len(answers))
    say(made, *answers)
    assert made.reason is StopReason.CAP
    assert made.winner == 0


def test_only_the_leader_is_open() -> None:
    """What the leader may join makes it lead by more: nothing waits."""
    made = program(4)
    say(made, "a", "b", "b", "b")
    assert made.comparisons.under_way == {1: [0]}
    assert made.reason is StopReason.CAP
    assert made.winner == 1


def test_rewards_are_not_added_up_by_a_merge() -> None:
    """With vote best the highest reward decides, whoever else said the same; by the sum of rewards a merge may change it."""
    for vote, reason in (("best", StopReason.CAP), ("reward", None)):
        made = program(3, vote=vote, judge="model")
        for index, (answer, reward) in enumerate((("a", 0.5), ("b", 0.4), ("c", 0.4))):
            made.count(index, answer, 10, reward)
        assert made.reason is reason


def test_after_the_end_nothing_is_merged() -> None:
    """A finding that comes late, or twice, changes nothing; a deadline wins over what is under way."""
    made = program(4)
    say(made, "a", "b", "c")
    made.settle(1, 0)
    made.settle(1, None)
    made.reason = StopReason.DEADLINE
    before = made.record()
    made.settle(2, 0)
    assert made.record() == before
    assert votes_of(made) == {"a": 2, "c": 1}


def test_the_next_of_those_it_is_compared_with() -> None:
    """One after the other, until none is left."""
    made = program(4)
    say(made, "a", "b", "c")
    assert made.comparisons.pass_over(2) == 1
    assert made.comparisons.pass_over(2) is None
    made.settle(2, None)
    assert made.comparisons.under_way == {1: [0]}


def test_comparisons_are_bounded() -> None:
    """A new answer is compared with so many known ones at most; a long one with none."""
    made = program(64)
    say(made, *map(str, range(20)))
    assert [len(others) for others in made.comparisons.under_way.values()] == [*range(1, 9), *[MOST_COMPARED] * 11]
    made = program(3)
    say(made, "a", "x" * (MAX_CHARS["model"] + 1), "b")
    assert made.comparisons.under_way == {2: [0]}


def test_only_formulas_are_compared_symbolically() -> None:
    """Words are what they are: a parser would make products of their letters."""
    made = program(6, "symbolic")
    say(made, "2k+2", "listen", "silent", "2+2k", "x", "$2k+2$")
    assert made.comparisons.under_way == {3: [0], 4: [0, 3]}


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=16),
    st.randoms(use_true_random=False),
    st.sampled_from(["majority", "confidence"]),
)
def test_the_order_of_findings_makes_no_difference(classes: list[int], random: Any, by: str) -> None:
    """Votes, keys, the order in which they came and the ranking are the same, whichever finding comes first."""
    truth: dict[int, int] = {}
    findings: list[tuple[int, int]] = []
    for voter, one in enumerate(classes):
        if one in truth:
            findings.append((voter, truth[one]))
        else:
            truth[one] = voter
    seen: list[Any] = []
    for _ in range(3):
        votes = Votes(by)
        for voter in range(len(classes)):
            votes.cast(voter, f"k{voter}", confidence=1.0 + voter % 3)
        random.shuffle(findings)
        for one, other in findings:
            votes.merge(*random.sample([f"k{one}", f"k{other}"], 2))
        seen.append((votes.voters, list(votes.voters), votes.recent, votes.ranking, votes.counts))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][4] == tuple(sorted((classes.count(one) for one in set(classes)), reverse=True))
    assert seen[0][2] == [f"k{truth[one]}" for one in classes]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=10), st.randoms(use_true_random=False))
def test_the_bound_on_what_merges_can_do_holds(classes: list[int], random: Any) -> None:
    """A leader that is said to be safe leads whatever is found, and in the end every program ends."""
    made = program(len(classes))
    true_class: dict[str, int] = {}
    for index, one in enumerate(classes):
        answer = f"{one}{random.choice('abc')}"
        true_class[answer] = one
        say(made, answer, first=index)
        if random.random() < 0.3 and made.comparisons.under_way:
            settle(made, classes, random.choice(list(made.comparisons.under_way)))
        if made.reason is not None:
            break
    if made.reason is not None:
        leading = made.branches[made.winner or 0].key
        made.reason = None
        while made.comparisons.under_way:
            settle(made, classes, random.choice(list(made.comparisons.under_way)))
        assert made.votes.root(leading or "") == made.branches[made.winner or 0].key
    else:
        while made.comparisons.under_way:
            settle(made, classes, random.choice(list(made.comparisons.under_way)))
        assert made.reason is StopReason.CAP


def settle(made: Program, classes: Sequence[int], index: int) -> None:
    others = made.comparisons.under_way[index]
    made.settle(index, next((i for i in others if classes[i] == classes[index]), None))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"equal": "same"}, "dynasor.equal='same' is not known; use one of math, text, symbolic, model, embedding, model:0.7, embedding:0.9"),
        ({"equal": "math:0.9"}, "is not known"),
        ({"equal": "symbolic:0.9"}, "is not known"),
        ({"equal": "model:0"}, "the level '0' is outside"),
        ({"equal": "embedding:2"}, "the level '2' is outside"),
        ({"equal": "embedding:nan"}, "the level 'nan' is outside"),
        ({"equal": "embedding:"}, "the level '' is outside"),
        ({"equal": 1}, "is a int"),
        ({"equal": "symbolic", "answer": "json"}, "such answers are no formulas"),
        ({"equal": "symbolic", "answer": "code:python"}, "such answers are no formulas"),
        ({"equal": "symbolic", "answer": "tool_call:-id"}, "such answers are no formulas"),
        ({"equal": "model", "algorithm": "long_cot"}, "with algorithm 'long_cot' is not supported"),
        ({"equal": "model", "program": "p"}, "before anything is compared"),
    ],
)  # fmt: skip
def test_what_is_refused(field: dict[str, Any], message: str) -> None:
    """Each says what is allowed."""
    with pytest.raises(FieldError) as error:
        parse_field(field, 64)
    assert message in str(error.value)


def test_what_is_not_refused() -> None:
    """The neighbours of what is."""
    assert parse_field({"equal": "embedding:0.8"}, 64).least_score == 0.8
    assert parse_field({"equal": "embedding"}, 64).least_score == 0.9
    assert parse_field({"equal": "model"}, 64).least_score == 0.7
    for field in (
        {"equal": "symbolic", "answer": "json:a"},
        {"equal": "model", "answer": "code"},
        {"equal": "embedding:1"},
    ):
        assert parse_field(field, 64).comparer
    for field in ({"equal": "text", "algorithm": "long_cot"}, {"equal": "math", "program": "p"}, {}):
        assert not parse_field(field, 64).comparer

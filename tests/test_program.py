"""The life of a program: width, cap, votes, decision, record."""

from __future__ import annotations

import json
from math import log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.observe.ledger import IdBook, RecordBook, Totals
from sglang_dynasor.policy import program as program_module
from sglang_dynasor.policy.certaindex import overtake_risk
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import BranchState, Program, StopReason
from sglang_dynasor.policy.spec import FIELD_HELP, parse_field


def program(usual_tokens: Mean | None = None, **field: object) -> Program:
    return Program("p", parse_field({"answer": "hash", **field}, 64), usual_tokens=usual_tokens)


def start_all(p: Program, width: int = 64) -> list[int]:
    """Start what the program wants where the load allows `width`."""
    return [p.start_branch() for _ in range(p.num_to_start(width)[0])]


def start(p: Program, num_branches: int) -> None:
    """More than the program asks for: votes then come in an order of the test's choice."""
    for _ in range(num_branches):
        p.start_branch()


def test_width_and_cap_bound_what_starts() -> None:
    """Never more than the width in flight, never more than the cap in all."""
    p = program(branches=5, width=3, stop="never")
    assert start_all(p) == [0, 1, 2]
    assert p.num_to_start(64) == (0, 0)
    p.finish(1, "#### 1", 10)
    assert start_all(p) == [3]
    p.finish(0, "#### 1", 10)
    p.finish(2, "#### 1", 10)
    assert start_all(p) == [4]
    p.finish(3, "#### 2", 10)
    assert p.reason is None
    p.finish(4, "#### 1", 10)
    assert p.reason is StopReason.CAP
    assert p.record()["answer"] == "1"
    assert p.record()["votes"] == [{"answer": "1", "votes": 4}, {"answer": "2", "votes": 1}]


def test_a_certain_program_stops_and_an_uncertain_one_does_not() -> None:
    """Four of four end a program of sixteen; a split does not."""
    sure, unsure = program(), program()
    for p, answers in ((sure, "1111"), (unsure, "112233")):
        start(p, 6)
        for index, answer in enumerate(answers):
            p.finish(index, f"#### {answer}", 1)
    assert sure.reason is StopReason.CERTAIN
    assert sure.num_to_start(64) == (0, 0)
    assert sure.num_unused == 0
    assert unsure.reason is None
    assert unsure.num_unused == 10
    assert unsure.num_to_start(64) == (10, unsure.votes_needed)


@pytest.mark.parametrize(
    ("field", "load", "expected"),
    [
        ({"stop": "beta"}, 1, (4, 4)),  # 4-0 decides: under any load four together
        ({"stop": "beta"}, 6, (6, 4)),  # more if the load allows
        ({"stop": "beta"}, 64, (16, 4)),  # the cap
        ({"stop": "beta", "width": 3}, 64, (3, 3)),  # the client's own width bounds both
        ({"stop": "beta", "width": 5}, 1, (4, 4)),
        ({"stop": "never"}, 1, (1, 1)),
        ({"stop": "never"}, 7, (7, 7)),  # no number decides: all that the load allows
        ({"stop": "margin", "branches": 2}, 1, (2, 2)),
        ({"stop": "beta", "branches": 2}, 1, (1, 1)),  # the cap comes before the rule
        ({"stop": "beta", "branches": 2}, 64, (2, 2)),
    ],
)
def test_what_starts_where_nothing_is_in_flight(field: dict[str, object], load: int, expected: tuple[int, int]) -> None:
    """Wanted by load, cap and client; at least what could decide together."""
    assert program(**field).num_to_start(load) == expected


@pytest.mark.parametrize(
    ("field", "answers", "expected"),
    [
        ({"stop": "never"}, "", True),
        ({"stop": "never"}, "111", True),
        ({"stop": "predictive:0.02"}, "", False),
        ({"stop": "predictive:0.02"}, "1122", False),
        ({"stop": "window:5"}, "1" * 4, False),
        ({"stop": "window:5", "branches": 5}, "12", True),  # three are left, five in a row are needed
    ],
)
def test_who_needs_its_whole_cap(field: dict[str, object], answers: str, expected: bool) -> None:
    """Where no answers could decide it sooner; never where some could."""
    p = program(**field)
    start(p, len(answers))
    for index, answer in enumerate(answers):
        p.finish(index, f"#### {answer}", 1)
    assert p.needs_all is expected


def test_what_starts_where_some_are_in_flight() -> None:
    """Up to the width, and any number of them makes sense."""
    p = program(stop="beta")
    start(p, 2)
    assert p.num_to_start(1) == (2, 1)
    assert p.num_to_start(6) == (4, 1)
    start(p, 4)
    assert p.num_to_start(6) == (0, 0)
    assert p.num_to_start(5) == (0, 0)  # a smaller load share ends nothing
    p.finish(0, "#### 1", 1)
    assert p.num_to_start(6) == (1, 1)
    start(p, 10)
    assert p.num_to_start(64) == (0, 0)  # none unused


@pytest.mark.parametrize(("width", "expected"), [(1, (1, 1)), (3, (3, 3)), (4, (4, 4)), (9, (9, 4)), (99, (16, 4))])
def test_a_fixed_width_is_kept(width: int, expected: tuple[int, int]) -> None:
    """The operator's width may be fewer than could decide; it is never exceeded, the cap neither."""
    assert program(stop="beta").num_to_start(width, is_fixed=True) == expected
    assert program(stop="beta", width=2).num_to_start(width, is_fixed=True) == (min(width, 2),) * 2


def test_a_decided_program_starts_nothing() -> None:
    """Whatever decided it."""
    p = program(stop="beta")
    start_all(p, 1)
    p.reason = StopReason.DEADLINE
    assert p.num_unused == 0
    assert p.num_to_start(64) == (0, 0)


def test_a_deadline_leaves_the_vote_as_it_is() -> None:
    """Branches that finish after it do not vote, and the record says why it stopped."""
    p = program(stop="never", width=3)
    start_all(p)
    p.finish(0, "#### 1", 1)
    p.reason = StopReason.DEADLINE
    p.finish(1, "#### 2", 1)
    p.end(2, 1)
    record = p.record()
    assert (record["answer"], record["stop_reason"], record["votes"]) == (
        "1",
        "deadline",
        [{"answer": "1", "votes": 1}],
    )


def test_abstentions_cost_tokens_and_do_not_vote() -> None:
    """A branch without an answer is counted, not heard."""
    p = program(branches=3, width=3)
    start_all(p)
    p.finish(0, "nothing", 7)
    p.finish(1, "#### 5", 7)
    p.finish(2, "nothing", 7)
    record = p.record()
    assert (record["answer"], record["num_abstentions"], record["num_tokens"]) == ("5", 2, 21)
    assert p.reason is StopReason.CAP


def test_no_answer_at_all_gives_the_first_text() -> None:
    """All abstain: the first that finished is shown, with no answer claimed."""
    p = program(branches=2, width=2)
    start_all(p)
    p.finish(1, "x", 1)
    p.finish(0, "y", 1)
    assert p.winner == 0
    assert p.record()["answer"] is None
    assert p.record()["certaindex"] == 0.0


def test_a_late_branch_does_not_vote() -> None:
    """Once decided, the vote stands."""
    p = program(branches=8, width=8, stop="beta")
    start(p, 8)
    for index in range(4):
        p.finish(index, "#### 1", 1)
    assert p.reason is StopReason.CERTAIN
    before = p.votes.counts
    p.finish(4, "#### 2", 1)
    p.end(5, 3)
    assert p.votes.counts == before
    assert p.branches[5].state is BranchState.ENDED


def test_a_failure_closes_the_program() -> None:
    """What the engine gave up is not tried again: the program answers with what is in flight, or failed."""
    p = program(branches=8, width=3, stop="never")
    start_all(p)
    p.fail(0, 0, closes=True)
    assert p.num_to_start(64) == (0, 0)
    assert p.num_unused == 0
    p.finish(1, "#### 1", 1)
    assert p.reason is None
    p.finish(2, "#### 1", 1)
    assert p.reason is StopReason.CAP
    failed = program(branches=8, width=2)
    start_all(failed)
    failed.fail(0, 0, closes=True)
    failed.fail(1, 0, closes=True)
    assert failed.reason is StopReason.FAILED
    assert failed.winner is None


def test_a_failure_that_does_not_close_shrinks_the_cap() -> None:
    """A client's own branch may fail and others come."""
    p = program(branches=3, width=3, stop="margin")
    start(p, 3)
    p.fail(0, 0, closes=False)
    p.finish(1, "#### 1", 1)
    assert p.reason is None
    p.finish(2, "#### 1", 1)
    assert p.reason is StopReason.CAP


@pytest.mark.parametrize(("answers", "reason"), [("11", StopReason.CERTAIN), ("12", None)])
def test_a_failure_may_make_the_rest_certain(answers: str, reason: StopReason | None) -> None:
    """Two of four agree: when a third has failed the fourth changes nothing. Not where they are level."""
    p = program(branches=4, stop="margin")
    start(p, 4)
    for index, answer in enumerate(answers):
        p.finish(index, f"#### {answer}", 1)
    assert p.reason is None
    p.fail(2, 0, closes=False)
    assert p.reason is reason


def test_an_answer_that_cannot_be_read_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """If reading an answer raises, the branch abstained, and the last one still ends the program."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("injected")

    p = program(branches=2, width=2)
    start_all(p)
    monkeypatch.setattr("sglang_dynasor.policy.branch.read_answer", broken)
    for index in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            p.finish(index, "#### 1", 1)
    assert p.reason is StopReason.CAP
    assert p.votes.num_abstentions == 2


def test_a_branch_leaves_once() -> None:
    """Finishing twice is our own bug, and says so."""
    p = program(branches=2, width=2)
    start_all(p)
    p.finish(0, "#### 1", 1)
    with pytest.raises(ValueError, match="already finished"):
        p.finish(0, "#### 1", 1)


@given(
    st.lists(st.sampled_from(["#### 1", "#### 2", "#### 3", "none", "FAIL"]), min_size=1, max_size=40),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 16),
)
def test_every_program_ends(outcomes: list[str], cap: int, width: int, load: int) -> None:
    """Whatever the branches say, a program ends within its cap, and its record is JSON whose numbers agree."""
    p = program(branches=cap, width=min(cap, width))
    turn = 0
    while p.reason is None:
        wanted, least = p.num_to_start(load)
        assert 0 <= least <= wanted <= p.num_unused
        assert bool(wanted) == bool(least)
        start_all(p, load)
        index = next(i for i, b in enumerate(p.branches) if b.state is BranchState.IN_FLIGHT)
        outcome = outcomes[turn % len(outcomes)]
        turn += 1
        if outcome == "FAIL":
            p.fail(index, 1, closes=False)
        else:
            p.finish(index, outcome, 1)
        assert turn <= cap
        assert p.num_in_flight <= width
    record = json.loads(json.dumps(p.record()))
    assert sum(v["votes"] for v in record["votes"]) + record["num_abstentions"] + record["num_failed"] == turn
    assert 0.0 <= record["certaindex"] <= 1.0
    assert record["risk"] == pytest.approx(1 - record["certaindex"], abs=1e-6)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"brnches": 3}, "dynasor.brnches is not a key"),
        ({"branches": 0}, r"dynasor.branches=0 is outside \[1, 64\]"),
        ({"branches": 65}, r"--dynasor-max-branches is 64"),
        ({"branches": "8"}, "dynasor.branches='8' is a str"),
        ({"branches": True}, "dynasor.branches=True is a bool"),
        ({"branches": 4, "width": 5}, r"dynasor.width=5 is outside \[1, 4\]"),
        (
            {"algorithm": "magic"},
            "dynasor.algorithm='magic' is not known to the engine; use one of self_consistency, best_of_n, long_cot. Searches run",
        ),
        (
            {"algorithm": "best_of_n", "vote": "majority", "stop": "never"},
            "dynasor.algorithm='best_of_n' without dynasor.judge",
        ),
        ({"exit": "trial"}, "dynasor.exit='trial' is for algorithm 'long_cot'"),
        ({"stop": print}, "dynasor.stop=<built-in function print> is a builtin_function_or_method; send a string"),
        ({"algorithm": 3}, "dynasor.algorithm=3 is a int"),
        ({"stop": "certain"}, "not a rule"),
        ({"answer": "boxd"}, "not an extractor"),
        ({"program": "a b"}, "dynasor.program='a b' is not an id"),
        ({"program": ""}, "dynasor.program='' is not an id"),
        ({"tenant": ""}, "dynasor.tenant='' is not an id; use 1 to 128"),
        ({"tenant": "a,b"}, "dynasor.tenant='a,b' is not an id"),
        ({"tenant": "a" * 129}, "is not an id"),
        ({"tenant": 7}, "dynasor.tenant=7 is a int; send a string"),
        ({"deadline_s": 0}, r"dynasor.deadline_s=0 is outside \(0, 86400\]"),
        ({"deadline_s": -1.5}, r"dynasor.deadline_s=-1.5 is outside"),
        ({"deadline_s": 86401}, r"dynasor.deadline_s=86401 is outside"),
        ({"deadline_s": float("nan")}, r"dynasor.deadline_s=nan is outside"),
        ({"deadline_s": "5"}, "dynasor.deadline_s='5' is a str; send seconds"),
        ({"deadline_s": True}, "dynasor.deadline_s=True is a bool"),
        ({"deadline_s": 5, "program": "p"}, "dynasor.deadline_s=5 with dynasor.program='p'"),
        ({"vote": "weights"}, "dynasor.vote='weights' is not known"),
        ({"vote": "reward"}, "dynasor.vote='reward' without dynasor.judge"),
        ({"stop": "reward"}, "dynasor.stop='reward' without dynasor.judge"),
        ({"judge": "me"}, "dynasor.judge='me' is not known; use one of self, model, steps"),
        ({"judge": {"model": 1}}, "dynasor.judge={'model': 1} is a dict; send a string"),
        ({"judge_good": "a"}, "dynasor.judge_good='a' without dynasor.judge"),
        ({"judge": "self", "judge_suffix": "?", "judge_good": "a"}, "dynasor.judge='self' without dynasor.judge_bad"),
        ({"judge": "self", "judge_suffix": "?", "judge_good": "a", "judge_bad": 1}, "dynasor.judge_bad=1 is a int"),
        ({"judge": "self", "judge_suffix": "?", "judge_good": "a", "judge_bad": "a"}, "'a' is also judge_bad"),
        ({"judge": "model", "judge_suffix": "?" * 1025}, "dynasor.judge_suffix has 1025 characters; at most 1024"),
        ({"judge": "model", "judge_good": "a"}, "dynasor.judge_good='a' with judge 'model'"),
        ({"judge": "steps", "judge_bad": "a"}, "dynasor.judge_bad='a' with judge 'steps'"),
        ({"judge": "model", "program": "p"}, "dynasor.judge with dynasor.program='p'"),
        ({"group_tokens": 0}, r"dynasor.group_tokens=0 is outside \[1, 8192\]"),
        ({"weak_frac": 1}, r"dynasor.weak_frac=1 is outside \[0, 1\)"),
        ({"weak_frac": "0.1"}, "dynasor.weak_frac='0.1' is outside"),
        ({"statistics": 1}, "dynasor.statistics=1 is a int; send true or false"),
        ({"stop": "mixture", "answer": "number"}, "nothing marks where such an answer begins"),
        ({"stop": "margin", "vote": "confidence"}, "dynasor.stop='margin' with vote 'confidence': nothing bounds"),
        ({"stop": "margin or confidence"}, r"with vote 'confidence' \(the default with this stop\): nothing bounds"),
        ({"budget_tokens": 10**400}, "dynasor.budget_tokens=1000"),
        ({"budget_tokens": 2**53 + 1}, f"is above {2**53}"),
        ({"judge": "self", "judge_suffix": "\ud800"}, "has half a surrogate pair"),
        ({"stop": "margin", "algorithm": "best_of_n", "judge": "model"}, "with vote 'best': nothing bounds"),
        (["self_consistency"], "is a list"),
        (None, "is a NoneType"),
        ("beam", "dynasor.algorithm='beam'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: object, message: str) -> None:
    """Each error names the key, the value got and what is allowed."""
    with pytest.raises(FieldError, match=message):
        parse_field(field, 64)


def test_defaults_fit_any_limit() -> None:
    """The smallest useful field works, also where the operator allows little."""
    spec = parse_field("self_consistency", 64)
    assert (spec.branches, spec.width, spec.stop.text, spec.answer) == (16, None, "careful", "auto")
    assert (spec.program, spec.deadline_s, spec.tenant) == (None, None, "")
    assert parse_field({}, 3).branches == 3
    assert parse_field({"width": 2}, 3).width == 2
    assert set(FIELD_HELP) == set(
        "algorithm branches width stop answer deadline_s tenant vote judge judge_suffix judge_good judge_bad group_tokens "
        "weak_frac statistics equal exit agree min_tokens probe_tokens hold_tokens probe_word probe_suffix think_end effort program budget_tokens budget "
        "budget_programs template".split()
    )


@pytest.mark.parametrize(
    ("field", "needs"),
    [
        ({}, False),
        ({"stop": "predictive and beta"}, False),
        ({"judge": "model", "vote": "reward", "stop": "reward"}, False),
        ({"statistics": True}, True),
        ({"vote": "confidence"}, True),
        ({"weak_frac": 0.1}, True),
        ({"stop": "confidence"}, True),
        ({"stop": "beta or mixture"}, True),
    ],
)
def test_who_needs_statistics(field: dict[str, object], needs: bool) -> None:
    """Logits are read only where somebody asked."""
    p = program(**field)
    start(p, 1)
    assert p.spec.needs_statistics is needs
    assert (p.branches[0].confidence is not None) is needs


def confident(p: Program, values: list[float]) -> None:
    """Start branches whose tokens have these confidences."""
    for index, value in enumerate(values):
        assert p.start_branch() == index
        confidence = p.branches[index].confidence
        assert confidence is not None
        confidence.add(value)


def test_votes_may_weigh_by_confidence() -> None:
    """One sure branch outweighs two unsure ones, and who leads by number alone is not certain."""
    answers = {"vote": "confidence", "stop": "predictive:0.5", "branches": 4}
    p = program(**answers)
    confident(p, [9.0, 1.0, 1.0, 1.0])
    for index, text in enumerate(["#### 7", "#### 8", "#### 8", "#### 8"]):
        assert p.reason is None
        p.finish(index, text, 1)
    record = p.record()
    assert record["answer"] == "7"
    assert record["leader_share"] == 0.75
    assert record["confidences"] == [9.0, 1.0, 1.0, 1.0]
    plain = program(**{**answers, "vote": "majority"})
    start(plain, 4)
    for index, text in enumerate(["#### 7", "#### 8", "#### 8", "#### 8"]):
        if plain.reason is None:
            plain.finish(index, text, 1)
    assert plain.record()["answer"] == "8"


def test_votes_may_weigh_by_reward() -> None:
    """The judge decides; a branch without a reward weighs nothing, and without any the number counts."""
    judged = {"judge": "model", "vote": "reward", "stop": "never", "branches": 3}
    p = program(**judged)
    start(p, 3)
    p.finish(0, "#### 1", 1, 0.9)
    p.finish(1, "#### 2", 1, 0.3)
    p.finish(2, "#### 2", 1, None)
    assert p.record()["answer"] == "1"
    assert p.record()["rewards"] == [0.9, 0.3, None]
    unjudged = program(**judged)
    start(unjudged, 3)
    for index, text in enumerate(["#### 1", "#### 2", "#### 2"]):
        unjudged.finish(index, text, 1, None)
    assert unjudged.record()["answer"] == "2"


@pytest.mark.parametrize(
    ("reward", "votes_until", "answer"), [(0.1, 5, "2"), (1.0, 3, "1")], ids=["few are worth little", "full rewards"]
)
def test_margin_is_lossless_by_weight(reward: float, votes_until: int, answer: str) -> None:
    """Three of five agree, and two may come that weigh 0.9 each: the answer is that of the whole vote, early only where it stands."""
    field = {"judge": "model", "vote": "reward", "branches": 5}
    made, whole = program(stop="margin", **field), program(stop="never", **field)
    for p in (made, whole):
        start(p, 5)
        for index, said in enumerate(["1", "1", "1", "2", "2"]):
            if p.reason is None:
                p.finish(index, f"#### {said}", 1, reward if said == "1" else 0.9)
    assert len(made.votes.recent) == votes_until
    assert made.reason is (StopReason.CAP if votes_until == 5 else StopReason.CERTAIN)
    assert made.record()["answer"] == whole.record()["answer"] == answer


@given(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "3", None]), st.one_of(st.none(), st.floats(0, 1))),
        min_size=2,
        max_size=12,
    )
)
def test_margin_never_changes_a_weighed_answer(votes: list[tuple[str | None, float | None]]) -> None:
    """Whatever is rewarded how."""
    found = []
    for rule in ("margin", "never"):
        p = program(judge="model", vote="reward", branches=len(votes), stop=rule)
        start(p, len(votes))
        for index, (answer, reward) in enumerate(votes):
            if p.reason is None:
                p.count(index, answer, 1, reward)
        found.append(p.record()["answer"])
    assert found[0] == found[1]


def test_the_mean_reward_stops() -> None:
    """At the level and not below."""
    for rewards, reason in (([0.9, 0.8], StopReason.CERTAIN), ([0.9, 0.6], None)):
        p = program(judge="model", stop="reward and predictive:0.5", branches=8)
        start(p, 4)
        for index in range(3):
            p.finish(index, "#### 1", 1, rewards[index % 2])
        assert p.reason is reason


def test_confidence_stops_after_its_warmup() -> None:
    """Four of four at cap 16; not three, not with a heavy vote against."""
    for values, answers, num, reason in (
        ([5.0] * 4, "1111", 4, StopReason.CERTAIN),
        ([5.0] * 4, "1111", 3, None),
        ([5.0, 5.0, 5.0, 9.0], "1112", 4, None),
        ([50.0, 50.0, 50.0, 1.0], "1112", 4, StopReason.CERTAIN),  # the vote against weighs nothing
    ):
        p = program(stop="confidence")
        assert p.spec.vote == "confidence"
        confident(p, values)
        for index in range(num):
            p.finish(index, f"#### {answers[index]}", 1)
        assert p.reason is reason


def test_a_weak_branch_abstains() -> None:
    """It uses its place in the cap, casts no vote, and the level comes from the first to finish."""
    p = program(stop="never", weak_frac=0.5, branches=5, group_tokens=1)
    confident(p, [1.0, 2.0, 3.0, 0.5, 9.0])
    assert p.weak_level is None
    for index in range(3):
        p.finish(index, "#### 1", 1)
    assert p.weak_level == 2.0
    p.weaken(3, 7)
    assert (p.branches[3].state, p.votes.num_abstentions, p.reason) == (BranchState.WEAK, 1, None)
    p.finish(4, "#### 1", 1)
    assert p.weak_level == 2.0
    assert p.reason is StopReason.CAP
    assert p.record()["num_weak"] == 1
    assert p.record()["branch_tokens"] == [1, 1, 1, 7, 1]


def test_a_weak_branch_may_make_the_rest_certain() -> None:
    """What it can no longer vote for cannot overtake the leader."""
    p = program(stop="margin", weak_frac=0.5, branches=6, group_tokens=1)
    confident(p, [5.0] * 6)
    for index in range(3):
        p.finish(index, "#### 1", 1)
    assert p.reason is None
    p.weaken(3, 1)
    assert p.reason is StopReason.CERTAIN


def test_the_last_branch_may_be_weak() -> None:
    """Then the cap is used up; a program all of whose branches are weak has no answer but an end."""
    p = program(stop="never", weak_frac=0.5, branches=1)
    confident(p, [1.0])
    p.weaken(0, 1)
    assert p.reason is StopReason.CAP
    assert p.winner is None


def test_branches_at_their_answer_count_before_they_finish() -> None:
    """Three that would say the same stop a program, as soon as one of them has said it; not two, nor three that differ."""
    for tokens, finished, reason in (
        ([1, 1, 1], True, StopReason.CERTAIN),
        ([1, 1, 1], False, None),
        ([1, 1], True, None),
        ([1, 1, 2], True, None),
    ):
        p = program(stop="mixture")
        start(p, 4)
        if finished:
            p.finish(0, "#### 1", 1)
        for index, token in enumerate(tokens):
            p.answers.see((), {token: 0.0})
            p.end_answer(index, ())
        assert p.reason is reason


def test_disagreement_and_doubt_are_rules_too() -> None:
    """Three that doubt alike disagree in nothing; a level below their doubt does not stop, nor one below what they disagree by."""
    coin = {1: log(0.5), 2: log(0.5)}
    for stop, distributions, reason in (
        ("disagreement:0.1", [coin] * 3, StopReason.CERTAIN),
        ("answer_entropy:0.5", [coin] * 3, None),
        ("answer_entropy:0.7", [coin] * 3, StopReason.CERTAIN),
        ("disagreement:0.5", [{1: 0.0}, {1: 0.0}, {2: 0.0}], None),
        ("disagreement:0.7", [{1: 0.0}, {1: 0.0}, {2: 0.0}], StopReason.CERTAIN),
        ("margin and disagreement:0.7", [{1: 0.0}, {1: 0.0}, {2: 0.0}], None),
    ):
        p = program(stop=stop)
        start(p, 4)
        p.finish(0, "#### 1", 1)
        for index, distribution in enumerate(distributions):
            p.answers.see((), distribution)
            p.end_answer(index, ())
        assert p.reason is reason


def test_the_rule_waits_for_what_the_device_tells() -> None:
    """What the host would say of cut distributions is too low, and would stop it; the device's word alone does, or does not."""
    for told, reason in ((1.3, None), (1.15, StopReason.CERTAIN)):
        p = program(stop="disagreement:0.2")
        start(p, 4)
        p.finish(0, "#### 1", 1)
        for index in range(3):
            p.answers.see((), {1: log(0.6), 2 + index: log(0.05)}, 1.0)
            if not index:
                p.answers.mix_on_device(())
            p.end_answer(index, ())
        assert p.reason is None
        p.mix_answers((), 2, 1.05)  # two branches are too few
        assert p.reason is None
        p.mix_answers((), 3, told)
        assert p.reason is reason
        if reason is None:
            p.answers.mix_on_host(())
            assert p.answers.mixture.disagreement < 0.2
            p.end_answer(3, (9,))
            assert p.reason is StopReason.CERTAIN  # it was the device that kept it from that


def test_what_is_told_after_the_decision_is_in_the_record() -> None:
    """If it is not written yet; what is not told then the host has mixed."""
    for is_told, disagreement in ((True, 0.5), (False, log(2))):
        p = program(stop="mixture", statistics=True)
        start(p, 2)
        for index in range(2):
            p.answers.see((), {index: 0.0}, 0.3)
            p.answers.mix_on_device(())
            p.end_answer(index, ())
        p.reason = StopReason.DEADLINE
        if is_told:
            p.mix_answers((), 2, 0.8)
        record = p.record()
        assert record["disagreement"] == pytest.approx(disagreement, abs=1e-6)
        assert record["num_answer_tokens"] == 2


def test_who_is_mixed_must_include_the_leader() -> None:
    """Three branches that agree at their answer say nothing of a vote that none of them cast."""
    p = program(stop="mixture")
    start(p, 4)
    p.finish(3, "#### 9", 1)
    for index in range(3):
        p.answers.see((), {1: 0.0})
        p.end_answer(index, ())
    assert p.reason is None
    p.answers.see((), {1: 0.0})
    assert p.reason is None  # it may go on
    p.end_answer(3, ())
    assert p.reason is StopReason.CERTAIN


def test_a_program_that_is_over_keeps_no_tokens() -> None:
    """Thousands of client-sent programs are remembered: their scores, not their tokens."""
    p = program(statistics=True, stop="never", branches=2, group_tokens=2)
    confident(p, [4.0, 6.0])
    p.finish(0, "#### 1", 1)
    p.finish(1, "#### 1", 1)
    confidences = [branch.confidence for branch in p.branches]
    assert [c and c.lowest for c in confidences] == [4.0, 6.0]
    assert not any(c and c._recent for c in confidences)


def test_deadline_and_tenant_are_taken() -> None:
    """The widest values allowed."""
    spec = parse_field({"deadline_s": 86400, "tenant": "A.b_c:d-9"}, 64)
    assert (spec.deadline_s, spec.tenant) == (86400.0, "A.b_c:d-9")
    assert parse_field({"deadline_s": 0.001}, 64).deadline_s == 0.001


def test_the_record_book_forgets_the_oldest() -> None:
    """Bounded memory: the newest records are kept, a re-kept one counts as new."""
    book = RecordBook(size=2)
    book.keep("a", {"n": 1})
    book.keep("b", {"n": 2})
    book.keep("a", {"n": 3})
    book.keep("c", {"n": 4})
    assert book.find("b") is None
    assert book.find("a") == {"n": 3}
    assert len(book) == 2


def test_totals_add_up() -> None:
    """What was used and what was not add up to the caps."""
    totals = Totals()
    p = program(branches=16, width=8)
    start(p, 8)
    for index in range(4):
        p.finish(index, "#### 1", 10)
    p.finish(4, "#### 1", 20)
    p.end(5, 0)
    p.end(6, 4)
    p.end(7, 0)
    totals.add(p.record())
    assert totals.as_dict()["num_branches"] == 8
    assert totals.num_branches_saved == 8
    assert totals.num_tokens == 64
    assert totals.num_certain == 1
    totals.add({**p.record(), "stop_reason": "deadline"})  # there was no time for the others: nothing was saved
    assert (totals.num_programs, totals.num_branches, totals.num_branches_saved) == (2, 16, 8)


JUDGED = {"judge": "self", "judge_suffix": "?", "judge_good": "y", "judge_bad": "n"}


@pytest.mark.parametrize(("rewards", "reason"), [((0.2, 0.96), StopReason.CERTAIN), ((0.2, 0.94), None), ((), None)])
def test_best_of_n_stops_at_one_good_branch(rewards: tuple[float, ...], reason: StopReason | None) -> None:
    """At its level and not below, nor without a reward; the best branch answers, whatever the others agree on."""
    program = Program("p", parse_field({"algorithm": "best_of_n", "branches": 8, "answer": "hash", **JUDGED}, 64))
    for _ in range(4):
        program.start_branch()
    for index, reward in enumerate(rewards):
        program.finish(index, f"#### {index}", 5, reward)
    assert program.reason is reason
    if rewards:
        assert program.winner == 1


def judged(*rewards: float | None, texts: str = "#### 1", **field: Any) -> Program:
    """A program of best-of-N whose branches finished with these rewards."""
    options = {"algorithm": "best_of_n", "judge": "model", "branches": 8, "stop": "never", "answer": "hash", **field}
    p = Program("p", parse_field(options, 64))
    for i, reward in enumerate(rewards):
        p.finish(p.start_branch(), texts.replace("1", str(i)), 5, reward)
    return p


def test_best_of_n_is_as_sure_as_its_best_branch() -> None:
    """Its certaindex is the best reward, whatever the votes say; other algorithms' is 1 - risk, rewards or not."""
    assert judged(0.2, 0.99, 0.4).record()["certaindex"] == 0.99
    assert judged().record()["certaindex"] == 0
    assert judged(None, None).certaindex == 0
    voting = judged(0.2, 0.99, 0.4, algorithm="self_consistency")
    assert voting.certaindex == voting.record()["certaindex"] == 1 - voting.record()["risk"]


def test_the_best_branch_speaks_also_where_nothing_can_be_read() -> None:
    """Open text has no answer to vote for: of all finished branches the highest reward decides, of equals the first."""
    assert judged(0.1, 0.99, 0.2, texts="prose").winner == 1
    assert judged(0.5, None, 0.5, texts="prose").winner == 0
    assert judged(0.1, 0.99, texts="prose", algorithm="self_consistency", vote="majority").winner == 0
    assert judged(texts="prose").winner is None


class Held:
    """What SGLang holds of a request."""


UNDER_WAY = Held()


def test_tenants_keep_programs_apart() -> None:
    """The same field again is welcome; another tenant's, or one with other settings, is not; old ones are forgotten."""
    ids, records = IdBook(lambda rid: UNDER_WAY, size=4), RecordBook()

    def send(rid: str, **field: Any) -> None:
        ids.claim(rid, parse_field({"program": "p", "branches": 4, **field}, 64), records)

    send("1")
    send("2")
    with pytest.raises(FieldError, match=r"dynasor\.program='p' is another tenant's"):
        send("3", tenant="b")
    with pytest.raises(FieldError, match=r"dynasor\.program='p' was declared with other settings"):
        send("4", branches=5)
    send("3", program="q", tenant="b")  # neither the id nor the rid of what was refused is taken
    send("4", program="r", tenant="b")
    send("5", tenant="b")  # by now nobody's


@pytest.mark.parametrize(
    ("rid", "field", "wrong"),
    [
        ("mine", {}, None),  # a rerun
        ("mine", {"branches": 2}, None),  # with other settings
        ("mine", {"tenant": "other"}, "rid='mine' is another tenant's"),
        ("mine", {"tenant": ""}, "rid='mine' is another tenant's"),
        ("new", {"program": "mine"}, None),  # its own branches, under the id of a request of its own
        ("new", {"program": "mine", "tenant": "other"}, "program='mine' is another tenant's"),
        ("new", {"tenant": "other"}, None),
        ("done", {}, None),
        ("done", {"tenant": "other"}, "rid='done' is another tenant's"),
        ("nobody's", {"tenant": ""}, None),
        ("nobody's", {}, "rid=\"nobody's\" is another tenant's"),
    ],
)
def test_a_record_is_overwritten_by_its_own_tenant_only(rid: str, field: dict[str, Any], wrong: str | None) -> None:
    """Whether it is in flight under its rid, or has been answered."""
    ids, records = IdBook(lambda rid: UNDER_WAY), RecordBook()
    records.keep("done", {"program": "done", "tenant": "me"})
    records.keep("nobody's", {"program": "nobody's"})
    ids.claim("mine", parse_field({"tenant": "me"}, 64), records)
    asked = {key: value for key, value in ({"tenant": "me"} | field).items() if value}
    if wrong is None:
        ids.claim(rid, parse_field(asked, 64), records)
    else:
        with pytest.raises(FieldError, match=wrong):
            ids.claim(rid, parse_field(asked, 64), records)


@pytest.mark.parametrize(
    ("field", "level", "rule", "at"),
    [
        ({}, "careful", "careful", 0.05),
        ({}, "fast", "fast", 0.2),
        ({"stop": "balanced"}, "fast", "balanced", 0.1),  # the client said how
        ({"stop": "predictive"}, "fast", "predictive", 0.05),
        ({"algorithm": "best_of_n", "judge": "model"}, "fast", "best", 0.95),  # no rule with such levels
    ],
)
def test_the_operator_s_level_is_for_who_does_not_say(field: dict[str, Any], level: str, rule: str, at: float) -> None:
    """As the record tells it."""
    stop = parse_field(field, 64, level).stop
    assert stop.text == rule
    assert [found for _, found in stop.parts] == [at]


def test_votes_count_for_less_while_branches_are_in_flight() -> None:
    """Three of sixteen agree: enough one by one, not with the others in flight; the fourth is."""
    one_by_one, wide = program(), program()
    for _ in range(16):
        wide.start_branch()
    for index in range(3):
        one_by_one.finish(one_by_one.start_branch(), "#### 4", 10)
        wide.finish(index, "#### 4", 10)
    assert one_by_one.reason is StopReason.CERTAIN
    assert one_by_one.risk == pytest.approx(0.020563, abs=1e-6)
    assert wide.reason is None
    assert wide.risk > 0.05
    wide.finish(3, "#### 4", 10)
    assert wide.reason is StopReason.CERTAIN


def test_the_record_tells_the_risk_that_ended_it() -> None:
    """Not what it would be once the branches in flight have been ended."""
    p = program()
    for _ in range(16):
        p.start_branch()
    for index in range(4):
        p.finish(index, "#### 4", 10)
    risk = p.risk
    for index in range(4, 16):
        p.end(index, 3)
    assert p.risk == risk == pytest.approx(overtake_risk((4,), 0, 12, 0.5))
    assert p.record()["risk"] == round(risk, 6)


def test_long_branches_are_worth_less_risk() -> None:
    """2-0 of sixteen has a risk of 0.06. Of branches longer than the server's it is enough, of short ones 3-0 still is."""

    def ends_after(num_tokens: int) -> int:
        p = program(usual_tokens=Mean(100.0))
        while p.reason is None:
            p.finish(p.start_branch(), "#### 4", num_tokens)
        return len(p.branches)

    assert [ends_after(num_tokens) for num_tokens in (1000, 200, 100, 50, 1)] == [2, 2, 3, 3, 3]


def test_a_closed_program_keeps_what_it_was_ended_by() -> None:
    """Where the engine gave a branch up, those in flight are all that may still come."""
    p = program(stop="margin")
    for _ in range(8):
        p.start_branch()
    p.fail(7, 1, closes=True)
    for index in range(4):
        p.finish(index, "#### 4", 10)
    assert p.reason is StopReason.CERTAIN
    for index in range(4, 7):
        p.end(index, 3)
    assert p.evidence.num_left == 3


def test_votes_needed_are_counted_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again of the same votes nothing is computed; a new vote is seen."""
    p = Program("p", parse_field({"stop": "beta", "answer": "hash"}, 64))
    assert p.votes_needed == 4
    monkeypatch.setattr(program_module, "votes_needed", lambda *args: pytest.fail("counted again"))
    assert p.votes_needed == 4
    monkeypatch.undo()
    p.finish(p.start_branch(), "#### 1", 5)
    assert p.votes_needed == 3


@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 3)), min_size=1, max_size=8),
    st.sampled_from(["best", "reward", "majority"]),
)
def test_whoever_may_yet_speak_is_among_the_speakers(branches: list[tuple[str, int]], vote: str) -> None:
    """Who is not, when another branch finishes, never becomes the winner: its text may be dropped. Also where rewards are equal."""
    program = Program(
        "p", parse_field({"branches": 8, "stop": "never", "answer": "last_line", "vote": vote, "judge": "model"}, 64)
    )
    for _ in branches:
        program.start_branch()
    dropped: set[int] = set()
    for index, (answer, reward) in enumerate(branches):
        program.finish(index, answer, 5, reward / 3)
        dropped |= set(range(index + 1)) - program.speakers
        assert program.winner not in dropped

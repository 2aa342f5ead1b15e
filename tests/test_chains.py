"""Several thoughts of one program: when what they say together ends it, and who speaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.chains import ASKED_FRAC, says
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.rules import parse_stop
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.standing import Standing
from sglang_dynasor.policy.thought import Trial

FIELD = {"algorithm": "long_cot", "answer": "hash", "stop": "trials:0.8"}


def chains(num: int, started: int | None = None, **field: Any) -> Program:
    program = Program("p", parse_field({**FIELD, "branches": num, **field}, 64))
    for _ in range(num if started is None else started):
        program.start_branch()
    return program


def trial(key: str | None, num_tokens: int, probability: float = 0.9) -> Trial:
    return Trial(key, key, probability, num_tokens)


def wave(program: Program, num_tokens: int, *answers: str | None) -> list[int | None]:
    """Every chain is asked at one length; what each trial has closed."""
    return [program.see_trial(i, trial(key, num_tokens)) for i, key in enumerate(answers)]


def is_over(program: Program) -> bool:
    return program.speaker is not None or program.reason is not None


def test_an_answer_that_is_held_decides() -> None:
    """Eight of ten say the same, and again 512 tokens later; the program was certain, and one of them speaks."""
    program = chains(10)
    answers = ["7"] * 8 + ["8", None]
    assert wave(program, 600, *answers) == [None] * 10
    assert not is_over(program)
    closing = wave(program, 1112, *answers)
    assert program.speaker is not None
    assert [index for index in closing if index is not None] == [program.speaker]
    assert program.branches[program.speaker].closed_at == 1112
    for index in range(10):
        if index != program.speaker:
            program.end(index, 1120)
    program.finish(program.speaker, "#### 7", 1150)
    assert program.reason is StopReason.CERTAIN
    assert program.winner == program.speaker
    assert program.certaindex == program.record()["certaindex"] == 0.8


def test_not_before_the_time_is_over() -> None:
    """511 tokens are too few."""
    program = chains(10)
    wave(program, 600, *["7"] * 10)
    wave(program, 1111, *["7"] * 10)
    assert not is_over(program)


def test_not_below_the_share() -> None:
    """Seven of ten, however long they say so."""
    program = chains(10)
    for num_tokens in range(600, 6000, 600):
        wave(program, num_tokens, *["7"] * 7, "8", "8", None)
    assert not is_over(program)


def test_one_early_confident_chain_never_decides() -> None:
    """It has one unit of ten, however sure it is and however often it says so."""
    program = chains(10)
    for num_tokens in range(20, 20_000, 500):
        assert program.see_trial(0, trial("7", num_tokens, 1.0)) is None
    assert not is_over(program)


@pytest.mark.parametrize("started", [1, 4, 7])
def test_nor_do_few_that_have_started(started: int) -> None:
    """Of ten allowed: all that run agree, but how many run is the load's doing."""
    program = chains(10, started)
    for num_tokens in range(600, 6000, 600):
        wave(program, num_tokens, *["7"] * started)
    assert not is_over(program)
    assert program.evidence.standing == Standing("7", (started,), 10)
    while len(program.branches) < 8:
        program.start_branch()
    for num_tokens in (6000, 6600):
        wave(program, num_tokens, *["7"] * 8)
    assert program.speaker is not None


def test_ten_early_ones_that_disagree_never_do() -> None:
    """Sure as they are."""
    program = chains(10)
    for num_tokens in range(20, 20_000, 500):
        for index in range(10):
            program.see_trial(index, trial(str(index), num_tokens, 1.0))
    assert not is_over(program)


def test_another_leader_starts_the_time_again() -> None:
    """What counts is how long the answer has been held that leads now."""
    program = chains(10)
    wave(program, 600, *["7"] * 10)
    wave(program, 900, *["8"] * 10)
    wave(program, 1300, *["8"] * 10)
    assert not is_over(program)  # 7 would have been held for 700 tokens, 8 has been for 400
    wave(program, 1412, *["8"] * 10)
    assert program.speaker is not None
    assert program.evidence.standing.leader == "8"


def test_a_share_that_is_lost_starts_it_again() -> None:
    """Also with the same leader."""
    program = chains(10)
    wave(program, 600, *["7"] * 8, "8", "8")
    wave(program, 900, *["7"] * 7, "8", "8", "8")
    wave(program, 1200, *["7"] * 8, "8", "8")
    wave(program, 1500, *["7"] * 8, "8", "8")
    assert not is_over(program)
    wave(program, 1712, *["7"] * 8, "8", "8")
    assert program.speaker is not None


@pytest.mark.parametrize(
    "silent", [trial(None, 2000), trial("7", 2000, 0.49)], ids=["an abstention, as of one that says wait", "in doubt"]
)
def test_a_trial_without_an_answer_gives_its_unit_to_nobody(silent: Trial) -> None:
    """It counts as a chain all the same: seven of ten are not enough, though all that answer agree."""
    program = chains(10)
    for num_tokens in (600, 1200, 1800):
        wave(program, num_tokens, *["7"] * 7)
        for index in (7, 8, 9):
            program.see_trial(index, Trial(silent.answer, silent.key, silent.probability, num_tokens))
    assert program.evidence.standing.num_silent == 3
    assert not is_over(program)


def test_too_few_asked_decide_nothing() -> None:
    """With a share of 0.6, six of ten would do; but eight must have been asked."""
    program = chains(10, stop="trials:0.6")
    for num_tokens in (600, 1200, 1800):
        wave(program, num_tokens, *["7"] * 7)
    assert not is_over(program)
    wave(program, 2400, *["7"] * 7, "8")
    wave(program, 3000, *["7"] * 7, "8")
    assert program.speaker is not None
    assert ASKED_FRAC == 0.8


def test_half_of_them_must_have_been_asked_again() -> None:
    """One chain that goes on confirming itself does not speak for what the others said before."""
    program = chains(10)
    wave(program, 600, *["7"] * 10)
    for index in range(4):
        program.see_trial(index, trial("7", 1200))
    assert not is_over(program)
    program.see_trial(4, trial("7", 1200))
    assert program.speaker is not None


def test_finished_chains_count_as_they_answered() -> None:
    """And where one has given the answer that leads, it is the program's: nobody need speak."""
    program = chains(10)
    program.finish(3, "#### 7", 400)
    answers = ["7", "7", "7", "", "7", "7", "7", "7", "8", "8"]
    for num_tokens in (600, 1200):
        for index, key in enumerate(answers):
            if index != 3:
                program.see_trial(index, trial(key, num_tokens))
    assert program.reason is StopReason.CERTAIN
    assert program.speaker is None
    assert program.winner == 3


def test_a_finished_chain_with_the_answer_that_leads_speaks() -> None:
    """Also where the finished ones are at odds, or most of them said something else: what all chains hold counts."""
    for finished in ({0: "7", 1: "8"}, {0: "8", 5: "7"}, {0: "8", 1: "8", 2: "7"}):
        program = chains(len(finished) * 10)
        for index, answer in finished.items():
            program.finish(index, f"#### {answer}", 400)
        for num_tokens in (600, 1200):
            for index in set(range(len(program.branches))) - finished.keys():
                assert program.see_trial(index, trial("7", num_tokens)) is None
        assert (program.reason, program.speaker) == (StopReason.CERTAIN, None)
        record = program.record()
        assert record["answer"] == "7"
        assert record["branch"] == next(index for index, answer in finished.items() if answer == "7")
        assert record["certaindex"] == pytest.approx(1 - (len(finished) - 1) / len(program.branches))


@pytest.mark.parametrize(
    ("text", "is_cut", "answer"), [("well, as I said", True, "7"), ("#### ", True, "7"), ("#### 7.0", False, "7.0")]
)
def test_a_speaker_that_is_cut_gives_what_it_was_chosen_for(text: str, is_cut: bool, answer: str) -> None:
    """Two have finished with other answers, eight hold 7: it is 7, whether or not there was room to write it."""
    program = chains(10)
    program.finish(0, "#### 8", 400)
    program.finish(1, "#### 9", 400)
    for num_tokens in (600, 1200):
        for index in range(2, 10):
            program.see_trial(index, trial("7", num_tokens))
    assert program.speaker is not None
    assert program.certaindex == 0.8  # while it writes
    program.finish(program.speaker, text, 1210, ending=Ending(is_cut))
    record = program.record()
    assert (record["answer"], record["branch"], record["stop_reason"]) == (answer, program.speaker, "certain")
    assert record["certaindex"] == 0.8
    assert [(vote["answer"], vote["votes"]) for vote in record["votes"]] == [("8", 1), ("9", 1), (answer, 1)]
    assert record["num_abstentions"] == 0


def test_a_speaker_that_says_something_else_is_as_sure_as_the_vote() -> None:
    """What it wrote is what is answered; the chains were not sure of that."""
    program = chains(10)
    for num_tokens in (600, 1200):
        wave(program, num_tokens, *["7"] * 10)
    assert program.speaker is not None
    program.finish(program.speaker, "#### 8", 1300)
    assert program.record()["answer"] == "8"
    assert program.certaindex == 1 - program.risk < 1


@pytest.mark.parametrize("how", ["lost", "ended", "late"])
def test_without_a_speaker_the_vote_answers(how: str) -> None:
    """The engine gave it up, or nobody waits for it: then the finished ones answer, and are no surer than they are. Not where time
    was up while it wrote."""
    program = chains(10)
    program.finish(0, "#### 8", 400)
    for num_tokens in (600, 1200):
        for index in range(1, 10):
            program.see_trial(index, trial("7", num_tokens))
    assert program.speaker is not None
    for index in range(1, 10):
        if index != program.speaker:
            program.end(index, 1200)
    if how == "lost":
        program.fail(program.speaker, 1210, closes=True)
    else:
        program.reason = StopReason.DEADLINE
        if how == "ended":
            program.end(program.speaker, 1210)
        else:
            program.finish(program.speaker, "cut", 1210, ending=Ending(is_cut=True))
    assert program.winner == (program.speaker if how == "late" else 0)
    assert program.record()["answer"] == ("7" if how == "late" else "8")
    assert program.certaindex == (0.9 if how == "late" else 1 - program.risk)
    assert program.votes.counts == (1,)


def test_a_single_thought_that_is_cut_has_no_answer() -> None:
    """Nobody has decided with it: its text has none."""
    program = Program("p", parse_field({"algorithm": "long_cot", "answer": "hash", "agree": 1}, 64))
    program.start_branch()
    assert program.see_trial(0, trial("7", 600, 0.999)) == 0
    program.finish(0, "well", 610, ending=Ending(is_cut=True))
    assert (program.record()["answer"], program.winner) == (None, 0)


@pytest.mark.parametrize(("num_running", "share"), [(8, 0.9), (0, None)])
def test_how_sure_chains_are(num_running: int, share: float | None) -> None:
    """Their leader's share where trials decided, also where a finished one answers; 1 - risk where the vote did."""
    program = chains(10, stop="careful or trials:0.8")
    program.finish(9, "#### 7", 400)
    for num_tokens in (600, 1200):
        for index in range(num_running):
            program.see_trial(index, trial("7", num_tokens))
    for index in range(num_running, 9):
        if program.reason is None:
            program.finish(index, "#### 7", 1300)
    assert program.reason is StopReason.CERTAIN
    assert program.certaindex == (1 - program.risk if share is None else share)


def test_a_finished_chain_may_bring_the_decision() -> None:
    """The time may be over when it ends."""
    program = chains(10)
    wave(program, 600, *["7"] * 10)
    for index in range(5):
        program.see_trial(index, trial("7", 1100))
    program.finish(5, "#### 7", 1150)
    assert program.reason is StopReason.CERTAIN
    assert program.winner == 5


def test_one_that_finished_with_another_answer_does_not_speak() -> None:
    """The others have decided when it ends; the next trial says who does."""
    program = chains(10)
    wave(program, 600, *["7"] * 10)
    for index in range(5):
        program.see_trial(index, trial("7", 1100))
    program.finish(5, "#### 8", 1150)
    assert not is_over(program)
    assert program.evidence.is_contested
    closing = program.see_trial(6, trial("7", 1160))
    assert program.speaker == closing == 6


def test_the_vote_of_the_finished_waits_for_running_chains_that_say_another() -> None:
    """Three finished ones agree, which is enough by themselves; but as many running ones say something else."""
    field = {"stop": "predictive:0.2 or trials:0.8"}
    alone = chains(10, **field)
    contested = chains(10, **field)
    for index in range(3, 7):
        contested.see_trial(index, trial("8", 500))
    for program in (alone, contested):
        for index in range(3):
            if not is_over(program):
                program.finish(index, "#### 7", 700)
    assert alone.reason is StopReason.CERTAIN
    assert contested.reason is None
    for index in range(3, 7):
        contested.see_trial(index, trial("7", 800))
    assert contested.reason is StopReason.CERTAIN  # they have come round


def test_as_chains_finish_it_is_the_vote_of_the_finished() -> None:
    """Nobody was asked: the default says what the rule for votes says, step by step."""
    ours = chains(16, stop="careful or trials:0.8")
    votes = Program("v", parse_field({"branches": 16, "answer": "hash", "stop": "careful"}, 64))
    for _ in range(16):
        votes.start_branch()
    for index, answer in enumerate([7, 8, 7, 7, 8, 7, 7, 7, 7, 7, 7, 7]):
        for program in (ours, votes):
            program.finish(index, f"#### {answer}", 100)
        assert ours.reason == votes.reason
        if ours.reason is not None:
            break
    assert ours.reason is StopReason.CERTAIN


def test_the_one_that_had_thought_most_speaks() -> None:
    """Of those that give the leader; of equals the earliest. It is closed where it was asked."""
    program = chains(5)
    for shift in (0, 600):
        for index, (key, num_tokens) in enumerate([("7", 700), ("8", 990), ("7", 900), ("7", 900), ("7", 600)]):
            program.see_trial(index, trial(key, num_tokens + shift))
            if is_over(program):
                break
    assert program.speaker == 2
    assert program.branches[2].closed_at == 1500
    assert [branch.closed_at for branch in program.branches if branch.closed_at] == [1500]


def test_one_that_writes_its_answer_already_speaks() -> None:
    """Its thought was closed because it had settled by itself: nobody else is closed for it."""
    program = chains(5, agree=1, exit="trial:0.95")
    assert program.see_trial(0, trial("7", 600, 0.99)) == 0  # settled
    for num_tokens in (600, 1200):
        assert [program.see_trial(i, trial("7", num_tokens)) for i in range(1, 5)] == [None] * 4
    assert program.speaker == 0


def test_time_is_that_of_the_chains() -> None:
    """Chains that are asked in turn pass the time together, not each for itself; one that began late counts from then."""
    program = chains(10)
    for turn in range(5):  # each 100 tokens apart, 10 tokens after the one before
        for index in range(10):
            program.see_trial(index, trial("7", 100 * turn + 10 * index + 1))
    assert program.chains is not None
    assert 400 <= program.chains.clock <= 490
    assert not is_over(program)
    late = chains(3, 2)
    wave(late, 600, "7", "7")
    wave(late, 900, "7", "7")
    late.start_branch()
    late.see_trial(2, trial("7", 100))
    assert late.chains is not None
    assert late.chains.clock == 300


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["7", "8", None]), st.integers(0, 300)), max_size=60),
    st.sampled_from([0.6, 0.8, 1.0]),
)
def test_it_never_decides_what_was_not_held(asked: list[tuple[int, str | None, int]], share: float) -> None:
    """Whatever is said: at a decision the leader has its share, and had it through the last 512 tokens of every chain."""
    program = chains(4, stop=f"trials:{share}")
    lengths, now = [0] * 4, 0
    seen: list[tuple[int, str | None, float]] = []
    for index, key, later in asked:
        now += later
        lengths[index] = now
        program.see_trial(index, trial(key, now))
        said = [says(branch) for branch in program.branches]
        counts = {key: said.count(key) / 4 for key in said if key is not None}
        leader = max(counts, key=counts.__getitem__, default=None)
        seen.append((now, leader, counts.get(leader, 0.0) if leader is not None else 0.0))
        if program.speaker is not None:
            held = [entry for entry in seen if entry[0] > now - 512]
            before = [entry for entry in seen if entry[0] <= now - 512][-1:]
            assert before
            assert all(who == leader and frac >= share for _, who, frac in (*before, *held))
            assert says(program.branches[program.speaker]) == leader
            return


@pytest.mark.parametrize(("equal", "is_same"), [("math", True), ("text", False)])
def test_answers_are_equal_as_the_field_says(equal: str, is_same: bool) -> None:
    """Writings of one value are one answer, or not; trials are counted like votes."""
    program = chains(4, equal=equal, answer="boxed")
    program.finish(0, "\\boxed{1/2}", 300)
    for num_tokens in (600, 1200):
        for index, answer in ((1, "\\frac{1}{2}"), (2, "0.5"), (3, "\\frac12")):
            key = answer_key(answer, program.spec.equal, program.spec.answer)
            program.see_trial(index, Trial(answer, key, 0.9, num_tokens))
    assert (program.reason is StopReason.CERTAIN) is is_same


def test_a_failed_chain_is_none() -> None:
    """The share is of those that can still speak."""
    program = chains(5)
    wave(program, 600, "7", "7", "7", "8", "8")
    assert program.evidence.standing.share == 0.6
    program.fail(4, 700, closes=False)
    assert program.evidence.standing == Standing("7", (3, 1), 4)


def test_without_the_rule_trials_end_nothing() -> None:
    """Who asks for votes only is answered by finished chains."""
    program = chains(10, stop="careful")
    for num_tokens in range(600, 6000, 600):
        wave(program, num_tokens, *["7"] * 10)
    assert not is_over(program)
    assert "shares" not in program.record()


def test_nobody_is_asked_once_somebody_speaks() -> None:
    """A trial that comes late changes nothing."""
    program = chains(4)
    for num_tokens in (600, 1200):
        wave(program, num_tokens, *["7"] * 4)
    speaker, standing = program.speaker, program.evidence.standing
    assert program.see_trial(3, trial("8", 1300)) is None
    assert (program.speaker, program.evidence.standing) == (speaker, standing)


def test_the_record_tells_the_way() -> None:
    """Who was asked when, and what they said together."""
    program = chains(4)
    wave(program, 600, "7", "8", "7", None)
    for num_tokens in (900, 1500):
        wave(program, num_tokens, *["7"] * 4)
    record = program.record()
    assert record["asked_at_tokens"][0][:2] == [600, 900]
    assert record["shares"][0] == {"tokens": 0, "answer": "7", "share": 0.25}
    assert record["shares"][-1] == {"tokens": 300, "answer": "7", "share": 1.0}
    assert {entry["answer"] for entry in record["shares"]} == {"7", None}  # a tie led by nobody


def test_shares_are_of_answers_as_they_were_written() -> None:
    """As trials and votes have them; the same key later changes nothing."""
    program = chains(4, answer="boxed")
    for index, answer in enumerate(["\\frac{1}{2}", "0.5", "{x", "{x"]):
        key = answer_key(answer, program.spec.equal, program.spec.answer)
        assert key != answer or answer == "0.5"
        program.see_trial(index, Trial(answer, key, 0.9, 600))
        if index == 2:
            program.finish(0, "\\boxed{2/4}", 610)
    shares = [entry["answer"] for entry in program.record()["shares"]]
    assert shares == ["\\frac{1}{2}", "\\frac{1}{2}", None]
    assert shares[0] == program.record()["trials"][0]["answer"]


def test_a_chain_that_has_settled_thinks_on_with_the_others() -> None:
    """However sure it is of its answer; unless the client asks for that, or finished votes alone decide."""
    for field, closing in (
        ({}, None), ({"effort": "low"}, None), ({"exit": "trial:0.9"}, 0), ({"agree": 2}, 0), ({"stop": "careful"}, 0),
    ):  # fmt: skip
        program = chains(10, **field)
        assert program.see_trial(0, trial("7", 600, 1.0)) is None
        assert not program.may_close(0) or closing == 0
        assert program.see_trial(0, trial("7", 700, 1.0)) == closing, field
        assert program.record()["exit"] == (
            "together"
            if closing is None
            else "2 agreeing trials, each at least " + ("0.9" if "exit" in field else "0.99") + " likely"
        )


def test_what_is_urgent() -> None:
    """A chain's next trial may close a thought where an answer has its share, or where it could settle itself."""
    program = chains(4)
    wave(program, 600, "7", "8", "8", None)
    assert not any(program.may_close(index) for index in range(4))
    wave(program, 1200, *["7"] * 4)
    assert all(program.may_close(index) for index in range(4))


def test_the_default_of_several_thoughts() -> None:
    """The level of the votes, or what all chains say; of one thought the level alone."""
    assert parse_field({"algorithm": "long_cot", "branches": 8}, 64).stop.text == "careful or trials:0.8"
    assert parse_field({"algorithm": "long_cot", "branches": 8}, 64, "fast").stop.text == "fast or trials:0.8"
    assert parse_field({"algorithm": "long_cot"}, 64).stop.text == "careful"
    assert parse_field({"branches": 8}, 64).stop.text == "careful"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"stop": "trials:0.5"}, "level '0.5' of 'trials' is outside (0.5, 1]"),
        ({"stop": "trials:1.1"}, "outside (0.5, 1]"),
        ({"stop": "trials:many"}, "outside (0.5, 1]"),
        ({"branches": 1}, "dynasor.branches=1: one chain has nobody to agree with"),
        ({"hold_tokens": 0}, "dynasor.hold_tokens=0 is outside"),
        ({"hold_tokens": 64, "probe_tokens": 65}, "dynasor.hold_tokens=64 is below one probe interval, 65 tokens"),
        ({"stop": "careful", "hold_tokens": 512}, "dynasor.hold_tokens=512 with stop 'careful': no answer is held"),
        (
            {"algorithm": "self_consistency", "answer": "hash", "stop": "trials"},
            "trials are what thoughts are asked for",
        ),
    ],
)
def test_wrong_fields_are_named(field: dict[str, Any], message: str) -> None:
    """Each names the key, the value and what is allowed."""
    with pytest.raises(FieldError) as error:
        parse_field({**FIELD, "branches": 8, **field}, 64)
    assert message in str(error.value)


@pytest.mark.parametrize("field", [{"stop": "trials:0.51"}, {"stop": "trials:1"}, {"probe_tokens": 512}])
def test_right_fields(field: dict[str, Any]) -> None:
    """The ends of what is allowed; without a time of the client's it is one interval at least."""
    assert parse_field({**FIELD, "branches": 2, **field}, 64).thought is not None
    slow = parse_field({"algorithm": "long_cot", "branches": 2, "probe_tokens": 2000}, 64).thought
    assert slow is not None
    assert slow.hold_tokens == 2000


@pytest.mark.parametrize(
    ("rule", "standing", "expected"),
    [
        ("trials:0.8", Standing("7", (8,), 10, is_held=True), True),
        ("trials:0.8", Standing("7", (8,), 10, is_held=False), False),
        ("trials:0.9", Standing("7", (8,), 10, is_held=True), False),
        ("trials:0.8", Standing(None, (5, 5), 10, is_held=True), False),
        ("trials:0.8 and margin", Standing("7", (8,), 10, is_held=True), False),  # nobody has voted
        ("trials:0.8 or margin", Standing("7", (8,), 10, is_held=True), True),
        ("margin", Standing("7", (8,), 10, is_held=True), False),
    ],
)
def test_the_rule_alone(rule: str, standing: Standing, expected: bool) -> None:
    """It needs no votes; rules of votes joined with it are asked of votes."""
    evidence = Evidence((), 0, 10, num_in_flight=10, standing=standing)
    assert parse_stop(rule).stops(evidence) is expected

"""Declared programs in SGLang's frontend language, on the real engine: with our scheduler, without it, and over HTTP."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang as sgl
from fastapi import HTTPException
from questions import held_out, prompt
from sglang.lang.interpreter import StreamExecutor

from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend import LocalEngine, Reasoning, reason
from sglang_dynasor.frontend.judge import reward_of
from sglang_dynasor.frontend.plan import parse_plan
from sglang_dynasor.frontend.seat import Executor, mend
from sglang_dynasor.policy.equal import answer_key

pytestmark = pytest.mark.engine
QUESTIONS = held_out(40)
GUESSED = "Beads", "Shells", "Stamps"  # topics of which the tiny reasoner guesses most answers
EASY = [q for q in QUESTIONS if q.num_steps <= 2 and not q.text.startswith(GUESSED)]
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
HOT: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0}


@pytest.fixture
def backend(shared_engine: Any) -> Iterator[LocalEngine]:
    with LocalEngine(shared_engine(scheduler="dynasor", dynasor_strict=True)) as running:
        yield running


@pytest.fixture
def plain(shared_engine: Any) -> Iterator[LocalEngine]:
    """Stock SGLang; the one warning has been given."""
    with LocalEngine(shared_engine()) as running:
        running._dynasor_warned = True  # type: ignore[attr-defined]
        yield running


@sgl.function
def self_consistency(s: Any, question: str, field: dict[str, Any]) -> Reasoning:
    s += prompt(question)
    with reason(s, answer="hash", **field) as p:
        for branch in p.fork():
            branch += sgl.gen("steps", max_tokens=200, temperature=1.0)
    s["answer"] = p.answer
    return p


def run(function: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
    """The function's return value; its own errors are raised, SGLang's warnings about them left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function.run(*args, backend=backend, **kwargs).ret_value


def vote(backend: Any, question: str, **field: Any) -> Reasoning:
    """Self-consistency by forks. SGLang's `run` has a `stop` of its own, so the field is one argument."""
    return run(self_consistency, backend, question, field)


def check(p: Reasoning) -> None:
    """What every finished program with branches says."""
    assert p.stop_reason in ("certain", "cap")
    assert p.stopped is (p.stop_reason == "certain")
    assert 0 <= p.certaindex <= 1
    assert max(p.votes, key=lambda answer: p.votes[answer]) == p.answer
    assert p.num_tokens == sum(branch.num_tokens for branch in p.branches)
    for branch in p.branches:
        if branch.ended:
            assert branch.num_tokens == 0 or branch.output
        else:
            assert "####" in branch.output or branch.answer is None
    assert sum(p.votes.values()) <= sum(not branch.ended for branch in p.branches)
    assert p.answer is not None
    assert any(b.answer is not None and answer_key(b.answer) == answer_key(p.answer) for b in p.branches if not b.ended)


# Self-consistency by forks


@pytest.mark.parametrize("where", ["backend", "plain"])
def test_self_consistency_stops_early_and_never_does_not(where: str, request: pytest.FixtureRequest) -> None:
    """The gate fires on easy questions, ended branches keep what they had; with `never` all sixteen finish."""
    running = request.getfixturevalue(where)
    early = [vote(running, q.text) for q in EASY[:4]]
    whole = vote(running, EASY[0].text, stop="never")
    for p in early:
        check(p)
    assert any(p.stopped and p.saved > 0 for p in early)
    assert any(branch.ended for p in early for branch in p.branches if p.stopped)
    assert whole.stop_reason == "cap"
    assert not whole.stopped
    assert whole.saved == 0
    assert not any(branch.ended for branch in whole.branches)
    assert sum(whole.votes.values()) + whole.record["num_abstentions"] == 16


def test_the_same_seed_gives_the_same_votes_with_and_without_our_scheduler(backend: Any, plain: Any) -> None:
    """It degrades to plain SGLang: the same policy counts the same texts."""
    for question in QUESTIONS[2:5]:
        ours, theirs = (vote(b, question.text, seed=3, stop="never") for b in (backend, plain))
        assert sorted(branch.output for branch in ours.branches) == sorted(branch.output for branch in theirs.branches)
        assert ours.votes == theirs.votes
        assert ours.answer == theirs.answer
        assert ours.certaindex == theirs.certaindex


def test_without_our_scheduler_there_is_one_warning(plain: Any) -> None:
    """Once per backend; none with the scheduler."""
    del plain._dynasor_warned
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            self_consistency.run(EASY[0].text, {}, backend=plain)
    ours = [w for w in seen if "does not run --scheduler dynasor" in str(w.message)]
    assert len(ours) == 1


def test_with_our_scheduler_there_is_no_warning(backend: Any) -> None:
    """Nor does a search warn, which is driven from here anyway."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        self_consistency.run(EASY[0].text, {}, backend=backend)
    assert not [w for w in seen if "dynasor" in str(w.message)]


def test_width_bounds_the_branches_in_flight(backend: Any) -> None:
    """One at a time: nothing is ever cut off, and what was not needed was never sent."""
    p = vote(backend, EASY[1].text, width=1)
    check(p)
    assert all(branch.num_tokens == 0 for branch in p.branches if branch.ended)
    assert sum(p.votes.values()) + p.record["num_abstentions"] == sum(not b.ended for b in p.branches)


def test_run_batch_keeps_programs_apart(backend: Any) -> None:
    """Many programs of several authors at once, with SGLang's progress bar: each has its own votes."""
    states = self_consistency.run_batch(
        [{"question": q.text, "field": {}} for q in EASY[:6]], backend=backend, progress_bar=True, num_threads=6
    )
    programs = [state.ret_value for state in states]
    assert len({p.id for p in programs}) == 6
    for p, state in zip(programs, states, strict=True):
        check(p)
        assert state["answer"] == p.answer
        assert len(state["steps"]) == 16
    right = sum(p.answer == str(q.answer) for p, q in zip(programs, EASY, strict=False))
    assert right >= 4


def test_nested_programs(backend: Any) -> None:
    """A branch may itself be a program: the outer one counts only the generation that it names."""

    @sgl.function
    def outer(s: Any, question: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", branches=2, stop="never", final="steps") as p:
            inner = []
            for branch in p.fork():
                with reason(branch, answer="hash", branches=3, stop="never") as q:
                    for twig in q.fork():
                        twig += sgl.gen("steps", **HOT)
                inner.append(q)
                branch += sgl.gen("steps", **HOT)
        return p, inner

    p, inner = run(outer, backend, EASY[2].text)
    assert len({p.id, *(q.id for q in inner)}) == 3
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 2
    for q in inner:
        assert sum(q.votes.values()) + q.record["num_abstentions"] == 3


def test_the_answering_generation_may_come_last(backend: Any) -> None:
    """With `final` earlier generations are thoughts that do not vote; without it a second generation is an error."""

    @sgl.function
    def two(s: Any, question: str, final: str | None) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", branches=4, stop="never", final=final) as p:
            for branch in p.fork():
                branch += sgl.gen("first", max_tokens=200, temperature=1.0, stop="####")
                branch += "####"
                branch += sgl.gen("last", max_tokens=8, temperature=0)
        return p

    p = run(two, backend, EASY[3].text, final="last")
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 4
    with pytest.raises(FieldError, match="after the generation that answered"):
        run(two, backend, EASY[3].text, final=None)


# Reports


def test_rewards_of_the_author_decide(backend: Any) -> None:
    """Votes weigh what the author's code says, and a good one ends the program; unreported branches abstain from it."""

    @sgl.function
    def verified(s: Any, question: str, truth: int, rule: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", vote="reward", stop=rule, reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT)
            for branch in p.as_completed():
                p.report(branch, reward=float(branch.answer == str(truth)))
        return p

    question = QUESTIONS[7]
    p = run(verified, backend, question.text, question.answer, "best:1")
    if p.stopped:
        assert p.answer == str(question.answer)
        assert max(reward for reward in p.record["rewards"] if reward is not None) == 1
    p = run(verified, backend, question.text, question.answer, "never")
    assert p.stop_reason == "cap"
    assert len([reward for reward in p.record["rewards"] if reward is not None]) == 16


def test_clusters_of_the_author_are_the_votes(backend: Any) -> None:
    """Answers that the extractor calls different may be the same to the author."""

    @sgl.function
    def clustered(s: Any, question: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", branches=8, stop="never", reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT)
            for branch in p.as_completed():
                p.report(branch, cluster="all the same")
        return p

    p = run(clustered, backend, QUESTIONS[7].text)
    assert p.votes == {"all the same": 8}
    assert p.certaindex == pytest.approx(1, abs=1e-3)  # of as many branches again


@pytest.mark.parametrize("where", ["backend", "plain"])
def test_a_branch_may_be_reported_to_abstain(where: str, request: pytest.FixtureRequest) -> None:
    """Whatever its text says: the others vote, and a program of abstentions alone has no answer."""

    @sgl.function
    def reported(s: Any, num_silent: int) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="regex:(.)", branches=4, stop="never", reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", max_tokens=4, temperature=1.0)
            for i, branch in enumerate(p.as_completed()):
                if i < num_silent:
                    p.report(branch, abstains=True)
                else:
                    p.report(branch, cluster="spoken")
        return p

    p = run(reported, request.getfixturevalue(where), num_silent=3)
    assert p.votes == {"spoken": 1}
    assert p.record["num_abstentions"] == 3
    p = run(reported, request.getfixturevalue(where), num_silent=4)
    assert p.answer is None
    assert p.stop_reason == "cap"


@pytest.mark.parametrize("more", [{"reward": 0.5}, {"cluster": "x"}])
def test_an_abstention_has_no_reward_and_no_cluster(plain: Any, more: dict[str, Any]) -> None:
    """Both at once would say two things."""

    @sgl.function
    def both(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, branches=1, reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", max_tokens=1, temperature=1.0)
            for branch in p.as_completed():
                p.report(branch, abstains=True, **more)

    with pytest.raises(FieldError, match="abstains with reward="):
        run(both, plain)


@pytest.mark.parametrize(("limit", "is_said"), [({}, True), ({"max_tokens": 128}, False)])
def test_gen_says_its_default_limit(backend: Any, limit: dict[str, Any], is_said: bool) -> None:
    """SGLang's, where the author gave none and all branches were cut there."""

    @sgl.function
    def cut(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, branches=2, answer="boxed") as p:
            p.gen("steps", temperature=1.0, ignore_eos=True, **limit)
        return p

    said = run(cut, backend).record["hint"]
    assert "at 128 tokens" in said
    assert ("128 is what holds where none is given" in said) == is_said


def test_all_branches_may_be_read_before_any_is_reported(backend: Any) -> None:
    """Clustering looks at all of them: those that wait for their report keep nobody from starting."""

    @sgl.function
    def clustered(s: Any, question: str, width: int | None) -> Any:
        s += prompt(question)
        more = {} if width is None else {"width": width}
        with reason(s, answer="hash", branches=12, stop="never", reports=True, **more) as p:
            branches = p.fork()
            for branch in branches:
                branch += sgl.gen("steps", max_tokens=4, temperature=1.0)
            outputs = [branch.output for branch in branches]
            for branch, output in zip(branches, outputs, strict=True):
                p.report(branch, cluster=output[:1].strip() or "-")
        return p

    for width in (None, 3):
        p = run(clustered, backend, QUESTIONS[7].text, width)
        assert sum(p.votes.values()) == 12
        assert p.record["width"] == width


def test_a_slow_verifier_holds_the_others_back(backend: Any) -> None:
    """Branches taken as they finish keep their place until they are reported: what they say may end the program."""
    started: list[int] = []

    @sgl.function
    def verified(s: Any, question: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", branches=8, width=2, stop="best:1", vote="reward", reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", max_tokens=4, temperature=1.0)
            for branch in p.as_completed():
                expected = len(started) + 2
                for _ in range(600):
                    if sum(b.index is not None for b in p.branches) >= expected:
                        break
                    time.sleep(0.05)
                time.sleep(0.5)  # in which no more may start
                started.append(sum(b.index is not None for b in p.branches))
                p.report(branch, reward=float(len(started) == 2))
        return p

    assert run(verified, backend, EASY[0].text).stop_reason == "certain"
    assert started == [2, 3]


def test_a_final_generation_that_never_comes_is_named(backend: Any) -> None:
    """A misspelt variable is an error and no silent program without votes; nobody waits for it."""

    @sgl.function
    def misspelt(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=12, stop="never", final="lst") as p:
            for branch in p.fork():
                branch += sgl.gen("last", max_tokens=4, temperature=1.0)

    with pytest.raises(FieldError, match="final='lst': no branch has generated that"):
        run(misspelt, backend)


def test_a_branch_that_the_server_gives_up_is_missed_by_nobody(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue for one of eight: the others vote. If all are given up, that is the program's error."""
    real, lock, left = backend._request, threading.Lock(), [1]

    def request(data: dict[str, Any]) -> Any:
        with lock:
            is_branch = "dynasor-" in str(data.get("rid"))  # a fork's warm-up of the cache is none
            left[0] -= is_branch
            is_given_up = is_branch and left[0] >= 0
        if is_given_up:
            raise HTTPException(503, "The request queue is full.")
        return real(data)

    monkeypatch.setattr(backend, "_request", request)
    p = vote(backend, EASY[0].text, branches=8, stop="never")
    assert (p.record["num_failed"], sum(branch.ended for branch in p.branches)) == (1, 1)
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 7
    left[0] = 1
    p = vote(backend, EASY[0].text, branches=8, stop="never", reports=True)
    assert (p.record["num_failed"], p.stop_reason) == (1, "cap")
    left[0] = 99
    with pytest.raises(HTTPException, match="queue is full"):
        vote(backend, EASY[0].text, branches=4)


def test_a_rule_of_the_author_s_own(backend: Any) -> None:
    """`stop()` ends the others; what they had is kept."""

    @sgl.function
    def first_two(s: Any, question: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", stop="never", reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT)
            for num, branch in enumerate(p.as_completed(), 1):
                p.report(branch)
                if num == 2:
                    p.stop()
        return p

    p = run(first_two, backend, QUESTIONS[7].text)
    assert p.stop_reason == "certain"
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 2


def test_an_executor_may_be_collected_anywhere() -> None:
    """Also where the lock is held that `Thread.is_alive` takes: by a thread that is being started."""
    executor = StreamExecutor(SimpleNamespace(end_program=lambda executor: None), {}, None, object(), stream=False)
    mend(executor)
    worker = executor.worker
    with threading._shutdown_locks_lock:  # type: ignore[attr-defined]
        executor.end()
    worker.join(60)
    assert not worker.is_alive()
    with threading._shutdown_locks_lock:  # type: ignore[attr-defined]
        executor.end()
    assert not executor.queue.unfinished_tasks  # nobody is there to be told again


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.report(p.branches[0], reward=1.5), "dynasor.reward=1.5 is outside [0, 1]"),
        (lambda p: p.report(p.branches[0], reward="good"), "dynasor.reward='good' is a str"),
        (lambda p: p.report(p.branches[0], reward=float("nan")), "dynasor.reward=nan is outside"),
        (lambda p: p.report(99, reward=0.5), "branch 99 is not known; the program has 2"),
        (lambda p: p.report(p.branches[0], cluster=" "), "cluster=' ' is no name"),
        (lambda p: [p.report(0), p.report(0)], "branch 0 has voted already"),
        (lambda p: p.fork(1), "fork(1) is outside [1, 0]"),
    ],
)
def test_a_wrong_report_is_named(backend: Any, call: Any, message: str) -> None:
    """Each names what is wrong, and the program goes on."""

    @sgl.function
    def program(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=2, stop="never", reports=True) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT)
            for branch in p.branches:
                branch.sync()
            with pytest.raises(FieldError) as error:
                call(p)
            assert message in str(error.value)
        return p

    p = run(program, backend)
    assert p.stop_reason == "cap"
    with pytest.raises(FieldError, match=r"voted already|has ended"):
        p.report(1, reward=0.5)
    with pytest.raises(FieldError, match="has ended"):
        p.fork(1)


def test_a_branch_of_another_program_is_refused(backend: Any) -> None:
    """Ids are ours, so only a mix-up in the author's code can bring it."""
    one = vote(backend, EASY[0].text, branches=2, reports=True)
    other = vote(backend, EASY[0].text, branches=2, reports=True)
    with pytest.raises(FieldError, match=f"is of program {other.id}"):
        one.report(other.branches[0])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"branches": 0}, "dynasor.branches=0 is outside"),
        ({"widht": 4}, "dynasor.widht is not a key"),
        ({"algorithm": "oracle"}, "dynasor.algorithm='oracle' is not known"),
        ({"program": "mine"}, "ids are made for you"),
        ({"tenant": "a"}, "dynasor.tenant='a' with fork()"),
        ({"algorithm": "rebase", "reward": lambda question, text: 1.0}, "samples by itself; use gen()"),
        ({"algorithm": "rebase"}, "without rewards"),
        ({**JUDGE}, "dynasor.judge with fork()"),
        ({"reward": lambda question, text: 1.0}, "`reward` with fork()"),
        ({"algorithm": "best_of_n", "hopeless": 0.3, "reports": True}, "dynasor.hopeless=0.3 with fork()"),
        ({"seed": "7"}, "seed='7' is a str"),
    ],
)
def test_a_wrong_declaration_is_named(backend: Any, field: dict[str, Any], message: str) -> None:
    """Before anything is sent."""
    with pytest.raises(FieldError) as error:
        vote(backend, EASY[0].text, **field)
    assert message in str(error.value)


def test_what_only_the_server_knows_comes_back_as_an_error(backend: Any) -> None:
    """More branches than the operator allows: the server's own words."""
    with pytest.raises(FieldError, match=r"dynasor.branches=100 is outside \[1, 64\]"):
        vote(backend, EASY[0].text, branches=100)


def test_what_is_refused_may_be_collected_anywhere(backend: Any) -> None:
    """The error holds the state in a cycle."""
    kept: list[Any] = []

    @sgl.function
    def refused(s: Any) -> None:
        kept.append(s.stream_executor)
        assert not isinstance(kept[0], Executor)
        reason(s, seed="7")  # type: ignore[arg-type]

    with pytest.raises(FieldError, match="seed='7' is a str"):
        run(refused, backend)
    assert isinstance(kept[0], Executor)


def test_another_backend_is_refused() -> None:
    """SGLang's own endpoint carries no field."""

    class Executor:
        backend = object()
        use_thread = False

    class State:
        stream_executor = Executor()

    with pytest.raises(FieldError, match="backend is object"):
        reason(State())


@pytest.mark.parametrize("where", ["backend", "plain"])
def test_a_deadline_gives_the_best_so_far(where: str, request: pytest.FixtureRequest) -> None:
    """What runs is ended with what it has; a deadline far away changes nothing."""
    running = request.getfixturevalue(where)

    @sgl.function
    def endless(s: Any, deadline_s: float, most: int) -> Any:
        s += prompt(QUESTIONS[7].text)
        with reason(s, answer="hash", stop="never", branches=32, deadline_s=deadline_s) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", max_tokens=most, temperature=1.0, ignore_eos=True)
        return p

    for deadline_s in (0.5, 2.0, 6.0):  # on a machine that stalls nothing runs at the first
        p = run(endless, running, deadline_s, 900)
        assert p.stop_reason == "deadline"
        if any(branch.ended and branch.num_tokens for branch in p.branches):
            break
    assert any(branch.ended and branch.num_tokens for branch in p.branches)
    p = run(endless, running, 600.0, 20)
    assert p.stop_reason == "cap"
    assert not any(branch.ended for branch in p.branches)


# One generation


@pytest.mark.parametrize("where", ["backend", "plain"])
@pytest.mark.parametrize(
    "field",
    [
        {"algorithm": "self_consistency"},
        {"algorithm": "best_of_n", **JUDGE},
        {"algorithm": "rebase", **JUDGE},
        {"algorithm": "mcts", **JUDGE},
        {"algorithm": "beam", **JUDGE},
    ],
    ids=lambda field: field["algorithm"],
)
def test_a_whole_program_in_one_generation(where: str, field: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """`gen` writes the winning path into the state, on either server, whoever makes the branches."""

    @sgl.function
    def whole(s: Any, question: str) -> Any:
        s += prompt(question)
        with reason(s, answer="hash", branches=8, **field) as p:
            p.gen("steps", **HOT)
        s["answer"] = p.answer
        return p

    state = whole.run(EASY[1].text, backend=request.getfixturevalue(where))
    p = state.ret_value
    assert state["answer"] == p.answer
    assert state.text() == prompt(EASY[1].text) + state["steps"]
    assert p.answer is None or f"#### {p.answer}" in state["steps"]
    assert p.stop_reason in ("certain", "cap")
    assert 0 <= p.certaindex <= 1
    assert p.num_tokens > 0


def test_rewards_of_a_function_guide_a_search(backend: Any) -> None:
    """Rebase with the author's own process reward; one outside [0, 1] is named."""

    @sgl.function
    def rebase(s: Any, question: Any, reward: Any) -> Any:
        s += prompt(question.text)
        with reason(s, "rebase", answer="hash", branches=8, round_width=8, stop="never", reward=reward, seed=1) as p:
            p.gen("steps", **HOT)
        return p

    question = QUESTIONS[5]
    lines = question.lines

    def knows(question: str, text: str) -> float:
        """The share of steps that are right."""
        return sum(a == b for a, b in zip(text.splitlines(), [line.strip() for line in lines], strict=False)) / 8

    p = run(rebase, backend, question, knows)
    assert p.answer == str(question.answer)
    assert p.record["num_judge_tokens"] == 0
    with pytest.raises(FieldError, match=r"dynasor.reward=2 is outside \[0, 1\]"):
        run(rebase, backend, question, lambda question, text: 2)


def test_a_search_is_reproducible(backend: Any) -> None:
    """On an engine that reads seeds the same seed gives the same tree; another seed another one."""

    @sgl.function
    def rebase(s: Any, seed: int) -> Any:
        s += prompt(QUESTIONS[5].text)
        with reason(s, "rebase", answer="hash", branches=6, stop="never", seed=seed, **JUDGE) as p:
            p.gen("steps", **HOT)
        return p

    one, two, other = (run(rebase, backend, seed).record for seed in (1, 1, 2))
    assert one["votes"] == two["votes"]
    assert one["num_tokens"] == two["num_tokens"]
    assert (one["votes"], one["num_tokens"]) != (other["votes"], other["num_tokens"])


def test_a_hopeless_search_has_stopped(backend: Any) -> None:
    """It says so, and that it was cut short; with good rewards it is not."""

    @sgl.function
    def rebase(s: Any, worth: float) -> Any:
        s += prompt(QUESTIONS[5].text)
        with reason(
            s, "rebase", answer="hash", branches=8, stop="never", hopeless=0.5, reward=lambda question, text: worth
        ) as p:
            p.gen("steps", **HOT)
        return p

    p = run(rebase, backend, 0.1)
    assert (p.stop_reason, p.stopped) == ("hopeless", True)
    p = run(rebase, backend, 0.9)
    assert (p.stop_reason, p.stopped) == ("cap", False)


def test_a_refused_generation_leaves_the_state_alive(backend: Any) -> None:
    """The author may catch the error and go on."""

    @sgl.function
    def careful(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=100) as p, pytest.raises(FieldError, match="outside"):
            p.gen("steps", **HOT)
        s += sgl.gen("plain", max_tokens=200, temperature=0)
        return s["plain"]

    assert f"#### {EASY[0].answer}" in run(careful, backend)


def test_labels_must_be_one_token_each(backend: Any) -> None:
    """A judge that cannot be read is named before anything is judged."""

    @sgl.function
    def rebase(s: Any) -> Any:
        s += prompt(QUESTIONS[5].text)
        with reason(s, "rebase", answer="hash", **{**JUDGE, "judge_bad": " not so good"}) as p:
            p.gen("steps", **HOT)

    with pytest.raises(FieldError, match=r"dynasor.judge_bad=' not so good' is"):
        run(rebase, backend)


def test_selects_and_plain_generations_are_untouched(backend: Any) -> None:
    """What belongs to no program runs as in SGLang."""

    @sgl.function
    def ordinary(s: Any) -> Any:
        s += prompt(EASY[0].text)
        s += sgl.gen("steps", max_tokens=200, temperature=0)
        s += sgl.select("verdict", choices=[" good", " bad"])
        forks = s.fork(2)
        forks += sgl.gen("more", max_tokens=4, temperature=0)
        forks.join()
        return s["steps"], s["verdict"], s["more"], s.get_meta_info("steps")

    steps, verdict, more, meta = run(ordinary, backend)
    assert f"#### {EASY[0].answer}" in steps
    assert verdict in (" good", " bad")
    assert len(more) == 2
    assert "dynasor" not in meta


def test_streaming_a_program(backend: Any) -> None:
    """Branches of a streamed function are counted all the same; two that agree may be enough of four."""
    state = self_consistency.run(EASY[0].text, {"branches": 4}, backend=backend, stream=True)
    "".join(state.text_iter())
    for _ in range(600):
        if state.stream_executor.is_finished and hasattr(state, "ret_value"):
            break
        time.sleep(0.1)
    p = state.ret_value
    assert sum(p.votes.values()) + p.record["num_abstentions"] >= 2


# Plans


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"algorithm": "rebase", "step": ""}, "dynasor.step='' is no step mark"),
        ({"algorithm": "rebase", "reward_temperature": 0}, "dynasor.reward_temperature=0 is outside"),
        ({"algorithm": "mcts", "beams": 4}, "dynasor.beams is not a key of mcts"),
        ({"algorithm": "mcts", "tenant": "a"}, "dynasor.tenant is not a key of mcts"),
        ({"algorithm": "rebase", "stop": "confidence"}, "confidences are read next to the logits"),
        ({"algorithm": "rebase", "judge": "model"}, "with rewards of your own code"),
    ],
)
def test_a_wrong_plan_is_named(field: dict[str, Any], message: str) -> None:
    """Key, value, what is allowed."""
    with pytest.raises(FieldError) as error:
        parse_plan(field, has_reward=True)
    assert message in str(error.value)


def test_a_judge_on_the_server_is_no_judge_here() -> None:
    """The operator's reward model is asked by our scheduler only."""
    with pytest.raises(FieldError, match="judge='model' outside the engine"):
        parse_plan({"algorithm": "mcts", "judge": "model"}, has_reward=False)


def test_keys_that_change_no_answer_are_left_out_on_plain_sglang() -> None:
    """A tenant has no meaning where nobody shares by tenants."""
    assert parse_plan({"tenant": "a", "statistics": True}, has_reward=False).spec.tenant == ""


def test_reward_of_log_probabilities() -> None:
    """p(good) / (p(good) + p(bad)), also where both are nearly impossible."""
    assert reward_of(-1.0, -1.0) == 0.5
    assert reward_of(0.0, -2000.0) == 1.0
    assert reward_of(-float("inf"), 0.0) == pytest.approx(0.0)
    assert reward_of(-float("inf"), -float("inf")) == 0.5


# Authors who go on with what has failed, or leave in the middle


def within(seconds: float, function: Any, *args: Any) -> Any:
    """What it returns or raises, or a failure where it hangs."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run(function, *args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("where", ["backend", "plain"])
def test_a_branch_that_has_failed_may_be_asked_for_more(where: str, request: pytest.FixtureRequest) -> None:
    """The author reads it, appends, and gets what it failed by; SGLang's own state would wait for ever."""

    @sgl.function
    def twice(s: Any) -> None:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=4) as p:
            for branch in p.fork():
                branch += sgl.gen("a", **HOT)
                branch.text()
                branch += sgl.gen("b", **HOT)
                branch.text()
                branch += "\n"

    error = within(120, twice, request.getfixturevalue(where))
    assert isinstance(error, FieldError)
    assert "generates 'b' after the generation that answered" in str(error)


def test_a_refused_branch_says_why(backend: Any) -> None:
    """Also where the author reads and goes on before the block ends."""

    @sgl.function
    def long(s: Any) -> None:
        s += "1 " * 5000
        with reason(s, answer="hash", branches=2, final="b") as p:
            for branch in p.fork():
                branch += sgl.gen("a", **HOT)
                branch.text()
                branch += " so "
                branch += sgl.gen("b", **HOT)

    error = within(120, long, backend)
    assert isinstance(error, ValueError)
    assert "long" in str(error)


@pytest.mark.parametrize("by_gen", [True, False])
def test_a_state_that_has_failed_declares_nothing(backend: Any, by_gen: bool) -> None:
    """The failure of what came before is the author's answer."""

    @sgl.function
    def planned(s: Any) -> None:
        s += "1 " * 5000
        s += sgl.gen("plan", max_tokens=4)
        with reason(s, answer="hash", branches=2) as p:
            if by_gen:
                p.gen("steps", **HOT)
            else:
                p.fork()

    error = within(120, planned, backend)
    assert isinstance(error, ValueError)
    assert "long" in str(error)


@pytest.mark.parametrize("width", [1, None])
def test_an_author_may_leave_before_reporting(plain: Any, width: int | None) -> None:
    """The branch that was handed out votes without a reward, and holds nobody up."""
    field = {} if width is None else {"width": width}

    @sgl.function
    def left(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=6, stop="never", reports=True, **field) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT)
            for _ in p.as_completed():
                break
        return p

    p = within(120, left, plain)
    assert p.stop_reason == "cap"
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 6


@pytest.mark.parametrize("where", ["backend", "plain"])
def test_the_record_speaks_of_branches_as_they_were_forked(where: str, request: pytest.FixtureRequest) -> None:
    """Whatever the order in which they came: the winner's text has the answer."""

    @sgl.function
    def backwards(s: Any) -> Any:
        s += prompt(EASY[1].text)
        with reason(s, answer="hash", branches=6, width=1, stop="never") as p:
            for branch in reversed(p.fork()):
                branch += sgl.gen("steps", **HOT)
                branch.text()
        return p

    p = run(backwards, request.getfixturevalue(where))
    assert p.winner is p.branches[p.record["branch"]]
    assert p.winner.answer == p.answer
    # Of those that gave the leading answer the first to come: the last of the fork.
    leading = [b.number for b in p.branches if b.answer is not None and answer_key(b.answer) == answer_key(p.answer)]
    assert p.winner.number == max(leading)


def test_rewards_are_told_by_fork(plain: Any) -> None:
    """Each branch's own."""

    @sgl.function
    def rewarded(s: Any) -> Any:
        s += prompt(EASY[1].text)
        with reason(s, answer="hash", branches=4, stop="never", vote="reward", reports=True) as p:
            for branch in reversed(p.fork()):
                branch += sgl.gen("steps", **HOT)
                branch.text()
            for branch in p.as_completed():
                p.report(branch, reward=branch.number / 4)
        return p

    p = run(rewarded, plain)
    assert p.record["rewards"] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("where", ["backend", "plain"])
@pytest.mark.parametrize("reports", [True, False])
def test_an_author_may_write_the_mark(where: str, reports: bool, request: pytest.FixtureRequest) -> None:
    """The vote reads what the branch's own `answer` reads, whoever counts."""

    @sgl.function
    def marked(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=6, stop="never", final="answer", reports=reports) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", **HOT, stop="####")
                branch += "####"
                branch += sgl.gen("answer", max_tokens=8, temperature=1.0, stop="\n")
        return p

    p = run(marked, request.getfixturevalue(where))
    own = [b.answer for b in p.branches]
    assert sum(p.votes.values()) == sum(answer is not None for answer in own) >= 4
    assert p.answer in own


def test_what_gen_has_answered_stays(backend: Any) -> None:
    """Whatever happens to the author afterwards."""
    kept: list[Reasoning] = []

    @sgl.function
    def fails(s: Any) -> None:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=4) as p:
            kept.append(p)
            p.gen("steps", **HOT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fails, backend)
    assert kept[0].answer is not None
    assert kept[0].stop_reason in ("certain", "cap")
    assert kept[0].num_tokens > 0


def test_branches_that_have_failed_hold_no_place(plain: Any) -> None:
    """By something else than the generation that answers; the others go on."""

    @sgl.function
    def some(s: Any) -> Any:
        s += prompt(EASY[0].text)
        with reason(s, answer="hash", branches=4, width=1, stop="never", reports=True, final="b") as p:
            for branch in p.fork():
                branch += sgl.gen("a", max_tokens=2, temperature=1.0)
                if branch.number < 2:
                    branch += sgl.image("/no/such/image.png")
                branch += sgl.gen("b", **HOT)
            for branch in p.as_completed():
                p.report(branch)
        return p

    p = within(120, some, plain)
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 2

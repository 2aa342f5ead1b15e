"""Searches and declared programs on a backend that answers by script: lengths, seeds, ends, and what a refusal does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sglang_dynasor.errors import FieldError, RefusedError
from sglang_dynasor.frontend.branch import Branch
from sglang_dynasor.frontend.counting import Counting
from sglang_dynasor.frontend.driver import ABORT_AGAIN_S, SEEDED_ROOM, Driver
from sglang_dynasor.frontend.judge import ModelJudge, Verdict, model_judge
from sglang_dynasor.frontend.locked_budget import LockedBudget
from sglang_dynasor.frontend.plan import parse_plan
from sglang_dynasor.frontend.reasoning import Reasoning
from sglang_dynasor.frontend.seat import check_seed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.program import StopReason
from sglang_dynasor.policy.spec import JudgeSpec

SOLUTION = "one\ntwo\nthree\n#### 4"


class Script:
    """A backend without our scheduler: each request gets `say(data)`, 10 tokens long."""

    name = "the script"
    has_scheduler = False

    def __init__(self, say: Callable[[dict[str, Any]], str | None]):
        self.say = say
        self.sent: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def post(self, data: dict[str, Any]) -> dict[str, Any] | None:
        with self.lock:
            self.sent.append(data)
        text = self.say(data)
        if text is None:
            return None
        return {"text": text, "meta_info": {"finish_reason": {"type": "stop", "matched": 1}, "completion_tokens": 10}}

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) for c in text.strip()]

    def abort(self, rid: str) -> None: ...


def drive(backend: Script, field: dict[str, Any], sampling: dict[str, Any], **options: Any) -> Any:
    plan = parse_plan({"answer": "hash", **field}, has_reward=True)
    driver = Driver(backend, rows=4)
    try:
        return driver.run("Q", plan, sampling, reward=lambda question, text: 0.5, **options)
    finally:
        driver.close()


def test_max_new_tokens_holds_for_a_whole_solution() -> None:
    """MCTS branches off in the middle of a solution: what is before was generated too."""
    backend = Script(lambda data: SOLUTION.removeprefix(data["text"][1:]))
    found = drive(
        backend,
        {"algorithm": "mcts", "branches": 6, "width": 1, "branching": 1, "stop": "never"},
        {"max_new_tokens": 40},
    )
    assert found.record["num_tokens"] == 10  # one path and no place for another
    found = drive(backend, {"algorithm": "mcts", "branches": 8, "width": 1, "stop": "never"}, {"max_new_tokens": 40})
    middles = [data for data in backend.sent if data["text"] != "Q"]
    assert middles
    for data in middles:
        spent = len(data["text"][1:]) / len(SOLUTION) * 10
        assert data["sampling_params"]["max_new_tokens"] == pytest.approx(40 - spent, abs=4)
        assert data["sampling_params"]["max_new_tokens"] < 40
    assert found.record["program"] != "search"


@pytest.mark.parametrize(("seed", "rooms"), [(3, [SEEDED_ROOM, SEEDED_ROOM]), (None, [64, 16])])
def test_a_seed_does_not_ask_who_else_runs(seed: int | None, rooms: list[int]) -> None:
    """What a search with a seed asks for must not depend on others; without one the rows are shared."""
    driver = Driver(Script(lambda data: SOLUTION), rows=64)
    found: list[int] = []
    for driver._num_live in (1, 4):
        found.append(driver._room(SimpleNamespace(seed=seed, in_flight={})))  # type: ignore[arg-type]
    driver.close()
    assert found == rooms


def test_a_request_given_up_shrinks_the_cap() -> None:
    """As in the engine; a wrong one ends the search."""
    given_up = iter([None] + [SOLUTION] * 99)
    record = drive(
        Script(lambda data: next(given_up)), {"algorithm": "best_of_n", "branches": 4, "stop": "never"}, {}
    ).record
    assert (record["num_failed"], record["num_branches"], record["stop_reason"]) == (1, 3, "cap")

    def refuse(data: dict[str, Any]) -> str:
        raise RefusedError("too long")

    with pytest.raises(RefusedError, match="too long"):
        drive(Script(refuse), {"algorithm": "best_of_n", "branches": 4}, {})


def test_a_judge_that_cannot_read_a_text_gives_no_reward() -> None:
    """Prompt, solution and suffix may be too long for the model together: the solution goes on without."""

    def refuse(data: dict[str, Any]) -> str:
        raise RefusedError("too long")

    assert ModelJudge(Script(refuse), "?", 1, 2)("Q", "text") == Verdict(None)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (JudgeSpec(" ", "a", "b"), "dynasor.judge_suffix=' ' is no token"),
        (JudgeSpec("?", "aa", "b"), "dynasor.judge_good='aa' is 2 tokens"),
        (JudgeSpec("?", "a", " a"), "are the same token"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_named(judge: JudgeSpec, message: str) -> None:
    """Before anything is sampled."""
    with pytest.raises(FieldError) as error:
        model_judge(Script(lambda data: ""), judge)
    assert message in str(error.value)
    assert model_judge(Script(lambda data: ""), JudgeSpec("?", "a", "b")).good == ord("a")


def test_a_seed_is_a_number() -> None:
    """A string times a number is a long string, and no seed."""
    for seed in ("7", 1.5, True):
        with pytest.raises(FieldError, match=r"^seed="):
            check_seed(seed)
    check_seed(None)
    check_seed(7)


def test_what_a_deadline_ends_is_no_failure() -> None:
    """The certaindex is that of the votes there are, not of a cap that shrank."""
    many, asked = threading.Event(), count()

    class Slow(Script):
        def abort(self, rid: str) -> None:
            many.set()

    backend = Slow(lambda data: SOLUTION if next(asked) < 2 else (many.wait(60), None)[1])
    for algorithm in ("self_consistency", "best_of_n", "mcts"):
        asked = count()
        many.clear()
        record = drive(backend, {"algorithm": algorithm, "branches": 8, "stop": "never", "deadline_s": 0.3}, {}).record
        assert (record["stop_reason"], record["num_failed"]) == ("deadline", 0)
        assert record["risk"] > 0.04  # two votes, six that may come


def test_a_reward_may_ask_by_a_program_of_its_own() -> None:
    """However few rows there are: who waits for it holds none."""
    driver = Driver(Script(lambda data: SOLUTION), rows=2)
    own = parse_plan({"answer": "hash", "branches": 4, "stop": "margin"}, has_reward=False)
    plan = parse_plan({"algorithm": "best_of_n", "answer": "hash", "branches": 6, "stop": "never"}, has_reward=True)

    def reward(question: str, text: str) -> float:
        return driver.run(f"{question} Is it right? {text}", own, {}).record["certaindex"]

    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(driver.run("Q", plan, {}, reward=reward)), daemon=True)
    asking.start()
    asking.join(60)
    assert found[0].record["rewards"] == [1.0] * 6
    driver.close()


@pytest.mark.parametrize("algorithm", ["rebase", "beam"])
def test_a_width_that_cannot_hold_is_refused(algorithm: str) -> None:
    """They sample a whole depth at once."""
    with pytest.raises(FieldError, match=f"dynasor.width=2 with algorithm '{algorithm}'"):
        parse_plan({"algorithm": algorithm, "width": 2}, has_reward=True)


def test_an_answer_may_begin_in_the_prompt() -> None:
    """Whoever counts."""
    backend = Script(lambda data: " 4")
    for algorithm in ("self_consistency", "best_of_n", "rebase"):
        plan = parse_plan({"algorithm": algorithm, "answer": "hash", "branches": 4}, has_reward=True)
        driver = Driver(backend, rows=4)
        assert driver.run("Q\n####", plan, {}, reward=lambda question, text: 0.5).record["answer"] == "4"
        driver.close()


def test_what_is_over_sends_nothing_more() -> None:
    """A sample that waits for a place is not sent when its search has ended meanwhile; and rows bound judges, too."""
    go = threading.Event()

    class Slow(Script):
        def abort(self, rid: str) -> None:
            go.set()  # the second search is over then, and its samples still wait

    backend = Slow(lambda data: (go.wait(60), SOLUTION)[1])
    driver = Driver(backend, rows=2)
    plan = parse_plan({"algorithm": "best_of_n", "answer": "hash", "branches": 2, "stop": "never"}, has_reward=True)
    late = parse_plan({"algorithm": "best_of_n", "answer": "hash", "branches": 2, "deadline_s": 0.1}, has_reward=True)
    first = threading.Thread(target=lambda: driver.run("first", plan, {}, reward=lambda question, text: 0.5))
    first.start()
    while len(backend.sent) < 2:
        time.sleep(0.01)
    record = driver.run("second", late, {}, reward=lambda question, text: 0.5).record
    first.join()
    assert record["stop_reason"] == "deadline"
    assert {data["text"] for data in backend.sent} == {"first"}
    driver.close()
    with pytest.raises(RuntimeError, match="is closed"):
        driver.run("third", plan, {}, reward=lambda question, text: 0.5)


class Endless(Script):
    """A backend whose requests run until they are aborted, those that are `is_late` until they are again: they come in after the first
    time. The first `num_deaf` aborts fail."""

    def __init__(self, *, is_late: bool = False, num_deaf: int = 0):
        super().__init__(lambda data: None)
        self.is_late, self.num_deaf = is_late, num_deaf
        self.ended: dict[str, threading.Event] = {}
        self.aborts: list[str] = []

    def post(self, data: dict[str, Any]) -> None:
        rid, until = data["rid"], time.monotonic() + 60
        while self.is_late and rid not in self.aborts and time.monotonic() < until:
            time.sleep(0.01)
        self.ended[rid] = threading.Event()
        self.ended[rid].wait(60)

    def abort(self, rid: str) -> None:
        is_deaf = len(self.aborts) < self.num_deaf
        if rid in self.ended and not is_deaf:
            self.ended[rid].set()
        self.aborts.append(rid)
        if is_deaf:
            raise ConnectionError(rid)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many warnings of ours there were: other threads of this process log, too."""
    caplog.set_level("WARNING", "sglang_dynasor")
    return lambda: sum(record.name.startswith("sglang_dynasor") for record in caplog.records)


@pytest.mark.parametrize(
    ("is_late", "num_deaf"), [(True, 0), (False, 1), (False, 0)], ids=["on their way", "not heard", "running"]
)
def test_what_is_in_flight_at_the_end_is_ended(is_late: bool, num_deaf: int, warned: Callable[[], int]) -> None:
    """Also what comes to the server after its abort, and whatever becomes of the others; what runs is told once."""
    backend = Endless(is_late=is_late, num_deaf=num_deaf)
    began = time.monotonic()
    record = drive(backend, {"branches": 4, "stop": "never", "deadline_s": 0.3}, {}).record
    num_rounds = int((time.monotonic() - began) / ABORT_AGAIN_S)  # besides the first: more where a machine stalls
    assert record["stop_reason"] == "deadline"
    assert backend.ended
    assert all(event.is_set() for event in backend.ended.values())
    for rid in backend.ended:
        least = 2 if is_late or rid in backend.aborts[:num_deaf] else 1
        assert least <= backend.aborts.count(rid) <= max(least, 1 + num_rounds)
    assert warned() == min(num_deaf, 1)


def counting_of(backend: Script, num: int, **field: Any) -> tuple[Counting, list[Any]]:
    """The branches of a declared program, all of them generating."""
    field = {"answer": "hash", "branches": num, **field}
    spec = parse_plan(field, has_reward=False).spec
    counting = Counting(backend, field, spec, is_server_s=False, final=None, reports=False, seed=None)
    for index in range(num):
        counting._program.start_branch()
        executor = SimpleNamespace(use_thread=False)
        fake = {"index": index, "rid": str(index), "is_finished": False, "ended": False, "num_tokens": 3}
        counting.branches.append(cast(Branch, SimpleNamespace(**fake, stream_executor=executor)))
    return counting, cast("list[Any]", counting.branches)


def test_an_author_s_exception_is_the_one_that_is_seen(warned: Callable[[], int]) -> None:
    """Whatever fails in ending the branches; and all are ended that can be."""
    backend = Endless(num_deaf=1)
    p = Reasoning.__new__(Reasoning)
    p._counting, p._timer = counting_of(backend, 4)[0], None
    p.id = p._counting.id
    with pytest.raises(ZeroDivisionError), p:
        raise ZeroDivisionError
    assert backend.aborts == ["0", "1", "2", "3"]
    assert warned() == 1
    p._counting.end = lambda reason: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyError), p:
        raise KeyError
    assert warned() == 2
    p._is_joined, p.reports = False, True
    with pytest.raises(AttributeError), p:  # its own errors are seen where there is no other
        p._counting.completed = lambda: None.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(("answers", "aborts"), [("77", ["3"]), ("78", [])])
def test_a_branch_that_is_lost_may_end_the_others(answers: str, aborts: list[str]) -> None:
    """Two of four agree when the third is given up: the fourth changes nothing. Not where they are level."""
    backend = Endless()
    counting, branches = counting_of(backend, 4, stop="margin")
    for index, answer in enumerate(answers):
        counting._program.count(index, answer, 3)
        branches[index].is_finished = True
    assert counting.lose(branches[2], ConnectionError())
    assert backend.aborts == aborts
    assert (counting.reason is None) is (not aborts)


def test_a_rule_of_the_author_s_that_fails_at_a_loss_is_told() -> None:
    """As after a vote: not in the branch's thread, where nobody would see it."""

    def rule(evidence: Evidence) -> bool:
        return evidence.num_left == 2 and 1 / 0 > 0

    counting, branches = counting_of(Endless(), 3, stop=rule)
    assert not counting.lose(branches[0], ConnectionError())
    assert counting.reason is StopReason.FAILED
    with pytest.raises(ZeroDivisionError):
        counting.close()


# A budget that several runs share


def share(
    say: Callable[[dict[str, Any]], str | None], tokens: int, num: int, found: list[Any] | None = None, **field: Any
) -> list[Any]:
    """`num` runs at once, each of a question of its own: what each found, or has failed by. Nobody is answered before all have come."""

    def answer(data: dict[str, Any]) -> str | None:
        until = time.monotonic() + 30
        while not is_whole.is_set() and time.monotonic() < until:
            if len(budget.budget.members) == num:
                is_whole.set()
            time.sleep(0.001)
        return say(data)

    plan = parse_plan({"answer": "hash", "branches": 8, **field}, has_reward=False)
    driver, budget, is_whole = Driver(Script(answer), rows=4), LockedBudget(tokens, num, 4), threading.Event()
    found = [None] * num if found is None else found

    def run(i: int) -> None:
        try:
            found[i] = driver.run(f"Q{i}", plan, {"max_new_tokens": 10}, budget=budget).record
        except RefusedError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    driver.close()
    assert not budget.budget.members
    return found


def differing(numbers: Iterator[int]) -> Callable[[dict[str, Any]], str]:
    """What says the same of even questions, and never the same of odd ones."""
    return lambda data: f"#### {next(numbers) if int(data['text'][1:2]) % 2 else 4}"


def test_runs_share_a_budget() -> None:
    """Odd questions are never decided: they get what the even ones leave, and all end."""
    records = share(differing(count(100)), 300, 8)
    assert sum(record["num_tokens"] for record in records) <= 300
    branches = [record["num_branches"] for record in records]
    assert min(branches) >= 1
    assert sum(branches[::2]) * 2 < sum(branches[1::2])
    assert {record["stop_reason"] for record in records[1::2]} == {"budget", "cap"}
    assert all(record["budget_tokens"] == 300 for record in records)


def test_runs_of_a_large_budget_end_by_themselves() -> None:
    """As without one."""
    records = share(differing(count(100)), 10**6, 4)
    assert [record["stop_reason"] for record in records] == ["certain", "cap", "certain", "cap"]


def test_a_run_that_fails_leaves_its_budget_to_the_others() -> None:
    """Nobody waits for what it held; given up requests take none of it."""

    def say(data: dict[str, Any]) -> str | None:
        if data["text"] == "Q0":
            raise RefusedError("too long")
        return None if data["text"] == "Q1" else f"#### {next(numbers)}"

    numbers = count()
    refused, lost, *others = share(say, 10**6, 4, stop="never")
    assert str(refused) == "too long"
    assert lost["stop_reason"] == "failed"
    assert [record["num_branches"] for record in others] == [8, 8]


def test_a_deadline_holds_while_a_run_waits_for_its_budget() -> None:
    """What it has is answered in time, though another holds all that is left, and goes on longer."""

    def say(data: dict[str, Any]) -> str:
        until = time.monotonic() + 20
        while data["text"] == "Q0" and found[1] is None and time.monotonic() < until:
            time.sleep(0.01)
        return "#### 4"

    found: list[Any] = [None, None]
    _, quick = share(say, 25, 2, found, stop="never", deadline_s=0.5)
    assert quick["stop_reason"] == "deadline"
    assert quick["num_branches"] == 1


def test_a_program_alone_has_its_own_budget() -> None:
    """Of the plan; the cap and the rule hold beside it."""
    plan = parse_plan({"answer": "hash", "branches": 8, "stop": "never", "budget_tokens": 45}, has_reward=False)
    driver = Driver(Script(lambda data: SOLUTION), rows=4)
    record = driver.run("Q", plan, {"max_new_tokens": 10}).record
    driver.close()
    assert (record["stop_reason"], record["num_branches"], record["num_tokens"]) == ("budget", 3, 30)


@pytest.mark.parametrize("algorithm", ["mcts", "rebase", "beam"])
def test_searches_have_no_budget(algorithm: str) -> None:
    """Their samples are no votes."""
    with pytest.raises(FieldError, match=f"budget_tokens=9 with algorithm '{algorithm}'"):
        parse_plan({"algorithm": algorithm, "budget_tokens": 9}, has_reward=True)

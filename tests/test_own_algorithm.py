"""An algorithm and a rule that the package does not know: CONTRIBUTING's recipe, run as it stands there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from engines import ROOT
from questions import held_out, prompt
from test_algorithms import noise, run, solution
from test_driver import SOLUTION, Script

from sglang_dynasor import solve
from sglang_dynasor.algorithms.catalogue import ALGORITHMS, NAMES, find
from sglang_dynasor.algorithms.tree import ROOT as QUESTION
from sglang_dynasor.algorithms.tree import Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend import LocalEngine, reason
from sglang_dynasor.frontend.driver import Driver
from sglang_dynasor.frontend.plan import parse_plan
from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS, AlgorithmRecord
from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import own_rule, parse_stop

QUESTIONS = held_out(3)
PROMPTS = [prompt(q.text) for q in QUESTIONS]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 200}


@cache
def recipe() -> list[str]:
    """The code of CONTRIBUTING's section, block by block."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Add an algorithm\n")[1].split("\n## ")[0]
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S)]


def follow(blocks: list[str], **names: Any) -> dict[str, Any]:
    """What the author has after typing these blocks."""
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


@pytest.fixture
def engine(shared_engine: Callable[..., Any]) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True)


@pytest.fixture
def author() -> dict[str, Any]:
    """What the author has before anything runs: a class, a rule, a record."""
    the_class, the_rule, _, the_record = recipe()
    return follow([the_class, the_rule, the_record])


def drive(backend: Script, algorithm: Any, *, reward: Any = None, **field: Any) -> dict[str, Any]:
    """The record of one question by the pure driver."""
    plan = parse_plan({"algorithm": algorithm, "answer": "hash", **field}, has_reward=reward is not None)
    driver = Driver(backend, rows=4)
    try:
        return driver.run("Q", plan, {}, reward=reward).record
    finally:
        driver.close()


# The recipe


def test_the_recipe_without_a_server(author: dict[str, Any]) -> None:
    """The rule stops it as soon as one answer is two ahead; disagreement and `never` use the cap, as does another rule."""
    backend = Script(lambda data: SOLUTION)
    record = drive(backend, author["Rounds"], branches=12, stop=author["two_ahead"], round_size=2)
    assert (record["algorithm"], record["answer"], record["stop_reason"]) == ("Rounds", "4", "certain")
    assert (record["num_branches"], record["stop_rule"], record["num_tokens"]) == (2, "two_ahead", 20)
    record = drive(backend, author["Rounds"], branches=12, stop="never", round_size=5)
    assert (record["num_branches"], record["stop_reason"]) == (12, "cap")
    answers = iter(range(99))
    record = drive(Script(lambda data: f"#### {next(answers)}"), author["Rounds"], branches=5, stop=author["two_ahead"])
    assert (record["num_branches"], record["stop_reason"]) == (5, "cap")


def test_a_record_has_other_defaults(author: dict[str, Any]) -> None:
    """Those of the class hold where none is given."""
    mine, plain = (parse_plan({"algorithm": author[name]}, has_reward=False) for name in ("rounds", "Rounds"))
    assert (mine.about.name, mine.spec.branches, mine.spec.stop.text) == ("rounds", 8, "beta")
    assert (plain.about.name, plain.spec.branches, plain.spec.stop.text) == ("Rounds", 16, "careful")
    assert mine.about.search_keys == plain.about.search_keys == ("round_size",)


@pytest.mark.parametrize("lost", [0.0, 0.3, 1.0])
def test_the_recipe_keeps_its_budget(author: dict[str, Any], lost: float) -> None:
    """However samples come, or do not come; each exit has a case where it is not taken."""
    for stop, sampler in (("never", noise(1, whole=True)), ("beta", solution("7", whole=True))):
        search = author["Rounds"](9, parse_stop(stop), round_size=4)
        assert run(search, sampler, room=3, lost=lost) <= 9
        if lost == 1.0:
            assert search.reason is Reason.FAILED
        elif lost == 0.0:
            assert search.reason is (Reason.CAP if stop == "never" else Reason.CERTAIN)


@pytest.mark.engine
def test_the_recipe_on_the_engine(engine: Any) -> None:
    """By `solve` and by `reason`, with our scheduler, which knows nothing of it."""
    names = follow(recipe(), engine=engine, prompts=PROMPTS, sampling=SAMPLING)
    for result in names["results"]:
        assert result.answer is not None
        assert f"#### {result.answer}" in result.text
        assert result.stop_reason in ("certain", "cap")
        first, second = ([vote["votes"] for vote in result.record["votes"]] + [0, 0])[:2]
        assert (result.stop_reason == "certain") is (first - second >= 2)
    assert names["results"].algorithm == "Rounds"
    assert any(result.num_branches < 12 for result in names["results"])
    with LocalEngine(engine) as backend:
        state = names["answer"].run(PROMPTS[0], backend=backend)
    p = state.ret_value
    assert p.answer is not None
    assert state.text() == PROMPTS[0] + state["solution"]
    assert p.stop_reason in ("certain", "cap")
    assert p.record["algorithm"] == "Rounds"


@pytest.mark.engine
def test_a_record_of_the_engine_s_is_run_there(engine: Any) -> None:
    """As its name would be; with a rule that cannot be sent it is driven from here."""
    options = {"branches": 3, "answer": "hash", "sampling": SAMPLING, "progress": False}
    (there,) = solve(engine, PROMPTS[:1], ALGORITHMS["self_consistency"], **options)
    (here,) = solve(engine, PROMPTS[:1], ALGORITHMS["self_consistency"], stop=lambda evidence: False, **options)
    assert (there.record["gang"] > 0, here.record["gang"]) == (True, 0)
    assert (here.stop_reason, here.num_branches) == ("cap", 3)


# What is missing or wrong is named


def without(rounds: type[Any], name: str) -> type[Any]:
    """The recipe's class but for one name."""
    return type("Lacking", (), {key: value for key, value in vars(rounds).items() if key not in (name, "__dict__")})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("state", "reason")])
def test_a_class_that_lacks_a_name(author: dict[str, Any], name: str) -> None:
    """The error says which; with it the class is taken."""
    field = {"algorithm": without(author["Rounds"], name), "answer": "hash"}
    with pytest.raises(FieldError, match=rf"dynasor.algorithm='Lacking' has no {name}; an algorithm has the names of"):
        parse_plan(field, has_reward=False)
    parse_plan(field | {"algorithm": without(author["Rounds"], "no such name")}, has_reward=False)


class NoCap:
    def __init__(self) -> None: ...


class Needy:
    """A key of its own without a default."""

    def __init__(self, cap: int, stop: Any, *, taste: str) -> None: ...


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"algorithm": NoCap}, "dynasor.algorithm='NoCap' cannot be started: too many positional arguments"),
        ({"algorithm": Needy}, "dynasor.algorithm='Needy' cannot be started: missing a required argument: 'taste'"),
        ({"algorithm": len}, "is not known; use one of"),
        ({"algorithm": "Rounds", "round_size": 2}, "dynasor.algorithm='Rounds' is not known; use one of"),
        ({"round_width": 2}, "dynasor.round_width is not a key of Rounds outside the engine; the keys are"),
        ({"vote": "reward"}, "dynasor.vote='reward' with algorithm 'Rounds': its constructor takes no `vote`"),
        ({"width": 2}, "dynasor.width=2 with algorithm 'Rounds': it says by itself how much"),
        ({"tenant": "a"}, "dynasor.tenant is not a key of Rounds"),
        ({"stop": lambda evidence: 0.9}, "stop=<lambda> returned 0.9, a float; a stopping rule says True or False"),
        ({"stop": lambda evidence: None}, "returned None, a NoneType"),
        ({"stop": 3}, "dynasor.stop=3 is a int"),
        ({"algorithm": "long_cot", "stop": lambda evidence: True}, "'long_cot' needs --scheduler dynasor"),
        ({"algorithm": AlgorithmRecord("x")}, "dynasor.algorithm='x' has nothing to run"),
    ],
)
def test_what_an_author_gets_wrong(author: dict[str, Any], field: dict[str, Any], message: str) -> None:
    """Before anything is sampled."""
    with pytest.raises(FieldError) as error:
        parse_plan({"algorithm": author["Rounds"], **field}, has_reward=False)
    assert message in str(error.value)


def test_a_class_that_is_judged_needs_rewards(author: dict[str, Any]) -> None:
    """Of a function of question and text; without one it is refused, and so is a function of something else."""

    class Judged(author["Rounds"]):  # type: ignore[misc]
        is_judged = True

    asked: list[tuple[str, str]] = []

    def reward(question: str, text: str) -> float:
        asked.append((question, text))
        return 0.5

    backend = Script(lambda data: SOLUTION)
    assert drive(backend, Judged, reward=reward, branches=3, stop="never")["rewards"] == [0.5] * 3
    assert asked == [("Q", SOLUTION)] * 3
    with pytest.raises(FieldError, match=r"dynasor.algorithm='Judged' without rewards"):
        drive(backend, Judged)
    for wrong, message in ((lambda text: 1.0, r"cannot be called as reward\(question, text\)"), (0.5, "is a float")):
        with pytest.raises(FieldError, match=message):
            solve("http://127.0.0.1:1", ["Q"], Judged, reward=wrong, progress=False)  # type: ignore[arg-type]


def test_a_search_that_asks_for_nothing_has_ended() -> None:
    """It need not say why, and its record needs no key."""

    class Once:
        is_stepwise = is_judged = False
        reason = None
        budget = 0
        certaindex = 1.0

        def __init__(self, cap: int, stop: Any) -> None:
            self.state = Tree()

        def expand(self, room: int) -> list[Expansion]:
            return [] if len(self.state) > 1 else [Expansion(QUESTION, 1)]

        def report(self, node: int, sample: Sample) -> None:
            self.state.add(node, sample)

        def lose(self, node: int, num_tokens: int = 0) -> None:
            self.state.add(node, Sample("", 0, is_terminal=False))

        def aggregate(self) -> Choice:
            return Choice(self.state[1].answer, 1) if self.state[1].is_terminal else Choice(None, None)

        def record(self) -> dict[str, Any]:
            return {}

    record = drive(Script(lambda data: SOLUTION), Once)
    assert (record["answer"], record["stop_reason"], record["num_branches"]) == ("4", "cap", 1)
    record = drive(Script(lambda data: None), Once)
    assert (record["answer"], record["stop_reason"], record["num_branches"]) == (None, "failed", 0)


# Names that nobody knows


def test_an_unknown_name_lists_all_there_are() -> None:
    """At the frontend every one; the engine's own door is in test_program.py."""
    with pytest.raises(FieldError) as error:
        find("oracle")
    assert all(name in str(error.value) for name in ALGORITHMS)
    assert set(ENGINE_ALGORITHMS) < set(ALGORITHMS)
    assert all(find(name).name == name for name in ALGORITHMS)


@pytest.mark.parametrize("record", ALGORITHMS.values(), ids=lambda record: record.name)
def test_a_record_says_what_its_class_does(record: AlgorithmRecord) -> None:
    """It needs rewards where its class is judged; self-consistency is where somebody judges."""
    if record.search is None:
        assert record.is_thought
    elif record.name != "self_consistency":
        assert record.needs_rewards is record.search.is_judged
    assert record.summary


# Rules of the author's own in programs of forks


@pytest.fixture
def backend(engine: Any) -> Iterator[LocalEngine]:
    with LocalEngine(engine) as running:
        yield running


def forked(backend: Any, stop: Any) -> Any:
    import sglang as sgl

    @sgl.function
    def program(s: Any) -> Any:
        s += PROMPTS[0]
        with reason(s, branches=8, width=2, answer="hash", stop=stop) as p:
            for branch in p.fork():
                branch += sgl.gen("steps", max_tokens=200, temperature=1.0)
        return p

    return program.run(backend=backend).ret_value


@pytest.mark.engine
def test_a_rule_of_forks(backend: LocalEngine) -> None:
    """This process counts, whatever the server could: it ends where the rule says, and not where it says no."""
    p = forked(backend, lambda evidence: len(evidence.recent) >= 3)
    assert (p.stop_reason, p.record["stop_rule"]) == ("certain", "<lambda>")
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 3
    p = forked(backend, lambda evidence: False)
    assert p.stop_reason == "cap"
    assert sum(p.votes.values()) + p.record["num_abstentions"] == 8


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_rule_that_fails_is_the_author_s_error(backend: LocalEngine) -> None:
    """Late, too: it ends the program and is raised where the author waits for it."""
    with pytest.raises(ZeroDivisionError):
        forked(backend, lambda evidence: 1 / (2 - len(evidence.recent)) > 9)
    with pytest.raises(FieldError, match="returned 1, a int"):
        forked(backend, lambda evidence: len(evidence.recent) if evidence.recent else False)


def test_an_object_may_be_a_rule() -> None:
    """One with settings of its own; it decides how wide a program starts, as any rule."""

    @dataclass
    class Ahead:
        votes: int

        def __call__(self, evidence: Evidence) -> bool:
            return evidence.lead >= self.votes

    for votes, needed in ((3, 3), (5, 5), (20, 0)):
        rule = own_rule(Ahead(votes))
        assert rule.text == "Ahead"
        assert votes_needed(Evidence((), 0, 16), rule) == needed


def test_an_own_rule_may_ask_for_the_order() -> None:
    """Programs with the same votes in another order are not the same to it."""
    rule = own_rule(lambda evidence: evidence.recent[-2:] == ("a", "a"))
    assert votes_needed(Evidence((2, 1), 0, 5, ("a", "b", "a")), rule) == 1
    assert votes_needed(Evidence((2, 1), 0, 5, ("a", "a", "b")), rule) == 2


def test_a_rule_of_numpy_is_a_rule() -> None:
    """Its booleans are no Python ones."""
    import numpy as np

    rule = own_rule(lambda evidence: np.mean([*evidence.rewards, 0.0]) > 0.2)
    assert rule.stops(Evidence((2,), 0, 2, rewards=(0.9, 0.9))) is True
    assert rule.stops(Evidence((2,), 0, 2)) is False

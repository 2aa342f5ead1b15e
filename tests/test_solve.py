"""Batches by `sglang_dynasor.solve` on the real engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from questions import held_out, prompt

import sglang_dynasor
from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend import LocalEngine
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key

pytestmark = pytest.mark.engine
QUESTIONS = held_out(16)
PROMPTS = [prompt(q.text) for q in QUESTIONS]
SAMPLING = {"temperature": 1.0, "max_new_tokens": 200}
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}


@pytest.fixture
def engine(shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True)


@pytest.fixture
def plain(shared_engine: Any) -> Any:
    return shared_engine()


def solve(engine: Any, num: int, algorithm: str, **options: Any) -> Any:
    return sglang_dynasor.solve(
        engine, PROMPTS[:num], algorithm, sampling=SAMPLING, answer="hash", progress=False, **options
    )


@pytest.mark.parametrize("algorithm", ["self_consistency", "best_of_n", "rebase", "mcts", "beam"])
def test_every_algorithm_solves_a_batch(engine: Any, algorithm: str) -> None:
    """One result per question, in order, with its text and a table."""
    judge = {} if algorithm == "self_consistency" else JUDGE
    results = solve(engine, 4, algorithm, branches=8, **judge)
    assert [result.question for result in results] == PROMPTS[:4]
    for result in results:
        assert result.answer is None or answer_key(extract_answer(result.text, "hash") or "") == answer_key(
            result.answer
        )
        assert 0 <= result.certaindex <= 1
        assert result.num_tokens > 0
        assert result.stop_reason in ("certain", "cap")
        assert result.num_branches <= 8
    assert results.num_tokens == sum(row["tokens"] for row in results.rows())
    lines = [line for line in results.table().splitlines() if not line.startswith("hint for ")]
    assert len(lines) == 6
    assert lines[-1].startswith(f"{algorithm}: 4 questions, {results.num_tokens} tokens")


@pytest.mark.parametrize("algorithm", ["self_consistency", "rebase", "mcts"])
def test_certain_questions_cost_less(engine: Any, algorithm: str) -> None:
    """The gate fires, and with `never` it does not: then the whole cap is used."""
    judge = {} if algorithm == "self_consistency" else JUDGE
    more = {} if algorithm == "rebase" else {"width": 4}  # else an idle engine runs all branches at once
    early = solve(engine, 8, algorithm, **judge, **more)
    whole = solve(engine, 8, algorithm, stop="never", **judge, **more)
    assert any(result.stop_reason == "certain" for result in early)
    assert all(result.stop_reason == "cap" for result in whole)
    # Tokens vary with what was sampled; branches that were never begun do not.
    assert sum(result.num_branches for result in early) < sum(result.num_branches for result in whole)


@pytest.mark.parametrize("algorithm", ["self_consistency", "best_of_n", "rebase"])
def test_it_degrades_to_plain_sglang(plain: Any, algorithm: str) -> None:
    """The same on a stock engine, with one warning where the server would have made the branches."""
    judge = {} if algorithm == "self_consistency" else JUDGE
    if algorithm == "rebase":
        results = solve(plain, 3, algorithm, **judge)
    else:
        with pytest.warns(UserWarning, match="does not run --scheduler dynasor"):
            results = solve(plain, 3, algorithm, **judge)
    assert len(results) == 3
    assert all(result.answer is not None for result in results)
    # The engine is the caller's again.
    assert plain.generate("Q", {"max_new_tokens": 1})["text"] is not None


@pytest.mark.parametrize("where", ["engine", "plain"])
def test_a_budget_goes_to_hard_questions(where: str, request: pytest.FixtureRequest) -> None:
    """Each has a branch, those whose answers differ have more, and together they take hardly more than there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = solve(request.getfixturevalue(where), 16, "self_consistency", budget_tokens=1600)
    num_branches: dict[bool, list[int]] = {True: [], False: []}  # by whether answers differ
    for result in results:
        assert result.record["budget_tokens"] == 1600
        assert result.stop_reason in ("budget", "certain", "cap")
        num_branches[len(result.record["votes"]) > 1].append(result.num_branches)
    assert all(min(nums) >= 1 for nums in num_branches.values())
    assert mean(num_branches[True]) > 1.5 * mean(num_branches[False])
    # Beyond first branches a quarter of the questions run one at once, none of which takes a hundred tokens here.
    assert 600 < results.num_tokens <= 1600 + 4 * 100


@pytest.mark.parametrize("where", ["engine", "plain"])
def test_a_large_budget_ends_nobody(where: str, request: pytest.FixtureRequest) -> None:
    """Each question goes on to its cap, as without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = solve(
            request.getfixturevalue(where), 3, "self_consistency", budget_tokens=10**6, branches=2, stop="never"
        )
    assert [(result.stop_reason, result.num_branches) for result in results] == [("cap", 2)] * 3


def test_the_prompts_of_one_request_share_its_budget(engine: Any) -> None:
    """Without an id; others have theirs, and a program alone has its own."""
    field = {"answer": "hash", "stop": "never", "budget_tokens": 600}
    # No branch is so cheap that a program comes to its cap.
    sampling = {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True}
    params = {**sampling, "custom_params": {"dynasor": field}}
    records = [out["meta_info"]["dynasor"] for out in engine.generate(PROMPTS[:6], params)]
    assert sum(record["num_tokens"] for record in records) <= 660
    assert len({record["budget_left_tokens"] for record in records}) == 1  # nothing was left for any, at once
    assert all(record["stop_reason"] == "budget" for record in records)
    alone = engine.generate(PROMPTS[0], params)["meta_info"]["dynasor"]
    assert alone["num_branches"] > 1
    assert alone["num_tokens"] <= 640
    named = field | {"budget": "mine", "budget_programs": 2}
    two = [{**sampling, "custom_params": {"dynasor": named}} for _ in range(2)]
    shared = [out["meta_info"]["dynasor"] for out in engine.generate(PROMPTS[:2], two)]
    assert sum(record["num_tokens"] for record in shared) <= 600
    other = {**sampling, "custom_params": {"dynasor": field | {"budget_tokens": 999}}}
    with pytest.raises(ValueError, match="its prompts share one budget"):
        engine.generate(PROMPTS[:2], [params, other])
    with pytest.raises(ValueError, match="'mine' was declared with budget_tokens=600"):
        engine.generate(PROMPTS[0], {**sampling, "custom_params": {"dynasor": named | {"budget_tokens": 999}}})
    with pytest.raises(ValueError, match=r"dynasor\.budget_tokens=40 is below one branch per question: 8 programs"):
        engine.generate(PROMPTS[:8], {**sampling, "custom_params": {"dynasor": field | {"budget_tokens": 40}}})


def test_long_cot_needs_the_scheduler(plain: Any) -> None:
    """It cannot degrade: a running thought is probed inside the engine."""
    with pytest.raises(FieldError, match="needs --scheduler dynasor"):
        solve(plain, 1, "long_cot")


def test_a_deadline_ends_a_search(engine: Any) -> None:
    """The best so far; a deadline far away changes nothing."""
    (late,) = solve(engine, 1, "mcts", deadline_s=0.05, stop="never", branches=64, width=1, **JUDGE)
    (early,) = solve(engine, 1, "mcts", deadline_s=600, stop="never", branches=2, **JUDGE)
    assert late.stop_reason == "deadline"
    assert late.num_branches < 64
    assert early.stop_reason == "cap"


def test_rewards_of_a_function(engine: Any) -> None:
    """In place of a judge; best-of-N is then driven from here."""
    right = str(QUESTIONS[0].answer)

    def reward(question: str, text: str) -> float:
        return float(extract_answer(text, "hash") == right)

    (result,) = solve(engine, 1, "best_of_n", stop="best:1", branches=64, reward=reward)
    assert result.answer == right
    assert result.certaindex == 1


def test_the_engine_is_the_author_s_again(engine: Any) -> None:
    """Two backends share an engine's loop; after `close` its own methods work."""
    with LocalEngine(engine) as one, LocalEngine(engine) as two:
        assert one.tokenize(" good") == two.tokenize(" good")
        assert solve(two, 1, "self_consistency", branches=3)[0].answer is not None
        assert solve(one, 1, "self_consistency", branches=3)[0].answer is not None
    assert engine.generate("Q", {"max_new_tokens": 2})["meta_info"]["completion_tokens"] <= 2


def test_backends_of_one_engine_close_in_any_order(engine: Any) -> None:
    """Two threads may solve on one engine: the first to end must not stop the loop under the other."""
    one, two = LocalEngine(engine), LocalEngine(engine)
    one.close()
    one.close()
    assert solve(two, 1, "self_consistency", branches=3)[0].answer is not None
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda num: solve(engine, num, "self_consistency", branches=3), (1, 2, 1, 3)))
    assert [len(results) for results in found] == [1, 2, 1, 3]
    two.close()
    assert engine.generate("Q", {"max_new_tokens": 2})["meta_info"]["completion_tokens"] <= 2


@pytest.mark.parametrize("where", ["engine", "plain"])
def test_one_question_that_is_too_long_costs_only_itself(where: str, request: pytest.FixtureRequest) -> None:
    """The others are solved; where every one is refused, that is the batch's error."""
    engine, long = request.getfixturevalue(where), "x " * 20_000
    options: dict[str, Any] = {"sampling": SAMPLING, "answer": "hash", "branches": 2, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = sglang_dynasor.solve(engine, [prompt(QUESTIONS[0].text), long], **options)
        assert results[0].answer is not None
        assert (results[1].stop_reason, results[1].answer, results[1].num_tokens) == ("failed", None, 0)
        assert "context length" in results[1].record["error"] or "longer than" in results[1].record["error"]
        assert "failed" in results.table()
        with pytest.raises(FieldError, match=r"context length|longer than"):
            sglang_dynasor.solve(engine, [long, long], **options)


def test_questions_may_come_from_a_generator(engine: Any) -> None:
    """In its order."""
    results = sglang_dynasor.solve(
        engine, (text for text in PROMPTS[:3]), sampling=SAMPLING, answer="hash", branches=2, progress=False
    )
    assert [result.question for result in results] == PROMPTS[:3]


@pytest.mark.parametrize("algorithm", ["self_consistency", "rebase"])
def test_chats_go_through_the_chat_template(engine: Any, algorithm: str) -> None:
    """They are solved as the prompts that the template makes of them; a reward function is given those."""
    chats = [[{"role": "user", "content": q.text}] for q in QUESTIONS[:2]]
    with LocalEngine(engine) as backend:
        assert [backend.render(chat) for chat in chats] == PROMPTS[:2]
    seen: list[str] = []

    def reward(question: str, text: str) -> float:
        seen.append(question)
        return 0.5

    judged: dict[str, Any] = {} if algorithm == "self_consistency" else {"reward": reward}
    results = sglang_dynasor.solve(
        engine, chats, algorithm, sampling=SAMPLING, answer="hash", branches=4, progress=False, **judged
    )
    assert [result.question for result in results] == [q.text for q in QUESTIONS[:2]]
    assert any(result.answer for result in results)
    assert set(seen) == (set(PROMPTS[:2]) if judged else set())


@pytest.mark.parametrize("begins", [True, False])
def test_a_chat_begins_once(begins: bool, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokenizer adds to every prompt is taken off the template's text; where it adds nothing, it stays."""
    tokenizer = SimpleNamespace(
        bos_token="<s>", bos_token_id=1, encode=lambda text: [1] if begins else [],
        apply_chat_template=lambda messages, **options: "<s>" + messages[0]["content"],
    )  # fmt: skip
    with LocalEngine(engine) as backend:
        monkeypatch.setattr(backend.engine.tokenizer_manager, "tokenizer", tokenizer)
        assert backend.render([{"role": "user", "content": "Q"}]) == ("Q" if begins else "<s>Q")


@pytest.mark.parametrize(
    "limit", [{"max_tokens": 1}, {"sampling": {"max_tokens": 1}}, {"sampling": {"max_new_tokens": 1}}]
)
@pytest.mark.parametrize("where", ["engine", "plain"])
def test_the_limit_has_two_names(where: str, limit: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """OpenAI's and SGLang's: one token of each branch, and a hint that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = sglang_dynasor.solve(
            request.getfixturevalue(where), PROMPTS[:2], answer="hash", branches=2, progress=False, **limit
        )
    for result in results:
        assert result.num_tokens == 2
        assert "at 1 tokens" in result.record["hint"]
        assert "128" not in result.record["hint"]
    assert "hint for 2 of 2: " in results.table()


@pytest.mark.parametrize("where", ["engine", "plain"])
@pytest.mark.parametrize(("limit", "is_said"), [({}, True), ({"max_tokens": 128}, False)])
def test_the_default_limit_is_said(
    where: str, limit: dict[str, Any], is_said: bool, request: pytest.FixtureRequest
) -> None:
    """Where nobody gave one and everything was cut at it; not where the author wrote 128, nor where there was an answer."""
    options: dict[str, Any] = {"branches": 2, "progress": False, "sampling": {"ignore_eos": True}, **limit}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = request.getfixturevalue(where)
        (cut,) = sglang_dynasor.solve(engine, PROMPTS[:1], answer="boxed", **options)
        (found,) = sglang_dynasor.solve(engine, PROMPTS[:1], answer="regex:(\\d+)", **options | {"sampling": {}})
    assert "at 128 tokens" in cut.record["hint"]
    assert ("128 is what holds where none is given" in cut.record["hint"]) == is_said
    assert "128 is" not in found.record.get("hint", "")


def test_no_questions(engine: Any) -> None:
    """An empty batch is an empty result."""
    results = solve(engine, 0, "self_consistency")
    assert len(results) == 0
    assert results.table() == "self_consistency: no questions"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: sglang_dynasor.solve(e, "Q"), "questions is one string"),
        (lambda e: sglang_dynasor.solve(e, {"role": "user", "content": "Q"}), "questions is a dict"),
        (lambda e: sglang_dynasor.solve(e, 3), "questions is a int"),
        (lambda e: sglang_dynasor.solve(e, [{"role": "user", "content": "Q"}]), "questions[0] is one message"),
        (lambda e: sglang_dynasor.solve(e, ["Q", 7]), "questions[1]=7 is neither"),
        (lambda e: sglang_dynasor.solve(e, [[]]), "questions[0]=[] is neither"),
        (lambda e: sglang_dynasor.solve(e, [["Q"]]), "questions[0] has the message 'Q'"),
        (lambda e: sglang_dynasor.solve(e, [[{"role": "user"}]]), "questions[0] has the message {'role': 'user'}"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], max_tokens=3, sampling={"max_tokens": 3}), "names for one limit"),
        (
            lambda e: sglang_dynasor.solve(e, ["Q"], sampling={"max_new_tokens": 3, "max_tokens": 3}),
            "sampling['max_new_tokens']=3, sampling['max_tokens']=3: they are names for one limit",
        ),
        (lambda e: sglang_dynasor.solve(e, ["Q"], max_tokens=0), "max_tokens=0 is no number"),
        (
            lambda e: sglang_dynasor.solve(e, ["Q"], sampling={"max_tokens": "9"}),
            "sampling['max_tokens']='9' is no number",
        ),
        (
            lambda e: sglang_dynasor.solve(e, ["Q"], sampling={"dynasor": {}}),
            "send the field as sampling_params.custom_params",
        ),
        (lambda e: sglang_dynasor.solve(e, ["Q"], concurrency=0), "concurrency=0"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], "oracle"), "dynasor.algorithm='oracle'"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], branchs=2), "dynasor.branchs is not a key"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], sampling={"n": 4}), "sampling has 'n'"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], seed="7"), "seed='7' is a str"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], program="p"), "dynasor.program='p': ids are made for you"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], budget="b"), "dynasor.budget='b': ids are made for you"),
        (
            lambda e: sglang_dynasor.solve(e, ["Q", "Q"], budget_tokens=1),
            "budget_tokens=1 is below one branch per question",
        ),
        (lambda e: sglang_dynasor.solve(e, ["Q"], budget_tokens=-4), "dynasor.budget_tokens=-4 is below 1"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], budget_tokens="9"), "dynasor.budget_tokens='9' is a str"),
        (
            lambda e: sglang_dynasor.solve(e, ["Q"], "mcts", budget_tokens=9, **JUDGE),
            "dynasor.budget_tokens=9 with algorithm",
        ),
        (
            lambda e: sglang_dynasor.solve(e, ["Q"], "beam", reward=lambda question, text: 1.0, width=2),
            "dynasor.width=2 with algorithm 'beam'",
        ),
        (lambda e: sglang_dynasor.solve(e, ["Q"], "rebase"), "without rewards"),
        (lambda e: sglang_dynasor.solve(e, ["Q"], sampling={"temperature": 0}, progress=False), "greedy"),
    ],
)
def test_bad_input_is_named(engine: Any, call: Any, message: str) -> None:
    """To the caller, at once; the engine goes on."""
    with pytest.raises(FieldError) as error:
        call(engine)
    assert message in str(error.value)
    assert len(solve(engine, 1, "self_consistency", branches=1)) == 1


def test_importing_the_package_stays_light() -> None:
    """Every process of the engine imports it: neither SGLang nor torch comes with it."""
    code = "import sys, sglang_dynasor; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert callable(sglang_dynasor.solve)
    with pytest.raises(AttributeError, match="no attribute 'resolve'"):
        _ = sglang_dynasor.resolve


def test_an_engine_of_the_calling_loop_is_refused(engine: Any) -> None:
    """A notebook's: its loop would wait for itself."""

    async def call() -> None:
        theirs = SimpleNamespace(loop=asyncio.get_running_loop(), server_args=engine.server_args)
        with pytest.raises(FieldError, match="belongs to the event loop that is calling"):
            solve(theirs, 1, "self_consistency")

    asyncio.run(call())

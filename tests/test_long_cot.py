"""A long chain of thought: when it may be closed, and what probing costs and changes in the real engine."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from engines import assert_nothing_left, status_of
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st
from questions import held_out, prompt

from sglang_dynasor.engine import validation
from sglang_dynasor.engine.probe import LEADS, thought_tokens
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.answers import is_complete
from sglang_dynasor.policy.program import BranchState, Program, StopReason
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import (
    PRICE_FRAC,
    Trial,
    agreement,
    hesitates,
    is_settled,
    may_settle,
    next_probe_tokens,
    trial_answer,
)
from sglang_dynasor.policy.thought_spec import ThoughtSpec

QUESTIONS = [q for q in held_out(40) if q.num_steps <= 4]
EASIEST = sorted(QUESTIONS, key=lambda q: q.num_steps)
# The reasoner's long mode: a few drafts of some 50 tokens, then </think> and the answer.
FIELD = {
    "algorithm": "long_cot", "answer": "hash", "think_end": "</think>\n####", "probe_suffix": "</think>\n####",
    "probe_tokens": 16, "min_tokens": 16, "agree": 2, "exit": "trial:0.9",
}  # fmt: skip
NEVER = {**FIELD, "agree": 64}
TOGETHER: dict[str, Any] = {"branches": 8, "stop": "trials:0.8", "hold_tokens": 16} | {
    key: value for key, value in FIELD.items() if key not in ("agree", "exit")
}
THOUGHT = ThoughtSpec(agree=3, level=0.9, min_tokens=0, every_tokens=8)


def trial(key: str | None, probability: float = 0.99, num_tokens: int = 10) -> Trial:
    return Trial(key, key, probability, num_tokens)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], False),
        ([("1", 0.99)] * 2, False),  # too few
        ([("1", 0.99)] * 3, True),
        ([("2", 0.99), *[("1", 0.99)] * 3], True),
        ([("1", 0.99), ("2", 0.99), ("1", 0.99)], False),  # no agreement
        ([("1", 0.99), ("1", 0.89), ("1", 0.99)], False),  # one of them unlikely
        ([("1", 0.99), (None, 0.99), ("1", 0.99)], False),  # one gave no answer
        ([(None, 0.99)] * 3, False),  # to agree on nothing is not to agree
    ],
)
def test_a_thought_settles_by_agreement_and_probability(trials: Any, expected: bool) -> None:
    """Both are needed; the authors' code returned True on every path."""
    assert is_settled([trial(*t) for t in trials], THOUGHT) is expected


@given(
    st.lists(st.tuples(st.sampled_from(["1", "2", None]), st.sampled_from([0.5, 0.99])), max_size=6), st.integers(1, 4)
)
def test_one_more_trial_could_settle_it_or_not(seen: list[tuple[str | None, float]], agree: int) -> None:
    """Exactly where there is a trial that would; so it is for a program of one chain."""
    thought, trials = replace(THOUGHT, agree=agree), [trial(*t) for t in seen]
    expected = any(is_settled([*trials, trial(key)], thought) for key in ("1", "2"))
    assert may_settle(trials, thought) is expected
    program = chains(1, agree=agree)
    program.branches[0].trials = trials
    assert program.may_close(0) is expected


@given(st.lists(st.sampled_from(["1", "2", None]), max_size=12), st.integers(1, 6))
def test_agreement_is_a_share(keys: list[str | None], window: int) -> None:
    """Within [0, 1]; 1 exactly where the whole window says the same."""
    trials = [trial(key) for key in keys]
    share = agreement(trials, window)
    assert 0 <= share <= 1
    last = keys[-window:]
    assert (share == 1) == (len(last) == window and last[-1] is not None and len(set(last)) == 1)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80)), max_size=30), st.integers(0, 500), st.integers(1, 40)
)
def test_asking_keeps_to_its_price(asked: list[tuple[int, int]], min_tokens: int, num_suffix_tokens: int) -> None:
    """However dear probes are, together they pass their share of the thought by the last one's excess only."""
    thought = ThoughtSpec(agree=2, level=0.9, min_tokens=min_tokens, every_tokens=None)
    costs, num_tokens = list[int](), 0
    for cost, late in asked:
        expected = sum(costs) / len(costs) if costs else num_suffix_tokens + 4
        num_tokens = next_probe_tokens(thought, num_tokens, costs, num_suffix_tokens) + late  # no line ended before
        assert num_tokens >= min_tokens
        costs.append(cost)
        assert sum(costs) <= PRICE_FRAC * num_tokens + max(0.0, cost - expected) + 1e-9


def test_the_client_may_say_how_often() -> None:
    """Then no price is asked; the first time is `min_tokens`, or one interval where that is 0."""
    assert next_probe_tokens(THOUGHT, 0, [], 5) == 8
    assert next_probe_tokens(THOUGHT, 8, [100], 5) == 16
    assert next_probe_tokens(THOUGHT, 13, [100], 5) == 16  # asked late, at the end of a line: no later the next time
    assert next_probe_tokens(THOUGHT, 17, [100], 5) == 24
    later = ThoughtSpec(agree=3, level=0.9, min_tokens=30, every_tokens=8)
    assert next_probe_tokens(later, 0, [], 5) == 30


@pytest.mark.parametrize("text", ["wait, no", "Hmm.", "38 but", "No"])
def test_hesitation(text: str) -> None:
    """A trial that takes itself back is none."""
    assert hesitates(text)


@pytest.mark.parametrize("text", ["38", "button", "nothing", "know", "awaits", "holdings"])
def test_hesitation_is_words(text: str) -> None:
    """Not a part of other words."""
    assert not hesitates(text)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("no}", "no", False),
        ("\\text{No}}", "\\text{No}", False),
        ("no} wait", "no", True),
        ("no, wait", "no, wait", True),
        ("yes} no", "yes", True),
        ("No.", "no", False),  # as `yes_no` reads it
        ("NO\n", "no", False),
        ("\\boxed{NO}", "NO", False),
        ("No. But wait", "no", True),
        ("No, no.", "no", True),
        ("I know: no.", "no", False),
        ("I know: maybe.", "no", False),
        ("Hold on: no.", "no", True),
    ],
)
def test_no_may_be_an_answer(text: str, answer: str, expected: bool) -> None:
    """To a question of yes or no; what is said besides counts as ever."""
    assert hesitates(text, answer) is expected


@pytest.mark.parametrize(
    ("lead", "text", "extractor", "expected"),
    [
        ("####", " 3", "hash", False),
        ("####", " 38\n", "hash", True),
        ("####", "\n", "hash", False),  # a line that has not begun
        ("\\boxed{", "\\frac{1}{2", "boxed", False),
        ("\\boxed{", "\\frac{1}{2}}", "boxed", True),
        ("x\n\\boxed{", "3\n", "auto", False),
        ("The answer is (", "B", "choice", True),
        ("The answer is (", "", "choice", False),
        ("a\nThe answer is ", "12", "number", False),
        ("a\nThe answer is ", "12\n", "number", True),
        ("a\nThe answer is ", "12.", "number", False),  # 12.5?
        ("a\nThe answer is ", "12. ", "number", True),
        ("a\nThe answer is ", "12, ", "number", False),
        ("a\nThe answer is ", "12, so", "number", True),
        ("a\nThe answer is ", "12 ", "number", False),  # 12 000?
        ("a\nThe answer is ", "12 app", "number", False),  # 12 million?
        ("a\nThe answer is ", "12 apples ", "number", True),
        ("a\nThe answer is ", "5 + 3 = ", "number", False),
        ("a\nThe answer is ", "5 + 3 = 8. ", "number", True),
        ("so ", "\\boxed 1", "boxed", False),
        ("so ", "\\boxed 1 ", "boxed", True),
    ],
)
def test_an_answer_is_complete_when_it_has_ended(lead: str, text: str, extractor: str, expected: bool) -> None:
    """Digits may follow digits; braces must close."""
    assert is_complete(lead, text, extractor) is expected


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("last_line", "42.", "42."),
        ("last_line", "\n42\n", "42"),
        ("last_line", "", None),  # what asks is no answer
        ("number", "42. Let me double-check: 40 + 2", "42"),
        ("number", "5 + 3 = 8.", "8"),
        ("number", "42 - 40 is 2 m", "2"),
        ("number", "2 x 3 = 6.", "6"),
        ("number", "12 mod 5 = 2.", "2"),
        ("number", "5 x ", None),  # more may come
        ("number", "5 xylophones, 2 drums", "5"),
        ("number", "-5\n", "-5"),
        ("number", "5\n- 3", "5"),
        ("number", "$1,250$ because of 3", "1,250"),
        ("number", "*42* of 50", "42"),
        ("number", "x_2 is 5", "5"),
        ("number", "not known", None),
        ("number", "<think>7", None),
        ("number", "7</think> 8", "8"),
        ("yes_no", "No.", "no"),
        ("choice", "B) as", "B"),
    ],
)
def test_a_trial_answers_after_what_asked_it(extractor: str, text: str, answer: str | None) -> None:
    """Its line is without the words that asked, as a finished chain's may be; its number is the first, for it goes on."""
    lead = f"</think>\n\n{LEADS[extractor]}"
    assert trial_answer(lead, text, extractor) == answer


def chains(num: int, **field: Any) -> Program:
    program = Program("p", parse_field({**FIELD, "branches": num, "agree": 3, **field}, 64))
    for _ in range(num):
        program.start_branch()
    return program


def test_the_only_chain_speaks_once_it_has_settled() -> None:
    """Its answer is the program's, and the program was certain."""
    program = chains(1)
    assert [program.see_trial(0, trial("7")) for _ in range(3)] == [None, None, 0]
    assert program.speaker == 0
    assert program.branches[0].closed_at == 10
    assert program.reason is None
    assert program.see_trial(0, trial("7")) is None  # once
    program.finish(0, "#### 7", 30)
    assert program.reason is StopReason.CERTAIN
    assert program.winner == 0
    record = program.record()
    assert record["certaindex"] == 1.0
    assert record["closed_at_tokens"] == [10]
    assert len(record["trials"]) == 3


def test_a_chain_that_never_settles_uses_its_length() -> None:
    """Different trials close nothing."""
    program = chains(1)
    assert [program.see_trial(0, trial(str(i))) for i in range(20)] == [None] * 20
    program.finish(0, "#### 7", 30)
    assert program.speaker is None
    assert program.reason is StopReason.CAP


def test_one_of_several_chains_that_settles_is_closed() -> None:
    """It goes on to vote, and does not speak for the program; what all say together is in test_chains.py."""
    program = chains(8, stop="never")
    assert [program.see_trial(3, trial("7")) for _ in range(3)] == [None, None, 3]
    assert program.speaker is None
    assert program.branches[3].closed_at == 10
    assert program.branches[3].state is BranchState.IN_FLIGHT


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"agree": 0}, "dynasor.agree=0 is outside"),
        ({"exit": "trial:2"}, "dynasor.exit='trial:2' is no rule"),
        ({"exit": "published:3"}, "is no rule"),
        ({"exit": "soon"}, "is no rule"),
        ({"effort": "huge"}, "dynasor.effort='huge' is not known"),
        ({"probe_tokens": 0}, "dynasor.probe_tokens=0 is outside"),
        ({"think_end": "x" * 2000}, "dynasor.think_end has 2000 characters"),
        ({"program": "p"}, "dynasor.program='p' with algorithm 'long_cot' is not supported"),
        ({"weak_frac": 0.1}, "is not supported"),
        ({"algorithm": "self_consistency"}, "dynasor.exit='trial:0.9' is for algorithm 'long_cot'"),
    ],
)
def test_wrong_fields_are_named(field: dict[str, Any], message: str) -> None:
    """Each names the key, the value and what is allowed."""
    with pytest.raises(FieldError, match=message.replace("(", r"\(")):
        parse_field({**FIELD, **field}, 64)


def test_effort_sets_what_is_not_set() -> None:
    """More effort asks for more agreement; a key of its own wins; the published rule is what was published."""
    low, high = (parse_field({"algorithm": "long_cot", "effort": effort}, 64).thought for effort in ("low", "high"))
    assert low
    assert high
    assert low.agree < high.agree
    assert low.level < high.level
    assert low.min_tokens < high.min_tokens
    own = parse_field({"algorithm": "long_cot", "effort": "high", "agree": 2}, 64).thought
    assert own
    assert own.agree == 2
    assert own.level == high.level
    published = parse_field({"algorithm": "long_cot", "exit": "published"}, 64).thought
    assert published
    assert (published.agree, published.level, published.min_tokens, published.every_tokens) == (3, 0, 0, 64)


def tokenizer_of(vocabulary: set[str], template: str = "") -> Any:
    encode = lambda text, add_special_tokens: [ord(c) for c in text]  # noqa: E731
    return SimpleNamespace(get_vocab=lambda: dict.fromkeys(vocabulary, 0), chat_template=template, encode=encode)


class Tokenizer(SimpleNamespace):
    """A tokenizer may be hashed."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_the_end_of_a_thought_is_the_model_s_own() -> None:
    """From its vocabulary or its chat template; a model without one is refused, unless the client says how."""

    def made(vocabulary: set[str], template: str = "") -> Any:
        return Tokenizer(**vars(tokenizer_of(vocabulary, template)))

    bare = ThoughtSpec(3, 0.9, 0, 8)
    assert thought_tokens(bare, "boxed", made({"</think>"})).lead.startswith("</think>\n\n**Final Answer**")
    assert thought_tokens(bare, "hash", made(set(), "...[/THINK]")).mark == "[/THINK]"
    with pytest.raises(FieldError, match="send think_end"):
        thought_tokens(bare, "hash", made(set()))
    with pytest.raises(FieldError, match="send probe_suffix"):
        thought_tokens(bare, "regex:(.)", made({"</think>"}))
    own = ThoughtSpec(3, 0.9, 0, 8, suffix="so:", end="done")
    assert thought_tokens(own, r"regex:(\d)", made(set()))[2:4] == ("so:", "done")
    waits = ThoughtSpec(3, 0.9, 0, 8, end="done", word="wait")
    assert thought_tokens(waits, "hash", made(set())).word_ends == {ord("t")}
    silent = Tokenizer(**{**vars(tokenizer_of(set())), "encode": lambda text, add_special_tokens: []})
    with pytest.raises(FieldError, match="probe_suffix is no token"):
        thought_tokens(own, "hash", silent)
    with pytest.raises(FieldError, match="is white space"):
        thought_tokens(replace(bare, end="\n\n"), "hash", made(set()))


@pytest.mark.parametrize(
    ("extractor", "suffix", "is_answered"),
    [
        ("choice", "with (A) or (B). My answer is (", True),
        ("choice", "My answer is (", False),
        ("number", "For question 7 the answer is ", True),
        ("number", "The answer is ", False),
        (r"regex:(\d+)", "Of question 7: ", True),
        ("boxed", "As \\boxed{x}: \\boxed{", True),
        ("boxed", "As \\boxed{}: \\boxed{", False),  # an empty box is none
        ("boxed", "\\boxed{", False),
        ("auto", "\\boxed{", False),
        ("hash", "#### 1", True),
        ("hash", "####", False),
        ("last_line", "So it is ", False),
    ],
)
def test_a_suffix_may_only_ask(extractor: str, suffix: str, is_answered: bool) -> None:
    """One that has an answer in it would give that one in every trial, and close the thought by it."""
    thought = ThoughtSpec(3, 0.9, 0, 8, suffix=suffix, end="</think>")
    tokenizer = Tokenizer(**vars(tokenizer_of(set())))
    if is_answered:
        with pytest.raises(FieldError, match="has an answer in it already"):
            thought_tokens(thought, extractor, tokenizer)
    else:
        assert thought_tokens(thought, extractor, tokenizer).lead == suffix


# In the real engine


def ask(engine: Any, question: Any, field: dict[str, Any] | None, **params: Any) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": 400, **params}
    if field is not None:
        sampling["custom_params"] = {"dynasor": field}
    return engine.generate(prompt(question.text, think=True), sampling)


@pytest.fixture(params=[{}, {"disable_overlap_schedule": True, "page_size": 16}], ids=["overlap", "no overlap, pages"])
def engine(request: Any, shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True, **request.param)


@pytest.mark.engine
def test_a_probed_thought_is_the_same_thought(engine: Any, request: Any) -> None:
    """Where the rule never fires the greedy output has not one token changed; probes read the parent's KV."""
    before = status_of(engine)
    for question in QUESTIONS[:4]:
        plain, probed = ask(engine, question, None), ask(engine, question, NEVER)
        assert probed["output_ids"] == plain["output_ids"]
        assert probed["text"] == plain["text"]
        record = probed["meta_info"]["dynasor"]
        assert record["num_probes"] >= 2
        assert record["closed_at_tokens"] == [None]
        assert record["stop_reason"] == "cap"
        assert record["num_tokens"] == len(plain["output_ids"])
        assert probed["meta_info"]["finish_reason"] == plain["meta_info"]["finish_reason"]
    status = status_of(engine)
    read = status["num_probe_tokens_read"] - before["num_probe_tokens_read"]
    cached = status["num_probe_tokens_cached"] - before["num_probe_tokens_cached"]
    pages = "pages" in request.node.callspec.id
    assert cached / read >= (0.85 if pages else 0.99), (cached, read)  # but for a page that is not full
    assert status["num_probe_waves"] - before["num_probe_waves"] >= 8  # a thought alone waits for nobody
    assert_nothing_left(engine)


@pytest.mark.engine
def test_asking_costs_three_percent(engine: Any, request: Any) -> None:
    """By default, however cheap or dear the probes of this model are; the output stays the same to the token."""
    field = {**NEVER, "min_tokens": 0, "think_end": "</never>", "probe_suffix": "\n####"}  # a thought that has no end
    del field["probe_tokens"]
    before = status_of(engine)
    for question in QUESTIONS[:2]:
        plain, probed = (ask(engine, question, f, max_new_tokens=800, ignore_eos=True) for f in (None, field))
        assert probed["output_ids"] == plain["output_ids"]
        record = probed["meta_info"]["dynasor"]
        assert record["num_probes"] >= 1
        assert 0 < record["num_probe_tokens"] <= PRICE_FRAC * record["num_tokens"]
    status = status_of(engine)
    read, cached = (status[key] - before[key] for key in ("num_probe_tokens_read", "num_probe_tokens_cached"))
    assert cached / read >= (0.94 if "pages" in request.node.callspec.id else 0.99), (cached, read)
    assert_nothing_left(engine)


@pytest.mark.engine
def test_probes_are_computed_together(engine: Any) -> None:
    """Each prefill pass holds up all that decode, so the probes of many thoughts share them."""
    before = status_of(engine)["num_probe_waves"]

    async def play() -> list[Any]:
        field = {"temperature": 1.0, "max_new_tokens": 200, "ignore_eos": True, "custom_params": {"dynasor": NEVER}}
        text = prompt(QUESTIONS[0].text, think=True)
        return await asyncio.gather(*(engine.async_generate(text, field) for _ in range(16)))

    num_probes = sum(out["meta_info"]["dynasor"]["num_probes"] for out in engine.loop.run_until_complete(play()))
    num_waves = status_of(engine)["num_probe_waves"] - before
    assert num_probes >= 48
    assert num_waves * 2 <= num_probes
    assert_nothing_left(engine)


@pytest.mark.engine
def test_a_settled_thought_is_closed(engine: Any) -> None:
    """It ends where it was asked, by the model's own words, and an answer follows as if the model had stopped there."""
    num_closed = 0
    for question in QUESTIONS[:5]:
        plain, short = ask(engine, question, None), ask(engine, question, FIELD)
        record = short["meta_info"]["dynasor"]
        (closed_at,) = record["closed_at_tokens"]
        if closed_at is None:
            assert short["text"] == plain["text"]
            continue
        num_closed += 1
        assert short["output_ids"][:closed_at] == plain["output_ids"][:closed_at]
        thought, _, answer = short["text"].rpartition("</think>\n")
        assert plain["text"].startswith(thought)
        assert answer.startswith("#### ")
        assert [t["answer"] for t in record["trials"][-2:]] == [record["answer"]] * 2
        assert record["stop_reason"] == "certain"
        assert record["certaindex"] == 1.0
        assert short["meta_info"]["finish_reason"]["type"] == "stop"
        assert closed_at < record["num_tokens"] < len(plain["output_ids"])
        assert short["meta_info"]["completion_tokens"] == record["num_tokens"]
    assert num_closed >= 2
    assert_nothing_left(engine)


@pytest.mark.engine
def test_a_thought_is_asked_where_it_hesitates(engine: Any) -> None:
    """With a probe_word only right after that word; a thought that never says it is never asked."""
    field = {**NEVER, "probe_word": "wait", "probe_tokens": 1, "min_tokens": 0}
    out = ask(engine, QUESTIONS[2], field)
    record, tokenizer = out["meta_info"]["dynasor"], engine.tokenizer_manager.tokenizer
    places = [tokenizer.decode(out["output_ids"][: trial["tokens"]]) for trial in record["trials"]]
    assert record["num_probes"] >= 1
    assert all(text.endswith("wait") for text in places)
    assert ask(engine, QUESTIONS[2], field | {"probe_word": "apples"})["meta_info"]["dynasor"]["num_probes"] == 0


@pytest.mark.engine
def test_chains_that_settle_vote(engine: Any) -> None:
    """Eight chains, sampled, each closed by its own trials: the votes stop most programs early, and nothing is left."""
    num_early = 0
    for question in QUESTIONS[:4]:
        out = ask(engine, question, {**FIELD, "branches": 8, "stop": "predictive:0.1"}, temperature=1.0)
        record = out["meta_info"]["dynasor"]
        assert record["answer"] is not None
        assert out["text"].rstrip().endswith(record["answer"])
        num_early += record["stop_reason"] == "certain"
        assert sum(record["branch_tokens"]) == record["num_tokens"]
        assert "shares" not in record
    assert num_early >= 2
    # A vote may come before any of them is closed: where it decides nothing most are.
    field = {**FIELD, "branches": 8, "stop": "never"}
    whole = ask(engine, QUESTIONS[3], field, temperature=1.0)["meta_info"]["dynasor"]
    assert any(at is not None for at in whole["closed_at_tokens"])
    assert_nothing_left(engine)


@pytest.mark.engine
def test_chains_decide_together(engine: Any) -> None:
    """Once seven of eight have given one answer for 16 tokens the program is over, and the others end where they are."""
    num_decided = 0
    for question in EASIEST[5:8]:
        out = ask(engine, question, TOGETHER, temperature=1.0)
        record = out["meta_info"]["dynasor"]
        asked_at, reasons = record["asked_at_tokens"], record["finish_reasons"]
        assert record["exit"] == "together"
        assert record["num_branches"] == len(asked_at) == 8
        assert record["num_probes"] >= sum(map(len, asked_at)) >= 7
        assert out["text"].rstrip().endswith(record["answer"])
        assert reasons[record["branch"]] in ("stop", "length")
        assert ("ended" in reasons) == (record["stop_reason"] == "certain")
        if record["stop_reason"] == "certain":
            num_decided += 1
            assert record["shares"][-1]["share"] >= 0.8
    assert num_decided >= 1
    assert_nothing_left(engine)


@pytest.mark.engine
def test_one_of_them_speaks(engine: Any) -> None:
    """Where no thought ends by itself one is closed at its last trial, and goes on alone."""
    num_decided = 0
    for question in EASIEST[:3]:
        field = {**TOGETHER, "think_end": "</never>"}
        out = ask(engine, question, field, temperature=1.0, max_new_tokens=200, ignore_eos=True)
        record = out["meta_info"]["dynasor"]
        speaker, closed_at = record["branch"], record["closed_at_tokens"]
        if record["stop_reason"] != "certain":
            assert closed_at == [None] * 8
            continue
        num_decided += 1
        last = record["shares"][-1]
        assert record["certaindex"] == last["share"] >= 0.8
        assert closed_at == [record["asked_at_tokens"][i][-1] if i == speaker else None for i in range(8)]
        assert record["trials"][-1]["answer"] == last["answer"]
        assert record["finish_reasons"] == ["length" if i == speaker else "ended" for i in range(8)]
        assert out["text"].count("</never>") == 1
        assert all(record["branch_tokens"][i] < record["branch_tokens"][speaker] for i in range(8) if i != speaker)
    assert num_decided >= 1
    assert_nothing_left(engine)


@pytest.mark.engine
@pytest.mark.parametrize(
    "field", [{"hold_tokens": 65_536}, {"answer": "boxed"}], ids=["not long enough", "an answer that nobody gives"]
)
def test_chains_that_do_not_decide_come_to_their_ends(engine: Any, field: dict[str, Any]) -> None:
    """They are asked all the same; none is closed or ended, and all vote."""
    record = ask(engine, QUESTIONS[0], {**TOGETHER, **field}, temperature=1.0)["meta_info"]["dynasor"]
    assert record["num_probes"] >= 8
    assert record["closed_at_tokens"] == [None] * 8
    assert record["stop_reason"] == "cap"
    assert set(record["finish_reasons"]) <= {"stop", "length"}
    assert sum(vote["votes"] for vote in record["votes"]) + record["num_abstentions"] == 8
    if "answer" in field:
        assert {entry["share"] for entry in record["shares"]} <= {0.0}
    else:
        assert max(entry["share"] for entry in record["shares"]) > 0
    assert_nothing_left(engine)


@pytest.mark.engine
def test_probes_do_not_starve_in_a_full_batch(start_engine: Any) -> None:
    """Four rows, and plain requests that would fill them all: thoughts are asked nevertheless."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, max_running_requests=4)

    async def play() -> list[Any]:
        text = prompt(QUESTIONS[0].text, think=True)
        field = {"temperature": 0.0, "max_new_tokens": 150, "ignore_eos": True}
        probed = field | {"custom_params": {"dynasor": NEVER}}
        thoughts = [engine.async_generate(text, probed) for _ in range(2)]
        crowd = [engine.async_generate(text, field) for _ in range(12)]
        return (await asyncio.gather(*thoughts, *crowd))[:2]

    for out in engine.loop.run_until_complete(play()):
        assert out["meta_info"]["dynasor"]["num_probes"] >= 2
    assert_nothing_left(engine)


@pytest.mark.engine
def test_chains_that_would_fill_the_batch_leave_rows_to_their_probes(start_engine: Any) -> None:
    """Though all of them are needed: probes that find no row would not be asked while they run."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, max_running_requests=8)
    field = {**NEVER, "branches": 8, "stop": "never"}
    out = ask(engine, QUESTIONS[0], field, temperature=1.0, max_new_tokens=150, ignore_eos=True)
    record = out["meta_info"]["dynasor"]
    assert record["num_branches"] == 8
    assert record["gang"] == 7
    assert record["num_probes"] >= 8
    assert_nothing_left(engine)


@pytest.mark.engine
def test_a_thought_without_room_for_an_answer_is_not_closed(engine: Any) -> None:
    """The limit on tokens holds: nothing is appended beyond it."""
    out = ask(engine, QUESTIONS[3], {**FIELD, "agree": 1, "min_tokens": 30}, max_new_tokens=31)
    assert len(out["output_ids"]) <= 31
    assert out["meta_info"]["dynasor"]["closed_at_tokens"] == [None]
    assert_nothing_left(engine)


@pytest.mark.engine
def test_deadlines_and_aborts_leave_nothing(engine: Any) -> None:
    """Also while a probe is under way."""

    async def play() -> None:
        calls = [
            asyncio.ensure_future(
                engine.async_generate(
                    prompt(QUESTIONS[i % 8].text, think=True),
                    {"temperature": 0.0, "max_new_tokens": 900, "ignore_eos": True,
                     "custom_params": {"dynasor": {**NEVER, "probe_tokens": 4, "min_tokens": 1, "deadline_s": 0.3 + 0.1 * i}}},
                    rid=f"thought{i}",
                )
            )
            for i in range(6)
        ]  # fmt: skip
        await asyncio.sleep(0.4)
        for i in (1, 3, 5):
            engine.tokenizer_manager.abort_request(f"thought{i}")
        done = await asyncio.gather(*calls, return_exceptions=True)
        for i in (0, 2, 4):
            assert done[i]["meta_info"]["dynasor"]["stop_reason"] == "deadline"

    engine.loop.run_until_complete(play())
    assert_nothing_left(engine)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("params", "message"),
    [({"regex": "a*"}, "regex with dynasor.algorithm='long_cot'"), ({"n": 2}, "is not supported")],
)
def test_what_cannot_be_closed_is_refused(engine: Any, params: dict[str, Any], message: str) -> None:
    """Constrained output, and choices of the client's own."""
    with pytest.raises((ValueError, HTTPException), match=message):
        ask(engine, QUESTIONS[0], FIELD, temperature=1.0, **params)


@pytest.mark.engine
def test_logprobs_of_a_closed_thought_are_refused(engine: Any) -> None:
    """Its end was given, not sampled; without logprobs the same request is answered."""
    text = prompt(QUESTIONS[0].text, think=True)
    params: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 60, "custom_params": {"dynasor": NEVER}}
    with pytest.raises((ValueError, HTTPException), match="return_logprob with"):
        engine.generate(text, params, return_logprob=True)
    assert engine.generate(text, params)["text"]


@pytest.mark.engine
def test_without_a_radix_cache_thoughts_are_refused(start_engine: Any) -> None:
    """Probes would compute the whole thought each time; other programs run there."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, disable_radix_cache=True)
    with pytest.raises((ValueError, HTTPException), match="--disable-radix-cache"):
        ask(engine, QUESTIONS[0], FIELD)
    assert ask(engine, QUESTIONS[0], {"answer": "hash", "branches": 2}, temperature=1.0)["text"]


@pytest.mark.parametrize("is_stripped", [True, False])
def test_thoughts_that_the_cache_does_not_keep_are_refused(monkeypatch: pytest.MonkeyPatch, is_stripped: bool) -> None:
    """SGLang would free KV that probes have published."""
    monkeypatch.setattr(validation, "get_serving", lambda: SimpleNamespace(strip_thinking_cache=is_stripped))
    monkeypatch.setattr(validation, "get_memory", lambda: SimpleNamespace(disable_radix_cache=False))
    manager = SimpleNamespace(tokenizer=Tokenizer(**vars(tokenizer_of(set()))))
    expected = pytest.raises(FieldError, match="--strip-thinking-cache") if is_stripped else nullcontext()
    with expected:
        validation.check_spec(parse_field(FIELD, 64), manager)


@pytest.mark.engine
def test_n_choices_are_a_program(start_engine: Any) -> None:
    """Choices that the vote no longer needs are cut short or empty; without agreement every choice is whole."""
    # With seeds read, n choices of one request would all be the same.
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, enable_deterministic_inference=False)
    text = prompt(QUESTIONS[1].text, think=True)  # whose lengths differ
    field = {"answer": "hash", "stop": "window:2"}  # of twelve, two in a row agree long before the last is done
    params = {"temperature": 1.0, "max_new_tokens": 300, "n": 12, "custom_params": {"dynasor": field}}
    for _ in range(4):  # now and then all end together
        outs = engine.generate(text, params)
        records = [out["meta_info"]["dynasor"] for out in outs]
        assert len(outs) == 12
        assert len({record["program"] for record in records}) == 1
        whole = [out for out in outs if out["meta_info"]["finish_reason"].get("matched") is not None]
        if len(whole) < 12:
            break
    assert 2 <= len(whole) < 12
    assert sum("####" in out["text"] for out in whole) >= 2  # that agreed
    params["custom_params"] = {"dynasor": {**field, "stop": "never"}}
    outs = engine.generate(text, params)
    assert all(out["meta_info"]["finish_reason"].get("matched") is not None for out in outs)
    with pytest.raises((ValueError, HTTPException), match="the n choices are the branches"):
        engine.generate(text, params | {"custom_params": {"dynasor": {**field, "branches": 3}}})
    with pytest.raises((ValueError, HTTPException), match="12 branches with temperature=0"):
        engine.generate(text, params | {"temperature": 0})
    with pytest.raises((ValueError, HTTPException), match=r"dynasor.deadline_s=5 with n=12 is not supported"):
        engine.generate(text, params | {"custom_params": {"dynasor": {**field, "deadline_s": 5}}})
    assert_nothing_left(engine)

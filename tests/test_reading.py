"""One reading: the text that votes is the text that its client is returned, with and without our scheduler."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from engines import settled
from questions import held_out, prompt

from sglang_dynasor.frontend import LocalEngine, reason
from sglang_dynasor.policy.answers import read_answer
from sglang_dynasor.policy.equal import answer_key

pytestmark = pytest.mark.engine
QUESTION = held_out(12)[10].text
# What clients send about the end of a text. The reasoner writes steps, then "#### 19".
ENDS: dict[str, dict[str, Any]] = {
    "own end": {},
    "stop string": {"stop": ["\n####"]},
    "stop string in the answer's line": {"stop": [" 1", " 2", " 3"]},
    "stop kept": {"stop": ["####"], "no_stop_trim": True},
    "stop pattern": {"stop_regex": "#### [0-9]"},
    "special tokens kept": {"skip_special_tokens": False},
    "cut": {"max_new_tokens": 24},
    "nearly whole": {"max_new_tokens": 60},
}


@pytest.fixture
def engine(shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True)


def sent(engine: Any, end: dict[str, Any], answer: str, num: int = 8) -> list[dict[str, Any]]:
    """Branches that a client sends: each text is seen, and the last record has all votes."""
    program = f"reading-{abs(hash((str(end), answer)))}"
    field = {"program": program, "branches": num, "stop": "never", "answer": answer}
    params = {"temperature": 1.0, "max_new_tokens": 200, **end, "custom_params": {"dynasor": field}}
    return engine.generate([prompt(QUESTION)] * num, [params | {"sampling_seed": seed} for seed in range(num)])


def is_cut(out: dict[str, Any]) -> bool:
    return out["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("answer", ["auto", "hash", "number", "last_line"])
@pytest.mark.parametrize("end", ENDS)
def test_what_votes_is_what_is_returned(engine: Any, end: str, answer: str) -> None:
    """Each returned text, read by itself, is the vote that was counted."""
    outs = sent(engine, ENDS[end], answer)
    last = max((out["meta_info"]["dynasor"] for out in outs), key=lambda r: r["stop_reason"] is not None)
    read = [read_answer(prompt(QUESTION), out["text"], answer, is_cut=is_cut(out)) for out in outs]
    expected = Counter(answer_key(text, "math", answer) for text in read if text is not None)
    counted = {answer_key(vote["answer"], "math", answer): vote["votes"] for vote in last["votes"]}
    assert counted == dict(expected)
    assert last["num_abstentions"] == sum(text is None for text in read)
    assert last["num_truncated"] == sum(map(is_cut, outs)) == last["finish_reasons"].count("length")
    assert ("hint" in last) is (not expected)


def test_a_stop_string_is_no_answer(engine: Any) -> None:
    """`stop: ["####"]` with `auto`: what stands before it answers, and never the stop string itself."""
    for out in sent(engine, {"stop": ["####"]}, "auto"):
        record = out["meta_info"]["dynasor"]
        assert "####" not in out["text"]
        assert all("#" not in vote["answer"] for vote in record["votes"])


def test_cut_branches_do_not_vote_and_the_record_says_what_to_change(engine: Any) -> None:
    """Nobody has come to an answer at one token: no votes, no certainty, and a line to act on."""
    field = {"branches": 6, "answer": "auto"}
    params = {"temperature": 1.0, "max_new_tokens": 1, "custom_params": {"dynasor": field}}
    record = engine.generate(prompt(QUESTION), params)["meta_info"]["dynasor"]
    assert (record["answer"], record["votes"], record["stop_reason"]) == (None, [], "cap")
    assert record["certaindex"] == 0
    assert record["num_truncated"] == record["num_abstentions"] == 6
    assert record["hint"].startswith("all 6 branches that ended were cut before an answer was complete, at 1 tokens")
    assert settled(engine)["num_policy_errors"] == 0


def test_greedy_branches_of_a_client_s_own_are_refused(engine: Any) -> None:
    """As the server's own are; one of a program of one is fine, and so is a sampled one."""
    field = {"program": "greedy", "branches": 3}
    params = {"temperature": 0, "max_new_tokens": 4, "custom_params": {"dynasor": field}}
    for greedy in ({"temperature": 0}, {"temperature": 0.8, "top_k": 1}):
        with pytest.raises(ValueError, match=r"3 branches with .*greedy branches would all be the same"):
            engine.generate("Q: one", params | greedy)
    engine.generate("Q: one", params | {"temperature": 1.0})
    engine.generate("Q: one", params | {"custom_params": {"dynasor": {"program": "alone", "branches": 1}}})


# The frontend, on both


@pytest.fixture
def ours(engine: Any) -> Iterator[LocalEngine]:
    with LocalEngine(engine) as running:
        yield running


@pytest.fixture
def plain(shared_engine: Any) -> Iterator[LocalEngine]:
    with LocalEngine(shared_engine()) as running:
        running._dynasor_warned = True  # type: ignore[attr-defined]
        yield running


@sgl.function
def sampled(s: Any, options: dict[str, Any]) -> Any:
    s += prompt(QUESTION)
    with reason(s, branches=6, stop="never", seed=5, answer="auto") as p:
        for branch in p.fork():
            branch += sgl.gen("steps", **options)
    return p


def record_on(backend: LocalEngine, options: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sampled.run(options, backend=backend).ret_value.record


@pytest.mark.parametrize(
    "options", [{"stop": "\n####"}, {"max_tokens": 24}, {"max_tokens": 60}, {"stop_regex": "#### [0-9]"}]
)
def test_the_frontend_reads_the_same_on_plain_sglang(
    ours: LocalEngine, plain: LocalEngine, options: dict[str, Any]
) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 200, **options}
    here, there = (record_on(backend, sampling) for backend in (ours, plain))
    keys = ("num_abstentions", "num_truncated", "certaindex", "leader_share", "stop_reason")
    assert {key: here[key] for key in keys} == {key: there[key] for key in keys}
    votes = [{vote["answer"]: vote["votes"] for vote in record["votes"]} for record in (here, there)]
    assert votes[0] == votes[1]  # of equal ones the order is that in which they came
    assert sorted(here["finish_reasons"]) == sorted(there["finish_reasons"])
    assert here.get("hint") == there.get("hint")


def test_greedy_forks_are_refused(plain: LocalEngine) -> None:
    """By the frontend itself on plain SGLang; a greedy end after sampled steps is fine (test_frontend.py has one)."""
    with pytest.raises(Exception, match="greedily"):
        record_on(plain, {"temperature": 0, "max_tokens": 8})

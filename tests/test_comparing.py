"""Answers compared beside the loop, in the real engine: by sympy, by the model's one token, by an embedding server."""

from __future__ import annotations

import re
import time
from math import cos, exp, sin
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from engines import CHECKPOINT, assert_nothing_left, settled, status_of
from forked import processes
from questions import held_out, prompt
from test_findings import Words, server
from transformers import AutoTokenizer

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import comparing, validation
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

pytestmark = pytest.mark.engine
PROMPTS = [prompt(question.text) for question in held_out(24) if question.num_steps >= 4][:5]


def params(**field: Any) -> dict[str, Any]:
    field = {"answer": "hash", "branches": 6, "stop": "never"} | field
    return {"temperature": 1.0, "max_new_tokens": 200, "custom_params": {"dynasor": field}}


def records(engine: Any, **field: Any) -> list[dict[str, Any]]:
    sampling = [{**params(**field), "sampling_seed": seed} for seed in range(len(PROMPTS))]
    return [out["meta_info"]["dynasor"] for out in engine.generate(PROMPTS, sampling)]


def same_records(engine: Any, **field: Any) -> list[dict[str, Any]]:
    """One after the other, each from an empty cache: in the same batches each time, to the last bit of a logit."""
    found: list[dict[str, Any]] = []
    for seed, text in enumerate(PROMPTS):
        assert_nothing_left(engine)
        found.append(engine.generate(text, {**params(**field), "sampling_seed": seed})["meta_info"]["dynasor"])
    return found


def by_value(record: dict[str, Any]) -> dict[int, int]:
    """Votes by what an answer such as "12+0" is worth."""
    votes: dict[int, int] = {}
    for vote in record["votes"]:
        votes[value(vote["answer"])] = votes.get(value(vote["answer"]), 0) + vote["votes"]
    return votes


def value(answer: str) -> int:
    return sum(map(int, answer.split("+")))


def two_ways(finish: Any) -> Any:
    """Let every other branch write its answer another way; and a tenant its own, which the embedding server has not seen."""

    def finish_two_ways(program: Program, index: int, text: str, *args: Any, **options: Any) -> None:
        text = re.sub(r"####\s*(\d+)", rf"#### {program.spec.tenant}\1" + "+0" * (index % 2), text)
        finish(program, index, text, *args, **options)

    return finish_two_ways


def embed(texts: list[str]) -> Any:
    """Vectors that point the same way where answers are worth the same, and else another way."""
    angles = [0.06 * value(text) for text in texts]
    return {"data": [{"index": i, "embedding": [cos(angle), sin(angle)]} for i, angle in enumerate(angles)]}


def test_answers_that_are_the_same_are_one_vote(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same branches under each equality; then with a worker that was killed, and servers that are wrong, silent or gone."""
    monkeypatch.setattr(Program, "finish", two_ways(Program.finish))
    monkeypatch.setattr(comparing, "LABELS", ((" good", " bad"),))
    answers = [embed]
    with server(lambda texts: answers[0](texts)) as fake:
        options = {"scheduler": "dynasor", "dynasor_strict": True, "dynasor_embedding_url": fake.url}
        engine = start_engine(**options, dynasor_equal_timeout_s=200)  # machines of tests stall
        apart = same_records(engine)
        assert status_of(engine)["num_comparisons"] == 0
        assert not any("merges" in record for record in apart)
        for equal in ("symbolic", "embedding:0.9999"):
            before = settled(engine)
            together = same_records(engine, equal=equal)
            check_merges(apart, together, equal)
            status = settled(engine)
            num_merges = status["num_merges"] - before["num_merges"]
            assert num_merges == sum(len(record["merges"]) for record in together) > 0
            assert status["num_comparison_errors"] == before["num_comparison_errors"]
        check_that_the_rule_is_asked_again(engine)
        check_the_model(engine)
        check_a_killed_worker(engine)
        answers[0] = lambda texts: {"data": "oops"}
        check_apart(engine, "a")
        answers[0] = lambda texts: time.sleep(300)
        check_a_deadline(engine)
        assert settled(engine)["num_held_programs"] == 0
        engine = start_engine(**options, dynasor_equal_timeout_s=3)
        started = time.monotonic()
        check_apart(engine, "b")
        assert 3 <= time.monotonic() - started < 200  # it has waited for what could have changed the answer
    assert settled(engine)["num_held_programs"] == 0


def check_merges(apart: list[dict[str, Any]], together: list[dict[str, Any]], equal: str) -> None:
    """The answer that has most votes, whoever wrote it how, leads; what was merged is in the record.

    What cannot change the answer any more is not waited for.
    """
    for one, other in zip(apart, together, strict=True):
        votes = by_value(other)
        assert votes == by_value(one)
        assert votes[value(other["answer"])] == max(votes.values())
        assert len(other["merges"]) == len(one["votes"]) - len(other["votes"])
        assert other["num_comparisons"] >= len(other["merges"])
        for merge in other["merges"]:
            assert abs(len(merge["answer"]) - len(merge["into"])) == len("+0")
            assert merge["answer"].removesuffix("+0") == merge["into"].removesuffix("+0")
            assert merge["by"] == equal.partition(":")[0]
            assert (merge["score"] is None) == (equal == "symbolic")
    assert any(len(one["votes"]) > len(other["votes"]) for one, other in zip(apart, together, strict=True))


def check_that_the_rule_is_asked_again(engine: Any) -> None:
    """With votes for one answer together, programs need fewer branches: one at a time, so that each finding may end them."""
    field = {"branches": 16, "stop": "predictive", "width": 1}
    num_branches = [
        sum(record["num_branches"] for record in records(engine, **field, **equal))
        for equal in ({}, {"equal": "symbolic"})
    ]
    assert num_branches[1] < num_branches[0]


def check_the_model(engine: Any) -> None:
    """The score of a merge is the model's own yes / (yes + no) after the question; the level decides."""
    before = settled(engine)["num_comparisons"]
    merged = records(engine, equal="model:0.000001")
    assert sum(len(record["merges"]) for record in merged) > 0
    assert all(record["num_compare_tokens"] > 0 for record in merged if record["num_comparisons"])
    apart = records(engine, equal="model:1")
    assert not any(record["merges"] for record in apart)
    assert settled(engine)["num_comparisons"] - before >= sum(record["num_comparisons"] for record in merged + apart)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    yes, no = (tokenizer.encode(label, add_special_tokens=False)[0] for label in comparing.LABELS[0])
    merge = next(merge for record in merged for merge in record["merges"])
    asked = engine.generate(
        input_ids=comparing.same_ids(tokenizer, merge["answer"], merge["into"]),
        sampling_params={"temperature": 1.0, "max_new_tokens": 1},
        return_logprob=True,
        token_ids_logprob=[yes, no],
    )
    good, bad = (exp(logprob) for logprob, _, _ in asked["meta_info"]["output_token_ids_logprobs"][0])
    assert merge["score"] == pytest.approx(good / (good + bad), abs=1e-4)


def check_a_killed_worker(engine: Any) -> None:
    """One finding at most is lost; the worker after it is right."""
    workers = [
        child
        for process in processes(engine)
        for child in psutil.Process(process.pid).children()
        if "sglang_dynasor.symbolic" in child.cmdline()
    ]
    assert len(workers) == 1
    workers[0].kill()
    errors = settled(engine)["num_comparison_errors"]
    assert sum(len(record["merges"]) for record in records(engine, equal="symbolic")) > 0
    assert settled(engine)["num_comparison_errors"] == errors + 1


def check_apart(engine: Any, tenant: str) -> None:
    """As if answers were compared by their keys only; each that was not compared is counted."""
    apart = same_records(engine, tenant=tenant, equal="text")
    before = settled(engine)
    found = same_records(engine, tenant=tenant, equal="embedding")
    assert [record["merges"] for record in found] == [[]] * len(found)
    assert [record["votes"] for record in found] == [record["votes"] for record in apart]
    num, num_errors = (settled(engine)[key] - before[key] for key in ("num_comparisons", "num_comparison_errors"))
    assert 0 < num_errors <= num


def check_a_deadline(engine: Any) -> None:
    """It wins over findings that are waited for."""
    started = time.monotonic()
    found = records(engine, tenant="c", equal="embedding", deadline_s=1.5)
    assert time.monotonic() - started < 150
    assert {record["stop_reason"] for record in found} <= {"cap", "deadline"}
    assert any(record["stop_reason"] == "deadline" for record in found)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"equal": "embedding"}, "without an embedding server: start the server with --dynasor-embedding-url"),
        ({"equal": "model"}, "are not one token each of this model"),
        ({"equal": "symbolic", "program": "p"}, "before anything is compared"),
    ],
)
def test_what_a_server_refuses(shared_engine: Any, field: dict[str, Any], message: str) -> None:
    """Each is a 400 that says what is allowed; the same with n."""
    engine = shared_engine(scheduler="dynasor", dynasor_strict=True)
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS[0], params(**field))
    with pytest.raises(
        ValueError, match=r"dynasor.equal='symbolic' with n=2|dynasor.equal='symbolic' with dynasor.program"
    ):
        engine.generate(PROMPTS[0], {**params(equal="symbolic", branches=2), "n": 2})


def test_what_is_not_refused() -> None:
    """An embedding server that was named; tokens that the model has, but not those beyond its vocabulary."""
    tokenizer = Words({" yes", " no"})
    config = DynasorConfig(scheduler="dynasor", dynasor_embedding_url="http://127.0.0.1:1")
    for equal in ("symbolic", "model", "embedding:0.8", "math"):
        manager = SimpleNamespace(
            tokenizer=tokenizer,
            model_config=SimpleNamespace(vocab_size=10_000),
            server_args=SimpleNamespace(_dynasor=config),
        )
        validation._check_comparer(parse_field({"equal": equal}, 64), manager)
    manager.model_config.vocab_size = 1000
    with pytest.raises(FieldError, match="whose vocabulary is 1000"):
        validation._check_comparer(parse_field({"equal": "model"}, 64), manager)

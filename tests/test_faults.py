"""What goes wrong must stay small: our own faults, a full queue, a thousand programs."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest
from engines import assert_nothing_left, settled, status_of
from fastapi import HTTPException
from forked import processes
from questions import held_out, prompt

from sglang_dynasor.engine import branches
from sglang_dynasor.policy import branch
from sglang_dynasor.policy.program import Program

pytestmark = pytest.mark.engine
QUESTIONS = held_out(24)


def ask(engine: Any, questions: Any, max_new_tokens: int = 120, **field: Any) -> list[dict[str, Any]]:
    params = {
        "temperature": 1.0,
        "max_new_tokens": max_new_tokens,
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }
    return engine.generate([prompt(q.text) for q in questions], [params] * len(questions))


def greedy(engine: Any) -> list[str]:
    outs = engine.generate([prompt(q.text) for q in QUESTIONS], {"temperature": 0, "max_new_tokens": 120})
    return [out["text"] for out in outs]


def test_a_crash_in_the_vote_falls_back(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an answer crashes on some texts: they abstain, programs are answered, plain requests are not touched."""
    real = branch.read_answer

    def extract(lead: str, text: str, extractor: str, *, is_cut: bool) -> str | None:
        if len(text) % 2:
            raise RuntimeError("injected")
        return real(lead, text, extractor, is_cut=is_cut)

    monkeypatch.setattr(branch, "read_answer", extract)  # the scheduler forks from here
    engine = start_engine(scheduler="dynasor")
    before = greedy(engine)
    outs = ask(engine, QUESTIONS)
    assert all(out["meta_info"]["finish_reason"]["type"] in ("stop", "length") for out in outs)
    assert any(out["meta_info"]["dynasor"]["num_abstentions"] for out in outs)
    assert any(out["meta_info"]["dynasor"]["answer"] for out in outs)
    assert greedy(engine) == before
    status = settled(engine)
    assert status["num_policy_errors"] >= 1
    assert status["num_branches_inside"] == status["num_held_programs"] == 0


def test_a_crash_everywhere_still_answers(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if every record fails, each client gets a text that some branch wrote."""

    def broken(self: Program) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(Program, "record", broken)
    engine = start_engine(scheduler="dynasor")
    outs = ask(engine, QUESTIONS)
    assert all("####" in out["text"] or out["meta_info"]["finish_reason"]["type"] == "length" for out in outs)
    status = settled(engine)
    assert status["num_policy_errors"] >= len(outs)
    assert status["num_branches_inside"] == status["num_held_programs"] == 0


def test_a_crash_of_the_controller_runs_the_request_as_stock(
    start_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program cannot even start: the client's request is served as if it had no field."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(branches, "make_branch", broken)
    engine = start_engine(scheduler="dynasor")
    outs = ask(engine, QUESTIONS)
    assert all(out["text"] and "dynasor" not in out["meta_info"] for out in outs)
    status = settled(engine)
    assert status["num_policy_errors"] == len(outs)
    assert status["num_branches_inside"] == status["num_held_programs"] == 0


def test_a_full_queue_is_waited_for(start_engine: Any) -> None:
    """SGLang takes two waiting requests at most: a wide program keeps within it and still uses its cap."""
    engine = start_engine(scheduler="dynasor", max_queued_requests=2, max_running_requests=4)
    (out,) = ask(engine, QUESTIONS[4:5], branches=16, width=16, stop="never")
    record = out["meta_info"]["dynasor"]
    assert record["num_failed"] == 0
    assert record["num_branches"] == 16
    # More programs than the queue takes: those refused get SGLang's own answer, and nothing stays behind.
    params = {"temperature": 1.0, "max_new_tokens": 60, "custom_params": {"dynasor": {"answer": "hash"}}}
    with pytest.raises(HTTPException, match="queue is full"):
        engine.generate([prompt(q.text) for q in QUESTIONS], [params] * len(QUESTIONS))
    deadline = time.monotonic() + 200
    while (status := status_of(engine))["num_branches_inside"] or status["num_held_programs"]:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


def test_one_rid_used_again_is_another_program(start_engine: Any) -> None:
    """A client may send the same rid as soon as it has its answer, while old siblings still end."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    params = {"temperature": 1.0, "max_new_tokens": 120, "custom_params": {"dynasor": {"answer": "hash", "width": 16}}}
    for question in QUESTIONS[:5] * 2:
        out = engine.generate(prompt(question.text), params, rid="again")
        assert out["meta_info"]["dynasor"]["program"] == "again"


def test_a_timeout_holds_for_the_program(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that run too long are given up by SGLang; none is started in their place and the client is told."""
    monkeypatch.setenv("SGLANG_REQ_RUNNING_TIMEOUT", "0.3")
    engine = start_engine(scheduler="dynasor")
    params = {"temperature": 1.0, "max_new_tokens": 900, "ignore_eos": True, "custom_params": {"dynasor": {"width": 8}}}
    started = time.perf_counter()
    with pytest.raises(HTTPException, match="timeout"):
        engine.generate(prompt(QUESTIONS[0].text), params)
    assert time.perf_counter() - started < 200
    status = settled(engine)
    assert status["num_held_programs"] == 0


def test_a_thousand_programs_leave_nothing(start_engine: Any) -> None:
    """Memory and the program table return to their start."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    ask(engine, QUESTIONS * 4, 16, branches=4)  # caches fill, allocators settle
    process = psutil.Process(processes(engine)[0].pid)
    before_bytes = process.memory_info().rss
    for _ in range(10):
        ask(engine, (QUESTIONS * 5)[:100], 16, branches=4)
    status = settled(engine)
    assert status["num_programs"] >= 1000
    assert status["num_held_programs"] == status["num_client_programs"] == status["num_branches_inside"] == 0
    assert status["num_policy_errors"] == 0
    assert process.memory_info().rss - before_bytes < 64 * 2**20
    assert_nothing_left(engine)


@pytest.mark.parametrize(
    "extra",
    [{"disable_overlap_schedule": True}, {"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True}],
)
def test_other_ways_of_scheduling(start_engine: Any, extra: dict[str, Any]) -> None:
    """Overlap off; pages of 16 with chunked, mixed prefill: programs end and leave nothing."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, **extra)
    outs = ask(engine, QUESTIONS)
    assert all(out["meta_info"]["dynasor"]["stop_reason"] in ("certain", "cap") for out in outs)
    status = settled(engine)
    assert status["num_branches_inside"] == status["num_held_programs"] == 0


def test_retraction_keeps_programs_whole(start_engine: Any) -> None:
    """A KV pool too small for what was admitted: branches are retracted, come back, and every program ends."""
    engine = start_engine(
        scheduler="dynasor",
        dynasor_strict=True,
        max_total_tokens=1200,
        schedule_conservativeness=0.05,
        disable_radix_cache=False,
    )
    outs = ask(engine, QUESTIONS, stop="never", branches=8)
    assert all(out["meta_info"]["dynasor"]["num_branches"] == 8 for out in outs)
    status = settled(engine)
    assert status["num_branches_inside"] == status["num_held_programs"] == 0


@pytest.mark.parametrize("custom", [["dynasor"], "dynasor", 7, {}, {"other": [1]}])
def test_whatever_custom_params_are_stock_sglang_serves_them(engine: Any, custom: Any) -> None:
    """SGLang takes any value there; ours must not stumble over what is not for us."""
    before = status_of(engine)
    out = engine.generate("Q", {"max_new_tokens": 2, "temperature": 0, "custom_params": custom})
    assert out["text"] == engine.generate("Q", {"max_new_tokens": 2, "temperature": 0})["text"]
    assert status_of(engine) == before


@pytest.fixture
def engine(shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True, chunked_prefill_size=16)


def test_nobody_waits_for_a_prompt_that_nobody_needs(engine: Any) -> None:
    """A deadline in the middle of a long prompt: the program is answered, without a text, and the rest is not computed."""
    question = "x " * 450  # some fifty chunks
    params = {"max_new_tokens": 20, "temperature": 1.0}

    def ask(deadline_s: float) -> dict[str, Any]:
        field = {"answer": "hash", "branches": 4, "deadline_s": deadline_s}
        return engine.generate(question, {**params, "custom_params": {"dynasor": field}})

    engine.generate("Q", params)  # the first request of an engine takes longer
    out = ask(0.02)
    assert out["meta_info"]["dynasor"]["stop_reason"] == "deadline"
    assert out["text"] == ""
    settled(engine)
    found = engine.generate(question, {"max_new_tokens": 1})["meta_info"]
    assert found["cached_tokens"] < found["prompt_tokens"] // 2
    assert_nothing_left(engine)
    out = ask(600)  # in time all of it is
    assert out["meta_info"]["dynasor"]["stop_reason"] != "deadline"
    found = engine.generate(question, {"max_new_tokens": 1})["meta_info"]
    assert found["cached_tokens"] >= found["prompt_tokens"] - 1
    assert_nothing_left(engine)

"""Two ranks on this machine: tensor parallelism in lockstep, data parallelism with programs whole."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from engines import assert_nothing_left, status_of
from questions import held_out, prompt

from sglang_dynasor.engine import comparing, statistics

pytestmark = pytest.mark.engine
QUESTIONS = held_out(60)
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # SGLang wants to know which cores are whose


def params(max_new_tokens: int = 60, **field: Any) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "max_new_tokens": max_new_tokens,
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }


def on_first_rank(compute: Any) -> Any:
    """Statistics are the first rank's; the others take its numbers."""

    def checked(*args: Any) -> Any:
        assert dist.get_rank() == 0
        return compute(*args)

    return checked


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_tensor_parallel_ranks_decide_alike(
    start_engine: Any, two_ranks: None, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Two hundred programs with early stops, aborts, deadlines, time-outs, weak branches, judges, comparisons, a budget and a price. SGLang's own checker
    digests every decision (admissions, answers, its allocations) and kills the server if the ranks differ."""
    monkeypatch.setattr(statistics, "compute", on_first_rank(statistics.compute))
    monkeypatch.setattr(comparing, "LABELS", ((JUDGE["judge_good"], JUDGE["judge_bad"]),))
    monkeypatch.setenv("SGLANG_ENABLE_RANK_CONSENSUS_CHECKER", "1")
    monkeypatch.setenv("SGLANG_REQ_RUNNING_TIMEOUT", "15")
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, tp_size=2, max_running_requests=24, max_total_tokens=6000,
        disable_overlap_schedule=not overlap, dynasor_max_price=0.02,
    )  # fmt: skip
    num_programs = 200 if overlap else 40
    draw = random.Random(1)

    async def one(i: int) -> Any:
        await asyncio.sleep(draw.random() * num_programs / 12)
        field: dict[str, Any] = {"tenant": f"t{i % 3}"}
        text = prompt(QUESTIONS[i % len(QUESTIONS)].text)
        if i % 6 == 1:
            # Where all branches are to come some are below most of the first ones, whatever order they finish in.
            field |= {"stop": "confidence" if i % 4 == 1 else "never", "weak_frac": 0.9, "group_tokens": 8}
        elif i % 6 == 4:
            field |= {"vote": "reward", **JUDGE}
        elif i % 6 == 2:
            field |= {"equal": "model:0.000001" if i % 4 else "symbolic"}
        elif i % 6 == 3:
            field |= {
                "tenant": "b",
                "budget_tokens": 12 * num_programs,
                "budget": "b",
                "budget_programs": num_programs // 6,
            }
        sampling_params = params(**field)
        if i % 10 == 3:
            sampling_params = {**params(900, deadline_s=0.3, **field), "ignore_eos": True}
        elif i % 50 == 7:  # the engine's own time-out ends it
            sampling_params = {**params(900, branches=2, **field), "ignore_eos": True}
        elif i % 10 == 5:
            sampling_params = {**params(900, branches=4, **field), "ignore_eos": True}
            asyncio.get_running_loop().call_later(0.2 + draw.random(), engine.tokenizer_manager.abort_request, f"r{i}.")
        elif i % 10 == 8:
            sampling_params = {"temperature": 0, "max_new_tokens": 40}
        return await engine.async_generate(text, sampling_params, rid=f"r{i}.")

    async def everyone() -> list[Any]:
        return await asyncio.gather(*(one(i) for i in range(num_programs)), return_exceptions=True)

    outs = engine.loop.run_until_complete(everyone())
    answered = [out for out in outs if isinstance(out, dict) and "dynasor" in out["meta_info"]]
    reasons = Counter(out["meta_info"]["dynasor"]["stop_reason"] for out in answered)
    assert reasons["certain"] > 0, reasons
    assert reasons["certain"] + reasons["price"] >= num_programs // 6, reasons  # the more load, the more of the latter
    assert reasons["deadline"] >= num_programs // 20, reasons
    assert reasons["budget"] > 0, reasons
    assert len(answered) < 0.9 * num_programs  # plain ones, aborts, time-outs
    records = [out["meta_info"]["dynasor"] for out in answered]
    assert any(reward is not None for record in records for reward in record.get("rewards", []))
    if overlap:  # of forty few have weak branches, and only three are compared by the model
        assert sum(record.get("num_weak", 0) for record in records) > 0
        assert any(merge["by"] == "model" for record in records for merge in record.get("merges", []))
    assert_nothing_left(engine)
    status = status_of(engine)
    assert status["num_aborted"] >= 1
    assert status["num_comparisons"] > 0
    # Both ranks are alive and agree after all this.
    assert engine.generate(prompt(QUESTIONS[0].text), params())["meta_info"]["dynasor"]["answer"]


def test_thoughts_on_two_ranks(start_engine: Any, two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes, closed thoughts and chains that agree: the ranks decide alike, on the first rank's probabilities."""
    monkeypatch.setattr(statistics, "compute", on_first_rank(statistics.compute))
    monkeypatch.setenv("SGLANG_ENABLE_RANK_CONSENSUS_CHECKER", "1")
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, tp_size=2, max_running_requests=16, max_total_tokens=6000
    )
    field = {
        "algorithm": "long_cot", "think_end": "</think>\n####", "probe_suffix": "</think>\n####",
        "probe_tokens": 12, "min_tokens": 12, "agree": 2, "exit": "trial:0.5",
    }  # fmt: skip
    short = [q for q in QUESTIONS if q.num_steps <= 4][:16]
    together = {"branches": 4, "stop": "trials:0.7", "hold_tokens": 12}
    kinds: list[dict[str, Any]] = [{}, {"branches": 3}, together, together]

    async def everyone() -> list[Any]:
        calls = (
            engine.async_generate(prompt(q.text, think=True), params(250, **field, **kinds[i % 4]))
            for i, q in enumerate(short)
        )
        return await asyncio.gather(*calls)

    records = [out["meta_info"]["dynasor"] for out in engine.loop.run_until_complete(everyone())]
    assert sum(record["num_probes"] for record in records) >= 16
    assert sum(record["stop_reason"] == "certain" for record in records if "shares" in record) >= 1
    assert any(at is not None for record in records for at in record["closed_at_tokens"])
    assert status_of(engine)["num_policy_errors"] == 0
    assert engine.generate(prompt(QUESTIONS[0].text), params())["meta_info"]["dynasor"]["answer"]


DIFFERING = """
import torch.distributed as dist
from engines import ENGINE_ARGS
from forked import forked_engine
from questions import held_out, prompt
from sglang_dynasor.engine import branches

real = branches.assert_same

def differing(message, *args):
    if message.startswith("dynasor starts") and dist.get_rank() == 1:
        args = (args[0] + 1, *args[1:])
    real(message, *args)

branches.assert_same = differing
with forked_engine(**{**ENGINE_ARGS, "max_total_tokens": 6000}, scheduler="dynasor", tp_size=2) as engine:
    field = {"temperature": 1.0, "max_new_tokens": 60, "custom_params": {"dynasor": {"answer": "hash"}}}
    for question in held_out(40):
        engine.generate(prompt(question.text), field)
    print("nobody noticed")
"""


def test_the_checker_sees_a_rank_that_decides_differently(two_ranks: None) -> None:
    """The test above can fail: a rank that counts otherwise is found out, and SGLang ends the server."""
    environment = {**os.environ, "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", DIFFERING], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode != 0
    assert "nobody noticed" not in done.stdout
    assert "dynasor starts" in done.stdout + done.stderr


def test_data_parallel_keeps_programs_whole(start_engine: Any, two_ranks: None) -> None:
    """Two replicas: the branches of a program are on one, also where the client sends them; both replicas work."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dp_size=2, max_total_tokens=6000)
    prompts = [prompt(q.text) for q in QUESTIONS[:16]]
    outs = engine.generate(prompts, [params(branches=8)] * 16)
    assert all(out["meta_info"]["dynasor"]["num_branches"] <= 8 for out in outs)
    sent = [(f"mine-{i % 8}", prompts[i % 8]) for i in range(32)]
    fields = [params(program=name, branches=4, stop="never") for name, _ in sent]
    outs = engine.generate([text for _, text in sent], fields)
    last: dict[str, int] = {}
    for out in outs:
        record = out["meta_info"]["dynasor"]
        num_done = sum(vote["votes"] for vote in record["votes"]) + record["num_abstentions"]
        last[record["program"]] = max(last.get(record["program"], 0), num_done)
    assert last == {f"mine-{i}": 4 for i in range(8)}  # each program saw all four of its branches
    deadline = time.monotonic() + 30  # siblings leave a step after the answer
    while True:
        states = [state["dynasor"] for state in engine.get_server_info()["internal_states"]]
        if not any(state["num_branches_inside"] for state in states):
            break
        assert time.monotonic() < deadline, states
        time.sleep(0.1)
    assert len(states) == 2
    assert all(state["num_programs"] > 0 and state["num_client_programs"] > 0 for state in states)

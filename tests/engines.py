"""What tests need to know of the engine they start."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REASONER = ROOT / "examples" / "tiny_reasoner"
CHECKPOINT = REASONER / "checkpoint"
ENGINE_ARGS: dict[str, Any] = {
    "model_path": str(CHECKPOINT),
    "dtype": "float32",
    "max_total_tokens": 20_000,
    "max_running_requests": 64,
    "enable_deterministic_inference": True,  # seeds are read
    "log_level": "error",
}
# What an idle engine counts zero of.
GIVEN_BACK = {
    "num_held_programs",
    "num_waiting_programs",
    "num_branches_inside",
    "num_branches_queued",
    "num_branches_promised",
    "num_branches_watched",
    "num_answer_slots",
}


def status_of(engine: Any) -> dict[str, Any]:
    """The scheduler's counters."""
    return engine.get_server_info()["internal_states"][0]["dynasor"]


def settled(engine: Any) -> dict[str, Any]:
    """The counters once no branch is inside any more: siblings leave a step after the answer. Waits half a minute at most."""
    for _ in range(600):
        status = status_of(engine)
        if not status["num_branches_inside"]:
            break
        time.sleep(0.05)
    return status


async def filled(engine: Any, num_branches: int) -> None:
    """Return once so many branches are inside. Waits a minute at most."""
    async with asyncio.timeout(60):
        while (await _status(engine))["num_branches_inside"] < num_branches:
            await asyncio.sleep(0.01)


async def arrived(engine: Any, calls: dict[str, asyncio.Future[Any]]) -> None:
    """Return once the scheduler has each of these requests, by rid, or has answered it. Waits a minute at most."""
    states = engine.tokenizer_manager.rid_to_state
    async with asyncio.timeout(60):
        while not all(call.done() or (rid in states and states[rid].dispatched) for rid, call in calls.items()):
            await asyncio.sleep(0.01)
        await _status(engine)  # it takes in one after the other, and this after them


async def _status(engine: Any) -> dict[str, Any]:
    return (await engine.tokenizer_manager.get_internal_state())[0]["dynasor"]


def assert_nothing_left(engine: Any) -> None:
    """No program, branch, row or KV token is held any more, and nothing of ours fell back; the caches are empty then."""
    for _ in range(600):
        status = engine.get_server_info()["internal_states"][0].get("dynasor", {})  # stock SGLang has none
        left = {key: status[key] for key in status if key in GIVEN_BACK and status[key]}
        if not left:
            break
        time.sleep(0.05)
    assert not left, status
    assert status.get("num_policy_errors", 0) == 0
    for _ in range(300):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise AssertionError("the cache cannot be flushed: something still runs")

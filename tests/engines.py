"""What tests need to know of the engine they start."""

from __future__ import annotations

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


def status_of(engine: Any) -> dict[str, Any]:
    """The scheduler's counters."""
    return engine.get_server_info()["internal_states"][0]["dynasor"]


def settled(engine: Any) -> dict[str, Any]:
    """The counters once no branch is inside any more: siblings leave a step after the answer. Waits 10 s at most."""
    for _ in range(200):
        status = status_of(engine)
        if not status["num_branches_inside"]:
            break
        time.sleep(0.05)
    return status


def assert_nothing_left(engine: Any) -> None:
    """No branch, row or KV token is held any more, and nothing of ours fell back."""
    for _ in range(100):
        status = status_of(engine)
        left = [
            status[key]
            for key in status
            if key.startswith("num_") and key.split("_")[-1] in ("inside", "queued", "promised")
        ]
        if not any(left):
            break
        time.sleep(0.05)
    assert not any(left), status
    assert status["num_policy_errors"] == 0
    for _ in range(20):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise AssertionError("the cache cannot be flushed: something still runs")

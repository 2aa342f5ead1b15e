"""What tests need to know of the engine they start."""

from __future__ import annotations

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

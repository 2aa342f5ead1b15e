"""Runs into figures: one row per way."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sglang_dynasor.sim.run import Run


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the repeats of one way came to: of all their questions together; throughput is of their times together."""
    solved = [one for run in runs for one in run.solved]
    latencies = [one.latency_s for one in solved]
    wall_s = sum(run.wall_s for run in runs)
    known = [one.is_right for one in solved if one.is_right is not None]
    return {
        "accuracy %": round(100 * mean(known), 1) if known else "-",
        "tokens": round(mean(one.num_tokens for one in solved)),
        "branches": round(mean(one.num_branches for one in solved), 1),
        "mean s": _short(mean(latencies)),
        "p50 s": _short(percentile(latencies, 0.5)),
        "p90 s": _short(percentile(latencies, 0.9)),
        "p99 s": _short(percentile(latencies, 0.99)),
        "questions/s": _short(len(solved) / wall_s),
        "tokens/s": round(sum(run.num_generated for run in runs) / wall_s),
    }


def counters(runs: Sequence[Run]) -> dict[str, Any]:
    """What the engine counted in them, for the CSV."""
    return {
        "decode steps": sum(run.num_steps for run in runs),
        "prefill passes": sum(run.num_passes for run in runs),
        "prefill tokens": sum(run.num_computed for run in runs),
        "retracted": sum(run.num_retracted for run in runs),
        "most KV tokens": max(run.most_kv_tokens for run in runs),
        "most overtaken tokens": max(run.max_overtaken_tokens for run in runs),
    }


def _short(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One CSV with the keys of the first row as its header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

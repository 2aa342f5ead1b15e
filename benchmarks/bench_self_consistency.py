"""Self-consistency on held-out questions: stock SGLang's uniform majority against programs, in one run.

    python benchmarks/bench_self_consistency.py --csv benchmarks/results/self_consistency.csv

Stock is an engine of its own without the flag; it samples with n = cap, its best way (one shared prompt). Both engines
get the same questions, CONCURRENCY at a time. Each way runs --repeats times; a row has the mean and the range.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from statistics import mean
from typing import Any

from machine import machine
from rows import write_rows

from sglang_dynasor.demo import Client, Outcome, read_questions, run, show, solve_program, solve_stock, start_engine

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
PROGRAMS: dict[str, dict[str, Any]] = {
    "program": {},
    "program, margin (lossless)": {"stop": "margin"},
}


def span(values: list[float], digits: int) -> str:
    """Mean and range."""
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def p90(outcome: Outcome) -> float:
    latencies = sorted(s.latency_s for s in outcome.solved)
    return latencies[int(0.9 * (len(latencies) - 1))]


def measure(
    programs: dict[str, dict[str, Any]] | None, questions: list[dict[str, Any]], cap: int, repeats: int
) -> dict[str, list[Outcome]]:
    """All ways of one engine: `programs` by name with their fields, or stock's one way."""
    is_stock = programs is None
    engine = start_engine(REASONER, scheduler=None if is_stock else "dynasor")
    client = Client(engine)
    outcomes: dict[str, list[Outcome]] = {}
    try:
        for question in questions[:8]:  # warm up
            solve_stock(client, question, cap)
        for _ in range(repeats):
            if programs is None:
                name = f"stock, {cap} samples"
                outcomes.setdefault(name, []).append(run(name, lambda q: solve_stock(client, q, cap), questions, 100))
                continue
            for name, field in programs.items():
                done = run(name, lambda q, field=field: solve_program(client, q, cap, **field), questions, 100)
                outcomes.setdefault(name, []).append(done)
    finally:
        client.close()
        engine.shutdown()
    return outcomes


def compare(
    programs: dict[str, dict[str, Any]], questions: list[dict[str, Any]], cap: int, repeats: int
) -> list[dict[str, Any]]:
    """One row per way, stock first; savings against stock."""
    facts = machine()
    outcomes: dict[str, list[Outcome]] = {}
    for part in (None, programs):
        outcomes |= measure(part, questions, cap, repeats)
    base = next(iter(outcomes.values()))
    base_tokens, base_wall_s = mean(o.num_tokens for o in base), mean(o.wall_s for o in base)
    base_latency_s = mean(s.latency_s for o in base for s in o.solved)
    return [
        {
            "way": name,
            "accuracy %": span([100 * o.accuracy for o in runs], 1),
            "tokens per question": round(mean(o.num_tokens for o in runs) / len(questions)),
            "tokens saved %": span([100 * (1 - o.num_tokens / base_tokens) for o in runs], 1),
            "wall-clock s": span([o.wall_s for o in runs], 0),
            "wall-clock saved %": round(100 * (1 - mean(o.wall_s for o in runs) / base_wall_s), 1),
            "mean latency": f"{mean(s.latency_s for o in runs for s in o.solved) / base_latency_s:.2f}x",
            "p90 latency": f"{mean(p90(o) for o in runs) / mean(p90(o) for o in base):.2f}x",
            "branches per question": round(mean(s.num_branches for o in runs for s in o.solved), 1),
            "questions": len(questions),
            "repeats": repeats,
            "model": "tiny reasoner",
            **facts,
        }
        for name, runs in outcomes.items()
    ]


def main(programs: dict[str, dict[str, Any]], about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--num-questions", type=int, default=320)
    parser.add_argument("--cap", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = compare(programs, read_questions(REASONER, args.num_questions), args.cap, args.repeats)
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main(PROGRAMS, __doc__)

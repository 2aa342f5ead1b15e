"""What a step pays for statistics: one program of 64 branches with and without them, in turns on one engine.

    python benchmarks/bench_statistics_overhead.py --csv benchmarks/results/statistics_overhead.csv

Every branch runs to its token limit, so both do the same steps with 64 rows; a round's ratio is one pair.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from forked import REASONER, flush, forked_engine
from machine import machine
from rows import write_rows

from sglang_dynasor.demo import read_questions, show

NUM_BRANCHES, NUM_TOKENS = 64, 128


def seconds(engine: Any, prompt: str, **field: Any) -> float:
    flush(engine)
    params: dict[str, Any] = {
        "temperature": 1.0,
        "max_new_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "custom_params": {"dynasor": {"branches": NUM_BRANCHES, "stop": "never", "answer": "hash", **field}},
    }
    started = time.perf_counter()
    record = engine.generate(prompt, params)["meta_info"]["dynasor"]
    took_s = time.perf_counter() - started
    assert record["num_tokens"] == NUM_BRANCHES * NUM_TOKENS
    assert ("confidences" in record) is bool(field)
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    (question,) = read_questions(REASONER, 1)
    off_s: list[float] = []
    ratios: list[float] = []
    with forked_engine(
        scheduler="dynasor", dynasor_width=NUM_BRANCHES, max_running_requests=NUM_BRANCHES, max_total_tokens=65_536
    ) as engine:
        for field in ({}, {"statistics": True}):
            seconds(engine, question["prompt"], **field)  # warm up
        for turn in range(args.rounds):
            ways = [{}, {"statistics": True}]
            took = {bool(way): seconds(engine, question["prompt"], **way) for way in ways[:: 1 if turn % 2 else -1]}
            off_s.append(took[False])
            ratios.append(took[True] / took[False])
    ratios.sort()
    row = {
        "running branches": NUM_BRANCHES,
        "tokens each": NUM_TOKENS,
        "ms per step without": round(1e3 * median(off_s) / NUM_TOKENS, 2),
        "step time with statistics (median)": f"{100 * (median(ratios) - 1):+.1f} %",
        "quartiles": f"{100 * (ratios[len(ratios) // 4] - 1):+.1f} to {100 * (ratios[3 * len(ratios) // 4] - 1):+.1f} %",
        "rounds": args.rounds,
        "model": "tiny reasoner",
        **machine(),
    }
    show([row])
    if args.csv:
        write_rows(args.csv, [row])


if __name__ == "__main__":
    main()

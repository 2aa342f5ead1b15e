"""Replay a budget that programs share while they run beside each other: the policy of the engine, on recorded samples.

    python benchmarks/replay_shared_budget.py --traces DIR [--csv FILE] [--orders 10]

Batches of so many questions share a fifth of what their whole caps take. Branches run for as many steps as they have tokens, in 64 rows. The ways
differ in how many questions have a branch in flight at once beyond first branches (policy/shared_budget.py: AT_ONCE_FRAC), and in how
much is held for a branch (HOLD). gain: points of accuracy over one branch of each in turn for the same tokens. spent: percent of the budget.
overdrawn: batches that took more, and the most. time: until all had ended, in mean branch lengths.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

from recorded import Recorded, Sample, read_sets
from replay_budget import uniform
from replay_rules import Vote
from rows import write_rows

from sglang_dynasor.policy import shared_budget
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.shared_budget import SharedBudget
from sglang_dynasor.policy.spec import parse_field

SHARE = 0.2
ROWS = 64
BATCHES = (16, 64)
NUM_ORDERS = 10
SETS = (
    "MATH-500, R1-Llama-8B x16",
    "MATH, AMC, AIME, R1-Qwen-7B x8",
    "dates, GPT-3.5 x10",
)
# Name, part of the questions at once, times the expected tokens that are held.
WAYS = {
    "one at a time": (0.0, 2.0), "a quarter at once": (0.25, 2.0), "half at once": (0.5, 2.0),
    "all at once": (1.0, 2.0), "a quarter, held once": (0.25, 1.0),
}  # fmt: skip


@dataclass(eq=False)
class Job:
    """A question's program and the samples that its branches take."""

    program: Program
    samples: Sequence[Sample]
    vote: Vote = field(default_factory=Vote)
    since: int = 0  # when its branch in flight started


def spend(orders: Sequence[Sequence[Sample]], tokens: int, usual_tokens: float) -> tuple[list[Job], int]:
    """All questions at once; returns them, and the step at which the last one ended."""
    budget, step, usual = SharedBudget(tokens, len(orders)), 0, Mean(usual_tokens)
    jobs: list[Job] = []
    for order in orders:
        spec = parse_field({"branches": len(order), "stop": "careful"}, 256)
        jobs.append(Job(Program("p", spec, usual_tokens=usual), order))
        budget.join(jobs[-1].program, jobs[-1], max(sample.num_tokens for sample in order))
    running: list[tuple[int, int, int]] = []  # heap: when it ends, which question, which branch
    while True:
        while budget.due:
            budget.share_out(ROWS, lambda job, now=step: now - job.since)
        for number, job in enumerate(jobs):
            if len(running) < ROWS and job.program.num_unused:
                index, job.since = job.program.start_branch(), step
                heapq.heappush(running, (step + job.samples[index].num_tokens, number, index))
        if not running:
            return jobs, step
        step, number, index = heapq.heappop(running)
        job, sample = jobs[number], jobs[number].samples[index]
        job.vote.cast(sample)
        job.program.count(index, sample.key, sample.num_tokens, key=sample.key)
        if job.program.reason is not None:
            budget.leave(job.program.budget_number)


def rows_of(recorded: Recorded, num_at_once: int, num_orders: int) -> list[dict[str, Any]]:
    """One row per way."""
    rng, cap, usual_tokens = random.Random(0), recorded.caps[-1], recorded.mean_tokens
    batches: list[tuple[list[Sequence[Sample]], int, float]] = []
    for _ in range(num_orders):
        questions = rng.sample(recorded.questions, len(recorded.questions))
        for first in range(0, len(questions) - num_at_once + 1, num_at_once):
            orders = [rng.sample(q.samples, len(q.samples))[:cap] for q in questions[first : first + num_at_once]]
            tokens = round(SHARE * sum(sample.num_tokens for order in orders for sample in order))
            votes = uniform(orders, tokens, usual_tokens)
            batches.append((orders, tokens, mean(vote.accuracy for vote in votes)))
    found: list[dict[str, Any]] = []
    for name, (at_once, hold) in WAYS.items():
        gains: list[float] = []
        spent: list[float] = []
        times: list[float] = []
        with patch.multiple(shared_budget, AT_ONCE_FRAC=at_once, HOLD=hold):
            for orders, tokens, accuracy in batches:
                jobs, step = spend(orders, tokens, usual_tokens)
                gains.append(100 * (mean(job.vote.accuracy for job in jobs) - accuracy))
                spent.append(100 * sum(sum(job.vote.lengths) for job in jobs) / tokens)
                times.append(step / usual_tokens)
        over = [share for share in spent if share > 100]
        row: dict[str, Any] = {"set": recorded.name, "cap": cap, "questions at once": num_at_once, "way": name}
        row["gain"] = f"{mean(gains):+.1f} ± {1.96 * stdev(gains) / sqrt(len(gains)):.1f}"
        row["spent %"] = f"{mean(spent):.1f}"
        row["overdrawn"] = f"{100 * len(over) / len(spent):.0f} %, by up to {max(over, default=100.0) - 100:.1f} %"
        row["time"] = f"{mean(times):.1f}"
        row["batches"] = len(batches)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=NUM_ORDERS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for recorded in read_sets(args.traces):
        if recorded.name in SETS:
            for num_at_once in BATCHES:
                rows += rows_of(recorded, num_at_once, args.orders)
                for row in rows[-len(WAYS) :]:
                    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

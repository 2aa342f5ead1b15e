"""Replay the stopping rules on recorded samples of real models: tokens saved against the whole cap, and accuracy.

    python benchmarks/replay_stopping.py --traces DIR [--csv FILE]

DIR holds the JSONL traces (one question per line with its samples' answers and tokens). They are not part of this
repository; the table in docs/results.md was made from them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import zstandard

from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.rules import StopRule, parse_stop
from sglang_dynasor.policy.spec import ProgramSpec

RULES = ("entropy", "window", "beta", "margin", "predictive:0.02", "predictive:0.05")
NUM_ORDERS = 40


@dataclass(frozen=True, slots=True)
class Sample:
    answer: str | None
    num_tokens: int
    is_correct: bool


def read_questions(path: Path) -> Iterator[dict[str, Any]]:
    """The questions of a trace."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)


def samples_of(question: dict[str, Any]) -> list[Sample]:
    return [Sample(s["answer"], int(s["n_tokens"] or 1), bool(s["correct"])) for s in question["samples"]]


def run_program(samples: list[Sample], rule: StopRule) -> tuple[int, float, str | None]:
    """Tokens spent, the accuracy of the vote (a tie counts its share), and the answer, sampling one after the other."""
    spec = ProgramSpec("self_consistency", len(samples), len(samples), rule, "last_line", None)
    program = Program("replay", spec)
    tokens = 0
    for sample in samples:
        program.finish(program.start_branch(), sample.answer or "", sample.num_tokens)
        tokens += sample.num_tokens
        if program.reason is not None:
            break
    if not program.votes.voters:
        return tokens, 0.0, None
    most = max(map(len, program.votes.voters.values()))
    leaders = [who for who in program.votes.voters.values() if len(who) == most]
    return tokens, mean(samples[who[0]].is_correct for who in leaders), program.branches[leaders[0][0]].key


def replay(questions: list[list[Sample]], cap: int, rule: StopRule, seed: int = 0) -> dict[str, float]:
    """Means over NUM_ORDERS random orders: share of tokens saved, accuracy, and agreement with the full vote."""
    rng, full = random.Random(seed), parse_stop("never")
    spent = total = 0
    accuracy: list[float] = []
    agrees: list[bool] = []
    for samples in questions:
        for _ in range(NUM_ORDERS):
            order = rng.sample(samples, len(samples))[:cap]
            tokens, right, answer = run_program(order, rule)
            all_tokens, _, all_answer = run_program(order, full)
            spent, total = spent + tokens, total + all_tokens
            accuracy.append(right)
            agrees.append(answer == all_answer)
    return {"saved": 100 * (1 - spent / total), "accuracy": 100 * mean(accuracy), "agreement": 100 * mean(agrees)}


def workloads(traces: Path) -> Iterator[tuple[str, list[list[Sample]], int]]:
    """The workloads of the table: name, questions, cap."""
    by_group: dict[str, list[list[Sample]]] = {}
    for question in read_questions(traces / "math500_r1_llama8b.jsonl.zst"):
        by_group.setdefault(question["dataset"], []).append(samples_of(question))
    yield "MATH-500 subset, R1-Distill-Llama-8B", by_group["atts_math500_r1llama8b_v2sys_x32"], 32
    yield "MATH-500 subset, R1-Distill-Llama-8B", by_group["atts_math500_r1llama8b_kvcompress_x16"], 16
    weak = [samples_of(q) for q in read_questions(traces / "gpqa_diamond_dev.jsonl.zst") if len(q["samples"]) == 16]
    yield "GPQA-diamond, weak models", weak, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, questions, cap in workloads(args.traces):
        for rule in ("never", *RULES):
            row = {"workload": name, "questions": len(questions), "cap": cap, "orders": NUM_ORDERS, "rule": rule}
            row |= {key: round(value, 2) for key, value in replay(questions, cap, parse_stop(rule)).items()}
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(0 if rows else 1)


if __name__ == "__main__":
    main()

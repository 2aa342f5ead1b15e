"""The rule `mixture` on whole answers against their first token alone, on held-out questions.

    python benchmarks/bench_answer_tokens.py --csv benchmarks/results/answer_tokens.csv

Two engines, one after the other, that differ in how many tokens of an answer are followed. The questions come in batches, a cap of
16 branches each; every way runs --repeats times; a row has the mean and the range.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from bench_self_consistency import span
from forked import REASONER, flush, forked_engine
from machine import machine
from rows import write_rows

from sglang_dynasor.demo import read_questions, show
from sglang_dynasor.engine import reader
from sglang_dynasor.policy.equal import answer_key

BATCH = 32
ENGINES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {  # tokens of an answer that are followed, and programs
    "first token": (1, {"mixture, first token": {"stop": "mixture"}}),
    "whole answer": (
        reader.MOST_ANSWER_TOKENS,
        {
            "mixture, whole answer": {"stop": "mixture"},
            "predictive (default)": {},
            "whole cap": {"stop": "never", "statistics": True},
        },
    ),
}


def solve(engine: Any, questions: list[dict[str, Any]], field: dict[str, Any]) -> dict[str, float]:
    """Accuracy and what it took, of all questions."""
    right = tokens = branches = 0
    followed: list[float] = []
    params = {
        "temperature": 1.0,
        "max_new_tokens": 200,
        "custom_params": {"dynasor": {"branches": 16, "answer": "hash", **field}},
    }
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        for question, out in zip(batch, engine.generate([q["prompt"] for q in batch], params), strict=True):
            record = out["meta_info"]["dynasor"]
            said = None if record["answer"] is None else answer_key(record["answer"])
            right += said == answer_key(str(question["answer"]))
            tokens += record["num_tokens"]
            branches += record["num_branches"]
            if "num_answer_tokens" in record:
                followed.append(record["num_answer_tokens"] / record["num_branches"])
    num = len(questions)
    return {
        "accuracy": 100 * right / num,
        "tokens": tokens / num,
        "branches": branches / num,
        "followed": mean(followed or [0.0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    questions = read_questions(REASONER, args.num_questions)
    rows: list[dict[str, Any]] = []
    for most_tokens, programs in ENGINES.values():
        reader.MOST_ANSWER_TOKENS = most_tokens
        with forked_engine(scheduler="dynasor", max_running_requests=64, max_total_tokens=65_536) as engine:
            for name, field in programs.items():
                runs: list[dict[str, float]] = []
                for _ in range(args.repeats):
                    flush(engine)
                    runs.append(solve(engine, questions, field))
                rows.append(
                    {
                        "way": name,
                        "accuracy %": span([run["accuracy"] for run in runs], 1),
                        "tokens per question": span([run["tokens"] for run in runs], 0),
                        "branches per question": round(mean(run["branches"] for run in runs), 1),
                        "answer tokens read per branch": round(mean(run["followed"] for run in runs), 2),
                        "questions": args.num_questions,
                        "repeats": args.repeats,
                        "model": "tiny reasoner",
                        **machine(),
                    }
                )
                show(rows[-1:])
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

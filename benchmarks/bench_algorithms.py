"""Every algorithm on held-out questions against uniform allocation at equal cap, on the real engine.

    python benchmarks/bench_algorithms.py --csv benchmarks/results/algorithms.csv

Uniform is the same algorithm told never to stop (Rebase: its whole width in one tree, as published), in the same engine on the
same questions, CONCURRENCY at a time. Tokens are those generated; what judging computed has a column of its own. Rewards come
from the model's own judge token, or, in the rows "checked", from an oracle that compares each line with the
true solution: the most that a program could gain by better rewards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from forked import forked_engine
from machine import machine
from rows import percentile, write_rows

from sglang_dynasor.demo import read_questions, show
from sglang_dynasor.frontend import LocalEngine
from sglang_dynasor.offline import Results, solve
from sglang_dynasor.policy.equal import answer_key

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
sys.path.append(str(REASONER))
from questions import held_out, prompt  # noqa: E402 - the generator is no package

CONCURRENCY = 16
SAMPLING = {"temperature": 1.0, "max_new_tokens": 200}
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}


class Way(NamedTuple):
    """One row: an algorithm with its field; `group` is what it is compared within, its first way being uniform."""

    group: str
    name: str
    algorithm: str
    field: dict[str, Any]
    is_checked: bool = False


def ways() -> list[Way]:
    found = [
        Way("greedy", "one answer", "self_consistency", {"branches": 1, "sampling": SAMPLING | {"temperature": 0}}),
        Way("self-consistency 16", "uniform", "self_consistency", {"stop": "never"}),
        Way("self-consistency 16", "stopped", "self_consistency", {}),
        Way("self-consistency 32", "uniform", "self_consistency", {"branches": 32, "stop": "never"}),
        Way("self-consistency 32", "stopped", "self_consistency", {"branches": 32}),
        Way("best-of-16, votes by reward", "uniform", "best_of_n", {"stop": "never", "vote": "reward", **JUDGE}),
        Way("best-of-16, votes by reward", "stopped", "best_of_n", {"stop": "predictive", "vote": "reward", **JUDGE}),
    ]

    def add(group: str, algorithm: str, field: dict[str, Any], uniform: dict[str, Any], *checked: bool) -> None:
        for is_checked in checked or (False, True):
            name, judged = (f"{group}, checked", field) if is_checked else (group, {**field, **JUDGE})
            found.append(Way(name, "uniform", algorithm, {"stop": "never", **judged, **uniform}, is_checked))
            found.append(Way(name, "stopped", algorithm, judged, is_checked))

    add("best-of-16", "best_of_n", {}, {})
    for width in (16, 32):
        add(f"Rebase {width}", "rebase", {"branches": width}, {"round_width": width})
    for cap in (3, 7, 10, 15, 20):  # with the oracle once: it is right whatever the cap
        add(f"MCTS {cap}", "mcts", {"branches": cap, "width": min(4, cap)}, {}, False)
    add("MCTS 10", "mcts", {"branches": 10, "width": 4}, {}, True)
    add("beam 16", "beam", {}, {})
    return found


def checker(lines: dict[str, list[str]]) -> Callable[[str, str], float]:
    """A verifier: 1 while every line of a solution is right, then less with every wrong one."""

    def reward(question: str, text: str) -> float:
        truth = lines[question]
        said = [line for line in text.splitlines() if line and not line.startswith("####")]
        wrong = sum(a != b for a, b in zip(said, truth, strict=False)) + max(0, len(said) - len(truth))
        if "####" in text:
            wrong += max(0, len(truth) - len(said))  # the rest was guessed
        return max(0.0, 1.0 - 0.25 * wrong)

    return reward


def solve_way(backend: LocalEngine, way: Way, questions: list[dict[str, Any]], progress: bool) -> Results:
    """All questions one way."""
    prompts = [question["prompt"] for question in questions]
    options = {"sampling": SAMPLING, "answer": "hash", "concurrency": CONCURRENCY, **way.field}
    if not way.is_checked:
        return solve(backend, prompts, way.algorithm, progress=progress, **options)
    known = {prompt(q.text): [line.strip() for line in q.lines] for q in held_out(len(questions))}
    return solve(backend, prompts, way.algorithm, progress=progress, reward=checker(known), **options)


def row(way: Way, runs: list[Results], base: list[Results], questions: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; savings against uniform."""

    def tokens(of: list[Results]) -> float:
        return mean(results.num_tokens for results in of) / len(questions)

    def accuracy(results: Results) -> float:
        right = (
            result.answer is not None and answer_key(result.answer) == str(question["answer"])
            for result, question in zip(results, questions, strict=True)
        )
        return 100 * mean(right)

    found = [accuracy(results) for results in runs]
    wall_s = mean(results.wall_s for results in runs)
    judged = [r.record.get("num_judge_tokens", 0) for results in runs for r in results]
    return {
        "algorithm": way.group,
        "way": way.name,
        "accuracy %": f"{mean(found):.1f}" + (f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""),
        "tokens per question": round(tokens(runs)),
        "tokens saved %": round(100 * (1 - tokens(runs) / tokens(base)), 1),
        "judge tokens per question": round(mean(judged)),
        "wall-clock s": round(wall_s, 1),
        "wall-clock saved %": round(100 * (1 - wall_s / mean(results.wall_s for results in base)), 1),
        "p90 latency s": round(percentile([r.latency_s for results in runs for r in results], 0.9), 2),
        "solutions per question": round(mean(r.num_branches for results in runs for r in results), 1),
        "questions": len(questions),
        "repeats": len(runs),
        "model": "tiny reasoner",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="groups whose name begins so")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    questions = read_questions(REASONER, args.num_questions)
    chosen = [way for way in ways() if not args.only or way.group.startswith(tuple(args.only))]
    facts = machine()
    uniform: dict[str, list[Results]] = {}
    rows: list[dict[str, Any]] = []
    with (
        forked_engine(
            model_path=str(REASONER / "checkpoint"),
            scheduler="dynasor",
            max_total_tokens=65_536,
            max_running_requests=128,
        ) as engine,
        LocalEngine(engine, rows=128) as backend,
    ):
        for way in chosen[:1]:  # warm up
            solve_way(backend, way, questions[:8], progress=False)
        for place, way in enumerate(chosen):
            results = [solve_way(backend, way, questions, progress=True) for _ in range(args.repeats)]
            rows.append({**row(way, results, uniform.setdefault(way.group, results), questions), **facts})
            if args.csv:  # what was measured stays, whatever happens to the rest
                write_rows(args.csv, rows)
            print(f"{place + 1} of {len(chosen)}", flush=True)
    show([{key: value for key, value in r.items() if key not in facts} for r in rows])


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()

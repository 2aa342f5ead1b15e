"""What a vote costs at worst, in milliseconds: everything that one finished branch causes in the scheduler's loop.

    python benchmarks/bench_votes.py --csv benchmarks/results/votes.csv

No engine is started. Programs with hostile votes are run branch by branch as the engine runs them: the vote, the rule, who
may speak, how many more to start, what the program is expected to need still, and the record. Every row is the dearest
branch of the dearest votes, each branch at the best of several runs: what the code needs, not what the machine was busy with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from machine import machine
from rows import write_rows

from sglang_dynasor.policy.certaindex import overtake_risk
from sglang_dynasor.policy.forecast import Forecast
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import BranchState, Program
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import Trial

REPEATS = 5
NUM_DEAREST = 4  # votes that were dearest once, looked at again
SIZES = (16, 64, 256)
TRIALS = "trials of long_cot"
LIMITS_MS = {16: 2.0, 64: 2.0, 256: 10.0}
JUDGE = {"judge": "model"}
RULES: dict[str, dict[str, Any]] = {
    "predictive": {"stop": "predictive:0"},
    "entropy": {"stop": "entropy:1"},
    "window": {"stop": "window:64"},
    "beta": {"stop": "beta:1"},
    "margin": {"stop": "margin"},
    "confidence": {"stop": "confidence:1"},
    "mixture": {"stop": "mixture:1", "answer": "hash"},
    "reward": {"stop": "reward:1", **JUDGE},
    "best": {"stop": "best:1", **JUDGE},
    "never": {"stop": "never"},
    "any of many levels of one rule": {"stop": " or ".join(f"predictive:.00{i}" for i in range(1, 10))},
    "all of many windows": {"stop": " and ".join(f"window:{size}" for size in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61))},
    "all rules": {"stop": "predictive:0 and entropy:1 and window:64 and beta:1 and margin and confidence:1 and mixture:1 and reward:1 and best:1", "vote": "reward", "answer": "hash", **JUDGE},
    "any rule": {"stop": "predictive:0 or entropy:1 or window:64 or beta:1 or margin or confidence:1 or mixture:1 or reward:1 or best:1", "vote": "reward", "answer": "hash", **JUDGE},
    "by confidence": {"stop": "predictive:0", "vote": "confidence"},
    "by reward": {"stop": "predictive:0", "vote": "reward", **JUDGE},
    "by the best": {"stop": "predictive:0", "vote": "best", **JUDGE},
}  # fmt: skip


def growing(num: int) -> list[int]:
    """Votes after which answers have 1, 2, 3, ... votes: as many different counts as can be."""
    return [answer for last in range(num) for answer in range(last + 1)][:num]


# By name: the answer of each branch, None for an abstention, and whether the program is closed half way.
VOTES: dict[str, Callable[[int], Sequence[int | None]]] = {
    "all different": lambda num: list(range(num)),
    "two-way tie": lambda num: [i % 2 for i in range(num)],
    "one vote apart": lambda num: [0, *(i % 2 for i in range(num - 1))],
    "one third": lambda num: [min(i % 3, 1) for i in range(num)],
    "many counts": lambda num: [*growing(num)],
    "many counts, then new ones": lambda num: [*growing(num // 3), *range(num, 2 * num)][:num],
    "abstentions": lambda num: [None if i % 2 else i for i in range(num)],
    "abstentions, then one answer": lambda num: [None] * (num // 2) + [0] * (num - num // 2),
    "all alike": lambda num: [0] * num,
}


def program_of(num_branches: int, field: dict[str, Any]) -> Program:
    """A program whose branches are all in flight."""
    program = Program("p", parse_field({"branches": num_branches, **field}, num_branches), usual_tokens=Mean(80.0))
    for _ in range(num_branches):
        program.start_branch()
    return program


def follow(program: Program, index: int, forecast: Forecast) -> None:
    """What the engine does once a branch has voted (engine/branches.py, engine/voting.py, policy/admission.py)."""
    _ = program.winner == index or index in program.speakers
    if program.reason is None:
        forecast.remaining_tokens(program, 0)
        forecast.branches(program)
        _ = program.needs_all
        program.num_to_start(program.spec.branches)
    program.record()  # only once, or with each branch that a client sends


def finish_ms(
    num_branches: int, field: dict[str, Any], answers: Sequence[int | None], *, closes: bool
) -> Iterator[float]:
    """What each finished branch costs, in turn."""
    program, forecast = program_of(num_branches, field), Forecast()
    if program.spec.stop.reads_answers:
        for index in range(num_branches):
            program.answers.see((), {20 * index + token: -3.0 for token in range(20)})
            program.end_answer(index, ())
    for index, answer in enumerate(answers):
        if closes and index == num_branches // 4:
            program.fail(num_branches - 1, 1, closes=True)
            forecast.branches(program)
        if program.branches[index].state is not BranchState.IN_FLIGHT:
            return
        confidence = program.branches[index].confidence
        if confidence is not None:
            confidence.add(1.0 + index % 7)
        reward = None if program.spec.judge is None else (index * 7 % 11) / 12
        text = None if answer is None else str(answer)
        started = time.thread_time()
        program.count(index, text, 100, reward)
        follow(program, index, forecast)
        yield 1e3 * (time.thread_time() - started)


def trial_ms(num_branches: int) -> Iterator[float]:
    """What each trial of a running chain costs, where every chain has one and each says something else."""
    program = program_of(num_branches, {"algorithm": "long_cot", "stop": "predictive:0"})
    forecast = Forecast()
    for index in (*range(num_branches), *range(num_branches)):
        trial = Trial(str(index), str(index), 1.0, 600)
        started = time.thread_time()
        program.see_trial(index, trial)
        forecast.branches(program)
        yield 1e3 * (time.thread_time() - started)


def dearest_ms(run: Callable[[], Iterator[float]], repeats: int = REPEATS) -> float:
    """The dearest branch of a run, each at its best of several."""
    best: list[float] = []
    for _ in range(repeats):
        overtake_risk.cache_clear()
        times = list(run())
        best = [min(pair) for pair in zip(best, times, strict=True)] if best else times
    return max(best)


def dearest_votes(size: int, field: dict[str, Any]) -> tuple[float, str]:
    """What the dearest votes of a program cost, in milliseconds, and which they are."""
    runs = {
        f"{votes}{', closed' * closes}": partial(finish_ms, size, field, make(size), closes=closes)
        for votes, make in VOTES.items()
        for closes in (False, True)
    }
    once = {votes: dearest_ms(run, 1) for votes, run in runs.items()}
    dearest = sorted(runs, key=once.__getitem__)[-NUM_DEAREST:]
    return max((dearest_ms(runs[votes]), votes) for votes in dearest)


def row(name: str, sizes: list[int]) -> dict[str, Any]:
    """One rule or way of weighing, by the size of the program."""
    made: dict[str, Any] = {"rule or weights": name}
    for size in sizes:
        ms, votes = (
            dearest_votes(size, RULES[name])
            if name in RULES
            else (dearest_ms(partial(trial_ms, size)), "all different")
        )
        made |= {f"{size} branches ms": f"{ms:.2f}", "dearest votes": votes}
    return made


def main() -> None:
    """Measure, print, and write what was found as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in (*RULES, TRIALS):
        found.append(row(name, args.branches))
        print("  ".join(f"{key}={value}" for key, value in found[-1].items()), flush=True)
    if args.csv:
        write_rows(args.csv, [made | machine() for made in found])


if __name__ == "__main__":
    main()

"""Self-consistency on held-out questions, every way through the same HTTP endpoint in one run.

    python benchmarks/bench_self_consistency.py --csv benchmarks/results/self_consistency.csv

Ways: stock SGLang's majority of `n` samples (the base of all comparisons), one greedy sample, the client-side library
its_hub (a wave of 2, then 4, 8 and 16 samples in all, until 75 % agree), and programs. The first three go to a server without
the flag, programs to one with it; one server is alive at a time. All send to /v1/chat/completions from one event loop,
CONCURRENCY questions at a time. Each way runs --repeats times; a row has the mean and the range.

its_hub is needed for its row only: `pip install -e '.[bench]'`, or leave the row out with --no-peer.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from clients import ITS_HUB, KEEP_ALIVE, Chat, Question, Solve, chat, check_hub, hub
from machine import machine
from rows import percentile, write_rows
from server import Server
from tqdm import tqdm

from sglang_dynasor.demo import CONCURRENCY, ROWS, read_questions
from sglang_dynasor.outcome import Outcome, Solved, show

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
PROGRAMS: dict[str, dict[str, Any]] = {
    "program": {},
    "program, margin (lossless)": {"stop": "margin"},
}
# As the demo's engine: what it costs on two cores must not depend on SGLang's guess of the memory.
SERVER = (
    "--dtype", "float32", "--max-total-tokens", "65536", "--max-running-requests", str(ROWS), "--log-level", "error",
)  # fmt: skip
WARM_UP_QUESTIONS = 8


def span(values: list[float], digits: int) -> str:
    """Mean and range."""
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


async def run(name: str, solve: Solve, questions: list[Question]) -> Outcome:
    """Solve all questions, CONCURRENCY at a time."""
    room, started = asyncio.Semaphore(CONCURRENCY), time.perf_counter()
    with tqdm(total=len(questions), desc=f"{name:<28}", unit="question") as bar:

        async def one(question: Question) -> Solved:
            async with room:
                solved = await solve(question)
            bar.update()
            return solved

        solved = await asyncio.gather(*(one(question) for question in questions))
    return Outcome(name, list(solved), time.perf_counter() - started)


async def measure(
    options: tuple[str, ...],
    ways_of: Callable[[Chat, AsyncExitStack], Awaitable[dict[str, Solve]]],
    questions: list[Question],
    cap: int,
    repeats: int,
) -> dict[str, list[Outcome]]:
    """All ways of one server, each in turn, `repeats` times."""
    outcomes: dict[str, list[Outcome]] = {}
    with TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log", *SERVER, *options, environment={"OMP_NUM_THREADS": "1", **KEEP_ALIVE})
        try:
            server.wait()
            async with AsyncExitStack() as stack:
                ways = await ways_of(await stack.enter_async_context(chat(server.url, cap)), stack)
                for solve in ways.values():
                    await run("warm up", solve, questions[:WARM_UP_QUESTIONS])
                for _ in range(repeats):
                    for name, solve in ways.items():
                        outcomes.setdefault(name, []).append(await run(name, solve, questions))
        finally:
            server.stop()
    return outcomes


def p90(outcome: Outcome) -> float:
    return percentile((s.latency_s for s in outcome.solved), 0.9)


def mean_latency(outcome: Outcome) -> float:
    return mean(s.latency_s for s in outcome.solved)


def compare(
    programs: dict[str, dict[str, Any]],
    questions: list[Question],
    cap: int,
    repeats: int,
    *,
    with_peer: bool = False,
) -> list[dict[str, Any]]:
    """One row per way, stock first; savings against stock.

    Args:
        programs: by name, keys of the field.
        with_peer: whether its_hub is.
    """
    facts = machine()

    async def stock_ways(client: Chat, stack: AsyncExitStack) -> dict[str, Solve]:
        ways: dict[str, Solve] = {f"stock, {cap} samples": client.stock, "stock, greedy, 1 sample": client.greedy}
        if with_peer:
            ways[f"{ITS_HUB}, doubling"] = (await stack.enter_async_context(hub(client.url, cap))).doubling
        return ways

    async def program_ways(client: Chat, stack: AsyncExitStack) -> dict[str, Solve]:
        return {name: lambda q, field=field: client.program(q, field) for name, field in programs.items()}

    async def measure_all() -> dict[str, list[Outcome]]:
        outcomes = await measure((), stock_ways, questions, cap, repeats)
        return outcomes | await measure(("--scheduler", "dynasor"), program_ways, questions, cap, repeats)

    outcomes = asyncio.run(measure_all())
    base = next(iter(outcomes.values()))
    base_tokens, base_wall_s = mean(o.num_tokens for o in base), mean(o.wall_s for o in base)
    base_latency_s, base_p90_s = mean(map(mean_latency, base)), mean(map(p90, base))
    return [
        {
            "way": name,
            "accuracy %": span([100 * o.accuracy for o in runs], 1),
            "tokens per question": round(mean(o.num_tokens for o in runs) / len(questions)),
            "tokens saved %": span([100 * (1 - o.num_tokens / base_tokens) for o in runs], 1),
            "wall-clock s": span([o.wall_s for o in runs], 0),
            "wall-clock saved %": round(100 * (1 - mean(o.wall_s for o in runs) / base_wall_s), 1),
            "mean latency": f"{mean(map(mean_latency, runs)) / base_latency_s:.2f}x",
            "p90 latency": f"{mean(map(p90, runs)) / base_p90_s:.2f}x",
            "branches per question": round(mean(s.num_branches for o in runs for s in o.solved), 1),
            "questions": len(questions),
            "repeats": repeats,
            "model": "tiny reasoner",
            **facts,
        }
        for name, runs in outcomes.items()
    ]


def main(programs: dict[str, dict[str, Any]], about: str | None, *, with_others: bool = False) -> None:
    """The command line; `with_others`: its_hub has a row, too."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=320)
    parser.add_argument("--cap", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    if with_others:
        parser.add_argument("--no-peer", action="store_true", help="leave out the row of its_hub")
    args = parser.parse_args()
    with_peer = with_others and not args.no_peer
    if with_peer:
        check_hub("--no-peer")
    questions = read_questions(REASONER, args.num_questions)
    rows = compare(programs, questions, args.cap, args.repeats, with_peer=with_peer)
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main(PROGRAMS, __doc__, with_others=True)

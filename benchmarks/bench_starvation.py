"""The wait of hard programs under overload: stock fcfs against ours with its bound, and without.

    python benchmarks/bench_starvation.py --csv benchmarks/results/starvation.csv

A stream of easy programs (1 or 2 steps) comes at twice the rate the engine sustains, measured first in a closed loop on
the same engine, so every way is overloaded alike. Every few seconds a hard one comes with it: 8 steps, twice the cap, and
no early stop. The KV pool is small, so that the bound (one pool of tokens for later arrivals) is far shorter than the run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench_online import ENGINE, SAMPLING, WAYS, Way, draw, solve
from forked import REASONER, flush, forked_engine
from machine import machine
from open_loop import in_turn, play
from rows import percentile, spread, write_rows

from sglang_dynasor.demo import Solved, program_params, read_questions, show
from sglang_dynasor.sim.arrivals import poisson

POOL_TOKENS = 24_576  # holds 64 rows of a prompt and 200 tokens with room to spare
CAP, HARD_CAP = 16, 32
OVERLOAD = 2


class Arrival(NamedTuple):
    at_s: float
    question: dict[str, Any]
    is_hard: bool


class Ended(NamedTuple):
    is_hard: bool
    latency_s: float
    overtaken_tokens: int  # given to later arrivals before its last branch started


def mixed(questions: list[dict[str, Any]], rate: float, seconds: float, every: float, seed: int) -> list[Arrival]:
    """Easy programs at `rate` for `seconds`, with a hard one every `every` seconds."""
    times_s = poisson(rate, round(rate * seconds), seed)
    easy = [Arrival(at_s, q, False) for at_s, q in zip(times_s, draw_easy(questions, len(times_s), seed), strict=True)]
    hard_questions = draw([q for q in questions if q["num_steps"] == 8], int((seconds - 1e-9) // every), seed)
    hard = [Arrival(every * (i + 1), q, True) for i, q in enumerate(hard_questions)]
    return sorted(easy + hard, key=lambda arrival: arrival.at_s)


def draw_easy(questions: list[dict[str, Any]], num: int, seed: int) -> list[dict[str, Any]]:
    return draw([q for q in questions if q["num_steps"] <= 2], num, seed)


def sustained(engine: Any, way: Way, questions: list[dict[str, Any]]) -> float:
    """Programs per second with always enough of them waiting."""

    async def send(index: int, due: float) -> Solved:
        return await solve(engine, way, questions[index], due, CAP)

    started = time.perf_counter()
    engine.loop.run_until_complete(in_turn(len(questions), CAP, send))
    return len(questions) / (time.perf_counter() - started)


def overload(engine: Any, way: Way, arrivals: list[Arrival]) -> list[Ended]:
    """Play the arrivals on a drained engine with empty caches."""
    flush(engine)

    async def send(index: int, due: float) -> Ended:
        arrival = arrivals[index]
        if not arrival.is_hard or way.is_stock:
            cap = HARD_CAP if arrival.is_hard else CAP
            return Ended(arrival.is_hard, (await solve(engine, way, arrival.question, due, cap)).latency_s, 0)
        out = await engine.async_generate(arrival.question["prompt"], program_params(HARD_CAP, stop="never") | SAMPLING)
        overtaken_tokens = out["meta_info"]["dynasor"].get("overtaken_tokens", 0)
        return Ended(True, time.perf_counter() - due, overtaken_tokens)

    return engine.loop.run_until_complete(play([arrival.at_s for arrival in arrivals], send))


def bound_tokens(questions: list[dict[str, Any]]) -> int:
    """What later arrivals may get at most while a program waits (docs/waiting.md): the patience, and all rows' longest branches."""
    prompt_tokens = max(len(q["prompt"]) for q in questions)  # no token is shorter than a character
    return POOL_TOKENS + ENGINE["max_running_requests"] * (prompt_tokens + SAMPLING["max_new_tokens"])


def measure(way: Way, questions: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The row of one way: what its hard programs waited, over all repeats."""
    hard: list[list[Ended]] = []
    easy_p99_s: list[float] = []
    with forked_engine(**{**ENGINE, "max_total_tokens": POOL_TOKENS}, **way.options) as engine:
        sustained(engine, way, draw_easy(questions, 8, seed=-2))  # warm up
        rate = OVERLOAD * sustained(engine, way, draw_easy(questions, args.num_warm, seed=-1))
        for repeat in range(args.repeats):
            ends = overload(engine, way, mixed(questions, rate, args.seconds, args.every, repeat))
            hard.append([end for end in ends if end.is_hard])
            easy_p99_s.append(percentile((end.latency_s for end in ends if not end.is_hard), 0.99))
            print(f"{way.name}, repeat {repeat + 1}: worst {max(e.latency_s for e in hard[-1]):.1f} s", flush=True)
    is_bounded = not way.is_stock and "dynasor_patience_tokens" not in way.options
    return {
        "way": way.name,
        "easy programs per s": f"{rate:.1f}",
        "hard worst s": spread([max(end.latency_s for end in run) for run in hard], 1),
        "hard mean s": spread([mean(end.latency_s for end in run) for run in hard], 1),
        "easy p99 s": spread(easy_p99_s, 1),
        "most tokens overtaken": "-" if way.is_stock else max(end.overtaken_tokens for run in hard for end in run),
        "bound tokens": bound_tokens(questions) if is_bounded else "-",
        "hard programs": len(hard[0]),
        "seconds": args.seconds,
        "repeats": args.repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=60, help="of arrivals; the engine needs about as long again after"
    )
    parser.add_argument("--every", type=float, default=5, help="seconds between hard programs")
    parser.add_argument("--num-warm", type=int, default=60, help="easy programs to measure the sustained rate with")
    parser.add_argument("--repeats", type=int, default=3)
    names = ["stock fcfs", "all", "all, no bound"]
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], default=names, metavar="WAY")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    facts = machine()
    questions = read_questions(REASONER, 600)
    print(f"about {len(args.ways) * (15 + args.repeats * 2.3 * args.seconds) / 60:.0f} min", flush=True)
    rows = [measure(way, questions, args) | {"model": "tiny reasoner"} | facts for way in WAYS if way.name in args.ways]
    show([{key: row[key] for key in row if key not in facts} for row in rows])
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

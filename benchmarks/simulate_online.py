"""The highest rate at which a way keeps its SLO, on a modelled engine: bench_online.py's question in minutes, on any samples.

    python benchmarks/simulate_online.py --samples samples.jsonl --costs cpu gpu --csv benchmarks/results/simulate_online.csv

A repeat has its own order of questions and samples and its own Poisson stream, stretched to each rate; all ways get the same.
The SLO is twice the p90 of stock with one question at a time. A rate is kept where p90 is inside the SLO, and all is answered
within two SLOs of the last arrival: shortest-first could leave a tenth of the programs behind for ever. The highest is found by
halving, to RATE_FRAC.
Intervals (95 %) are of the mean over repeats, ratios paired by repeat. docs/simulator.md says what the model leaves out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from machine import commit
from rows import percentile, write_rows

from sglang_dynasor.config import LEVELS, DynasorConfig
from sglang_dynasor.outcome import show
from sglang_dynasor.sim.arrivals import poisson
from sglang_dynasor.sim.costs import read_costs
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import Load, Run, parse_way, simulate
from sglang_dynasor.sim.samples import read_samples

STOCK = "stock"
WAYS = (STOCK, "doubling", *(f"program stop={level}" for level in LEVELS))
RATE_FRAC = 0.04
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's, by repeats


def highest_rate(is_kept: Callable[[float], bool], start: float) -> float:
    """The rate up to which `is_kept`, to RATE_FRAC; `start` is any rate to begin with."""
    low = high = start
    while not is_kept(low):
        high, low = low, low / 2
    while high == low or is_kept(high):
        low, high = high, 2 * high
    while high > low * (1 + RATE_FRAC):
        middle = sqrt(low * high)
        low, high = (middle, high) if is_kept(middle) else (low, middle)
    return sqrt(low * high)


def spanned(values: list[float], digits: int) -> str:
    """Mean with its interval; of one value that alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = T_95.get(len(values), 1.96) * stdev(values) / sqrt(len(values))
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def p90(run: Run) -> float:
    return percentile((one.latency_s for one in run.solved), 0.9)


def measure(args: argparse.Namespace, curve: str) -> list[dict[str, Any]]:
    """The rows of one cost curve."""
    config, costs = DynasorConfig(dynasor_max_branches=256), read_costs(curve)
    size = Size(args.rows, args.pool_tokens, max_new_tokens=args.max_new_tokens)
    samples = read_samples(args.samples, args.dataset, args.prompt_tokens)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: dict[str, list[float]] = {name: [] for name in WAYS}
    right: dict[str, list[float]] = {name: [] for name in WAYS}
    slos_s: list[float] = []
    for repeat in range(args.repeats):
        drawn = [
            samples[number % len(samples)].drawn(f"{repeat} {number // len(samples)}", args.cap)
            for number in range(args.num_programs)
        ]

        def run(name: str, load: Load, drawn: list[Any] = drawn) -> Run:
            return simulate(parse_way(name, args.cap, config), drawn, load, size, costs, config)

        def at(rate: float, repeat: int = repeat) -> Load:
            return Load(times_s=tuple(poisson(rate, args.num_programs, repeat)))

        idle = run(STOCK, Load(num_at_once=1))
        slos_s.append(2 * p90(idle))
        start = 0.5 * args.num_programs / idle.wall_s
        for name in WAYS:

            def is_kept(rate: float, name: str = name) -> bool:
                load = at(rate)
                made = run(name, load)
                return max(p90(made), (made.wall_s - load.times_s[-1]) / 2) <= slos_s[-1]

            rate = highest_rate(is_kept, start)
            last = run(name, at(rate))
            rates[name].append(rate)
            tokens[name].append(mean(one.num_tokens for one in last.solved))
            right[name].append(100 * mean(bool(one.is_right) for one in last.solved))
        print(f"{curve}, repeat {repeat + 1}: { ({name: round(rates[name][-1], 4) for name in WAYS}) }", flush=True)
    gains = {name: [rate / base for rate, base in zip(rates[name], rates[STOCK], strict=True)] for name in WAYS}
    return [
        {
            "costs": curve,
            "way": name,
            "highest rate in the SLO per minute": spanned([60 * rate for rate in rates[name]], 2),
            "against stock": f"{spanned(gains[name], 2)}x",
            "tokens per program there": f"{mean(tokens[name]):.0f}",
            "accuracy %": f"{mean(right[name]):.1f}",
            "SLO s": f"{mean(slos_s):.1f}",
        }
        for name in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dataset", metavar="TEXT", help="only questions whose dataset or model contains this")
    parser.add_argument("--costs", nargs="+", default=["cpu"], metavar="CURVE", help="as of `sglang-dynasor simulate`")
    parser.add_argument("--cap", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pool-tokens", type=int, default=1_000_000)
    parser.add_argument("--max-new-tokens", type=int, default=32_768)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of questions that do not say")
    parser.add_argument("--num-programs", type=int, default=600, help="of a stream")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = [row for curve in args.costs for row in measure(args, curve)]
    show(rows)
    if args.csv:
        closing = {
            "cap": args.cap, "rows": args.rows, "programs": args.num_programs, "repeats": args.repeats,
            "samples": f"{args.samples.name.partition('.')[0]} {args.dataset or ''}".strip(), "commit": commit(),
        }  # fmt: skip
        write_rows(args.csv, [row | closing for row in rows])


if __name__ == "__main__":
    main()

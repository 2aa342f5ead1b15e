"""Program latency against request rate: open-loop streams of self-consistency programs, stock policies against ours.

    python benchmarks/bench_online.py --csv benchmarks/results/online --plot benchmarks/results/online.png

In a repeat each way has an engine of its own, one alive at a time, and gets the same questions (1 to 4 steps, mixed) with the
same gaps between them, stretched to each rate. The latency of a program counts from the time it was due to its answer, which
stock clients vote for themselves. First, idle: one program at a time. The SLO is twice the p90 of stock then, of all its orders,
which are one when idle. A rate is kept where p90 is inside the SLO, and all is answered within two SLOs of the last arrival:
shortest-first could leave a tenth of the programs behind for ever. Rates rise until a way is far above.

Intervals (95 %) are of blocks of BLOCK programs in a row drawn anew, the same ones for every way: who waits behind whom stays
together. `--csv PREFIX` writes PREFIX.csv (one row per way and process) and PREFIX_points.csv (one per rate, too).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import numpy.typing as npt
from forked import REASONER, flush, forked_engine
from machine import machine
from open_loop import TRACE, in_turn, play
from rows import percentile, spread, write_rows

from sglang_dynasor.config import CAREFUL, LEVELS
from sglang_dynasor.demo import Solved, program_params, read_questions, read_record, show, stock_params, vote
from sglang_dynasor.sim.arrivals import poisson, recorded

# As in the recorded MATH-500 samples that the goal was set on (docs/results.md): cap 32, a single sample right in three of
# four cases (here 76 %). The reasoner's long mode: like a reasoning model's, the lengths of one question's branches
# differ (coefficient of variation 0.4), which those of its direct mode do not. Few branches (3 %) reach their token limit.
CAP = 32
MAX_STEPS, THINK = 4, "<think>"
SAMPLING = {"temperature": 1.0, "max_new_tokens": 256}
ENGINE: dict[str, Any] = {"max_running_requests": 64, "max_total_tokens": 131_072}
BLOCK, NUM_DRAWS = 10, 1000  # programs drawn together, and how often
UNBOUNDED_TOKENS = 10**12  # no program is ever overtaken by this much: pure shortest-first
ROUGH_PER_S = 0.5, 1.8  # programs per second of stock and of ours on two cores: for the estimate of the time only
ROUGH_IDLE_S = 1.5
SLO_FACTOR = 2
IDLE_PART = 4  # of a stream's programs run when idle


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Way:
    """How an engine schedules and what a client asks it for."""

    name: str
    options: dict[str, Any]
    program: dict[str, Any] | None = None  # keys of the dynasor field; None: stock samples and a vote by the client

    @property
    def is_stock(self) -> bool:
        return self.program is None


def _stock(policy: str) -> Way:
    return Way(f"stock {policy}", {"schedule_policy": policy})


def _ours(name: str, program: dict[str, Any], **options: Any) -> Way:
    return Way(name, {"scheduler": "dynasor", **options}, program)


UNIFORM = {"stop": "never"}
WAYS = (
    _stock("fcfs"),
    _stock("lpm"),
    _stock("hrrn"),
    _stock("routing-key"),
    _ours("+gang", UNIFORM, dynasor_patience_tokens=0, dynasor_width=CAP),
    _ours("+gang +SJF", UNIFORM, dynasor_patience_tokens=UNBOUNDED_TOKENS, dynasor_width=CAP),
    _ours("+gang +certainty", {}, dynasor_patience_tokens=0),
    _ours("all", {"stop": CAREFUL}),
    *(_ours(f"all, {level}", {"stop": level}) for level in LEVELS if level != CAREFUL),
    _ours("all, no bound", {}, dynasor_patience_tokens=UNBOUNDED_TOKENS),
)


async def solve(engine: Any, way: Way, question: dict[str, Any], due: float, cap: int = CAP, **extra: Any) -> Solved:
    """One program, from when it was due to its answer; `extra` keys join the field of a program."""
    if way.program is not None:
        params = program_params(cap, **{**way.program, **extra}) | SAMPLING
        out = await engine.async_generate(question["prompt"], params)
        return read_record(question, out["meta_info"]["dynasor"], time.perf_counter() - due)
    if way.options["schedule_policy"] == "routing-key":
        outs = await sample_by_key(engine, question["prompt"], cap)
    else:
        outs = await engine.async_generate(question["prompt"], stock_params(cap) | SAMPLING)
    return vote(question, outs, time.perf_counter() - due)


async def sample_by_key(engine: Any, prompt: str, num_samples: int) -> list[dict[str, Any]]:
    """The samples of one prompt under one routing key.

    SGLang 0.5.23 drops the key of a request with n > 1, so this sends what n > 1 becomes: the prompt, then the samples.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    key = f"{random.getrandbits(64):x}"

    async def one(**params: Any) -> dict[str, Any]:
        request = GenerateReqInput(text=prompt, sampling_params=stock_params(1) | SAMPLING | params, routing_key=key)
        return await anext(engine.tokenizer_manager.generate_request(request, None))

    await one(max_new_tokens=0)
    return await asyncio.gather(*(one() for _ in range(num_samples)))


@dataclass(frozen=True, slots=True)
class Run:
    """One stream through one engine."""

    solved: list[Solved]
    wall_s: float
    drain_s: float = 0.0  # from the last arrival to the last answer

    def latency(self, share: float) -> float:
        return percentile((s.latency_s for s in self.solved), share)

    @property
    def mean_latency(self) -> float:
        return mean(s.latency_s for s in self.solved)

    @property
    def accuracy(self) -> float:
        return 100 * mean(s.is_right for s in self.solved)

    @property
    def tokens(self) -> float:
        return mean(s.num_tokens for s in self.solved)


@dataclass(slots=True)
class Point:
    """All repeats of one way at one rate of one process; no runs: skipped, as a lower rate was far too much."""

    way: Way
    process: str
    rate: float  # 0: idle
    runs: list[Run] = field(default_factory=list)

    @property
    def p90(self) -> float:
        """Of the programs of all repeats."""
        return percentile((s.latency_s for run in self.runs for s in run.solved), 0.9)

    @property
    def drain_s(self) -> float:
        """Of the slowest repeat."""
        return max(run.drain_s for run in self.runs)

    @property
    def needs_s(self) -> float:
        """The shortest SLO that keeps this rate."""
        return max(self.p90, self.drain_s / 2)

    def drawn_needs(self, picks: Floats) -> Floats:
        """`needs_s` where p90 is that of blocks drawn anew.

        Args:
            picks: draws x blocks, each in [0, 1): where in this point's blocks; the same picks for two points of the same
                streams are the same programs.
        """
        size = min(BLOCK, len(self.runs[0].solved))
        blocks = np.array(
            [
                [one.latency_s for one in run.solved[first : first + size]]
                for run in self.runs
                for first in range(0, len(run.solved) - size + 1, size)
            ]
        )
        chosen = blocks[(picks * len(blocks)).astype(int)]
        return np.maximum(np.quantile(chosen.reshape(len(picks), -1), 0.9, axis=1), self.drain_s / 2)

    def row(self, slo_s: float) -> dict[str, Any]:
        columns: dict[str, tuple[Callable[[Run], float], int]] = {
            "mean s": (lambda run: run.mean_latency, 2),
            "p50 s": (lambda run: run.latency(0.5), 2),
            "p90 s": (lambda run: run.latency(0.9), 2),
            "max s": (lambda run: run.latency(1), 2),
            "sum s": (lambda run: sum(s.latency_s for s in run.solved), 0),
            "accuracy %": (lambda run: run.accuracy, 1),
            "tokens per program": (lambda run: run.tokens, 0),
            "wall-clock s": (lambda run: run.wall_s, 1),
            "after the last arrival s": (lambda run: run.drain_s, 1),
        }
        row: dict[str, Any] = {"way": self.way.name, "process": self.process, "rate": self.rate}
        row |= {
            key: spread([value(run) for run in self.runs], digits) if self.runs else "skipped"
            for key, (value, digits) in columns.items()
        }
        return row | {
            "SLO s": round(slo_s, 2),
            "programs": len(self.runs[0].solved) if self.runs else 0,
            "repeats": len(self.runs),
        }


def picks_of(num_programs: int, num_repeats: int) -> Floats:
    """For `Point.drawn_needs`: as many blocks as all repeats have."""
    num_blocks = max(1, num_programs // BLOCK) * num_repeats
    return np.random.default_rng(0).random((NUM_DRAWS, num_blocks))


def draw(questions: list[dict[str, Any]], num: int, seed: int) -> list[dict[str, Any]]:
    """The questions of a repeat: the same for every way, and at every rate as many of the same."""
    return random.Random(seed).choices(questions, k=num)


def stream(engine: Any, way: Way, questions: list[dict[str, Any]], times_s: list[float] | None) -> Run:
    """Play one stream on a drained engine with empty caches; without times, one program after the other."""
    flush(engine)
    started = time.perf_counter()

    async def send(index: int, due: float) -> Solved:
        return await solve(engine, way, questions[index], due)

    whole = in_turn(len(questions), 1, send) if times_s is None else play(times_s, send)
    solved = engine.loop.run_until_complete(whole)
    wall_s = time.perf_counter() - started
    return Run(solved, wall_s, 0.0 if times_s is None else wall_s - times_s[-1])


class Bench:
    """One run of the benchmark: its settings, and the points so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        questions = read_questions(REASONER, 600)
        self.questions = [q | {"prompt": q["prompt"] + THINK} for q in questions if q["num_steps"] <= MAX_STEPS]
        self.points: list[Point] = []
        self.started = time.perf_counter()

    @property
    def slo_s(self) -> float:
        """Of the stock ways measured so far."""
        idle = [p for p in self.points if p.process == "idle" and p.way.is_stock]
        return SLO_FACTOR * percentile((s.latency_s for p in idle for run in p.runs for s in run.solved), 0.9)

    def estimate_s(self, ways: list[Way]) -> float:
        """Roughly how long it takes, if rates are skipped beyond half as much again as an engine sustains."""
        total_s = 0.0
        for way in ways:
            per_s = ROUGH_PER_S[0] if way.is_stock else ROUGH_PER_S[1]
            total_s += 10 + ROUGH_IDLE_S * self.args.num_programs / IDLE_PART
            for rate in self.args.rates:
                total_s += len(self.args.processes) * self.args.num_programs / min(rate, per_s)
                if rate > per_s:
                    break
        return self.args.repeats * total_s

    def times_s(self, process: str, rate: float, repeat: int) -> list[float]:
        num = self.args.num_programs
        if process == "poisson":
            return poisson(rate, num, repeat)
        return recorded(rate, num, repeat, self.args.traces / TRACE)

    def measure(self, way: Way, repeat: int) -> None:
        """One repeat of one way: idle, then each process until it is far over the SLO."""
        with forked_engine(**ENGINE, **way.options) as engine:
            stream(engine, way, draw(self.questions, 8, seed=-1), None)  # warm up
            questions = draw(self.questions, self.args.num_programs, repeat)
            idle = questions[: max(1, len(questions) // IDLE_PART)]
            times_s = poisson(self.args.idle_rate, len(idle), repeat) if self.args.idle_rate else None
            self.add(self.point(way, "idle", 0), stream(engine, way, idle, times_s))
            for process in self.args.processes:
                is_over = False
                for rate in self.args.rates:
                    point = self.point(way, process, rate)
                    if not is_over:
                        run = stream(engine, way, questions, self.times_s(process, rate, repeat))
                        self.add(point, run)
                        is_over = max(run.latency(0.9), run.drain_s / 2) > self.args.drop_at * self.slo_s

    def point(self, way: Way, process: str, rate: float) -> Point:
        found = [p for p in self.points if (p.way, p.process, p.rate) == (way, process, rate)]
        if not found:
            found.append(Point(way, process, rate))
            self.points += found
        return found[0]

    def add(self, point: Point, run: Run) -> None:
        point.runs.append(run)
        print(
            f"[{(time.perf_counter() - self.started) / 60:5.1f} min] {point.way.name:<18} {point.process:<8} "
            f"rate {point.rate:<5g} mean {run.mean_latency:6.2f}  p90 {run.latency(0.9):6.2f}  slowest {run.latency(1):6.2f} s  "
            f"accuracy {run.accuracy:5.1f} %  tokens {run.tokens:5.0f}  wall {run.wall_s:5.1f} s",
            flush=True,
        )

    def idle(self, way: Way) -> Point:
        return next(p for p in self.points if p.way is way and p.process == "idle")

    def curve(self, way: Way, process: str) -> list[Point]:
        """The measured points from idle to the highest rate."""
        return [self.idle(way), *(p for p in self.points if p.way is way and p.process == process and p.runs)]

    def summary(self, ways: list[Way]) -> Iterator[dict[str, Any]]:
        base_s = median(run.mean_latency for way in ways if way.is_stock for run in self.idle(way).runs)
        picks = picks_of(self.args.num_programs, self.args.repeats)
        drawn = {id(point): point.drawn_needs(picks) for point in self.points if point.runs}
        stock_idle = np.mean([drawn[id(self.idle(way))] for way in ways if way.is_stock], axis=0)
        for process in self.args.processes:
            curves = {way.name: self.curve(way, process) for way in ways}
            highest = {
                way.name: highest_rate([(p.rate, p.needs_s) for p in curves[way.name]], self.slo_s) for way in ways
            }
            redrawn = {
                way.name: np.array(
                    [
                        highest_rate([(p.rate, drawn[id(p)][i]) for p in curves[way.name]], SLO_FACTOR * stock_idle[i])[
                            0
                        ]
                        for i in range(NUM_DRAWS)
                    ]
                )
                for way in ways
            }
            best_stock = max((way.name for way in ways if way.is_stock), key=lambda name: highest[name][0])
            # The highest rate at which every way was measured: there the ways are compared.
            common = max(set.intersection(*({p.rate for p in curve} for curve in curves.values())))
            for way in ways:
                rate, is_more = highest[way.name]
                more = ">= " if is_more else ""
                at_common = next(p for p in curves[way.name] if p.rate == common).runs
                yield {
                    "way": way.name,
                    "process": process,
                    "idle mean latency (stock 1)": spread([r.mean_latency / base_s for r in self.idle(way).runs], 2),
                    "highest rate in the SLO": f"{more}{spanned(rate, redrawn[way.name])}/s",
                    "against the best stock": against(
                        rate, highest[best_stock][0], redrawn[way.name], redrawn[best_stock], more
                    ),
                    "at rate": f"{common:g}/s",
                    "slowest s": spread([r.latency(1) for r in at_common], 1),
                    "tokens per program": spread([r.tokens for r in at_common], 0),
                    "accuracy %": spread([r.accuracy for r in at_common], 1),
                    "SLO s": round(self.slo_s, 2),
                }


def spanned(value: float, draws: Floats) -> str:
    """A value with its 95 % interval."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def against(rate: float, stock: float, rates: Floats, stocks: Floats, more: str) -> str:
    """How many times the rate of stock; draws in which stock is never inside the SLO do not count."""
    if not stock:
        return "-"
    inside = stocks > 0
    return f"{more}{spanned(rate / stock, rates[inside] / stocks[inside])}x"


def highest_rate(curve: list[tuple[float, float]], slo_s: float) -> tuple[float, bool]:
    """The rate at which what a way needs first leaves the SLO, and whether it was still inside at the highest measured.

    Between two measured rates the logarithm of it is taken as linear: it bends upwards, and a straight line would understate
    whoever leaves the SLO between two rates that are far apart.

    Args:
        curve: rate and what it needs in seconds, by rising rate; the first is idle, at rate 0.
    """
    if curve[0][1] > slo_s:
        return 0.0, False
    for (low, low_s), (high, high_s) in pairwise(curve):
        if high_s > slo_s:
            return low + (high - low) * log(slo_s / low_s) / log(high_s / low_s), False
    return curve[-1][0], True


def plot(bench: Bench, ways: list[Way], picture: Path) -> None:
    """p90 latency against rate, a line per way; the SLO dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    processes = bench.args.processes
    figure, axes = plt.subplots(1, len(processes), figsize=(6.2 * len(processes), 4.6), squeeze=False, sharey=True)
    greys = iter(("#4a5560", "#7b8794", "#a3adb8", "#c8ced5"))
    colors = iter(("#e9c46a", "#8ab17d", "#2a9d8f", "#1f4e79", "#9b5de5"))
    styles = {way.name: (next(greys), "o:") if way.is_stock else (next(colors), "o-") for way in ways}
    for axis, process in zip(axes[0], processes, strict=True):
        for way in ways:
            curve, (color, style) = bench.curve(way, process), styles[way.name]
            xs, ys = [p.rate for p in curve], [p.p90 for p in curve]
            axis.plot(xs, ys, style, color=color, label=way.name, markersize=4, linewidth=1.5)
        axis.axhline(bench.slo_s, color="#d1495b", linestyle="--", linewidth=1, label="SLO: 2x idle p90 of stock")
        axis.set(title=f"{process} arrivals", xlabel="programs per second", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("p90 latency, s")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(f'"{way.name}"' for way in WAYS)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.6, 2.4],
        help="programs per second",
    )
    parser.add_argument("--idle-rate", type=float, default=0, help="0: one program at a time")
    parser.add_argument("--num-programs", type=int, default=200, help="of a stream; a quarter of them for idle")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--drop-at", type=float, default=1.5, help="SLOs needed beyond which higher rates are skipped")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], metavar="WAY", help=f"some of {names}")
    parser.add_argument("--processes", nargs="+", choices=["poisson", "bursty"], default=["poisson"])
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--csv", type=Path, metavar="PREFIX")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    args.rates.sort()
    if "bursty" in args.processes and not (args.traces / TRACE).exists():
        parser.error(f"--processes bursty plays {TRACE}, which is not in {args.traces}; give its folder with --traces")
    ways = [way for way in WAYS if way is WAYS[0] or not args.ways or way.name in args.ways]  # fcfs gives the SLO
    facts = machine()
    bench = Bench(args)
    print(f"about {bench.estimate_s(ways) / 60:.0f} min", flush=True)
    for repeat in range(args.repeats):
        for way in ways:
            bench.measure(way, repeat)
    closing = {"programs": args.num_programs, "repeats": args.repeats, "model": "tiny reasoner", **facts}
    summary = [row | closing for row in bench.summary(ways)]
    print(f"\nSLO: p90 <= {bench.slo_s:.2f} s")
    for process in args.processes:
        rows = [row for row in summary if row["process"] == process]
        show([{key: row[key] for key in row if key not in closing} for row in rows])
    if args.csv:
        write_rows(
            args.csv.with_name(args.csv.name + "_points.csv"), [p.row(bench.slo_s) | facts for p in bench.points]
        )
        write_rows(args.csv.with_name(args.csv.name + ".csv"), summary)
    if args.plot:
        plot(bench, ways, args.plot)


if __name__ == "__main__":
    main()

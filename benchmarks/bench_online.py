"""Program latency against request rate: open-loop streams of self-consistency programs, stock policies against ours.

    python benchmarks/bench_online.py --csv benchmarks/results/online --plot benchmarks/results/online.png

Each way is an engine of its own, one alive at a time. In a repeat every way gets the same questions (1 to 4 steps, mixed)
at the same times; the latency of a program counts from the time it was due to its answer, which stock clients vote for
themselves. First, idle: one program at a time. The SLO is twice the p90 of stock then, of all its orders, which are one when
idle. Rates rise until a way's p90 is far above it. `--csv PREFIX` writes PREFIX.csv (one row per way and process) and PREFIX_points.csv (one per rate, too).
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

from forked import REASONER, flush, forked_engine
from machine import machine
from open_loop import TRACE, in_turn, play
from rows import percentile, spread, write_rows

from sglang_dynasor.demo import Solved, program_params, read_questions, read_record, show, stock_params, vote
from sglang_dynasor.sim.arrivals import poisson, recorded

# As in the recorded MATH-500 samples that the goal was set on (docs/results.md): cap 32, a single sample right in three of
# four cases (here 76 %). The reasoner's long mode: like a reasoning model's, the lengths of one question's branches
# differ (coefficient of variation 0.4), which those of its direct mode do not. Few branches (3 %) reach their token limit.
CAP = 32
MAX_STEPS, THINK = 4, "<think>"
SAMPLING = {"temperature": 1.3, "max_new_tokens": 256}
ENGINE: dict[str, Any] = {"max_running_requests": 64, "max_total_tokens": 131_072}
UNBOUNDED_TOKENS = 10**12  # no program is ever overtaken by this much: pure shortest-first
ROUGH_PER_S = 0.5, 1.8  # programs per second of stock and of ours on two cores: for the estimate of the time only
ROUGH_IDLE_S = 1.5


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
    _ours("all", {}),
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
        return median(run.latency(0.9) for run in self.runs)

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
    return Run(solved, time.perf_counter() - started)


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
        return 2 * median(run.latency(0.9) for p in idle for run in p.runs)

    def num_programs(self, rate: float) -> int:
        # A short stream hides an overload: at a high rate more programs, so that it lasts.
        return max(self.args.num_programs, round(rate * self.args.seconds))

    def estimate_s(self, ways: list[Way]) -> float:
        """Roughly how long it takes, if rates are skipped beyond half as much again as an engine sustains."""
        total_s = 0.0
        for way in ways:
            per_s = ROUGH_PER_S[0] if way.is_stock else ROUGH_PER_S[1]
            total_s += 10 + self.args.repeats * ROUGH_IDLE_S * self.args.num_programs / 3
            for rate in self.args.rates:
                is_last = rate > 1.5 * per_s
                once_s = len(self.args.processes) * self.num_programs(rate) / min(rate, per_s)
                total_s += once_s if is_last else self.args.repeats * once_s
                if is_last:
                    break
        return total_s

    def times_s(self, process: str, rate: float, repeat: int) -> list[float]:
        num = self.num_programs(rate)
        if process == "poisson":
            return poisson(rate, num, repeat)
        return recorded(rate, num, repeat, self.args.traces / TRACE)

    def measure(self, way: Way) -> None:
        with forked_engine(**ENGINE, **way.options) as engine:
            stream(engine, way, draw(self.questions, 8, seed=-1), None)  # warm up
            self.measure_idle(engine, way)
            for process in self.args.processes:
                points = [Point(way, process, rate) for rate in self.args.rates]
                self.points += points
                for point in points:
                    for repeat in range(self.args.repeats):
                        times_s = self.times_s(process, point.rate, repeat)
                        questions = draw(self.questions, len(times_s), repeat)
                        self.add(point, stream(engine, way, questions, times_s))
                        if self.is_far_over(point):  # no repeat would bring it back
                            break
                    if self.is_far_over(point):
                        break

    def is_far_over(self, point: Point) -> bool:
        return point.p90 > self.args.drop_at * self.slo_s

    def measure_idle(self, engine: Any, way: Way) -> None:
        """One program at a time: the limit of low rates, without the waiting."""
        point = Point(way, "idle", 0)
        self.points.append(point)
        rate = self.args.idle_rate
        for repeat in range(self.args.repeats):
            questions = draw(self.questions, max(1, self.args.num_programs // 3), repeat)
            times_s = poisson(rate, len(questions), repeat) if rate else None
            self.add(point, stream(engine, way, questions, times_s))

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
        for process in self.args.processes:
            curves = {way.name: self.curve(way, process) for way in ways}
            highest = {way.name: highest_rate(curves[way.name], self.slo_s) for way in ways}
            best_stock = max(highest[way.name][0] for way in ways if way.is_stock)
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
                    "highest rate in the SLO": f"{more}{rate:.2f}/s",
                    "against the best stock": f"{more}{rate / best_stock:.2f}x" if best_stock else "-",
                    "at rate": f"{common:g}/s",
                    "slowest s": spread([r.latency(1) for r in at_common], 1),
                    "tokens per program": spread([r.tokens for r in at_common], 0),
                    "accuracy %": spread([r.accuracy for r in at_common], 1),
                    "SLO s": round(self.slo_s, 2),
                }


def highest_rate(curve: list[Point], slo_s: float) -> tuple[float, bool]:
    """The rate at which p90 first leaves the SLO, and whether it was still inside at the highest measured.

    Between two measured rates the logarithm of p90 is taken as linear: p90 itself bends upwards, and a straight line would understate
    whoever leaves the SLO between two rates that are far apart. The first of the curve is idle, at rate 0.
    """
    if curve[0].p90 > slo_s:
        return 0.0, False
    for low, high in pairwise(curve):
        if high.p90 > slo_s:
            return low.rate + (high.rate - low.rate) * log(slo_s / low.p90) / log(high.p90 / low.p90), False
    return curve[-1].rate, True


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
        "--rates", type=float, nargs="+", default=[0.3, 0.5, 0.9, 1.3, 1.8, 2.5], help="programs per second"
    )
    parser.add_argument("--idle-rate", type=float, default=0, help="0: one program at a time")
    parser.add_argument("--num-programs", type=int, default=24, help="of a stream, at least; a third of them for idle")
    parser.add_argument("--seconds", type=float, default=60, help="a stream is at least this long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drop-at", type=float, default=1.5, help="SLOs of p90 beyond which higher rates are skipped")
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
    for way in ways:
        bench.measure(way)
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

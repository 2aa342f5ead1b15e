"""What a user would pick instead, and ours, in one run: every way through the chat endpoint of one server with the flag.

    python benchmarks/bench_peers.py --csv benchmarks/results/peers --runs peers.jsonl

Plain requests are served by it as by stock SGLang. In a repeat every way gets the same held-out questions at the same load,
one way after the other and in another order each time, so that a slow minute of the machine is shared. An answer is a vote of
at most --cap samples.

engine tokens: SGLang's own counter of decode steps' rows, `sglang:realtime_tokens_total{mode="decode"}`, which sees what
clients are not told of: samples that they cancelled, branches that the plugin ended. A sample's first token comes from a
prefill pass, and a finished row rides along for one more step, so it is that of the samples' tokens within a percent.
told tokens: by `usage`, by its_hub, or by the program's record.

Intervals are of questions drawn anew, paired over all ways (intervals.py). `--csv PREFIX` writes PREFIX.csv, one row per load
and way, and PREFIX_pairs.csv: for each peer the level of ours that is behind it in the least, and in what.
`--runs FILE` keeps every run as a line of JSON, and does not repeat what the file has: a long benchmark may be done in parts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from math import inf
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
from bench_self_consistency import REASONER, SERVER
from clients import ITS_HUB, KEEP_ALIVE, Question, Solve, chat, check_hub, hub
from intervals import CRITERIA, Figure, best_level, figures, runs_of, spanned, told
from machine import machine
from open_loop import in_turn, play
from rows import write_rows
from server import Server
from tqdm import tqdm

from sglang_dynasor.config import LEVELS
from sglang_dynasor.demo import TEMPERATURE, read_questions
from sglang_dynasor.outcome import Solved, show
from sglang_dynasor.sim.arrivals import poisson
from sglang_dynasor.sim.peers import PEERS

STOCK = "stock"
HUB_WAYS = {f"{ITS_HUB} beta": "beta", f"{ITS_HUB} doubling": "doubling"}
LOOPS = {"Adaptive-Consistency, one by one": "adaptive", "ESC, windows of five": "windows"}
OURS = {f"program, {level}": level for level in LEVELS}
ONE_REQUEST = ("greedy", "single", STOCK, *OURS)
RIVALS = (STOCK, *HUB_WAYS, *LOOPS)
WAYS = ("greedy", "single", *RIVALS, *OURS)
CANCELLING = (f"{ITS_HUB} beta",)
COUNT_FRAC = 0.03  # by which the two counts of tokens may differ
NUM_WARM_UP = 4
ROUGH_S = 0.9, 0.55  # a question of an idle engine, and of one with many at once: for the estimate of the time only


class Load(NamedTuple):
    """So many questions at once, or a Poisson stream."""

    at_once: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.at_once} at once" if self.at_once else f"Poisson {self.rate:g}/s"


class Run(NamedTuple):
    """One way through all questions at one load; what it takes to skip it when it is there already."""

    load: Load
    way: str
    repeat: int

    @property
    def key(self) -> dict[str, Any]:
        return {"load": str(self.load), "way": self.way, "repeat": self.repeat}


def plan(loads: list[Load], ways: list[str], repeats: int) -> Iterator[Run]:
    """Repeat by repeat; the ways of a load one after the other, in another order each time."""
    for repeat in range(repeats):
        for number, load in enumerate(loads):
            first = (3 * repeat + number) % len(ways)
            for way in (*ways[first:], *ways[:first]):
                yield Run(load, way, repeat)


async def solves(url: str, cap: int, ways: list[str], stack: AsyncExitStack) -> dict[str, Solve]:
    """How each way solves one question."""
    client = await stack.enter_async_context(chat(url, cap))
    made: dict[str, Solve] = {"greedy": client.greedy, "single": client.single, STOCK: client.stock}
    made |= {name: lambda q, more=PEERS[peer].more: client.loop(q, more) for name, peer in LOOPS.items()}
    made |= {name: lambda q, level=level: client.program(q, {"stop": level}) for name, level in OURS.items()}
    if any(way in HUB_WAYS for way in ways):
        library = await stack.enter_async_context(hub(url, cap))
        made |= {name: getattr(library, method) for name, method in HUB_WAYS.items()}
    return {way: made[way] for way in ways}


async def drain(url: str) -> int:
    """Wait until nothing runs, empty the prefix cache; return the tokens that SGLang has generated so far."""
    async with httpx.AsyncClient(timeout=120) as session:
        response = await session.post(f"{url}/flush_cache", params={"timeout": 60})
        if response.status_code != 200:
            raise RuntimeError(f"the server does not come to rest: {response.text}")
        return decoded((await session.get(f"{url}/metrics")).text)


def decoded(metrics: str) -> int:
    """SGLang's counter of rows in decode steps, out of the text of /metrics."""
    lines = [line for line in metrics.splitlines() if line.startswith("sglang:realtime_tokens_total{")]
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if 'mode="decode"' in line))


async def play_run(url: str, solve: Solve, run: Run, questions: list[Question]) -> dict[str, Any]:
    """One run, from a drained server to a drained server."""
    before = await drain(url)
    with tqdm(total=len(questions), desc=f"{run.load!s:<14} {run.way:<32}", unit="question", disable=None) as bar:

        async def send(index: int, due: float) -> tuple[Solved, float]:
            solved = await solve(questions[index])
            bar.update()
            return solved, time.perf_counter() - due

        started = time.perf_counter()
        if run.load.at_once:
            done = await in_turn(len(questions), run.load.at_once, send)
        else:
            done = await play(poisson(run.load.rate, len(questions), run.repeat), send)
        wall_s = time.perf_counter() - started
    record = {
        **run.key,
        "wall_s": round(wall_s, 3),
        "engine_tokens": await drain(url) - before,
        "requests": sum(1 if run.way in ONE_REQUEST else one.num_branches for one, _ in done),
        "is_right": [int(one.is_right) for one, _ in done],
        "tokens": [one.num_tokens for one, _ in done],
        "latency_s": [round(latency_s, 4) for _, latency_s in done],
    }
    check_tokens(run.way, sum(record["tokens"]), record["engine_tokens"])
    return record


def check_tokens(way: str, num_told: int, num_decoded: int) -> None:
    """Raise RuntimeError where what clients are told is not what SGLang decodes, as then one of the two counts is wrong.

    Whoever cancels samples is told of fewer, never of more.
    """
    least = 1 - COUNT_FRAC if way not in CANCELLING else 0.0
    if not least * num_decoded <= num_told <= (1 + COUNT_FRAC) * num_decoded:
        raise RuntimeError(f"{way}: clients were told of {num_told} tokens, and SGLang decoded {num_decoded}")


class Book:
    """The runs so far, in memory and, where wanted, in a file."""

    def __init__(self, path: Path | None, setting: dict[str, Any]):
        self.path, self.setting = path, setting
        self.records: list[dict[str, Any]] = []
        for number, line in enumerate(path.read_text().splitlines() if path and path.exists() else [], 1):
            record = json.loads(line)
            if other := [key for key, value in setting.items() if record.get(key) != value]:
                key = other[0]
                raise SystemExit(
                    f"error: --runs {path}, line {number}, has {key}={record.get(key)!r}, and this run has {setting[key]!r}; "
                    "give the same settings, or another file"
                )
            self.records.append(record)

    def has(self, run: Run) -> bool:
        return any(run.key.items() <= record.items() for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(self.setting | record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def shared(self, load: Load, ways: list[str]) -> dict[str, list[dict[str, Any]]]:
        """The runs of a load by way, of the repeats in which all ways were run; none: nothing by no way."""
        found = {
            way: {one["repeat"]: one for one in self.records if (one["load"], one["way"]) == (str(load), way)}
            for way in ways
        }
        repeats = set[int].intersection(*(set(runs) for runs in found.values()))
        return {way: [runs[repeat] for repeat in sorted(repeats)] for way, runs in found.items()} if repeats else {}


def way_row(load: Load, way: str, records: list[dict[str, Any]], found: dict[str, Figure]) -> dict[str, Any]:
    num = len(records[0]["tokens"])
    return {
        "load": str(load),
        "way": way,
        "accuracy %": spanned(found["accuracy"], 1),
        "engine tokens": spanned(found["tokens"], 0),
        "told tokens": f"{mean(mean(one['tokens']) for one in records):.0f}",
        "mean s": spanned(found["mean"], 2),
        "p50 s": f"{found['p50'].value:.2f}",
        "p90 s": spanned(found["p90"], 2),
        "p99 s": f"{found['p99'].value:.2f}",
        "wall-clock s": f"{mean(one['wall_s'] for one in records):.1f}",
        "requests": f"{mean(one['requests'] for one in records) / num:.1f}",
        "questions": num,
        "repeats": len(records),
    }


def tables(book: Book, loads: list[Load], ways: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row per load and way, and a row per load and peer; loads that were not run by all ways are left out."""
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for load in loads:
        shared = book.shared(load, ways)
        found = {way: figures(runs_of(records)) for way, records in shared.items()}
        rows += [way_row(load, way, shared[way], found[way]) for way in shared]
        levels = {level: found[way] for way, level in OURS.items() if way in found}
        for peer in (way for way in RIVALS if way in found and levels):
            level, changes = best_level(levels, found[peer])
            named = {"accuracy": "accuracy points", "mean": "mean latency %", "p90": "p90 %", "tokens": "tokens %"}
            changed = {named[name]: str(changes[name]) for name in CRITERIA}
            closing = {key: rows[-1][key] for key in ("questions", "repeats")}
            pairs.append(
                {"load": str(load), "peer": peer, "ours": level, **changed, "behind in": told(changes)} | closing
            )
    return rows, pairs


def estimate_s(runs: list[Run], num_questions: int) -> float:
    """Roughly how long these take."""
    return sum(num_questions * (1 / run.load.rate if run.load.rate else ROUGH_S[run.load.at_once > 1]) for run in runs)


async def measure(
    runs: list[Run], questions: list[Question], book: Book, cap: int, ways: list[str], seconds: float
) -> None:
    """Run them on one server; none begins after `seconds`."""
    with TemporaryDirectory() as folder:
        options = (*SERVER, "--scheduler", "dynasor", "--enable-metrics")
        server = Server(Path(folder) / "log", *options, environment={"OMP_NUM_THREADS": "1", **KEEP_ALIVE})
        try:
            server.wait()
            started = time.perf_counter()
            async with AsyncExitStack() as stack:
                made = await solves(server.url, cap, ways, stack)
                for solve in made.values():
                    await asyncio.gather(*(solve(question) for question in questions[:NUM_WARM_UP]))
                for number, run in enumerate(runs):
                    if time.perf_counter() - started > seconds:
                        print(f"--minutes are over; {len(runs) - number} runs are left")
                        break
                    record = await play_run(server.url, made[run.way], run, questions)
                    book.add(record)
                    took = f"{record['wall_s']:.0f} s, {record['engine_tokens'] / len(questions):.0f} tokens a question"
                    print(
                        f"{number + 1}/{len(runs)} {run.load}, {run.way}, repeat {run.repeat + 1}: {took}", flush=True
                    )
        finally:
            server.stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=256, help="held-out questions, from the first on")
    parser.add_argument("--cap", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 16, 32, 64], help="questions under way")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[1.0], help="of Poisson streams, questions per second"
    )
    names = ", ".join(f'"{way}"' for way in WAYS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"some of {names}")
    parser.add_argument(
        "--minutes", type=float, default=inf, help="begin no run after so long; --runs FILE goes on next time"
    )
    parser.add_argument("--runs", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="PREFIX")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if any(way in HUB_WAYS for way in args.ways):
        check_hub("--ways")
    questions = read_questions(REASONER, args.num_questions)
    loads = [*(Load(at_once=num) for num in args.at_once), *(Load(rate=rate) for rate in args.rates)]
    asked = hashlib.sha256("\n".join(question["question"] for question in questions).encode()).hexdigest()[:12]
    weights = hashlib.sha256((REASONER / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()[:12]
    facts = machine()
    setting = {
        "asked": asked,
        "weights": weights,
        "temperature": TEMPERATURE,
        "cap": args.cap,
        "commit": facts["commit"],
    }
    book = Book(args.runs, setting)
    runs = [run for run in plan(loads, args.ways, args.repeats) if not book.has(run)]
    if runs:
        print(f"{len(runs)} runs, about {estimate_s(runs, len(questions)) / 60:.0f} min", flush=True)
        asyncio.run(measure(runs, questions, book, args.cap, args.ways, 60 * args.minutes))
    rows, pairs = tables(book, loads, args.ways)
    for table in (rows, pairs):
        if table:
            show([{key: row[key] for key in row if key not in ("questions", "repeats")} for row in table])
    if args.csv:
        closing = {"cap": args.cap, "temperature": TEMPERATURE, "model": "tiny reasoner", **facts}
        for name, table in ((".csv", rows), ("_pairs.csv", pairs)):
            write_rows(args.csv.with_name(args.csv.name + name), [row | closing for row in table])


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()

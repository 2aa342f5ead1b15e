"""How long hostile programs hold up a neighbour: a plain request of 4 tokens, timed while 64 branches end in one step.

    python benchmarks/bench_neighbour.py --csv benchmarks/results/neighbour.csv

One engine; a client sends plain requests one after another. Each round is a turn of every way: nothing else, then a program of
64 branches that read their answer in that way. Its branches all end in the same step, with texts of more than 4,096
characters that all differ. What counts is the slowest neighbour while they are read and vote, against the median neighbour of
the same round when there was no program. A pattern that is refused is sent over and over instead. The scheduler's own clock
says what the plugin took of one step at most, in processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing as mp
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from forked import REASONER, flush, forked_engine
from machine import machine
from rows import spread, write_rows

from sglang_dynasor.demo import show

NUM_BRANCHES, NUM_TOKENS, NEIGHBOUR_TOKENS = 64, 620, 4
NUM_ALONE, NUM_REFUSED = 60, 40  # requests of a neighbour that is alone; refused requests that one has beside it
END_S = 0.5  # before the program's answer, in which its branches are read
LONG_WORDS = (
    " Apples",
    " apples",
    " Shells",
    " shells",
    " Stamps",
    " stamps",
    " quarter",
)  # whatever the model would say
PATTERNS = (
    r"(?s)(?:.{0,100}){0,9}ж|.",
    r"(?s)(?:(?:.{0,4}){0,4}){0,4}ж|.",
    r"(?s)(?:aaaa|aaab|aaba|abaa| App| Apple| Apples|.){0,12}ж|.",
    r"(?s)(?:\pL|\pN|\s)*ж|.",
    r"(?s)(?:.?){60}.{60}ж|.",
    r"(?s)(?:a?){120}a{120}ж|.",
    r"(?s)(?:" + "|".join(f"{a}{b}" for a in "abcdefghij" for b in "pqrst") + r"|.)*ж|.",
    r"(?s).*.*.*.*.*.*ж|.",
    r"(?s).*?.*?.*?(?:.*?.*?)*?ж|.",
    r"(?s)(.*)(.*)(.*)(.*)(.*)(.*)(.*)ж|(.)",
    r"(?is)(?:[k-s]|ſ|K|straße)*.{0,30}ж|.",
    r"(?m)(?:^.*$)*(?:^ .*$)?\bж|^.*$|.",
)
VOTES = {"stop": "predictive:0 and entropy:1 and window:64 and beta:1 and confidence:1", "vote": "confidence"}
WAYS: dict[str, dict[str, Any]] = {
    "hash": {"answer": "hash"},
    "votes that all differ, every rule": {"answer": "last_line", "equal": "text", **VOTES},
    "auto, votes that all differ": {"answer": "auto", "stop": "predictive:0"},
    **{f"`{pattern}`": {"answer": f"regex:{pattern}", "stop": "predictive:0"} for pattern in PATTERNS},
}


class StepClock:
    """The most processor time that the plugin has taken of one step, in memory that the scheduler's process shares."""

    def __init__(self) -> None:
        self.most_s = mp.get_context("fork").RawValue("d", 0.0)
        self._now_s = 0.0
        self._depth = 0

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth, started = 1, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth = 0
                self._now_s += time.thread_time() - started
                self.most_s.value = max(self.most_s.value, self._now_s)

        return wrapper

    def install(self) -> None:
        """Wrap the controller's methods until the scheduler's process is forked; a step ends where the next batch runs."""
        from sglang.srt.managers.scheduler import Scheduler

        from sglang_dynasor.engine.controller import Controller

        for name in ("admit", "on_output", "abort"):
            setattr(Controller, name, self._timed(getattr(Controller, name)))
        run_batch = Scheduler.run_batch

        @functools.wraps(run_batch)
        def run_and_begin(*args: Any, **kwargs: Any) -> Any:
            self._now_s = 0.0
            return run_batch(*args, **kwargs)

        Scheduler.run_batch = run_and_begin


class Neighbour:
    """A client of plain requests: when each was sent and answered."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.times: list[tuple[float, float]] = []
        self.is_over = False
        self._num = 0

    async def ask(self) -> None:
        """One request; each has a prompt of its own."""
        self._num += 1
        params = {"temperature": 0, "max_new_tokens": NEIGHBOUR_TOKENS, "ignore_eos": True}
        started = time.perf_counter()
        await self.engine.async_generate(f"{self._num} books", params)
        self.times.append((started, time.perf_counter()))

    async def live(self) -> None:
        while not self.is_over:
            await self.ask()

    def ms(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Of the requests that were there in this time."""
        return [1e3 * (end - start) for start, end in self.times if end >= since and start <= until]


async def alone_ms(engine: Any) -> list[float]:
    neighbour = Neighbour(engine)
    for _ in range(NUM_ALONE):
        await neighbour.ask()
    return neighbour.ms()


async def beside_ms(engine: Any, params: dict[str, Any]) -> tuple[list[float], list[float], str]:
    """Neighbours while branches run, while they are read, and what became of the program."""
    neighbour = Neighbour(engine)
    living = asyncio.create_task(neighbour.live())
    started, outcome = time.perf_counter(), "refused"
    try:
        record = (await engine.async_generate("How many? ", params))["meta_info"]["dynasor"]
        ended = time.perf_counter()
        outcome = f"{len(record['votes'])} answers"
        assert record["num_branches"] == NUM_BRANCHES, record
    except ValueError:
        for _ in range(NUM_REFUSED):
            try:
                await engine.async_generate("How many? ", params)
            except ValueError:
                await asyncio.sleep(0.01)
        ended = time.perf_counter()
    neighbour.is_over = True
    await living
    if outcome == "refused":
        return neighbour.ms(started, ended), neighbour.ms(started, ended), outcome
    return neighbour.ms(started, ended - END_S), neighbour.ms(ended - END_S, ended), outcome


def way_params(engine: Any, way: str, seed: int) -> dict[str, Any]:
    encode = engine.tokenizer_manager.tokenizer.encode
    words = [encode(word, add_special_tokens=False)[0] for word in LONG_WORDS]
    return {
        "temperature": 1, "max_new_tokens": NUM_TOKENS, "ignore_eos": True, "sampling_seed": seed,
        "logit_bias": {str(word): 1000.0 for word in words},
        "custom_params": {"dynasor": {"branches": NUM_BRANCHES, "width": NUM_BRANCHES, "stop": "never", **WAYS[way]}},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    clock = StepClock()
    clock.install()
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    options = {"max_running_requests": 80, "max_total_tokens": 50_000, "enable_deterministic_inference": True}
    with forked_engine(scheduler="dynasor", dynasor_strict=True, **options) as engine:
        run = engine.loop.run_until_complete
        run(alone_ms(engine))  # warm up
        run(beside_ms(engine, way_params(engine, "hash", 0)))
        for number in range(args.rounds):
            for way in WAYS:
                flush(engine)
                alone = run(alone_ms(engine))
                clock.most_s.value = 0.0
                running, read, outcome = run(beside_ms(engine, way_params(engine, way, number)))
                found = {
                    "outcome": outcome, "alone": median(alone), "slowest alone": max(alone), "beside running": median(running),
                    "slowest beside read": max(read), "delay": max(read) - median(alone), "step": 1e3 * clock.most_s.value,
                }  # fmt: skip
                rounds[way].append(found)
                print(number, way, {k: v if isinstance(v, str) else round(v, 1) for k, v in found.items()}, flush=True)
    rows = [row(way, found) for way, found in rounds.items()]
    print()
    show(rows)
    if args.csv:
        facts = {"rounds": args.rounds, "model": "tiny reasoner", **machine()}
        write_rows(args.csv, [made | facts for made in rows])


def row(way: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of one way's rounds."""
    keys = {
        "alone": "alone ms",
        "slowest alone": "slowest alone ms",
        "beside running": "beside running branches ms",
        "slowest beside read": "slowest while they vote ms",
        "delay": "delay ms",
        "step": "of one step ms",
    }
    return {"program": way, "outcome": found[0]["outcome"]} | {
        told: spread([each[key] for each in found], 1) for key, told in keys.items()
    }


if __name__ == "__main__":
    assert REASONER.exists()
    main()

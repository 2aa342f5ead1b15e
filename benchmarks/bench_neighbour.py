"""How long hostile programs hold up a neighbour: a plain request of 4 tokens, while 64 branches end in one step.

    python benchmarks/bench_neighbour.py --csv benchmarks/results/neighbour.csv

One engine; in each round every way has its turn: a program of 64 branches, which all end in the same step, with texts of some
1,500 characters that all differ, read in that way. A client sends plain requests of 4 tokens one after another: first with no
program beside it, then while the branches come to their end and vote. A pattern that is refused is sent over and over instead.

Decoding 65 rows takes a CPU longer than one, whatever is then read, so the neighbour's times say what both take together. What
reading and voting take of it is told apart by a clock in the scheduler's process: the processor time of the plugin in each
turn of the scheduler's loop, added up over as many turns in a row as a request of 4 tokens lives through. The most of those is
the delay.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing as mp
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from forked import REASONER, flush, forked_engine
from machine import machine
from rows import spread, write_rows

from sglang_dynasor.demo import show

NUM_BRANCHES, NUM_TOKENS, NEIGHBOUR_TOKENS = 64, 240, 4
NUM_TURNS = 1 << 16  # of the loop that are remembered
LIFE_TURNS = NEIGHBOUR_TOKENS + 2  # of the loop that a neighbour's request lives through
NUM_ALONE, NUM_REFUSED = 60, 40  # requests of a neighbour that is alone; refused requests that one has beside it
END_S = 1.0  # before the program's answer, in which its branches end and are read
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
RISK = {"stop": "predictive:0 and never"}  # it is worked out, and whatever it is all branches run
VOTES = {"stop": f"{RISK['stop']} and entropy:1 and window:64 and beta:1 and confidence:1", "vote": "confidence"}
WAYS: dict[str, dict[str, Any]] = {
    "hash": {"answer": "hash"},
    "votes that all differ, every rule": {"answer": "last_line", "equal": "text", **VOTES},
    "auto, votes that all differ": {"answer": "auto", **RISK},
    **{f"`{pattern}`": {"answer": f"regex:{pattern}", **RISK} for pattern in PATTERNS},
}


class LoopClock:
    """Processor time of the plugin by turn of the scheduler's loop, in memory that the scheduler's process shares."""

    def __init__(self) -> None:
        context = mp.get_context("fork")
        self._seconds = context.RawArray("d", NUM_TURNS)
        self._num = context.RawValue("l", 0)
        self._depth = 0

    def _timed(self, function: Callable[..., Any], *, ends_turn: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth, started = 1, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth = 0
                self._seconds[self._num.value % NUM_TURNS] += time.thread_time() - started
                if ends_turn:
                    self._num.value += 1
                    self._seconds[self._num.value % NUM_TURNS] = 0.0

        return wrapper

    def install(self) -> None:
        """Wrap the controller's methods until the scheduler's process is forked. Each turn admits once, if any of ours is there."""
        from sglang_dynasor.engine.controller import Controller

        for name in ("on_output", "abort", "take"):
            setattr(Controller, name, self._timed(getattr(Controller, name)))
        Controller.admit = self._timed(Controller.admit, ends_turn=True)

    @property
    def num(self) -> int:
        """Turns so far."""
        return self._num.value

    def most_ms(self, since: int, num_turns: int) -> float:
        """The most of so many turns in a row, since turn `since`."""
        first = max(since, self.num - NUM_TURNS + 1)
        seconds = [self._seconds[turn % NUM_TURNS] for turn in range(first, self.num)]
        sums = (sum(seconds[start : start + num_turns]) for start in range(len(seconds)))
        return 1e3 * max(sums, default=0.0)


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


async def beside_ms(engine: Any, params: dict[str, Any], wait_s: float) -> tuple[list[float], float, str]:
    """Neighbours while the branches end and vote; seconds that the program took, and what became of it."""
    neighbour = Neighbour(engine)
    started, outcome = time.perf_counter(), "refused"
    program = asyncio.create_task(engine.async_generate("How many? ", params))
    await asyncio.wait([program], timeout=wait_s)
    living = asyncio.create_task(neighbour.live())
    try:
        record = (await program)["meta_info"]["dynasor"]
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
    since = started if outcome == "refused" else ended - END_S
    return neighbour.ms(since, ended), ended - started, outcome


def way_params(engine: Any, way: str, seed: int) -> dict[str, Any]:
    tokenizer = engine.tokenizer_manager.tokenizer
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in LONG_WORDS]
    # They end by themselves, all as soon as they may: those that are cut off would not vote.
    bias = {tokenizer.eos_token_id: 2000.0, **dict.fromkeys(words, 1000.0)}
    return {
        "temperature": 1, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS + 9, "sampling_seed": seed,
        "logit_bias": {str(token): value for token, value in bias.items()},
        "custom_params": {"dynasor": {"branches": NUM_BRANCHES, "width": NUM_BRANCHES, "stop": "never", **WAYS[way]}},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    clock = LoopClock()
    clock.install()
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    options = {"max_running_requests": 80, "max_total_tokens": 30_000, "enable_deterministic_inference": True}
    with forked_engine(scheduler="dynasor", dynasor_strict=True, **options) as engine:
        run = engine.loop.run_until_complete
        run(alone_ms(engine))  # warm up
        _, took_s, _ = run(beside_ms(engine, way_params(engine, "hash", 0), 600))
        for number in range(args.rounds):
            for way in WAYS:
                flush(engine)
                alone, since = run(alone_ms(engine)), clock.num
                beside, seconds, outcome = run(beside_ms(engine, way_params(engine, way, number), 0.5 * took_s))
                found = {
                    "outcome": outcome, "alone": median(alone), "slowest alone": max(alone), "slowest": max(beside, default=nan),
                    "turn": clock.most_ms(since, 1), "delay": clock.most_ms(since, LIFE_TURNS),
                }  # fmt: skip
                took_s = took_s if outcome == "refused" else seconds
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
        "alone": "neighbour alone ms",
        "slowest alone": "slowest alone ms",
        "slowest": "slowest while branches end ms",
        "turn": "reading, one turn ms",
        "delay": "delay by reading ms",
    }
    return {"program": way, "outcome": found[0]["outcome"]} | {
        told: spread([each[key] for each in found], 1) for key, told in keys.items()
    }


if __name__ == "__main__":
    assert REASONER.exists()
    main()

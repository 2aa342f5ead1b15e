"""Python time of scheduling per scheduler step, by the number of waiting requests: stock fcfs and lpm, and ours.

    python benchmarks/bench_policy_overhead.py --csv benchmarks/results/policy_overhead.csv

The scheduler's functions are wrapped with clocks, which the forked scheduler process inherits; it writes the time of each
step into memory shared with this process. Few rows run and always --waiting requests wait: clients send the next when one
ends. "pass" is Scheduler.get_new_batch_prefill, whole, with every hook of ours on it; "order" is the part of it in
SchedulePolicy.calc_priority; "ours" is what the controller's own methods take. A change is a call of one of them that took
in a request, or started or ended a branch: that part makes and queues SGLang's requests, too.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing as mp
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from forked import REASONER, forked_engine
from machine import machine
from rows import percentile, write_rows

from sglang_dynasor.demo import program_params, read_questions, show

NUM_ROWS = 8
SHORT, LONG = (12, 36), (150, 250)  # tokens of a request, from and to. Short: one ends in every third step or so
NUM_SETTLING = 16  # steps between the last submission and the first that counts
METHODS = ("take", "admit", "on_output")  # the controller's, called by hooks; what they call is in their time
COLUMNS = ("pass", "order", "ours", "changing", "num_changes")
FCFS, LPM, OURS = {"schedule_policy": "fcfs"}, {"schedule_policy": "lpm"}, {"scheduler": "dynasor"}
# Engine options; whether requests are programs; tokens of each.
WAYS: dict[str, tuple[dict[str, Any], bool, tuple[int, int]]] = {
    "stock fcfs": (FCFS, False, SHORT),
    "stock lpm": (LPM, False, SHORT),
    "dynasor, plain requests": (OURS, False, SHORT),
    "dynasor, programs": (OURS, True, SHORT),
    "dynasor, programs of longer branches": (OURS, True, LONG),
}


def changes_of(controller: Any) -> tuple[int, ...]:
    """What differs after a call that took in a request, or started or ended a branch."""
    return controller.inside.num_made, controller.inside.num_reqs, len(controller.programs.held)


class Clocks:
    """Seconds by function of each scheduler step, in memory that the scheduler process shares with this one."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.values = mp.get_context("fork").RawArray("d", num_steps * len(COLUMNS))
        self.num_seen = mp.get_context("fork").RawValue("l", 0)  # steps since the start
        self.first = mp.get_context("fork").RawValue("l", -1)  # the first step that counts; -1: not yet
        self.now = dict.fromkeys(COLUMNS, 0.0)
        self.depth = 0  # of the controller's methods: one may call another

    def end_step(self) -> None:
        row = self.num_seen.value - self.first.value
        if self.first.value >= 0 and 0 <= row < self.num_steps:
            self.values[row * len(COLUMNS) : (row + 1) * len(COLUMNS)] = list(self.now.values())
        self.num_seen.value += 1
        self.now = dict.fromkeys(COLUMNS, 0.0)

    @property
    def is_full(self) -> bool:
        return self.first.value >= 0 and self.num_seen.value - self.first.value > self.num_steps

    def column(self, name: str) -> list[float]:
        return list(self.values[COLUMNS.index(name) :: len(COLUMNS)])

    def timed(self, function: Callable[..., Any], column: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[column] += time.perf_counter() - started

        return wrapper

    def timed_method(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a method of the controller: only the outermost counts, and whether it changed anything."""

        @functools.wraps(function)
        def wrapper(controller: Any, *args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(controller, *args, **kwargs)
            before = changes_of(controller)
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(controller, *args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self.depth -= 1
                self.now["ours"] += seconds
                if before != changes_of(controller):
                    self.now["changing"] += seconds
                    self.now["num_changes"] += 1

        return wrapper

    def install(self) -> None:
        """Wrap SGLang's functions and ours, outside of every hook, until the processes are forked."""
        from sglang.srt.managers.schedule_policy import SchedulePolicy
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.plugins import load_plugins

        from sglang_dynasor.engine.controller import Controller

        load_plugins()
        Scheduler.get_new_batch_prefill = self.timed(Scheduler.get_new_batch_prefill, "pass")
        SchedulePolicy.calc_priority = self.timed(SchedulePolicy.calc_priority, "order")
        for name in METHODS:
            if hasattr(Controller, name):
                setattr(Controller, name, self.timed_method(getattr(Controller, name)))
        run_batch = Scheduler.run_batch

        @functools.wraps(run_batch)
        def run_and_count(*args: Any, **kwargs: Any) -> Any:
            self.end_step()
            return run_batch(*args, **kwargs)

        Scheduler.run_batch = run_and_count

    def start(self) -> None:
        self.first.value = -1
        self.values[:] = [0.0] * len(self.values)
        self.first.value = self.num_seen.value + NUM_SETTLING


async def load(
    engine: Any, clocks: Clocks, prompts: list[str], params: dict[str, Any], lengths: tuple[int, int], num_waiting: int
) -> None:
    """Keep `num_waiting` requests waiting until the clocks are full, then give up the rest."""
    is_over = False
    rng = random.Random(0)

    async def client(index: int) -> None:
        while not is_over:
            length = {"max_new_tokens": rng.randint(*lengths)}
            await engine.async_generate(prompts[index % len(prompts)], params | length)
            index += 1

    states = engine.tokenizer_manager.rid_to_state
    clients = [asyncio.create_task(client(index)) for index in range(num_waiting + NUM_ROWS)]
    while len(states) < len(clients):
        await asyncio.sleep(0.05)
    clocks.start()
    while not clocks.is_full:
        await asyncio.sleep(0.05)
        if failed := next((c.exception() for c in clients if c.done() and c.exception()), None):
            raise failed
    is_over = True
    while not all(c.done() for c in clients):  # again: a client may have just sent one more
        engine.tokenizer_manager.abort_request(abort_all=True)
        await asyncio.wait(clients, timeout=1)
    await asyncio.gather(*clients, return_exceptions=True)  # a request given up is an error to its client


def measure(name: str, waiting: list[int], clocks: Clocks, prompts: list[str]) -> list[dict[str, Any]]:
    options, is_program, lengths = WAYS[name]
    params = program_params(16, stop="never") if is_program else {"temperature": 1}
    params |= {"ignore_eos": True}
    rows: list[dict[str, Any]] = []
    with forked_engine(max_running_requests=NUM_ROWS, max_total_tokens=16_384, **options) as engine:
        for num_waiting in waiting:
            engine.loop.run_until_complete(load(engine, clocks, prompts, params, lengths, num_waiting))
            us = {key: [1e6 * seconds for seconds in clocks.column(key)] for key in COLUMNS}
            num_changes = sum(clocks.column("num_changes"))
            row = {
                "way": name,
                "tokens each": f"{lengths[0]} to {lengths[1]}",
                "waiting": num_waiting,
                "pass us": f"{mean(us['pass']):.0f}",
                "pass p99 us": f"{percentile(us['pass'], 0.99):.0f}",
                "order us": f"{mean(us['order']):.1f}",
                "order p99 us": f"{percentile(us['order'], 0.99):.0f}",
                "ours us": f"{mean(us['ours']):.0f}",
                "ours p99 us": f"{percentile(us['ours'], 0.99):.0f}",
                "changes per step": f"{num_changes / clocks.num_steps:.2f}" if num_changes else "-",
                "ours us per change": f"{sum(us['changing']) / num_changes:.0f}" if num_changes else "-",
                "ours us else": f"{(sum(us['ours']) - sum(us['changing'])) / clocks.num_steps:.1f}",
                "steps": clocks.num_steps,
            }
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    facts = {"model": "tiny reasoner", **machine()}
    prompts = [q["prompt"] for q in read_questions(REASONER, 600)]
    clocks = Clocks(args.steps)
    clocks.install()
    rows = [row | facts for name in args.ways for row in measure(name, args.waiting, clocks, prompts)]
    print()
    show([{key: row[key] for key in row if key not in facts} for row in rows])
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

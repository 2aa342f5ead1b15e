"""Very many programs through the policy alone, on the modelled engine: whether tables return to zero, and the bound on waiting holds.

    python benchmarks/soak_policy.py --num-programs 1000000

The policy objects are those that run in SGLang (docs/simulator.md). An engine of 64 rows has 128 programs at once: easy, hard and hopeless
ones, long and short branches, some that give no answer. Each kind of program has a run and an engine of its own.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from machine import machine
from rows import write_rows

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.outcome import show
from sglang_dynasor.policy.line import Ticket
from sglang_dynasor.policy.order import Order
from sglang_dynasor.sim import run as sim_run
from sglang_dynasor.sim.costs import read_costs
from sglang_dynasor.sim.engine import Engine
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import Load, parse_way, simulate
from sglang_dynasor.sim.samples import Question, Sample

CAP, LONGEST, PROMPT_TOKENS = 8, 40, 20
SIZE = Size(rows=64, pool_tokens=8192, pass_tokens=2048, max_new_tokens=64)
NUM_AT_ONCE = 128
PATIENCE_TOKENS = 2000
NUM_UNCOUNTED = (
    1000  # programs until it is known how long branches are here: what is charged for them before is a guess
)
WAYS = (
    "program stop=careful",
    "program stop=fast width=2",
    "program stop=never",
    "program stop=window:3 answer=number",
)


class Questions(Sequence[Question]):
    """So many questions, each made when it is asked for, the same each time."""

    def __init__(self, num: int):
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> Any:
        rng = random.Random(index)
        hardness = rng.choice((0.0, 0.1, 0.5, 1.0))  # how often a branch answers something else
        longest = LONGEST if rng.random() < 0.1 else 6

        def sample() -> Sample:
            answer = None if rng.random() < 0.05 else str(rng.randrange(9)) if rng.random() < hardness else "42"
            return Sample(answer, rng.randint(1, longest), answer == "42")

        return Question(str(index), PROMPT_TOKENS, tuple(sample() for _ in range(CAP)))


class Waits:
    """The most service that later arrivals were given while a program waited, once lengths of branches are known."""

    def __init__(self, order: Order):
        self.order = order
        self.most_tokens = 0
        self.num_ended = 0
        self._since: dict[Ticket, int] = {}
        self._wait, self._stop_waiting, self._end = order.wait, order.stop_waiting, order.end
        order.wait, order.stop_waiting, order.end = self.wait, self.stop_waiting, self.end

    def wait(self, ticket: Ticket, *args: Any) -> None:
        self._since.setdefault(ticket, self.order.overtaken_tokens(ticket))
        self._wait(ticket, *args)

    def stop_waiting(self, ticket: Ticket) -> None:
        since = self._since.pop(ticket, None)
        if since is not None and self.num_ended > NUM_UNCOUNTED:
            self.most_tokens = max(self.most_tokens, self.order.overtaken_tokens(ticket) - since)
        self._stop_waiting(ticket)

    def end(self, ticket: Ticket) -> None:
        self.num_ended += 1
        self._end(ticket)


def run(way: str, num: int) -> dict[str, Any]:
    """One kind of program. What is left in the tables of the policy should be nothing."""
    made_here: list[tuple[Engine, Waits]] = []

    def made(*args: Any) -> Engine:
        engine = Engine(*args)
        made_here.append((engine, Waits(engine.admission.order)))
        return engine

    started = time.perf_counter()
    with patch.object(sim_run, "Engine", made):
        config = DynasorConfig("dynasor", dynasor_patience_tokens=PATIENCE_TOKENS)
        done = simulate(
            parse_way(way, CAP, config), Questions(num), Load(num_at_once=NUM_AT_ONCE), SIZE, read_costs("cpu"), config
        )
    ((engine, waits),) = made_here
    admission, order = engine.admission, engine.admission.order
    left = {
        "alive": order.num_alive, "waiting": order.num_waiting, "promised": len(admission.promised), "budgets": len(admission.budgets.by_id),
        "waits": len(waits._since), "thoughts": admission.num_thoughts, "probes": admission.num_probes, "lines": len(order.lines) - 1, "KV tokens": done.kv_left_tokens,
    }  # fmt: skip
    return {
        "way": way,
        "programs": num,
        "tokens": done.num_generated,
        "decode steps": done.num_steps,
        "retracted": done.num_retracted,
        "most overtaken tokens": waits.most_tokens,
        "bound tokens": bound_tokens(),
        "left": sum(left.values()),
        "memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "µs per program": round(1e6 * (time.perf_counter() - started) / num),
    }


def bound_tokens() -> int:
    """What later arrivals may be given before a program that waits is started (docs/waiting.md): patience, and what is in flight."""
    return PATIENCE_TOKENS + SIZE.rows * (PROMPT_TOKENS + SIZE.max_new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-programs", type=int, default=1_000_000)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = [run(way, args.num_programs // len(WAYS)) for way in WAYS]
    show(rows)
    wrong = [row["way"] for row in rows if row["left"] or row["most overtaken tokens"] > row["bound tokens"]]
    if args.csv:
        write_rows(args.csv, [row | machine() for row in rows])
    if wrong:
        raise SystemExit(f"error: something is left, or the bound did not hold: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

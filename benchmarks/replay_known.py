"""Known answers: what the simulator says of recorded samples against what was computed from them by other code.

    python benchmarks/replay_known.py --traces DIR

DIR holds the JSONL traces; they are not part of this repository, so that this is no test. Exit code 1 if a figure is off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.demo import show
from sglang_dynasor.sim.costs import CURVES
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import Load, Run, parse_way, simulate
from sglang_dynasor.sim.samples import read_samples

FILE, DATASET, CAP = "math500_r1_llama8b.jsonl.zst", "v2sys", 32
# Of FILE's README: ten orders of the 32 samples, those without an answer not voting. Way, what, how much, how far off it may
# be: as many points or samples as other orders bring.
KNOWN = (
    ("single", "accuracy %", 73.9, 1.5),
    ("stock", "accuracy %", 88.5, 1.0),
    ("adaptive", "branches", 9.5, 0.3),
)


def figure(runs: list[Run], what: str) -> float:
    solved = [one for run in runs for one in run.solved]
    return (
        100 * mean(bool(s.is_right) for s in solved) if what == "accuracy %" else mean(s.num_branches for s in solved)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=10)
    args = parser.parse_args()
    config, size = DynasorConfig(), Size(rows=256, pool_tokens=10_000_000)
    questions = read_samples(args.traces / FILE, DATASET, 256)
    rows: list[dict[str, object]] = []
    for way, what, known, tolerance in KNOWN:
        runs = [
            simulate(
                parse_way(way, CAP, config), [question.drawn(f"{order}", CAP) for question in questions],
                Load(num_at_once=1), size, CURVES["gpu"], config,
            )
            for order in range(args.orders)
        ]  # fmt: skip
        found = figure(runs, what)
        verdict = "ok" if abs(found - known) <= tolerance else "OFF"
        rows.append({"way": way, "what": what, "known": known, "simulated": round(found, 2), "": verdict})
    show(rows)
    sys.exit(any(row[""] == "OFF" for row in rows))


if __name__ == "__main__":
    main()

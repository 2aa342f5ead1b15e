"""Costs for `sglang-dynasor simulate --costs FILE` from the steps of an engine (step_log.py).

python benchmarks/fit_costs.py steps.csv --out costs.json --source "Qwen3-8B on one H100" --overlap device
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from sglang_dynasor.demo import show
from sglang_dynasor.errors import DynasorError
from sglang_dynasor.sim.costs import OVERLAPS, Costs, Step, fit, read_steps, write_costs


def expected_s(step: Step, costs: Costs) -> float:
    """Seconds of a step, as the costs say."""
    return (costs.decode if step.is_decode else costs.prefill)(step.num_rows, step.num_tokens)


def errors(steps: list[Step], costs: Costs) -> list[dict[str, object]]:
    """How far off the costs are, by kind and number of rows."""
    groups: dict[tuple[str, int], list[Step]] = {}
    for step in steps:
        size = 1 << (step.num_rows - 1).bit_length()
        groups.setdefault(("decode" if step.is_decode else "prefill", size), []).append(step)
    return [
        {
            "kind": kind,
            "rows up to": size,
            "steps": len(group),
            "median ms": round(1000 * median(step.seconds for step in group), 2),
            "median error %": round(100 * median(expected_s(step, costs) / step.seconds - 1 for step in group), 1),
        }
        for (kind, size), group in sorted(groups.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", required=True, help="model and machine")
    parser.add_argument(
        "--overlap", choices=OVERLAPS, required=True, help="SGLang's overlap schedule: off, on a device, or on a CPU"
    )
    parser.add_argument("--request-s", type=float, default=0.0, help="from a client to the scheduler")
    args = parser.parse_args()
    try:
        steps = read_steps(args.steps)
        costs = fit(steps, args.source, args.overlap, args.request_s)
        write_costs(costs, args.out)
    except DynasorError as error:
        raise SystemExit(f"error: {error}") from None
    show(errors(steps, costs))


if __name__ == "__main__":
    main()

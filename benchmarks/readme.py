"""Write the result tables of the README from the CSV files: `python benchmarks/readme.py` (`make readme`)."""

from __future__ import annotations

import csv
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "self_consistency": "python benchmarks/bench_self_consistency.py --num-questions 128",
    "passthrough": "make bench",
    "statistics": "python benchmarks/bench_statistics.py --num-questions 128",
    "statistics_overhead": "make bench",
    "online": "git checkout fcffdb7; python benchmarks/bench_online.py --processes poisson --rates 0.3 0.9 1.3 1.8",
    "online_points": "git checkout fcffdb7; python benchmarks/bench_online.py --processes poisson --rates 0.3 0.9 1.3 1.8",
    "online_bursty": "git checkout db3a941; python benchmarks/bench_online.py --processes bursty --rates 0.3 0.9 1.3 1.8 "
    '--ways "+gang +certainty" all',
    "starvation": "python benchmarks/bench_starvation.py --seconds 20 --repeats 2",
    "policy_overhead": "make bench",
    "kernels": "python benchmarks/bench_kernels.py --csv benchmarks/results/kernels.csv",
    "soak": "make soak",
    "long_cot": "python benchmarks/bench_long_cot.py --num-questions 48 --repeats 2",
    "long_cot_32": "python benchmarks/bench_long_cot.py --num-questions 96 --repeats 2 --concurrency 32 "
    '--ways "long_cot, every 64 tokens, trial:0.9, 2 agree" "long_cot, at \'wait\', trial:0.9, 2 agree" '
    '"client-side loop, every 64 tokens, trial:0.9, 2 agree" "client-side loop, at \'wait\', trial:0.9, 2 agree"',
    "long_cot_short": "git checkout 9f56a61; python benchmarks/bench_long_cot.py --num-questions 120",
    "algorithms": "python benchmarks/bench_algorithms.py --num-questions 48",
    "probes": "python benchmarks/replay_probes.py --traces DIR --csv benchmarks/results/probes.csv",
    "stopping": "python benchmarks/replay_stopping.py --traces DIR --csv benchmarks/results/stopping.csv",
}
CLOSING = (
    "questions",
    "programs",
    "hard programs",
    "at a time",
    "seconds",
    "steps",
    "SLO s",
    "repeats",
    "rounds",
    "orders",
    "model",
    "machine",
    "copy GB/s",
    "gpu",
    "driver",
    "triton",
    "flashinfer",
    "sglang",
    "torch",
    "commit",
)


def table(name: str) -> str:
    """A CSV as Markdown; the columns that are the same in every row become the line below."""
    with (RESULTS / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    same = [key for key in CLOSING if key in rows[0] and len({row[key] for row in rows}) == 1]
    keys = [key for key in rows[0] if key not in same]
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(row[key] for key in keys) + " |" for row in rows]
    return "\n".join([*lines, "", source(name, {key: rows[0][key] for key in same})])


def source(name: str, facts: dict[str, str]) -> str:
    """The line below a table."""
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"{told}{'. ' if told else ''}Command: `{COMMANDS[name]}`; CSV: `benchmarks/results/{name}.csv`."


def summary(name: str) -> str:
    """Of a CSV of pairs, each way after what it is compared with, the ways alone."""
    with (RESULTS / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = "tokens saved %", "wall-clock saved %"
    lines = ["| algorithm | " + " | ".join(keys) + " | accuracy % uniform | stopped |", "|" + " --- |" * 5]
    for uniform, stopped in pairwise(rows):
        if uniform["way"] == "uniform":
            cells = [
                stopped["algorithm"],
                *(stopped[key] for key in keys),
                uniform["accuracy %"],
                stopped["accuracy %"],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(name, {key: rows[0][key] for key in CLOSING if key in rows[0]})])


def write(path: Path) -> None:
    """Replace what stands between the markers `table:NAME` or `summary:NAME` and `end`."""
    text = path.read_text()
    for kind, name in re.findall(r"<!-- (table|summary):(\w+) -->", text):
        if (RESULTS / f"{name}.csv").exists():
            mark = f"<!-- {kind}:{name} -->"
            block = f"{mark}\n{table(name) if kind == 'table' else summary(name)}\n<!-- end -->"
            text = re.sub(rf"{mark}\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    for file in (
        ROOT / "README.md",
        ROOT / "docs" / "stopping.md",
        ROOT / "docs" / "statistics.md",
        ROOT / "docs" / "online.md",
        ROOT / "docs" / "long_cot.md",
        ROOT / "docs" / "frontend.md",
        ROOT / "docs" / "cost.md",
        ROOT / "kernels" / "README.md",
    ):
        write(file)

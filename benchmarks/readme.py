"""Write what is generated in README and docs, between `<!-- KIND:NAME -->` and `<!-- end -->`: `make readme`.

Kinds: a `table` is made from a CSV file of the benchmarks, a `reference` from the code that reads the settings.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from sglang_dynasor.algorithms.catalogue import ALGORITHMS, SEARCH_HELP
from sglang_dynasor.config import HELP, DynasorConfig
from sglang_dynasor.observe.ledger import STATUS_HELP
from sglang_dynasor.observe.line import LINE_HELP
from sglang_dynasor.observe.metrics import METRICS
from sglang_dynasor.policy.answers import EXTRACTORS, FORMS
from sglang_dynasor.policy.record import RECORD_HELP
from sglang_dynasor.policy.spec import FIELD_HELP
from sglang_dynasor.policy.thought_spec import EFFORTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "self_consistency": "python benchmarks/bench_self_consistency.py --num-questions 128",
    "peers": "python benchmarks/bench_peers.py --num-questions 96 --repeats 1 --at-once 16 32 64 1 --rates --ways greedy single stock "
    '"its_hub 1.2.0 doubling" "program, careful" "program, balanced" "program, fast" --csv benchmarks/results/peers',
    "peers_pairs": "python benchmarks/bench_peers.py --num-questions 96 --repeats 1 --at-once 16 32 64 1 --rates --ways greedy single stock "
    '"its_hub 1.2.0 doubling" "program, careful" "program, balanced" "program, fast" --csv benchmarks/results/peers',
    "simulate_online": "python benchmarks/simulate_online.py --samples DIR/math500_r1_llama8b.jsonl.zst --dataset v2sys_x32 --costs cpu gpu "
    "--csv benchmarks/results/simulate_online.csv",
    "passthrough": "make bench",
    "passthrough_options": "python benchmarks/bench_passthrough.py --options --rounds 25 --csv benchmarks/results/passthrough_options.csv",
    "statistics": "python benchmarks/bench_statistics.py --num-questions 128",
    "statistics_overhead": "make bench",
    "answer_tokens": "make bench",
    "online": "git checkout fcffdb7; python benchmarks/bench_online.py --processes poisson --rates 0.3 0.9 1.3 1.8",
    "online_points": "git checkout fcffdb7; python benchmarks/bench_online.py --processes poisson --rates 0.3 0.9 1.3 1.8",
    "online_bursty": "git checkout db3a941; python benchmarks/bench_online.py --processes bursty --rates 0.3 0.9 1.3 1.8 "
    '--ways "+gang +certainty" all',
    "starvation": "python benchmarks/bench_starvation.py --seconds 20 --repeats 2",
    "policy_overhead": "make bench",
    "viewers": "python benchmarks/bench_viewers.py --rounds 8 --csv benchmarks/results/viewers.csv",
    "kernels": "python benchmarks/bench_kernels.py --csv benchmarks/results/kernels.csv",
    "soak": "python benchmarks/soak.py --minutes 60 --csv benchmarks/results/soak.csv",
    "soak_policy": "python benchmarks/soak_policy.py --csv benchmarks/results/soak_policy.csv",
    "long_cot": "python benchmarks/bench_long_cot.py --num-questions 48 --repeats 1",
    "long_cot_32": "python benchmarks/bench_long_cot.py --num-questions 96 --repeats 2 --concurrency 32 "
    '--ways "long_cot, every 64 tokens, trial:0.9, 2 agree" "long_cot, at \'wait\', trial:0.9, 2 agree" '
    '"client-side loop, every 64 tokens, trial:0.9, 2 agree" "client-side loop, at \'wait\', trial:0.9, 2 agree"',
    "chains": "python benchmarks/bench_chains.py --csv benchmarks/results/chains.csv",
    "long_cot_short": "git checkout 9f56a61; python benchmarks/bench_long_cot.py --num-questions 120",
    "algorithms": "python benchmarks/bench_algorithms.py --num-questions 48",
    "answers": "python benchmarks/bench_answers.py --csv benchmarks/results/answers.csv",
    "votes": "python benchmarks/bench_votes.py --csv benchmarks/results/votes.csv",
    "neighbour": "python benchmarks/bench_neighbour.py --csv benchmarks/results/neighbour.csv",
    "simulator": "python benchmarks/bench_simulator.py --csv benchmarks/results/simulator.csv --save FOLDER",
    "probes": "python benchmarks/replay_probes.py --traces DIR --results benchmarks/results",
    "probes_rules": "python benchmarks/replay_probes.py --traces DIR --results benchmarks/results",
    "probes_halves": "python benchmarks/replay_probes.py --traces DIR --results benchmarks/results",
    "probes_waves": "python benchmarks/replay_probes.py --traces DIR --results benchmarks/results",
    "simulated_cpu": "sglang-dynasor simulate --samples DIR/math500_r1_llama8b.jsonl.zst --dataset v2sys --costs cpu --at-once 1 16 32 64 "
    '--repeats 5 --rows 128 --prompt-tokens 128 --ways single stock doubling beta adaptive windows "program stop=careful" '
    '"program stop=balanced" "program stop=fast" --csv benchmarks/results/simulated_cpu.csv',
    "simulated_gpu": "sglang-dynasor simulate --samples DIR/math500_r1_llama8b.jsonl.zst --dataset v2sys --costs gpu --at-once 1 16 32 64 "
    '--repeats 5 --rows 128 --prompt-tokens 128 --ways single stock doubling beta adaptive windows "program stop=careful" '
    '"program stop=balanced" "program stop=fast" --csv benchmarks/results/simulated_gpu.csv',
    "rules": "python benchmarks/replay_rules.py --traces DIR --csv benchmarks/results/rules.csv --sets-csv benchmarks/results/rules_sets.csv",
    "shared_budget": "python benchmarks/replay_shared_budget.py --traces DIR --csv benchmarks/results/shared_budget.csv",
    "budget": "python benchmarks/replay_budget.py --traces DIR --csv benchmarks/results/budget.csv",
}
# Of files with more columns than a reader wants.
SHOWN = ("load", "way", "accuracy %", "tokens", "branches", "mean s", "p50 s", "p90 s", "p99 s", "questions", "repeats")
CLOSING = (
    "questions",
    "programs",
    "hard programs",
    "at a time",
    "cap",
    "temperature",
    "samples",
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
    if name.startswith("simulated_"):
        rows = [{key: row[key] for key in SHOWN} for row in rows]
    same = [key for key in CLOSING if key in rows[0] and len({row[key] for row in rows}) == 1]
    keys = [key for key in rows[0] if key not in same]
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(row[key].replace("|", "\\|") for key in keys) + " |" for row in rows]
    return "\n".join([*lines, "", source(name, {key: rows[0][key] for key in same})])


def source(name: str, facts: dict[str, str]) -> str:
    """The line below a table."""
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"{told}{'. ' if told else ''}Command: `{COMMANDS[name]}`; CSV: `benchmarks/results/{name}.csv`."


def reference(name: str) -> str:
    """All keys of one kind with what they mean, as Markdown."""
    match name:
        case "field":
            rows = [(f"`{key}`", values, meaning) for key, (values, meaning) in FIELD_HELP.items()]
            return grid(("key", "values", "meaning"), rows)
        case "algorithms":
            return grid(("algorithm", "what it is", "rewards", "vote", "rule", "branches", "own keys"), algorithms())
        case "searches":
            rows = [(f"`{key}`", values, meaning) for key, (values, meaning) in SEARCH_HELP.items()]
            return grid(("key", "values", "meaning"), rows)
        case "answers":
            rows = [
                (f"`{key}`", (extract.__doc__ or "").replace("\n", " ").replace("    ", "").strip())
                for key, extract in EXTRACTORS.items()
            ]
            return grid(
                ("answer", "what is found"), [*rows, *((f"`{form}`", meaning) for form, meaning in FORMS.items())]
            )
        case "efforts":
            rows = [(f"`{key}`", *(f"{value:,}" for value in values)) for key, values in EFFORTS.items()]
            return grid(("effort", "agree", "probability", "min_tokens"), rows)
        case "options":
            rows = [(option(field.name), default(field.default), HELP[field.name]) for field in fields(DynasorConfig)]
            return grid(("option", "default", "meaning"), rows)
        case "record":
            rows = [(f"`{key}`", where, meaning) for key, (where, meaning) in RECORD_HELP.items()]
            return grid(("key", "where", "meaning"), rows)
        case "line":
            rows = [(f"`{key}`", where, meaning) for key, (where, meaning) in LINE_HELP.items()]
            return grid(("key", "where", "meaning"), rows)
        case "status":
            return grid(("counter", "meaning"), [(f"`{key}`", meaning) for key, meaning in STATUS_HELP.items()])
        case "metrics":
            rows = [
                (f"`{key}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help)
                for key, metric in METRICS.items()
            ]
            return grid(("metric", "kind", "labels", "meaning"), rows)
        case _:
            raise ValueError(f"reference:{name} is not known; use one of the cases in benchmarks/readme.py")


def algorithms() -> list[tuple[str, ...]]:
    """What is known of each algorithm, with its defaults."""
    return [
        (
            f"`{name}`",
            record.summary,
            "needed" if record.needs_rewards else "",
            f"`{record.vote}`",
            f"`{record.stop}`",
            str(record.branches),
            ", ".join(f"`{key}`" for key in (*record.engine_keys, *record.search_keys)),
        )
        for name, record in ALGORITHMS.items()
    ]


def option(name: str) -> str:
    """A setting as the command line has it."""
    return f"`--{name.replace('_', '-')}`"


def default(value: object) -> str:
    """A default as a reader writes it."""
    return "none" if value in (None, "") else "off" if value is False else f"{value}"


def grid(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; a `|` inside a cell is no border."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


KINDS = {"table": table, "reference": reference}


def filled(text: str) -> str:
    """`text` with what stands between its markers made anew; what was never measured stays as it is.

    Raises:
        ValueError: a marker without its end, or of something that is not known.
    """
    marks = re.findall(rf"<!-- ({'|'.join(KINDS)}):(\w+) -->", text)
    for kind, name in marks:
        if kind != "reference" and not (RESULTS / f"{name}.csv").exists():
            continue
        mark = f"<!-- {kind}:{name} -->"
        block = f"{mark}\n{KINDS[kind](name)}\n<!-- end -->"
        text, num_found = re.subn(rf"{mark}\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
        if num_found != 1:
            raise ValueError(f"{mark} stands {num_found} times before an <!-- end -->; once is right")
    return text


def pages() -> list[Path]:
    """The files that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))

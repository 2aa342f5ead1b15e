"""What requests without the field pay: stock SGLang against `--scheduler dynasor`, in paired runs.

    python benchmarks/bench_passthrough.py --csv benchmarks/results/passthrough.csv
    python benchmarks/bench_passthrough.py --options --csv benchmarks/results/passthrough_options.csv

Two engines live side by side in processes of their own, one without our plugin at all, one with it and the flag. They take
turns on the same greedy requests, so that a noisy machine hits both; a round's ratio is one pair. With `--options` the same is
done with each of SGLang's options that the docs say programs work with, on fewer requests and in more rounds.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing as mp
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from adapter import make_adapter
from machine import machine

from sglang_dynasor.demo import read_questions, show

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
NUM_REQUESTS, NUM_TOKENS = 128, 96
FEW_REQUESTS, FEW_TOKENS = 64, 48
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "--disable-overlap-schedule": {"disable_overlap_schedule": True},
    "--chunked-prefill-size 64 --enable-mixed-chunk --page-size 16": {
        "chunked_prefill_size": 64, "enable_mixed_chunk": True, "page_size": 16,
    },
    "--enable-deterministic-inference": {"enable_deterministic_inference": True},
    "--schedule-policy lpm": {"schedule_policy": "lpm"},
    "--enable-priority-scheduling --disable-priority-preemption": {
        "enable_priority_scheduling": True, "disable_priority_preemption": True,
    },
    "--lora-paths (two, and the base model)": {"lora_paths": ["a", "b"], "max_loras_per_batch": 3},
}  # fmt: skip


def serve(connection: Connection, is_stock: bool, options: dict[str, Any], num_requests: int, num_tokens: int) -> None:
    """An engine that runs the requests whenever it is told to, and answers seconds and texts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if is_stock:
        os.environ["SGLANG_PLUGINS"] = "torch_cpu"
    import sglang as sgl

    ours = {} if is_stock else {"scheduler": "dynasor"}
    request: dict[str, Any] = {}
    if adapters := options.get("lora_paths"):
        folder = Path(tempfile.mkdtemp())
        paths = {name: str(make_adapter(folder / name, seed)) for seed, name in enumerate(adapters)}
        options = {**options, "lora_paths": paths}
        names = [*adapters, None]
        request["lora_path"] = [names[i % len(names)] for i in range(num_requests)]
    if "enable_priority_scheduling" in options:
        request["priority"] = 1  # SGLang takes one for all prompts of a call
    engine = sgl.Engine(
        model_path=str(REASONER / "checkpoint"), dtype="float32", max_total_tokens=65_536, max_running_requests=64,
        log_level="error", sleep_on_idle=True, **ours, **options,
    )  # fmt: skip
    prompts = [q["prompt"] for q in read_questions(REASONER, num_requests)]
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    connection.send("ready")
    while connection.recv() == "run":
        engine.flush_cache()
        started = time.perf_counter()
        outs = engine.generate(prompts, params, **request)
        connection.send((time.perf_counter() - started, [out["text"] for out in outs]))
    engine.shutdown()


class Pairs(NamedTuple):
    """What rounds of both took."""

    ratios: list[float]  # of throughput, sorted
    seconds: dict[bool, list[float]]  # by whether it is stock
    num_different: int  # outputs


def measure(options: dict[str, Any], num_requests: int, num_tokens: int, num_rounds: int) -> Pairs:
    """Start both engines, let them take turns, and end them."""
    context = mp.get_context("spawn")
    ends: dict[bool, Any] = {}
    processes = []
    for is_stock in (True, False):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, is_stock, options, num_requests, num_tokens))
        process.start()
        ends[is_stock] = here
        processes.append(process)
    for end in ends.values():
        end.recv()

    def run(is_stock: bool) -> tuple[float, list[str]]:
        ends[is_stock].send("run")
        return ends[is_stock].recv()

    for is_stock in (True, False):
        run(is_stock)  # warm up
    ratios: list[float] = []
    seconds: dict[bool, list[float]] = {True: [], False: []}
    num_different = 0
    for turn in range(num_rounds):
        order = (True, False) if turn % 2 else (False, True)
        results = {is_stock: run(is_stock) for is_stock in order}
        for is_stock in order:
            seconds[is_stock].append(results[is_stock][0])
        ratios.append(results[True][0] / results[False][0])
        num_different += sum(a != b for a, b in zip(results[True][1], results[False][1], strict=True))
    for end in ends.values():
        end.send("stop")
    for process in processes:
        process.join()
    return Pairs(sorted(ratios), seconds, num_different)


def interval(ratios: list[float]) -> str:
    """95 % of the medians when rounds are drawn anew."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return f"{low:.3f} to {high:.3f}"


def row_of(pairs: Pairs, num_requests: int, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    tokens, ratios = num_requests * num_tokens, pairs.ratios
    return {
        "requests": num_requests,
        "tokens each": num_tokens,
        "stock tok/s": round(tokens / median(pairs.seconds[True])),
        "dynasor tok/s": round(tokens / median(pairs.seconds[False])),
        "throughput ratio (median)": round(median(ratios), 3),
        "quartiles": f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}",
        "rounds": num_rounds,
        "outputs that differ": pairs.num_different,
        "model": "tiny reasoner",
        **machine(),
    }


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--options", action="store_true", help="with each option that programs work with")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not args.options:
        row = row_of(measure({}, NUM_REQUESTS, NUM_TOKENS, args.rounds), NUM_REQUESTS, NUM_TOKENS, args.rounds)
        show([row])
        write(args.csv, [row])
        return
    rows: list[dict[str, Any]] = []
    for name, options in OPTIONS.items():
        pairs = measure(options, FEW_REQUESTS, FEW_TOKENS, args.rounds)
        row = row_of(pairs, FEW_REQUESTS, FEW_TOKENS, args.rounds) | {"quartiles": interval(pairs.ratios)}
        rows.append({"option": name, **{"95 % interval" if key == "quartiles" else key: row[key] for key in row}})
        show(rows)
        write(args.csv, rows)  # what there is, if it is cut off


if __name__ == "__main__":
    main()

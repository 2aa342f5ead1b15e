"""What requests without the field pay: stock SGLang against `--scheduler dynasor`, in paired runs.

    python benchmarks/bench_passthrough.py --csv benchmarks/results/passthrough.csv

Two engines live side by side in processes of their own, one without our plugin at all, one with it and the flag. They take
turns on the same greedy requests, so that a noisy machine hits both; a round's ratio is one pair.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing as mp
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine

from sglang_dynasor.demo import read_questions, show

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
NUM_REQUESTS, NUM_TOKENS = 128, 96


def serve(connection: Connection, is_stock: bool) -> None:
    """An engine that runs the requests whenever it is told to, and answers seconds and texts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if is_stock:
        os.environ["SGLANG_PLUGINS"] = "torch_cpu"
    import sglang as sgl

    ours = {} if is_stock else {"scheduler": "dynasor"}
    engine = sgl.Engine(
        model_path=str(REASONER / "checkpoint"), dtype="float32", max_total_tokens=65_536, max_running_requests=64,
        log_level="error", sleep_on_idle=True, **ours,
    )  # fmt: skip
    prompts = [q["prompt"] for q in read_questions(REASONER, NUM_REQUESTS)]
    params = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    connection.send("ready")
    while connection.recv() == "run":
        engine.flush_cache()
        started = time.perf_counter()
        outs = engine.generate(prompts, params)
        connection.send((time.perf_counter() - started, [out["text"] for out in outs]))
    engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    context = mp.get_context("spawn")
    ends: dict[bool, Any] = {}
    processes = []
    for is_stock in (True, False):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, is_stock))
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
    for turn in range(args.rounds):
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
    tokens = NUM_REQUESTS * NUM_TOKENS
    ratios.sort()
    row = {
        "requests": NUM_REQUESTS,
        "tokens each": NUM_TOKENS,
        "stock tok/s": round(tokens / median(seconds[True])),
        "dynasor tok/s": round(tokens / median(seconds[False])),
        "throughput ratio (median)": round(median(ratios), 3),
        "quartiles": f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}",
        "rounds": args.rounds,
        "outputs that differ": num_different,
        "model": "tiny reasoner",
        **machine(),
    }
    show([row])
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()

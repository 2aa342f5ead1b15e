"""What five viewers of the live page cost: the same hundred programs with and without them, in turns on one server.

    python benchmarks/bench_viewers.py --csv benchmarks/results/viewers.csv

Every branch generates as many tokens, so that a wave is the same work each time. Viewers only read: what a browser takes
to show it is not the server's. The cost is the mean of the rounds' pairs, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from intervals import inside
from machine import machine
from server import Server

from sglang_dynasor.demo import read_questions, show

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
NUM_PROGRAMS, CAP, NUM_TOKENS, NUM_VIEWERS = 100, 16, 16, 5


async def wave(url: str, prompts: list[str]) -> float:
    """Seconds that all programs take together."""
    field = {"branches": CAP, "stop": "never", "answer": "hash"}
    params = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 1.0, "custom_params": {"dynasor": field}}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()
        sent = [client.post(f"{url}/generate", json={"text": text, "sampling_params": params}) for text in prompts]
        for response in await asyncio.gather(*sent):
            assert response.json()["meta_info"]["dynasor"]["num_tokens"] == CAP * NUM_TOKENS
        return time.perf_counter() - started


def watched_wave(url: str, prompts: list[str], seen: Path) -> float:
    """The same while five look; what the last of them sees is in `seen`."""
    files = ["/dev/null"] * (NUM_VIEWERS - 1) + [str(seen)]
    viewers = [subprocess.Popen(["curl", "-sN", "-o", file, f"{url}/dynasor/events"]) for file in files]
    try:
        time.sleep(1)
        return asyncio.run(wave(url, prompts))
    finally:
        for viewer in viewers:
            viewer.kill()
            viewer.wait()


def look_seconds(seen: Path) -> list[float]:
    """What each look took of the scheduler while there was much to see."""
    states = [
        json.loads(line[6:])
        for line in seen.read_text().splitlines()
        if line.startswith("data: {") and '"schedulers"' in line
    ]
    found = [scheduler for state in states for scheduler in state["schedulers"]]
    return [scheduler["look_s"] for scheduler in found if len(scheduler["programs"]) > NUM_PROGRAMS / 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    prompts = [question["prompt"] for question in read_questions(REASONER, NUM_PROGRAMS)]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log", "--scheduler", "dynasor", "--dtype", "float32", "--max-running-requests", "64", "--max-total-tokens", "65536", "--log-level", "error")  # fmt: skip
        try:
            server.wait()
            asyncio.run(wave(server.url, prompts))  # warm up
            looks: list[float] = []
            seconds: dict[bool, list[float]] = {True: [], False: []}
            num_looks = server.status()["num_looks"]
            for turn in range(args.rounds):
                for is_watched in (True, False) if turn % 2 else (False, True):
                    if is_watched:
                        seconds[True].append(watched_wave(server.url, prompts, seen := Path(folder) / "seen"))
                        looks += look_seconds(seen)
                    else:
                        seconds[False].append(asyncio.run(wave(server.url, prompts)))
                    time.sleep(1)
            num_looks = server.status()["num_looks"] - num_looks
        finally:
            server.stop()
    costs = 100 * (1 - np.array(seconds[False]) / np.array(seconds[True]))
    low, high = inside(np.random.default_rng(0).choice(costs, (10_000, len(costs))).mean(axis=1))
    tokens = NUM_PROGRAMS * CAP * NUM_TOKENS
    row: dict[str, Any] = {
        "programs": NUM_PROGRAMS, "branches each": CAP, "viewers": NUM_VIEWERS, "tok/s without": round(tokens / median(seconds[False])),
        "tok/s with": round(tokens / median(seconds[True])), "cost %": f"{costs.mean():.1f} ({low:.1f} to {high:.1f})",
        "looks per s": round(num_looks / (sum(seconds[True]) + args.rounds), 1), "scheduler's ms each": f"{1e3 * np.mean(looks):.1f}",
        "rounds": args.rounds,
        "model": "tiny reasoner", **machine(),
    }  # fmt: skip
    show([row])
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()

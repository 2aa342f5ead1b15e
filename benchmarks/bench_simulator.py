"""The simulator held against the engine: costs fitted on one workload, mean and p90 latency, tokens and wall-clock on others.

    python benchmarks/bench_simulator.py --csv benchmarks/results/simulator.csv --save FOLDER

One engine on the tiny reasoner. First stock samples of some questions at several loads: their steps give the costs, their
answers and lengths the samples. Then other loads and ways, the same in both; the engine samples anew, so that equal
questions do not have equal branches, and the simulator is the mean of --draws orders of the recorded samples. `--save` keeps
samples.jsonl, steps.csv and costs.json for `sglang-dynasor simulate`. "steps slower" is how many times as long the engine's steps
took as the fitted costs say: on a machine that others use too, that part of an error is not the model's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

from forked import REASONER, flush, forked_engine
from machine import machine
from open_loop import in_turn, play
from rows import percentile, write_rows
from step_log import logged_steps

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.demo import program_params, read_questions, read_record, show, stock_params, vote
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.sim.arrivals import poisson
from sglang_dynasor.sim.costs import Costs, Step, fit, read_steps, write_costs
from sglang_dynasor.sim.peers import PEERS
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import Load, parse_way, simulate
from sglang_dynasor.sim.samples import Question, read_samples

CAP, NUM_RECORDED = 16, 24
SIZE = Size(rows=64, pool_tokens=65_536, pass_tokens=8192, max_new_tokens=200)
ENGINE = {
    "max_running_requests": SIZE.rows,
    "max_total_tokens": SIZE.pool_tokens,
    "chunked_prefill_size": SIZE.pass_tokens,
}
WAYS = {
    "stock": None,
    "doubling": None,
    "program": {},
    "program stop=predictive:0.05 width=3": {"stop": "predictive:0.05", "width": 3},
}
OVERLAP = "host"  # the CPU platform runs SGLang's overlap schedule
FITTED_AT = (1, 2, 4)  # questions at once when samples are recorded
Send = Callable[[int, float], Awaitable[tuple[float, int, bool]]]  # latency, tokens, whether it is right


async def record(engine: Any, questions: list[dict[str, Any]], path: Path) -> None:
    """Write the samples of all questions, some at each load; before, run steps of few rows."""
    lines: list[str] = [""] * len(questions)

    async def send(index: int, due: float) -> None:
        outs = await engine.async_generate(questions[index]["prompt"], stock_params(NUM_RECORDED))
        samples: list[dict[str, Any]] = []
        for out in outs:
            answer = extract_answer(out["text"], "hash")
            is_right = answer is not None and answer_key(answer) == str(questions[index]["answer"])
            samples.append({"answer": answer, "n_tokens": out["meta_info"]["completion_tokens"], "correct": is_right})
        prompt_tokens = outs[0]["meta_info"]["prompt_tokens"]
        lines[index] = json.dumps({"qid": index, "prompt_tokens": prompt_tokens, "samples": samples})

    for num in (1, 2, 4, 8, 16):  # for the costs of few rows
        for question in questions[:4]:
            await engine.async_generate(question["prompt"], stock_params(num))
    part = -(-len(questions) // len(FITTED_AT))
    for number, at_once in enumerate(FITTED_AT):
        first = number * part
        num = min(part, len(questions) - first)
        await in_turn(num, at_once, lambda index, due, first=first: send(first + index, due))
    path.write_text("\n".join(lines) + "\n")


async def request_s(engine: Any, questions: list[dict[str, Any]], costs: Costs) -> float:
    """Half of what a request takes that no step explains."""
    rests: list[float] = []
    for question in questions:
        started = time.perf_counter()
        out = await engine.async_generate(question["prompt"], stock_params(1) | {"temperature": 0})
        meta = out["meta_info"]
        steps_s = costs.prefill(1, meta["prompt_tokens"] - meta["cached_tokens"])
        steps_s += (meta["completion_tokens"] - 1) * costs.decode(1, meta["prompt_tokens"])
        rests.append((time.perf_counter() - started - steps_s) / 2)
    return max(0.0, median(rests))


def sender(engine: Any, way: str, questions: list[dict[str, Any]]) -> Send:
    """How one question is solved by the engine."""

    async def send(index: int, due: float) -> tuple[float, int, bool]:
        question = questions[index]
        if WAYS[way] is not None:
            out = await engine.async_generate(question["prompt"], program_params(CAP, **WAYS[way]))
            solved = read_record(question, out["meta_info"]["dynasor"], time.perf_counter() - due)
        elif way == "stock":
            outs = await engine.async_generate(question["prompt"], stock_params(CAP))
            solved = vote(question, outs, time.perf_counter() - due)
        else:
            solved = vote(question, await loop(engine, way, question), time.perf_counter() - due)
        return time.perf_counter() - due, solved.num_tokens, solved.is_right

    return send


async def loop(engine: Any, way: str, question: dict[str, Any]) -> list[dict[str, Any]]:
    """A client's own waves of single samples."""
    outs: list[dict[str, Any]] = []
    answers: list[str | None] = []
    while (more := PEERS[way].more(answers, len(outs), CAP)) is not None:
        wave = (engine.async_generate(question["prompt"], stock_params(1)) for _ in range(more))
        outs += [out[0] if isinstance(out, list) else out for out in await asyncio.gather(*wave)]
        found = [extract_answer(out["text"], "hash") for out in outs]
        answers = [None if answer is None else answer_key(answer) for answer in found]
    return outs


def loads(at_once: list[int], rates: list[float], num: int) -> dict[str, Load]:
    named = {f"{num_at_once} at once": Load(num_at_once=num_at_once) for num_at_once in at_once}
    return named | {f"Poisson {rate:g}/s": Load(times_s=tuple(poisson(rate, num, seed=5))) for rate in rates}


def figures(latencies: list[float], tokens: list[int], right: list[bool], wall_s: float) -> dict[str, float]:
    return {
        "mean s": mean(latencies),
        "p90 s": percentile(latencies, 0.9),
        "tokens": mean(tokens),
        "per s": len(latencies) / wall_s,
        "accuracy %": 100 * mean(right),
    }


async def measured(send: Send, load: Load, num: int) -> dict[str, float]:
    started = time.perf_counter()
    if load.num_at_once:
        done = await in_turn(num, load.num_at_once, send)
    else:
        done = await play(list(load.times_s), send)
    wall_s = time.perf_counter() - started
    return figures([d[0] for d in done], [d[1] for d in done], [d[2] for d in done], wall_s)


def simulated(way: str, samples: list[Question], load: Load, costs: Costs, draws: int) -> dict[str, float]:
    config = DynasorConfig()
    all_figures: list[dict[str, float]] = []
    for draw in range(draws):
        questions = [question.drawn(str(draw), CAP) for question in samples]
        run = simulate(parse_way(way, CAP, config), questions, load, SIZE, costs, config)
        latencies = [s.latency_s for s in run.solved]
        tokens, right = [s.num_tokens for s in run.solved], [bool(s.is_right) for s in run.solved]
        all_figures.append(figures(latencies, tokens, right, run.wall_s))
    return {key: mean(one[key] for one in all_figures) for key in all_figures[0]}


def slower(steps: list[Step], costs: Costs) -> float:
    """How many times as long steps took as the costs say: the machine's part of an error, where others use it too."""
    expected_s = sum(
        costs.decode(step.num_rows, step.num_tokens)
        if step.is_decode
        else costs.prefill(step.num_rows, step.num_tokens)
        for step in steps
    )
    return sum(step.seconds for step in steps) / expected_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--at-once", type=int, nargs="*", default=[3, 12])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.9], help="questions per second of Poisson streams")
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    facts = machine()
    questions = read_questions(REASONER, args.num_questions)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        folder = args.save or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps = folder / "steps.csv"
        with logged_steps(steps), forked_engine(scheduler="dynasor", **ENGINE) as engine:
            ask = engine.loop.run_until_complete
            ask(measured(sender(engine, "stock", questions), Load(num_at_once=2), 4))  # warm up
            steps.write_text("kind,rows,tokens,seconds\n")
            flush(engine)
            ask(record(engine, questions, folder / "samples.jsonl"))
            seen = read_steps(steps)
            costs = fit(seen, f"the tiny reasoner, {facts['machine']}, {len(seen)} steps of this run", OVERLAP)
            costs = fit(seen, costs.source, OVERLAP, ask(request_s(engine, questions[:20], costs)))
            write_costs(costs, folder / "costs.json")
            print(costs, flush=True)
            samples = read_samples(folder / "samples.jsonl", None, 1)
            for name, load in loads(args.at_once, args.rates, len(questions)).items():
                for way in WAYS:
                    flush(engine)
                    num_before = len(read_steps(steps))
                    real = ask(measured(sender(engine, way, questions), load, len(questions)))
                    factor = slower(read_steps(steps)[num_before:], costs)
                    model = simulated(way, samples, load, costs, args.draws)
                    row: dict[str, Any] = {"load": name, "way": way, "steps slower": f"{factor:.2f}x"}
                    for key, value in real.items():
                        row |= {f"engine {key}": f"{value:.4g}", f"model {key}": f"{model[key]:.4g}"}
                        row[f"error {key}"] = f"{100 * (model[key] / value - 1):+.1f} %" if value else "-"
                    rows.append(row | {"questions": len(questions), **facts})
                    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    show([{key: row[key] for key in row if key not in facts and not key.startswith("model acc")} for row in rows])
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

"""Several long chains of thought to a question, which decide together: inside the engine, and the same rule as a client-side loop.

    python benchmarks/bench_chains.py --csv benchmarks/results/chains.csv

Ways: eight chains to their ends and a vote (the base of all comparisons), self-consistency, which waits for chains that have
finished, `long_cot`, whose chains are asked while they think, and a client that asks them so by requests of its own: a chunk of
each chain, a probe of each, and the engine's own rule on what they say (policy/program.py). All are clients of one server with
128 rows, which reads seeds: they watch the same chains as far as they let them go on. Tokens are all that were computed besides the
prompt, probes included. The thoughts have some 300 tokens: intervals and the time that an answer is held are far below the defaults.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from bench_long_cot import (
    AT_WAIT,
    SAMPLING,
    TEXTS,
    THINK,
    THINK_END,
    THINKER,
    Done,
    Way,
    ask,
    generate,
    greedy,
    run,
    seeded,
)
from clients import find
from forked import REASONER
from machine import machine
from rows import percentile, write_rows
from server import Server

from sglang_dynasor.demo import read_questions, show
from sglang_dynasor.engine.req import branch_seed
from sglang_dynasor.policy.branch import BranchState, Ending
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

NUM_CHAINS = 8
STOCK = f"stock, {NUM_CHAINS} chains to their ends"
RULES: dict[str, dict[str, Any]] = {
    "every 32 tokens": {"probe_tokens": 32, "min_tokens": 32, "hold_tokens": 64},
    "at 'wait'": AT_WAIT | {"hold_tokens": 64},
}
LOOPED = "every 32 tokens"  # what the client-side loop follows, too


def sampling(question: dict[str, Any], index: int) -> dict[str, Any]:
    """Of chain `index`, as a program's branch is sampled."""
    return SAMPLING | {"sampling_seed": branch_seed(question["seed"], index)}


async def stock(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
    """A request for each chain, as `n` choices of one would have the same seed; the majority answers."""
    prompt = question["prompt"] + THINK
    outs = await asyncio.gather(*(generate(client, prompt, sampling(question, i)) for i in range(NUM_CHAINS)))
    keys = [find(out["text"]) for out in outs]
    votes = Counter(key for key in keys if key is not None)
    text = outs[keys.index(votes.most_common(1)[0][0])]["text"] if votes else ""
    return text, sum(out["meta_info"]["completion_tokens"] for out in outs), 0, NUM_CHAINS


def program(field: dict[str, Any]) -> Way:
    async def way(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
        params = sampling(question, 0) | {"custom_params": {"dynasor": {"branches": NUM_CHAINS, **field}}}
        out = await generate(client, question["prompt"] + THINK, params)
        record = out["meta_info"]["dynasor"]
        return out["text"], record["num_tokens"], record.get("num_probe_tokens", 0), 1

    return way


def loop(rule: dict[str, Any]) -> Way:
    """A chunk of every chain, then a probe of every chain: each request sends the whole text again."""
    spec = parse_field({**TEXTS, **rule, "branches": NUM_CHAINS}, NUM_CHAINS)
    assert spec.thought is not None
    assert spec.thought.every_tokens is not None
    chunk_tokens, most_tokens = spec.thought.every_tokens, int(SAMPLING["max_new_tokens"])
    end = THINK_END.split("\n")[0]

    async def way(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
        chains, prompt = Program("loop", spec), question["prompt"] + THINK
        texts, lengths = [""] * NUM_CHAINS, [0] * NUM_CHAINS
        asked_texts: dict[int, str] = {}
        num_probe_tokens = num_requests = 0
        for _ in texts:
            chains.start_branch()

        async def chunk(index: int) -> dict[str, Any]:
            num_tokens = min(chunk_tokens, most_tokens - lengths[index])
            return await generate(
                client, prompt + texts[index], sampling(question, index) | {"max_new_tokens": num_tokens}
            )

        while chains.reason is None:
            running = [i for i, branch in enumerate(chains.branches) if branch.state is BranchState.IN_FLIGHT]
            outs = await asyncio.gather(*map(chunk, running))
            num_requests += len(outs)
            thinking: list[int] = []
            for index, out in zip(running, outs, strict=True):
                texts[index] += out["text"]
                lengths[index] += out["meta_info"]["completion_tokens"]
                is_stopped = out["meta_info"]["finish_reason"]["type"] == "stop"
                if is_stopped or lengths[index] >= most_tokens:
                    chains.finish(index, texts[index], lengths[index], ending=Ending(is_cut=not is_stopped))
                elif end not in texts[index]:
                    thinking.append(index)
            if chains.reason is not None:
                break
            found = await asyncio.gather(*(ask(client, prompt + texts[i] + THINK_END, lengths[i]) for i in thinking))
            num_requests += len(found)
            num_probe_tokens += sum(cost for _, cost in found)
            for index, (trial, _) in zip(thinking, found, strict=True):
                if chains.speaker is None:
                    asked_texts[index] = texts[index]
                chains.see_trial(index, trial)
            if (speaker := chains.speaker) is not None:
                text = asked_texts[speaker] + THINK_END
                rest = await generate(client, prompt + text, sampling(question, speaker) | {"max_new_tokens": 32})
                num_tokens = sum(lengths) + rest["meta_info"]["completion_tokens"]
                return text + rest["text"], num_tokens, num_probe_tokens, num_requests + 1
        winner = chains.winner
        return "" if winner is None else texts[winner], sum(lengths), num_probe_tokens, num_requests

    return way


async def measure(
    url: str, ways: dict[str, Way], questions: list[dict[str, Any]], loads: list[tuple[int, int]]
) -> dict[tuple[int, str], list[Done]]:
    """By load and way; a load is how many questions at once, and of how many."""
    measured: dict[tuple[int, str], list[Done]] = {}
    limits = httpx.Limits(keepalive_expiry=2)  # the server closes what has been idle for 5 s
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for way in ways.values():
            await run(client, way, seeded(questions[-2:], 1), 2)  # warm up
        for at_once, num_questions in loads:
            for name, way in ways.items():
                measured[at_once, name], took_s = await run(client, way, seeded(questions[:num_questions], 0), at_once)
                print(f"{at_once} at once, {name}: {took_s:.1f} s", flush=True)
    return measured


def row(at_once: int, name: str, done: list[Done], base: list[Done]) -> dict[str, Any]:
    """What one way gave under one load, beside the chains to their ends."""

    def tokens(each: list[Done]) -> int:
        return sum(d.num_tokens + d.num_probe_tokens for d in each)

    def mean_s(each: list[Done]) -> float:
        return mean(d.latency_s for d in each)

    def p90_s(each: list[Done]) -> float:
        return percentile((d.latency_s for d in each), 0.9)

    return {
        "at once": at_once,
        "way": name,
        "accuracy %": round(100 * mean(d.is_right for d in done), 1),
        "tokens per question": round(tokens(done) / len(done)),
        "of them probes %": round(100 * sum(d.num_probe_tokens for d in done) / tokens(done), 1),
        "tokens saved %": round(100 * (1 - tokens(done) / tokens(base)), 1),
        "mean s": round(mean_s(done), 2),
        "p90 s": round(p90_s(done), 2),
        "mean latency": f"{mean_s(done) / mean_s(base):.2f}x",
        "p90 latency": f"{p90_s(done) / p90_s(base):.2f}x",
        "requests per question": round(mean(d.num_requests for d in done), 1),
        "of questions": len(done),
        "model": "tiny thinker",
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32], help="questions at a time")
    parser.add_argument("--num-questions", type=int, nargs="+", default=[8, 16, 32], help="one for each --at-once")
    parser.add_argument("--max-steps", type=int, default=4, help="the model was trained to think about up to 4")
    parser.add_argument("--ways", nargs="+", help="only these, and stock")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if len(args.at_once) != len(args.num_questions):
        parser.error(f"--num-questions={args.num_questions}: send one for each of --at-once={args.at_once}")
    questions = [q for q in read_questions(REASONER, 600) if q["num_steps"] <= args.max_steps][
        : max(args.num_questions)
    ]
    ways: dict[str, Way] = {STOCK: stock, "greedy, no thought": greedy}
    ways["self-consistency, finished chains vote"] = program({"answer": "hash"})
    ways |= {f"long_cot, {name}": program({**TEXTS, **rule}) for name, rule in RULES.items()}
    ways[f"client-side loop, {LOOPED}"] = loop(RULES[LOOPED])
    if unknown := set(args.ways or ()) - set(ways):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none; use some of {', '.join(ways)}")
    ways = {name: way for name, way in ways.items() if name == STOCK or not args.ways or name in args.ways}
    options = ("--scheduler", "dynasor", "--max-running-requests", "128", "--max-total-tokens", "131072")
    options += (
        "--enable-deterministic-inference",
        "--dtype",
        "float32",
        "--log-level",
        "error",
    )  # the first reads seeds
    with TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log", *options, checkpoint=THINKER)
        try:
            server.wait()
            loads = list(zip(args.at_once, args.num_questions, strict=True))
            measured = asyncio.run(measure(server.url, ways, questions, loads))
        finally:
            server.stop()
    rows = [row(at_once, name, done, measured[at_once, STOCK]) for (at_once, name), done in measured.items()]
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

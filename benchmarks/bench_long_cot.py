"""Long chains of thought: the whole thought, thoughts probed inside the engine, and the same rule as a client-side loop.

    python benchmarks/bench_long_cot.py --csv benchmarks/results/long_cot.csv

The loop is what clients do without an engine that helps (the Dynasor repository's, for one): sample a chunk, send the text
back with the probe's suffix, sample the next chunk; it runs twice, by tokens and by the word after which it asks. All ways are
clients of one server, `--concurrency` questions at a time. A question has the same seed in every way, and the server reads seeds:
all of them watch the same thoughts, as far as they let them go on. Tokens are all that were computed besides the prompt: thought,
answer and probes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from bench_self_consistency import span
from forked import REASONER
from machine import machine
from rows import write_rows
from server import Server

from sglang_dynasor.demo import read_questions, show
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import Trial, hesitates, is_settled

THINKER = REASONER / "thinker"
THINK, THINK_END = "<think>\n", "</think>\n####"
SAMPLING: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 750}
TEXTS = {"algorithm": "long_cot", "answer": "hash", "think_end": THINK_END, "probe_suffix": THINK_END}
# A draft of the thinker has some 35 tokens; after each it says "wait" or answers.
AT_WAIT = {"probe_word": "wait", "probe_tokens": 1, "min_tokens": 0}
RULES: dict[str, dict[str, Any]] = {
    "every 64 tokens, trial:0.9, 2 agree": {"probe_tokens": 64, "min_tokens": 64, "agree": 2, "exit": "trial:0.9"},
    "at 3 %, trial:0.9": {"min_tokens": 0, "agree": 1, "exit": "trial:0.9"},
    "at 3 %, at 'wait', trial:0.9": {"probe_word": "wait", "min_tokens": 0, "agree": 1, "exit": "trial:0.9"},
    "at 'wait', trial:0.9": AT_WAIT | {"agree": 1, "exit": "trial:0.9"},
    "at 'wait', trial:0.9, 2 agree": AT_WAIT | {"agree": 2, "exit": "trial:0.9"},
    "at 'wait', trial:0.9, 3 agree": AT_WAIT | {"agree": 3, "exit": "trial:0.9"},
    "at 'wait', trial:0.99, 2 agree": AT_WAIT | {"agree": 2, "exit": "trial:0.99"},
    "published": {"exit": "published"},
}
LOOPS = "every 64 tokens, trial:0.9, 2 agree", "at 'wait', trial:0.9, 2 agree"  # what client-side loops follow, too


@dataclass(frozen=True, slots=True)
class Done:
    """One question solved one way."""

    is_right: bool
    num_tokens: int
    num_probe_tokens: int
    num_requests: int
    latency_s: float


Way = Callable[[httpx.AsyncClient, dict[str, Any]], Awaitable[tuple[str, int, int, int]]]


def sampling(question: dict[str, Any]) -> dict[str, Any]:
    return SAMPLING | {"sampling_seed": question["seed"]}


async def generate(client: httpx.AsyncClient, text: str, params: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = await client.post("/generate", json={"text": text, "sampling_params": params, **more})
    return response.raise_for_status().json()


async def whole(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
    out = await generate(client, question["prompt"] + THINK, sampling(question))
    return out["text"], out["meta_info"]["completion_tokens"], 0, 1


async def greedy(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
    """The likeliest answer without a thought."""
    out = await generate(client, question["prompt"], SAMPLING | {"temperature": 0})
    return out["text"], out["meta_info"]["completion_tokens"], 0, 1


def probed(rule: dict[str, Any]) -> Way:
    async def way(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
        params = sampling(question) | {"custom_params": {"dynasor": {**TEXTS, **rule}}}
        out = await generate(client, question["prompt"] + THINK, params)
        record = out["meta_info"]["dynasor"]
        return out["text"], record["num_tokens"], record["num_probe_tokens"], 1

    return way


def loop(rule: dict[str, Any]) -> Way:
    """Chunk, probe, chunk: every request sends the whole text again."""
    thought = parse_field({**TEXTS, **rule}, 1).thought
    assert thought is not None
    assert thought.every_tokens is not None
    word, end = thought.word, THINK_END.split("\n")[0]
    most_tokens: int = SAMPLING["max_new_tokens"]
    chunk_tokens = most_tokens if word else thought.every_tokens

    async def way(client: httpx.AsyncClient, question: dict[str, Any]) -> tuple[str, int, int, int]:
        prompt, trials, text = question["prompt"] + THINK, list[Trial](), ""
        num_tokens = num_probe_tokens = num_requests = 0
        while num_tokens < most_tokens:
            params = sampling(question) | {"max_new_tokens": min(chunk_tokens, most_tokens - num_tokens)}
            if word:
                params |= {"stop": [word], "no_stop_trim": True}
            chunk = await generate(client, prompt + text, params)
            num_requests += 1
            text += chunk["text"]
            num_tokens += chunk["meta_info"]["completion_tokens"]
            finish = chunk["meta_info"]["finish_reason"]
            if finish["type"] == "stop" and (not word or finish["matched"] != word):
                break
            if end in text:  # it is writing its answer
                continue
            trial, cost = await ask(client, prompt + text + THINK_END, num_tokens)
            num_requests += 1
            num_probe_tokens += cost
            trials.append(trial)
            if is_settled(trials, thought):
                rest = await generate(client, prompt + text + THINK_END, sampling(question) | {"max_new_tokens": 32})
                num_tokens += rest["meta_info"]["completion_tokens"]
                return text + THINK_END + rest["text"], num_tokens, num_probe_tokens, num_requests + 1
        return text, num_tokens, num_probe_tokens, num_requests

    return way


async def ask(client: httpx.AsyncClient, text: str, num_tokens: int) -> tuple[Trial, int]:
    """A trial from outside, and the tokens it took: its own and those of its prompt that the cache did not have."""
    params = {"temperature": 0.0, "max_new_tokens": 24, "stop": ["\n"]}
    out = await generate(client, text, params, return_logprob=True)
    meta = out["meta_info"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    # As in the engine, that it stops there is no part of the answer.
    if isinstance(meta["finish_reason"].get("matched"), int):
        logprobs = logprobs[:-1]
    answer = None if hesitates(out["text"]) else extract_answer("####" + out["text"], "hash")
    probability = exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
    trial = Trial(answer, None if answer is None else answer_key(answer), probability, num_tokens)
    return trial, meta["completion_tokens"] + meta["prompt_tokens"] - meta["cached_tokens"]


async def run(
    client: httpx.AsyncClient, way: Way, questions: list[dict[str, Any]], concurrency: int
) -> tuple[list[Done], float]:
    """All questions, `concurrency` at a time, and the wall-clock it took."""
    gate = asyncio.Semaphore(concurrency)

    async def one(question: dict[str, Any]) -> Done:
        async with gate:
            started = time.perf_counter()
            text, num_tokens, num_probe_tokens, num_requests = await way(client, question)
            took_s = time.perf_counter() - started
        answer = extract_answer(text, "hash")
        is_right = answer is not None and answer_key(answer) == str(question["answer"])
        return Done(is_right, num_tokens, num_probe_tokens, num_requests, took_s)

    (await client.post("/flush_cache", params={"timeout": 30})).raise_for_status()  # once the last probes have left
    started = time.perf_counter()
    done = await asyncio.gather(*(one(question) for question in questions))
    return done, time.perf_counter() - started


def seeded(questions: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    return [{**question, "seed": turn * len(questions) + i} for i, question in enumerate(questions)]


async def measure(
    url: str, ways: dict[str, Way], questions: list[dict[str, Any]], concurrency: int, num_repeats: int
) -> dict[str, list[tuple[list[Done], float]]]:
    """By way: its repeats, the ways in turns."""
    runs: dict[str, list[tuple[list[Done], float]]] = {name: [] for name in ways}
    # The server closes what has been idle for 5 s; a request sent just then would be lost.
    limits = httpx.Limits(keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for way in ways.values():
            await run(client, way, seeded(questions[:concurrency], num_repeats), concurrency)  # warm up
        for turn in range(num_repeats):
            for name, way in ways.items():
                runs[name].append(await run(client, way, seeded(questions, turn), concurrency))
                print(f"repeat {turn + 1}, {name}: {runs[name][-1][1]:.1f} s", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=160)
    parser.add_argument("--max-steps", type=int, default=4, help="the long mode was trained on up to 4")
    parser.add_argument("--concurrency", type=int, default=8, help="questions at a time")
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    questions = [q for q in read_questions(REASONER, 600) if q["num_steps"] <= args.max_steps][: args.num_questions]
    ways: dict[str, Way] = {"whole thought": whole, "greedy, no thought": greedy}
    ways |= {f"long_cot, {name}": probed(rule) for name, rule in RULES.items()}
    ways |= {f"client-side loop, {name}": loop(RULES[name]) for name in LOOPS}
    ways = {name: way for name, way in ways.items() if name == "whole thought" or not args.ways or name in args.ways}
    with TemporaryDirectory() as folder:
        options = ("--scheduler", "dynasor", "--max-running-requests", "64", "--max-total-tokens", "65536")
        options += ("--enable-deterministic-inference",)  # it reads seeds
        server = Server(
            Path(folder) / "log", "--dtype", "float32", "--log-level", "error", *options, checkpoint=THINKER
        )
        try:
            server.wait()
            runs = asyncio.run(measure(server.url, ways, questions, args.concurrency, args.repeats))
        finally:
            server.stop()
    base = runs["whole thought"]

    def total(done: list[Done]) -> int:
        return sum(d.num_tokens + d.num_probe_tokens for d in done)

    base_tokens, base_s = mean(total(done) for done, _ in base), mean(took for _, took in base)
    rows = [
        {
            "way": name,
            "accuracy %": span([100 * mean(d.is_right for d in done) for done, _ in repeats], 1),
            "tokens per question": round(mean(total(done) for done, _ in repeats) / len(questions)),
            "of them probes %": round(
                100 * mean(sum(d.num_probe_tokens for d in done) / total(done) for done, _ in repeats), 1
            ),
            "tokens saved %": span([100 * (1 - total(done) / base_tokens) for done, _ in repeats], 1),
            "wall-clock s": span([took for _, took in repeats], 1),
            "wall-clock saved %": round(100 * (1 - mean(took for _, took in repeats) / base_s), 1),
            "mean latency s": round(mean(d.latency_s for done, _ in repeats for d in done), 2),
            "requests per question": round(mean(d.num_requests for done, _ in repeats for d in done), 1),
            "questions": len(questions),
            "at a time": args.concurrency,
            "repeats": args.repeats,
            "model": "tiny thinker",
            **machine(),
        }
        for name, repeats in runs.items()
    ]
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

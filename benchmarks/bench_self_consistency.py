"""Self-consistency on held-out questions, every way through the same HTTP endpoint in one run.

    python benchmarks/bench_self_consistency.py --csv benchmarks/results/self_consistency.csv

Ways: stock SGLang's majority of `n` samples (the base of all comparisons), one greedy sample, the client-side library
its_hub (a wave of 2, then 4, 8 and 16 samples in all, until 75 % agree), and programs. The first three go to a server without
the flag, programs to one with it; one server is alive at a time. All send to /v1/chat/completions from one event loop,
CONCURRENCY questions at a time. Each way runs --repeats times; a row has the mean and the range.

its_hub is needed for its row only: `pip install -e '.[bench]'`, or leave the row out with --no-peer.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from machine import machine
from rows import percentile, write_rows
from server import Server
from tqdm import tqdm

from sglang_dynasor.demo import CONCURRENCY, MAX_NEW_TOKENS, ROWS, TEMPERATURE, read_questions, read_record, vote
from sglang_dynasor.outcome import Outcome, Solved, show
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
PEER = "its_hub 1.2.0"
PROGRAMS: dict[str, dict[str, Any]] = {
    "program": {},
    "program, margin (lossless)": {"stop": "margin"},
}
# As the demo's engine: what it costs on two cores must not depend on SGLang's guess of the memory.
SERVER = (
    "--dtype", "float32", "--max-total-tokens", "65536", "--max-running-requests", str(ROWS), "--log-level", "error",
)  # fmt: skip
WARM_UP_QUESTIONS = 8

Question = dict[str, Any]
Solve = Callable[[Question], Awaitable[Solved]]


def span(values: list[float], digits: int) -> str:
    """Mean and range."""
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Chat:
    """Ways to solve a question through one server's chat endpoint."""

    def __init__(self, server: Server, session: aiohttp.ClientSession, cap: int):
        self.server = server
        self.session = session
        self.cap = cap

    async def ask(self, question: Question, **body: Any) -> dict[str, Any]:
        """The response to one question; `body` says how it is sampled."""
        body |= {
            "model": "default",
            "messages": [{"role": "user", "content": question["question"]}],
            "max_completion_tokens": MAX_NEW_TOKENS,
        }
        async with self.session.post(f"{self.server.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:500]}")
            return await response.json()

    async def samples(self, question: Question, **body: Any) -> Solved:
        """The majority of the samples in one response, counted by the client."""
        started = time.perf_counter()
        response = await self.ask(question, **body)
        texts = [choice["message"]["content"] or "" for choice in response["choices"]]
        return count(question, texts, response["usage"]["completion_tokens"], started)

    async def stock(self, question: Question) -> Solved:
        return await self.samples(question, n=self.cap, temperature=TEMPERATURE)

    async def greedy(self, question: Question) -> Solved:
        return await self.samples(question, temperature=0)

    async def program(self, question: Question, field: dict[str, Any]) -> Solved:
        started = time.perf_counter()
        field = {"branches": self.cap, "answer": "hash", **field}
        response = await self.ask(
            question, temperature=TEMPERATURE, return_meta_info=True, custom_params={"dynasor": field}
        )
        record = response["choices"][0]["meta_info"]["dynasor"]
        return read_record(question, record, time.perf_counter() - started)


class Peer:
    """its_hub's adaptive self-consistency through the same endpoint."""

    def __init__(self, server: Server, cap: int):
        import its_hub

        self.cap = cap
        self.model = its_hub.OpenAICompatibleLanguageModel(
            f"{server.url}/v1", "none", "default", temperature=TEMPERATURE, max_completion_tokens=MAX_NEW_TOKENS
        )
        # Its default limit, 32, waits in the threads of the event loop and hangs at 16 questions of 16 samples.
        orchestrator = its_hub.LMOrchestrator(max_concurrency=-1)
        self.algorithm = its_hub.AdaptiveSelfConsistency(
            consistency_space_projection_func=projection, orchestrator=orchestrator
        )

    async def solve(self, question: Question) -> Solved:
        started = time.perf_counter()
        result: Any = await self.algorithm.ainfer(
            self.model, question["question"], self.cap, return_response_only=False
        )
        answer = extract_answer(result.the_one["content"] or "", "hash")
        key = None if answer is None else answer_key(answer)
        is_right, latency_s = key == str(question["answer"]), time.perf_counter() - started
        return Solved(key, is_right, result.usage.completion_tokens, len(result.responses), latency_s, None)


def check_peer() -> None:
    """Raise SystemExit unless its_hub and what it needs are installed."""
    try:
        from its_hub import LMOrchestrator  # noqa: F401  (only there with its extra `lm`)
    except ImportError as error:
        raise SystemExit(
            f"error: the row of {PEER} needs it ({error}); run `pip install -e '.[bench]'`, or leave the row out with --no-peer"
        ) from None


def projection(text: str) -> str:
    """What its_hub counts as equal: answers as ours; a text without one counts as itself, so that two do not agree."""
    answer = extract_answer(text, "hash")
    return text if answer is None else answer_key(answer)


def count(question: Question, texts: list[str], num_tokens: int, started: float) -> Solved:
    """The majority of texts."""
    outs = [{"text": text, "meta_info": {"completion_tokens": 0}} for text in texts]
    solved = vote(question, outs, time.perf_counter() - started)
    return Solved(solved.answer, solved.is_right, num_tokens, len(texts), solved.latency_s, None)


async def run(name: str, solve: Solve, questions: list[Question]) -> Outcome:
    """Solve all questions, CONCURRENCY at a time."""
    room, started = asyncio.Semaphore(CONCURRENCY), time.perf_counter()
    with tqdm(total=len(questions), desc=f"{name:<28}", unit="question") as bar:

        async def one(question: Question) -> Solved:
            async with room:
                solved = await solve(question)
            bar.update()
            return solved

        solved = await asyncio.gather(*(one(question) for question in questions))
    return Outcome(name, list(solved), time.perf_counter() - started)


async def measure(
    options: tuple[str, ...],
    ways_of: Callable[[Chat, AsyncExitStack], dict[str, Solve]],
    questions: list[Question],
    cap: int,
    repeats: int,
) -> dict[str, list[Outcome]]:
    """All ways of one server, each in turn, `repeats` times."""
    outcomes: dict[str, list[Outcome]] = {}
    with TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log", *SERVER, *options, environment={"OMP_NUM_THREADS": "1"})
        try:
            server.wait()
            # A connection kept alive may just be closed by the server when it is used again.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None)
            async with AsyncExitStack() as stack:
                session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
                ways = ways_of(Chat(server, session, cap), stack)
                for solve in ways.values():
                    await run("warm up", solve, questions[:WARM_UP_QUESTIONS])
                for _ in range(repeats):
                    for name, solve in ways.items():
                        outcomes.setdefault(name, []).append(await run(name, solve, questions))
        finally:
            server.stop()
    return outcomes


def p90(outcome: Outcome) -> float:
    return percentile((s.latency_s for s in outcome.solved), 0.9)


def mean_latency(outcome: Outcome) -> float:
    return mean(s.latency_s for s in outcome.solved)


def compare(
    programs: dict[str, dict[str, Any]],
    questions: list[Question],
    cap: int,
    repeats: int,
    *,
    with_greedy: bool = False,
    with_peer: bool = False,
) -> list[dict[str, Any]]:
    """One row per way, stock first; savings against stock.

    Args:
        programs: by name, keys of the field.
        with_greedy: whether greedy decoding is measured too.
        with_peer: whether its_hub is.
    """
    facts = machine()

    def stock_ways(chat: Chat, stack: AsyncExitStack) -> dict[str, Solve]:
        ways: dict[str, Solve] = {f"stock, {cap} samples": chat.stock}
        if with_greedy:
            ways["stock, greedy, 1 sample"] = chat.greedy
        if with_peer:
            peer = Peer(chat.server, cap)
            stack.push_async_callback(peer.model.close)
            ways[f"{PEER}, doubling"] = peer.solve
        return ways

    def program_ways(chat: Chat, stack: AsyncExitStack) -> dict[str, Solve]:
        return {name: lambda q, field=field: chat.program(q, field) for name, field in programs.items()}

    async def measure_all() -> dict[str, list[Outcome]]:
        outcomes = await measure((), stock_ways, questions, cap, repeats)
        return outcomes | await measure(("--scheduler", "dynasor"), program_ways, questions, cap, repeats)

    outcomes = asyncio.run(measure_all())
    base = next(iter(outcomes.values()))
    base_tokens, base_wall_s = mean(o.num_tokens for o in base), mean(o.wall_s for o in base)
    base_latency_s, base_p90_s = mean(map(mean_latency, base)), mean(map(p90, base))
    return [
        {
            "way": name,
            "accuracy %": span([100 * o.accuracy for o in runs], 1),
            "tokens per question": round(mean(o.num_tokens for o in runs) / len(questions)),
            "tokens saved %": span([100 * (1 - o.num_tokens / base_tokens) for o in runs], 1),
            "wall-clock s": span([o.wall_s for o in runs], 0),
            "wall-clock saved %": round(100 * (1 - mean(o.wall_s for o in runs) / base_wall_s), 1),
            "mean latency": f"{mean(map(mean_latency, runs)) / base_latency_s:.2f}x",
            "p90 latency": f"{mean(map(p90, runs)) / base_p90_s:.2f}x",
            "branches per question": round(mean(s.num_branches for o in runs for s in o.solved), 1),
            "questions": len(questions),
            "repeats": repeats,
            "model": "tiny reasoner",
            **facts,
        }
        for name, runs in outcomes.items()
    ]


def main(programs: dict[str, dict[str, Any]], about: str | None, *, with_others: bool = False) -> None:
    """The command line; `with_others`: greedy decoding and its_hub have rows too."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-questions", type=int, default=320)
    parser.add_argument("--cap", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    if with_others:
        parser.add_argument("--no-peer", action="store_true", help="leave out the row of its_hub")
    args = parser.parse_args()
    with_peer = with_others and not args.no_peer
    if with_peer:
        check_peer()
    questions = read_questions(REASONER, args.num_questions)
    rows = compare(programs, questions, args.cap, args.repeats, with_greedy=with_others, with_peer=with_peer)
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main(PROGRAMS, __doc__, with_others=True)

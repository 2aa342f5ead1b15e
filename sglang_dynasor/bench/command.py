"""`sglang-dynasor bench`: its options, and one run from a file of questions to a table, a verdict and a page."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sglang_dynasor.bench.bar import Bar
from sglang_dynasor.bench.chat import Chat
from sglang_dynasor.bench.page import page
from sglang_dynasor.bench.questions import Question, read_questions
from sglang_dynasor.bench.run import Measured, blocks, check, measure
from sglang_dynasor.bench.table import make_table, shown
from sglang_dynasor.bench.verdict import gold_mismatch, notes, pairs_of, verdict
from sglang_dynasor.bench.ways import GREEDY, MOST_BRANCHES, STOCK, Asking
from sglang_dynasor.config import LEVELS
from sglang_dynasor.errors import ConfigError, FieldError

EARLY = 3  # the exit code of a run that ended before its questions and its time
DEFAULT = Asking()
IDLE_S = 1.0  # for which a connection is kept; uvicorn closes them after 5


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang-dynasor bench`."""
    parser.add_argument(
        "--url", required=True, help="http://HOST:PORT of a running server with an OpenAI-compatible chat endpoint"
    )
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSONL or CSV (docs/bench.md)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for the run, at most (default 10)")
    parser.add_argument(
        "--cap", type=int, default=DEFAULT.cap, help=f"samples of stock, and the programs' cap (default {DEFAULT.cap})"
    )
    parser.add_argument("--stop", nargs="+", default=list(LEVELS), metavar="RULE", help=f"programs to compare, by their `stop` (default {' '.join(LEVELS)})")  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=1, help="questions under way at once (default 1)")
    parser.add_argument("--temperature", type=float, default=DEFAULT.temperature, help=f"of all but greedy (default {DEFAULT.temperature})")  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=DEFAULT.max_tokens, help=f"of each sample (default {DEFAULT.max_tokens})"
    )
    parser.add_argument(
        "--answer", metavar="EXTRACTOR", help="what reads answers (default: choice where there are choices, else auto)"
    )
    parser.add_argument("--instruction", metavar="TEXT", help="what follows each question (default: to put the answer in a box; '' for nothing)")  # fmt: skip
    parser.add_argument("--model", help="name to send (default: the first that the server has)")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    parser.add_argument("--seed", type=int, default=0, help="of the order of questions and choices (default 0)")
    parser.add_argument(
        "--html", type=Path, default=Path("bench.html"), metavar="FILE", help="where the page goes (default bench.html)"
    )
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="also write stock's samples, for sglang-dynasor simulate"
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    rows: list[dict[str, str]]
    lines: list[str]  # what is said below the table, the verdict last
    exit_code: int


def run_bench(args: argparse.Namespace) -> Report:
    """Measure, and write the page.

    Raises:
        ConfigError: an option or the file is wrong, the server cannot be measured, or nothing was.
    """
    asking = _checked(args)
    questions = read_questions(args.questions, args.seed)
    measured, found = Measured(()), Found()
    try:
        asyncio.run(_measure(args, asking, questions, measured, found))
    except KeyboardInterrupt:
        measured.ended = "it was interrupted"
    mismatch = gold_mismatch(pairs_of(measured, asking))
    table = make_table(measured, asking, found.replays, mismatch is None)
    if table is None:
        late = f"{len(blocks(questions, args.concurrency)[0])} questions were not done in {args.minutes:g} minutes; give more, or fewer at once"
        why = measured.ended or next(iter(measured.refused.values()), late)
        raise ConfigError(f"nothing was measured: {why}")
    said = verdict(table, asking.cap)
    told = [*([mismatch] if mismatch else []), *notes(measured, table, asking, len(questions))]
    about = {
        "model": found.model, "url": args.url, "scheduler": "dynasor" if found.has_scheduler else "stock", "questions": args.questions.name,
        "seed": args.seed, "cap": asking.cap, "temperature": asking.temperature, "max tokens": asking.max_tokens,
        "questions at once": args.concurrency, "answer": asking.answer or "auto, or choice", "minutes": f"{measured.elapsed_s / 60:.1f}",
    }  # fmt: skip
    args.html.write_text(page(table, measured, asking, said, told, about), encoding="utf-8")
    if args.samples is not None:
        _write_samples(args.samples, measured, asking, args.questions.name, found.model)
    lines = [f"- {note}" for note in told] + [f"the page is in {args.html}", f"{said}."]
    return Report(shown(table), lines, EARLY if measured.ended else 0)


@dataclass(slots=True)
class Found:
    """What the server turned out to be."""

    model: str = ""
    has_scheduler: bool = False
    replays: Sequence[str] = ()


async def _measure(
    args: argparse.Namespace, asking: Asking, questions: Sequence[Question], measured: Measured, found: Found
) -> None:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    # A connection that a server closes for being idle, in the moment in which it is used, would be a request that fails.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.concurrency, keepalive_expiry=IDLE_S)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(None, connect=10)) as client:
        chat = await Chat.connect(client, args.url, args.model)
        found.model, found.has_scheduler = chat.model, chat.has_scheduler
        if chat.has_scheduler:
            measured.ways = (GREEDY, STOCK, *args.stop)
        else:
            measured.ways, found.replays = (GREEDY, STOCK), args.stop
            if seeing := [rule for rule in args.stop if asking.spec(questions[0], rule).needs_statistics]:
                raise ConfigError(f"--stop {seeing[0]} reads logits, which this server does not show; leave it out")
        await check(chat, asking, questions[0], measured.ways)
        with Bar(measured, asking, found.replays, len(questions), 60 * args.minutes) as bar:
            await measure(measured, chat, asking, questions, 60 * args.minutes, args.concurrency, bar.update, bar.rest)


def _checked(args: argparse.Namespace) -> Asking:
    """The options, each in its range."""
    for name, value, low, high in (
        ("minutes", args.minutes, 0.01, 10_080), ("cap", args.cap, 2, MOST_BRANCHES), ("concurrency", args.concurrency, 1, 1024),
        ("max-tokens", args.max_tokens, 1, 10**7), ("temperature", args.temperature, 1e-3, 2),
    ):  # fmt: skip
        if math.isnan(value) or not low <= value <= high:
            raise ConfigError(f"--{name}={value:g} is outside [{low:g}, {high:g}]; choose a value inside")
    for option, file in (("--html", args.html), ("--samples", args.samples)):
        if file is not None and (
            file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK)
        ):
            raise ConfigError(f"{option}={file} cannot be written; choose a file in a folder that is there and can")
    stops = tuple(dict.fromkeys(args.stop))
    if taken := [rule for rule in stops if rule in (GREEDY, STOCK)]:
        raise ConfigError(f"--stop {taken[0]} is measured anyway; leave it out")
    asking = Asking(args.cap, stops, args.temperature, args.max_tokens, args.answer, args.instruction)
    try:
        for rule in stops:
            asking.spec(Question("", ""), rule)
    except FieldError as error:
        option = "--answer" if "dynasor.answer" in str(error) else "--stop"
        raise ConfigError(f"{option}: {error}") from None
    return asking


def _write_samples(file: Path, measured: Measured, asking: Asking, dataset: str, model: str) -> None:
    """Stock's samples and the greedy one, a question a line, as docs/simulator.md has them."""
    with file.open("w", encoding="utf-8") as out:
        for id, by_way in measured.solved.items():
            if STOCK not in by_way:
                continue
            question = measured.questions[id]
            gold = asking.gold_key(question)

            def told(answer: str | None, key: str | None, num_tokens: float, gold: str | None = gold) -> dict[str, Any]:
                return {
                    "answer": answer,
                    "n_tokens": max(1, round(num_tokens)),
                    "correct": None if gold is None else key == gold,
                }

            row: dict[str, Any] = {
                "qid": id,
                "question": question.text,
                "gold": question.gold,
                "dataset": dataset,
                "model": model,
            }
            row["samples"] = [told(s.answer, s.key, s.num_tokens) for s in by_way[STOCK].samples]
            if GREEDY in by_way:
                greedy = by_way[GREEDY]
                row["greedy"] = told(greedy.samples[0].answer, greedy.keys[0], greedy.num_tokens)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")

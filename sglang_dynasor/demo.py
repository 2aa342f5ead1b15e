"""The main job on real input: held-out questions solved by stock sampling and as programs, side by side."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from sglang_dynasor.policy.answers import answer_key, extract_answer

MAX_NEW_TOKENS = 200
CONCURRENCY, ROWS = 32, 128  # questions under way at once, in so many rows: a busy engine, as savings come with load
TEMPERATURE = 1.7  # hot enough that the tiny reasoner is as often wrong as a language model on hard questions


@dataclass(frozen=True, slots=True)
class Solved:
    """One question's outcome."""

    answer: str | None
    is_right: bool
    num_tokens: int
    num_branches: int
    latency_s: float
    certaindex: float | None  # None for stock sampling, which does not know


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way of solving the whole set."""

    name: str
    solved: list[Solved]
    wall_s: float

    @property
    def accuracy(self) -> float:
        return mean(s.is_right for s in self.solved)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.solved)


def read_questions(reasoner: Path, num_questions: int) -> list[dict[str, Any]]:
    """The first held-out questions: prompt, answer, num_steps."""
    lines = (reasoner / "held_out.jsonl").read_text().splitlines()
    if not 1 <= num_questions <= len(lines):
        raise SystemExit(f"error: --num-questions={num_questions} is outside [1, {len(lines)}]; choose a value inside")
    return [json.loads(line) for line in lines[:num_questions]]


def start_engine(reasoner: Path, scheduler: str | None = "dynasor") -> Any:
    """The engine on the tiny reasoner; on a machine without a GPU the CPU platform serves it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import sglang as sgl

    return sgl.Engine(
        model_path=str(reasoner / "checkpoint"),
        scheduler=scheduler,
        dtype="float32",
        max_total_tokens=65_536,
        max_running_requests=ROWS,
        log_level="error",
    )


def progress(items: Iterable[Solved], total: int, name: str, columns: int) -> Iterator[Solved]:
    """Pass `items` on, with a bar."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=f"{name:<22}", ncols=min(columns, 100), unit="question")


def stock_params(num_samples: int) -> dict[str, Any]:
    """Uniform self-consistency as a client asks for it today: `n` samples."""
    return {"temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS, "n": num_samples}


def program_params(cap: int, **field: Any) -> dict[str, Any]:
    """The same as one request with one field."""
    return {
        "temperature": TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "custom_params": {"dynasor": {"branches": cap, "answer": "hash", **field}},
    }


def vote(question: dict[str, Any], outs: list[dict[str, Any]], latency_s: float) -> Solved:
    """The majority of stock samples, counted by the client."""
    answers = [extract_answer(out["text"], "hash") for out in outs]
    votes = Counter(answer_key(answer) for answer in answers if answer is not None)
    winner = votes.most_common(1)[0][0] if votes else None
    num_tokens = sum(out["meta_info"]["completion_tokens"] for out in outs)
    return Solved(winner, winner == str(question["answer"]), num_tokens, len(outs), latency_s, None)


def read_record(question: dict[str, Any], record: dict[str, Any], latency_s: float) -> Solved:
    """What a program's record says."""
    answer = None if record["answer"] is None else answer_key(record["answer"])
    is_right = answer == str(question["answer"])
    num_tokens = record["num_tokens"] + record.get("num_judge_tokens", 0) + record.get("num_probe_tokens", 0)
    return Solved(answer, is_right, num_tokens, record["num_branches"], latency_s, record["certaindex"])


def solve_stock(engine: Any, question: dict[str, Any], num_samples: int) -> Solved:
    """One question by sampling and a vote."""
    started = time.perf_counter()
    outs = engine.generate(question["prompt"], stock_params(num_samples))
    return vote(question, outs, time.perf_counter() - started)


def solve_program(engine: Any, question: dict[str, Any], cap: int, **field: Any) -> Solved:
    """One question as a program."""
    started = time.perf_counter()
    out = engine.generate(question["prompt"], program_params(cap, **field))
    return read_record(question, out["meta_info"]["dynasor"], time.perf_counter() - started)


class Client:
    """Sends from several threads through one engine, whose own loop is single-threaded."""

    def __init__(self, engine: Any):
        import asyncio
        import threading

        self.engine = engine
        self.loop = engine.loop
        self.call = asyncio.run_coroutine_threadsafe
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def generate(self, prompt: str, sampling_params: dict[str, Any]) -> Any:
        """As `sgl.Engine.generate`, from any thread."""
        return self.call(self.engine.async_generate(prompt, sampling_params), self.loop).result()

    def close(self) -> None:
        """Stop the loop, so that the engine can shut down."""
        self.loop.call_soon_threadsafe(self.loop.stop)


def run(name: str, solve: Any, questions: list[dict[str, Any]], columns: int) -> Outcome:
    """Solve all questions, CONCURRENCY at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        solved = list(progress(pool.map(solve, questions), len(questions), name, columns))
    return Outcome(name, solved, time.perf_counter() - started)


def table(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row per outcome; savings against the first."""
    base = outcomes[0]
    return [
        {
            "way": outcome.name,
            "accuracy_percent": round(100 * outcome.accuracy, 1),
            "tokens": outcome.num_tokens,
            "tokens_saved_percent": round(100 * (1 - outcome.num_tokens / base.num_tokens), 1),
            "wall_s": round(outcome.wall_s, 1),
            "wall_saved_percent": round(100 * (1 - outcome.wall_s / base.wall_s), 1),
            "mean_latency_s": round(mean(s.latency_s for s in outcome.solved), 3),
            "branches_per_question": round(mean(s.num_branches for s in outcome.solved), 1),
        }
        for outcome in outcomes
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def draw(questions: list[dict[str, Any]], outcomes: list[Outcome], picture: Path) -> None:
    """One picture: what each question cost against how sure its program was, and accuracy by difficulty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stock, program = outcomes[0], outcomes[-1]
    steps = sorted({q["num_steps"] for q in questions})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    for outcome, color in ((stock, "#9aa5b1"), (program, "#1f7a8c")):
        groups = [[s for s, q in zip(outcome.solved, questions, strict=True) if q["num_steps"] == n] for n in steps]
        left.plot(steps, [mean(s.num_tokens for s in g) for g in groups], "o-", color=color, label=outcome.name)
        middle.plot(steps, [100 * mean(s.is_right for s in g) for g in groups], "o-", color=color, label=outcome.name)
    left.set(title="tokens per question", xlabel="steps in the question")
    middle.set(title="accuracy, %", xlabel="steps in the question", ylim=(0, 105))
    for is_right, color in ((True, "#1f7a8c"), (False, "#d1495b")):
        some = [s for s in program.solved if s.is_right is is_right]
        right.scatter(
            [s.certaindex or 0.0 for s in some], [s.num_branches for s in some], s=22, alpha=0.5, color=color,
            label="right" if is_right else "wrong",
        )  # fmt: skip
    right.set(title="each program: branches used", xlabel="certaindex at its end")
    for axis in (left, middle, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def run_demo(reasoner: Path, num_questions: int, cap: int, picture: Path, csv_file: Path | None, columns: int) -> None:
    """Print the comparison and write the picture.

    Raises:
        SystemExit: more questions are asked for than there are.
    """
    questions = read_questions(reasoner, num_questions)
    print(f"starting SGLang on the tiny reasoner ({platform.machine()}, {os.cpu_count()} cores) ...", flush=True)
    engine = start_engine(reasoner)
    client = Client(engine)
    try:
        solve_stock(client, questions[0], 2)  # the first requests warm the engine up
        outcomes = [
            run(f"stock, {cap} samples", lambda q: solve_stock(client, q, cap), questions, columns),
            run(f"program, cap {cap}", lambda q: solve_program(client, q, cap), questions, columns),
        ]
    finally:
        client.close()
        engine.shutdown()
    rows = table(outcomes)
    print()
    show(rows)
    program = outcomes[-1]
    ranked = sorted(
        zip(questions, program.solved, strict=True),
        key=lambda pair: (-(pair[1].certaindex or 0.0), pair[1].num_branches),
    )
    for title, pairs in (("most certain", ranked[:3]), ("most uncertain", ranked[-3:])):
        print(f"\n{title}:")
        for question, solved in pairs:
            verdict = "right" if solved.is_right else f"wrong, it is {question['answer']}"
            print(
                f"  certaindex {solved.certaindex:.3f}, {solved.num_branches} branches, {question['num_steps']} steps:",
                end=" ",
            )
            print(f"{solved.answer} ({verdict})")
    draw(questions, outcomes, picture)
    print(f"\nthe picture is in {picture}")
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

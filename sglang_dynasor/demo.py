"""The main job on real input: held-out questions solved by stock sampling and as programs, side by side."""

from __future__ import annotations

import csv
import json
import os
import platform
import threading
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.outcome import Outcome, Solved, accuracies, cheapest, comparison, hardest, rows, savings, show
from sglang_dynasor.picture import FORMATS, draw
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key

MAX_NEW_TOKENS = 200
CONCURRENCY, ROWS = 32, 128  # questions under way at once, in so many rows: a busy engine, as savings come with load
TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Demo:
    """What the command line asks for."""

    reasoner: Path  # folder of the tiny reasoner
    num_questions: int
    cap: int  # samples per question, and the programs' cap
    picture: Path
    csv: Path | None = None


def check_demo(demo: Demo) -> None:
    """Find out before the work what would stop it after.

    Raises:
        ConfigError: what is missing or out of range, with the remedy.
    """
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {' and '.join(missing)}, not installed here; pip install 'sglang-dynasor[demo]' brings what it needs"
        )
    for name in ("checkpoint/config.json", "checkpoint/model.safetensors", "held_out.jsonl"):
        if not (demo.reasoner / name).is_file():
            raise ConfigError(
                f"--reasoner={demo.reasoner} holds no {name}; run this in a checkout of sglang-dynasor, or give the path of its "
                "examples/tiny_reasoner"
            )
    num_held_out = len((demo.reasoner / "held_out.jsonl").read_text().splitlines())
    if not 1 <= demo.num_questions <= num_held_out:
        raise ConfigError(f"--num-questions={demo.num_questions} is outside [1, {num_held_out}]; choose a value inside")
    most = DynasorConfig().dynasor_max_branches
    if not 2 <= demo.cap <= most:
        raise ConfigError(f"--branches={demo.cap} is outside [2, {most}]; choose a value inside")
    if demo.picture.suffix.lower() not in FORMATS:
        raise ConfigError(f"--picture={demo.picture} is no picture; let it end with one of {', '.join(FORMATS)}")
    _check_writable("--picture", demo.picture)
    if demo.csv is not None:
        _check_writable("--csv", demo.csv)


def _check_writable(option: str, file: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"{option}={file} is a folder; give the path of a file")
    if not file.parent.is_dir():
        raise ConfigError(f"{option}={file}: there is no folder {file.parent}; make it, or choose another path")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{option}={file} cannot be written; choose a path that can, or change its permissions")


def read_questions(reasoner: Path, num_questions: int) -> list[dict[str, Any]]:
    """The first held-out questions: prompt, answer, num_steps."""
    lines = (reasoner / "held_out.jsonl").read_text().splitlines()
    if not 1 <= num_questions <= len(lines):
        raise SystemExit(f"error: --num-questions={num_questions} is outside [1, {len(lines)}]; choose a value inside")
    return [json.loads(line) for line in lines[:num_questions]]


@contextmanager
def quiet_start() -> Generator[None]:
    """Keep off the terminal what SGLang warns of while its processes import it, and their bars. Errors still show."""
    import_module("tqdm")  # it reads its variables once, when it is imported: our own bars must not be held back

    quiet = {
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning"])),
        "TQDM_DELAY": "600",  # seconds; SGLang's bars say themselves that they are not disabled
    }
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_engine(reasoner: Path, scheduler: str | None = "dynasor") -> Any:
    """The engine on the tiny reasoner; on a machine without a GPU the CPU platform serves it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with quiet_start():
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

    # Its own lock is a semaphore between processes, whose tracker SGLang's shutdown kills: a traceback at exit.
    tqdm.set_lock(threading.RLock())
    yield from tqdm(items, total=total, desc=f"{name:<18}", ncols=min(columns, 100), unit="question")


def greedy_params() -> dict[str, Any]:
    """One answer, the likeliest token each time: what sampling has to be better than."""
    return {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}


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


def solve_greedy(engine: Any, question: dict[str, Any]) -> Solved:
    """One question by greedy decoding."""
    started = time.perf_counter()
    out = engine.generate(question["prompt"], greedy_params())
    return vote(question, [out], time.perf_counter() - started)


def solve_program(engine: Any, question: dict[str, Any], cap: int, **field: Any) -> Solved:
    """One question as a program."""
    started = time.perf_counter()
    out = engine.generate(question["prompt"], program_params(cap, **field))
    return read_record(question, out["meta_info"]["dynasor"], time.perf_counter() - started)


class Client:
    """Sends from several threads through one engine, whose own loop is single-threaded."""

    def __init__(self, engine: Any):
        import asyncio

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


def run_demo(demo: Demo, columns: int) -> None:
    """Solve the questions both ways, print the comparison and write the picture.

    Args:
        demo: what is asked for.
        columns: width of the terminal, in characters.

    Raises:
        ConfigError: what is missing or out of range, before anything is run.
    """
    check_demo(demo)
    questions = read_questions(demo.reasoner, demo.num_questions)
    print(f"starting SGLang on the tiny reasoner ({platform.machine()}, {os.cpu_count()} cores) ...", flush=True)
    engine = start_engine(demo.reasoner)
    client = Client(engine)
    try:
        solve_stock(client, questions[0], 2)  # the first requests warm the engine up
        greedy = run("greedy", lambda q: solve_greedy(client, q), questions, columns)
        stock = run(f"stock, {demo.cap} samples", lambda q: solve_stock(client, q, demo.cap), questions, columns)
        program = run(f"program, cap {demo.cap}", lambda q: solve_program(client, q, demo.cap), questions, columns)
    finally:
        client.close()
        engine.shutdown()
    print()
    show(comparison(greedy, stock, program))
    for title, order in (("cheapest", cheapest(stock, program)), ("hardest", hardest(program))):
        print(f"\n{title}:")
        for i in order[:3]:
            print(f"  {_told(questions[i], stock.solved[i], program.solved[i])}")
    draw([question["num_steps"] for question in questions], greedy, stock, program, demo.picture)
    if demo.csv is not None:
        table = rows(greedy, stock, program)
        with demo.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    print(f"\nthe picture is in {demo.picture}")
    print(f"{savings(stock, program)}: {accuracies(greedy, stock, program)}")


def _told(question: dict[str, Any], stock: Solved, program: Solved) -> str:
    """One question's line."""
    verdict = "right" if program.is_right else f"wrong, it is {question['answer']}"
    return (
        f"{question['num_steps']} step{'s' * (question['num_steps'] != 1)}: {program.num_branches} branches, certaindex {program.certaindex or 0.0:.2f}, "
        f"{program.num_tokens} of {stock.num_tokens} tokens: {program.answer} ({verdict})"
    )

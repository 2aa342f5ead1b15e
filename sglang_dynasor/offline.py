"""Batches: `sglang_dynasor.solve(engine, questions, algorithm="rebase", ...)`, with progress and a table of results."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, cast

from sglang_dynasor.algorithms.catalogue import find
from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.errors import FieldError, RefusedError
from sglang_dynasor.frontend.backend import warn_once
from sglang_dynasor.frontend.driver import DEFAULT_ROWS
from sglang_dynasor.frontend.endpoint import Endpoint
from sglang_dynasor.frontend.judge import Reward, check_reward_function
from sglang_dynasor.frontend.local import LocalEngine
from sglang_dynasor.frontend.locked_budget import LockedBudget
from sglang_dynasor.frontend.plan import MOST_BRANCHES, parse_plan, runs_on_server
from sglang_dynasor.frontend.seat import check_seed
from sglang_dynasor.policy.algorithm import SELF_CONSISTENCY, AlgorithmRecord
from sglang_dynasor.policy.budget_spec import BudgetSpec, parse_budget
from sglang_dynasor.policy.hint import name_default
from sglang_dynasor.policy.program import StopReason
from sglang_dynasor.policy.spec import parse_field

MOST_AT_ONCE = 1024  # questions of one budget
_SHOWN_CHARS = 40  # of a question in the table
Chat = Sequence[Mapping[str, object]]  # messages, each with a role and a content


@dataclass(frozen=True, slots=True)
class Result:
    """One question's outcome."""

    question: str  # as given; of a chat its last message
    answer: str | None
    certaindex: float  # in [0, 1]
    num_tokens: int  # generated, all branches together
    num_branches: int
    stop_reason: str
    text: str  # the winning branch's
    latency_s: float  # from its first request to its answer
    record: dict[str, Any]  # docs/reference.md


@dataclass(frozen=True, slots=True)
class Results:
    """The outcomes of a batch, in the order of its questions."""

    algorithm: str
    results: list[Result]
    wall_s: float

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    @property
    def num_tokens(self) -> int:
        return sum(result.num_tokens for result in self.results)

    def rows(self) -> list[dict[str, Any]]:
        """One row per question; for a CSV or a data frame."""
        return [
            {
                "question": result.question,
                "answer": result.answer,
                "certaindex": round(result.certaindex, 3),
                "branches": result.num_branches,
                "tokens": result.num_tokens,
                "stop": result.stop_reason,
                "latency_s": round(result.latency_s, 3),
            }
            for result in self.results
        ]

    def table(self) -> str:
        """The rows as text, below them the totals, and what records say could be done better."""
        rows = self.rows()
        for row in rows:
            line = " ".join(row["question"].split())
            row["question"] = line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."
        if not rows:
            return f"{self.algorithm}: no questions"
        widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
        lines = ["  ".join(f"{key:>{width}}" for key, width in widths.items())]
        lines += ["  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()) for row in rows]
        num_certain = sum(result.stop_reason == "certain" for result in self.results)
        lines.append(
            f"{self.algorithm}: {len(rows)} questions, {self.num_tokens} tokens, "
            f"{mean(result.num_branches for result in self.results):.1f} branches per question, "
            f"{num_certain} certain early, {self.wall_s:.1f} s"
        )
        hints = Counter(hint for result in self.results if (hint := result.record.get("hint")))
        lines += [f"hint for {num} of {len(rows)}: {hint}" for hint, num in hints.items()]
        return "\n".join(lines)


@contextmanager
def _backend(engine: Any, rows: int) -> Generator[Endpoint | LocalEngine]:
    """The backend given, or one made for an engine or an address."""
    if isinstance(engine, Endpoint | LocalEngine):
        yield engine
        return
    made = Endpoint(engine, rows=rows) if isinstance(engine, str) else LocalEngine(engine, rows=rows)
    try:
        yield made
    finally:
        made.close()


def solve(
    engine: Any,
    questions: Iterable[str | Chat],
    algorithm: str | type[Algorithm] | AlgorithmRecord = SELF_CONSISTENCY.name,
    *,
    sampling: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    budget_tokens: int | None = None,
    reward: Reward | None = None,
    seed: int | None = None,
    progress: bool = True,
    concurrency: int | None = None,
    rows: int = DEFAULT_ROWS,
    **field: Any,
) -> Results:
    """Solve a batch of questions, each as a reasoning program.

    Args:
        engine: an `sgl.Engine`, the address of a server, or a backend of `sglang_dynasor.frontend`.
        questions: prompts, as the model reads them, or chats, each a list of messages with "role" and "content", which the model's
            chat template makes a prompt. Any iterable; it is read to its end first.
        algorithm: a name in `algorithms.catalogue.ALGORITHMS`, a class with the names of `algorithms.tree.Algorithm`, or its
            record.
        sampling: SGLang's sampling parameters; max_new_tokens, or by its other name max_tokens, holds for a whole solution.
        max_tokens: the same, given here; None: what `sampling` says, else SGLang's own, which is 128.
        budget_tokens: tokens that all questions may take together, at least one for each. The first branch of each starts; the
            others go where one more may change most, so that hard questions get what easy ones leave, up to each one's cap. None:
            no bound.
        reward: a function of the question and what was sampled after it, to a reward in [0, 1], or None where it cannot say; in
            place of a judge.
        seed: question i samples by `seed + i`, for an engine that reads seeds.
        progress: show a bar.
        concurrency: questions under way at once, 1 or more; None: 64 where the server makes the branches, else 8; of a budget all,
            up to 1024, as those that are not under way yet keep their share of it.
        rows: most requests at once where the algorithm is driven from here (searches, plain SGLang, functions of your own).
        field: the other keys of the `dynasor` field and of the algorithm (docs/frontend.md). `stop` may also be a function of
            the evidence (`policy.evidence.Evidence`) that says whether a program may end; it is then driven from here.

    Returns:
        One result per question, in order; none for no questions.

    A question that the server refuses (too long for the model) or gives up (time-out, full queue) is a result whose
    stop_reason is "failed", with the reason in `record["error"]`.

    Raises:
        FieldError: a wrong key or value, named; an algorithm that this server cannot run; or every question was refused.
    """
    asked_questions = _listed(questions)
    sampling, is_default = _with_limit(sampling or {}, max_tokens)
    if concurrency is not None and (isinstance(concurrency, bool) or concurrency < 1):
        raise FieldError(f"concurrency={concurrency!r} is outside its range; send 1 or more")
    check_seed(seed)
    check_reward_function(reward)
    about = find(algorithm)
    if key := next((key for key in ("n", "custom_params") if key in sampling), None):
        raise FieldError(
            f"sampling has {key!r}: branches are made for you; leave it out, and send dynasor's keys to solve()"
        )
    if key := next((key for key in ("program", "budget", "budget_programs") if key in field), None):
        raise FieldError(f"dynasor.{key}={field[key]!r}: ids are made for you; leave it out")
    asked = {"algorithm": about, **field}
    budget, shared = _budget(budget_tokens, len(asked_questions))
    if budget is not None:
        asked |= {"budget_tokens": budget.tokens}
        concurrency = concurrency or min(budget.num_programs, MOST_AT_ONCE)
    with _backend(engine, rows) as backend:
        if backend.has_scheduler and runs_on_server(asked, has_reward=reward is not None):
            one = _on_server(backend, {**asked, **shared, "algorithm": about.name}, sampling)
            concurrency = concurrency or 64
        else:
            one = _driven(backend, asked, sampling, reward, budget)
            concurrency = concurrency or 8
        refusals: list[RefusedError] = []

        def one_or_none(question: str | Chat, seed: int | None) -> Result:
            started = time.perf_counter()
            shown = question if isinstance(question, str) else str(question[-1]["content"])
            try:
                prompt = question if isinstance(question, str) else backend.render(question)
                result = replace(one(prompt, seed), question=shown)
            except RefusedError as error:
                refusals.append(error)
                return _failed(shown, str(error), started)
            if is_default:
                name_default(result.record)
            return result

        started = time.perf_counter()
        with ThreadPoolExecutor(max(1, min(concurrency, len(asked_questions)))) as pool:
            futures = [
                pool.submit(one_or_none, question, None if seed is None else seed + i)
                for i, question in enumerate(asked_questions)
            ]
            try:
                for future in _shown(futures, about.name, progress):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if refusals and len(refusals) == len(asked_questions):  # no question's fault
            raise refusals[0]
        return Results(about.name, [future.result() for future in futures], time.perf_counter() - started)


def _listed(questions: Any) -> list[str | Chat]:
    """The questions, each a prompt or a chat.

    Raises:
        FieldError: what is neither, named by its place.
    """
    if isinstance(questions, str | bytes | Mapping) or not isinstance(questions, Iterable):
        kind = "one string" if isinstance(questions, str) else f"a {type(questions).__name__}"
        raise FieldError(f"questions is {kind}; send a list of prompts, or of chats")
    listed = list(cast("Iterable[Any]", questions))
    for i, question in enumerate(listed):
        if isinstance(question, str):
            continue
        if isinstance(question, Mapping):
            raise FieldError(f"questions[{i}] is one message; send a list of chats, each a list of messages")
        if not isinstance(question, Sequence) or not question:
            raise FieldError(
                f"questions[{i}]={question!r} is neither a prompt nor a chat; send a string, or a list of messages"
            )
        for message in cast("Sequence[Any]", question):
            is_message = isinstance(message, Mapping)
            if not is_message or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise FieldError(
                    f"questions[{i}] has the message {message!r}; send each as {{'role': 'user', 'content': TEXT}}"
                )
    return listed


def _budget(budget_tokens: int | None, num_questions: int) -> tuple[BudgetSpec | None, dict[str, Any]]:
    """What the questions share, and the keys that tell a server so; nothing where there is no bound.

    Raises:
        FieldError: no number of tokens, or fewer than questions.
    """
    if budget_tokens is None:
        return None, {}
    shared = {"budget": f"s-{uuid.uuid4().hex}", "budget_programs": max(1, num_questions)}
    return parse_budget({"budget_tokens": budget_tokens, **shared}), shared


def _with_limit(sampling: dict[str, Any], max_tokens: int | None) -> tuple[dict[str, Any], bool]:
    """Sampling parameters with the limit under SGLang's name, and whether nobody gave one.

    Raises:
        FieldError: it was given twice.
    """
    names = ("max_new_tokens", "max_tokens")
    given = {f"sampling[{name!r}]": sampling[name] for name in names if name in sampling}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if len(given) > 1:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise FieldError(f"{said}: they are names for one limit; send one of them")
    rest = {key: value for key, value in sampling.items() if key not in names}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise FieldError(f"{name}={value!r} is no number of tokens; send a whole number, 1 or more")
        rest["max_new_tokens"] = value
    return rest, not given


def _shown(futures: list[Future[Result]], name: str, progress: bool) -> Iterator[Future[Result]]:
    """Futures as they complete, with a bar."""
    done = as_completed(futures)
    if not progress:
        yield from done
        return
    from tqdm import tqdm

    # Its own lock is a semaphore between processes, whose tracker SGLang's shutdown kills: a traceback at exit.
    tqdm.set_lock(threading.RLock())
    yield from tqdm(done, total=len(futures), desc=name, ncols=100, unit="question")


def _on_server(
    backend: Endpoint | LocalEngine, field: dict[str, Any], sampling: dict[str, Any]
) -> Callable[[str, int | None], Result]:
    """How one question is solved as one request."""
    parse_field(field, MOST_BRANCHES)

    def on_server(question: str, seed: int | None) -> Result:
        started = time.perf_counter()
        params = {**sampling, "custom_params": {"dynasor": field}}
        if seed is not None:
            params["sampling_seed"] = seed
        out = backend.post({"text": question, "sampling_params": params})
        if out is None:
            return _failed(question, f"{backend.name} gave it up; see its log", started)
        record = out["meta_info"].get("dynasor")
        if record is None or "answer" not in record:  # our scheduler fell back to stock behaviour
            return _failed(question, "the scheduler fell back to one plain sample", started, out["text"])
        return _result(question, record, out["text"], started)

    return on_server


def _driven(
    backend: Endpoint | LocalEngine,
    field: dict[str, Any],
    sampling: dict[str, Any],
    reward: Reward | None,
    budget: BudgetSpec | None,
) -> Callable[[str, int | None], Result]:
    """How one question is solved by what is sampled from here."""
    plan = parse_plan(field, has_reward=reward is not None)
    shared = None if budget is None else LockedBudget(budget.tokens, budget.num_programs, backend.driver.rows)
    if runs_on_server(field, has_reward=reward is not None):
        warn_once(backend)

    def driven(question: str, seed: int | None) -> Result:
        started = time.perf_counter()
        record, text = backend.driver.run(question, plan, sampling, reward=reward, seed=seed, budget=shared)
        return _result(question, record, text, started)

    return driven


def _result(question: str, record: dict[str, Any], text: str, started: float) -> Result:
    return Result(
        question, record["answer"], record["certaindex"], record["num_tokens"], record["num_branches"],
        record["stop_reason"], text, time.perf_counter() - started, record,
    )  # fmt: skip


def _failed(question: str, error: str, started: float, text: str = "") -> Result:
    record = {"stop_reason": str(StopReason.FAILED), "error": error}
    return Result(question, None, 0.0, 0, 0, record["stop_reason"], text, time.perf_counter() - started, record)

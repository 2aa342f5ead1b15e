"""Runs algorithms on a backend: samples what they ask for, many at once, and reports what came."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Generator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sglang_dynasor.algorithms.tree import Algorithm, Sample
from sglang_dynasor.frontend.backend import Backend, abort_all
from sglang_dynasor.frontend.judge import Judge, OwnJudge, Reward, model_judge
from sglang_dynasor.frontend.locked_budget import LockedBudget
from sglang_dynasor.frontend.plan import Plan
from sglang_dynasor.frontend.same import AnswerKeys
from sglang_dynasor.frontend.seat import sample_seed
from sglang_dynasor.policy.answers import is_thinking, read_answer
from sglang_dynasor.policy.branch import Branch, BranchState, Ending
from sglang_dynasor.policy.hint import DEFAULT_TOKENS, hint
from sglang_dynasor.policy.program import StopReason
from sglang_dynasor.policy.spec import check_greedy

DEFAULT_ROWS = 64
ABORT_AGAIN_S = 0.5  # an abort that comes before its request does nothing
SEEDED_ROOM = 8  # most samples at once of a search with a seed


class Driven(NamedTuple):
    """A finished run."""

    record: dict[str, Any]
    text: str  # of the path that gave the answer; empty where nothing finished


class Sampled(NamedTuple):
    """One request's outcome; without a sample it was ended or given up."""

    sample: Sample | None
    num_tokens: int = 0
    num_judge_tokens: int = 0


@dataclass(slots=True)
class Run:
    """One search under way."""

    prompt: str
    plan: Plan
    sampling: dict[str, Any]
    judge: Judge | None
    seed: int | None
    algorithm: Algorithm
    keys: AnswerKeys
    pool: ThreadPoolExecutor
    budget: LockedBudget | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_over: bool = False  # what has not been sent yet is not wanted any more
    num_asked: int = 0
    num_tokens: int = 0
    num_judge_tokens: int = 0
    in_flight: dict[Future[Sampled], tuple[int, str]] = field(default_factory=dict[Future[Sampled], tuple[int, str]])


class Driver:
    """At most `rows` requests at once on one backend, shared evenly by the searches under way.

    When a search ends, the others may have more in flight.
    """

    def __init__(self, backend: Backend, rows: int = DEFAULT_ROWS):
        self.backend = backend
        self.rows = rows
        self._pool = ThreadPoolExecutor(rows, thread_name_prefix="dynasor")
        self._places = threading.Semaphore(rows)
        self._is_closed = False
        self._num_live = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Wait for what is in flight and let the threads go."""
        self._is_closed = True
        self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        prompt: str,
        plan: Plan,
        sampling: dict[str, Any],
        *,
        reward: Reward | None = None,
        seed: int | None = None,
        budget: LockedBudget | None = None,
    ) -> Driven:
        """Run `plan` on one question to its end.

        Args:
            prompt: what the samples continue.
            sampling: SGLang's sampling parameters; `max_new_tokens` holds for a whole solution.
            reward: the author's rewards in [0, 1], of `prompt` and of what was sampled after it; None: the plan's judge.
            seed: of the sampling. Samples are then reported in the order in which they
                were asked for, so that an engine that reads seeds gives the same search again. None: as they come.
            budget: what it spends with other runs; None: what its plan says is its own.

        Raises:
            FieldError: greedy sampling of several branches, a request that the server refuses, or a reward outside [0, 1].
        """
        judge: Judge | None = None
        if reward is not None:
            judge = OwnJudge(reward)
        elif plan.spec.judge is not None:
            judge = model_judge(self.backend, plan.spec.judge)
        check_greedy(plan.spec.branches, sampling)
        if budget is None and plan.spec.budget is not None:
            budget = LockedBudget(plan.spec.budget.tokens, 1, self.rows)
        deadline_s = plan.spec.deadline_s
        until = None if deadline_s is None else time.monotonic() + deadline_s
        found: Driven | None = None
        with self._share(), self._threads(judge) as pool:
            algorithm = _started(plan, budget, sampling)
            run = Run(prompt, plan, sampling, judge, seed, algorithm, AnswerKeys(plan.spec), pool, budget)
            try:
                if self._drive(run, until):  # late: what is ended now is no failure of the search
                    found = _found(run, StopReason.DEADLINE)
            finally:
                try:
                    self._end_rest(run)
                finally:
                    if budget is not None:
                        budget.leave(algorithm)
        record, text = found or _found(run)
        record |= {"program": run.id, "num_tokens": run.num_tokens}
        if run.judge is not None:
            record["num_judge_tokens"] = run.num_judge_tokens
        return Driven(record, text)

    @contextmanager
    def _threads(self, judge: Judge | None) -> Generator[ThreadPoolExecutor]:
        """Those that sample and judge: a run's own where its rewards may ask by programs of their own, and so wait for others."""
        if self._is_closed:
            raise RuntimeError(f"the driver of {self.backend.name} is closed; make another backend")
        if isinstance(judge, OwnJudge):
            with ThreadPoolExecutor(self.rows, thread_name_prefix="dynasor-reward") as pool:
                yield pool
        else:
            yield self._pool

    @contextmanager
    def _share(self) -> Generator[None]:
        with self._lock:
            self._num_live += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_live -= 1

    def _room(self, run: Run) -> int:
        # With a seed the same search is to come again, so what it asks for must not depend on who else runs.
        most = max(1, self.rows // max(1, self._num_live)) if run.seed is None else SEEDED_ROOM
        return max(0, most - len(run.in_flight))

    def _drive(self, run: Run, until: float | None) -> bool:
        """Returns whether its deadline came first."""
        algorithm = run.algorithm
        while algorithm.reason is None:
            with run.budget.open() if run.budget is not None else nullcontext():
                for node, num in algorithm.expand(self._room(run)):
                    for _ in range(num):
                        self._ask(run, node)
            left_s = None if until is None else max(0.0, until - time.monotonic())
            if not run.in_flight:
                if run.budget is None:
                    return False  # it has ended by asking for nothing
                if not run.budget.wait(algorithm, left_s):
                    return True
                continue
            # With a seed all that is in flight is waited for: what is asked next must not depend on who is faster.
            done, _ = wait(run.in_flight, left_s, FIRST_COMPLETED if run.seed is None else ALL_COMPLETED)
            for future in [future for future in run.in_flight if future in done]:
                self._take(run, future)
            if until is not None and time.monotonic() >= until:
                return algorithm.reason is None
        return False

    def _ask(self, run: Run, node: int) -> None:
        rid = f"dynasor-{run.id}-{run.num_asked}."
        tree = run.algorithm.state
        seed = sample_seed(run.seed, run.id, run.num_asked)
        run.num_asked += 1
        spent = sum(tree[i].num_tokens for i in tree.path(node))
        future = run.pool.submit(self._sample, run, tree.text(node), spent, rid, seed)
        run.in_flight[future] = node, rid

    def _take(self, run: Run, future: Future[Sampled]) -> None:
        node, _ = run.in_flight.pop(future)
        try:
            sample, num_tokens, num_judge_tokens = future.result()
        except CancelledError:
            sample, num_tokens, num_judge_tokens = None, 0, 0
        run.num_tokens += num_tokens
        run.num_judge_tokens += num_judge_tokens
        with run.budget.open() if run.budget is not None else nullcontext():
            if sample is None:
                run.algorithm.lose(node, num_tokens)
            else:
                run.algorithm.report(node, sample)

    def _end_rest(self, run: Run) -> None:
        """The search is over: end what is in flight, and count what it has cost."""
        run.is_over = True
        running = {future for future in run.in_flight if not future.cancel()}
        while running := wait(running, 0).not_done:
            abort_all(self.backend, [rid for future, (_, rid) in run.in_flight.items() if future in running])
            wait(running, ABORT_AGAIN_S)
        for future in list(run.in_flight):
            if future.cancelled() or future.exception() is None:
                self._take(run, future)

    def _sample(self, run: Run, before: str, spent: int, rid: str, seed: int) -> Sampled:
        params: dict[str, Any] = {"max_new_tokens": DEFAULT_TOKENS, **run.sampling, "sampling_seed": seed}
        params["max_new_tokens"] = max(1, params["max_new_tokens"] - spent)
        step = run.plan.step if run.algorithm.is_stepwise else None
        if step is not None:
            stop = params.get("stop") or []
            params["stop"] = [step, *([stop] if isinstance(stop, str) else stop)]
        with self._places:
            if run.is_over:
                return Sampled(None)
            out = self.backend.post({"text": run.prompt + before, "sampling_params": params, "rid": rid})
        if out is None:
            return Sampled(None)
        finish: dict[str, Any] = out["meta_info"]["finish_reason"] or {}
        num_tokens: int = out["meta_info"].get("completion_tokens", 0)
        if finish.get("type") == "abort":
            return Sampled(None, num_tokens)
        goes_on = step is not None and finish.get("matched") == step
        text: str = out["text"] + (run.plan.step if goes_on else "")
        reward, num_judge_tokens = None, 0
        if run.judge is not None and run.algorithm.is_judged and run.algorithm.reason is None:
            # The author's own rewards may wait for programs of their own, so they hold no place.
            with nullcontext() if isinstance(run.judge, OwnJudge) else self._places:
                reward, num_judge_tokens = run.judge(run.prompt, before + text)
        is_cut = finish.get("type") == "length"
        answer = None if goes_on else read_answer(run.prompt, before + text, run.plan.spec.answer, is_cut=is_cut)
        key = None if answer is None else run.keys.key(answer)
        sample = Sample(text, num_tokens, not goes_on, reward, answer, key, is_cut)
        return Sampled(sample, num_tokens, num_judge_tokens)


def _started(plan: Plan, budget: LockedBudget | None, sampling: dict[str, Any]) -> Algorithm:
    """A fresh run of the plan's algorithm, which spends of `budget`."""
    if budget is None:
        return plan.start()
    with budget.open() as shared:
        return plan.start(shared, sampling.get("max_new_tokens") or DEFAULT_TOKENS)


def _found(run: Run, reason: StopReason | None = None) -> Driven:
    """What a run has found: what every program's record has, and what its algorithm adds or says better."""
    algorithm, plan = run.algorithm, run.plan
    choice = algorithm.aggregate()
    # One that has ended by asking for nothing has used up what it wanted.
    ended = reason or algorithm.reason or (StopReason.FAILED if choice.node is None else StopReason.CAP)
    ends = [_branch(run, i) for i, node in enumerate(algorithm.state.nodes) if node.is_terminal]
    record: dict[str, Any] = {
        "algorithm": plan.about.name,
        "answer": choice.answer,
        "certaindex": round(algorithm.certaindex, 6),
        "votes": [],
        "branch": None,
        "num_branches": len(ends),
        "leader_share": 0.0,
        "num_abstentions": sum(branch.answer is None for branch in ends),
        "num_truncated": sum(branch.finish_reason == "length" for branch in ends),
        "finish_reasons": [branch.finish_reason for branch in ends],
        "cap": plan.spec.branches,
        "stop_rule": plan.spec.stop.text,
    }
    text = "" if choice.node is None else algorithm.state.text(choice.node)
    record |= algorithm.record() | {"stop_reason": str(ended)} | run.keys.record()
    if (said := hint(plan.spec, ends)) is not None:
        record["hint"] = said
    return Driven(record, text)


def _branch(run: Run, index: int) -> Branch:
    """A solution of a search as a branch that came to its end."""
    tree = run.algorithm.state
    node, num_tokens = tree[index], sum(tree[i].num_tokens for i in tree.path(index))
    branch = Branch(BranchState.FINISHED, num_tokens, answer=node.answer, ending=Ending(node.is_cut))
    branch.is_thinking = node.answer is None and is_thinking(run.prompt, tree.text(index))
    return branch

"""A reasoning program inside an SGLang frontend program: declared on a state, its branches forks of that state.

Who counts the votes: a server with our scheduler where the branches' texts say all (it ends the others at once), else this
process, by the same policy code (`Program`): on plain SGLang, and where the author's own code gives rewards or clusters.
"""

from __future__ import annotations

import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import sglang as sgl
from sglang.lang.interpreter import ProgramState, ProgramStateGroup

from sglang_dynasor.algorithms.votes import check_reward
from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend.endpoint import Endpoint
from sglang_dynasor.frontend.local import LocalEngine
from sglang_dynasor.frontend.plan import MOST_BRANCHES, SEARCHES, parse_plan, runs_on_server
from sglang_dynasor.frontend.seat import POLL_S, check_seed, let_go, mend, raise_failure, sample_seed, take_seat
from sglang_dynasor.policy.answers import read_answer
from sglang_dynasor.policy.program import BranchState, Program, StopReason
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec, parse_field

# Branches in flight where the author does not say: a third of the latency of fewer, nearly all of their savings
# (docs/architecture.md, "Sliding, load-adaptive width").
DEFAULT_WIDTH = 8
MOST_CLUSTER_CHARS = 256


class Branch(ProgramState):
    """A fork of the state, one branch of its program.

    Use it as any state: append to it, generate in it. The generation that answers is the first, or the one named `final`
    in the declaration. After the program has decided it generates nothing any more.
    """

    def __init__(self, executor: Any, program: Reasoning, number: int):
        super().__init__(executor)
        self.program = program
        self.number = number
        self.ended = False  # early: the program did not need it, its text is partial or empty
        self.reward: float | None = None
        self.num_tokens = 0
        self.index: int | None = None  # in the policy's program; None: never started
        self.served_index: int | None = None  # in the engine's, where that counts; known once it has answered
        self.lead = self.said = ""  # before the generation that answers, and what it has generated
        self.is_finished = False  # its answer is there
        self.is_counted = False  # it has voted or abstained
        self.is_answering = False

    @property
    def output(self) -> str:
        """What was written and generated since the fork; waits for it."""
        return self.text()[self.stream_executor.fork_start_text_pos :]

    @property
    def is_idle(self) -> bool:
        """Whether it has begun and generates nothing now, but may yet vote."""
        return self._is_open and not self.is_under_way

    @property
    def is_under_way(self) -> bool:
        """Whether its executor has something to do, and will do it."""
        return bool(self.stream_executor.queue.unfinished_tasks) and not self.stream_executor.is_finished

    @property
    def has_failed(self) -> bool:
        """Whether it will never vote, by something else than a generation: that is told by `fail`."""
        return self._is_open and self.stream_executor.error_ is not None

    @property
    def _is_open(self) -> bool:
        return self.index is not None and not self.is_counted and not self.ended

    @property
    def answer(self) -> str | None:
        """What the program's extractor finds in the generation that answers; None: an abstention. Waits for it."""
        self.sync()
        return read_answer(self.lead, self.said, self.program.spec.answer)

    @property
    def rid(self) -> str:
        return f"dynasor-{self.program.id}-{self.number}."

    # Called by the executor's thread (seat.py).

    def start(self, executor: Any) -> dict[str, Any] | None:
        self.lead = executor.text_
        return self.program.admit(self, _current_name(executor))

    def finish(self, text: str, meta_info: dict[str, Any]) -> None:
        self.program.take(self, text, meta_info)

    def fail(self, error: Exception) -> bool:
        return self.program.lose(self, error)


def _current_name(executor: Any) -> str | None:
    """The variable that an executor is generating: the first that has no value yet, in order of submission."""
    for name, event in executor.variable_event.items():
        # A scope under way has a position for a value until it is closed.
        if not event.is_set() and not isinstance(executor.variables.get(name), int):
            return name
    return None


class Reasoning:
    """A declared program. Made by `reason`; what it has found may be read at any time and is final after the `with` block."""

    def __init__(
        self, state: Any, field: dict[str, Any], *, final: str | None, reports: bool, seed: int | None,
        reward: Callable[[str], float | None] | None,
    ):  # fmt: skip
        self.state = state
        self.backend = state.stream_executor.backend
        if not isinstance(self.backend, Endpoint | LocalEngine):
            raise FieldError(
                f"the state's backend is {type(self.backend).__name__}; run the function with backend=Endpoint(url) or "
                "LocalEngine(engine) of sglang_dynasor.frontend"
            )
        self.id = uuid.uuid4().hex  # unique among all authors of a server
        self.field, self.final, self.reports, self.seed, self.reward = field, final, reports, seed, reward
        self.algorithm: str = field.get("algorithm", "self_consistency")
        self.is_server_s = runs_on_server(field, has_reward=reward is not None) and self.backend.has_scheduler
        if self.is_server_s:
            self.spec = parse_field(_with_judge(field, needs=reports), MOST_BRANCHES)
        elif self.algorithm == "long_cot":
            raise FieldError(
                f"dynasor.algorithm='long_cot' needs --scheduler dynasor, which {self.backend.name} does not run: a running "
                "thought is probed inside the engine only"
            )
        else:
            judged = reports and "judge" not in field and reward is None
            self.spec = parse_plan(field, has_reward=reward is not None or judged).spec
            if self.algorithm not in SEARCHES and not self.backend.has_scheduler:
                warn_once(self.backend)
        self.branches: list[Branch] = []
        self._program = Program(self.id, _counting_spec(self.spec))
        self._told: dict[str, Any] | None = None  # the engine's latest record
        self._ready: deque[Branch] = deque()  # finished, not yet handed to the author
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._timer: threading.Timer | None = None
        self._is_joined = False
        self._handed: Branch | None = None  # the last of these
        self._is_consumed = False  # the author takes branches as they finish
        self._is_ended_here = False

    def __enter__(self) -> Reasoning:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.join()
            else:
                self.stop()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for branch in self.branches:
                let_go(branch.stream_executor)

    # What came of it

    @property
    def record(self) -> dict[str, Any]:
        """The program's record so far (docs/record.md), whoever counted."""
        if self._told is not None and (self._told["stop_reason"] or not self._program.branches):
            record = self._told
        else:
            record = self._program.record()
        if not self.branches:
            return record
        # Whoever counted knows branches by the order in which they came; the author knows them by that of the fork.
        is_told = record is self._told
        order = [branch.served_index if is_told else branch.index for branch in self.branches]
        tokens = [branch.num_tokens for branch in self.branches]
        ours: dict[str, Any] = {"program": self.id, "width": self.spec.width, "num_tokens": sum(tokens)}
        ours["branch_tokens"] = tokens
        winner = record["branch"]
        ours["branch"] = None if winner is None or winner not in order else order.index(winner)
        for key in {"rewards", "confidences"} & record.keys():
            ours[key] = [None if index is None else record[key][index] for index in order]
        return {key: value for key, value in {**record, **ours}.items() if key != "index"}

    @property
    def answer(self) -> str | None:
        """The winning answer so far, as written; a cluster, where the author reported clusters."""
        return self.record["answer"]

    @property
    def winner(self) -> Branch | None:
        """The branch that gave the answer; None where none has yet, or the branches are not the author's own."""
        number = self.record["branch"] if self.branches else None
        return None if number is None else self.branches[number]

    @property
    def certaindex(self) -> float:
        """In [0, 1]; 1: more branches cannot change the answer."""
        return self.record["certaindex"]

    @property
    def votes(self) -> dict[str, int]:
        """Votes by answer, the leading one first."""
        return {vote["answer"]: vote["votes"] for vote in self.record["votes"]}

    @property
    def stop_reason(self) -> str | None:
        """Why it ended; None while it goes on."""
        return self.record["stop_reason"]

    @property
    def stopped(self) -> bool:
        """Whether it ended before its cap was used up."""
        return self.stop_reason not in (None, StopReason.CAP, StopReason.FAILED)

    @property
    def num_tokens(self) -> int:
        """Tokens generated, those of ended branches included."""
        return self.record["num_tokens"]

    @property
    def saved(self) -> int:
        """Tokens saved against using the whole cap, 0 or more: an estimate, by the mean length of finished branches.

        Of a server's own branches (`gen`) by that of all, so that it says too little rather than too much.
        """
        record = self.record
        if self.branches:
            lengths = [b.num_tokens for b in self.branches if b.is_finished and not b.ended]
        else:
            lengths = record.get("branch_tokens") or []
        if not lengths or not self.stopped:
            return 0
        return max(0, round(record["cap"] * sum(lengths) / len(lengths)) - record["num_tokens"])

    # Branches of the author's own

    def fork(self, num: int | None = None) -> list[Branch]:
        """Forks of the state, as branches: `num` of them, or all that the cap leaves.

        Raises:
            FieldError: more than the cap leaves, an algorithm that samples by itself, or an option that only works there.
        """
        if self.algorithm in SEARCHES or self.algorithm == "long_cot":
            raise FieldError(f"dynasor.algorithm={self.algorithm!r} samples by itself; use gen() in place of fork()")
        if self.reward is not None:
            raise FieldError("`reward` with fork(): report rewards of your own branches by report(); leave it out")
        if self.spec.judge is not None and not self.reports:
            raise FieldError(
                "dynasor.judge with fork(): branches of your own are judged by you; use gen(), or reports=True"
            )
        if self.spec.tenant:
            raise FieldError(f"dynasor.tenant={self.spec.tenant!r} with fork(): branches of your own stand in line like any "
                             "other request; use gen(), or leave it out")  # fmt: skip
        if "hopeless" in self.field:
            raise FieldError(
                f"dynasor.hopeless={self.field['hopeless']!r} with fork(): end a program of your own branches by stop(), or use gen()"
            )
        if self._program.reason is not None:
            raise FieldError(f"program {self.id} has ended ({self._program.reason}); declare another")
        left = self.spec.branches - len(self.branches)
        num = left if num is None else num
        if not 1 <= num <= left:
            raise FieldError(f"fork({num!r}) is outside [1, {left}], what dynasor.branches={self.spec.branches} leaves")
        self._sync_state()
        fresh: list[Branch] = []
        for executor in self.state.stream_executor.fork(num):
            branch = Branch(executor, self, len(self.branches))
            take_seat(executor, branch)
            self.branches.append(branch)
            fresh.append(branch)
        if self.spec.deadline_s is not None and self._timer is None:
            self._timer = threading.Timer(self.spec.deadline_s, self._end, [StopReason.DEADLINE])
            self._timer.daemon = True
            self._timer.start()
        return fresh

    def as_completed(self) -> Generator[Branch]:
        """Branches as they finish, until the program has decided; one that the author does not report abstains from rewards."""
        self._is_consumed = True
        while True:
            with self._changed:
                if self._handed is not None:  # also one of an earlier loop that the author has left
                    self._count(self._handed)
                    self._handed = None
                while not self._changed.wait_for(self._has_news, POLL_S):
                    pass
                self._raise_error()
                if self._program.reason is not None or not self._ready:
                    return
                handed = self._handed = self._ready.popleft()
            yield handed

    def _has_news(self) -> bool:
        # A branch in which nothing was generated tells nobody that it is done.
        under_way = any(not b.is_finished and b.is_under_way for b in self.branches)
        return bool(self._ready) or self._program.reason is not None or self._error is not None or not under_way

    def report(self, branch: Branch | int, *, reward: float | None = None, cluster: str | None = None) -> None:
        """What the author's own code says of a finished branch, which votes now.

        Args:
            branch: of this program, or its number.
            reward: in [0, 1].
            cluster: which of the author's groups of equal answers it belongs to, in place of the extracted answer.

        Raises:
            FieldError: no such branch, one that still generates or has voted already, a value out of range, or a program
                that has ended or was not declared with reports=True.
        """
        if not self.reports:
            raise FieldError("report() in a program that counts by itself; declare it with reports=True")
        if isinstance(branch, int):
            if isinstance(branch, bool) or not 0 <= branch < len(self.branches):
                raise FieldError(f"branch {branch!r} is not known; the program has {len(self.branches)}, from 0")
            branch = self.branches[branch]
        if branch not in self.branches:
            raise FieldError(f"branch {branch.number} is of program {branch.program.id}; report it there")
        check_reward("reward", reward)
        if cluster is not None and (not cluster.strip() or len(cluster) > MOST_CLUSTER_CHARS):
            raise FieldError(f"cluster={cluster!r} is no name; send 1 to {MOST_CLUSTER_CHARS} characters")
        with self._changed:
            if branch.is_counted:
                raise FieldError(f"branch {branch.number} has voted already; report each branch once")
            if self._program.reason is not None:
                raise FieldError(
                    f"branch {branch.number} is reported after program {self.id} has ended ({self._program.reason}); report "
                    "branches as as_completed() gives them"
                )
            if not branch.is_finished:
                raise FieldError(f"branch {branch.number} still generates; report it when as_completed() gives it")
            branch.reward = reward
            self._count(branch, cluster)

    def stop(self) -> None:
        """End the program now, by a rule of the author's own: the best answer so far stands."""
        self._end(StopReason.CERTAIN)

    def join(self) -> None:
        """Wait for all branches and gather their variables into the state, as SGLang's own join does.

        Raises:
            FieldError: the server refused a branch.
        """
        if self._is_joined:
            return
        self._is_joined = True
        if self.reports:
            for _ in self.as_completed():
                pass
        for branch in self.branches:
            branch.sync()
        with self._changed:
            self._raise_error()
            if self._program.reason is None and not any(b.is_finished for b in self.branches):
                for branch in self.branches:  # by something else than a generation
                    raise_failure(branch.stream_executor)
            if (
                self.final is not None
                and self._program.reason is None
                and not any(b.is_finished for b in self.branches)
            ):
                raise FieldError(f"final={self.final!r}: no branch has generated that; name the variable that answers")
            for branch in self.branches:
                self._settle(branch)
            if self._program.reason is None and self._program.recent:
                self._program.reason = StopReason.CAP  # nothing else will come
        if self.branches:
            ProgramStateGroup(list(self.branches), self.state).join()

    def _sync_state(self) -> None:
        """Wait for what the state was asked before; raise what it has failed by."""
        self.state.sync()
        raise_failure(self.state.stream_executor)

    def _settle(self, branch: Branch) -> None:
        """A branch that never gave its answer leaves the program."""
        if branch.index is not None and self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
            self._program.end(branch.index, branch.num_tokens)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # Called by the branches' threads

    @property
    def _is_counted_here(self) -> bool:
        return self.reports or not self.is_server_s

    def admit(self, branch: Branch, name: str | None) -> dict[str, Any] | None:
        """What to send with the generation `name` of a branch, once its turn has come; None after the decision.

        Raises:
            FieldError: a generation after the one that answered.
        """
        with self._changed:
            if branch.is_finished and not branch.ended:
                raise self._refuse(branch, name)
            # The first generation takes the branch's place in flight, whether or not it is the one that answers.
            if branch.index is None:
                self._wait_for_place()
            if self._program.reason is not None or self._error is not None:
                branch.ended = branch.is_finished = True
                self._changed.notify_all()
                return None
            if branch.index is None:
                branch.index = self._program.start_branch()
        branch.is_answering = self.final is None or name == self.final
        seed = sample_seed(self.seed, self.id, branch.number)
        extra: dict[str, Any] = {"rid": branch.rid, "sampling_params": {"sampling_seed": seed}}
        if branch.is_answering and not self._is_counted_here:
            extra["sampling_params"]["custom_params"] = {"dynasor": self._branch_field()}
        return extra

    def _refuse(self, branch: Branch, name: str | None) -> FieldError:
        error = FieldError(
            f"branch {branch.number} generates {name!r} after the generation that answered; name that one in the declaration: "
            "final=NAME"
        )
        self._error = error
        self._changed.notify_all()
        return error

    def _wait_for_place(self) -> None:
        while not self._changed.wait_for(lambda: self._program.reason is not None or self._may_start(), POLL_S):
            # Authors may read all branches before they report any, or go on in none for a while. Those that
            # generate nothing meanwhile take no place, or nobody would ever go on. Not where the author takes them as they
            # finish: then each is about to be reported, and what it says may end the program.
            if not self._is_consumed and self._may_start(num_idle=sum(branch.is_idle for branch in self.branches)):
                return

    def _may_start(self, num_idle: int = 0) -> bool:
        width = (self.spec.width or DEFAULT_WIDTH) + (num_idle or sum(branch.has_failed for branch in self.branches))
        return self._program.num_to_start(width, is_fixed=self.spec.width is not None)[0] > 0

    def _branch_field(self) -> dict[str, Any]:
        """What the engine is told of a branch that it counts."""
        left_out = ("deadline_s", "width", "program")
        return {**{k: v for k, v in self.field.items() if k not in left_out}, "program": self.id}

    def take(self, branch: Branch, text: str, meta_info: dict[str, Any]) -> None:
        """A branch's generation has come to its end, or was ended."""
        finish: dict[str, Any] = meta_info.get("finish_reason") or {}
        with self._changed:
            branch.num_tokens += meta_info.get("completion_tokens", 0)
            was_ended = finish.get("type") == "abort" or (
                finish.get("type") == "stop" and finish.get("matched") is None
            )
            if not branch.is_answering and not was_ended:
                return
            self._hear(branch, meta_info.get("dynasor"))
            branch.ended = was_ended
            branch.is_finished = True
            branch.said = text
            if was_ended:
                if finish.get("type") == "abort" and self._program.reason is None and branch.index is not None:
                    self._program.fail(branch.index, branch.num_tokens, closes=False)
                else:
                    self._settle(branch)
            elif not self.reports:
                self._count(branch)
            self._ready.append(branch)
            self._changed.notify_all()

    def _hear(self, branch: Branch, record: dict[str, Any] | None) -> None:
        """Keep the engine's newest record; its decision is the program's."""
        if record is None or self._is_ended_here:
            return
        branch.served_index = record.get("index")
        if self._told is None or _age(record) >= _age(self._told):
            self._told = record
        if record["stop_reason"] is not None and self._program.reason is None:
            self._program.reason = StopReason(record["stop_reason"])

    def _count(self, branch: Branch, cluster: str | None = None) -> None:
        """Let a finished branch vote."""
        if branch.is_counted or branch.index is None or branch.ended:
            return
        branch.is_counted = True
        answer = cluster or read_answer(branch.lead, branch.said, self.spec.answer) or ""
        # The policy's program reads one line: the answer that was found, or the author's cluster.
        if self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
            self._program.finish(branch.index, " ".join(answer.split()), branch.num_tokens, branch.reward)
        self._changed.notify_all()
        if self._program.reason is not None:
            self._end_rest()

    def _end(self, reason: StopReason) -> None:
        with self._changed:
            has_answered = self._told is not None and self._told["stop_reason"] is not None
            if self._program.reason is None and not has_answered:
                self._program.reason = reason
                self._told, self._is_ended_here = None, True  # the engine does not know of it
            self._changed.notify_all()
            self._end_rest()

    def _end_rest(self) -> None:
        """Where the engine does not end the others itself, have them aborted: they are answered with what they have."""
        if not self._is_counted_here and self._told is not None:
            return
        for branch in self.branches:
            if branch.index is not None and not branch.is_finished:
                self.backend.abort(branch.rid)

    def lose(self, branch: Branch, error: Exception) -> bool:
        """A branch's request has failed. Returns whether the program goes on without it.

        It does where the server gave the request up (time-out, full queue), unless no branch is left; not where it is wrong.
        """
        is_wrong = isinstance(error, ValueError)
        with self._changed:
            branch.is_finished = branch.ended = True
            if branch.index is not None and self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
                self._program.fail(branch.index, branch.num_tokens, closes=False)
            if is_wrong and self._program.reason is None:
                self._program.reason = StopReason.FAILED
            if is_wrong or self._program.reason is StopReason.FAILED:
                self._error = self._error or error
            self._changed.notify_all()
        return self._error is None

    # One generation, whose branches are made for the author

    def gen(self, name: str, **options: Any) -> None:
        """Generate `name` in the state as a whole program: one text, that of the path which gave the answer.

        A server with our scheduler makes the branches of self-consistency, best-of-N and long_cot; everything else is
        driven from here. Waits for it.

        Args:
            name: of the variable.
            options: those of `sgl.gen`: max_tokens, temperature, stop, top_p, ...

        Raises:
            FieldError: the server refused it, a reward outside [0, 1], or a program that has branches or has ended.
        """
        if self.branches or self._told is not None:
            raise FieldError(f"gen({name!r}) in a program that has branches or an answer already; declare another")
        self._sync_state()
        expression: Any = sgl.gen(name, **options)
        resolved = self.state.stream_executor._resolve_sampling_params(expression.sampling_params)
        sampling = {key: value for key, value in resolved.to_srt_kwargs().items() if value is not None and key != "n"}
        said = self._ask_server(sampling) if self.is_server_s else self._drive(sampling)
        self.state += said
        self.state.sync()
        self.state[name] = said

    def _ask_server(self, sampling: dict[str, Any]) -> str:
        params = sampling | {"custom_params": {"dynasor": self.field}}
        if self.seed is not None:
            params["sampling_seed"] = self.seed
        out = self.backend.post({"text": self.state.text(), "sampling_params": params})
        if out is None:
            raise RuntimeError(f"{self.backend.name} gave up the program; see its log")
        record = out["meta_info"].get("dynasor") or {}
        self._told = record if "answer" in record else None  # the scheduler fell back to stock behaviour
        return out["text"]

    def _drive(self, sampling: dict[str, Any]) -> str:
        plan = parse_plan(self.field, has_reward=self.reward is not None)
        driven = self.backend.driver.run(self.state.text(), plan, sampling, reward=self.reward, seed=self.seed)
        self._told = driven.record
        return driven.text


def _age(record: dict[str, Any]) -> tuple[bool, int]:
    """Later records of a program are greater."""
    return record["stop_reason"] is not None, sum(v["votes"] for v in record["votes"]) + record["num_abstentions"]


def _with_judge(field: dict[str, Any], *, needs: bool) -> dict[str, Any]:
    """Rules on rewards are refused without a judge; the author's reports are one."""
    return {**field, "judge": "model"} if needs and "judge" not in field else field


def _counting_spec(spec: ProgramSpec) -> ProgramSpec:
    """The policy's program reads answers that were found already, its rewards come from reports, its width from `admit`."""
    judge = None if spec.judge is None else JudgeSpec("", is_external=True)
    return replace(spec, answer="last_line", judge=judge, width=None)


_warning_lock = threading.Lock()


def warn_once(backend: Any) -> None:
    with _warning_lock:
        if getattr(backend, "_dynasor_warned", False):
            return
        backend._dynasor_warned = True
    warnings.warn(
        f"{backend.name} does not run --scheduler dynasor: branches are counted by this process, with the same answers, and "
        "end a little later than they could",
        stacklevel=4,
    )


def reason(
    s: Any,
    algorithm: str = "self_consistency",
    *,
    final: str | None = None,
    reports: bool = False,
    reward: Callable[[str], float | None] | None = None,
    seed: int | None = None,
    **field: Any,
) -> Reasoning:
    """Declare a reasoning program on the state `s` of an SGLang function: `with reason(s, branches=16) as p: ...`.

    Args:
        s: the state; its backend is an Endpoint or a LocalEngine.
        algorithm: self_consistency, best_of_n, long_cot, rebase, mcts or beam.
        final: with `fork`: the variable whose generation answers; None: the first one of a branch.
        reports: the author's code rewards or clusters each branch by `report`, and branches vote then.
        reward: with `gen`: a function from a sampled text to its reward in [0, 1], or None.
        seed: of the sampling, for an engine that reads seeds.
        field: the other keys of the `dynasor` field (branches, width, stop, answer, deadline_s, tenant, judge, ...) and of
            the algorithm (docs/frontend.md).

    Raises:
        FieldError: a key, a value or a backend that cannot be served; the message names it.
    """
    mend(s.stream_executor)  # first: what is refused is collected too
    asked = {"algorithm": algorithm, **field}
    check_seed(seed)
    if "program" in asked:
        raise FieldError(f"dynasor.program={asked['program']!r}: ids are made for you; leave it out")
    return Reasoning(s, asked, final=final, reports=reports, seed=seed, reward=reward)

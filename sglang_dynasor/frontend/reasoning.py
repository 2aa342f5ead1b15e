"""A reasoning program inside an SGLang frontend program: declared on a state, its branches forks of that state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from typing import Any

import sglang as sgl
from sglang.lang.interpreter import ProgramStateGroup

from sglang_dynasor.algorithms.catalogue import find
from sglang_dynasor.algorithms.check import check_reward
from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend.backend import warn_once
from sglang_dynasor.frontend.branch import Branch
from sglang_dynasor.frontend.counting import Counting
from sglang_dynasor.frontend.endpoint import Endpoint
from sglang_dynasor.frontend.judge import Reward, check_reward_function
from sglang_dynasor.frontend.local import LocalEngine
from sglang_dynasor.frontend.plan import MOST_BRANCHES, parse_plan, runs_on_server
from sglang_dynasor.frontend.seat import check_seed, let_go, mend, raise_failure, take_seat
from sglang_dynasor.policy.algorithm import SELF_CONSISTENCY, AlgorithmRecord
from sglang_dynasor.policy.hint import name_default
from sglang_dynasor.policy.program import StopReason
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.symbolic import check_installed

logger = logging.getLogger(__name__)
MOST_CLUSTER_CHARS = 256


class Reasoning:
    """A declared program. Made by `reason`; what it has found may be read at any time and is final after the `with` block."""

    def __init__(
        self, state: Any, field: dict[str, Any], *, final: str | None, reports: bool, seed: int | None, reward: Reward | None,
    ):  # fmt: skip
        self.state = state
        self.backend = state.stream_executor.backend
        if not isinstance(self.backend, Endpoint | LocalEngine):
            raise FieldError(
                f"the state's backend is {type(self.backend).__name__}; run the function with backend=Endpoint(url) or "
                "LocalEngine(engine) of sglang_dynasor.frontend"
            )
        self.field, self.reports, self.seed, self.reward = field, reports, seed, reward
        self.about = find(field["algorithm"])
        self.is_server_s = runs_on_server(field, has_reward=reward is not None) and self.backend.has_scheduler
        if self.is_server_s:
            self.field = field | {"algorithm": self.about.name}
            # Rules on rewards are refused without a judge; the author's reports are one.
            judge = {"judge": "model"} if reports and "judge" not in field else {}
            self.spec = parse_field(self.field | judge, MOST_BRANCHES)
        else:
            judged = reports and "judge" not in field and reward is None
            self.spec = parse_plan(field, has_reward=reward is not None or judged).spec
            if self.about.is_engine_s and not self.backend.has_scheduler:
                warn_once(self.backend)
        self._counting = Counting(
            self.backend, self.field, self.spec, is_server_s=self.is_server_s, final=final, reports=reports, seed=seed
        )
        self.id = self._counting.id
        self._timer: threading.Timer | None = None
        self._is_joined = False

    def __enter__(self) -> Reasoning:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self.join()
            else:
                self._stop_quietly()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for branch in self.branches:
                let_go(branch.stream_executor)

    def _stop_quietly(self) -> None:
        """End the program while an exception of the author's is under way, which nothing of ours replaces."""
        try:
            self.stop()
        except Exception as error:
            logger.warning("dynasor: program %s was not ended (%s)", self.id, error)

    # What came of it

    @property
    def branches(self) -> list[Branch]:
        """The author's forks, in order."""
        return self._counting.branches

    @property
    def record(self) -> dict[str, Any]:
        """The program's record so far (docs/reference.md), whoever counted."""
        return self._counting.record

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
        return self.stop_reason not in (None, StopReason.CAP, StopReason.ABORTED, StopReason.FAILED)

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
        self._check_fork()
        left = self.spec.branches - len(self.branches)
        num = left if num is None else num
        if not 1 <= num <= left:
            raise FieldError(f"fork({num!r}) is outside [1, {left}], what dynasor.branches={self.spec.branches} leaves")
        self._sync_state()
        fresh: list[Branch] = []
        for executor in self.state.stream_executor.fork(num):
            branch = Branch(executor, self._counting, len(self.branches))
            take_seat(executor, branch)
            self.branches.append(branch)
            fresh.append(branch)
        if self.spec.deadline_s is not None and self._timer is None:
            self._timer = threading.Timer(self.spec.deadline_s, self._counting.end, [StopReason.DEADLINE])
            self._timer.daemon = True
            self._timer.start()
        return fresh

    def _check_fork(self) -> None:
        """Refuse what only holds where the branches are made for the author."""
        if not self.about.takes_forks:
            raise FieldError(f"dynasor.algorithm={self.about.name!r} samples by itself; use gen() in place of fork()")
        if self.reward is not None:
            raise FieldError("`reward` with fork(): report rewards of your own branches by report(); leave it out")
        if self.spec.judge is not None and not self.reports:
            raise FieldError(
                "dynasor.judge with fork(): branches of your own are judged by you; use gen(), or reports=True"
            )
        if self.spec.comparer == "symbolic":
            check_installed()
        elif self.spec.comparer:
            raise FieldError(
                f"dynasor.equal={self.spec.equal!r} with fork(): branches of your own are compared in your own process; use gen(), or equal "
                "symbolic, math or text"
            )
        if self.spec.tenant:
            raise FieldError(f"dynasor.tenant={self.spec.tenant!r} with fork(): branches of your own stand in line like any "
                             "other request; use gen(), or leave it out")  # fmt: skip
        if self.spec.budget is not None:
            raise FieldError(
                f"dynasor.budget_tokens={self.spec.budget.tokens} with fork(): when branches of your own start is your business; use gen(), "
                "or leave it out"
            )
        if key := next((key for key in self.about.search_keys if key in self.field), None):
            raise FieldError(
                f"dynasor.{key}={self.field[key]!r} with fork(): end a program of your own branches by stop(), or use gen()"
            )
        if self._counting.reason is not None:
            raise FieldError(f"program {self.id} has ended ({self._counting.reason}); declare another")

    def as_completed(self) -> Generator[Branch]:
        """Branches as they finish, until the program has decided; one that the author does not report abstains from rewards."""
        return self._counting.completed()

    def report(
        self, branch: Branch | int, *, reward: float | None = None, cluster: str | None = None, abstains: bool = False
    ) -> None:  # fmt: skip
        """What the author's own code says of a finished branch, which votes now.

        Args:
            branch: of this program, or its number.
            reward: in [0, 1].
            cluster: which of the author's groups of equal answers it belongs to, in place of the extracted answer.
            abstains: it has no answer, whatever its text says.

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
        if abstains and (reward is not None or cluster is not None):
            raise FieldError(
                f"abstains with reward={reward!r}, cluster={cluster!r}: a branch without an answer has neither; leave them out"
            )
        self._counting.report(branch, reward, cluster, abstains=abstains)

    def stop(self) -> None:
        """End the program now, by a rule of the author's own: the best answer so far stands."""
        self._counting.end(StopReason.CERTAIN)

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
        self._counting.close()
        if self.branches:
            ProgramStateGroup(list(self.branches), self.state).join()

    def _sync_state(self) -> None:
        """Wait for what the state was asked before; raise what it has failed by."""
        self.state.sync()
        raise_failure(self.state.stream_executor)

    # One generation, whose branches are made for the author

    def gen(self, name: str, **options: Any) -> None:
        """Generate `name` in the state as a whole program: one text, that of the path which gave the answer.

        A server with our scheduler makes the branches where it can drive the algorithm by itself and all may be sent; everything
        else is driven from here. Waits for it.

        Args:
            name: of the variable.
            options: those of `sgl.gen`: max_tokens, temperature, stop, top_p, ...

        Raises:
            FieldError: the server refused it, a reward outside [0, 1], or a program that has branches or has ended.
        """
        if self.branches or self._counting.told is not None:
            raise FieldError(f"gen({name!r}) in a program that has branches or an answer already; declare another")
        self._sync_state()
        expression: Any = sgl.gen(name, **options)
        resolved = self.state.stream_executor._resolve_sampling_params(expression.sampling_params)
        sampling = {key: value for key, value in resolved.to_srt_kwargs().items() if value is not None and key != "n"}
        said = self._ask_server(sampling) if self.is_server_s else self._drive(sampling)
        if options.get("max_tokens") is None and self._counting.told is not None:
            name_default(self._counting.told)
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
        self._counting.told = record if "answer" in record else None  # the scheduler fell back to stock behaviour
        return out["text"]

    def _drive(self, sampling: dict[str, Any]) -> str:
        plan = parse_plan(self.field, has_reward=self.reward is not None)
        driven = self.backend.driver.run(self.state.text(), plan, sampling, reward=self.reward, seed=self.seed)
        self._counting.told = driven.record
        return driven.text


def reason(
    s: Any,
    algorithm: str | type[Algorithm] | AlgorithmRecord = SELF_CONSISTENCY.name,
    *,
    final: str | None = None,
    reports: bool = False,
    reward: Reward | None = None,
    seed: int | None = None,
    **field: Any,
) -> Reasoning:
    """Declare a reasoning program on the state `s` of an SGLang function: `with reason(s, branches=16) as p: ...`.

    Args:
        s: the state; its backend is an Endpoint or a LocalEngine.
        algorithm: a name in `algorithms.catalogue.ALGORITHMS`, a class with the names of `algorithms.tree.Algorithm`, or its
            record.
        final: with `fork`: the variable whose generation answers; None: the first one of a branch.
        reports: the author's code rewards or clusters each branch by `report`, and branches vote then.
        reward: with `gen`: a function of the question (the state's text) and what was sampled after it, to a reward in [0, 1] or
            None.
        seed: of the sampling, for an engine that reads seeds.
        field: the other keys of the `dynasor` field (branches, width, stop, answer, deadline_s, tenant, judge, ...) and of
            the algorithm (docs/frontend.md). `stop` may also be a function of the evidence (`policy.evidence.Evidence`) that says
            whether the program may end; the program is then counted and driven from this process.

    Raises:
        FieldError: a key, a value or a backend that cannot be served; the message names it.
    """
    mend(s.stream_executor)  # first: what is refused is collected too
    check_seed(seed)
    check_reward_function(reward)
    if "program" in field:
        raise FieldError(f"dynasor.program={field['program']!r}: ids are made for you; leave it out")
    asked = {"algorithm": algorithm, **field}
    return Reasoning(s, asked, final=final, reports=reports, seed=seed, reward=reward)

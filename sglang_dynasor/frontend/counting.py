"""The branches of a declared program: whose turn it is, who has voted, and when it is over.

Who counts the votes: a server with our scheduler where the branches' texts say all (it ends the others at once), else this
process, by the same policy code (`Program`): on plain SGLang, and where the author's own code gives rewards, clusters or the rule.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend.backend import abort_all
from sglang_dynasor.frontend.branch import Branch
from sglang_dynasor.frontend.same import find_same
from sglang_dynasor.frontend.seat import POLL_S, raise_failure, sample_seed
from sglang_dynasor.policy.branch import BranchState, Ending
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec

# Branches in flight where the author does not say: a third of the latency of fewer, nearly all of their savings
# (docs/architecture.md, "Sliding, load-adaptive width").
DEFAULT_WIDTH = 8
FINDINGS_S = 10.0  # that the end waits for answers to be compared


class Counting:
    """Thread-safe: the author's thread and those of the branches call it.

    Args:
        backend: where the branches generate.
        field: what is sent with a branch that the server counts.
        spec: what the program may use, and its rule.
        is_server_s: whether the server could count.
        final: the variable whose generation answers; None: the first of a branch.
        reports: branches vote when the author reports them.
        seed: of the sampling.
    """

    def __init__(
        self, backend: Any, field: dict[str, Any], spec: ProgramSpec, *, is_server_s: bool, final: str | None, reports: bool,
        seed: int | None,
    ):  # fmt: skip
        self.id = uuid.uuid4().hex  # unique among all authors of a server
        self.backend, self.field, self.spec, self.final, self.seed = backend, field, spec, final, seed
        self.reports = reports
        self.is_here = reports or not is_server_s or bool(spec.comparer)
        self.branches: list[Branch] = []
        self.told: dict[str, Any] | None = None  # the engine's latest record
        self._program = Program(self.id, _counting_spec(spec))
        self._ready: deque[Branch] = deque()  # finished, not yet handed to the author
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._handed: Branch | None = None  # the last of these
        self._compared: set[int] = set()  # branches whose answer is compared, or was
        self._is_consumed = False  # the author takes branches as they finish
        self._is_ended_here = False
        self._greedy: set[str] = set()  # texts that greedy answers were generated after

    @property
    def reason(self) -> StopReason | None:
        """Why it is over; None while it goes on."""
        return self._program.reason

    @property
    def record(self) -> dict[str, Any]:
        """The program's record so far (docs/reference.md), whoever counted."""
        if self.told is not None and (self.told["stop_reason"] or not self._program.branches):
            record = self.told
        else:
            record = self._program.record()
        if not self.branches:
            return record
        # Whoever counted knows branches by the order in which they came; the author knows them by that of the fork.
        is_told = record is self.told
        order = [branch.served_index if is_told else branch.index for branch in self.branches]
        tokens = [branch.num_tokens for branch in self.branches]
        ours: dict[str, Any] = {"program": self.id, "width": self.spec.width, "num_tokens": sum(tokens)}
        ours["branch_tokens"] = tokens
        winner = record["branch"]
        ours["branch"] = None if winner is None or winner not in order else order.index(winner)
        for key in {"rewards", "confidences", "finish_reasons"} & record.keys():
            ours[key] = [None if index is None else record[key][index] for index in order]
        return {key: value for key, value in {**record, **ours}.items() if key != "index"}

    # Called by the author's thread

    def completed(self) -> Generator[Branch]:
        """Branches as they finish, until it is over; one that is not reported before the next is asked for votes as it is."""
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

    def report(self, branch: Branch, reward: float | None, cluster: str | None, *, abstains: bool) -> None:
        """Let a finished branch vote, with what the author says of it.

        Raises:
            FieldError: it has voted, still generates, or the program has ended.
        """
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
            self._count(branch, cluster, abstains=abstains)
            self._raise_error()

    def end(self, reason: StopReason) -> None:
        """End the program now, if it is not over: the best answer so far stands."""
        with self._changed:
            has_answered = self.told is not None and self.told["stop_reason"] is not None
            if self._program.reason is None and not has_answered:
                self._program.reason = reason
                self.told, self._is_ended_here = None, True  # the engine does not know of it
            self._changed.notify_all()
            self._end_rest()

    def close(self) -> None:
        """All branches have come to their end: nothing else will come.

        Raises:
            FieldError: the server refused a branch, or none has generated what answers.
        """
        with self._changed:
            self._raise_error()
            is_unheard = self._program.reason is None and not any(b.is_finished for b in self.branches)
            if is_unheard:
                for branch in self.branches:  # by something else than a generation
                    raise_failure(branch.stream_executor)
            if is_unheard and self.final is not None:
                raise FieldError(f"final={self.final!r}: no branch has generated that; name the variable that answers")
            for branch in self.branches:
                self._settle(branch)
            self._changed.wait_for(lambda: self._program.reason or not self._program.comparisons.under_way, FINDINGS_S)
            if self._program.reason is None and self._program.votes.recent:
                self._program.reason = StopReason.CAP

    def _settle(self, branch: Branch) -> None:
        """A branch that never gave its answer leaves the program."""
        if branch.index is not None and self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
            self._program.end(branch.index, branch.num_tokens)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # Called by the branches' threads

    def admit(self, branch: Branch, name: str | None, *, is_greedy: bool) -> dict[str, Any] | None:
        """What to send with the generation `name` of a branch, once its turn has come; None after the decision.

        Raises:
            FieldError: a generation after the one that answered, or a greedy one that another branch has made already.
        """
        with self._changed:
            if branch.is_finished and not branch.ended:
                raise self._refuse(
                    f"branch {branch.number} generates {name!r} after the generation that answered; name that one in the "
                    "declaration: final=NAME"
                )
            # The first generation takes the branch's place in flight, whether or not it is the one that answers.
            is_first = branch.index is None
            if is_first:
                self._wait_for_place()
            if self._program.reason is not None or self._error is not None:
                branch.ended = branch.is_finished = True
                self._changed.notify_all()
                return None
            if branch.index is None:
                branch.index = self._program.start_branch()
            branch.is_answering = self.final is None or name == self.final
            if is_greedy and branch.is_answering:
                # A server refuses them. After steps that were sampled they are fine, and counted here.
                self.is_here |= self.told is None
                if is_first and branch.lead in self._greedy:
                    raise self._refuse(
                        f"branch {branch.number} generates {name!r} greedily (temperature 0, or top_k 1), as another branch with the "
                        "same text before it: both would be the same; generate it with a temperature above 0"
                    )
                if is_first:
                    self._greedy.add(branch.lead)
        seed = sample_seed(self.seed, self.id, branch.number)
        extra: dict[str, Any] = {"rid": branch.rid, "sampling_params": {"sampling_seed": seed}}
        if branch.is_answering and not self.is_here:
            extra["sampling_params"]["custom_params"] = {"dynasor": self._branch_field()}
        return extra

    def _refuse(self, message: str) -> FieldError:
        error = self._error = FieldError(message)
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
            branch.ending = ending_of(finish)
            if was_ended:
                if finish.get("type") == "abort" and self._program.reason is None and branch.index is not None:
                    self._lose(branch)
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
        if self.told is None or _age(record) >= _age(self.told):
            self.told = record
        if record["stop_reason"] is not None and self._program.reason is None:
            self._program.reason = StopReason(record["stop_reason"])

    def _count(self, branch: Branch, cluster: str | None = None, *, abstains: bool = False) -> None:
        """Let a finished branch vote."""
        if branch.is_counted or branch.index is None or branch.ended:
            return
        branch.is_counted = True
        if self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
            index, num_tokens, reward, ending = branch.index, branch.num_tokens, branch.reward, branch.ending
            try:
                if cluster is not None or abstains:
                    self._program.count(index, cluster, num_tokens, reward, ending=ending)
                else:
                    self._program.finish(index, branch.said, num_tokens, reward, lead=branch.lead, ending=ending)
            except Exception as error:
                self._fail(error)
        self._compare()
        self._note_change()

    def _lose(self, branch: Branch) -> None:
        """The server gave a branch up: what it can no longer vote for may make the rest certain."""
        assert branch.index is not None
        try:
            self._program.fail(branch.index, branch.num_tokens, closes=False)
        except Exception as error:
            self._fail(error)
        self._note_change()

    def _fail(self, error: Exception) -> None:
        """The author's own rule has failed: told at the next thing that is asked."""
        self._error = self._error or error
        self._program.reason = self._program.reason or StopReason.FAILED

    def _note_change(self) -> None:
        self._changed.notify_all()
        if self._program.reason is not None:
            self._end_rest()

    def _compare(self) -> None:
        """Have new answers compared, each in a thread: the finding comes when it comes."""
        forms = {i: branch.key for i, branch in enumerate(self._program.branches) if branch.key is not None}
        for index, others in self._program.comparisons.under_way.items():
            if index not in self._compared:
                self._compared.add(index)
                known = {i: forms[i] for i in others}
                threading.Thread(target=self._find, args=(index, forms[index], known), daemon=True).start()

    def _find(self, index: int, form: str, known: dict[int, str]) -> None:
        into = find_same(form, known)
        with self._changed:
            try:
                self._program.settle(index, into)
            except Exception as error:
                self._fail(error)
            self._note_change()

    def _end_rest(self) -> None:
        """Where the engine does not end the others itself, have them aborted: they are answered with what they have."""
        if not self.is_here and self.told is not None:
            return
        abort_all(self.backend, [b.rid for b in self.branches if b.index is not None and not b.is_finished])

    def lose(self, branch: Branch, error: Exception) -> bool:
        """A branch's request has failed. Returns whether the program goes on without it.

        It does where the server gave the request up (time-out, full queue), unless no branch is left; not where it is wrong.
        """
        is_wrong = isinstance(error, ValueError)
        with self._changed:
            branch.is_finished = branch.ended = True
            if branch.index is not None and self._program.branches[branch.index].state is BranchState.IN_FLIGHT:
                self._lose(branch)
            if is_wrong and self._program.reason is None:
                self._program.reason = StopReason.FAILED
            if is_wrong or self._program.reason is StopReason.FAILED:
                self._error = self._error or error
            self._changed.notify_all()
        return self._error is None


def ending_of(finish: dict[str, Any]) -> Ending:
    """How a text ended, as SGLang says it."""
    matched = finish.get("matched")
    return Ending(finish.get("type") == "length", matched if isinstance(matched, str) else "")


def _age(record: dict[str, Any]) -> tuple[bool, int]:
    """Later records of a program are greater."""
    return record["stop_reason"] is not None, sum(v["votes"] for v in record["votes"]) + record["num_abstentions"]


def _counting_spec(spec: ProgramSpec) -> ProgramSpec:
    """The policy's program is told answers, its rewards come from reports, its width from `admit`."""
    judge = None if spec.judge is None else JudgeSpec("", is_external=True)
    return replace(spec, judge=judge, width=None)

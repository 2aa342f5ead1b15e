"""What programs spent and saved: running totals, and the newest records by id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.budget_spec import BudgetSpec
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.spec import ProgramSpec

FEWEST_BRANCHES = 16  # after which it is known how long branches are
# Of `/dynasor/status`, by key; docs/reference.md is made from this, and a test compares it with a server's.
STATUS_HELP = {
    "num_programs": "programs answered since the start",
    "num_certain": "of those, ended early by their rule",
    "num_expired": "of those, answered at their deadline",
    "num_used_up": "of those, ended because the budget that they shared was used up",
    "num_priced_out": "of those, ended because one more branch was not worth its price under the load",
    "num_aborted": "programs that ended without an answer: aborts, disconnects, time-outs",
    "num_branches": "branches that answered programs started",
    "num_branches_saved": "branches that their caps allowed and they did not start",
    "num_tokens": "tokens that answered programs generated, all branches together",
    "num_policy_errors": "exceptions in our own code that fell back to stock behaviour",
    "num_held_programs": "programs that still owe their client an answer",
    "num_waiting_programs": "of those, waiting for room to start (more) branches",
    "num_budgets": "budgets of several requests, remembered by id",
    "num_client_programs": "programs whose branches clients send, remembered",
    "num_branches_inside": "branches, judges and probes that SGLang holds, queued or running",
    "num_branches_queued": "of those, queued by us and not yet in a batch",
    "num_branches_promised": "branches for which rows and tokens are kept until their leader's prompt is cached",
    "fixed_rows": "rows that take as long as the fixed part of a step on this machine; 50, as on a large GPU, until that is known",
    "max_overtaken_tokens": "most service that later arrivals were given before a program that waited was started",
    "num_branches_watched": "branches whose logits somebody reads now",
    "num_steps_watched": "steps in which logits were read",
    "num_reward_errors": "branches that went on without the reward model's word",
    "num_comparisons": "new answers that were compared with known ones beside the loop (`equal` symbolic, model, embedding)",
    "num_merges": "of those, found to be a known one",
    "num_comparison_errors": "of those, left apart because what compares did not say: a worker that died, a server that was silent",
    "num_probe_waves": "prefill passes in which thoughts were asked together",
    "num_probe_tokens_read": "tokens of thoughts that probes were to read",
    "num_probe_tokens_cached": "of those, found in the radix cache",
}


@dataclass(slots=True)
class Totals:
    """Counters of one scheduler since it started."""

    num_programs: int = 0
    num_certain: int = 0  # ended early by their rule
    num_expired: int = 0  # answered at their deadline
    num_used_up: int = 0  # their budget was used up
    num_priced_out: int = 0  # one more branch was not worth its price
    num_aborted: int = 0
    num_branches: int = 0
    num_branches_saved: int = 0  # allowed by the caps, not used
    num_tokens: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Count a program that was answered."""
        self.num_programs += 1
        self.num_certain += record["stop_reason"] == "certain"
        self.num_expired += record["stop_reason"] == "deadline"
        self.num_used_up += record["stop_reason"] == "budget"
        self.num_priced_out += record["stop_reason"] == "price"
        self.num_branches += record["num_branches"]
        self.num_branches_saved += record["cap"] - record["num_branches"]
        self.num_tokens += record["num_tokens"]

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class RecordBook:
    """The newest `size` records, found by request id or program id; older ones are forgotten."""

    def __init__(self, size: int = 10_000):
        self.size = size
        self._records: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Store `record` under `key`, as the newest."""
        self._records[key] = record
        self._records.move_to_end(key)
        while len(self._records) > self.size:
            self._records.popitem(last=False)

    def find(self, key: str) -> dict[str, Any] | None:
        return self._records.get(key)

    def __len__(self) -> int:
        return len(self._records)


class Owners:
    """Whose the programs are whose branches clients send: of the newest `size`, the field that declared each."""

    def __init__(self, size: int = 10_000):
        self.size = size
        self._specs: OrderedDict[str, ProgramSpec] = OrderedDict()

    def check(self, spec: ProgramSpec) -> None:
        """Take note of a branch's program.

        Raises:
            FieldError: another tenant's, or one that was declared with other settings.
        """
        assert spec.program is not None
        first = self._specs.setdefault(spec.program, spec)
        self._specs.move_to_end(spec.program)
        while len(self._specs) > self.size:
            self._specs.popitem(last=False)
        if spec.tenant != first.tenant:
            raise FieldError(f"dynasor.program={spec.program!r} is another tenant's; send an id of your own")
        if spec != first:
            raise FieldError(
                f"dynasor.program={spec.program!r} was declared with other settings; send the same with each of its branches, "
                "or another id"
            )


class BudgetBook:
    """The newest `size` budgets that several requests share, and what a branch usually takes on this server."""

    def __init__(self, size: int = 10_000):
        self.size = size
        self.branch_tokens = Mean(0.0)
        self._declared: OrderedDict[str, tuple[str, BudgetSpec]] = OrderedDict()

    def learn(self, record: dict[str, Any]) -> None:
        """Take in the lengths of an answered program's branches that came to their own end."""
        for num_tokens, reason in zip(record["branch_tokens"], record["finish_reasons"], strict=True):
            if reason in ("stop", "length"):
                self.branch_tokens.learn(num_tokens)

    def check(self, spec: ProgramSpec, most_tokens: Any) -> None:
        """Take note of a program's budget.

        Args:
            most_tokens: that a branch of it may take; what is no number bounds nothing.

        Raises:
            FieldError: another tenant's, one that was declared with other settings, or one that cannot pay for one branch of each
                program, as long as branches are here.
        """
        budget = spec.budget
        assert budget is not None
        declared = (spec.tenant, budget)
        first = self._declared.get(budget.id, declared) if budget.id else declared
        if first[0] != spec.tenant:
            raise FieldError(f"dynasor.budget={budget.id!r} is another tenant's; send an id of your own")
        if first != declared:
            raise FieldError(
                f"dynasor.budget={budget.id!r} was declared with budget_tokens={first[1].tokens} and "
                f"budget_programs={first[1].num_programs}; send the same with each of its programs, or another id"
            )
        if budget.id not in self._declared:
            self._check_size(budget, most_tokens)
        if budget.id:
            self._declared[budget.id] = declared
            self._declared.move_to_end(budget.id)
            while len(self._declared) > self.size:
                self._declared.popitem(last=False)

    def _check_size(self, budget: BudgetSpec, most_tokens: Any) -> None:
        if self.branch_tokens.num < FEWEST_BRANCHES:
            return
        branch_tokens = self.branch_tokens.mean
        if isinstance(most_tokens, int):
            branch_tokens = min(branch_tokens, most_tokens)
        least = ceil(budget.num_programs * branch_tokens)
        if budget.tokens < least:
            raise FieldError(
                f"dynasor.budget_tokens={budget.tokens} is below one branch per question: {budget.num_programs} programs share it, and a "
                f"branch takes about {branch_tokens:.0f} tokens here; send {least} or more, or a smaller max_new_tokens"
            )

"""What programs spent and saved: running totals, and the newest records by id."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.observe.claims import Claims
from sglang_dynasor.observe.savings import saved_branches
from sglang_dynasor.observe.shelf import Shelf
from sglang_dynasor.policy.budget_spec import BudgetSpec
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.spec import ProgramSpec

FEWEST_BRANCHES = 16  # after which it is known how long branches are
# Of `/dynasor/status`, by key; docs/reference.md is made from this, and a test compares it with a server's.
STATUS_HELP = {
    "num_programs": "programs answered since the start",
    "num_certain": "of those, ended early by their rule",
    "num_expired": "of those, answered at their deadline",
    "num_finished_early": "of those, answered when the operator wanted it",
    "num_used_up": "of those, ended because the budget that they shared was used up",
    "num_priced_out": "of those, ended because one more branch was not worth its price under the load",
    "num_aborted": "programs given up: aborts, disconnects, time-outs; their clients are told what there was",
    "num_branches": "branches that answered programs started",
    "num_branches_saved": "branches that their caps allowed and that were never started, of those that ended as sure or priced out; others have saved nothing",
    "num_tokens": "tokens that answered programs generated, all branches together",
    "num_policy_errors": "exceptions in our own code that fell back to stock behaviour",
    "num_fresh_starts": "times that such an exception left something half done: programs under way ended, and new ones began anew",
    "is_aside": "1: exceptions of one kind came again and again, and programs are refused with HTTP 503; 0: they are served",
    "num_held_programs": "programs that still owe their client an answer",
    "num_waiting_programs": "of those, waiting for room to start (more) branches",
    "num_budgets": "budgets of several requests, remembered by id",
    "num_client_programs": "programs whose branches clients send, remembered",
    "num_branches_inside": "branches, judges and probes that SGLang holds, queued or running",
    "num_branches_queued": "of those, queued by us and not yet in a batch",
    "num_branches_promised": "branches for which rows and tokens are kept until their leader's prompt is cached",
    "num_branches_expected": "branches that waiting programs are expected to need, and those promised: what load reports add to SGLang's queue",
    "fixed_rows": "rows that take as long as the fixed part of a step on this machine; 50, as on a large GPU, until that is known",
    "max_overtaken_tokens": "most service that later arrivals were given before a program that waited was started",
    "patience_tokens": "service that later arrivals may get before a waiting program is head of the line",
    "price": "of a branch when a program was last asked about it, as risk removed; 0 where no program is there",
    "num_branches_watched": "branches whose logits somebody reads now",
    "num_steps_watched": "steps in which logits were read",
    "num_answer_slots": "places in answers of programs under way whose distributions the device mixes (`--dynasor-statistics-mib`)",
    "num_answers_without_slot": "places that found no room there, and were mixed on the host from the likeliest tokens",
    "num_reward_errors": "branches that went on without the reward model's word",
    "num_comparisons": "new answers that were compared with known ones beside the loop (`equal` symbolic, model, embedding)",
    "num_merges": "of those, found to be a known one",
    "num_comparison_errors": "of those, left apart because what compares did not say: a worker that died, a server that was silent",
    "num_probe_waves": "prefill passes in which thoughts were asked together",
    "num_probe_tokens_read": "tokens of thoughts that probes were to read",
    "num_probe_tokens_cached": "of those, found in the radix cache",
    "num_looks": "times that somebody looked at what is in flight: a list of programs, twice a second while the live page is open",
}


@dataclass(slots=True)
class Totals:
    """Counters of one scheduler since it started."""

    num_programs: int = 0
    num_certain: int = 0  # ended early by their rule
    num_expired: int = 0  # answered at their deadline
    num_finished_early: int = 0  # the operator wanted the answer then
    num_used_up: int = 0  # their budget was used up
    num_priced_out: int = 0  # one more branch was not worth its price
    num_aborted: int = 0
    num_branches: int = 0
    num_branches_saved: int = 0  # allowed by the caps, not needed
    num_tokens: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Count a program that was answered."""
        self.num_programs += 1
        self.num_certain += record["stop_reason"] == "certain"
        self.num_expired += record["stop_reason"] == "deadline"
        self.num_finished_early += record["stop_reason"] == "operator"
        self.num_used_up += record["stop_reason"] == "budget"
        self.num_priced_out += record["stop_reason"] == "price"
        self.num_branches += record["num_branches"]
        self.num_branches_saved += saved_branches(record)
        self.num_tokens += record["num_tokens"]

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class RecordBook:
    """The newest `size` records, found by owner and by request id or program id; older ones are forgotten (shelf.py says whose)."""

    def __init__(self, size: int = 10_000):
        self.size = size
        self._records: Shelf[dict[str, Any]] = Shelf(size)

    def keep(self, key: str, record: dict[str, Any], owner: str = "") -> None:
        """Store `record` under `key`, as the newest."""
        self._records.keep(owner, key, record)

    def find(self, key: str, owner: str = "") -> dict[str, Any] | None:
        return self._records.find(owner, key)

    def owners_of(self, key: str) -> list[str]:
        """Who has a record under this key."""
        return self._records.owners_of(key)

    def newest(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each record once after its owner, the newest first: of a client's own branches the latest, which tells the most."""
        programs: set[tuple[str, str]] = set()
        for owner, record in self._records.newest():
            if (owner, record["program"]) not in programs:
                programs.add((owner, record["program"]))
                yield owner, record

    def __len__(self) -> int:
        return len(self._records)


class IdBook:
    """The ids that clients name programs by, rids and program ids alike, each with the program that was asked for under it.

    Every owner has ids of their own. Within one owner they are kept apart by tenant.

    Args:
        under_way: what SGLang holds of the request of a rid; None where it is over.
    """

    def __init__(self, under_way: Callable[[str], Any], size: int = 10_000):
        self._claims: Claims[ProgramSpec] = Claims(under_way, size)

    def claim(self, rid: str, spec: ProgramSpec, records: RecordBook) -> None:
        """Take note of a program, or of a branch that a client sends.

        Raises:
            FieldError: an id is another tenant's of the same owner, in flight or with a record; or the program was declared with
                other settings. Then nothing is taken note of.
        """
        ids = {"rid": rid, "dynasor.program": spec.program}
        for key, id in ids.items():
            if id is None:
                continue
            tenants = [first.tenant for first in self._claims.holding(spec.owner, id)]
            if (record := records.find(id, spec.owner)) is not None:
                tenants.append(record.get("tenant", ""))
            if any(tenant != spec.tenant for tenant in tenants):
                raise FieldError(f"{key}={quoted(id)} is another tenant's; send an id of your own")
        declared = [] if spec.program is None else self._claims.holding(spec.owner, spec.program)
        if any(first.program is not None and first != spec for first in declared):
            raise FieldError(
                f"dynasor.program={quoted(spec.program)} was declared with other settings; send the same with each of its branches, "
                "or another id"
            )
        for id in filter(None, dict.fromkeys(ids.values())):
            self._claims.take(spec.owner, id, spec, rid)

    def keep(self, rid: str, program_id: str, owner: str) -> None:
        """A record came of the request of a rid, under its program's id: both ids stay taken."""
        for id in dict.fromkeys((rid, program_id)):
            self._claims.keep(owner, id, rid)


class BudgetBook:
    """The newest `size` budgets that several requests of one owner share, and what a branch usually takes on this server.

    Args:
        under_way: what SGLang holds of the request of a rid; None where it is over.
    """

    def __init__(self, under_way: Callable[[str], Any], size: int = 10_000):
        self.branch_tokens = Mean(0.0)
        self._claims: Claims[tuple[str, BudgetSpec]] = Claims(under_way, size)

    def learn(self, record: dict[str, Any]) -> None:
        """Take in the lengths of an answered program's branches that came to their own end."""
        for num_tokens, reason in zip(record["branch_tokens"], record["finish_reasons"], strict=True):
            if reason in ("stop", "length"):
                self.branch_tokens.learn(num_tokens)

    def claim(self, rid: str, spec: ProgramSpec, most_tokens: Any) -> None:
        """Take note of a program's budget, as `check` allows it."""
        self.check(spec, most_tokens)
        budget = spec.budget
        if budget is not None and budget.id:
            self._claims.take(spec.owner, budget.id, (spec.tenant, budget), rid)

    def keep(self, rid: str, budget_id: str, owner: str) -> None:
        """A record came of the request of a rid: its budget stays as it was declared."""
        self._claims.keep(owner, budget_id, rid)

    def check(self, spec: ProgramSpec, most_tokens: Any) -> None:
        """Whether a program may have its budget.

        Args:
            most_tokens: that a branch of it may take; what is no number bounds nothing.

        Raises:
            FieldError: another tenant's of the same owner, one that was declared with other settings, or one that cannot pay for one
                branch of each program, as long as branches are here.
        """
        budget = spec.budget
        assert budget is not None
        declared = self._claims.holding(spec.owner, budget.id) if budget.id else []
        for tenant, first in declared:
            if tenant != spec.tenant:
                raise FieldError(f"dynasor.budget={quoted(budget.id)} is another tenant's; send an id of your own")
            if first != budget:
                raise FieldError(
                    f"dynasor.budget={quoted(budget.id)} was declared with budget_tokens={first.tokens} and "
                    f"budget_programs={first.num_programs}; send the same with each of its programs, or another id"
                )
        if not declared:
            self._check_size(budget, most_tokens)

    def _check_size(self, budget: BudgetSpec, most_tokens: Any) -> None:
        if self.branch_tokens.num < FEWEST_BRANCHES:
            return
        branch_tokens = self.branch_tokens.mean
        if isinstance(most_tokens, int):
            branch_tokens = min(branch_tokens, most_tokens)
        least = ceil(budget.num_programs * branch_tokens)
        if budget.tokens < least:
            raise FieldError(
                f"dynasor.budget_tokens={quoted(budget.tokens)} is below one branch per question: {budget.num_programs} programs share it, and a "
                f"branch takes about {branch_tokens:.0f} tokens here; send {least} or more, or a smaller max_new_tokens"
            )

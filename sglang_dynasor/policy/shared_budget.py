"""A budget that programs share while many of them run at once: who may start a branch now, and whom it leaves without.

Pure policy: the scheduler and the frontend's driver run the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from sglang_dynasor.policy.budget import Budget, branch_worth
from sglang_dynasor.policy.budget_spec import BudgetSpec
from sglang_dynasor.policy.mean import Mean, expected_tokens
from sglang_dynasor.policy.program import Program, StopReason

# Replayed on recorded samples with programs side by side (docs/results.md, "A budget over many questions"): with more at once
# branches go to whoever is asked first, and with less held the budget is overdrawn.
AT_ONCE_FRAC = 0.25  # of the programs that go on: those that have a branch in flight, beyond first branches
HOLD = 2.0  # times what a branch is expected to take
MOST_ENDED = 16  # programs in one look: each is answered, and a step must not wait for all
MOST_BUDGETS = 4096  # remembered by id; the one longest without a program is forgotten
USUAL_TOKENS = 256.0  # a branch's length where nothing is known yet


class Shares(NamedTuple):
    """What one look at a budget has brought, by the owners of the programs."""

    granted: list[Any]  # may start one branch each
    ended: list[Any]  # have come to their end: nothing is left for them, or nothing could change


@dataclass(slots=True, eq=False)
class Member:
    """A program that shares a budget."""

    program: Program
    owner: Any  # what others know it by
    most_tokens: int  # that a branch may take

    @property
    def expected_tokens(self) -> float:
        """Of its next branch."""
        usual = self.program.usual_tokens
        assert usual is not None
        return min(self.most_tokens, expected_tokens(self.program.finished_tokens, usual.value))

    @property
    def may_start(self) -> bool:
        """Whether it wants a branch more and has none in flight."""
        program = self.program
        return not program.num_in_flight and not program.granted and program.num_allowed > 0


class SharedBudget:
    """Tokens of `num_programs` programs together. Each brings its even share when it comes, and spends what all have brought.

    Every program's first branch starts whatever is left. Further ones go, one at a time of each program, to the program whose next
    branch is worth most. The budget is used up when nothing is in flight and no branch can be paid for: then programs end. So does a
    program whose answer no branch can change.

    Args:
        due: where the budget enters itself when it is to be looked at.
    """

    def __init__(self, tokens: int, num_programs: int = 1, due: dict[SharedBudget, None] | None = None):
        self.tokens = tokens
        self.num_programs = num_programs
        self.budget = Budget(0.0)
        self.members: dict[int, Member] = {}  # those that go on, by order of arrival
        self.num_joined = 0
        self.usual_tokens = Mean(USUAL_TOKENS)  # of a branch, for programs of which nobody knows a server's
        self.due = {} if due is None else due
        self._changed: dict[int, None] = {}  # members whose evidence may be another since the last look
        self._running: dict[int, Member] = {}  # members that have a branch in flight, by when they started

    @property
    def left_tokens(self) -> float:
        """What is left of what its programs have brought, without what is held; below 0 where it is overdrawn."""
        return self.budget.left_tokens

    @property
    def is_looked_at(self) -> bool:
        """Whether those that wait for it will hear: a look is due, or will be when a branch leaves."""
        return self in self.due or bool(self.budget.held_tokens)

    @property
    def is_over(self) -> bool:
        """Whether all its programs have come and gone."""
        return not self.members and self.num_joined >= self.num_programs

    def join(self, program: Program, owner: Any, most_tokens: int) -> None:
        """A program has come: it may start its first branch."""
        number = self.num_joined
        self.num_joined += 1
        if number < self.num_programs:
            self.budget.left_tokens += self.tokens / self.num_programs
        if program.usual_tokens is None:
            program.usual_tokens = self.usual_tokens
        member = self.members[number] = Member(program, owner, most_tokens)
        program.budget, program.budget_number, program.granted = self, number, 1
        self.budget.hold(number, HOLD * member.expected_tokens)
        self.due[self] = None

    def note_change(self, number: int) -> None:
        """The member's evidence is another."""
        if number in self.members:
            self._changed[number] = None
            self.due[self] = None

    def note_start(self, number: int) -> None:
        """A branch of the member's has started."""
        if (member := self.members.get(number)) is not None:
            self._running[number] = member

    def settle(self, number: int, num_tokens: int, *, is_whole: bool) -> None:
        """The member's branch has left with `num_tokens`; `is_whole`: it came to its own end."""
        if (member := self.members.get(number)) is not None:
            self.budget.settle(number, num_tokens)
            if not member.program.num_in_flight:
                self._running.pop(number, None)
            if is_whole:
                self.usual_tokens.learn(num_tokens)
            self.note_change(number)

    def leave(self, number: int) -> None:
        """The member's program is over. What is held for a branch in flight counts as spent; what no branch has begun to spend comes back."""
        if (member := self.members.pop(number, None)) is not None:
            self._running.pop(number, None)
            self.budget.withdraw(number)
            is_spent = member.program.num_in_flight > 0
            self.budget.settle(number, self.budget.held_tokens.get(number, 0.0) if is_spent else 0.0)
            self.due[self] = None

    def share_out(self, most_at_once: int, progress_tokens: Callable[[Any], int]) -> Shares:
        """Let programs start their next branches as far as the budget goes, and end those that it leaves nothing for.

        Args:
            most_at_once: branches that can run at once.
            progress_tokens: what the branch in flight of a program's owner has generated so far.
        """
        for number, member in self._running.items():  # one that has grown long is expected to go on as long as another
            self.budget.hold(number, progress_tokens(member.owner) + member.expected_tokens)
        granted: list[Any] = []
        ended: list[Any] = []
        for number in self._changed:
            member = self.members.get(number)
            if member is None or not member.may_start:
                self.budget.withdraw(number)
            elif branch_worth(member.program.evidence) > 0:
                self.budget.offer(number, member.program.evidence, HOLD * member.expected_tokens)
            elif member.program.give_up(StopReason.BUDGET):
                ended.append(member.owner)
        self._changed.clear()
        most = min(most_at_once, max(1, int(AT_ONCE_FRAC * len(self.members))))
        while len(self.budget.held_tokens) < most and (number := self.budget.take()) is not None:
            member = self.members[number]
            member.program.granted = 1
            granted.append(member.owner)
        self.due.pop(self, None)
        return Shares(granted, ended if self.budget.held_tokens else ended + self._end())

    def _end(self) -> list[Any]:
        """End programs that wait, as many as a look may end; their owners."""
        ended = (member.owner for member in self.members.values() if member.program.give_up(StopReason.BUDGET))
        found = list(islice(ended, MOST_ENDED))
        if len(found) == MOST_ENDED:
            self.due[self] = None
        return found


class SharedBudgets:
    """The budgets of one engine."""

    def __init__(self) -> None:
        # By the owner who sends the programs, and the id that they gave; the longest unused first.
        self.by_id: OrderedDict[tuple[str, str], SharedBudget] = OrderedDict()
        self.due: dict[SharedBudget, None] = {}

    def join(self, spec: BudgetSpec, program: Program, owner: Any, most_tokens: int) -> None:
        """A program has come that says so of its budget."""
        key = program.spec.owner, spec.id
        budget = self.by_id.get(key)
        is_another = budget is not None and (budget.tokens, budget.num_programs) != (spec.tokens, spec.num_programs)
        if budget is not None and is_another and not budget.members:  # nobody was told of it: it may be declared anew
            self.due.pop(budget, None)
            budget = None
        if budget is None:
            budget = SharedBudget(spec.tokens, spec.num_programs, self.due)
        if spec.id:
            self.by_id[key] = budget
            self.by_id.move_to_end(key)
            self._forget()
        budget.join(program, owner, most_tokens)

    def leave(self, program: Program) -> None:
        """A program is over. No harm if it shares no budget, or was over before."""
        budget, spec = program.budget, program.spec.budget
        if budget is None or spec is None:
            return
        budget.leave(program.budget_number)
        if budget.is_over:
            self.due.pop(budget, None)
            if self.by_id.get(key := (program.spec.owner, spec.id)) is budget:
                del self.by_id[key]

    def _forget(self) -> None:
        if len(self.by_id) > MOST_BUDGETS:
            oldest = next((key for key, budget in self.by_id.items() if not budget.members), None)
            if oldest is not None:
                del self.by_id[oldest]

"""Self-consistency: independent branches, one vote each. The engine's own program, for a driver outside it.

Source: Wang et al., arXiv 2203.11171; stopping: docs/architecture.md, "Predictive stopping".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_dynasor.algorithms.tree import ROOT, Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.policy.algorithm import SELF_CONSISTENCY
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.rules import StopRule
from sglang_dynasor.policy.shared_budget import SharedBudget
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec


class SelfConsistency:
    """`Program` in the shape of the searches: the same policy code, whoever samples. `certaindex` is 1 - risk.

    Args:
        cap: most branches.
        stop: when to end early.
        width: most in flight; None: as many as the load allows.
        vote: "majority", or by rewards as in the engine.
        has_rewards: whether somebody rewards the branches.
        budget: tokens that it shares with other programs.
        most_tokens: that a branch may take, for the budget.
    """

    is_stepwise = False

    def __init__(
        self, cap: int, stop: StopRule, *, width: int | None = None, vote: str = "majority", has_rewards: bool = False,
        budget: SharedBudget | None = None, most_tokens: int = 0,
    ):  # fmt: skip
        self.is_judged = has_rewards
        judge = JudgeSpec("", is_external=True) if has_rewards else None
        # The answer is read by whoever samples.
        spec = ProgramSpec(SELF_CONSISTENCY.name, cap, width, stop, "auto", vote=vote, judge=judge)
        self.program = Program("search", spec)
        if budget is not None:
            budget.join(self.program, self, most_tokens)
        self.state = Tree()
        self._seats: list[int] = []  # branches in flight, the longest first
        self._nodes: dict[int, int] = {}  # node of each finished branch

    @property
    def certaindex(self) -> float:
        return self.program.certaindex

    @property
    def budget(self) -> int:
        """Branches that may still start."""
        return self.program.num_unused

    @property
    def reason(self) -> Reason | None:
        return None if self.program.reason is None else Reason(str(self.program.reason))

    def expand(self, room: int) -> list[Expansion]:
        wanted, _ = self.program.num_to_start(room + len(self._seats))
        self._seats += [self.program.start_branch() for _ in range(wanted)]
        return [Expansion(ROOT, wanted)] if wanted else []

    def report(self, node: int, sample: Sample) -> None:
        index = self._seats.pop(0)
        self._nodes[index] = self.state.add(node, sample._replace(is_terminal=True))
        if self.program.reason is None:
            self.program.count(index, sample.answer, sample.num_tokens, sample.reward, key=sample.key)
        else:
            self.program.end(index, sample.num_tokens)

    def lose(self, node: int, num_tokens: int = 0) -> None:
        index = self._seats.pop(0)
        if self.program.reason is None:
            self.program.fail(index, num_tokens, closes=False)
        else:
            self.program.end(index, num_tokens)

    def aggregate(self) -> Choice:
        winner = self.program.winner
        if winner is None:
            return Choice(None, None)
        return Choice(self.program.branches[winner].answer, self._nodes[winner])

    def record(self) -> dict[str, Any]:
        return self.program.record()


RECORD = replace(SELF_CONSISTENCY, search=SelfConsistency)

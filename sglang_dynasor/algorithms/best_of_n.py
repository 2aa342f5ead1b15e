"""Best-of-N: independent branches, each rewarded by a judge or a reward model.

Source: Cobbe et al., arXiv 2110.14168; weighted: Li et al., arXiv 2206.02336.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang_dynasor.algorithms.check import check_reward, check_vote, check_whole
from sglang_dynasor.algorithms.solutions import Solutions, num_to_start
from sglang_dynasor.algorithms.tree import ROOT, Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.policy.algorithm import BEST_OF_N
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule


class BestOfN:
    """Branches that answer by reward; `certaindex` is the best reward so far, in [0, 1].

    The rule `best:LEVEL` ends it with one good branch; where the best branch and the majority disagree no vote rule fires.

    Args:
        cap: most branches.
        stop: when to end early.
        width: most in flight; None: as many as the load allows.
        vote: "reward" (votes weigh their reward), "best" (the highest reward decides) or "majority".
        hopeless: give up after three branches if all rewards are below this; None: never (the default).

    Raises:
        FieldError: a value out of range.
    """

    is_stepwise = False
    is_judged = True

    def __init__(
        self, cap: int, stop: StopRule, *, width: int | None = None, vote: str = "best", hopeless: float | None = None
    ):  # fmt: skip
        check_whole("branches", cap)
        check_vote(vote)
        check_reward("hopeless", hopeless)
        self.cap, self.stop, self.width, self.hopeless = cap, stop, width, hopeless
        self.state = Tree()
        self._solutions = Solutions(self.state, vote)
        self._num_in_flight = 0
        self._num_failed = 0
        self._num_tokens = 0
        self.reason: Reason | None = None

    @property
    def certaindex(self) -> float:
        return self._solutions.best_reward

    @property
    def budget(self) -> int:
        """Branches that may still start."""
        if self.reason is not None:
            return 0
        return self.cap - self._num_failed - len(self._solutions) - self._num_in_flight

    @property
    def _evidence(self) -> Evidence:
        num_left = self.cap - self._num_failed - len(self._solutions)
        return self._solutions.evidence(num_left, self._num_in_flight)

    def expand(self, room: int) -> list[Expansion]:
        if self.reason is not None:
            return []
        num = min(self.budget, num_to_start(self._evidence, self.stop, self._num_in_flight, self.width, room))
        self._num_in_flight += num
        return [Expansion(ROOT, num)] if num else []

    def report(self, node: int, sample: Sample) -> None:
        self._num_in_flight -= 1
        self._num_tokens += sample.num_tokens
        if self.reason is not None:
            return
        self._solutions.add(self.state.add(node, sample._replace(is_terminal=True)))
        if self._solutions.is_decided(self.stop, self._evidence):
            self.reason = Reason.CERTAIN
        elif self._solutions.is_hopeless(self.hopeless, self._solutions.rewards):
            self.reason = Reason.HOPELESS
        self._stop_if_used_up()

    def lose(self, node: int, num_tokens: int = 0) -> None:
        self._num_in_flight -= 1
        self._num_tokens += num_tokens
        self._num_failed += self.reason is None
        self._stop_if_used_up()

    def _stop_if_used_up(self) -> None:
        if self.reason is None and self.budget == 0 and self._num_in_flight == 0:
            self.reason = Reason.CAP if len(self._solutions) else Reason.FAILED

    def aggregate(self) -> Choice:
        return self._solutions.answer()

    def record(self) -> dict[str, Any]:
        return {
            "certaindex": round(self.certaindex, 6),
            **self._solutions.record(self._evidence, self.reason, self.stop),
            "cap": self.cap,
            "num_failed": self._num_failed,
            "num_tokens": self._num_tokens,
        }


RECORD = replace(BEST_OF_N, search=BestOfN)

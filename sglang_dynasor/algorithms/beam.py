"""Beam search over steps, also known as the breadth-first tree of thoughts.

Source: Yao et al., arXiv 2305.10601, algorithm 1; Snell et al., arXiv 2408.03314, section 5.2.
"""

from __future__ import annotations

from typing import Any

from sglang_dynasor.algorithms.check import check_reward, check_vote, check_whole
from sglang_dynasor.algorithms.solutions import Solutions
from sglang_dynasor.algorithms.tree import ROOT, Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.policy.algorithm import AlgorithmRecord
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule


class Beam:
    """At each depth the best nodes go on, the others are dropped; `certaindex` is the highest terminal reward, in [0, 1].

    Every depth samples as many steps as the cap says, evenly over the nodes kept. A solution that has finished leaves the
    beam and takes its place with it: beams - finished nodes go on.

    Args:
        cap: steps sampled at one depth.
        stop: when to end early; judged after each finished solution.
        beams: nodes that go on, 1 to cap; None: a quarter of the cap.
        max_depth: steps after which a solution counts as finished.
        vote: "reward" (votes weigh their reward), "best" (the highest reward decides) or "majority".
        hopeless: give up if all that is kept and every solution has a reward below this, from three on; None: never.

    Raises:
        FieldError: a value out of range.
    """

    is_stepwise = True
    is_judged = True

    def __init__(
        self, cap: int, stop: StopRule, *, beams: int | None = None, max_depth: int = 25, vote: str = "reward",
        hopeless: float | None = None,
    ):  # fmt: skip
        check_whole("branches", cap)
        check_whole("max_depth", max_depth)
        beams = max(1, cap // 4) if beams is None else beams
        check_whole("beams", beams, 1, cap)
        check_vote(vote)
        check_reward("hopeless", hopeless)
        self.cap, self.stop, self.beams, self.max_depth, self.hopeless = cap, stop, beams, max_depth, hopeless
        self.state = Tree()
        self._solutions = Solutions(self.state, vote)
        self._kept: list[int] = [ROOT]  # nodes that go on
        self._fresh: list[int] = []  # what this depth has brought
        self._depth = 0  # depths begun
        self._num_in_flight = 0
        self._num_failed = 0
        self._num_tokens = 0
        self.reason: Reason | None = None

    @property
    def certaindex(self) -> float:
        return self._solutions.best_reward

    @property
    def budget(self) -> int:
        """Steps that may still be sampled: of the depths not begun."""
        return 0 if self.reason is not None else self.cap * (self.max_depth - self._depth)

    @property
    def _evidence(self) -> Evidence:
        num_left = self.beams - len(self._solutions)
        return self._solutions.evidence(num_left, num_left)

    def expand(self, room: int) -> list[Expansion]:
        """A whole depth at once, whatever `room`: which nodes go on is known only when all have their reward."""
        if self.reason is not None or self._num_in_flight:
            return []
        self._depth += 1
        each, more = divmod(self.cap, len(self._kept))
        wanted = [Expansion(node, each + (place < more)) for place, node in enumerate(self._kept)]
        self._num_in_flight = self.cap
        self._fresh = []
        return wanted

    def report(self, node: int, sample: Sample) -> None:
        self._num_in_flight -= 1
        self._num_tokens += sample.num_tokens
        if self.reason is None:
            is_terminal = sample.is_terminal or self.state[node].depth + 1 >= self.max_depth
            self._fresh.append(self.state.add(node, sample._replace(is_terminal=is_terminal)))
            self._end_depth()

    def lose(self, node: int, num_tokens: int = 0) -> None:
        self._num_in_flight -= 1
        self._num_tokens += num_tokens
        if self.reason is None:
            self._num_failed += 1
            self._end_depth()

    def _end_depth(self) -> None:
        if self._num_in_flight:
            return
        places = self.beams - len(self._solutions)
        best = sorted(self._fresh, key=lambda node: (-(self.state[node].reward or 0.0), node))[:places]
        self._kept = [node for node in best if not self.state[node].is_terminal]
        for node in best:
            if self.state[node].is_terminal and self.reason is None:
                self._solutions.add(node)
                if self._solutions.is_decided(self.stop, self._evidence):
                    self.reason = Reason.CERTAIN
        if self.reason is not None:
            return
        rewards = [reward for node in self._kept if (reward := self.state[node].reward) is not None]
        if self._solutions.is_hopeless(self.hopeless, rewards + self._solutions.rewards):
            self.reason = Reason.HOPELESS
        elif not self._kept:
            self.reason = Reason.CAP if len(self._solutions) else Reason.FAILED

    def aggregate(self) -> Choice:
        return self._solutions.answer()

    def record(self) -> dict[str, Any]:
        return {
            "certaindex": round(self.certaindex, 6),
            **self._solutions.record(self._evidence, self.reason, self.stop),
            "cap": self.cap,
            "beams": self.beams,
            "num_failed": self._num_failed,
            "num_tokens": self._num_tokens,
        }


RECORD = AlgorithmRecord("beam", "the best steps of each depth go on", Beam, needs_rewards=True, vote="reward")

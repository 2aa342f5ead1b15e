"""Monte Carlo tree search over steps, several samples at once.

Source: UCT, Kocsis and Szepesvari 2006; constants as in maitrix-org/llm-reasoners; virtual loss: Chaslot et al. 2008; certain
and futile exit: arXiv 2412.20993, section B.1, and AP-MCTS, arXiv 2604.00510.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf, log, sqrt
from typing import Any

from sglang_dynasor.algorithms.check import check_reward, check_scale, check_vote, check_whole
from sglang_dynasor.algorithms.solutions import Solutions, num_to_start
from sglang_dynasor.algorithms.tree import ROOT, Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.policy.algorithm import AlgorithmRecord
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule

EXPLORATION = 1.0  # of UCT, as in llm-reasoners


@dataclass(slots=True)
class Visits:
    """What search knows of a node."""

    num: int = 0
    value: float = 0.0  # sum of the terminal rewards below
    virtual: int = 0  # samples in flight below: each counts as a visit that brought nothing
    pending: int = 0  # of these, children of this very node


class Mcts:
    """UCT; `certaindex` is the mean terminal reward, in [0, 1].

    One iteration picks a node, samples from it to the end, and credits the reward to everything on the way; the steps of
    the sample become nodes, so that later iterations may branch off in its middle. Samples in flight count as visits
    without reward (virtual loss), which sends parallel ones elsewhere.

    Args:
        cap: most iterations.
        stop: when to end early; judged after each iteration.
        width: most iterations in flight; None: as many as the load allows, so that slots which other searches have freed
            speed this one up (AP-MCTS calls that boosting).
        branching: most children of a node, 1 or more.
        step: what ends a step in a sampled text.
        max_depth: steps after which the rest of a sample is one node.
        exploration: UCT's constant, 0 or more.
        vote: "reward" (votes weigh their reward), "best" (the highest reward decides) or "majority".
        hopeless: the futile exit: give up when every leaf's reward is below this, from three on; None: never.

    Raises:
        FieldError: a value out of range.
    """

    is_stepwise = False
    is_judged = True

    def __init__(
        self, cap: int, stop: StopRule, *, width: int | None = None, branching: int = 4, step: str = "\n",
        max_depth: int = 25, exploration: float = EXPLORATION, vote: str = "reward", hopeless: float | None = None,
    ):  # fmt: skip
        check_whole("branches", cap)
        check_whole("branching", branching)
        check_whole("max_depth", max_depth)
        if width is not None:
            check_whole("width", width, 1, cap)
        check_scale("exploration", exploration, allows_zero=True)
        check_vote(vote)
        check_reward("hopeless", hopeless)
        self.cap, self.stop, self.width, self.branching = cap, stop, width, branching
        self.step, self.max_depth, self.exploration, self.hopeless = step, max_depth, exploration, hopeless
        self.visits: list[Visits] = [Visits()]  # by node
        self.state = Tree()
        self._solutions = Solutions(self.state, vote)
        self._num_in_flight = 0
        self._num_failed = 0
        self._num_tokens = 0
        self.reason: Reason | None = None

    @property
    def certaindex(self) -> float:
        return self._solutions.mean_reward

    @property
    def budget(self) -> int:
        """Iterations that may still start."""
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
        wanted: dict[int, int] = {}
        for _ in range(num):
            node = self._select()
            if node is None:
                break
            for above in self.state.path(node):
                self.visits[above].virtual += 1
            self.visits[node].pending += 1
            self._num_in_flight += 1
            wanted[node] = wanted.get(node, 0) + 1
        self._stop_if_used_up()
        return [Expansion(node, num) for node, num in wanted.items()]

    def _select(self) -> int | None:
        """The node to sample from; None where every place is taken or in flight."""
        if not self._has_place(ROOT):
            return None
        node = ROOT
        while not self._is_open(node):
            node = max((c for c in self.state[node].children if self._has_place(c)), key=lambda c: (self._uct(c), -c))
        return node

    def _is_open(self, node: int) -> bool:
        """Whether this very node may have another child."""
        found = self.state[node]
        return not found.is_terminal and len(found.children) + self.visits[node].pending < self.branching

    def _has_place(self, node: int) -> bool:
        return self._is_open(node) or any(self._has_place(child) for child in self.state[node].children)

    def _uct(self, node: int) -> float:
        mine, parent = self.visits[node], self.state[node].parent
        assert parent is not None
        num = mine.num + mine.virtual
        above = self.visits[parent]
        if num == 0:
            return inf
        return mine.value / num + self.exploration * sqrt(log(max(1, above.num + above.virtual)) / num)

    def _land(self, node: int) -> None:
        """A sample from `node` is no longer in flight."""
        for above in self.state.path(node):
            self.visits[above].virtual -= 1
        self.visits[node].pending -= 1
        self._num_in_flight -= 1

    def report(self, node: int, sample: Sample) -> None:
        self._land(node)
        self._num_tokens += sample.num_tokens
        if self.reason is not None:
            return
        steps = self._steps(sample.text, self.max_depth - self.state[node].depth)
        lengths = _apportion(sample.num_tokens, steps)
        for text, num_tokens in zip(steps[:-1], lengths[:-1], strict=True):
            node = self.state.add(node, Sample(text, num_tokens, is_terminal=False))
        node = self.state.add(node, sample._replace(text=steps[-1], num_tokens=lengths[-1], is_terminal=True))
        self.visits += [Visits() for _ in range(len(self.state) - len(self.visits))]
        for above in self.state.path(node):
            self.visits[above].num += 1
            self.visits[above].value += sample.reward or 0.0
        self._solutions.add(node)
        if self._solutions.is_decided(self.stop, self._evidence):
            self.reason = Reason.CERTAIN
        elif self._solutions.is_hopeless(self.hopeless, self._solutions.rewards):
            self.reason = Reason.HOPELESS
        self._stop_if_used_up()

    def lose(self, node: int, num_tokens: int = 0) -> None:
        self._land(node)
        self._num_tokens += num_tokens
        self._num_failed += self.reason is None
        self._stop_if_used_up()

    def _steps(self, text: str, most: int) -> list[str]:
        """`text` in at most `most` pieces, each but the last with its step mark; never none."""
        parts = text.split(self.step, max(0, most - 1))
        pieces = [part + self.step for part in parts[:-1]]
        return [*pieces, parts[-1]] if parts[-1] or not pieces else pieces

    def _stop_if_used_up(self) -> None:
        is_spent = self.budget == 0 or not self._has_place(ROOT)
        if self.reason is None and is_spent and self._num_in_flight == 0:
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


RECORD = AlgorithmRecord(
    "mcts", "iterations go where rewards and curiosity send them", Mcts, needs_rewards=True, vote="reward"
)


def _apportion(num_tokens: int, texts: list[str]) -> list[int]:
    """`num_tokens` shared out by the texts' lengths; the sum is kept."""
    total = max(1, sum(map(len, texts)))
    ends = [num_tokens * sum(map(len, texts[: i + 1])) // total for i in range(len(texts) - 1)] + [num_tokens]
    return [end - start for start, end in pairwise([0, *ends])]

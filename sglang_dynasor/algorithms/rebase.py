"""Rebase: step by step, the better a node's reward the more children it gets.

Source: Wu et al., arXiv 2408.00724, section 3.2; https://github.com/thu-wyz/inference_scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp
from typing import Any

from sglang_dynasor.algorithms.check import check_reward, check_scale, check_vote, check_whole
from sglang_dynasor.algorithms.solutions import Solutions
from sglang_dynasor.algorithms.tree import ROOT, Choice, Expansion, Reason, Sample, Tree
from sglang_dynasor.policy.algorithm import AlgorithmRecord
from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule

TEMPERATURE = 0.2  # of the softmax over rewards, as published
MOST_STEPS = 25  # as published


def shares(rewards: Sequence[float], width: int, temperature: float = TEMPERATURE) -> list[int]:
    """How many children each node gets: W_j = ceil(left * w_j / sum of the remaining w), the best node first.

    Args:
        rewards: one per node, in [0, 1].
        width: children to give out, 0 or more.
        temperature: of the softmax that makes the weights, above 0.

    Returns:
        One number per node in the order given; their sum is `width`, or 0 for no nodes. Equal rewards: the earlier first.

    Source: arXiv 2408.00724, section 3.2, and the authors' code (`select_softmax`).
    """
    best = max(rewards, default=0.0)
    weights = [exp((reward - best) / temperature) for reward in rewards]
    given = [0] * len(weights)
    left = width
    order = sorted(range(len(weights)), key=lambda j: (-rewards[j], j))
    for place, j in enumerate(order):
        remaining = sum(weights[i] for i in order[place:])
        # A weight may underflow to 0; what is left of the width then has gone to better nodes already.
        given[j] = min(left, ceil(left * weights[j] / remaining)) if remaining > 0 else 0
        left -= given[j]
    return given


class Rebase:
    """A tree whose width goes where the rewards are; `certaindex` is the highest terminal reward, in [0, 1].

    The cap is the paper's width: most solutions that may finish. A solution that has finished keeps its share, so that
    width is left for cap - finished others. The published algorithm spends the whole width in one tree; solutions then
    finish together and stopping comes too late to save anything. Here the width goes into rounds: a first one as wide as
    could decide (allocation.py), another as long as the rule has not fired. `round_width=cap` is the published one.

    Args:
        cap: most solutions.
        stop: when to end early; judged after each finished solution.
        round_width: solutions of one round; None: as many as could decide, all that are left if none could.
        reward_temperature: of the softmax over rewards, above 0.
        max_depth: steps after which a solution counts as finished.
        vote: "reward" (votes weigh their reward), "best" (the highest reward decides) or "majority".
        hopeless: give up if every node of a depth and every solution has a reward below this, from three on; None: never.

    Raises:
        FieldError: a value out of range.
    """

    is_stepwise = True
    is_judged = True

    def __init__(
        self, cap: int, stop: StopRule, *, round_width: int | None = None, reward_temperature: float = TEMPERATURE,
        max_depth: int = MOST_STEPS, vote: str = "reward", hopeless: float | None = None,
    ):  # fmt: skip
        check_whole("branches", cap)
        check_whole("max_depth", max_depth)
        if round_width is not None:
            check_whole("round_width", round_width, 1, cap)
        check_scale("reward_temperature", reward_temperature)
        check_vote(vote)
        check_reward("hopeless", hopeless)
        self.cap, self.stop, self.round_width = cap, stop, round_width
        self.reward_temperature, self.max_depth, self.hopeless = reward_temperature, max_depth, hopeless
        self.state = Tree()
        self._solutions = Solutions(self.state, vote)
        self._left = 0  # of this round's width: solutions not finished
        self._frontier: list[int] = []  # nodes to expand once the depth is complete
        self._num_in_flight = 0
        self._num_rounds = 0
        self._num_failed = 0
        self._num_tokens = 0
        self.reason: Reason | None = None

    @property
    def certaindex(self) -> float:
        return self._solutions.best_reward

    @property
    def budget(self) -> int:
        """Solutions that no round has been given yet."""
        if self.reason is not None:
            return 0
        return self.cap - self._num_failed - len(self._solutions) - self._left

    @property
    def _evidence(self) -> Evidence:
        return self._solutions.evidence(self.cap - self._num_failed - len(self._solutions), self._left)

    def expand(self, room: int) -> list[Expansion]:
        """A whole depth at once, whatever `room`: shares are known only when every node of a depth has its reward."""
        if self.reason is not None or self._num_in_flight:
            return []
        if not self._frontier:
            self._left = self.round_width or votes_needed(self._evidence, self.stop) or self.budget
            self._left = min(self._left, self.cap - self._num_failed - len(self._solutions))
            self._num_rounds += 1
            self._frontier = [ROOT]
        given = shares([self.state[node].reward or 0.0 for node in self._frontier], self._left, self.reward_temperature)
        wanted = [Expansion(node, num) for node, num in zip(self._frontier, given, strict=True) if num]
        self._frontier = []
        self._num_in_flight = sum(num for _, num in wanted)
        return wanted

    def report(self, node: int, sample: Sample) -> None:
        self._num_in_flight -= 1
        self._num_tokens += sample.num_tokens
        if self.reason is not None:
            return
        is_terminal = sample.is_terminal or self.state[node].depth + 1 >= self.max_depth
        index = self.state.add(node, sample._replace(is_terminal=is_terminal))
        if is_terminal:
            self._left -= 1
            self._solutions.add(index)
            if self._solutions.is_decided(self.stop, self._evidence):
                self.reason = Reason.CERTAIN
        else:
            self._frontier.append(index)
        self._end_depth()

    def lose(self, node: int, num_tokens: int = 0) -> None:
        self._num_in_flight -= 1
        self._num_tokens += num_tokens
        if self.reason is None:
            self._num_failed += 1
            self._left -= 1
            self._end_depth()

    def _end_depth(self) -> None:
        if self.reason is not None or self._num_in_flight:
            return
        self._frontier.sort()  # in the order in which nodes came, whatever was lost in between
        rewards = [reward for node in self._frontier if (reward := self.state[node].reward) is not None]
        if self._solutions.is_hopeless(self.hopeless, rewards + self._solutions.rewards):
            self.reason = Reason.HOPELESS
        elif not self._frontier:
            self._left = 0
            if self.budget == 0:
                self.reason = Reason.CAP if len(self._solutions) else Reason.FAILED

    def aggregate(self) -> Choice:
        return self._solutions.answer()

    def record(self) -> dict[str, Any]:
        return {
            "certaindex": round(self.certaindex, 6),
            **self._solutions.record(self._evidence, self.reason, self.stop),
            "cap": self.cap,
            "num_rounds": self._num_rounds,
            "num_failed": self._num_failed,
            "num_tokens": self._num_tokens,
        }


RECORD = AlgorithmRecord(
    "rebase", "the better a step's reward, the more continuations it gets", Rebase, needs_rewards=True, vote="reward"
)

"""Terminal samples as votes: the evidence that the stopping rules judge, and the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang_dynasor.algorithms.tree import Choice, Reason, Tree
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.answers import answer_key
from sglang_dynasor.policy.certaindex import entropy_certaindex, overtake_risk
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule

VOTES = ("reward", "best", "majority")
HOPELESS_AFTER = 3  # rewards, before a search may be abandoned: fewer are as easily noise


@dataclass(slots=True)
class Votes:
    """Terminal nodes of a tree, in the order in which they came.

    `vote` says what they weigh, as in the engine: "reward", "best" (the highest reward decides) or "majority" (all the same).
    """

    tree: Tree
    vote: str = "reward"
    cast: list[int] = field(default_factory=list[int])  # terminal nodes
    keys: list[str | None] = field(default_factory=list[str | None])  # of their answers; None: an abstention

    def add(self, node: int) -> None:
        """Count a terminal node."""
        answer = self.tree[node].answer
        self.cast.append(node)
        self.keys.append(None if answer is None else answer_key(answer))

    def __len__(self) -> int:
        return len(self.cast)

    @property
    def rewards(self) -> list[float]:
        """Of the terminal nodes that somebody rewarded."""
        return [reward for node in self.cast if (reward := self.tree[node].reward) is not None]

    @property
    def best_reward(self) -> float:
        """0 where nobody rewarded any."""
        return max(self.rewards, default=0.0)

    @property
    def mean_reward(self) -> float:
        """0 where nobody rewarded any."""
        rewards = self.rewards
        return sum(rewards) / len(rewards) if rewards else 0.0

    def _weight(self, nodes: list[int]) -> float:
        rewards = [self.tree[node].reward or 0.0 for node in nodes]
        match self.vote:
            case "reward":
                return sum(rewards)
            case "best":
                return max(rewards)
            case _:
                return float(len(nodes))

    @property
    def ranking(self) -> list[list[int]]:
        """Nodes by answer, the leading answer first; equal weights by number, then by the earliest node."""
        groups: dict[str, list[int]] = {}
        for node, key in zip(self.cast, self.keys, strict=True):
            if key is not None:
                groups.setdefault(key, []).append(node)
        return sorted(groups.values(), key=lambda nodes: (-self._weight(nodes), -len(nodes), min(nodes)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Votes per answer, descending."""
        return tuple(sorted(map(len, self.ranking), reverse=True))

    def evidence(self, num_left: int) -> Evidence:
        """What a rule may look at, where `num_left` votes may still come."""
        ranking = self.ranking
        counts = self.counts
        is_weighted = self.vote == "reward" and bool(ranking)
        return Evidence(
            counts,
            self.keys.count(None),
            max(0, num_left),
            tuple(self.keys),
            tuple(self.rewards),
            weights=tuple(self._weight(nodes) for nodes in ranking) if is_weighted else (),
            # By weight or by the best reward another answer leads than by number.
            is_contested=bool(ranking) and len(ranking[0]) < counts[0],
        )

    def _by_reward(self, node: int) -> tuple[float, int]:
        return self.tree[node].reward or 0.0, -node

    def answer(self) -> Choice:
        """The leading answer and the node that speaks for it: its most rewarded, of equals the earliest.

        Where no answer was found, the most rewarded of all.
        """
        ranking = self.ranking
        if not ranking:
            return Choice(None, max(self.cast, key=self._by_reward, default=None))
        speaker = max(ranking[0], key=self._by_reward)
        return Choice(self.tree[speaker].answer, speaker)

    def is_hopeless(self, level: float | None, rewards: list[float]) -> bool:
        """Whether a program that may be abandoned below `level` has nothing better among `rewards` to go on with."""
        return level is not None and len(rewards) >= HOPELESS_AFTER and max(rewards) < level

    def record(self, evidence: Evidence, reason: Reason | None, stop: StopRule) -> dict[str, Any]:
        """The keys that all searches' records share."""
        num_left = 0 if reason is Reason.CAP else evidence.num_left
        risk = overtake_risk(evidence.counts, evidence.abstentions, num_left)
        choice = self.answer()
        ranking = self.ranking
        return {
            "answer": choice.answer,
            "risk": round(risk, 6),
            "entropy_certaindex": round(entropy_certaindex(evidence.counts), 6),
            "votes": [{"answer": self.tree[min(who)].answer, "votes": len(who)} for who in ranking],
            "num_abstentions": evidence.abstentions,
            "branch": None if choice.node is None else self.cast.index(choice.node),
            "num_branches": len(self.cast),
            "num_nodes": len(self.tree) - 1,
            "branch_tokens": [sum(self.tree[i].num_tokens for i in self.tree.path(node)) for node in self.cast],
            "vote": self.vote,
            "rewards": [self.tree[node].reward for node in self.cast],
            "stop_rule": stop.text,
            "stop_reason": None if reason is None else str(reason),
        }


def num_to_start(evidence: Evidence, stop: StopRule, in_flight: int, width: int | None, room: int) -> int:
    """How many whole samples to start now: as many as the load allows, never fewer than could decide.

    The same rule as the engine's (`Program.num_to_start`), where `width` bounds what is in flight.
    """
    needed = votes_needed(evidence, stop)
    most = max(room + in_flight, needed)
    return max(0, min(most if width is None else min(most, width), evidence.num_left) - in_flight)


def check_vote(vote: str) -> None:
    """Raise FieldError unless `vote` is one of VOTES."""
    if vote not in VOTES:
        raise FieldError(f"dynasor.vote={vote!r} is not known to a search; use one of {', '.join(VOTES)}")


def check_whole(key: str, value: Any, low: int = 1, high: int = 4096) -> None:
    """Raise FieldError unless `value` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a whole number, {low} to {high}")
    if not low <= value <= high:
        raise FieldError(f"dynasor.{key}={value} is outside [{low}, {high}]; send a value inside")


def check_reward(key: str, value: Any) -> None:
    """Raise FieldError unless `value` is None or a number in [0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a number in [0, 1]")
    if not 0 <= value <= 1:  # NaN is outside too
        raise FieldError(f"dynasor.{key}={value!r} is outside [0, 1]; send a number inside")

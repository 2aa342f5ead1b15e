"""Terminal samples of a search: their votes, and the answer that they give together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang_dynasor.algorithms.tree import Choice, Reason, Tree
from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.certaindex import entropy_certaindex, overtake_risk
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.rules import StopRule
from sglang_dynasor.policy.votes import Votes

HOPELESS_AFTER = 3  # rewards, before a search may be abandoned: fewer are as easily noise


@dataclass(slots=True)
class Solutions:
    """Terminal nodes of a tree, in the order in which they came.

    `vote` says what they weigh, as in the engine: "reward", "best" (the highest reward decides) or "majority" (all the same).
    """

    tree: Tree
    vote: str = "reward"
    nodes: list[int] = field(default_factory=list[int])
    votes: Votes = field(init=False)
    decided: Evidence | None = None  # that the rule ended the search by

    def __post_init__(self) -> None:
        self.votes = Votes(self.vote)

    def add(self, node: int) -> None:
        """Count a terminal node."""
        found = self.tree[node]
        self.nodes.append(node)
        key = None if found.answer is None else found.key or answer_key(found.answer)
        self.votes.cast(node, key, reward=found.reward)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def rewards(self) -> list[float]:
        """Of the nodes that somebody rewarded."""
        return list(self.votes.rewards.values())

    @property
    def best_reward(self) -> float:
        """0 where nobody rewarded any."""
        return max(self.rewards, default=0.0)

    @property
    def mean_reward(self) -> float:
        """0 where nobody rewarded any."""
        rewards = self.rewards
        return sum(rewards) / len(rewards) if rewards else 0.0

    def evidence(self, num_left: int, num_in_flight: int = 0) -> Evidence:
        """What a rule may look at, where `num_left` solutions may still come, `num_in_flight` of them under way."""
        return self.votes.evidence(num_left, num_in_flight=min(num_left, num_in_flight))

    def is_decided(self, stop: StopRule, evidence: Evidence) -> bool:
        """Whether the rule ends the search now; what it was ended by is told in the record."""
        if stop.stops(evidence):
            self.decided = evidence
        return self.decided is not None

    def answer(self) -> Choice:
        """The leading answer and the node that speaks for it: its most rewarded, of equals the earliest.

        Where no answer was found, the most rewarded of all.
        """
        who = next(iter(self.votes.ranking), self.nodes)
        speaker = max(who, key=lambda node: (self.tree[node].reward or 0.0, -node), default=None)
        return Choice(None if speaker is None else self.tree[speaker].answer, speaker)

    def is_hopeless(self, level: float | None, rewards: list[float]) -> bool:
        """Whether a program that may be abandoned below `level` has nothing better among `rewards` to go on with."""
        return level is not None and len(rewards) >= HOPELESS_AFTER and max(rewards) < level

    def record(self, evidence: Evidence, reason: Reason | None, stop: StopRule) -> dict[str, Any]:
        """The keys that all searches' records share."""
        evidence = self.decided or evidence
        num_left = len(self.nodes) if reason is Reason.CAP else evidence.num_left  # of all used: of as many again
        risk = overtake_risk(evidence.counts, evidence.abstentions, num_left, evidence.trust)
        choice = self.answer()
        return {
            "answer": choice.answer,
            "risk": round(risk, 6),
            "entropy_certaindex": round(entropy_certaindex(evidence.counts), 6),
            "votes": [{"answer": self.tree[min(who)].answer, "votes": len(who)} for who in self.votes.ranking],
            "leader_share": round(evidence.leader_share, 6),
            "num_abstentions": evidence.abstentions,
            "branch": None if choice.node is None else self.nodes.index(choice.node),
            "num_branches": len(self.nodes),
            "num_nodes": len(self.tree) - 1,
            "branch_tokens": [sum(self.tree[i].num_tokens for i in self.tree.path(node)) for node in self.nodes],
            "vote": self.vote,
            "rewards": [self.tree[node].reward for node in self.nodes],
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

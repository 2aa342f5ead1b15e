"""Who gave which answer, and what that weighs: the same for the engine's branches and for the solutions of a search."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mixture import NO_MIXTURE, Mixture
from sglang_dynasor.policy.standing import NO_STANDING, Standing


@dataclass(slots=True)
class Votes:
    """One vote or abstention per voter, in the order in which they came. A voter is known by a number, earlier ones by less.

    `by` says what a vote weighs: "majority" (each the same), "reward", "best" (the highest reward of its answer's voters) or
    "confidence". A vote that nobody rewarded weighs nothing by reward.
    """

    by: str = "majority"
    voters: dict[str, list[int]] = field(default_factory=dict[str, list[int]])  # by answer key
    recent: list[str | None] = field(default_factory=list[str | None])  # answer keys as they came; None: an abstention
    rewards: dict[int, float] = field(default_factory=dict[int, float])  # by voter, in [0, 1]
    confidences: dict[int, float] = field(default_factory=dict[int, float])  # by voter
    merged: dict[str, str] = field(default_factory=dict[str, str])  # keys that count as an earlier one

    def cast(
        self, voter: int, key: str | None, *, reward: float | None = None, confidence: float | None = None
    ) -> None:  # fmt: skip
        """Count one vote; without a key an abstention."""
        key = None if key is None else self.root(key)
        self.recent.append(key)
        if key is not None:
            self.voters.setdefault(key, []).append(voter)
        if reward is not None:
            self.rewards[voter] = reward
        if confidence is not None:
            self.confidences[voter] = confidence

    def root(self, key: str) -> str:
        """The key that an answer under `key` counts as."""
        while key in self.merged:
            key = self.merged[key]
        return key

    def merge(self, one: str, other: str) -> bool:
        """Count two answers as one from now on, under the key that came first. Returns whether they were two.

        In which order merges come makes no difference to what they leave.
        """
        one, other = self.root(one), self.root(other)
        if one == other:
            return False
        kept = next(key for key in self.voters if key in (one, other))  # keys stand in the order in which they came
        gone = other if kept == one else one
        self.merged[gone] = kept
        self.voters[kept] = sorted(self.voters[kept] + self.voters.pop(gone))
        self.recent = [kept if key == gone else key for key in self.recent]
        return True

    @property
    def num_abstentions(self) -> int:
        return self.recent.count(None)

    @property
    def counts(self) -> tuple[int, ...]:
        """Votes per answer, descending."""
        return tuple(sorted(map(len, self.voters.values()), reverse=True))

    def weight(self, who: list[int]) -> float:
        """What the votes of `who`, who gave one answer, weigh together."""
        match self.by:
            case "confidence":
                return sum(self.confidences.get(voter, 0.0) for voter in who)
            case "reward":
                return sum(self.rewards.get(voter, 0.0) for voter in who)
            case "best":
                return max(self.rewards.get(voter, 0.0) for voter in who)
            case _:
                return float(len(who))

    @property
    def ranking(self) -> list[list[int]]:
        """Voters by answer, the leading answer first; equal weights by number, then by the earliest voter."""
        return sorted(self.voters.values(), key=lambda who: (-self.weight(who), -len(who), min(who)))

    def evidence(
        self, num_left: int, mixture: Mixture = NO_MIXTURE, *, num_in_flight: int = 0, cheapness: float = 1.0,
        standing: Standing = NO_STANDING,
    ) -> Evidence:  # fmt: skip
        """What a rule may look at, where `num_left` votes may still come, `num_in_flight` of them under way.

        Another answer than `standing` has may not lead: then the lead is contested.
        """
        counts = self.counts
        weights: tuple[float, ...] = ()
        is_contested = False
        if counts and self.by != "majority":
            ranking = self.ranking
            weights = tuple(map(self.weight, ranking))
            is_contested = len(ranking[0]) < counts[0]
        if counts and standing.num_chains:
            leader = standing.leader
            is_contested |= leader is None or self.voters.get(leader) != self.ranking[0]
        rewards = tuple(self.rewards[voter] for voter in sorted(self.rewards))
        return Evidence(
            counts, self.num_abstentions, max(0, num_left), tuple(self.recent), rewards, weights, is_contested, mixture,
            num_in_flight, cheapness, standing,
        )  # fmt: skip

"""What a stopping rule may look at."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dynasor.policy.mixture import Mixture, mix

NO_MIXTURE = mix(())


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rule may look at: the same on every rank."""

    counts: tuple[int, ...]  # votes per answer, descending
    abstentions: int  # finished branches without an answer
    num_left: int  # branches that may still finish
    recent: tuple[str | None, ...] = ()  # answer keys in the order they came; None = abstention
    rewards: tuple[float, ...] = ()  # in [0, 1], where something judges branches
    weights: tuple[float, ...] = ()  # of each answer's votes together, descending; empty: every vote weighs the same
    is_contested: bool = False  # by weight another answer leads than by number
    mixture: Mixture = NO_MIXTURE  # of the branches that have come to their answer, running ones too

    @property
    def num_votes(self) -> int:
        return sum(self.counts)

    @property
    def leader_share(self) -> float:
        """The leading answer's share of all votes by weight, in [0, 1]; 0 for no votes."""
        weights = self.weights or self.counts
        total = sum(weights)
        return weights[0] / total if total else 0.0

    @property
    def lead(self) -> int:
        """Votes between the leader and the next answer; 0 for a tie or no votes."""
        first, second = (*self.counts, 0, 0)[:2]
        return first - second

"""What a stopping rule may look at."""

from __future__ import annotations

from statistics import pvariance
from typing import NamedTuple

from sglang_dynasor.policy.certaindex import overtake_risk, trust
from sglang_dynasor.policy.mixture import NO_MIXTURE, Mixture
from sglang_dynasor.policy.standing import NO_STANDING, Standing


class Evidence(NamedTuple):
    """What a rule may look at: the same on every rank. Made many times per finished branch, as a tuple in a fifth of the time."""

    counts: tuple[int, ...]  # votes per answer, descending
    abstentions: int  # finished branches without an answer
    num_left: int  # branches that may still finish
    recent: tuple[str | None, ...] = ()  # answer keys in the order they came; None = abstention
    rewards: tuple[float, ...] = ()  # in [0, 1], where something judges branches
    weights: tuple[float, ...] = ()  # of each answer's votes together, descending; empty: every vote weighs the same
    is_contested: bool = False  # by weight, or with what running chains say, another answer leads than by number
    mixture: Mixture = NO_MIXTURE  # of the branches that have come to their answer, running ones too
    num_in_flight: int = 0  # branches that have started, of those that may still finish
    cheapness: float = 1.0  # of the program's branches (mean.py), 1/2 to 2
    standing: Standing = NO_STANDING  # of chains that are asked while they think

    @property
    def num_votes(self) -> int:
        return sum(self.counts)

    @property
    def num_finished(self) -> int:
        return self.num_votes + self.abstentions

    @property
    def trust(self) -> float:
        """What each finished branch counts for as evidence, in (0, 1] (certaindex.py)."""
        return trust(self.num_finished, self.num_in_flight)

    @property
    def risk(self) -> float:
        """The chance that the branches left change the answer (certaindex.py), in [0, 1]."""
        return overtake_risk(self.counts, self.abstentions, self.num_left, self.trust)

    @property
    def leader_share(self) -> float:
        """The leading answer's share of all votes by weight, in [0, 1]; 0 for no votes."""
        weights = self.weights or self.counts
        total = sum(weights)
        return weights[0] / total if total else 0.0

    @property
    def answer_entropy(self) -> float:
        """Mean entropy (nats) of the answers that running branches have said, each branch's own doubt; 0 for none."""
        return self.mixture.mean_entropy

    @property
    def disagreement(self) -> float:
        """How far their distributions differ, in nats; 0 for none."""
        return self.mixture.disagreement

    @property
    def reward_mean(self) -> float | None:
        """Of all rewards; None where there are none, as of the next two."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else None

    @property
    def reward_max(self) -> float | None:
        return max(self.rewards, default=None)

    @property
    def reward_variance(self) -> float | None:
        return pvariance(self.rewards) if self.rewards else None

    @property
    def lead(self) -> int:
        """Votes between the leader and the next answer; 0 for a tie or no votes."""
        first, second = (*self.counts, 0, 0)[:2]
        return first - second

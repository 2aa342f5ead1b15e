"""What the chains of a program say together at one time."""

from __future__ import annotations

from typing import NamedTuple


class Standing(NamedTuple):
    """Every chain has one unit, and gives it to one answer or to nobody (chains.py says how)."""

    leader: str | None = None  # the key of the answer with the most units; None: a tie, or nobody gives any
    counts: tuple[int, ...] = ()  # units of each answer, descending
    num_chains: int = 0  # of the cap, those that failed left out
    is_held: bool = False  # the leader has kept the share that was asked for, for as long as was asked for

    @property
    def share(self) -> float:
        """The leader's share of all chains, in [0, 1]; 0 without a leader."""
        return self.counts[0] / self.num_chains if self.leader is not None else 0.0

    @property
    def num_silent(self) -> int:
        """Chains that give their unit to nobody."""
        return self.num_chains - sum(self.counts)


NO_STANDING = Standing()

"""Which branches of a program are admitted together, and what they take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """What a gang takes: the shared prompt once; for each branch one row and its own tokens."""

    prompt_tokens: int
    branch_tokens: int

    def tokens(self, num_branches: int) -> int:
        return self.prompt_tokens + num_branches * self.branch_tokens if num_branches else 0


@dataclass(slots=True)
class Room:
    """Rows and KV tokens promised to nobody."""

    rows: int
    tokens: int

    def most(self, cost: Cost) -> int:
        """The most branches of a gang that fit; 0 if not even one does."""
        return max(0, min(self.rows, (self.tokens - cost.prompt_tokens) // cost.branch_tokens))

    def take(self, cost: Cost, num_branches: int) -> None:
        """Promise room to `num_branches` of a gang."""
        self.rows -= num_branches
        self.tokens -= cost.tokens(num_branches)


def gang_size(wanted: int, least: int, room: Room, engine: Room, cost: Cost) -> int:
    """Branches to admit together now: `wanted` if they fit, fewer down to `least`, else 0 (wait).

    Args:
        wanted: what the program would run, at least `least`.
        least: fewer could not decide anything together.
        room: what is free now.
        engine: what an empty engine has. A gang larger than that shrinks to it, to one branch at worst, so that none
            waits for room that never comes.
    """
    least = max(1, min(least, engine.most(cost)))
    fitting = min(wanted, room.most(cost))
    return fitting if fitting >= least else 0

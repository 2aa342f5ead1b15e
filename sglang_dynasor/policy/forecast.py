"""How much a program still needs: what the order of programs is made from.

Learned per server, from tokens and counts only, so that every rank forecasts the same.
"""

from __future__ import annotations

from sglang_dynasor.policy.certaindex import PRIOR
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mean import Mean, expected_tokens
from sglang_dynasor.policy.program import Program

LEAST_DRIFT = 1 / 64  # or nothing would ever decide


class Forecast:
    """What this server has learned about branch lengths and about how much branches agree."""

    def __init__(self) -> None:
        self.branch_tokens = Mean(256.0)
        self.plain_tokens = Mean(256.0)
        self.agreement = Mean(0.5)  # the leader's share of the branches less the next answer's

    def learn(self, program: Program) -> None:
        """Take in a program that was answered."""
        evidence = program.evidence
        if evidence.num_finished > 1:
            self.agreement.learn(evidence.lead / evidence.num_finished)

    def branches(self, program: Program) -> float:
        """Expected branches that still have to finish, those in flight included; at most what the cap leaves."""
        evidence = program.evidence
        needed = program.votes_needed
        if not needed:  # nothing short of the cap decides
            return evidence.num_left
        return min(evidence.num_left, needed / self.drift(evidence))

    def drift(self, evidence: Evidence) -> float:
        """Expected change of the lead by one more branch, above 0 to 1; as in programs before it where fewer than two finished."""
        drift = self.agreement.value if evidence.num_finished < 2 else leader_drift(evidence)
        return max(LEAST_DRIFT, drift)

    def length_tokens(self, program: Program) -> float:
        """Expected tokens of one of the program's branches: its own mean, shrunk to the server's."""
        return expected_tokens(program.finished_tokens, self.branch_tokens.value)

    def remaining_tokens(self, program: Program, progress_tokens: int) -> float:
        """Expected tokens until the program is decided, at least 0.

        Args:
            progress_tokens: what its branches in flight have generated so far.
        """
        return max(0.0, self.branches(program) * self.length_tokens(program) - progress_tokens)


def leader_drift(evidence: Evidence) -> float:
    """Expected change of the lead by one more branch, in (-1, 1): posterior share of the leader minus the runner-up's.

    The lead is a random walk; by Wald's identity a further lead of v takes v / drift branches. The posterior is the
    stopping rule's (certaindex.py): PRIOR on each answer seen, on one not seen, and on abstention, and votes tempered.
    """
    total = evidence.trust * evidence.num_finished + PRIOR * (len(evidence.counts) + 2)
    return evidence.trust * evidence.lead / total

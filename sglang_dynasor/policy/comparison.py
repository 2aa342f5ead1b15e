"""Answers under different keys that may be the same all the same: compared beside the loop, and merged by what is found.

A new answer is compared with the known ones, the leading one first, until one is the same. So each joins one earlier answer at
most, and it makes no difference in which order findings come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from sglang_dynasor.policy.answers import shown
from sglang_dynasor.policy.branch import Branch
from sglang_dynasor.policy.formula import read_formula
from sglang_dynasor.policy.votes import Votes

MOST_COMPARED = 8  # known answers that a new one is compared with
# Characters of an answer; a longer one stands for itself. The model reads two of them.
MAX_CHARS = {"model": 512, "embedding": 16_384}


class Merge(NamedTuple):
    """A finding that two answers are the same."""

    branch: int  # that brought the later one
    into: int  # that gave the earlier one
    score: float | None  # the model's probability of "yes", or the cosine


@dataclass(slots=True)
class Comparisons:
    """Those of one program. `by` is the comparer; empty where keys say all."""

    by: str
    under_way: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    # ^ by the branch that brought a new answer: branches that gave those with which it is still to be compared
    merges: list[Merge] = field(default_factory=list[Merge])
    num: int = 0  # new answers of which a finding has come
    num_tokens: int = 0  # that the model computed to compare

    def see(self, index: int, branches: Sequence[Branch], votes: Votes) -> None:
        """Branch `index` has voted: if its answer is new, it is to be compared."""
        key = branches[index].key
        if not self.by or key is None or votes.voters[key] != [index] or not self._may_be_compared(branches[index]):
            return
        known = (min(who) for who in votes.ranking if who != [index])
        others = list(islice((i for i in known if self._may_be_compared(branches[i])), MOST_COMPARED))
        if others:
            self.under_way[index] = others

    def _may_be_compared(self, branch: Branch) -> bool:
        if self.by == "symbolic":
            return branch.key is not None and read_formula(branch.key) is not None
        return branch.answer is not None and len(branch.answer) <= MAX_CHARS[self.by]

    def settle(
        self, index: int, into: int | None, score: float | None, branches: Sequence[Branch], votes: Votes
    ) -> None:
        """The answer of branch `index` was found to be that of `into`, or of nobody. No harm if that is known."""
        one = branches[index].key
        if self.under_way.pop(index, None) is None:
            return
        self.num += 1
        if into is None or one is None:
            return
        other = branches[into].key
        assert other is not None
        if votes.merge(one, other):
            self.merges.append(Merge(index, into, score))
            for branch in branches:
                branch.key = None if branch.key is None else votes.root(branch.key)

    def pass_over(self, index: int) -> int | None:
        """The answer of branch `index` is not that of the branch it was compared with. Returns the next; None where none is left."""
        others = self.under_way[index]
        del others[0]
        return others[0] if others else None

    def may_change_leader(self, votes: Votes) -> bool:
        """Whether what is still to be found could give another answer the lead."""
        if not self.under_way or votes.by == "best":  # a merged answer has no higher reward than the best of its own
            return False
        leading, *others = votes.ranking
        is_open = [not self.under_way.keys().isdisjoint(who) for who in others]
        weights = [votes.weight(who) for who in others]
        # Each new answer may join one other: all of them, at most, the greatest of the rest.
        joining = sum(weight for weight, may_join in zip(weights, is_open, strict=True) if may_join)
        rest = max((weight for weight, may_join in zip(weights, is_open, strict=True) if not may_join), default=0.0)
        return any(is_open) and joining + rest >= votes.weight(leading)

    def record(self, branches: Sequence[Branch]) -> dict[str, Any]:
        """Keys that the record has where answers were compared."""
        if not self.by:
            return {}
        merges = [
            {
                "answer": shown(branches[merge.branch].answer),
                "into": shown(branches[merge.into].answer),
                "by": self.by,
                "score": None if merge.score is None else round(merge.score, 6),
            }
            for merge in sorted(self.merges)
        ]
        more: dict[str, Any] = {"merges": merges, "num_comparisons": self.num}
        return more | ({"num_compare_tokens": self.num_tokens} if self.by == "model" else {})

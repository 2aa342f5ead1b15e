"""All algorithms, and how an author's own joins them."""

from __future__ import annotations

from typing import Any, cast

from sglang_dynasor.algorithms import beam, best_of_n, mcts, rebase, self_consistency
from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.algorithm import LONG_COT, AlgorithmRecord, parameters

ALGORITHMS = {
    record.name: record
    for record in (
        self_consistency.RECORD,
        best_of_n.RECORD,
        LONG_COT,
        rebase.RECORD,
        mcts.RECORD,
        beam.RECORD,
    )
}
# The own keys of searches: values and meaning. docs/reference.md is made from this, and a test compares it with what they take.
SEARCH_HELP = {
    "step": ("1 to 64 characters", "what ends a step in a sampled text (default: the end of a line)"),
    "max_depth": ("1 to 4096", "steps after which a solution is not split any further (default 25)"),
    "round_width": ("1 to branches", "solutions of one round (default: as many as could decide); branches: one round, as published"),
    "reward_temperature": ("above 0 to below 1000", "of the softmax over rewards that shares the width out (default 0.2)"),
    "branching": ("1 to 4096", "most children of a node (default 4)"),
    "exploration": ("0 to below 1000", "UCT's constant (default 1)"),
    "beams": ("1 to branches", "steps of a depth that go on (default: a quarter of branches)"),
    "hopeless": ("0 to 1", "the search is given up when everything it has is worth less (default: never)"),
}  # fmt: skip
# What a search must have, in the words of tree.Algorithm.
NAMES = tuple(name for name in {**Algorithm.__annotations__, **vars(Algorithm)} if not name.startswith("_"))


def find(algorithm: Any) -> AlgorithmRecord:
    """The record of an algorithm.

    Args:
        algorithm: a name in ALGORITHMS, a record, or a class with the names of tree.Algorithm. A class without a record votes
            as its constructor's parameter `vote` says, by majority if it has none, and needs rewards if it `is_judged`.

    Raises:
        FieldError: an unknown name, or something else.
    """
    if isinstance(algorithm, AlgorithmRecord):
        return algorithm
    if isinstance(algorithm, type):
        search = cast("type[Any]", algorithm)
        vote = parameters(search).get("vote")
        return AlgorithmRecord(
            search.__name__,
            search=search,
            needs_rewards=getattr(search, "is_judged", False) is True,
            vote=vote if isinstance(vote, str) else "majority",
        )
    if isinstance(algorithm, str) and algorithm in ALGORITHMS:
        return ALGORITHMS[algorithm]
    raise FieldError(
        f"dynasor.algorithm={algorithm!r} is not known; use one of {', '.join(ALGORITHMS)}, or a class with the names of "
        "sglang_dynasor.algorithms.tree.Algorithm"
    )


def check_names(name: str, algorithm: Any) -> None:
    """Raise FieldError unless `algorithm`, one that was started, has every name of tree.Algorithm."""
    if missing := [wanted for wanted in NAMES if not hasattr(algorithm, wanted)]:
        raise FieldError(
            f"dynasor.algorithm={name!r} has no {', '.join(missing)}; an algorithm has the names of "
            f"sglang_dynasor.algorithms.tree.Algorithm: {', '.join(NAMES)}"
        )

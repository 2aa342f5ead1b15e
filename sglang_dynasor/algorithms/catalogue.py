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

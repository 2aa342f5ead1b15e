"""Who gives its KV back when the pool runs out: the youngest program, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence


def youngest_last(order: list[int], number: Callable[[int], int]) -> list[int]:
    """The engine's order of keeping (it retracts from the end), with programs after plain requests, the youngest last.

    Args:
        order: indices of the requests that run.
        number: of the program that an index belongs to, by arrival from 1 on; 0: a plain request.

    Returns:
        `order` itself where no program runs.
    """
    return sorted(order, key=number) if any(map(number, order)) else order


def siblings(programs: Sequence[Hashable | None], retracted: Collection[Hashable]) -> list[int]:
    """Which of the requests left are to follow those that were retracted, by index.

    A program without some of its branches holds memory and comes to no decision.

    Args:
        programs: that each request left is a branch of; None: of none.
        retracted: programs that lost a branch.

    Returns:
        None of them where nothing else would run.
    """
    found = [index for index, program in enumerate(programs) if program is not None and program in retracted]
    return found if len(found) < len(programs) else []

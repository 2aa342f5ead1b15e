"""What clients do that sample by plain requests and vote themselves: how many samples more, after what has come so far.

Each is a pure function of the answers in the order in which they came (None: a sample without one), how many were asked
for, and the cap. It returns how many to ask for now, or None: the client has its answer, and cancels what is still running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_dynasor.policy.certaindex import beta_certainty

AGREEMENT = 0.75  # its_hub's default
BETA_LEVEL = 0.95  # Adaptive-Consistency's and its_hub's default
WINDOW = 5  # ESC's

More = Callable[[Sequence[str | None], int, int], int | None]


class Peer(NamedTuple):
    """One way of a client's."""

    more: More
    about: str
    is_one_request: bool = False  # one request with n samples: SGLang makes the copies
    is_greedy: bool = False  # one sample at temperature 0


def stock(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """All at once; every one counts."""
    return cap - num_asked if len(answers) < cap else None


def one(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """One sample, and no vote."""
    return 1 - num_asked if not answers else None


def doubling(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """2, 4, 8, ... in all, until AGREEMENT of a whole wave and those before agree.

    A sample without an answer agrees with none. Source: its_hub 1.2.0, AdaptiveSelfConsistency.
    """
    if len(answers) < num_asked:
        return 0
    if num_asked >= cap or (answers and _votes(answers)[0] >= AGREEMENT * len(answers)):
        return None
    return min(max(2, num_asked), cap - num_asked)


def beta(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """All at once, until P(the leader has more than half) is BETA_LEVEL.

    A sample without an answer votes for itself. Source: its_hub 1.2.0, BetaSelfConsistency.
    """
    if len(answers) >= cap or _is_beta_sure([place if one is None else one for place, one in enumerate(answers)]):
        return None
    return cap - num_asked


def adaptive(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """One after another, until as `beta`. Source: Adaptive-Consistency, https://github.com/Pranjal2041/AdaptiveConsistency."""
    if len(answers) >= cap or _is_beta_sure(answers):
        return None
    return 1 if len(answers) == num_asked else 0


def windows(answers: Sequence[str | None], num_asked: int, cap: int) -> int | None:
    """WINDOW at a time, until all of one window agree. Source: ESC, arXiv 2401.10480."""
    if len(answers) < num_asked:
        return 0
    last = answers[-WINDOW:]
    is_unanimous = len(last) == WINDOW and last[0] is not None and len(set(last)) == 1
    return None if num_asked >= cap or is_unanimous else min(WINDOW, cap - num_asked)


def _is_beta_sure(answers: Sequence[str | int | None]) -> bool:
    return len(answers) >= 2 and beta_certainty(*_votes(answers)) >= BETA_LEVEL


def _votes(answers: Sequence[str | int | None]) -> tuple[int, int]:
    """Of the leading answer, and of the next."""
    counts = sorted(Counter(answer for answer in answers if answer is not None).values(), reverse=True)
    first, second = (*counts, 0, 0)[:2]
    return first, second


PEERS = {
    "greedy": Peer(one, "one greedy sample, where the file has one", is_greedy=True),
    "single": Peer(one, "one sample"),
    "stock": Peer(stock, "one request with n=cap", is_one_request=True),
    "doubling": Peer(doubling, "its_hub: 2, 4, 8, ... samples until 75 % agree"),
    "beta": Peer(beta, "its_hub: cap samples at once, cancelled when Beta 0.95 is sure"),
    "adaptive": Peer(adaptive, "Adaptive-Consistency: one after another until Beta 0.95 is sure"),
    "windows": Peer(windows, "ESC: windows of five until one agrees"),
}

"""Several thoughts of one program are asked together: when each is ready for it, and who is asked then.

They are compared at the same time anyway, and one prefill pass computes many probes as fast as one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil

from sglang_dynasor.policy.thought import next_probe_tokens
from sglang_dynasor.policy.thought_spec import ThoughtSpec

GROWTH_FRAC = 0.05  # of a thought, that it grows by before it is asked again: late in it answers change more slowly
READY_FRAC = 0.8  # of the chains that think, that must be ready
# Below the share that is asked for. So far below, leaving every second wave out costs nothing on recorded probes; from 0.25 below
# it costs a point of what is saved.
FAR_FRAC = 0.45


def next_turn_tokens(
    thought: ThoughtSpec, num_tokens: int, costs: Sequence[int], num_suffix_tokens: int, *, is_far: bool
) -> int:
    """The length in tokens, at least 1, from which on a chain is ready to be asked with the others.

    As often as `next_probe_tokens` allows, so that together probes take no more than that; where the client has not said how
    often to ask, no more often than the thought grows by GROWTH_FRAC, and half as often while the program is far from an end.

    Args:
        num_tokens: of the thought when it was asked last; 0: it was not.
        costs: tokens that each of its probes has computed.
        num_suffix_tokens: that every probe computes before its answer.
        is_far: whether what the next wave says can hardly end the program.
    """
    at_tokens = next_probe_tokens(thought, num_tokens, costs, num_suffix_tokens)
    if thought.every_tokens is not None or not num_tokens:
        return at_tokens
    at_tokens = max(at_tokens, ceil((1 + GROWTH_FRAC) * num_tokens))
    return 2 * at_tokens - num_tokens if is_far else at_tokens


def is_far(counts: Sequence[int], num_finished_for_best: int, num_open: int, num_chains: int, share: float) -> bool:
    """Whether what the next wave says can hardly end the program: the answer that leads is far below its share, or the finished
    chains leave no answer enough.

    Args:
        counts: units of each answer, descending; of no chain: nobody has been asked, and nothing is known.
        num_finished_for_best: units of finished chains for the answer that has most of those.
        num_open: chains that may still say anything, those included that have not started.
        num_chains: all, of which `share` is asked for.
    """
    if num_finished_for_best + num_open < share * num_chains:
        return True
    return bool(counts) and counts[0] <= (share - FAR_FRAC) * num_chains


def chains_to_ask(ready: Collection[int], thinking: Collection[int]) -> list[int]:
    """The chains that are asked now, all in one pass; none where too few are ready: the others will be.

    Args:
        ready: those that have come to their turn (`next_turn_tokens`).
        thinking: all that may be asked at all, those included.
    """
    return sorted(ready) if ready and len(ready) >= READY_FRAC * len(thinking) else []

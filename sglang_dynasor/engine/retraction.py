"""Which branches give their KV back when the pool runs out (policy/retraction.py), carried out inside SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.live import BranchTag, internal_tag_of
from sglang_dynasor.policy import retraction


def youngest_last(order: list[int], reqs: list[Any]) -> list[int]:
    """SGLang's order of keeping (it retracts from the end), with programs after plain requests, the youngest last."""

    def number(index: int) -> int:
        tag = internal_tag_of(reqs[index])
        return 0 if tag is None else tag.live.number

    return retraction.youngest_last(order, number)


def retract_whole(
    batch: Any, retracted: list[Any], ratio: float, aborted: list[Any]
) -> tuple[list[Any], float, list[Any]]:
    """Retract the siblings of retracted branches too, unless nothing else would run.

    A program does without what asks about one of its branches.
    """
    tags = [internal_tag_of(req) for req in retracted]
    lives = {id(tag.live) for tag in tags if isinstance(tag, BranchTag)}
    if not lives:
        return retracted, ratio, aborted
    assert_same("dynasor retracts the siblings of %s", [req.rid for req in retracted])
    tags = [internal_tag_of(req) for req in batch.reqs]
    siblings = retraction.siblings([None if tag is None else id(tag.live) for tag in tags], lives)
    if siblings:
        kept = [i for i in range(len(batch.reqs)) if i not in set(siblings)]
        for index in siblings:
            req = batch.reqs[index]
            if batch.release_req(index, len(kept)):
                retracted.append(req)
            else:
                req.to_finish = FINISH_ABORT("Retracted under decode memory pressure without a KV backup. Retry later.")
                aborted.append(req)
        batch.filter_batch(keep_indices=kept)
    return retracted, ratio, aborted

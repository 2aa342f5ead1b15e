"""What of ours SGLang holds: Reqs that go in, are counted and charged, and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.live import BranchTag, LiveProgram, SentTag, Tag, generated_tokens, hide, tag_of
from sglang_dynasor.engine.probe import cost_tokens
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.req import end_branch, queue_time
from sglang_dynasor.policy.admission import Admission

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

BRANCH_RID = (
    "\0dynasor-"  # followed by a number and a dot; the front process refuses clients' rids with a NUL (validation.py)
)


class Inside:
    """The way into SGLang and out of it, for branches, judges and probes."""

    def __init__(self, scheduler: Any, front: Front, admission: Admission):
        self.scheduler = scheduler
        self.front = front
        self.admission = admission
        self.num_reqs = 0  # that SGLang holds, also those of programs already answered
        self.num_watched = 0  # of those: somebody reads their logits
        self.num_made = 0

    def new_rid(self) -> str:
        # SGLang aborts by prefix of the rid: no client's rid is a prefix of this one, nor one branch's of another's.
        self.num_made += 1
        return f"{BRANCH_RID}{self.num_made}."

    def put(self, req: Req, tag: Tag) -> None:
        """Queue a Req that the server made."""
        self.enter(tag)
        queue_time(self.scheduler, req)
        self.front.put(req)

    def put_back(self, req: Req) -> None:
        """Queue one that was retracted: it comes back before new work."""
        queue_time(self.scheduler, req)
        self.front.put(req, is_retracted=True)

    def enter(self, tag: Tag) -> None:
        """It is SGLang's from here on."""
        self.num_reqs += 1
        self.num_watched += tag.is_watched

    def leave(self, req: Req, tag: Tag) -> None:
        """It is no longer SGLang's. No harm if it was not before."""
        if tag.is_inside:
            tag.is_inside = False
            self.num_reqs -= 1
            self.num_watched -= tag.is_watched
            tag.keeper.has_left(tag)
            self.admission.note_change()
        if not isinstance(tag, SentTag):
            hide(req)
            self.front.drop(req)
            self.charge(tag, tag.own_tokens(len(req.output_ids)))

    def charge(self, tag: Tag, tokens: int) -> None:
        """Let the service charged for a Req of ours be `tokens`."""
        self.admission.charge(tag.live.gang, tokens - tag.charged_tokens)
        tag.charged_tokens = tokens

    def end(self, req: Req) -> int:
        """End it with what it has; return the tokens it will have cost."""
        if req.finished():
            return generated_tokens(req, len(req.output_ids))
        assert_same("dynasor ends %s at %d tokens", req.rid, len(req.output_ids))
        num_tokens = generated_tokens(req, end_branch(self.scheduler, req))
        tag = tag_of(req)
        if req.finished() and tag is not None:  # it left the queue: no step will show it
            self.leave(req, tag)
        return num_tokens

    def end_probe(self, live: LiveProgram, index: int) -> None:
        """Nobody waits any more for what a branch would answer now."""
        if (probe := live.probes.pop(index, None)) is not None:
            self.end(probe)
            cost, req = cost_tokens(probe), live.reqs.get(index)
            live.program.num_probe_tokens += cost
            tag = None if req is None else tag_of(req)
            if (
                isinstance(tag, BranchTag) and tag.asking is not None and cost
            ):  # where it goes on, as after a retraction
                tag.asking.costs.append(cost)
                tag.asking.is_stale = True

"""Our place in SGLang's waiting_queue: in front of all others.

Only what fits is put there (policy/admission.py). What happens to a request without the field is SGLang's.
"""

from __future__ import annotations

from bisect import insort_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.live import ProbeTag, tag_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class Front:
    """Our Reqs in SGLang's waiting_queue: always its first."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.reqs: dict[Req, bool] = {}  # whether it was retracted
        self._is_new = False  # something was put there since SGLang looked last
        self._stood: list[Req] = []  # ours as they stood, while some step back

    def __len__(self) -> int:
        return len(self.reqs)

    def rank(self, req: Req) -> int:
        """Of a request's priority, the least first; 0 where the server has no priorities."""
        if not self.scheduler.enable_priority_scheduling or req.priority is None:  # None: it was never queued
            return 0
        return req.priority * self.scheduler.policy.priority_sign

    def put(self, req: Req, *, is_retracted: bool = False) -> None:
        """Queue a branch behind ours and before all others; a probe before ours: it is small, and what it finds frees memory."""
        self.scheduler.waiting_queue.insert(0 if isinstance(tag_of(req), ProbeTag) else len(self.reqs), req)
        self.reqs[req] = is_retracted
        self._is_new = True

    def drop(self, req: Req) -> None:
        """It is no longer queued."""
        self.reqs.pop(req, None)

    def sort(
        self, sort_plain: Callable[..., None], waiting_queue: list[Req], running_batch: ScheduleBatch, **kwargs: Any
    ) -> None:
        """Let SGLang's policy order its own requests; our branches stay in front in our order.

        Its deferral of requests that share a prefix would take a gang apart.
        """
        num_ours = len(self.reqs)
        if not num_ours:
            sort_plain(waiting_queue, running_batch, **kwargs)
            return
        ours = waiting_queue[:num_ours]
        del waiting_queue[:num_ours]
        try:
            sort_plain(waiting_queue, running_batch, **kwargs)
        finally:
            waiting_queue[:0] = ours
        # Where nothing runs, who is held back (room.py) must not stand before them: nothing would leave, ever.
        if self.scheduler.enable_priority_scheduling and not running_batch.is_empty():
            self._step_back(waiting_queue, num_ours)

    def _step_back(self, waiting_queue: list[Req], num_ours: int) -> None:
        """Let those that were retracted stand behind plain requests that are more urgent, until SGLang has looked."""
        if len(waiting_queue) == num_ours:
            return
        ours, first = waiting_queue[:num_ours], self.rank(waiting_queue[num_ours])
        late = [req for req in ours if self.reqs[req] and self.rank(req) > first]
        if not late:
            return
        self._stood = ours
        waiting_queue[:num_ours] = [req for req in ours if req not in late]
        for req in reversed(late):  # SGLang has sorted by rank
            insort_left(waiting_queue, req, num_ours - len(late), key=self.rank)

    @property
    def is_pass_due(self) -> bool:
        """Whether SGLang is about to make a prefill pass for us: something is new in front, or a prompt half computed."""
        return self._is_new or self.scheduler.chunked_req is not None

    def open_batch(self, running_batch: ScheduleBatch) -> None:
        """Let SGLang read its queue for what was put in front: that the batch was full spoke of others, for ours room is kept.

        Once only: where ours do not fit either, SGLang is to wait until something leaves, as it does for its own.
        """
        if self._is_new:
            running_batch.batch_is_full = self._is_new = False

    def note_admitted(self, batch: ScheduleBatch | None) -> None:
        """SGLang has taken these into a prefill batch."""
        if self.reqs and batch is not None:
            for req in batch.reqs:
                self.reqs.pop(req, None)
        if self._stood:
            queue = self.scheduler.waiting_queue
            queue[:] = [req for req in self._stood if req in self.reqs] + [req for req in queue if req not in self.reqs]
            self._stood = []

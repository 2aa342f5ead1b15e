"""SGLang's rows and KV tokens, as admission asks for them (policy/admission.py), and its rule for who may take them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from heapq import nlargest, nsmallest
from itertools import islice
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from sglang_dynasor.engine.adapters import Adapter, fit_together, is_any_kept_out
from sglang_dynasor.engine.fence import override
from sglang_dynasor.engine.live import LiveProgram, arrival_of, internal_tag_of
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.policy.admission import Admission, Gang, Waiting
from sglang_dynasor.policy.gang import Cost, Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class SchedulerRoom:
    """SGLang's scheduler as `admission.Engine`. `running_batch` is set in each step, before anything is asked."""

    def __init__(self, scheduler: Any, front: Front, start: Callable[[LiveProgram, int], None]):
        self.scheduler = scheduler
        self.front = front
        self.whole = Room(scheduler.max_running_requests, scheduler.max_total_num_tokens)
        self.shares_prompts = not scheduler.tree_cache.disable
        self.running_batch: ScheduleBatch | None = None
        self._start = start

    @property
    def _running(self) -> ScheduleBatch:
        assert self.running_batch is not None
        return self.running_batch

    @property
    def is_empty(self) -> bool:
        return self._running.is_empty() and not self.front.reqs and self.scheduler.chunked_req is None

    @property
    def free_rows(self) -> int:
        running = self._running
        rows = self.scheduler.get_num_allocatable_reqs(len(running.reqs), running_batch=running)
        return rows - len(self.front)

    @property
    def free_tokens(self) -> int:
        """Counted as SGLang's PrefillAdder counts them."""
        scheduler = self.scheduler
        ratio = scheduler.new_token_ratio_tracker.current
        running = sum(
            tokens_left(req) * (1.0 if req.sampling_params.ignore_eos else ratio) for req in self._running.reqs
        )
        queued = sum(self._cost(req).tokens(1) for req in self.front.reqs)
        if (chunked := scheduler.chunked_req) is not None:
            queued += self._cost(chunked).tokens(1)
        budget = scheduler.token_to_kv_pool_allocator.create_prefill_budget(scheduler.tree_cache)
        return int(budget.remaining_total - running) - queued

    @property
    def num_branches(self) -> int:
        return sum(internal_tag_of(req) is not None for req in self._running.reqs) + len(self.front)

    @property
    def num_plain_waiting(self) -> int:
        return len(self.scheduler.waiting_queue) - len(self.front)

    @property
    def is_short_of_adapters(self) -> bool:
        """Whether SGLang would pass over one of ours in its queue, until who runs with other adapters has left."""
        return self.scheduler.enable_lora and is_any_kept_out(
            self.scheduler, self._running_adapters(), (req.lora_id for req in self.front.reqs)
        )

    @property
    def kept_out_rank(self) -> float:
        """The rank from which on plain requests leave adapters' places to ours, which wait for one; infinite: none does."""
        return min(map(self.rank, self.front.reqs)) if self.is_short_of_adapters else inf

    def has_adapter_room(self, gang: Gang) -> bool:
        if not self.scheduler.enable_lora:
            return True
        if self.is_short_of_adapters:  # who went before this one waits for an adapter's place
            return False
        adapter = gang.owner.parent.lora_id
        there = {*self._running_adapters(), *(req.lora_id for req in self.front.reqs)}
        return adapter in there or fit_together(self.scheduler, there | {adapter})

    def _running_adapters(self) -> Iterator[Adapter]:
        """As SGLang counts them: who has finished stays in the batch while prompts are computed, and needs no place."""
        chunked = self.scheduler.chunked_req
        running = (*self._running.reqs, *(() if chunked is None else (chunked,)))
        return (req.lora_id for req in running if not req.finished())

    def waiting(self, num: int) -> Iterator[Waiting]:
        plain = islice(self.scheduler.waiting_queue, len(self.front), None)
        if self.scheduler.enable_priority_scheduling:  # SGLang sorts when it looks, and new ones came since
            first = nsmallest if self.scheduler.policy.priority_sign > 0 else nlargest
            plain = first(num, plain, key=attrgetter("priority"))  # it may be long: nothing of ours for each
        for req in islice(plain, num):
            yield Waiting(arrival_of(req), req.sampling_params.max_new_tokens, self._cost(req), self.rank(req))

    def rank(self, req: Req) -> int:
        return self.front.rank(req)

    def progress_tokens(self, gang: Gang) -> int:
        return sum(len(req.output_ids) for req in gang.owner.in_flight())

    def start(self, gang: Gang, num_branches: int) -> None:
        self._start(gang.owner, num_branches)

    def gang_cost(self, parent: Req) -> Cost:
        """What branches of a program take, whose prompt nobody holds yet."""
        cost = branch_cost(parent, self.scheduler.page_size, is_cached=False)
        if self.shares_prompts and not computes_prompt(parent):
            return cost
        return Cost(0, cost.tokens(1))

    def holds_back(self, admission: Admission) -> bool:
        """Whether SGLang would look through its queue for nothing, and again in each step: all that is there waits for its turn."""
        scheduler = self.scheduler
        if self.front.reqs or scheduler.chunked_req is not None or scheduler.grammar_manager.has_waiting_grammars():
            return False
        return scheduler.prefill_delayer is None and admission.plain_rows == 0

    def _cost(self, req: Req) -> Cost:
        """What SGLang will ask for to admit one request by itself."""
        tag = internal_tag_of(req)
        is_cached = tag is not None and tag.live.gang.is_prompt_cached and not req.output_ids and self.shares_prompts
        return branch_cost(req, self.scheduler.page_size, is_cached=is_cached and not computes_prompt(req))


def tokens_left(req: Req) -> int:
    """Tokens that a request may still generate, clipped as SGLang clips its reservation."""
    most = req.sampling_params.max_new_tokens
    assert most is not None  # SGLang sets it when the request comes
    return max(0, min(most - len(req.output_ids), CLIP_MAX_NEW_TOKENS))


def computes_prompt(req: Req) -> bool:
    """Whether a request computes tokens of its prompt that the cache has: their log-probabilities are asked for."""
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids) - 1


def branch_cost(req: Req, page_size: int, *, is_cached: bool) -> Cost:
    """Tokens of a request's prompt (with what it generated before a retraction), and of what it may still generate.

    Two pages on top: SGLang reserves one, and a cached prompt is found up to a page's start.
    """
    num_tokens = 0 if is_cached else len(req.origin_input_ids) + len(req.output_ids)
    return Cost(num_tokens, tokens_left(req) + 2 * page_size)


@lru_cache(maxsize=1)
def adder_class(base: type[PrefillAdder], room: SchedulerRoom, admission: Admission) -> type[PrefillAdder]:
    """A subclass of SGLang's PrefillAdder that leaves alone what is promised to gangs."""

    def open_pass(original: Callable[..., None], adder: Any, *args: Any, **kwargs: Any) -> None:
        original(adder, *args, **kwargs)
        room.running_batch = adder.running_batch
        adder.num_plain_left = admission.plain_rows
        adder.latest_plain = min((admission.last_rank, admission.latest_plain), (room.kept_out_rank, -1))
        adder.memory_budget.total_offset += admission.promised_tokens

    def add(original: Callable[..., AddReqResult], adder: Any, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
        if internal_tag_of(req) is not None:
            # Where nothing runs, a promise to those behind it must not hold it back: nothing would leave, ever.
            lifted = 0 if adder.running_batch.reqs or adder.can_run_list else admission.promised_tokens
            adder.memory_budget.total_offset -= lifted
            try:
                return original(adder, req, *args, **kwargs)
            finally:
                adder.memory_budget.total_offset += lifted
        if adder.num_plain_left == 0 or (room.rank(req), arrival_of(req)) > adder.latest_plain:
            return AddReqResult.OTHER
        num_before = len(adder.can_run_list)
        result = original(adder, req, *args, **kwargs)
        if adder.num_plain_left is not None:
            adder.num_plain_left -= len(adder.can_run_list) - num_before
        return result

    class ProgramAdder(base):
        num_plain_left: int | None = None  # None: as many as fit
        latest_plain: tuple[float, float] = inf, inf  # rank and arrival
        __init__ = override(base.__init__, open_pass)  # pyright: ignore[reportAssignmentType]
        add_one_req = override(base.add_one_req, add)

    return ProgramAdder

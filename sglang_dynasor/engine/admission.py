"""Which waiting programs start in this step: SGLang's rows and KV tokens, shared out by the pure policy.

Programs wait here, not in SGLang's waiting_queue: only branches that fit are put there, in front. What happens to a
request without the field is SGLang's, except that it does not take room promised to a gang.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder
from sglang.srt.mem_cache.common import touch_waiting_prefix
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.branch import arrival_of, is_internal, set_arrival, tag_of
from sglang_dynasor.policy.allocation import fair_share
from sglang_dynasor.policy.forecast import Forecast
from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.look import Offer, look
from sglang_dynasor.policy.order import Order, Plain, Ticket

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_dynasor.engine.controller import LiveProgram
    from sglang_dynasor.policy.program import Program

THOUGHTS_PER_ROW = 8
LOOK_EVERY = 16  # steps after which waiting programs are looked at though nothing finished: estimates of room change


class Admission:
    """The line of one scheduler, and the room in its engine."""

    def __init__(self, scheduler: Any, config: DynasorConfig, start: Callable[[LiveProgram, int], None]):
        self.scheduler = scheduler
        self.start = start  # makes and queues branches of a program
        self.fixed_width = config.dynasor_width
        pool_tokens = scheduler.max_total_num_tokens
        patience = pool_tokens if config.dynasor_patience_tokens < 0 else config.dynasor_patience_tokens
        self.order = Order(patience, config.tenant_weights)
        self.forecast = Forecast()
        self.engine = Room(scheduler.max_running_requests, pool_tokens)  # as if it were empty
        self.cheap_rows = self.engine.rows  # that a step carries nearly for free (pace.py): the first rank tells
        self.front: dict[Req, None] = {}  # our branches in SGLang's waiting_queue: always its first
        self.promised: dict[LiveProgram, int] = {}  # siblings that follow once their leader has cached the prompt
        self.is_plain_due = True  # whether plain requests may start as far as room goes, after the last look
        self.num_expected = 0  # branches, of all live programs
        self.num_thoughts = 0  # running branches that are asked for their answer now and then
        self.num_probes = 0  # that ask one now
        self.max_overtaken_tokens = 0
        self._is_stale = False
        self._is_front_new = False
        self._num_steps = 0

    # The line

    def arrive(self, live: LiveProgram) -> Ticket:
        return self.order.arrive(live.program.spec.tenant, live)

    def wait(self, live: LiveProgram) -> None:
        """Let a program that wants branches stand in line, or move in it."""
        progress = sum(len(req.output_ids) for req in live.in_flight())
        self.order.wait(live.ticket, self.forecast.remaining_tokens(live.program, progress))
        self._is_stale = True

    def expect(self, live: LiveProgram) -> None:
        """Count the branches that the program still needs, as far as is known now: programs share rows by them."""
        self._expect(live, round(self.forecast.branches(live.program)))

    def follow(self, live: LiveProgram) -> None:
        """Start the siblings that were promised to follow their leader."""
        num_branches = min(self.promised.pop(live, 0), live.program.num_unused)
        if num_branches:
            self.start(live, num_branches)

    def leave(self, live: LiveProgram) -> None:
        """The program is over."""
        self.promised.pop(live, None)
        self._expect(live, 0)
        self.order.end(live.ticket)
        self._is_stale = True

    def note_arrival(self, req: Req) -> None:
        """Remember when a request that is no program came, if programs are there to compare with."""
        if self.order.num_alive:
            set_arrival(req, self.order.line("").arrive())
            self._is_stale |= not self.is_plain_due  # it may be its turn, though it was nobody's at the last look

    def note_finish(self, req: Req) -> None:
        """A request that is no program has finished: its rows are free, and it was served."""
        self.forecast.plain_tokens.learn(len(req.output_ids))
        self.note_loss(req)

    def note_loss(self, req: Req) -> None:
        """A request that is no program has left, whatever came of it."""
        self._is_stale = True
        if arrival := arrival_of(req):
            num_tokens = len(req.origin_input_ids) + len(req.output_ids)
            self.order.charge_arrival(self.order.line(""), arrival, num_tokens)

    def note_change(self) -> None:
        """Something of ours has left the engine: look at the line in the next step."""
        self._is_stale = True

    # SGLang's queue

    def put_in_front(self, req: Req) -> None:
        """Queue a branch behind ours and before all others; a probe before ours: it is small, and what it finds frees memory."""
        tag = tag_of(req)
        self.scheduler.waiting_queue.insert(0 if tag is not None and tag.is_probe else len(self.front), req)
        self.front[req] = None
        self._is_front_new = True

    def sort(self, sort_plain: Callable[..., None], waiting_queue: list[Req], *args: Any, **kwargs: Any) -> None:
        """Let SGLang's policy order its own requests; our branches stay in front in our order.

        Its deferral of requests that share a prefix would take a gang apart.
        """
        num_ours = len(self.front)
        if not num_ours:
            sort_plain(waiting_queue, *args, **kwargs)
            return
        ours = waiting_queue[:num_ours]
        del waiting_queue[:num_ours]
        try:
            sort_plain(waiting_queue, *args, **kwargs)
        finally:
            waiting_queue[:0] = ours

    @property
    def is_pass_due(self) -> bool:
        """Whether SGLang is about to make a prefill pass for us: something is new in front, or a prompt half computed."""
        return self._is_front_new or self.scheduler.chunked_req is not None

    def open_batch(self, running_batch: ScheduleBatch) -> None:
        """Let SGLang read its queue for what was put in front: that the batch was full spoke of others, for ours room is kept.

        Once only: where ours do not fit either, SGLang is to wait until something leaves, as it does for its own.
        """
        if self._is_front_new:
            running_batch.batch_is_full = self._is_front_new = False

    def note_admitted(self, batch: ScheduleBatch | None) -> None:
        """SGLang has taken these into a prefill batch."""
        if self.front and batch is not None:
            for req in batch.reqs:
                self.front.pop(req, None)

    def plain_rows(self, running_batch: ScheduleBatch) -> int | None:
        """Plain requests that this pass may admit; None: as many as SGLang finds room for."""
        if not self.is_plain_due:
            return 0
        if not (self.promised or self.probe_rows):
            return None
        scheduler = self.scheduler
        rows = scheduler.get_num_allocatable_reqs(len(running_batch.reqs), running_batch=running_batch)
        return max(0, rows - len(self.front) - sum(self.promised.values()) - self.probe_rows)

    def holds_back(self, running_batch: ScheduleBatch) -> bool:
        """Whether SGLang would look through its queue for nothing, and again in each step: all that is there waits for its turn."""
        scheduler = self.scheduler
        if self.front or scheduler.chunked_req is not None or scheduler.grammar_manager.has_waiting_grammars():
            return False
        return scheduler.prefill_delayer is None and self.plain_rows(running_batch) == 0

    def latest_plain(self) -> float:
        """The arrival up to which plain requests may start: that of the program they would overtake beyond patience."""
        order = self.order
        oldest = order.line("").oldest() if order.num_waiting else None
        return oldest.arrival if oldest is not None and order.is_overdue(oldest) else inf

    @property
    def probe_rows(self) -> int:
        """Rows kept free for probes, which would starve in a full batch: one for every THOUGHTS_PER_ROW thoughts."""
        return max(0, -(-self.num_thoughts // THOUGHTS_PER_ROW) - self.num_probes)

    @property
    def promised_tokens(self) -> int:
        return sum(num * self._gang_cost(live).branch_tokens for live, num in self.promised.items())

    def _expect(self, live: LiveProgram, num_branches: int) -> None:
        self.num_expected += num_branches - live.num_expected
        live.num_expected = num_branches

    # One look

    def look(self, running_batch: ScheduleBatch) -> None:
        """Start the waiting programs that fit, in order. Called once per step, before SGLang fills its prefill batch."""
        if not self.order.num_waiting:
            self.is_plain_due = True
            return
        self._num_steps += 1
        is_empty = running_batch.is_empty() and not self.front and self.scheduler.chunked_req is None
        if not (self._is_stale or is_empty or self._num_steps >= LOOK_EVERY):
            return
        self._is_stale, self._num_steps = False, 0
        room = self._room(running_batch)
        if room.rows <= 0:
            return
        num_rows = room.rows + self._num_rows_ours(running_batch)
        self.is_plain_due, head = look(
            self.order,
            room,
            self.engine,
            plain=self._plain(),
            is_empty=is_empty,
            offer=lambda ticket: self._offer(ticket.owner, num_rows),
            start=lambda ticket, num: self._admit(ticket.owner, num),
            set_aside_plain=self._set_aside_plain,
        )
        if head is not None:  # its prompt is used next: the radix cache evicts others first
            touch_waiting_prefix(head.owner.parent, self.scheduler.tree_cache)

    def _offer(self, live: LiveProgram, num_rows: int) -> Offer:
        program = live.program
        wanted, least = program.num_to_start(self._width(live, num_rows), is_fixed=self.fixed_width > 0)
        if self._takes_all(program):
            wanted = program.num_to_start(program.spec.branches)[0] - self.promised.get(live, 0)
        return Offer(wanted, least, self._gang_cost(live))

    def _admit(self, live: LiveProgram, num: int) -> None:
        program, ticket = live.program, live.ticket
        assert live.parent is not None
        assert_same("dynasor admits %d of program %s", num, program.id)
        program.overtaken_tokens = self.order.overtaken_tokens(ticket)
        self.max_overtaken_tokens = max(self.max_overtaken_tokens, program.overtaken_tokens)
        if not ticket.is_started:
            ticket.is_started, program.gang = True, num
            self.order.charge(ticket, len(live.parent.origin_input_ids))
        if self._shares_prompts and not program.num_in_flight:
            live.is_prompt_cached = False  # nobody holds its KV: it may have been evicted since
        if live.is_prompt_cached:
            self.start(live, num)
        else:  # one computes the prompt, the others find it in the cache
            num_leaders = 0 if program.num_in_flight else 1
            if num_following := num - num_leaders:
                self.promised[live] = self.promised.get(live, 0) + num_following
            if num_leaders:
                self.start(live, num_leaders)
        if self._takes_all(program) and program.num_unused > self.promised.get(live, 0):
            self.wait(live)  # for the others

    def _takes_all(self, program: Program) -> bool:
        """Whether load does not narrow it: no branch can be saved, so each is started as soon as there is room.

        Not thoughts: they end early whatever the vote, and leave rows to their probes.
        """
        return program.needs_all and program.spec.thought is None and not self.fixed_width

    def _width(self, live: LiveProgram, num_rows: int) -> int:
        """Branches that one program may have in flight under the present load."""
        if self.fixed_width:
            return self.fixed_width
        num_fitting = int(self.engine.tokens / max(1.0, self.forecast.length_tokens(live.program)))
        if live.program.spec.thought is not None:  # some are left for its probes
            num_rows = num_rows * THOUGHTS_PER_ROW // (THOUGHTS_PER_ROW + 1)
        return fair_share(min(num_rows, num_fitting, self.cheap_rows), live.num_expected, self.num_expected)

    def _room(self, running_batch: ScheduleBatch) -> Room:
        """Rows and KV tokens promised to nobody, counted as SGLang's PrefillAdder counts them."""
        scheduler = self.scheduler
        rows = scheduler.get_num_allocatable_reqs(len(running_batch.reqs), running_batch=running_batch)
        rows -= len(self.front) + sum(self.promised.values()) + self.probe_rows
        if rows <= 0:
            return Room(0, 0)
        ratio = scheduler.new_token_ratio_tracker.current
        running = sum(
            tokens_left(req) * (1.0 if req.sampling_params.ignore_eos else ratio) for req in running_batch.reqs
        )
        queued = sum(self._cost(req).tokens(1) for req in self.front)
        if (chunked := scheduler.chunked_req) is not None:
            queued += self._cost(chunked).tokens(1)
        budget = scheduler.token_to_kv_pool_allocator.create_prefill_budget(scheduler.tree_cache)
        return Room(rows, int(budget.remaining_total - running) - queued - self.promised_tokens)

    def _num_rows_ours(self, running_batch: ScheduleBatch) -> int:
        inside = sum(is_internal(req) for req in running_batch.reqs)
        return inside + len(self.front) + sum(self.promised.values())

    def _cost(self, req: Req) -> Cost:
        """What SGLang will ask for to admit one request by itself."""
        tag = tag_of(req)
        is_cached = tag is not None and tag.live.is_prompt_cached and not req.output_ids and self._shares_prompts
        return branch_cost(req, self.scheduler.page_size, is_cached=is_cached and not computes_prompt(req))

    def _gang_cost(self, live: LiveProgram) -> Cost:
        """What more branches of a program take; its prompt is there while one is in flight."""
        assert live.parent is not None
        if not self._shares_prompts or computes_prompt(live.parent):
            return Cost(0, self._cost(live.parent).tokens(1))
        is_there = live.is_prompt_cached and live.program.num_in_flight > 0
        return branch_cost(live.parent, self.scheduler.page_size, is_cached=is_there)

    @property
    def _shares_prompts(self) -> bool:
        return not self.scheduler.tree_cache.disable

    def _plain(self) -> Plain | None:
        queue = self.scheduler.waiting_queue
        if len(queue) == len(self.front):
            return None
        first = queue[len(self.front)]
        expected = min(self.forecast.plain_tokens.value, first.sampling_params.max_new_tokens)
        return Plain(self.order.line(""), arrival_of(first), expected)

    def _set_aside_plain(self, room: Room) -> None:
        for req in islice(self.scheduler.waiting_queue, len(self.front), len(self.front) + max(0, room.rows)):
            room.take(self._cost(req), 1)


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
def adder_class(base: type[PrefillAdder], admission: Admission) -> type[PrefillAdder]:
    """A subclass of SGLang's PrefillAdder that leaves alone what is promised to gangs."""

    class ProgramAdder(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_plain_left = admission.plain_rows(self.running_batch)
            self.latest_plain = admission.latest_plain()
            self.memory_budget.total_offset += admission.promised_tokens

        def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            if is_internal(req):
                return super().add_one_req(req, has_chunked_req, truncation_align_size)
            if self.num_plain_left == 0 or arrival_of(req) > self.latest_plain:
                return AddReqResult.OTHER
            num_before = len(self.can_run_list)
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if self.num_plain_left is not None:
                self.num_plain_left -= len(self.can_run_list) - num_before
            return result

    return ProgramAdder

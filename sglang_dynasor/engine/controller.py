"""One scheduler's programs: what SGLang's scheduler calls, handed to whose concern it is.

Every tensor-parallel rank runs this in lockstep on what is equal on all ranks (token ids, the first rank's statistics), so
each decides the same without a message. Only `due` reads a clock: on the first rank, whose word SGLang broadcasts. With SGLang's
SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1 every decision is compared between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.common import touch_waiting_prefix
from sglang.srt.runtime_context import get_device, get_parallel
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.branches import Branches, SentBranches
from sglang_dynasor.engine.control import Control
from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.fence import Fence, guarded
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.intake import Intake
from sglang_dynasor.engine.live import BranchTag, LiveProgram, SentTag, arrival_of, tag_of
from sglang_dynasor.engine.messages import Told
from sglang_dynasor.engine.meter import Meter
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.req import FINISH_ENDED, refusal
from sglang_dynasor.engine.room import SchedulerRoom
from sglang_dynasor.engine.slots import Slots, share_out
from sglang_dynasor.engine.statistics import Observer
from sglang_dynasor.engine.teller import Teller
from sglang_dynasor.engine.voting import Voting
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.policy.admission import Admission
from sglang_dynasor.policy.program import StopReason


class Controller:
    """Made when SGLang has sized its pools."""

    def __init__(self, scheduler: Any, config: DynasorConfig, fence: Fence):
        parallel = get_parallel()
        # Whether SGLang lets this rank read the clock (`_poll_timeout_aborts`).
        is_first_rank = parallel.pp_rank == parallel.attn_tp_rank == parallel.attn_cp_rank == 0
        self.scheduler = scheduler
        self.config = config
        self.fence = fence
        vocab_size = scheduler.model_config.vocab_size
        memory = share_out(config.dynasor_statistics_mib, vocab_size)
        self.slots = Slots(memory.num_slots)
        self.programs = Programs(self.slots)
        self.teller = Teller(scheduler, config)
        self.front = Front(scheduler)
        self.room = SchedulerRoom(scheduler, self.front, self._start)
        patience_tokens = config.dynasor_patience_tokens
        self.admission = Admission(
            self.room,
            self.room.whole.tokens if patience_tokens < 0 else patience_tokens,
            config.tenant_weights,
            config.dynasor_width,
            config.dynasor_max_price,
        )
        self.inside = Inside(scheduler, self.front, self.admission)
        voting = Voting(scheduler.tokenizer, self.admission.forecast, fence)
        self.ends = Ends(
            scheduler, self.inside, self.programs, voting, self.teller.rewards, self.teller.findings, fence
        )
        watch = Watch(scheduler.tokenizer, self.inside, self.ends, self.slots)
        self.observer = Observer(watch, memory, vocab_size)
        teller = self.teller if is_first_rank else None
        rewards, findings = (teller.rewards, teller.findings) if teller is not None else (None, None)
        self.branches = Branches(scheduler, self.inside, self.ends, voting, watch, rewards, findings)
        self.intake = Intake(
            self.room, self.inside, self.ends, self.branches, SentBranches(self.ends, voting, self.branches.readings, self.slots), teller,
            config.dynasor_max_branches, config.dynasor_level,
        )  # fmt: skip
        self.control = Control(self)
        self.sleeps_when_idle = (
            get_device().sleep_on_idle
        )  # the first rank alone sleeps; what follows from it is for all

    @property
    def is_idle(self) -> bool:
        """Whether nothing of ours is in the engine: then nothing of ours runs in a step."""
        return not self.inside.num_reqs and not self.programs.held and not self.branches.readings

    def status(self) -> dict[str, Any]:
        """Counters and table sizes (observe/ledger.py says what each means)."""
        thoughts, comparing = self.branches.thoughts, self.branches.comparing
        return {
            **self.ends.totals.as_dict(),
            "num_policy_errors": self.fence.num,
            "num_fresh_starts": self.fence.num_fresh_starts,
            "is_aside": int(self.fence.is_aside),
            "num_held_programs": len(self.programs.held),
            "num_waiting_programs": self.admission.order.num_waiting,
            "num_budgets": len(self.admission.budgets.by_id),
            "num_client_programs": len(self.programs.sent),
            "num_branches_inside": self.inside.num_reqs + len(self.fence.orphans),
            "num_branches_queued": len(self.front),
            "num_branches_promised": sum(self.admission.promised.values()),
            "num_branches_expected": self.admission.queued.num_branches,
            "fixed_rows": self.admission.fixed_rows,
            "max_overtaken_tokens": self.admission.max_overtaken_tokens,
            "patience_tokens": self.admission.order.patience_tokens,
            "price": self.admission.price if self.programs.held else 0.0,
            "num_branches_watched": self.inside.num_watched,
            "num_steps_watched": self.observer.num_steps,
            "num_answer_slots": self.slots.num - len(self.slots.free),
            "num_answers_without_slot": self.slots.num_without,
            "num_reward_errors": self.teller.rewards.num_errors,
            "num_comparisons": comparing.num,
            "num_merges": comparing.num_merges,
            "num_comparison_errors": comparing.num_lost + self.teller.findings.num_errors,
            "num_probe_waves": thoughts.num_waves,
            "num_probe_tokens_read": thoughts.num_tokens_read,
            "num_probe_tokens_cached": thoughts.num_tokens_cached,
            "num_looks": self.control.num_looks,
        }

    def measure(self, collector: Any) -> None:
        """Count programs beside SGLang's own metrics."""
        order = self.admission.order
        self.ends.meter = Meter(collector, order.weights, order.patience_tokens)

    def report(self, stats: Any) -> None:
        """SGLang is about to set its gauges: what waits here counts as queued, and ours are set."""
        stats.num_queue_reqs.total = len(self.scheduler.waiting_queue) + self.admission.queued.num_branches
        if self.ends.meter is not None:
            self.ends.meter.report(self.status())

    def take(self, enqueue: Callable[..., None], req: Req, is_retracted: bool) -> None:
        """SGLang queues a request."""
        tag = tag_of(req)
        if tag is None or isinstance(tag, SentTag):
            self.intake.take(enqueue, req, is_retracted)
        elif not self.intake.take_back(req):
            self.on_output([req])

    def _start(self, live: LiveProgram, num_branches: int) -> None:
        self.branches.start(live, num_branches)

    @guarded("admit")  # by itself: what SGLang then takes of its queue is noted all the same
    def admit(self, running_batch: Any) -> None:
        """Start what fits, before SGLang fills its next prefill batch."""
        thoughts = self.branches.thoughts
        self.room.running_batch = running_batch
        # An engine that sleeps when it is idle would sleep over what waits.
        sleeps = self.sleeps_when_idle and running_batch.is_empty()
        self.branches.readings.open_step(has_bound=not sleeps)
        thoughts.make_due()
        while ended := self.admission.share_out():
            for gang in ended:
                self.ends.guarded(gang.owner, self.ends.answer)
            if not sleeps:
                break
        head = self.admission.look()
        if head is not None:  # its prompt is used next: the radix cache evicts others first
            touch_waiting_prefix(head.owner.parent, self.scheduler.tree_cache)
        thoughts.send()
        self.front.open_batch(running_batch)

    @property
    def holds_back(self) -> bool:
        """Whether SGLang need not look for a prefill batch in this step."""
        return self.room.holds_back(self.admission)

    def on_output(self, reqs: list[Req]) -> list[Req]:
        """Take what is ours out of a step's requests; return those that go to clients now."""
        visible: list[Req] = []
        for req in reqs:
            tag = tag_of(req)
            # Runs for every branch in every step, and for most there is nothing to do.
            if (
                req.finished_reason is None
                and type(tag) is BranchTag
                and tag.asking is None
                and tag.live.gang.is_prompt_cached
            ):
                continue
            if tag is None or isinstance(tag, SentTag):
                visible.append(req)
                if req.finished_reason is not None and not req.finished_output:
                    self.admission.forecast.plain_tokens.learn(len(req.output_ids))
                    self._note_departure(req)
            if tag is None:
                continue
            try:
                if not req.finished():
                    tag.keeper.has_output(req, tag)
                # With overlap a finished request comes by twice, and may be about to speak the second time: hidden, it would not.
                elif tag.is_inside and not req.finished_output:
                    self.inside.leave(req, tag)
                    tag.keeper.has_ended(req, tag)
            except Exception as error:
                self.ends.surrender(tag.live, error)
        return visible

    def on_aborted(self, abort: AbortReq, req: Req) -> bool:
        """SGLang gave up a request outside the output (time-out, full queue). Returns whether no client must be told."""
        tag = tag_of(req)
        if tag is None:
            self._note_departure(req)
            return False
        is_internal = not isinstance(tag, SentTag)
        if is_internal and not req.finished():
            req.finished_reason = FINISH_ENDED()  # a batch under way may still show it: then it is passed over
        self.inside.leave(req, tag)
        self.ends.guarded(tag.live, lambda live: tag.keeper.is_lost(req, tag, abort))
        return is_internal

    def _note_departure(self, req: Req) -> None:
        has_run = bool(req.output_ids) or req.extend_batch_idx > 0  # else nobody has been given anything for it
        num_tokens = len(req.origin_input_ids) + len(req.output_ids) if has_run else 0
        self.admission.note_departure(arrival_of(req), num_tokens, self.room.rank(req))

    def abort(self, abort: AbortReq) -> None:
        """A client gave up."""
        for rid, live in list(self.programs.held.items()):
            if abort.abort_all or rid.startswith(abort.rid or ""):
                self.ends.guarded(live, lambda live: self.ends.abort(live, abort.finished_reason))

    # What the first rank tells

    def due(self) -> list[Told | AbortReq]:
        """What time has brought about. Only on the first rank; SGLang broadcasts it with the next requests."""
        due: list[Told | AbortReq] = list(
            self.teller.due(self.programs.numbered.__contains__, self.admission.fixed_rows)
        )
        if (limit_s := envs.SGLANG_REQ_WAITING_TIMEOUT.get()) > 0:
            due += self._waited_too_long(time.perf_counter() - limit_s)
        if self.scheduler._engine_paused and self.branches.readings:  # no step comes that would read
            due.append(Told(what="read"))
        return due

    def _waited_too_long(self, since: float) -> list[AbortReq]:
        """As SGLang's own time-out, for programs that wait here instead of in its queue."""
        reason = refusal("Request waiting timeout reached.")
        return [
            AbortReq(rid=rid, finished_reason=reason)
            for rid, live in self.programs.held.items()
            if live.parent is not None
            and not live.gang.ticket.is_started
            and 0 < live.parent.time_stats.wait_queue_entry_time < since
        ]

    def hear(self, told: Told) -> None:
        """Act on what the first rank tells (teller.py)."""
        assert_same("dynasor hears %s", told)
        what, parts = told.what, told.parts
        if what == "fixed_rows":
            (self.admission.fixed_rows,) = parts
            return
        if what == "read":
            self.branches.readings.open_step()
            return
        number, *rest = parts
        live = self.programs.numbered.get(number)
        if what == "reward":
            self.teller.rewards.forget((number, rest[0]))
            if live is not None:
                self.ends.guarded(live, lambda live: self.branches.judging.settle(live, *rest))
        elif what == "same":
            self.teller.findings.forget((number, rest[0]))
            if live is not None:
                self.ends.guarded(live, lambda live: self.branches.comparing.settle(live, *rest))
        elif live is not None:
            self.ends.guarded(live, lambda live: self.branches.close(live, StopReason.DEADLINE))

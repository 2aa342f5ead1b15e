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
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.branches import Branches, SentBranches
from sglang_dynasor.engine.ends import Ends, refusal
from sglang_dynasor.engine.faults import Faults
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.intake import Intake
from sglang_dynasor.engine.live import BranchTag, LiveProgram, SentTag, arrival_of, tag_of
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.req import FINISH_ENDED
from sglang_dynasor.engine.room import SchedulerRoom
from sglang_dynasor.engine.statistics import Observer
from sglang_dynasor.engine.teller import TOLD_RID, Teller
from sglang_dynasor.engine.voting import Voting
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.policy.admission import Admission


class Controller:
    """Made when SGLang has sized its pools."""

    def __init__(self, scheduler: Any, config: DynasorConfig):
        parallel = get_parallel()
        # Whether SGLang lets this rank read the clock (`_poll_timeout_aborts`).
        is_first_rank = parallel.pp_rank == parallel.attn_tp_rank == parallel.attn_cp_rank == 0
        self.scheduler = scheduler
        self.faults = Faults(config.dynasor_strict)
        self.programs = Programs()
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
        voting = Voting(scheduler.tokenizer, self.admission.forecast, self.faults)
        self.ends = Ends(
            scheduler, self.inside, self.programs, voting, self.teller.rewards, self.teller.findings, self.faults
        )
        watch = Watch(scheduler.tokenizer, self.inside, self.ends)
        self.observer = Observer(watch)
        teller = self.teller if is_first_rank else None
        rewards, findings = (teller.rewards, teller.findings) if teller is not None else (None, None)
        self.branches = Branches(scheduler, self.inside, self.ends, voting, watch, rewards, findings)
        self.intake = Intake(
            self.room, self.inside, self.ends, self.branches, SentBranches(self.ends, voting, self.branches.readings), teller,
            config.dynasor_max_branches, config.dynasor_level,
        )  # fmt: skip

    @property
    def is_idle(self) -> bool:
        """Whether nothing of ours is in the engine: then nothing of ours runs in a step."""
        return not self.inside.num_reqs and not self.programs.held and not self.branches.readings

    def status(self) -> dict[str, Any]:
        """Counters and table sizes (observe/ledger.py says what each means)."""
        thoughts, comparing = self.branches.thoughts, self.branches.comparing
        return {
            **self.ends.totals.as_dict(),
            "num_policy_errors": self.faults.num,
            "num_held_programs": len(self.programs.held),
            "num_waiting_programs": self.admission.order.num_waiting,
            "num_budgets": len(self.admission.budgets.by_id),
            "num_client_programs": len(self.programs.sent),
            "num_branches_inside": self.inside.num_reqs,
            "num_branches_queued": len(self.front),
            "num_branches_promised": sum(self.admission.promised.values()),
            "fixed_rows": self.admission.fixed_rows,
            "max_overtaken_tokens": self.admission.max_overtaken_tokens,
            "num_branches_watched": self.inside.num_watched,
            "num_steps_watched": self.observer.num_steps,
            "num_reward_errors": self.teller.rewards.num_errors,
            "num_comparisons": comparing.num,
            "num_merges": comparing.num_merges,
            "num_comparison_errors": comparing.num_lost + self.teller.findings.num_errors,
            "num_probe_waves": thoughts.num_waves,
            "num_probe_tokens_read": thoughts.num_tokens_read,
            "num_probe_tokens_cached": thoughts.num_tokens_cached,
        }

    def take(self, enqueue: Callable[..., None], req: Req, is_retracted: bool) -> None:
        """SGLang queues a request."""
        tag = tag_of(req)
        if tag is None or isinstance(tag, SentTag):
            self.intake.take(enqueue, req, is_retracted)
        elif not self.intake.take_back(req):
            self.on_output([req])

    def _start(self, live: LiveProgram, num_branches: int) -> None:
        self.branches.start(live, num_branches)

    def admit(self, running_batch: Any) -> None:
        """Start what fits, before SGLang fills its next prefill batch."""
        thoughts = self.branches.thoughts
        self.room.running_batch = running_batch
        # An engine that sleeps when it is idle would sleep over what waits.
        self.branches.readings.open_step(has_bound=self.scheduler.idle_sleeper is None or not running_batch.is_empty())
        thoughts.make_due()
        try:
            for gang in self.admission.share_out():
                self.ends.guarded(gang.owner, self.ends.answer)
            head = self.admission.look()
            if head is not None:  # its prompt is used next: the radix cache evicts others first
                touch_waiting_prefix(head.owner.parent, self.scheduler.tree_cache)
        except Exception as error:
            self.faults.fall_back("admission", error)
            self._let_all_in()
        thoughts.send()
        self.front.open_batch(running_batch)

    def _let_all_in(self) -> None:
        """As stock would: everything waits in SGLang's queue, in order of arrival."""
        self.admission.is_plain_due = True
        for live in list(self.programs.held.values()):
            live.program.granted = None  # nobody could grant it more
            if not any(live.in_flight()):
                self.admission.stop_waiting(live.gang)
                self._start(live, live.program.num_unused)

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
                elif not req.finished_output:  # with overlap a finished request comes by twice
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
        self.admission.note_departure(arrival_of(req), len(req.origin_input_ids) + len(req.output_ids))

    def abort(self, abort: AbortReq) -> None:
        """A client gave up, or the first rank tells something."""
        if abort.rid and abort.rid.startswith(TOLD_RID):
            try:
                self._hear(abort.rid)
            except Exception as error:
                self.faults.fall_back("told", error)
            return
        for rid, live in list(self.programs.held.items()):
            if abort.abort_all or rid.startswith(abort.rid or ""):
                self.ends.abort(live, abort.finished_reason)

    # What the first rank tells

    def due(self) -> list[AbortReq]:
        """What time has brought about. Only on the first rank; SGLang broadcasts it with the next requests."""
        due = list(self.teller.due(self.programs.numbered.__contains__, self.admission.fixed_rows))
        if (limit_s := envs.SGLANG_REQ_WAITING_TIMEOUT.get()) > 0:
            due += self._waited_too_long(time.perf_counter() - limit_s)
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

    def _hear(self, rid: str) -> None:
        """Act on what the first rank tells (teller.py)."""
        assert_same("dynasor hears %s", rid)
        what, *parts = rid.removeprefix(TOLD_RID).split(":")
        if what == "fixed-rows":
            self.admission.fixed_rows = int(parts[0])
            return
        live = self.programs.numbered.get(int(parts[0]))
        if what == "reward":
            index, reward = int(parts[1]), float.fromhex(parts[2]) if parts[2] else None
            self.teller.rewards.forget((int(parts[0]), index))
            if live is not None:
                self.ends.guarded(live, lambda live: self.branches.judging.settle(live, index, reward))
        elif what == "same":
            index, into = int(parts[1]), int(parts[2]) if parts[2] else None
            score = float.fromhex(parts[3]) if parts[3] else None
            self.teller.findings.forget((int(parts[0]), index))
            if live is not None:
                self.ends.guarded(live, lambda live: self.branches.comparing.settle(live, index, into, score))
        elif live is not None:
            self.ends.guarded(live, self.branches.expire)

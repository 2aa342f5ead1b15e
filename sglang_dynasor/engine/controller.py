"""Programs inside one scheduler process: intake, branches, answers.

Every tensor-parallel rank runs this in lockstep on what is equal on all ranks (token ids, the first rank's statistics), so
each decides the same without a message. Only `due` reads a clock: on the first rank, whose word SGLang broadcasts. With SGLang's
SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1 every decision is compared between ranks.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.admission import Admission
from sglang_dynasor.engine.branch import (
    FINISH_ENDED,
    BranchTag,
    end_branch,
    go_on_from,
    hide,
    make_branch,
    queue_time,
    set_record,
    set_tag,
    tag_of,
)
from sglang_dynasor.engine.judge import judge_tokens, make_judge, reward_texts
from sglang_dynasor.engine.probe import (
    ThoughtTokens,
    closed,
    cost_tokens,
    has_ended,
    is_answered,
    make_probe,
    read_trial,
    says,
    thought_tokens,
)
from sglang_dynasor.engine.statistics import AnswerReader, Logprobs, Observer, Table
from sglang_dynasor.engine.teller import TOLD_RID, Teller
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.observe.ledger import Totals
from sglang_dynasor.policy.mixture import Distribution
from sglang_dynasor.policy.order import Ticket
from sglang_dynasor.policy.program import BranchState, Program, StopReason
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import next_probe_tokens

logger = logging.getLogger(__name__)

WAVE_STEPS = 8  # that a probe waits for others at most
THOUGHTS_PER_WAVE_STEP = 4  # that could be closed: a pass holds up fewer where fewer think, and is worth less waiting
MOST_LINE_TOKENS = 64  # waited for, before a thought is asked in the middle of a line
TAIL_TOKENS = 1024  # decoded to look for an answer: bounds the work of a very long branch
LEAD_TOKENS = 64  # of the prompt, that an answer may begin in
BRANCH_RID = (
    "\0dynasor-"  # followed by a number and a dot; the front process refuses clients' rids with a NUL (front.py)
)
MAX_CLIENT_PROGRAMS = 4096  # programs whose branches clients send; the one longest without a request is forgotten


@dataclass(slots=True, eq=False)
class LiveProgram:
    """A program and the Reqs it needs: those in flight, and one finished Req for each answer."""

    program: Program
    parent: Req | None  # the client's own request, held until the answer; None where clients send the branches
    number: int = 0  # by arrival
    reqs: dict[int, Req] = field(default_factory=dict[int, Req])
    judges: dict[int, Req | None] = field(
        default_factory=dict[int, Req | None]
    )  # by branch judged; None: the reward model
    probes: dict[int, Req] = field(default_factory=dict[int, Req])  # by branch asked
    is_prompt_cached: bool = False  # until then only the first branch runs, so that siblings hit the cache
    num_expected: int = 0  # branches it is expected to need still (forecast.py)
    lead: str | None = None  # the end of its prompt, once somebody asked (`_lead`)
    failure: dict[str, Any] | None = None  # why the last branch failed, told if none finishes
    ticket: Ticket = field(init=False)  # its place in the line; programs whose branches clients send have none

    def in_flight(self) -> Iterator[Req]:
        """Its branches that have not left."""
        branches = self.program.branches
        return (req for index, req in self.reqs.items() if branches[index].state is BranchState.IN_FLIGHT)


class Controller:
    """The programs of one scheduler."""

    def __init__(self, scheduler: Any, config: DynasorConfig):
        self.scheduler = scheduler
        self.config = config
        self.totals = Totals()
        self.held: dict[str, LiveProgram] = {}  # by the client's rid, in order of arrival
        self.numbered: dict[int, LiveProgram] = {}  # the same by number
        self.sent: OrderedDict[str, LiveProgram] = OrderedDict()  # by program id, the longest unused first
        self.emit: Callable[[list[Req], bool], None] | None = None  # the streamer's own output, set by it
        self.enqueue: Callable[..., None] | None = None  # SGLang's own queueing, as the intake hook gave it
        self.num_programs = 0
        self.num_started = 0
        self.num_watched = 0  # of those inside: somebody reads their logits
        self.observer = Observer(self)
        self.due_probes: list[BranchTag] = []  # to be made before the next prefill batch
        self.asked: list[tuple[Req, BranchTag]] = []  # probes that wait to be computed together
        self.num_steps_asked = 0  # that the first of them has waited
        self.num_probe_waves = 0
        self.num_probe_tokens_read = 0  # whose KV the thoughts had that probes have asked
        self.num_probe_tokens_cached = 0  # of those, found in the radix cache
        self.num_inside = 0  # branches that SGLang still holds, also those of programs already answered
        self._teller = Teller(scheduler, config)  # of use on the first rank only
        self._logged: set[str] = set()

    @cached_property
    def admission(self) -> Admission:
        """Made with the first request, when SGLang has sized its pools."""
        return Admission(self.scheduler, self.config, self._start)

    @cached_property
    def _is_first_rank(self) -> bool:
        """Whether SGLang lets this rank read the clock (`_poll_timeout_aborts`)."""
        parallel = get_parallel()
        return parallel.pp_rank == parallel.attn_tp_rank == parallel.attn_cp_rank == 0

    @cached_property
    def _may_probe(self) -> bool:
        """Whether the KV of a running thought can be shared; where it cannot, thoughts are thought to their end."""
        tree_cache = self.scheduler.tree_cache
        return not (tree_cache.disable or tree_cache.supports_mamba())

    @cached_property
    def reader(self) -> AnswerReader:
        """Finds answers in running branches."""
        return AnswerReader(self.scheduler.tokenizer)

    def holds(self, live: LiveProgram) -> bool:
        """Whether the program still owes its client an answer. By identity: a client may send the same rid again."""
        return live.parent is not None and self.held.get(live.parent.rid) is live

    @property
    def is_idle(self) -> bool:
        """Whether nothing of ours is in the engine: then nothing of ours runs in a step."""
        return not self.num_inside and not self.held

    def status(self) -> dict[str, Any]:
        """Counters and table sizes, for `/server_info` and tests."""
        return {
            **self.totals.as_dict(),
            "num_held_programs": len(self.held),
            "num_waiting_programs": self.admission.order.num_waiting,
            "num_client_programs": len(self.sent),
            "num_branches_inside": self.num_inside,
            "num_branches_queued": len(self.admission.front),
            "num_branches_promised": sum(self.admission.promised.values()),
            "cheap_rows": self.admission.cheap_rows,
            "max_overtaken_tokens": self.admission.max_overtaken_tokens,
            "num_branches_watched": self.num_watched,
            "num_steps_watched": self.observer.num_steps,
            "num_reward_errors": self._teller.rewards.num_errors,
            "num_probe_waves": self.num_probe_waves,
            "num_probe_tokens_read": self.num_probe_tokens_read,
            "num_probe_tokens_cached": self.num_probe_tokens_cached,
        }

    # Intake

    def intake(self, enqueue: Callable[..., None], req: Req, is_retracted: bool) -> None:
        """What happens when SGLang queues a request: a program's own request is held, anything else goes on."""
        self.enqueue = enqueue
        params = req.sampling_params.custom_params
        field = params.get("dynasor") if isinstance(params, dict) else None  # SGLang takes any value there
        tag = tag_of(req)
        if tag is not None and tag.is_internal:
            self._take_back(req)
            return
        # A request that already ends with an error, and the cache warm-up that n > 1 sends, are no branches.
        is_plain = field is None or is_retracted or tag is not None or req.to_finish is not None or req.finished()
        if is_plain or req.sampling_params.max_new_tokens == 0:
            if not is_retracted:
                self.admission.note_arrival(req)
            enqueue(req, is_retracted)
            return
        try:
            spec = parse_field(field, self.config.dynasor_max_branches)
            if spec.program is not None:
                self._join(req, spec.program, Program(spec.program, spec))
            elif self._is_queue_full():
                self._tell_full(req)
                return
            else:
                self._hold(req, Program(req.rid, spec))
        except Exception as error:
            self.fall_back("intake", error)
            enqueue(req, is_retracted)
            return
        if spec.program is None:
            self.guarded(self.held[req.rid], self._advance)
        elif (tag := tag_of(req)) is None:  # decided already, or more requests than the cap
            self._answer_at_once(req, self.sent[spec.program].program)
        else:
            tag.live.reqs[tag.index] = req
            self._enter(tag)
            self.admission.note_arrival(req)
            enqueue(req, is_retracted)

    def _take_back(self, req: Req) -> None:
        """One of our own was retracted: it comes back before new work, unless it was ending with that very step.

        What asks a thought does not: the KV that it is to read may be gone.
        """
        tag = tag_of(req)
        if tag is not None:
            self._end_probe(tag.live, tag.index)
        if isinstance(req.to_finish, FINISH_ENDED):
            req.finished_reason, req.to_finish = req.to_finish, None
            self.scheduler._release_aborted_request(req)
            self.on_output([req])
        else:
            queue_time(self.scheduler, req)
            self.admission.put_in_front(req)

    def _hold(self, req: Req, program: Program) -> None:
        if (old := self.held.get(req.rid)) is not None:  # a client that lost patience and sends the same again
            old.program.reason = StopReason.FAILED
            self._end_rest(old)
            self._drop(old)
        self.num_programs += 1
        live = LiveProgram(program, req, self.num_programs, is_prompt_cached=bool(self.scheduler.tree_cache.disable))
        live.ticket = self.admission.arrive(live)
        req.time_stats.set_wait_queue_entry_time()
        self.held[req.rid] = self.numbered[live.number] = live
        if program.spec.deadline_s is not None and self._is_first_rank:
            self._teller.date(live.number, program.spec.deadline_s)

    def _is_queue_full(self) -> bool:
        limit = self.scheduler.max_queued_requests
        return limit is not None and len(self.scheduler.waiting_queue) + self.admission.order.num_waiting >= limit

    def _tell_full(self, req: Req) -> None:
        """As SGLang refuses a request beyond --max-queued-requests; waiting programs count as queued."""
        reason = _refusal("The request queue is full.")
        self.scheduler.send_abort_output(AbortReq(rid=req.rid, finished_reason=reason), req)

    def _join(self, req: Req, program_id: str, fresh: Program) -> None:
        live = self.sent.setdefault(program_id, LiveProgram(fresh, parent=None))
        self.sent.move_to_end(program_id)
        program = live.program
        if program.reason is None and len(program.branches) < program.spec.branches:
            set_tag(req, BranchTag(live, program.start_branch(), is_internal=False))
        if len(self.sent) > MAX_CLIENT_PROGRAMS:
            oldest = next((key for key, old in self.sent.items() if not old.program.num_in_flight), None)
            if oldest is not None and oldest != program_id:
                del self.sent[oldest]

    def _answer_at_once(self, req: Req, program: Program) -> None:
        """Answer without a text."""
        req.finished_reason, req.finished_len = FINISH_ENDED(), 0
        set_record(req, program.record())
        self._emit([req])

    # Branches

    def _advance(self, live: LiveProgram) -> None:
        """Let the program stand in line for what it wants started, or answer it."""
        if live.program.reason is not None:
            self._answer(live)
            return
        if live.is_prompt_cached:
            self.admission.follow(live)
        self.admission.expect(live)
        if live.program.num_unused and live not in self.admission.promised:
            self.admission.wait(live)

    def admit(self, running_batch: Any) -> None:
        """Start what fits, before SGLang fills its next prefill batch."""
        due, self.due_probes = self.due_probes, []
        for tag in due:
            self.guarded(tag.live, lambda live, tag=tag: self._probe(live, tag))
        try:
            self.admission.look(running_batch)
        except Exception as error:
            self.fall_back("admission", error)
            self.admission.is_plain_due = True
            # As stock would: everything waits in SGLang's queue, in order of arrival.
            for live in list(self.held.values()):
                if not any(live.in_flight()):
                    self.admission.order.stop_waiting(live.ticket)
                    self._start(live, live.program.num_unused)
        if self.asked:  # last: they go with what was started
            self._send_probes()

    def _start(self, live: LiveProgram, num_branches: int) -> None:
        """Make and queue branches."""
        self.guarded(live, lambda live: self._make(live, num_branches))

    def _make(self, live: LiveProgram, num_branches: int) -> None:
        # Each is charged to its tenant by what it is expected to take; that is settled when it ends.
        assert live.parent is not None
        assert_same("dynasor starts %d of program %s", num_branches, live.program.id)
        expected_tokens = int(self.admission.forecast.length_tokens(live.program))
        thought = live.program.spec.thought
        for _ in range(num_branches):
            tag = BranchTag(live, live.program.start_branch(), is_internal=True)
            if thought is not None and self._may_probe:
                tag.probe_at = self._next_probe(live, tag)
            req = live.reqs[tag.index] = make_branch(self.scheduler, live.parent, self._new_rid(), tag)
            self.admission.num_thoughts += tag.probe_at > 0
            self._charge(tag, expected_tokens)
            self._put_inside(req, tag)

    def _new_rid(self) -> str:
        # SGLang aborts by prefix of the rid: no client's rid is a prefix of this one, nor one branch's of another's.
        self.num_started += 1
        return f"{BRANCH_RID}{self.num_started}."

    def _put_inside(self, req: Req, tag: BranchTag) -> None:
        """Queue an internal Req."""
        self._enter(tag)
        queue_time(self.scheduler, req)
        self.admission.put_in_front(req)

    def _enter(self, tag: BranchTag) -> None:
        """A branch, or what asks something about one, is SGLang's from here on."""
        self.num_inside += 1
        self.num_watched += tag.is_watched
        self.admission.num_probes += tag.is_probe

    def _charge(self, tag: BranchTag, tokens: int) -> None:
        """Let the service charged for a branch be `tokens`."""
        self.admission.order.charge(tag.live.ticket, tokens - tag.charged_tokens)
        tag.charged_tokens = tokens

    def on_output(self, reqs: list[Req]) -> list[Req]:
        """Take the branches out of a step's requests; return those that go to clients now."""
        visible: list[Req] = []
        for req in reqs:
            tag = tag_of(req)
            if tag is None or not tag.is_internal:
                visible.append(req)
            if (tag is None or not tag.is_internal) and req.finished_reason is not None and not req.finished_output:
                self.admission.note_finish(req)
            if tag is None:
                continue
            if not req.finished():
                if tag.is_internal and not tag.live.is_prompt_cached and len(req.output_ids):
                    tag.live.is_prompt_cached = True
                    if self.holds(tag.live):
                        self.guarded(tag.live, self.admission.follow)
                if 0 < tag.probe_at <= len(req.output_ids) and self._is_place_to_ask(req, tag):
                    self.due_probes.append(tag)
                elif tag.is_probe and req.output_ids:
                    self.guarded(tag.live, lambda live, req=req: self._end_answered(live, req))
            elif not req.finished_output:  # with overlap a finished request comes by twice
                self._left(req, tag)
                if tag.is_replaced:
                    continue
                settle = self._settle_judge if tag.is_judge else self._settle_probe if tag.is_probe else self._settle
                self.guarded(tag.live, lambda live, req=req, tag=tag, settle=settle: settle(live, tag.index, req))
        return visible

    def _left(self, req: Req, tag: BranchTag) -> None:
        """A branch is no longer SGLang's."""
        if tag.is_inside:
            tag.is_inside = False
            self.num_inside -= 1
            self.num_watched -= tag.is_watched
            self.admission.num_probes -= tag.is_probe
            self.admission.num_thoughts -= tag.probe_at > 0
            tag.probe_at = 0
            self.admission.note_change()
        if tag.is_internal:
            hide(req)
            self.admission.front.pop(req, None)
            self._charge(tag, len(req.output_ids) - tag.given_tokens)

    def _settle(self, live: LiveProgram, index: int, req: Req) -> None:
        """A branch has finished, by itself or by force."""
        program = live.program
        if req.finished_len is None:
            req.finished_len = len(req.output_ids)
        program.branches[index].num_cached_tokens = req.cached_tokens
        self._end_probe(live, index)
        if program.branches[index].state is BranchState.IN_FLIGHT:
            if isinstance(req.finished_reason, FINISH_ABORT):
                self._fail(live, index, req, req.finished_reason.to_json())
            elif program.spec.judge is None or not self._ask_judge(live, index, req):
                self._finish(program, index, req)
        self._forget_silent(live, index)
        if live.parent is None:
            set_record(req, {**program.record(), "index": index})
            if program.reason is not None:
                self._end_rest(live)
        elif self.holds(live):
            live.is_prompt_cached = True
            self._advance(live)

    def _forget_silent(self, live: LiveProgram, index: int) -> None:
        """Keep no Req of a branch that will never speak."""
        program = live.program
        may_speak = program.winner == index or index in program.speakers
        if live.parent is None or not (may_speak or index in live.judges):
            live.reqs.pop(index, None)

    def _finish(self, program: Program, index: int, req: Req, reward: float | None = None) -> None:
        ids = req.output_ids_through_stop
        try:
            text = self._decode(ids[-TAIL_TOKENS:])
            if not isinstance(req.finished_reason, FINISH_ENDED):
                self.admission.forecast.branch_tokens.learn(len(ids))
            program.finish(index, text, self._generated(req, len(ids)), reward, lead=self._lead(req))
        except Exception as error:
            if program.branches[index].state is BranchState.IN_FLIGHT:
                raise
            self.fall_back("vote", error)  # counted as an abstention: the program goes on to its cap, as stock would

    def _lead(self, req: Req) -> str:
        """The end of a branch's prompt, where its answer may begin; read once where the server makes the branches."""
        tag = tag_of(req)
        if tag is None or tag.live.parent is None:
            return self._decode(req.origin_input_ids[-LEAD_TOKENS:])
        if tag.live.lead is None:
            tag.live.lead = self._decode(req.origin_input_ids[-LEAD_TOKENS:])
        return tag.live.lead

    def _decode(self, ids: Any) -> str:
        return self.scheduler.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _fail(self, live: LiveProgram, index: int, req: Req, why: dict[str, Any]) -> None:
        live.failure = why
        # A client that gives up one branch of its own has others to send; a branch of ours is not tried again.
        live.program.fail(index, self._generated(req, len(req.output_ids)), closes=live.parent is not None)
        live.reqs.pop(index, None)

    # Statistics and rewards

    def see(self, req: Req, tag: BranchTag, token: int, found: Table | Logprobs, row: int) -> None:
        """Take in a token of a running branch that may be weak, or may stand at its answer."""
        self.guarded(tag.live, lambda live: self._see(live, req, tag, token, found, row))

    def _see(self, live: LiveProgram, req: Req, tag: BranchTag, token: int, found: Table | Logprobs, row: int) -> None:
        program = live.program
        if program.branches[tag.index].state is not BranchState.IN_FLIGHT:
            return
        if tag.may_be_weak and self._is_weak(program, tag) and not req.finished():
            self._weaken(live, tag.index, req)
        elif self.reader.begins(req, tag, token):
            self._see_answer(live, tag.index, found.distribution(row))

    def _is_weak(self, program: Program, tag: BranchTag) -> bool:
        level, group = program.weak_level, tag.confidence and tag.confidence.group
        return level is not None and group is not None and group < level

    def _weaken(self, live: LiveProgram, index: int, req: Req) -> None:
        assert_same("dynasor finds %s weak", req.rid)
        live.program.weaken(index, self._end(req))
        self._go_on(live)

    def _see_answer(self, live: LiveProgram, index: int, distribution: Distribution) -> None:
        live.program.see_answer(index, distribution)
        if live.program.reason is not None:
            self._go_on(live)

    def _go_on(self, live: LiveProgram) -> None:
        """Do what follows from a change that no branch's end has brought."""
        if self.holds(live):
            self._advance(live)
        elif live.parent is None and live.program.reason is not None:
            self._end_rest(live)

    # Thoughts

    def _is_place_to_ask(self, req: Req, tag: BranchTag) -> bool:
        """After the word asked for; else at the end of a line, or somewhere in one that is too long to wait for."""
        thought = tag.live.program.spec.thought
        if thought is not None and thought.word:
            return req.output_ids[-1] in self._thought_tokens(tag.live).word_ends and says(req, thought.word)
        return req.output_ids[-1] in self.reader.line_ends or len(req.output_ids) >= tag.probe_at + MOST_LINE_TOKENS

    def _probe(self, live: LiveProgram, tag: BranchTag) -> None:
        """Ask a running thought for its answer, unless it is over, was retracted, or is being asked."""
        program, req = live.program, live.reqs.get(tag.index)
        thought = program.spec.thought
        if req is None or thought is None or tag_of(req) is not tag or not tag.probe_at or not self.holds(live):
            return
        if req.finished() or req.to_finish is not None or not req.kv.holds_kv or tag.index in live.probes:
            return  # it comes by again with the next step
        tokens, num_tokens = self._thought_tokens(live), len(req.output_ids)
        if has_ended(req, tokens, tag.num_thought_tokens):
            self._stop_asking(tag)  # it is writing its answer
            return
        tag.num_thought_tokens = num_tokens
        tag.probe_at = self._next_probe(live, tag)
        aside = BranchTag(live, tag.index, is_internal=True, is_probe=True, num_thought_tokens=num_tokens)
        is_line_end = req.output_ids[-1] in self.reader.line_ends
        probe = make_probe(self.scheduler, req, tokens, self._new_rid(), aside, is_line_end=is_line_end)
        if probe is not None:
            assert_same("dynasor asks %s at %d tokens", req.rid, num_tokens)
            live.probes[tag.index] = probe
            program.num_probes += 1
            self.asked.append((probe, aside))

    def _next_probe(self, live: LiveProgram, tag: BranchTag) -> int:
        thought = live.program.spec.thought
        assert thought is not None
        num_suffix_tokens = (
            len(self._thought_tokens(live).suffix) + 1
        )  # the KV of the thought's last token is not there
        return next_probe_tokens(thought, tag.num_thought_tokens, tag.probe_costs, num_suffix_tokens)

    def _send_probes(self) -> None:
        """Queue the probes that were made, several at once: every prefill pass holds up all that decode.

        Where one of them could close its thought, waiting costs what is thought meanwhile.
        """
        # Not what its program has ended or retracted meanwhile.
        self.asked = [(probe, tag) for probe, tag in self.asked if tag.live.probes.get(tag.index) is probe]
        if not self.asked:
            self.num_steps_asked = 0
            return
        self.num_steps_asked += 1
        num_thoughts = self.admission.num_thoughts
        is_prefill_next = self.admission.is_pass_due
        is_everybody = len(self.asked) + self.admission.num_probes >= num_thoughts
        is_urgent = any(tag.live.program.may_close(tag.index) for _, tag in self.asked)
        num_steps = min(WAVE_STEPS, num_thoughts // THOUGHTS_PER_WAVE_STEP) if is_urgent else WAVE_STEPS
        if not (is_prefill_next or is_everybody or self.num_steps_asked >= num_steps):
            return
        asked, self.asked, self.num_steps_asked = self.asked, [], 0
        self.num_probe_waves += 1
        for probe, tag in reversed(asked):
            self._put_inside(probe, tag)

    def _stop_asking(self, tag: BranchTag) -> None:
        if tag.probe_at:
            tag.probe_at = 0
            self.admission.num_thoughts -= 1

    def _end_answered(self, live: LiveProgram, req: Req) -> None:
        if is_answered(req, self._thought_tokens(live), live.program.spec.answer):
            self._end(req)

    def _settle_probe(self, live: LiveProgram, index: int, req: Req) -> None:
        """A probe has its answer: the thought goes on, or is closed where it was asked."""
        program, tag = live.program, tag_of(req)
        if live.probes.pop(index, None) is None or tag is None or live.parent is None:  # nobody waits for it
            return
        tokens, cost = self._thought_tokens(live), cost_tokens(req)
        program.num_probe_tokens += cost
        num_read = len(live.parent.origin_input_ids) + tag.num_thought_tokens - 1  # the KV of the last was under way
        self.num_probe_tokens_read += num_read
        self.num_probe_tokens_cached += min(num_read, req.cached_tokens)
        chain = live.reqs.get(index)
        if chain is None or chain.finished() or chain.to_finish is not None or not self.holds(live):
            return
        if isinstance(req.finished_reason, FINISH_ABORT):
            return
        asked = tag_of(chain)
        assert asked is not None
        if has_ended(chain, tokens, tag.num_thought_tokens):
            self._stop_asking(asked)
            return
        if asked.probe_at:
            asked.probe_costs.append(cost)
            asked.probe_at = self._next_probe(live, asked)
        trial = read_trial(req, tag, tokens, program.spec.answer)
        num_given = trial.num_tokens + len(tokens.new_line) + len(tokens.end)
        if num_given >= (chain.sampling_params.max_new_tokens or 0):  # no room would be left for the answer
            return
        if program.see_trial(index, trial):
            if program.speaker is not None:
                self._end_rest(live, spared=index)
            self._close(live, index, chain, trial.num_tokens)

    def _thought_tokens(self, live: LiveProgram) -> ThoughtTokens:
        spec = live.program.spec
        assert spec.thought is not None
        return thought_tokens(spec.thought, spec.answer, self.scheduler.tokenizer)

    def _close(self, live: LiveProgram, index: int, chain: Req, num_tokens: int) -> None:
        """End a thought as the model ends it: a new Req goes on from there and writes the answer.

        What the chain generated since it was asked is dropped: the answer follows the text that the probe has read.
        """
        assert live.parent is not None
        old = tag_of(chain)
        assert old is not None
        assert_same("dynasor closes the thought of %s at %d tokens", chain.rid, num_tokens)
        tokens = self._thought_tokens(live)
        old.is_replaced = True
        is_line_end = chain.output_ids[num_tokens - 1] in self.reader.line_ends
        given, spent = closed(chain.output_ids[:num_tokens], tokens, is_line_end=is_line_end), self._end(chain)
        tag = BranchTag(live, index, is_internal=True, given_tokens=len(given), spent_tokens=spent)
        req = make_branch(self.scheduler, live.parent, self._new_rid(), tag)
        go_on_from(req, given)
        live.reqs[index] = req
        self._put_inside(req, tag)

    def _end_probe(self, live: LiveProgram, index: int) -> None:
        if (probe := live.probes.pop(index, None)) is not None:
            self._end(probe)
            live.program.num_probe_tokens += cost_tokens(probe)

    def _generated(self, req: Req, num_tokens: int) -> int:
        """Tokens that the model generated for a branch, `num_tokens` being in its output."""
        tag = tag_of(req)
        return num_tokens if tag is None else tag.generated(num_tokens)

    # Rewards

    def _ask_judge(self, live: LiveProgram, index: int, req: Req) -> bool:
        """Have a finished branch judged before it votes. Returns False where it cannot be."""
        judge = live.program.spec.judge
        if judge is None or live.program.reason is not None or not self.holds(live):
            return False
        if judge.is_external:
            live.judges[index] = None
            if self._is_first_rank:
                texts = partial(reward_texts, self.scheduler.tokenizer, req, judge)
                self._teller.rewards.ask((live.number, index), texts)
            return True
        tokens = judge_tokens(judge, self.scheduler.tokenizer)
        tag = BranchTag(live, index, is_internal=True, is_judge=True, labels=(tokens.good, tokens.bad))
        made = make_judge(self.scheduler, req, tokens, self._new_rid(), tag)
        if made is None:
            return False
        live.judges[index] = made
        live.program.num_judge_tokens += len(tokens.suffix) + 1
        self._put_inside(made, tag)
        return True

    def _settle_judge(self, live: LiveProgram, index: int, req: Req) -> None:
        tag = tag_of(req)
        self._judged(live, index, None if tag is None else tag.reward)

    def _judged(self, live: LiveProgram, index: int, reward: float | None) -> None:
        """A branch has its reward, or will never have one: now it votes."""
        if index in live.judges:
            del live.judges[index]
            self._vote(live, index, reward)

    def _vote(self, live: LiveProgram, index: int, reward: float | None) -> None:
        if self.holds(live) and live.program.branches[index].state is BranchState.IN_FLIGHT:
            self._finish(live.program, index, live.reqs[index], reward)
            self._forget_silent(live, index)
            self._advance(live)

    def on_aborted(self, abort: AbortReq, req: Req) -> bool:
        """SGLang gave up a request outside the output (time-out, full queue). Returns whether no client must be told."""
        tag = tag_of(req)
        if tag is None:
            self.admission.note_loss(req)
            return False
        if tag.is_internal and not req.finished():
            req.finished_reason = FINISH_ENDED()  # a batch under way may still show it: then it is passed over
        self._left(req, tag)
        self.guarded(tag.live, lambda live: self._lose(live, tag.index, req, abort))
        return tag.is_internal

    def _lose(self, live: LiveProgram, index: int, req: Req, abort: AbortReq) -> None:
        tag = tag_of(req)
        if tag is not None and tag.is_replaced:
            return
        if tag is not None and tag.is_probe:
            live.probes.pop(index, None)
        elif tag is not None and tag.is_judge:
            self._judged(live, index, None)
        elif live.program.branches[index].state is BranchState.IN_FLIGHT:
            self._fail(live, index, req, abort.finished_reason or {"type": "abort", "message": "Aborted"})
            if self.holds(live):
                self._advance(live)

    # Ends

    def _end_rest(self, live: LiveProgram, spared: int | None = None) -> None:
        """End every branch still in flight, but for one; those of clients that were queued are told now."""
        for index, req in list(live.reqs.items()):
            if live.program.branches[index].state is not BranchState.IN_FLIGHT or index == spared:
                continue
            self._end_probe(live, index)
            live.program.end(index, self._end(req))
            live.program.branches[index].num_cached_tokens = req.cached_tokens
            tag = tag_of(req)
            if live.parent is None and tag is not None and not tag.is_inside:  # it left the queue: no step will show it
                live.reqs.pop(index, None)
                set_record(req, {**live.program.record(), "index": index})
                self._emit([req])
        self._end_judges(live)

    def _end_judges(self, live: LiveProgram) -> None:
        for index, req in live.judges.items():
            if req is not None:
                self._end(req)
            else:
                self._teller.rewards.forget((live.number, index))
        live.judges.clear()

    def _end(self, req: Req) -> int:
        """End one branch; return the tokens it will have cost."""
        if req.finished():
            return self._generated(req, len(req.output_ids))
        assert_same("dynasor ends %s at %d tokens", req.rid, len(req.output_ids))
        num_tokens = self._generated(req, end_branch(self.scheduler, req))
        tag = tag_of(req)
        if req.finished() and tag is not None:  # it left the queue: no step will show it
            self._left(req, tag)
        return num_tokens

    def _answer(self, live: LiveProgram) -> None:
        """Answer the client once: the winning branch speaks in the held request's name."""
        parent, program = live.parent, live.program
        if parent is None or not self.holds(live):
            return
        assert_same("dynasor answers program %s: %s, branch %s", program.id, program.reason, program.winner)
        self._end_rest(live)
        if program.winner is not None:
            record = program.record()
            self._speak(parent, live.reqs[program.winner], record)
            self.totals.add(record)
            self.admission.forecast.learn(program)
        elif program.reason is StopReason.DEADLINE:
            self._answer_at_once(parent, program)
            self.totals.add(program.record())
        else:
            self._refuse(live, live.failure)
        self._drop(live)  # last: until here a fault of ours would still leave the client an answer

    def _drop(self, live: LiveProgram) -> None:
        """The program is over for its client."""
        assert live.parent is not None
        self.admission.leave(live)
        self.numbered.pop(live.number, None)
        for index in list(live.probes):
            self._end_probe(live, index)
        if self.holds(live):
            del self.held[live.parent.rid]
        live.reqs.clear()

    def _speak(self, parent: Req, winner: Req, record: dict[str, Any]) -> None:
        # Its tokens, logprobs and finish reason are its own; only the address is the client's.
        winner.rid, winner.http_worker_ipc, winner.stream = parent.rid, parent.http_worker_ipc, parent.stream
        winner.finished_output = None
        set_record(winner, record)
        self._emit([winner])

    def _refuse(self, live: LiveProgram, why: dict[str, Any] | None) -> None:
        assert live.parent is not None
        self.totals.num_aborted += 1
        self.scheduler.send_abort_output(AbortReq(rid=live.parent.rid, finished_reason=why), live.parent)

    def abort(self, abort: AbortReq) -> None:
        """The client gave up (abort, disconnect): end its programs' branches and tell it so."""
        if abort.rid and abort.rid.startswith(TOLD_RID):
            try:
                self._hear(abort.rid)
            except Exception as error:
                self.fall_back("told", error)
            return
        for rid, live in list(self.held.items()):
            if abort.abort_all or rid.startswith(abort.rid or ""):
                live.program.reason = StopReason.FAILED
                try:
                    self._end_rest(live)
                except Exception as error:
                    self.fall_back("abort", error)
                self._refuse(live, abort.finished_reason)
                self._drop(live)

    # Time

    def _hear(self, rid: str) -> None:
        """Act on what the first rank tells (teller.py)."""
        assert_same("dynasor hears %s", rid)
        what, *parts = rid.removeprefix(TOLD_RID).split(":")
        if what == "cheap-rows":
            self.admission.cheap_rows = int(parts[0])
            return
        live = self.numbered.get(int(parts[0]))
        if what == "reward":
            index, reward = int(parts[1]), float.fromhex(parts[2]) if parts[2] else None
            self._teller.rewards.forget((int(parts[0]), index))
            if live is not None:
                self.guarded(live, lambda live: self._judged(live, index, reward))
        elif live is not None:
            self.guarded(live, self._expire)

    def due(self) -> list[AbortReq]:
        """What time has brought about. Only on the first rank; SGLang broadcasts it with the next requests."""
        admission = self.admission
        due = list(self._teller.due(self.numbered.__contains__, admission.cheap_rows, admission.engine.rows))
        if (limit_s := envs.SGLANG_REQ_WAITING_TIMEOUT.get()) > 0:
            due += self._waited_too_long(time.perf_counter() - limit_s)
        return due

    def _waited_too_long(self, since: float) -> list[AbortReq]:
        """As SGLang's own time-out, for programs that wait here instead of in its queue."""
        reason = _refusal("Request waiting timeout reached.")
        return [
            AbortReq(rid=rid, finished_reason=reason)
            for rid, live in self.held.items()
            if live.parent is not None
            and not live.ticket.is_started
            and 0 < live.parent.time_stats.wait_queue_entry_time < since
        ]

    def _expire(self, live: LiveProgram) -> None:
        """The deadline has come: the best answer so far, or else the longest text that is there."""
        program = live.program
        unjudged = list(live.judges)
        self._end_judges(live)
        for index in unjudged:
            self._vote(live, index, None)
        if program.reason is not None:
            return
        program.reason = StopReason.DEADLINE
        self.admission.leave(live)
        branches = program.branches
        in_flight = {
            index: req
            for index, req in live.reqs.items()
            if branches[index].state is BranchState.IN_FLIGHT and not req.finished() and req.output_ids
        }
        if program.winner is not None or not in_flight:
            self._answer(live)
            return
        # One that was retracted and is computed again in chunks cannot speak: SGLang only aborts it.
        chunked = self.scheduler.chunked_req
        index = max(in_flight, key=lambda i: (in_flight[i] is not chunked, len(in_flight[i].output_ids), -i))
        self._end_rest(live, spared=index)
        self._end(in_flight[index])
        if in_flight[index].finished():  # it was queued: no step will show it
            self._finish(program, index, in_flight[index])
            self._answer(live)

    # Faults

    def guarded(self, live: LiveProgram, step: Callable[[LiveProgram], None]) -> None:
        try:
            step(live)
        except Exception as error:
            self.fall_back("program", error)
            self._surrender(live)

    def _surrender(self, live: LiveProgram) -> None:
        """Our own code failed: answer with any branch that finished, or let the client's request run as stock would."""
        parent, program = live.parent, live.program
        if parent is None or not self.holds(live):
            return
        self.admission.leave(live)
        self.numbered.pop(live.number, None)
        del self.held[parent.rid]
        program.reason = program.reason or StopReason.FAILED
        for req in (*live.reqs.values(), *live.probes.values()):
            self._end(req)
        live.probes.clear()
        self._end_judges(live)
        done = [r for i, r in live.reqs.items() if program.branches[i].state is BranchState.FINISHED]
        if done:
            self._speak(parent, done[0], {"program": program.id, "stop_reason": str(StopReason.FAILED)})
        else:
            assert self.enqueue is not None
            self.enqueue(parent, False)
        live.reqs.clear()

    def fall_back(self, where: str, error: Exception) -> None:
        """Count an exception of ours; log each kind once; in strict mode let it fail the engine."""
        self.totals.num_policy_errors += 1
        if self.config.dynasor_strict:
            raise error
        kind = f"{where}: {type(error).__name__}"
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error("dynasor fell back to stock behaviour (%s); logged once", kind, exc_info=error)

    def _emit(self, reqs: list[Req]) -> None:
        if self.emit is None:
            raise ConfigError("dynasor: the output streamer is not ours; SGLang was started by another entry point")
        self.emit(reqs, any(req.return_logprob for req in reqs))


def _refusal(message: str) -> dict[str, Any]:
    return {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE.value, "message": message}

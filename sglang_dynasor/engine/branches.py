"""Branches of the programs that the server expands: made, ended, lost; and those that clients send."""

from __future__ import annotations

import time
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.comparing import Comparing
from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.findings import Findings
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.judge import Judging
from sglang_dynasor.engine.live import BranchTag, LiveProgram, SentTag, Times, hide, note_end, set_record, tag_of
from sglang_dynasor.engine.load import note_start
from sglang_dynasor.engine.readings import Readings
from sglang_dynasor.engine.req import go_on_from, make_branch
from sglang_dynasor.engine.reward_model import RewardModel
from sglang_dynasor.engine.slots import Slots
from sglang_dynasor.engine.thoughts import Thoughts
from sglang_dynasor.engine.voting import Voting
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.policy.program import BranchState, StopReason
from sglang_dynasor.policy.reading import reading_chars

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import Req


class Branches:
    """Who looks after the branches that the server makes, and after what each change means for their program."""

    def __init__(
        self, scheduler: Any, inside: Inside, ends: Ends, voting: Voting, watch: Watch, rewards: RewardModel | None,
        findings: Findings | None,
    ):  # fmt: skip
        self.scheduler = scheduler
        self.inside = inside
        self.admission = inside.admission
        self.ends = ends
        self.programs = ends.programs
        self.voting = voting
        self.readings = Readings(ends.guarded)
        self.judging = Judging(scheduler, inside, rewards, self.vote)
        self.comparing = Comparing(scheduler, inside, findings, self.readings, self.go_on)
        self.thoughts = Thoughts(scheduler, inside, ends, self.readings, lambda: watch.reader.line_ends, self._replace)

    def start(self, live: LiveProgram, num_branches: int) -> None:
        """Make and queue branches; admission says when."""
        self.ends.guarded(live, lambda live: self._make(live, num_branches))

    def _make(self, live: LiveProgram, num_branches: int) -> None:
        # Each is charged to its tenant by what it is expected to take; that is settled when it ends.
        assert live.parent is not None
        num_promised = self.admission.promised.get(live.gang, 0)
        assert_same("dynasor starts %d of program %s, %d promised", num_branches, live.program.id, num_promised)
        expected_tokens = int(self.admission.forecast.length_tokens(live.program))
        for _ in range(num_branches):
            tag = BranchTag(live, live.program.start_branch(), self)
            if live.is_traced:
                live.times[tag.index] = Times(time.perf_counter())
            req = live.reqs[tag.index] = make_branch(self.scheduler, live.parent, self.inside.new_rid(), tag)
            self.thoughts.begin(tag)
            self.inside.charge(tag, expected_tokens)
            self.inside.put(req, tag)

    def _replace(self, live: LiveProgram, index: int, given: array[int], spent_tokens: int) -> None:
        """Let another Req go on for a branch, whose end passes unread."""
        assert live.parent is not None
        tag = BranchTag(live, index, self, given_tokens=len(given), spent_tokens=spent_tokens)
        req = make_branch(self.scheduler, live.parent, self.inside.new_rid(), tag)
        go_on_from(req, given)
        req.weight_version_events = live.reqs[index].weight_version_events[:]  # of the tokens given
        live.reqs[index] = req
        self.inside.put(req, tag)

    def advance(self, live: LiveProgram) -> None:
        """Have compared what is new, and let the program stand in line for what it wants started, or answer it."""
        if live.program.reason is None:
            self.comparing.ask(live)
            self.admission.end_if_dear(live.gang)
        if live.program.reason is not None:
            self.ends.answer(live)
        else:
            self.admission.advance(live.gang)

    def go_on(self, live: LiveProgram) -> None:
        if self.programs.holds(live):
            self.advance(live)

    def vote(self, live: LiveProgram, index: int, reward: float | None) -> None:
        """A branch that was judged votes, as soon as it is read."""
        if self.programs.holds(live) and live.program.branches[index].state is BranchState.IN_FLIGHT:
            self._read(live, index, live.reqs[index], reward)

    def close(self, live: LiveProgram, why: StopReason) -> None:
        """Its time is up, or the operator wants its answer: what has finished is read, unjudged, and then the program is answered."""
        if live.is_closing:  # told again while what has finished waits to be read
            return
        live.is_closing = True
        if live.program.reason is None:
            for index in self.ends.end_judges(live):
                self._read(live, index, live.reqs[index])
        self.readings.add(live, 0, lambda live: self.ends.close(live, why))

    def _read(self, live: LiveProgram, index: int, req: Req, reward: float | None = None) -> None:
        num_chars = reading_chars(live.program.spec, len(req.output_ids_through_stop))
        self.readings.add(live, num_chars, partial(self._vote, index=index, req=req, reward=reward))

    def _vote(self, live: LiveProgram, index: int, req: Req, reward: float | None) -> None:
        """Unless the program has been decided meanwhile, or another goes on for the branch."""
        if live.reqs.get(index) is req and live.program.branches[index].state is BranchState.IN_FLIGHT:
            self.voting.finish(live, index, req, reward)
            self._settle(live, index)

    def _settle(self, live: LiveProgram, index: int) -> None:
        """Do what follows from a branch's end."""
        self.voting.forget_silent(live, index)
        if self.programs.holds(live):
            live.gang.is_prompt_cached = True
            self.advance(live)

    def has_output(self, req: Req, tag: BranchTag) -> None:
        gang = tag.live.gang
        if not gang.is_prompt_cached and len(req.output_ids):
            gang.is_prompt_cached = True
            if tag.live.parent is not None and self.programs.holds(tag.live):
                note_start(tag.live.parent, req)
                self.admission.follow(gang)
        if tag.asking is not None:
            self.thoughts.note_output(req, tag)

    def has_ended(self, req: Req, tag: BranchTag) -> None:
        live, index = tag.live, tag.index
        if live.reqs.get(index) is not req:  # another goes on for it, or nobody waits for it
            return
        program, branch = live.program, live.program.branches[index]
        if req.finished_len is None:
            req.finished_len = len(req.output_ids)
        note_end(live, index, req)
        self.inside.end_probe(live, index)
        if branch.state is BranchState.IN_FLIGHT:
            is_asked = program.reason is None and self.programs.holds(live)
            if isinstance(req.finished_reason, FINISH_ABORT):
                self.voting.fail(live, index, req, req.finished_reason.to_json())
            elif not is_asked or not self.judging.ask(live, index, req):
                self._read(live, index, req)
                return
        self._settle(live, index)

    def is_lost(self, req: Req, tag: BranchTag, abort: AbortReq) -> None:
        live, index = tag.live, tag.index
        if live.reqs.get(index) is req and live.program.branches[index].state is BranchState.IN_FLIGHT:
            self.voting.fail(live, index, req, abort.finished_reason or {"type": "abort", "message": "Aborted"})
            self.go_on(live)

    def has_left(self, tag: BranchTag) -> None:
        self.thoughts.stop(tag)


class SentBranches:
    """Who looks after the branches that clients send: SGLang's own requests, that vote together."""

    def __init__(self, ends: Ends, voting: Voting, readings: Readings, slots: Slots):
        self.ends = ends
        self.slots = slots
        self.voting = voting
        self.readings = readings
        self.unread: dict[Req, None] = {}  # that have ended, and whose clients wait until they are read

    def go_on(self, live: LiveProgram) -> None:
        if live.program.reason is not None:
            self.ends.end_rest(live)

    def has_output(self, req: Req, tag: SentTag) -> None:
        """Nothing: it is its client's."""

    def has_ended(self, req: Req, tag: SentTag) -> None:
        live, index = tag.live, tag.index
        branch = live.program.branches[index]
        if req.finished_len is None:
            req.finished_len = len(req.output_ids)
        note_end(live, index, req)
        if branch.state is BranchState.IN_FLIGHT and isinstance(req.finished_reason, FINISH_ABORT):
            self.voting.fail(live, index, req, req.finished_reason.to_json())
        num_chars = reading_chars(live.program.spec, len(req.output_ids_through_stop))
        if not self.readings.add(live, num_chars, partial(self._vote, index=index, req=req)):
            hide(req)  # its client waits for the record, too
            self.unread[req] = None

    def _vote(self, live: LiveProgram, index: int, req: Req) -> None:
        try:
            if live.program.branches[index].state is BranchState.IN_FLIGHT:
                self.voting.finish(live, index, req)
            live.reqs.pop(index, None)
            set_record(req, {**live.program.record(), "index": index})
        finally:
            if req in self.unread:  # it was hidden until now
                del self.unread[req]
                req.finished_output = None
                self.ends.send(req)
        self.go_on(live)
        self.ends.programs.forget_unused()

    def is_lost(self, req: Req, tag: SentTag, abort: AbortReq) -> None:
        if tag.live.program.branches[tag.index].state is BranchState.IN_FLIGHT:
            why = abort.finished_reason or {"type": "abort", "message": "Aborted"}
            self.voting.fail(tag.live, tag.index, req, why)
            self.readings.add_later(tag.live, self.go_on)  # SGLang may be going through its queue now

    def has_left(self, tag: SentTag) -> None:
        """With the last one that is there the slots are free: nobody says when such a program is over."""
        if not any((other := tag_of(req)) and other.is_inside for req in tag.live.reqs.values()):
            self.slots.release(tag.live)
            tag.live.program.answers.rest()

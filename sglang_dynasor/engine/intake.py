"""A request that SGLang queues: a program's own is held, a branch of a client's joins its program, anything else goes on."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine import media
from sglang_dynasor.engine.branches import Branches, SentBranches
from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.gate import Gate
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import LiveProgram, SentTag, set_arrival, set_tag, tag_of
from sglang_dynasor.engine.req import FINISH_ENDED, turn_away
from sglang_dynasor.engine.room import SchedulerRoom
from sglang_dynasor.engine.teller import Teller
from sglang_dynasor.engine.voting import constraint_of
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.admission import Gang
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import ProgramSpec

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def field_of(req: Req) -> Any:
    """What a request's `dynasor` field says; None where it has none. SGLang takes any value there."""
    params: Any = req.sampling_params.custom_params
    return params.get("dynasor") if isinstance(params, dict) else None


class Intake:
    """Where requests become programs and branches.

    Args:
        teller: who tells deadlines; None on ranks that are told.
    """

    def __init__(
        self, room: SchedulerRoom, inside: Inside, ends: Ends, branches: Branches, sent: SentBranches,
        teller: Teller | None, max_branches: int, level: str,
    ):  # fmt: skip
        self.scheduler = room.scheduler
        self.room = room
        self.inside = inside
        self.admission = inside.admission
        self.ends = ends
        self.programs = ends.programs
        self.branches = branches
        self.sent = sent
        self.teller = teller
        self.gate = Gate(room.scheduler, max_branches)
        self.level = level
        self.refusal = ""  # why no new program is taken; empty: they are

    def take(self, enqueue: Callable[..., None], req: Req, is_retracted: bool) -> None:
        """Take in a request. `enqueue` is SGLang's own queueing of it."""
        self.ends.enqueue = enqueue
        # SGLang's first step, which those that are held must take too: without a priority a request has the least, or it may have none.
        if not self.scheduler._set_or_validate_priority(req):
            self.scheduler._release_aborted_request(req)
            return
        field = field_of(req)
        # A pause retracts, too, and SGLang says so in the request alone.
        is_new = not is_retracted and not req.is_retracted
        # A request that already ends with an error, and the cache warm-up that n > 1 sends, are no branches.
        is_plain = field is None or not is_new or tag_of(req) is not None or req.to_finish is not None
        if self.gate.is_forged(req):
            self._refuse(req, f"rid={quoted(req.rid)} begins with a NUL, as the server's own do")
            return
        if is_plain or req.finished() or self.gate.is_warm_up(req):
            if is_new:
                self._note(req)
            enqueue(req, is_retracted)
            return
        try:
            spec = self.gate.read(req, field, self.level)
            if spec.program is None:
                media.check_longer(spec, req)
        except FieldError as error:
            self._refuse(req, str(error))
            return
        if spec.program is not None and (
            not self.refusal or self.programs.knows(spec)
        ):  # SGLang counts it in its own queue
            live = self._join(req, spec.program, spec)
        elif self.refusal or self._is_queue_full():
            turn_away(self.scheduler, req, self.refusal or "The request queue is full.")
            return
        elif not self.gate.is_open and req.rid in self.programs.held:  # one front process would not have let it come
            self._refuse(req, f"rid={quoted(req.rid)} is that of a program that is served; send another, or none")
            return
        else:
            live = self._hold(req, spec)
        if live.parent is not None:
            self.ends.guarded(live, self.branches.advance)
        elif (tag := tag_of(req)) is None:  # decided already, or more requests than the cap
            # It never enters the cache, by whose way out SGLang's sessions know that a turn is over.
            self.scheduler._release_aborted_request(req)
            self.ends.answer_at_once(req, live.program)
        else:
            live.reqs[tag.index] = req
            self.inside.enter(tag)
            self._note(req)
            enqueue(req, is_retracted)

    def _refuse(self, req: Req, message: str) -> None:
        turn_away(self.scheduler, req, message, HTTPStatus.BAD_REQUEST)

    def take_back(self, req: Req) -> bool:
        """One of our own was retracted: it comes back before new work. Returns whether it does.

        Not one that was ending with that very step: it is over. What asks a thought does not come back either: the KV that
        it is to read may be gone.
        """
        tag = tag_of(req)
        if tag is not None:
            self.inside.end_probe(tag.live, tag.index)
        if not isinstance(req.to_finish, FINISH_ENDED):
            self.inside.put_back(req)
            return True
        req.finished_reason, req.to_finish = req.to_finish, None
        self.scheduler._release_aborted_request(req)
        return False

    def _hold(self, req: Req, spec: ProgramSpec) -> LiveProgram:
        if (old := self.programs.held.get(req.rid)) is not None:
            self.ends.replace(old)
        program = self._program(req.rid, spec, req)
        media.keep(req)
        live = self.programs.number(program, req)
        live.gang = Gang(program, len(req.origin_input_ids), self.room.gang_cost(req), live, self.room.rank(req))
        req.time_stats.set_wait_queue_entry_time()
        self.admission.arrive(live.gang)
        if spec.budget is not None:
            most_tokens = req.sampling_params.max_new_tokens
            assert most_tokens is not None  # SGLang sets it when the request comes
            self.admission.budgets.join(spec.budget, program, live.gang, most_tokens)
        self.programs.hold(live)  # last: what is held is whole
        if spec.deadline_s is not None and self.teller is not None:
            self.teller.date(live.number, spec.deadline_s)
        return live

    def _program(self, program_id: str, spec: ProgramSpec, req: Req) -> Program:
        usual_tokens = self.admission.forecast.branch_tokens
        return Program(program_id, spec, usual_tokens=usual_tokens, constraint=constraint_of(req.sampling_params))

    def _join(self, req: Req, program_id: str, spec: ProgramSpec) -> LiveProgram:
        live = self.programs.join(self._program(program_id, spec, req))
        program = live.program
        if program.reason is None and len(program.branches) < program.spec.branches:
            set_tag(req, SentTag(live, program.start_branch(), self.sent))
        return live

    def _is_queue_full(self) -> bool:
        """Waiting programs count as queued."""
        limit = self.scheduler.max_queued_requests
        return limit is not None and len(self.scheduler.waiting_queue) + self.admission.order.num_waiting >= limit

    def _note(self, req: Req) -> None:
        """Remember when a request that is no program came."""
        if arrival := self.admission.note_arrival(self.room.rank(req)):
            set_arrival(req, arrival)

"""How a program ends for its client: with an answer, with nothing that could answer, at its deadline, or given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine import media
from sglang_dynasor.engine.fence import Fence, guarded
from sglang_dynasor.engine.findings import Findings
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import LiveProgram, note_end, set_record, tag_of
from sglang_dynasor.engine.load import note_start
from sglang_dynasor.engine.meter import Meter
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.req import FINISH_ENDED, stand_in
from sglang_dynasor.engine.reward_model import RewardModel
from sglang_dynasor.engine.spans import Spans
from sglang_dynasor.engine.voting import Voting
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.observe.ledger import Totals
from sglang_dynasor.observe.metrics import FALLBACK
from sglang_dynasor.policy.program import BranchState, Program, StopReason

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Ends:
    """What the client of a program is told, and what then becomes of its branches."""

    def __init__(
        self, scheduler: Any, inside: Inside, programs: Programs, voting: Voting, rewards: RewardModel, findings: Findings,
        fence: Fence,
    ):  # fmt: skip
        self.scheduler = scheduler
        self.inside = inside
        self.programs = programs
        self.voting = voting
        self.rewards = rewards
        self.findings = findings
        self.fence = fence
        self.totals = Totals()
        self.meter: Meter | None = None  # with --enable-metrics, on the first rank
        self.spans: Spans | None = None  # with --enable-trace, likewise
        self.emit: Callable[[list[Req], bool], None] | None = None  # the streamer's own output, set by it
        self.told: list[Req] | None = None  # what goes out with the output of the step under way; None: there is none
        self.enqueue: Callable[..., None] | None = None  # SGLang's own queueing, as the intake hook gave it

    # Branches that are no longer needed

    def end_rest(self, live: LiveProgram, spared: int | None = None) -> None:
        """End every branch still in flight, but for one; those of clients that were queued are told now."""
        for index, req in list(live.reqs.items()):
            if live.program.branches[index].state is not BranchState.IN_FLIGHT or index == spared:
                continue
            self.inside.end_probe(live, index)
            live.program.end(index, self.inside.end(req))
            note_end(live, index, req)
            tag = tag_of(req)
            if live.parent is None and tag is not None and not tag.is_inside:  # it left the queue: no step will show it
                live.reqs.pop(index, None)
                set_record(req, {**live.program.record(), "index": index})
                self.send(req)
        self.end_judges(live)
        self._end_comparisons(live)

    def _end_comparisons(self, live: LiveProgram) -> None:
        for index, req in live.comparisons.items():
            if req is not None:
                self.inside.end(req)
            self.findings.forget((live.number, index))
        live.comparisons.clear()

    def end_judges(self, live: LiveProgram) -> list[int]:
        """Wait for no reward any more; return the branches that were being judged."""
        unjudged = list(live.judges)
        for index, req in live.judges.items():
            if req is not None:
                self.inside.end(req)
            else:
                self.rewards.forget((live.number, index))
        live.judges.clear()
        return unjudged

    # Answers

    def answer(self, live: LiveProgram) -> None:
        """Answer the client once: the winning branch speaks in the held request's name."""
        parent, program = live.parent, live.program
        if parent is None or not self.programs.holds(live):
            return
        assert_same("dynasor answers program %s: %s, branch %s", program.id, program.reason, program.winner)
        self.end_rest(live)
        if program.winner is not None:
            record = program.record()
            self._speak(live, live.reqs[program.winner], record)
            self._count(live, record)
            self.voting.forecast.learn(program)
        elif program.reason in (StopReason.DEADLINE, StopReason.OPERATOR):
            self.answer_at_once(parent, program)
            live.is_answered = True
            self._count(live, program.record())
        else:
            self._give_up(live, live.failure)
        self.drop(live)  # last: until here a fault of ours would still leave the client an answer
        self.fence.note_answer()

    def _count(self, live: LiveProgram, record: dict[str, Any]) -> None:
        """Count a program that was answered."""
        self.totals.add(record)
        self.tell(live, record["stop_reason"], record)

    @guarded("tell")  # on the first rank only: the others go on, and so does it
    def tell(self, live: LiveProgram, outcome: str, record: dict[str, Any] | None = None) -> None:
        """Let those who watch see a program that is over."""
        if self.meter is not None:
            self.meter.count(live, outcome, record)
        if self.spans is not None:
            self.spans.count(live, outcome, record)

    def answer_at_once(self, req: Req, program: Program) -> None:
        """Answer without a text."""
        req.finished_reason, req.finished_len = FINISH_ENDED(), 0
        set_record(req, program.record())
        self.send(req)

    def close(self, live: LiveProgram, why: StopReason) -> None:
        """It is to answer now, and what has finished was read: the best answer so far, or else the longest text that is there."""
        program = live.program
        if program.reason is not None:  # told again while what answers leaves with the step under way
            return
        program.reason = why
        self.inside.admission.leave(live.gang)
        in_flight = {index: req for index, req in live.reqs.items() if self._may_still_speak(program, index, req)}
        # One that was retracted and is computed again in chunks cannot speak: SGLang only aborts it.
        chunked = self.scheduler.chunked_req
        index = program.speaker  # of chains that have decided: what it says, or was about to, is their answer
        if index not in in_flight or in_flight[index] is chunked:
            if program.winner is not None or not in_flight:
                self.answer(live)
                return
            index = max(in_flight, key=lambda i: (in_flight[i] is not chunked, len(in_flight[i].output_ids), -i))
        self.end_rest(live, spared=index)
        self.inside.end(in_flight[index])
        if in_flight[index].finished():  # it was queued: no step will show it
            self.voting.finish(live, index, in_flight[index])
            self.answer(live)

    def _may_still_speak(self, program: Program, index: int, req: Req) -> bool:
        is_in_flight = program.branches[index].state is BranchState.IN_FLIGHT
        return is_in_flight and not req.finished() and len(req.output_ids) > 0

    def drop(self, live: LiveProgram) -> None:
        """The program is over for its client."""
        self.inside.admission.leave(live.gang)
        for index in list(live.probes):
            self.inside.end_probe(live, index)
        self.programs.release(live)
        live.reqs.clear()
        if live.parent is not None:
            media.drop(live.parent)
        if live.is_traced:
            live.parent.time_stats.set_completion_time()  # type: ignore[union-attr]  # it closes SGLang's own spans

    def _speak(self, live: LiveProgram, winner: Req, record: dict[str, Any]) -> None:
        parent = live.parent
        assert parent is not None
        # Its tokens, logprobs and finish reason are its own; only the address is the client's.
        winner.rid, winner.http_worker_ipc, winner.stream = parent.rid, parent.http_worker_ipc, parent.stream
        winner.finished_output = None
        note_start(parent, winner)  # where no prompts are shared, nobody has
        winner.time_stats = parent.time_stats
        set_record(winner, record)
        self.send(winner)
        live.is_answered = True

    def send(self, req: Req) -> None:
        """Send a finished request to its client, once."""
        if self.emit is None:
            raise ConfigError("dynasor: the output streamer is not ours; SGLang was started by another entry point")
        if self.told is None:
            self.emit([req], req.return_logprob)
        else:
            self.told.append(req)

    # Without an answer

    def _give_up(self, live: LiveProgram, why: dict[str, Any] | None) -> None:
        """Tell the client what there is, and why there is no more. Its branches have ended.

        The text is that of who would have spoken, else the longest. SGLang sends none with an HTTP error, as it does for a
        time-out; the record is kept all the same.
        """
        parent, program = live.parent, live.program
        assert parent is not None
        self.totals.num_aborted += 1
        why = why or {"message": given_up(program)}
        try:
            record = program.record()
            self.tell(live, str(program.reason), record)
            speaker = live.reqs.get(program.winner) if program.winner is not None else None
            if speaker is None:
                speaker = max(live.reqs.values(), key=lambda req: len(req.output_ids), default=None)
            told = parent if speaker is None else stand_in(parent, speaker)
            told.finished_reason = FINISH_ABORT(why.get("message"), why.get("status_code"), why.get("err_type"))
            told.time_stats = parent.time_stats
            set_record(told, record)
            self.send(told)
        except Exception as error:
            self.fence.fall_back("abort", error)
            self.scheduler.send_abort_output(AbortReq(rid=parent.rid, finished_reason={"type": "abort", **why}), parent)
        live.is_answered = True

    def replace(self, live: LiveProgram) -> None:
        """A client that lost patience sends the same again: nobody waits for this one any more."""
        live.program.reason = StopReason.FAILED
        self.end_rest(live)
        self.tell(live, StopReason.ABORTED)
        self.drop(live)

    def abort(self, live: LiveProgram, why: dict[str, Any] | None) -> None:
        """The client gave up (abort, disconnect), or it waited too long: its branches end, and it is told what there is."""
        live.program.reason = live.program.reason or StopReason.ABORTED
        try:
            self.end_rest(live)
        except Exception as error:
            self.fence.fall_back("abort", error)
        self._give_up(live, why)
        self.drop(live)

    # Faults

    def guarded(self, live: LiveProgram, step: Callable[[LiveProgram], None]) -> None:
        """Do what concerns one program; if that fails, the program ends as stock would have it."""
        try:
            step(live)
        except Exception as error:
            self.surrender(live, error)

    def surrender(self, live: LiveProgram, error: Exception) -> None:
        """Our own code failed: answer with any branch that finished, or let the client's request run as stock would."""
        self.fence.fall_back("program", error)
        parent, program = live.parent, live.program
        if parent is None or not self.programs.holds(live):
            return
        program.reason = program.reason or StopReason.FAILED
        done = [r for i, r in live.reqs.items() if program.branches[i].state is BranchState.FINISHED]
        if live.is_answered:
            pass
        elif done:
            self._speak(live, done[0], failed_record(program))
            media.drop(parent)
        else:
            assert self.enqueue is not None
            parent.finished_reason = parent.finished_len = None  # it may have been about to be answered without a text
            self.enqueue(parent, False)
            live.is_answered = True
        for req in (*live.reqs.values(), *live.probes.values()):
            self.inside.end(req)
        live.probes.clear()
        self.end_judges(live)
        self._end_comparisons(live)
        self.inside.admission.leave(live.gang)
        self.programs.release(live)
        self.tell(live, FALLBACK)
        live.reqs.clear()


def failed_record(program: Program) -> dict[str, Any]:
    """The record of a program whose own counts nobody trusts any more: of whose it is, since it shuts others out."""
    tenant = program.spec.tenant
    return {"program": program.id, "stop_reason": str(StopReason.FAILED), **({"tenant": tenant} if tenant else {})}


def given_up(program: Program) -> str:
    """How far a program was when it was given up."""
    states = [branch.state for branch in program.branches]
    num_finished, cap = states.count(BranchState.FINISHED), program.spec.branches
    return f"Aborted: {num_finished} of {cap} branches had finished" if states else "Aborted while it waited to start"

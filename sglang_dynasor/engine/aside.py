"""What is done when our own state cannot be trusted: every client is answered, every request of ours ends, and we begin anew, or not.

It reads tables as they are and calls SGLang; what it calls of ours it calls behind the guard (fence.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_dynasor.engine import audit
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.ends import failed_record
from sglang_dynasor.engine.fence import FENCE, MOST_IN_A_ROW, around, guarded
from sglang_dynasor.engine.live import LiveProgram, SentTag
from sglang_dynasor.engine.messages import Answer, Ask, Told
from sglang_dynasor.engine.req import FINISH_ENDED, refusal
from sglang_dynasor.observe.ledger import STATUS_HELP
from sglang_dynasor.observe.metrics import FALLBACK
from sglang_dynasor.policy.program import BranchState

logger = logging.getLogger(__name__)

Req = Any  # SGLang's, with attributes of ours

LEAVE = "leave"
REFUSAL = (
    f"dynasor has stepped aside: {MOST_IN_A_ROW} faults of one kind came in a row, and the server's log says which. Send the "
    "request without the dynasor field, or ask the operator to restart the server"
)
LOST = "dynasor failed, and with it this program's answer; send the request again"


def settle(scheduler: Any, running_batch: Any) -> None:
    """Look at what a fault may have left half done. Between two steps, on every rank in the same iteration.

    What concerns one program has ended with that program, and the others go on. Where something is not true, all end.
    """
    controller = _controller_of(scheduler)
    if controller is None:  # nothing of ours is there
        FENCE.is_in_doubt = FENCE.is_leaving = False
        return
    there = held_by_sglang(scheduler, running_batch)
    FENCE.is_in_doubt = False
    if not FENCE.is_leaving:
        found = _look(controller, there)
        if found == []:
            return
        FENCE.num_fresh_starts += 1
        logger.error("dynasor begins anew, and its programs end: %s", found or "it cannot be looked at")
    fresh = None
    try:
        _end_all(scheduler, controller, there)
        fresh = None if FENCE.is_leaving else _begin(scheduler, controller)
    finally:  # whatever comes: nobody goes through this twice with the same programs
        FENCE.is_in_doubt = False
        if fresh is None:
            FENCE.is_aside, FENCE.is_leaving = True, False
            FENCE.totals, FENCE.meter = controller.ends.totals, controller.ends.meter
            logger.error("%s. Plain requests are served as before", REFUSAL)
        scheduler._dynasor = scheduler.policy._dynasor = fresh
        scheduler.tp_worker.model_runner.sampling_observer = None if fresh is None else fresh.observer


def _controller_of(scheduler: Any) -> Controller | None:
    """None also in a scheduler that serves no programs, where some hooks run all the same."""
    return getattr(scheduler, "_dynasor", None)


@guarded("audit")
def _look(controller: Controller, there: dict[Req, None]) -> list[str]:
    return list(dict.fromkeys(audit.wrong(controller, there)))


def held_by_sglang(scheduler: Any, running_batch: Any) -> dict[Req, None]:
    """Every request that is queued, runs, or is in a step under way."""
    batches = [running_batch, scheduler.last_batch, *(batch for batch, _ in getattr(scheduler, "result_queue", ()))]
    reqs = [req for batch in batches if batch is not None for req in batch.reqs]
    chunked = [] if scheduler.chunked_req is None else [scheduler.chunked_req]
    return dict.fromkeys([*scheduler.waiting_queue, *chunked, *reqs])


@guarded("begin")
def _begin(scheduler: Any, old: Controller) -> Controller:
    """A controller that holds nothing and goes on counting."""
    fresh = Controller(scheduler, old.config, FENCE)
    fresh.ends.totals, fresh.ends.emit, fresh.ends.enqueue = old.ends.totals, old.ends.emit, old.ends.enqueue
    fresh.ends.meter, fresh.ends.spans = old.ends.meter, old.ends.spans
    fresh.inside.num_made = old.inside.num_made  # of rids: some are still there
    fresh.programs.num = old.programs.num  # of programs: something may still be told of old ones
    fresh.admission.fixed_width, fresh.admission.max_price = old.admission.fixed_width, old.admission.max_price
    fresh.intake.level, fresh.intake.refusal = old.intake.level, old.intake.refusal
    fresh.observer.inherit(old.observer)
    return fresh


def _end_all(scheduler: Any, controller: Controller, there: dict[Req, None]) -> None:
    """Each program's client gets what a branch has finished, or is served as stock; branches of clients' go on as plain requests."""
    for req in there:
        tag, req.dynasor_tag = getattr(req, "dynasor_tag", None), None
        req.dynasor_arrival = 0  # before any program that comes now: a new line counts anew
        if tag is not None and not isinstance(tag, SentTag) and not _end(scheduler, req):
            FENCE.orphans[req] = None  # it runs on, unseen
    _tell_unread(controller)
    for live in controller.programs.held.values():
        parent = live.parent
        if live.is_answered or parent is None or parent in there:
            continue
        if not _answer(controller, live, parent):
            scheduler.send_abort_output(AbortReq(rid=parent.rid, finished_reason=refusal(LOST)), parent)
        controller.ends.tell(live, FALLBACK)
    controller.programs.held.clear()  # the step under way still shows its rows to the old ones: they are nobody's


@guarded("unread")
def _tell_unread(controller: Controller) -> None:
    unread = controller.intake.sent.unread
    if unread and controller.ends.emit is not None:
        for req in unread:
            req.finished_output = None
        controller.ends.emit(list(unread), any(req.return_logprob for req in unread))


@guarded("answer")
def _answer(controller: Controller, live: LiveProgram, parent: Req) -> bool:
    """Returns whether the client has its answer, or will; None where that failed."""
    emit, enqueue = controller.ends.emit, controller.ends.enqueue
    finished = [i for i in live.reqs if live.program.branches[i].state is BranchState.FINISHED]
    if finished and emit is not None:
        leader = _leader(live)
        req = live.reqs[leader if leader in finished else finished[0]]
        req.rid, req.http_worker_ipc, req.stream = parent.rid, parent.http_worker_ipc, parent.stream
        req.finished_output, req.time_stats = None, parent.time_stats
        req.dynasor_record = failed_record(live.program)  # type: ignore[attr-defined]
        emit([req], req.return_logprob)
    elif enqueue is not None:
        parent.finished_reason = parent.finished_len = parent.dynasor_record = None
        enqueue(parent, False)
    else:
        return False
    return True


@guarded("leader")
def _leader(live: LiveProgram) -> int | None:
    return live.program.winner


@guarded("end")
def _end(scheduler: Any, req: Req) -> bool:
    """End a request of ours that SGLang holds: it leaves with the step under way, and nobody is told. Returns True; None where that failed."""
    if req.finished():
        req.finished_output = True
        return True
    req.finished_len = len(req.output_ids)
    if not req.kv.holds_kv and req in scheduler.waiting_queue:
        scheduler.waiting_queue.remove(req)
        scheduler._release_aborted_request(req)
        if req.kv.holds_mamba:
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        req.finished_reason, req.finished_output = FINISH_ENDED(), True
        return True
    FENCE.orphans[req] = None
    req.to_finish = FINISH_ENDED()
    if req is scheduler.chunked_req and scheduler._pending_chunked_abort_req is None:
        scheduler._pending_chunked_abort_req = req
    return True


# What hooks do before anything else, and behind their own guard: it must work where they fail


def settles_first(hook: Callable[..., Any]) -> Callable[..., Any]:
    """For the hook that comes between two steps."""

    @wraps(hook)
    def settling(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
        if FENCE.is_in_doubt or FENCE.is_leaving:
            settle(scheduler, running_batch)
        return fenced(original, scheduler, running_batch)

    fenced = around(hook.__name__)(hook)
    return settling


def tells_to_leave(hook: Callable[..., Any]) -> Callable[..., Any]:
    """For the hook by which the first rank tells the others something: when to leave, all in one iteration."""

    @wraps(hook)
    def telling(result: list[Any], scheduler: Any) -> list[Any] | None:
        is_to_leave = FENCE.is_to_leave and _controller_of(scheduler) is not None  # else nobody there hears it
        return [*result, Told(what=LEAVE)] if is_to_leave else fenced(result, scheduler)

    fenced = guarded(hook.__name__)(hook)
    return telling


def hear(scheduler: Any, told: Told) -> None:
    """What the first rank tells: when to leave, or something for the controller."""
    controller: Controller | None = scheduler._dynasor
    if controller is None:
        return
    if told.what == LEAVE:
        FENCE.is_leaving = True
    else:
        guarded("told")(controller.hear)(told)


def answer(scheduler: Any, ask: Ask) -> Answer:
    """What an operator asks."""
    controller: Controller | None = scheduler._dynasor
    if controller is None:
        return Answer(found={"off": REFUSAL})
    return guarded("control")(controller.control.hear)(ask) or Answer(found={"error": "it failed; the log has more"})


# What SGLang shows of requests that are over for us, and of programs that come when we have stepped aside


def show(reqs: list[Req]) -> list[Req]:
    """A step's requests without those that are over for us."""
    for req in reqs:
        if req in FENCE.orphans and req.finished():
            del FENCE.orphans[req]
            req.finished_output = True
    return [req for req in reqs if req not in FENCE.orphans]


def show_plain(reqs: list[Req], controller: Controller | None) -> list[Req]:
    """A step's requests that clients have sent, and what programs were answered with before something failed."""
    tags = [getattr(req, "dynasor_tag", None) for req in reqs]
    plain = [req for req, tag in zip(reqs, tags, strict=True) if tag is None or isinstance(tag, SentTag)]
    if controller is not None:
        plain += controller.ends.told or []
        controller.ends.told = None
    return plain


def drop(scheduler: Any, req: Req) -> None:
    """One that is over for us was retracted: it does not come back."""
    del FENCE.orphans[req]
    req.finished_reason, req.to_finish, req.finished_output = req.to_finish or FINISH_ENDED(), None, True
    scheduler._release_aborted_request(req)


def is_program(req: Req, is_retracted: bool) -> bool:
    """Whether a request names a program: as what was queued before is served as stock, it must be new.

    A pause retracts, too, and SGLang says so in the request alone.
    """
    custom = req.sampling_params.custom_params
    return isinstance(custom, dict) and "dynasor" in custom and not (is_retracted or req.is_retracted)


def status() -> dict[str, Any]:
    """As `Controller.status`, of nothing but what went before."""
    known = {**asdict(FENCE.totals), **counts()} if FENCE.totals is not None else counts()
    return {**dict.fromkeys(STATUS_HELP, 0), **known, "num_branches_inside": len(FENCE.orphans)}


def counts() -> dict[str, int]:
    """What is counted of faults."""
    return {
        "num_policy_errors": FENCE.num,
        "num_fresh_starts": FENCE.num_fresh_starts,
        "is_aside": int(FENCE.is_aside),
    }

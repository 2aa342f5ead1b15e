"""Whether what is counted and held is true, looked at after a fault of ours and at no other time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.live import BranchTag, LiveProgram, ProbeTag, SentTag, Tag, tag_of
from sglang_dynasor.policy.program import BranchState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_dynasor.engine.controller import Controller


def wrong(controller: Controller, there: Iterable[Req]) -> Iterator[str]:
    """What is not as it must be between two steps; nothing in an engine where nothing has failed.

    Args:
        there: what SGLang holds.
    """
    there = set(there)
    inside = {req: tag for req in there if (tag := tag_of(req)) is not None and tag.is_inside}
    yield from _wrong_counts(controller, inside)
    yield from _wrong_line(controller)
    for live in controller.programs.held.values():
        yield from _wrong_program(controller, live, there)


def _wrong_counts(controller: Controller, inside: dict[Req, Tag]) -> Iterator[str]:
    ours, admission, tags = controller.inside, controller.admission, list(inside.values())
    if any(req.finished() for req in inside):
        yield "a request has ended and nobody was told"
    if ours.num_reqs != len(tags):
        yield f"{ours.num_reqs} requests are counted inside, and {len(tags)} are"
    if ours.num_watched != sum(tag.is_watched for tag in tags):
        yield "requests are counted as watched that are not"
    if admission.num_probes != sum(isinstance(tag, ProbeTag) for tag in tags):
        yield "probes are counted that are not there"
    if admission.num_thoughts != sum(isinstance(tag, BranchTag) and tag.asking is not None for tag in tags):
        yield "thoughts are counted that are not there"
    queue, num_front = controller.scheduler.waiting_queue, len(controller.front.reqs)
    queued = [req for req in queue if (tag := tag_of(req)) is not None and not isinstance(tag, SentTag)]
    if set(queued) != set(controller.front.reqs) or queue[:num_front] != queued:
        yield "ours are not the first in the queue"


def _wrong_line(controller: Controller) -> Iterator[str]:
    programs, admission = controller.programs, controller.admission
    if not admission.order.is_sound():
        yield "the line of programs does not hold what it counts"
    owners = [ticket.owner.owner for line in admission.order.lines.values() for ticket in line.alive.values()]
    owners += [gang.owner for gang in admission.promised]
    budgets = dict.fromkeys([*admission.budgets.by_id.values(), *admission.budgets.due])
    owners += [member.owner.owner for budget in budgets for member in budget.members.values()]
    if not all(programs.holds(live) for live in owners):
        yield "a program that is over stands in line, or in its budget"
    if not all(live.parent is None or programs.holds(live) for live in controller.slots.held):
        yield "a program that is over holds slots"
    if list(programs.numbered.values()) != list(programs.held.values()):
        yield "programs are known by one name and not by the other"


def _wrong_program(controller: Controller, live: LiveProgram, there: set[Req]) -> Iterator[str]:
    """Whether its client will have one answer."""
    if live.is_answered or live.parent in there:
        yield "a program is held whose client has its answer"
    in_flight = [branch for branch in live.program.branches if branch.state is BranchState.IN_FLIGHT]
    if live.program.num_in_flight != len(in_flight):
        yield "branches are counted as in flight that are not"
    unread = [reading for reading in controller.branches.readings.waiting if reading.live is live]
    moves: list[Any] = [*unread, *live.judges, *live.comparisons]
    for index, branch in enumerate(live.program.branches):
        if branch.state is not BranchState.IN_FLIGHT:
            continue
        req = live.reqs.get(index)
        if index in live.judges or (req is not None and req.finished() and unread):
            continue
        if req is None or req not in there or req.finished():
            yield "a branch is waited for that is not there"
        moves.append(req)
    side = (req for reqs in (live.judges, live.comparisons, live.probes) for req in reqs.values())
    if any(req is not None and req not in there and not _is_made(controller, req) for req in side):
        yield "an answer is waited for that nobody will give"
    # Who may start a branch stands in line for it; who may not is told by its budget.
    budget = None if live.program.reason is not None or live.program.granted else live.program.budget
    if not (moves or live.gang.ticket.is_waiting or (budget is not None and budget.is_looked_at)):
        yield "nothing will move a program"


def _is_made(controller: Controller, req: Req) -> bool:
    """Whether it is a probe that waits to go with others."""
    return any(probe is req for probe, _ in controller.branches.thoughts.made)

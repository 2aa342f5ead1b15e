"""The programs of one scheduler, by the names that others know them by."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.engine.slots import Slots
from sglang_dynasor.policy.program import BranchState, Program
from sglang_dynasor.policy.spec import ProgramSpec

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_CLIENT_PROGRAMS = 4096  # programs whose branches clients send; the one longest without a request is forgotten


class Programs:
    """Those whose answer a client waits for, and those whose branches clients send."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.held: dict[str, LiveProgram] = {}  # by the client's rid, in order of arrival
        self.numbered: dict[int, LiveProgram] = {}  # the same by number
        # By owner and program id, the longest unused first.
        self.sent: OrderedDict[tuple[str, str], LiveProgram] = OrderedDict()
        self.num = 0  # that were numbered

    def number(self, program: Program, parent: Req) -> LiveProgram:
        """The next program for a client's request. It is not held yet."""
        self.num += 1
        return LiveProgram(program, parent, self.num)

    def hold(self, live: LiveProgram) -> None:
        """From here on it owes its client an answer. Its rid is not held yet."""
        assert live.parent is not None
        self.held[live.parent.rid] = self.numbered[live.number] = live

    def holds(self, live: LiveProgram) -> bool:
        """Whether the program still owes its client an answer. By identity: a client may send the same rid again."""
        return live.parent is not None and self.held.get(live.parent.rid) is live

    def release(self, live: LiveProgram) -> None:
        """The program owes its client nothing any more."""
        self.numbered.pop(live.number, None)
        if live.parent is not None and self.holds(live):
            del self.held[live.parent.rid]
        self.slots.release(live)

    def join(self, fresh: Program) -> LiveProgram:
        """The program that a client's branch belongs to; `fresh` where it is the first."""
        key = fresh.spec.owner, fresh.id
        live = self.sent.get(key)
        if live is None or _is_another(live.program, fresh):
            live = self.sent[key] = LiveProgram(fresh, parent=None)
        self.sent.move_to_end(key)
        self.forget_unused()  # not this one, the newest
        return live

    def knows(self, spec: ProgramSpec) -> bool:
        """Whether a program whose branches a client sends is remembered."""
        return spec.program is not None and (spec.owner, spec.program) in self.sent

    def sent_by(self, owner: str, program_id: str) -> LiveProgram | None:
        """One of whose branches a client waits for."""
        live = self.sent.get((owner, program_id))
        return live if live is not None and live.program.num_in_flight else None

    def forget_unused(self) -> None:
        """Keep to MAX_CLIENT_PROGRAMS, but for those in flight.

        Two at most are looked at: where many are in flight at once, nobody looks through all of them for each request.
        """
        for _ in range(min(2, len(self.sent) - MAX_CLIENT_PROGRAMS)):
            key, oldest = self.sent.popitem(last=False)
            if oldest.program.num_in_flight:
                self.sent[key] = oldest


def _is_another(old: Program, new: Program) -> bool:
    """Whether two programs of one owner and id have nothing to do with each other.

    The front process lets no such two come, but for what it has forgotten, and where nothing came of the old one: its id may be
    declared anew then.
    """
    if old.spec.tenant != new.spec.tenant:
        return True
    has_begun = old.num_in_flight or any(branch.state is BranchState.FINISHED for branch in old.branches)
    return old.spec != new.spec and not has_begun

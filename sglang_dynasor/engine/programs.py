"""The programs of one scheduler, by the names that others know them by."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.engine.slots import Slots
from sglang_dynasor.policy.program import Program

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_CLIENT_PROGRAMS = 4096  # programs whose branches clients send; the one longest without a request is forgotten


class Programs:
    """Those whose answer a client waits for, and those whose branches clients send."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.held: dict[str, LiveProgram] = {}  # by the client's rid, in order of arrival
        self.numbered: dict[int, LiveProgram] = {}  # the same by number
        self.sent: OrderedDict[str, LiveProgram] = OrderedDict()  # by program id, the longest unused first
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

    def join(self, program_id: str, fresh: Program) -> LiveProgram:
        """The program that a client's branch belongs to; `fresh` where it is the first."""
        live = self.sent.setdefault(program_id, LiveProgram(fresh, parent=None))
        self.sent.move_to_end(program_id)
        self.forget_unused()  # not this one, the newest
        return live

    def forget_unused(self) -> None:
        """Keep to MAX_CLIENT_PROGRAMS, but for those in flight.

        Two at most are looked at: where many are in flight at once, nobody looks through all of them for each request.
        """
        for _ in range(min(2, len(self.sent) - MAX_CLIENT_PROGRAMS)):
            program_id, oldest = self.sent.popitem(last=False)
            if oldest.program.num_in_flight:
                self.sent[program_id] = oldest

"""What the logits of running branches say before they have ended: that one is weak, or what it would answer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import BranchTag, LiveProgram
from sglang_dynasor.engine.reader import AnswerReader
from sglang_dynasor.engine.slots import Added, Slots
from sglang_dynasor.policy.mixture import Distribution
from sglang_dynasor.policy.program import BranchState, Program

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Found(Protocol):
    """What a step has found, by its watched rows."""

    def distribution(self, i: int) -> Distribution:
        """The likeliest tokens."""
        ...

    def entropy(self, i: int) -> float:
        """Of all tokens, in nats; NaN: the row has no numbers."""
        ...

    def place(self, i: int) -> int:
        """Where the row is kept on the device; -1: nowhere."""
        ...


class Watch:
    """Takes in what a step has found about the branches that somebody asked about (statistics.py)."""

    def __init__(self, tokenizer: Any, inside: Inside, ends: Ends, slots: Slots):
        self.inside = inside
        self.ends = ends
        self.slots = slots
        self._tokenizer = tokenizer

    @cached_property
    def reader(self) -> AnswerReader:
        """Made when it is first needed: a vocabulary takes a tenth of a second to read."""
        return AnswerReader(self._tokenizer)

    def see(self, req: Req, tag: BranchTag, token: int, found: Found, i: int) -> None:
        """Take in a token of a running branch that may be weak, or may stand at its answer; it was drawn from row `i`."""
        self.ends.guarded(tag.live, lambda live: self._see(live, req, tag, token, found, i))

    def _see(self, live: LiveProgram, req: Req, tag: BranchTag, token: int, found: Found, i: int) -> None:
        program = live.program
        if program.branches[tag.index].state is not BranchState.IN_FLIGHT:
            return
        if tag.may_be_weak and is_weak(program, tag) and not req.finished():
            assert_same("dynasor finds %s weak", req.rid)
            program.weaken(tag.index, self.inside.end(req))
            tag.keeper.go_on(live)
        elif program.reason is None and (said := self.reader.follow(req, tag, token)) is not None:
            entropy = found.entropy(i)
            if entropy == entropy and (num := program.answers.see(said, found.distribution(i), entropy)):
                self.slots.add(tag, said, found.place(i), num)
            if tag.answering is None:
                program.end_answer(tag.index, said)
                if program.reason is not None:
                    tag.keeper.go_on(live)

    def mixed(self, added: Added, entropy: float) -> None:
        """The device says what a slot holds since a step has added to it; NaN: it could not."""
        slot = added.slot
        if self.slots.holds(slot):
            self.ends.guarded(slot.tag.live, lambda live: self._mixed(live, added, entropy))

    def _mixed(self, live: LiveProgram, added: Added, entropy: float) -> None:
        program, slot = live.program, added.slot
        if entropy != entropy:
            self.slots.lose(slot)
        else:  # for the record also after the decision
            is_open = program.reason is None
            program.mix_answers(slot.said, added.addition.num_rows, entropy)
            if is_open and program.reason is not None:
                slot.tag.keeper.go_on(live)


def is_weak(program: Program, tag: BranchTag) -> bool:
    """Whether a running branch is less confident than the first ones to finish were, as far as the client allows."""
    level, group = program.weak_level, tag.confidence and tag.confidence.group
    return level is not None and group is not None and group < level

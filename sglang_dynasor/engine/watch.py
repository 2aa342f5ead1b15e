"""What the logits of running branches say before they have ended: that one is weak, or stands at its answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import BranchTag, LiveProgram
from sglang_dynasor.engine.reader import AnswerReader
from sglang_dynasor.policy.mixture import Distribution
from sglang_dynasor.policy.program import BranchState, Program

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Watch:
    """Takes in what a step has found about the branches that somebody asked about (statistics.py)."""

    def __init__(self, tokenizer: Any, inside: Inside, ends: Ends):
        self.inside = inside
        self.ends = ends
        self.faults = ends.faults
        self._tokenizer = tokenizer

    @cached_property
    def reader(self) -> AnswerReader:
        """Made when it is first needed: a vocabulary takes a tenth of a second to read."""
        return AnswerReader(self._tokenizer)

    def see(self, req: Req, tag: BranchTag, token: int, distribution: Callable[[], Distribution]) -> None:
        """Take in a token of a running branch that may be weak, or may stand at its answer."""
        self.ends.guarded(tag.live, lambda live: self._see(live, req, tag, token, distribution))

    def _see(
        self, live: LiveProgram, req: Req, tag: BranchTag, token: int, distribution: Callable[[], Distribution]
    ) -> None:
        program = live.program
        if program.branches[tag.index].state is not BranchState.IN_FLIGHT:
            return
        if tag.may_be_weak and is_weak(program, tag) and not req.finished():
            assert_same("dynasor finds %s weak", req.rid)
            program.weaken(tag.index, self.inside.end(req))
            tag.keeper.go_on(live)
        elif self.reader.begins(req, tag, token):
            program.see_answer(tag.index, distribution())
            if program.reason is not None:
                tag.keeper.go_on(live)


def is_weak(program: Program, tag: BranchTag) -> bool:
    """Whether a running branch is less confident than the first ones to finish were, as far as the client allows."""
    level, group = program.weak_level, tag.confidence and tag.confidence.group
    return level is not None and group is not None and group < level

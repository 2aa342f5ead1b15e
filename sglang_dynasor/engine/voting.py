"""A branch that has come to its end is read, and votes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.faults import Faults
from sglang_dynasor.engine.live import LiveProgram, SentTag, generated_tokens, tag_of
from sglang_dynasor.engine.req import FINISH_ENDED
from sglang_dynasor.policy.forecast import Forecast
from sglang_dynasor.policy.program import BranchState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

TAIL_TOKENS = 1024  # decoded to look for an answer: bounds the work of a very long branch
LEAD_TOKENS = 64  # of the prompt, that an answer may begin in


class Voting:
    """What a finished branch says is told to its program."""

    def __init__(self, tokenizer: Any, forecast: Forecast, faults: Faults):
        self.tokenizer = tokenizer
        self.forecast = forecast
        self.faults = faults

    def finish(self, live: LiveProgram, index: int, req: Req, reward: float | None = None) -> None:
        """The branch votes, or abstains; it also abstains where reading it fails."""
        ids, program = req.output_ids_through_stop, live.program
        try:
            text = self._decode(ids[-TAIL_TOKENS:])
            if not isinstance(req.finished_reason, FINISH_ENDED):
                self.forecast.branch_tokens.learn(len(ids))
            program.finish(index, text, generated_tokens(req, len(ids)), reward, lead=self._lead(live, req))
        except Exception as error:
            if program.branches[index].state is BranchState.IN_FLIGHT:
                raise
            self.faults.fall_back(
                "vote", error
            )  # counted as an abstention: the program goes on to its cap, as stock would

    def fail(self, live: LiveProgram, index: int, req: Req, why: dict[str, Any]) -> None:
        """SGLang gave the branch up."""
        live.failure = why
        # A client that gives up one branch of its own has others to send; a branch of ours is not tried again.
        live.program.fail(index, generated_tokens(req, len(req.output_ids)), closes=live.parent is not None)
        live.reqs.pop(index, None)

    def forget_silent(self, live: LiveProgram, index: int) -> None:
        """Keep no Req of a branch that will never speak."""
        program = live.program
        may_speak = program.winner == index or index in program.speakers
        if live.parent is None or not (may_speak or index in live.judges):
            live.reqs.pop(index, None)

    def _lead(self, live: LiveProgram, req: Req) -> str:
        """The end of a branch's prompt, where its answer may begin; read once where the server makes the branches."""
        if isinstance(tag_of(req), SentTag):
            return self._decode(req.origin_input_ids[-LEAD_TOKENS:])
        if live.lead is None:
            live.lead = self._decode(req.origin_input_ids[-LEAD_TOKENS:])
        return live.lead

    def _decode(self, ids: Any) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

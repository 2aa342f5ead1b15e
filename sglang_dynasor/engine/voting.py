"""A branch that has come to its end is read, and votes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_LENGTH

from sglang_dynasor.engine.fence import Fence
from sglang_dynasor.engine.live import LiveProgram, SentTag, generated_tokens, tag_of
from sglang_dynasor.engine.req import FINISH_ENDED
from sglang_dynasor.engine.texts import Texts
from sglang_dynasor.policy.branch import BranchState, Ending
from sglang_dynasor.policy.forecast import Forecast

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Voting:
    """What a finished branch says is told to its program."""

    def __init__(self, tokenizer: Any, forecast: Forecast, fence: Fence):
        self.texts = Texts(tokenizer)
        self.forecast = forecast
        self.fence = fence

    def finish(self, live: LiveProgram, index: int, req: Req, reward: float | None = None) -> None:
        """The branch votes, or abstains; it also abstains where reading it fails."""
        num_tokens, program = len(req.output_ids_through_stop), live.program
        try:
            lead = self._lead(live, req)
            text = self.texts.said(req, lead)
            if not isinstance(req.finished_reason, FINISH_ENDED):
                self.forecast.branch_tokens.learn(num_tokens)
            program.finish(
                index, text, generated_tokens(req, num_tokens), reward, lead=lead, ending=ending_of(req)
            )  # fmt: skip
        except Exception as error:
            if program.branches[index].state is BranchState.IN_FLIGHT or program.budget is not None:
                raise  # it was not counted; or others may wait for what it was to give back
            # Counted as an abstention: the program goes on to its cap, as stock would.
            self.fence.fall_back("vote", error, is_contained=True)

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
            return self.texts.lead(req)
        if live.lead is None:
            live.lead = self.texts.lead(req)
        return live.lead


def ending_of(req: Req) -> Ending:
    """How a branch has come to its own end, or to that of its time."""
    reason = req.finished_reason
    matched = None if reason is None else reason.to_json().get("matched")
    is_cut = isinstance(reason, FINISH_LENGTH | FINISH_ENDED)
    return Ending(is_cut, matched if isinstance(matched, str) else "")


def constraint_of(params: Any) -> str:
    """The sampling parameter that constrains a text by a grammar; empty: none does."""
    names = ("json_schema", "regex", "ebnf", "structural_tag")
    return next((name for name in names if getattr(params, name, None)), "")

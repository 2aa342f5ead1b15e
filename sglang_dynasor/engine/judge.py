"""Rewards for finished branches: one more token of the served model, read and never decoded, or another server's word."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN, Req

from sglang_dynasor.engine import media
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import JudgeTag, LiveProgram
from sglang_dynasor.engine.req import make_side
from sglang_dynasor.engine.reward_model import RewardModel
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.spec import JudgeSpec

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq

MOST_STEPS = 64  # of one branch that a process reward model is asked about; of more, evenly spread ones


class JudgeTokens(NamedTuple):
    """A judge's texts as the model reads them."""

    suffix: tuple[int, ...]
    good: int
    bad: int


@lru_cache(maxsize=256)
def judge_tokens(judge: JudgeSpec, tokenizer: Any) -> JudgeTokens:
    """The tokens of a judge.

    Raises:
        FieldError: a suffix of no tokens, or a label that is not exactly one.
    """
    suffix = tokenizer.encode(judge.suffix, add_special_tokens=False)
    if not suffix:
        raise FieldError(
            f"dynasor.judge_suffix={quoted(judge.suffix)} is no token of this model; send a text that asks it to judge"
        )
    labels: list[int] = []
    for key, text in (("good", judge.good), ("bad", judge.bad)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise FieldError(
                f"dynasor.judge_{key}={quoted(text)} is {len(ids)} tokens of this model; send a text that is one (mind a leading space)"
            )
        labels += ids
    if labels[0] == labels[1]:
        raise FieldError(
            f"dynasor.judge_good={quoted(judge.good)} and judge_bad={quoted(judge.bad)} are the same token; send two different ones"
        )
    return JudgeTokens(tuple(suffix), labels[0], labels[1])


def branch_ids(req: Req) -> list[int]:
    """The tokens of a finished branch without the one that ended it."""
    ids = list(req.output_ids_through_stop)
    return ids[:-1] if isinstance(req.finished_reason, FINISH_MATCHED_TOKEN) else ids


def branch_text(tokenizer: Any, req: Req) -> str:
    """Prompt and branch as text, as another server may tokenize it: without the token that begins every text."""
    ids = [*req.origin_input_ids, *branch_ids(req)]
    if ids and ids[0] == getattr(tokenizer, "bos_token_id", None):
        ids = ids[1:]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def reward_texts(tokenizer: Any, req: Req, judge: JudgeSpec) -> list[str]:
    """What the operator's reward model is asked about a finished branch, at most MOST_STEPS texts, the whole one last."""
    text = branch_text(tokenizer, req)
    if not judge.by_steps:
        return [text + judge.suffix]
    said = tokenizer.decode(branch_ids(req), clean_up_tokenization_spaces=False)
    start = len(text) - len(said)
    line_ends = (place + 1 for place, c in enumerate(said) if c == "\n")
    ends = [end for end in line_ends if said[:end].strip() and said[end:].strip()]
    stride = -(-len(ends) // (MOST_STEPS - 1)) or 1
    return [text[: start + end] + judge.suffix for end in [*ends[::stride], len(said)]]


class Judging:
    """Who looks after judges: internal Reqs of one token, whose only row is the judgement of a branch.

    Args:
        rewards: the operator's reward model; None on ranks that are told what it says.
        vote: what follows once a branch has its reward, or will never have one.
    """

    def __init__(
        self,
        scheduler: Any,
        inside: Inside,
        rewards: RewardModel | None,
        vote: Callable[[LiveProgram, int, float | None], None],
    ):
        self.scheduler = scheduler
        self.inside = inside
        self.rewards = rewards
        self._vote = vote

    def ask(self, live: LiveProgram, index: int, req: Req) -> bool:
        """Have a finished branch judged before it votes. Returns False where it cannot be."""
        judge = live.program.spec.judge
        if judge is None:
            return False
        tokenizer = self.scheduler.tokenizer
        if judge.is_external:
            live.judges[index] = None
            key = live.number, index
            if self.rewards is not None and not self.rewards.ask_about(
                key, partial(reward_texts, tokenizer, req, judge)
            ):
                self.rewards.lost[key] = None
            return True
        tokens = judge_tokens(judge, tokenizer)
        tag = JudgeTag(live, index, self, labels=(tokens.good, tokens.bad))
        # Prompt and branch are in the radix cache, so that it computes little more than its suffix.
        ids = [*req.origin_input_ids, *branch_ids(req), *tokens.suffix]
        made = make_side(self.scheduler, req, ids, self.inside.new_rid(), tag, max_new_tokens=1)
        if made is None:  # too long for the model
            return False
        assert live.parent is not None
        media.give(made, live.parent)
        live.judges[index] = made
        live.program.num_judge_tokens += len(tokens.suffix) + 1
        self.inside.put(made, tag)
        return True

    def settle(self, live: LiveProgram, index: int, reward: float | None) -> None:
        """A branch has its reward, or will never have one: now it votes."""
        if index in live.judges:
            del live.judges[index]
            self._vote(live, index, reward)

    def has_output(self, req: Req, tag: JudgeTag) -> None:
        """Nothing: its one token ends it."""

    def has_ended(self, req: Req, tag: JudgeTag) -> None:
        self.settle(tag.live, tag.index, tag.reward)

    def is_lost(self, req: Req, tag: JudgeTag, abort: AbortReq) -> None:
        self.settle(tag.live, tag.index, None)

    def has_left(self, tag: JudgeTag) -> None:
        """Nothing: rows are not kept for judges."""

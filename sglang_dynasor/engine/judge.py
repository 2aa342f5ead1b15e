"""Rewards for finished branches by the served model itself: one more token, read and never decoded."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN, Req

from sglang_dynasor.engine.branch import BranchTag, make_side
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.spec import JudgeSpec

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
            f"dynasor.judge_suffix={judge.suffix!r} is no token of this model; send a text that asks it to judge"
        )
    labels: list[int] = []
    for key, text in (("good", judge.good), ("bad", judge.bad)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise FieldError(
                f"dynasor.judge_{key}={text!r} is {len(ids)} tokens of this model; send a text that is one (mind a leading space)"
            )
        labels += ids
    if labels[0] == labels[1]:
        raise FieldError(
            f"dynasor.judge_good={judge.good!r} and judge_bad={judge.bad!r} are the same token; send two different ones"
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


def make_judge(scheduler: Any, branch: Any, tokens: JudgeTokens, rid: str, tag: BranchTag) -> Req | None:
    """An internal Req whose first row is the judgement of `branch`; None where the text is too long for the model.

    Prompt and branch are in the radix cache, so that it computes little more than its suffix.
    """
    ids = [*branch.origin_input_ids, *branch_ids(branch), *tokens.suffix]
    return make_side(scheduler, branch, ids, rid, tag, max_new_tokens=1)

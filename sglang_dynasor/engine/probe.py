"""Probes: a running thought is asked for its answer by a hidden child that reuses its KV and is gone.

The parent is not interrupted. Its KV so far is published to the radix cache, the child computes a short suffix and a few
tokens more, and nothing of it stays in the cache.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from math import exp
from typing import Any, NamedTuple

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN, Req

from sglang_dynasor.engine import media
from sglang_dynasor.engine.live import ProbeTag
from sglang_dynasor.engine.req import make_side
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.algorithm import LONG_COT
from sglang_dynasor.policy.answers import THINK_ENDS, extract_answer, is_complete
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.thought import Trial, hesitates, trial_answer
from sglang_dynasor.policy.thought_spec import ThoughtSpec

WORD_TOKENS = 16  # that a word of 32 characters and what stands before it may take
MOST_TRIAL_TOKENS = 24  # of an answer: more is no answer
# What asks for an answer, by where the extractor will look for it.
LEADS = {
    "auto": "**Final Answer**\n\\boxed{",
    "boxed": "**Final Answer**\n\\boxed{",
    "hash": "####",
    "choice": "The answer is (",
    "number": "The answer is ",
    "last_line": "The answer is ",
    "yes_no": "The answer is ",
    "json": "```json\n",
    "code": "```\n",
    "code:python": "```python\n",
}


class ThoughtTokens(NamedTuple):
    """A thought's texts as the model reads them."""

    suffix: tuple[int, ...]
    end: tuple[int, ...]
    lead: str  # the suffix as text: trial answers are read after it
    mark: str  # `end` without the space around it: where it is in the text, the thought is over
    new_line: tuple[int, ...]  # comes first where a thought is cut in the middle of a line, but not after the word
    word_ends: frozenset[int]  # with which the word may end after which it is asked; empty: at the end of a line


def thought_tokens(thought: ThoughtSpec, extractor: str, tokenizer: Any) -> ThoughtTokens:
    """The tokens that probe and close a thought of this model.

    Raises:
        FieldError: nothing tells how the model ends a thought or what asks for the answer, or a text of no tokens.
    """
    return _thought_tokens(thought.suffix, thought.end, thought.word, extractor, tokenizer)


@lru_cache(maxsize=8)
def _think_end(tokenizer: Any) -> str | None:
    """How the model ends a thought, as far as its tokenizer knows. Kept: a vocabulary takes a tenth of a second to copy."""
    template, vocabulary = str(getattr(tokenizer, "chat_template", None) or ""), getattr(tokenizer, "get_vocab", dict)()
    return next((mark for mark in THINK_ENDS if mark in vocabulary or mark in template), None)


@lru_cache(maxsize=256)
def _thought_tokens(suffix: str, end: str, word: str, extractor: str, tokenizer: Any) -> ThoughtTokens:
    if not end:
        mark = _think_end(tokenizer)
        if mark is None:
            raise FieldError(
                f"dynasor.algorithm={LONG_COT.name!r}: neither the tokenizer nor its chat template tells how this model ends a thought; "
                "send think_end, such as '</think>'"
            )
        end = f"{mark}\n\n"
    elif not end.strip():
        raise FieldError(
            f"dynasor.think_end={quoted(end)} is white space, which is in any thought; send what ends one, such as '</think>'"
        )
    if not suffix:
        lead = _lead(extractor)
        if not lead:
            raise FieldError(
                f"dynasor.answer={quoted(extractor)} with algorithm {LONG_COT.name!r}: nothing tells how to ask for such an answer; "
                "send probe_suffix"
            )
        suffix = end + lead
    if _holds_answer(suffix, extractor):
        raise FieldError(
            f"dynasor.probe_suffix={quoted(suffix)} has an answer in it already, as dynasor.answer={quoted(extractor)} reads it: every trial would "
            "give that one; send a text that only asks"
        )
    ids = {
        key: tuple(tokenizer.encode(text, add_special_tokens=False))
        for key, text in (("probe_suffix", suffix), ("think_end", end))
    }
    for key, tokens in ids.items():
        if not tokens:
            raise FieldError(f"dynasor.{key} is no token of this model; send a text that is")
    new_line = () if word else tuple(tokenizer.encode("\n", add_special_tokens=False))
    word_ends = _word_ends(word, tokenizer) if word else frozenset[int]()
    return ThoughtTokens(ids["probe_suffix"], ids["think_end"], suffix, end.strip(), new_line, word_ends)


def _lead(extractor: str) -> str:
    """What asks for an answer that `extractor` will find; empty where nothing does."""
    kind, _, rest = extractor.partition(":")
    if kind == "tag":
        return f"<{rest}>"
    return LEADS["json"] if kind == "json" else LEADS.get(extractor, "")


def _holds_answer(suffix: str, extractor: str) -> bool:
    """Whether a trial's answer could be read out of the suffix; what reads the last line finds something in any text."""
    is_found = extractor not in ("auto", "last_line") and extract_answer(suffix, extractor) is not None
    return is_found or is_complete(suffix, "", extractor)


def _word_ends(word: str, tokenizer: Any) -> frozenset[int]:
    """The tokens that a word may end with: small or capital, after a space, a new line or nothing."""
    spelled = (space + form for space in ("", " ", "\n") for form in (word, word.capitalize()))
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in spelled)
    return frozenset(ids[-1] for ids in encoded if ids)


def says(req: Req, word: str) -> bool:
    """Whether the latest of what `req` has said is `word`, whole."""
    text = _tokenizer(req).decode(list(req.output_ids[-WORD_TOKENS:])).casefold()
    return text.endswith(word.casefold()) and not text.removesuffix(word.casefold())[-1:].isalnum()


def _tokenizer(req: Req) -> Any:
    return req.tokenizer


def is_over(req: Req, tokens: ThoughtTokens, since: int) -> bool:
    """Whether `req` has ended its thought by itself, in what it has said since it had `since` tokens."""
    return tokens.mark in _tokenizer(req).decode(list(req.output_ids[max(0, since - len(tokens.end)) :]))


def make_probe(
    scheduler: Any, parent: Req, tokens: ThoughtTokens, rid: str, tag: ProbeTag, *, is_line_end: bool
) -> Req | None:
    """An internal Req that answers now what `parent` is thinking about; None where the text is too long for the model."""
    # The KV of the last token is not written yet, or in flight: the probe computes it once more.
    parent.refresh_fill_ids()
    up_to = len(parent.origin_input_ids) + len(parent.output_ids) - 1
    scheduler.tree_cache.checkpoint(parent, up_to=up_to)
    new_line = () if is_line_end else tokens.new_line
    ids = [*parent.origin_input_ids, *parent.output_ids, *new_line, *tokens.suffix]
    req = make_side(scheduler, parent, ids, rid, tag, max_new_tokens=MOST_TRIAL_TOKENS)
    if req is not None:
        assert tag.live.parent is not None
        media.give(req, tag.live.parent)
        req.skip_radix_cache_insert = True  # nobody will ask for it again
    return req


def cost_tokens(req: Req) -> int:
    """Tokens that a probe has computed: what the cache did not have, and its answer. 0 where it was not begun."""
    return len(req.origin_input_ids) - req.cached_tokens + len(req.output_ids) if req.output_ids else 0


def is_answered(req: Req, tokens: ThoughtTokens, extractor: str) -> bool:
    """Whether a running probe has said what it was asked for."""
    text = _tokenizer(req).decode(list(req.output_ids), skip_special_tokens=True)
    return is_complete(tokens.lead, text, extractor)


def read_trial(req: Req, tag: ProbeTag, tokens: ThoughtTokens, extractor: str, equal: str) -> Trial:
    """What a finished probe has found."""
    ids = list(req.output_ids_through_stop)
    logprobs = tag.logprobs[: len(ids)]
    if isinstance(req.finished_reason, FINISH_MATCHED_TOKEN):  # that it stops there is no part of the answer
        logprobs = logprobs[:-1]
    text = _tokenizer(req).decode(ids, skip_special_tokens=True)
    answer = trial_answer(tokens.lead, text, extractor)
    if hesitates(text, answer):
        answer = None
    probability = exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
    return Trial(
        answer, None if answer is None else answer_key(answer, equal, extractor), probability, tag.num_thought_tokens
    )


def closed(thought: array[int], tokens: ThoughtTokens, *, is_line_end: bool) -> array[int]:
    """A thought with the end that the model would have given it."""
    return array("q", [*thought, *(() if is_line_end else tokens.new_line), *tokens.end])

"""What a branch said, as its client would be returned it: the text that answers are read from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.parser.response_template import tool_close_token_ids
from sglang.srt.runtime_context import get_serving

from sglang_dynasor.policy.answers import THINK_ENDS, THINK_STARTS, is_thinking, opens_thought

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

TAIL_TOKENS = 4096  # decoded to look for an answer: bounds the work of a very long branch
HEAD_TOKENS = 16  # of such a one, that its thought begins in
LEAD_TOKENS = 64  # of the prompt, that an answer may begin in


def known(req: Req, ids: Iterable[int]) -> list[int]:
    """The tokens of a prompt that a tokenizer knows: where images stand SGLang puts numbers far beyond the vocabulary."""
    assert req.vocab_size is not None  # SGLang gives it to each
    return [token for token in ids if token < req.vocab_size]


class Texts:
    """Reads the texts of branches in the scheduler's process."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def said(self, req: Req, lead: str) -> str:
        """The end of what `req` said, trimmed as SGLang trims it; after `lead`, which may have begun a thought.

        What began before that end is no answer where it was a thought that goes on: then the text begins with its mark.
        """
        ids = req.output_ids_through_stop
        reason = {} if req.finished_reason is None else req.finished_reason.to_json()
        text = self._text(ids[-TAIL_TOKENS:], reason, req.sampling_params)
        if len(ids) > TAIL_TOKENS and self._is_in_long_thought(ids, lead, text):
            return THINK_STARTS[0] + text
        return text

    def lead(self, req: Req) -> str:
        """The end of the prompt of `req`, special tokens told: some models' thought begins with one."""
        return self.tokenizer.decode(known(req, req.origin_input_ids[-LEAD_TOKENS:]))

    def _text(self, ids: Any, reason: dict[str, Any], params: Any) -> str:
        trim: Any = DetokenizerManager.trim_matched_stop  # of token ids, or of their text
        text = self.tokenizer.decode(
            trim(self._detokenizer, list(ids), reason, params.no_stop_trim),
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        return trim(self._detokenizer, text, reason, params.no_stop_trim)

    @cached_property
    def _detokenizer(self) -> Any:
        """What SGLang's trimming asks its detokenizer."""
        parser = get_serving().tool_call_parser
        return SimpleNamespace(
            is_tool_call_parser_gpt_oss=parser == "gpt-oss",
            tool_close_token_ids=tool_close_token_ids(parser, self.tokenizer),
        )

    def _is_in_long_thought(self, ids: Any, lead: str, text: str) -> bool:
        """Whether a thought that began before `text` goes on in it."""
        if any(mark in text for mark in THINK_ENDS):
            return False
        head = self.tokenizer.decode(list(ids[:HEAD_TOKENS]))
        if not opens_thought(lead) and not is_thinking("", head):
            return False
        if self._end_tokens:
            return not any(token in ids for token in self._end_tokens)
        return is_thinking(lead, self.tokenizer.decode(list(ids)))

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """The ends of thoughts that are one token; empty where none is."""
        encoded = (self.tokenizer.encode(mark, add_special_tokens=False) for mark in THINK_ENDS)
        return frozenset(ids[0] for ids in encoded if len(ids) == 1)

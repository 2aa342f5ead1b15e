"""Where the answer of a running branch begins, told from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.live import BranchTag
from sglang_dynasor.policy.answers import answer_marks

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

TAIL_TOKENS = 8  # looked at to see whether an answer begins
SPACES = "\u0120\u2581\u010a \n\t"  # also as vocabularies write a space or a new line


class AnswerReader:
    """Finds where a running branch's answer begins, from its tokens as they come."""

    def __init__(self, tokenizer: Any):
        self.tokens = {i: token for token, i in vocabulary(tokenizer)}
        # Looking closer is for tokens that could end a mark; a space may belong to the same token.
        self.line_ends = {i for i, token in self.tokens.items() if token.endswith(("\n", "\u010a", "<0x0A>"))}
        self.ends = {i for i, token in self.tokens.items() if token.rstrip(SPACES).endswith(("#", "{"))}

    def begins(self, req: Req, tag: BranchTag, token: int) -> bool:
        """Whether the distribution that `token` was drawn from is that of the answer's first token."""
        if tag.is_at_answer:
            if not self.tokens.get(token, "").strip(SPACES):
                return False  # a space before the answer
            tag.is_at_answer = False
            return True
        if token in self.ends:  # a mark is ASCII, which vocabularies spell as it is: nothing need be decoded
            text = "".join(self.tokens.get(i, "") for i in req.output_ids[-TAIL_TOKENS:]).rstrip(SPACES)
            tag.is_at_answer = text.endswith(answer_marks(tag.live.program.spec.answer))
        return False


def vocabulary(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Tokens with their ids; none where a tokenizer does not list them, some list bytes."""
    for token, i in getattr(tokenizer, "get_vocab", dict)().items():
        yield token.decode(errors="replace") if isinstance(token, bytes) else token, i

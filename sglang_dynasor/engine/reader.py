"""Where the answer of a running branch begins and ends, told from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.live import Answering, BranchTag
from sglang_dynasor.policy.answers import answer_marks
from sglang_dynasor.policy.mixture import Said
from sglang_dynasor_kernels import BEGUN, FRESH, NEVER, SAYING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

TAIL_TOKENS = 8  # looked at to see whether an answer begins
MOST_ANSWER_TOKENS = 32  # of a branch that are followed, all its answers together
MARKS = answer_marks("auto")  # all there are
SPACES = "\u0120\u2581\u010a \n\t"  # also as vocabularies write a space or a new line
LINE_ENDS = ("\n", "\u010a", "<0x0A>")


class AnswerReader:
    """Follows the answers of running branches, from their tokens as they come."""

    def __init__(self, tokenizer: Any):
        self.tokens = {i: token for token, i in vocabulary(tokenizer)}
        self.line_ends = {i for i, token in self.tokens.items() if token.endswith(LINE_ENDS)}
        # Looking closer is for tokens that could end a mark: a space may belong to the same token, and the whole mark.
        spelt = [(i, token.rstrip(SPACES)) for i, token in self.tokens.items()]
        self.marks = {i for i, text in spelt if text.endswith(MARKS)}
        self.ends = self.marks | {i for i, text in spelt if text and any(mark.endswith(text) for mark in MARKS)}
        self.begins = {i for i, token in self.tokens.items() if begins(token)}  # may stand before such a token

    def standing(self, req: Req, tag: BranchTag | None) -> int:
        """What a branch has said, but for its last token (`keep_rows`): NEVER, FRESH, BEGUN or SAYING.

        With overlap that token is not known yet, else it is, and which holds is not asked: BEGUN goes by the two newest known.
        """
        if tag is None or tag.live.program.reason is not None or tag.num_answer_tokens >= MOST_ANSWER_TOKENS:
            return NEVER
        if tag.answering is not None:
            return SAYING
        ids, begins = req.output_ids, self.begins
        return BEGUN if ids and (ids[-1] in begins or (len(ids) > 1 and ids[-2] in begins)) else FRESH

    def follow(self, req: Req, tag: BranchTag, token: int) -> Said | None:
        """What the branch had said of its answer when `token`, its newest, was drawn; None: it was not at an answer.

        `tag.answering` is None then where the answer ends with `token`: by its line, by the brace that closes its box, with the
        branch, or because it is longer than what is followed.
        """
        answering = tag.answering
        if answering is None:
            if token in self.ends and tag.num_answer_tokens < MOST_ANSWER_TOKENS:
                tag.answering = self._begun(req, tag)
            return None
        said, text = answering.said, self.tokens.get(token, "")
        if not said and not text.strip(SPACES) and not req.finished():
            return None  # a space before the answer
        tag.num_answer_tokens += 1
        answering.said = (*said, token)
        is_over = req.finished() or tag.num_answer_tokens == MOST_ANSWER_TOKENS
        if is_over or (any(end in text for end in LINE_ENDS) if not answering.num_open else closes(answering, text)):
            tag.answering = None
        return said

    def _begun(self, req: Req, tag: BranchTag) -> Answering | None:
        """The answer that begins here, if one does: a mark is ASCII, which vocabularies spell as it is."""
        text = "".join(self.tokens.get(i, "") for i in req.output_ids[-TAIL_TOKENS:]).rstrip(SPACES)
        marks = answer_marks(tag.live.program.spec.answer)
        return next((Answering(num_open=mark.count("{")) for mark in marks if text.endswith(mark)), None)


def begins(token: str) -> bool:
    """Whether a mark could have begun with the end of this token, or before it, and goes on with the next."""
    return any(
        (bool(token) and token in mark[:-1]) or any(token.endswith(mark[:n]) for n in range(1, len(mark)))
        for mark in MARKS
    )  # fmt: skip


def closes(answering: Answering, text: str) -> bool:
    r"""Whether `text` closes the box that an answer is in. `\{` and `\}` are signs, not groups."""
    for char in text:
        if not answering.is_escaped and char in "{}":
            answering.num_open += 1 if char == "{" else -1
            if not answering.num_open:
                return True
        answering.is_escaped = char == "\\" and not answering.is_escaped
    return False


def vocabulary(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Tokens with their ids; none where a tokenizer does not list them, some list bytes."""
    for token, i in getattr(tokenizer, "get_vocab", dict)().items():
        yield token.decode(errors="replace") if isinstance(token, bytes) else token, i

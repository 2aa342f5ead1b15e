"""Answers that may be the same: asked of the served model by one token, or of what the first rank has beside the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.utils.rank_consensus_checker import assert_same

from sglang_dynasor.engine.findings import Findings
from sglang_dynasor.engine.inside import Inside
from sglang_dynasor.engine.live import JudgeTag, LiveProgram
from sglang_dynasor.engine.probe import cost_tokens
from sglang_dynasor.engine.readings import Readings
from sglang_dynasor.engine.req import make_side
from sglang_dynasor.errors import FieldError

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import Req

# Whether each entails the other is what is asked (arXiv 2302.09664), in one question: two cost twice as much. By examples, so that
# a model that only completes text answers too; they stay in the radix cache.
PREAMBLE = """Do the two answers mean the same? Say yes or no.

Answer: Paris
Answer: It is Paris.
Same: yes

Answer: It opens at nine.
Answer: It closes at nine.
Same: no

Answer: The cells lose water and shrink.
Answer: Water leaves the cells, so they get smaller.
Same: yes

Answer: 12 days
Answer: 21 days
Same: no

"""
LABELS = ((" yes", " no"), ("yes", "no"))  # the latter where a space is no part of a token


class SameTokens(NamedTuple):
    """The question as the model reads it."""

    preamble: tuple[int, ...]
    yes: int
    no: int


@lru_cache(maxsize=8)
def same_tokens(tokenizer: Any) -> SameTokens:
    """The tokens that ask a model whether two answers mean the same.

    Raises:
        FieldError: its "yes" or "no" is not one token.
    """
    for pair in LABELS:
        yes, no = (tokenizer.encode(text, add_special_tokens=False) for text in pair)
        if len(yes) == len(no) == 1 and yes != no:
            preamble = list(tokenizer.encode(PREAMBLE))
            if preamble[-1:] == [getattr(tokenizer, "eos_token_id", None)]:
                del preamble[-1]
            return SameTokens(tuple(preamble), yes[0], no[0])
    raise FieldError(
        f"dynasor.equal='model': {LABELS[0][0]!r} and {LABELS[0][1]!r} are not one token each of this model, so it cannot say by one token "
        "whether answers mean the same; use equal 'math' or 'text'"
    )


def same_ids(tokenizer: Any, one: str, other: str) -> list[int]:
    """The question about two answers, each in one line."""
    text = f"Answer: {' '.join(one.split())}\nAnswer: {' '.join(other.split())}\nSame:"
    return [*same_tokens(tokenizer).preamble, *tokenizer.encode(text, add_special_tokens=False)]


class Comparing:
    """Who looks after comparisons, and after the internal Reqs of one token that ask the model.

    Args:
        findings: where the first rank asks; None on ranks that are told.
        readings: where questions to the model wait to be tokenized.
        go_on: what follows once votes may have merged.
    """

    def __init__(
        self,
        scheduler: Any,
        inside: Inside,
        findings: Findings | None,
        readings: Readings,
        go_on: Callable[[LiveProgram], None],
    ):
        self.scheduler = scheduler
        self.inside = inside
        self.findings = findings
        self.readings = readings
        self.num = 0  # new answers that were compared
        self.num_merges = 0
        self.num_lost = 0  # that the model was not, or could not be, asked about
        self._go_on = go_on

    def ask(self, live: LiveProgram) -> None:
        """Have the new answers of a program compared that nobody compares yet."""
        program = live.program
        for index, others in list(program.comparisons.under_way.items()):
            if index in live.comparisons or index not in program.comparisons.under_way or program.reason is not None:
                continue
            self.num += 1
            live.comparisons[index] = None
            is_symbolic = program.spec.comparer == "symbolic"
            texts = {i: (b.key if is_symbolic else b.answer) or "" for i, b in enumerate(program.branches)}
            key, known = (live.number, index), {i: texts[i] for i in others}
            if self.findings is not None and not self.findings.ask(key, program.spec, texts[index], known):
                self.findings.lost[key] = None
            if program.spec.comparer == "model":
                self._ask_model(live, index, others[0])

    def _ask_model(self, live: LiveProgram, index: int, other: int) -> None:
        """Ask the model whether the answers of two branches mean the same, as soon as the step has room to tokenize them."""
        one, two = (live.program.branches[i].answer or "" for i in (index, other))
        self.readings.add(live, len(one) + len(two), partial(self._put, index=index, other=other, one=one, two=two))

    def _put(self, live: LiveProgram, index: int, other: int, one: str, two: str) -> None:
        if live.parent is None or index not in live.comparisons:  # it was given up meanwhile
            return
        tokens, ids = same_tokens(self.scheduler.tokenizer), same_ids(self.scheduler.tokenizer, one, two)
        tag = JudgeTag(live, index, self, labels=(tokens.yes, tokens.no))
        req = make_side(self.scheduler, live.parent, ids, self.inside.new_rid(), tag, max_new_tokens=1)
        if req is None:  # too long for the model
            self.num_lost += 1
            self.settle(live, index, None, None)
            return
        assert_same("dynasor compares branches %d and %d of %s", index, other, live.program.id)
        live.comparisons[index] = req
        self.inside.put(req, tag)

    def settle(self, live: LiveProgram, index: int, into: int | None, score: float | None) -> None:
        """It was found whose answer that of a branch is, or will never be found: votes merge, and the program goes on."""
        if index not in live.comparisons:
            return
        req = live.comparisons.pop(index)
        if req is not None:
            self.inside.end(req)
        if self.findings is not None:
            self.findings.forget((live.number, index))
        num_merges = len(live.program.comparisons.merges)
        live.program.settle(index, into, score)
        self.num_merges += len(live.program.comparisons.merges) - num_merges
        self._go_on(live)

    def has_output(self, req: Req, tag: JudgeTag) -> None:
        """Nothing: its one token ends it."""

    def has_ended(self, req: Req, tag: JudgeTag) -> None:
        live, index = tag.live, tag.index
        live.program.comparisons.num_tokens += cost_tokens(req)
        if live.comparisons.get(index) is not req:  # nobody waits for it
            return
        live.comparisons[index] = None
        if tag.reward is None:
            self.num_lost += 1
            self.settle(live, index, None, None)
        elif tag.reward >= live.program.spec.least_score:
            self.settle(live, index, live.program.comparisons.under_way[index][0], tag.reward)
        elif (other := live.program.comparisons.pass_over(index)) is None:
            self.settle(live, index, None, None)
        else:
            self._ask_model(live, index, other)

    def is_lost(self, req: Req, tag: JudgeTag, abort: AbortReq) -> None:
        if tag.live.comparisons.get(tag.index) is req:
            self.num_lost += 1
            self.settle(tag.live, tag.index, None, None)

    def has_left(self, tag: JudgeTag) -> None:
        """Nothing: rows are not kept for comparisons."""

"""A branch of a program: one sampled continuation, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from sglang_dynasor.policy.answers import is_thinking, read_answer, thinks_on
from sglang_dynasor.policy.confidence import Confidence
from sglang_dynasor.policy.thought import Trial


class BranchState(StrEnum):
    IN_FLIGHT = "in_flight"
    FINISHED = "finished"  # it came to its own end and voted or abstained
    ENDED = "ended"  # the program no longer needed it
    WEAK = "weak"  # ended for its low confidence: it abstains
    FAILED = "failed"  # the engine gave it up: timeout, full queue, abort


class Ending(NamedTuple):
    """How a branch came to its own end."""

    is_cut: bool = False  # by its length, or because time was up: what it says may be unfinished
    stop: str = ""  # the stop string or pattern that ended it; empty: a token of the model's


@dataclass(slots=True)
class Branch:
    state: BranchState = BranchState.IN_FLIGHT
    num_tokens: int = 0
    num_cached_tokens: int = 0  # of its prompt, found in the radix cache
    num_reasoning_tokens: int = 0  # of `num_tokens`, in its thought
    answer: str | None = None  # as written
    key: str | None = None  # as counted
    reward: float | None = None  # in [0, 1], of its judge
    confidence: Confidence | None = None  # of its tokens, where somebody asked
    trials: list[Trial] = field(default_factory=list[Trial])  # what its thought would have answered, asked in turn
    closed_at: int | None = None  # tokens of its thought when that was closed
    ending: Ending | None = None  # of one that came to its own end
    is_thinking: bool = False  # it ended inside a thought: it has no answer
    thinks_on: bool = False  # its thought was closed, and it went on thinking

    @property
    def is_thought_open(self) -> bool:
        """Whether it still thinks, as far as is known: it runs, and nobody has closed its thought."""
        return self.state is BranchState.IN_FLIGHT and self.closed_at is None

    def read(self, text: str, extractor: str, *, lead: str, think_end: str, is_cut: bool) -> str | None:
        """The answer as written that it gives with `text`, after `lead`; None: none. Notes whether it thinks, or went on to.

        Args:
            think_end: what ends its thought, where the client names it; else empty.
            is_cut: whether `text` may be unfinished.
        """
        self.thinks_on = self.closed_at is not None and thinks_on(text, think_end)
        has_end = not think_end or think_end in text
        if think_end and has_end:
            lead, text = think_end, text.rpartition(think_end)[2]  # it may begin the answer
        answer = read_answer(lead, text, extractor, is_cut=is_cut)
        self.is_thinking = answer is None and (is_thinking(lead, text) or not has_end)
        return answer

    @property
    def finish_reason(self) -> str | None:
        """What a record says of its end; None while it is in flight."""
        if self.state is BranchState.IN_FLIGHT:
            return None
        if self.state is BranchState.FINISHED:
            return "length" if self.ending is not None and self.ending.is_cut else "stop"
        return str(self.state)

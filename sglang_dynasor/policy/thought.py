"""A long chain of thought: when its answer stands, though it goes on thinking.

Now and then the chain is asked what it would answer if it stopped here (a trial). Agreement of a few trials alone destroys
answers: with three in a row R1-Distill-Qwen-7B fell from 83.4 to 37.6 % (docs/long_cot.md). So a trial must also be
likely by itself. Sources: "Dynasor-CoT", arXiv 2412.20993, section 2.1; DEER, arXiv 2504.15895.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from sglang_dynasor.policy.answers import THINK_ENDS, THINK_STARTS, extract_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.number import first_number
from sglang_dynasor.policy.thought_spec import ThoughtSpec

PRICE_FRAC = 0.03  # of a thought's tokens that asking may take, where the client has not said how often to ask
FIRST_TRIAL_TOKENS = 4  # that a trial's answer is taken to need before the first one is seen
MOST_LINE_TOKENS = 64  # waited for, before a thought is asked in the middle of a line
LIKELY = 0.5  # a trial's answer, for which its chain counts among others
WAVE_STEPS = 8  # that a probe waits for others at most
THOUGHTS_PER_WAVE_STEP = 4  # that could be closed: a pass holds up fewer where fewer think, and is worth less waiting

PUBLISHED_WARNING = (
    "exit 'published' is the rule of the Dynasor repository (three agreeing probes, 64 tokens apart): measured elsewhere "
    "it cost 46 points of accuracy; the default 'trial' does not"
)
# On word boundaries: "but" must not be found in "button". The words are the Dynasor repository's.
_HESITATION = re.compile(r"\b(?:wait|hold|but|okay|no|hmm)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a chain would have answered at one place of its thought."""

    answer: str | None  # as written; None: it gave none, or hesitated
    key: str | None  # as counted
    probability: float  # geometric mean over the answer's tokens, in [0, 1]
    num_tokens: int  # of the thought at that place


def trial_answer(lead: str, text: str, extractor: str) -> str | None:
    """What a trial answers with `text`, after `lead` asked; None where it answers nothing.

    The lead's words are no part of a line that the thought's own end would not have. And a trial goes on after its number:
    there the first counts, not the last.
    """
    if extractor == "number" and not any(mark in text for mark in (*THINK_STARTS, *THINK_ENDS)):
        found = first_number(lead + text, len(lead))
        return None if found is None else found.text
    if extractor == "last_line":
        lead = lead[: lead.rfind("\n") + 1]
    return extract_answer(lead + text, extractor)


def hesitates(text: str, answer: str | None = None) -> bool:
    """Whether a trial takes itself back: it says "wait", "hmm" and the like. Not where "no" is all that it answers."""
    if answer is not None and answer_key(answer).casefold() == "no":  # `yes_no` reads "No." as no
        text = re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", " ", text, count=1, flags=re.IGNORECASE)
    return _HESITATION.search(text) is not None


def is_confident(trial: Trial, thought: ThoughtSpec) -> bool:
    """Whether a trial counts: it has an answer that is likely enough."""
    return trial.key is not None and trial.probability >= thought.level


def is_likely(trial: Trial) -> bool:
    """Whether a trial speaks for its chain among others: its answer is likelier than not."""
    return trial.key is not None and trial.probability >= LIKELY


def is_settled(trials: Sequence[Trial], thought: ThoughtSpec) -> bool:
    """Whether the last `thought.agree` trials give the same answer, each of them confidently; never of fewer."""
    last = trials[-thought.agree :]
    return (
        len(last) == thought.agree and len({t.key for t in last}) == 1 and all(is_confident(t, thought) for t in last)
    )


def may_settle(trials: Sequence[Trial], thought: ThoughtSpec) -> bool:
    """Whether one more trial could settle it: there are `thought.agree - 1` before it that agree, each confidently."""
    num_before = thought.agree - 1
    last = trials[max(0, len(trials) - num_before) :]
    return len(last) == num_before and len({t.key for t in last}) <= 1 and all(is_confident(t, thought) for t in last)


def next_probe_tokens(thought: ThoughtSpec, num_tokens: int, costs: Sequence[int], num_suffix_tokens: int) -> int:
    """The length in tokens, at least 1, from which on a thought is asked next.

    The next multiple of `thought.every_tokens`, where the client has set it: however late it was asked last, as often as
    that. Else as soon as all its probes, the next one taken to cost what they cost on average, are no more than PRICE_FRAC
    of the thought. So they never take more than that and one probe's excess over the average, for which the next one waits.

    Args:
        num_tokens: of the thought when it was asked last; 0: it was not.
        costs: tokens that each of its probes has computed.
        num_suffix_tokens: that every probe computes before its answer.
    """
    if (every := thought.every_tokens) is not None:
        return (num_tokens // every + 1) * every if num_tokens else thought.min_tokens or every
    expected = sum(costs) / len(costs) if costs else num_suffix_tokens + FIRST_TRIAL_TOKENS
    return max(thought.min_tokens, num_tokens + 1, ceil((sum(costs) + expected) / PRICE_FRAC))


def is_place_to_ask(num_tokens: int, at_tokens: int, *, is_line_end: bool) -> bool:
    """Whether a thought that may be asked from `at_tokens` on is asked here: at the end of a line, or in one too long to wait for."""
    return is_line_end or num_tokens >= at_tokens + MOST_LINE_TOKENS


def is_wave_due(
    num_asked: int, num_thoughts: int, num_steps: int, *, is_pass_next: bool, is_urgent: bool
) -> bool:  # fmt: skip
    """Whether probes that were made are computed now: every prefill pass holds up all that decode, so several go at once.

    Args:
        num_asked: thoughts that are being asked, those that wait included.
        num_thoughts: that may be asked.
        num_steps: that the first one has waited, this one included.
        is_pass_next: whether a prefill pass comes anyway.
        is_urgent: whether one of them could close its thought: then waiting costs what is thought meanwhile.
    """
    most_steps = min(WAVE_STEPS, num_thoughts // THOUGHTS_PER_WAVE_STEP) if is_urgent else WAVE_STEPS
    return is_pass_next or num_asked >= num_thoughts or num_steps >= most_steps


def agreement(trials: Sequence[Trial], window: int) -> float:
    """certaindex of one chain: the share of the last `window` trials that say what the latest says, in [0, 1].

    0 without trials, or where the latest has no answer. Source: arXiv 2412.20993, section 2.1 (C_k).
    """
    last = trials[-window:]
    if not last or last[-1].key is None:
        return 0.0
    return sum(trial.key == last[-1].key for trial in last) / window

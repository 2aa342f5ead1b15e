"""When a program has seen enough: one pure function per rule, and rules joined by "and" / "or".

A rule is written `name` or `name:level`, e.g. "predictive:0.05", "window:5 and margin"; or as one of LEVELS, e.g. "fast".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple

import numpy as np

from sglang_dynasor.config import CAREFUL, LEVELS
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.certaindex import answer_entropy, beta_certainty
from sglang_dynasor.policy.confidence import warmup_branches
from sglang_dynasor.policy.evidence import Evidence

MAX_STOP_CHARS = 256
MOST_REWARD = 1.0  # that a vote weighs by reward


def predictive(evidence: Evidence, level: float) -> bool:
    """The risk that the branches left change the answer, times how cheap they are, is at most `level`; from two votes on."""
    return evidence.num_votes >= 2 and evidence.risk * evidence.cheapness <= level


def entropy(evidence: Evidence, level: float) -> bool:
    """The answers' entropy is as low as certaindex `level` asks of five votes, from five votes on.

    At five votes this is the paper's rule. Beyond, the entropy is still measured against log 5: with the paper's own
    log n a growing tie would pass (an even split of 16 scores 0.75). Source: arXiv 2412.20993, sections 3.1 and B.1.
    """
    return evidence.num_votes >= 5 and answer_entropy(evidence.counts) <= (1 - level) * log(5)


def window(evidence: Evidence, level: float) -> bool:
    """The last full window of `level` finished branches is unanimous. Source: ESC, arXiv 2401.10480."""
    size = int(level)
    if len(evidence.recent) < size or len(evidence.recent) % size:
        return False
    last = evidence.recent[-size:]
    return last[0] is not None and len(set(last)) == 1


def beta(evidence: Evidence, level: float) -> bool:
    """P(the leader beats the next answer) is at least `level` (Adaptive-Consistency): 4-0, 6-1, 8-2 at 0.95."""
    first, second = (*evidence.counts, 0, 0)[:2]
    return beta_certainty(first, second) >= level


def margin(evidence: Evidence, level: float) -> bool:
    """The leader cannot be overtaken: lossless. `level` is not used.

    By weight each branch left may add MOST_REWARD to another answer, and nothing to the leader.
    """
    if not evidence.weights:
        return evidence.lead > evidence.num_left
    first, second = (*evidence.weights, 0.0)[:2]
    return first - second > evidence.num_left * MOST_REWARD


def reward(evidence: Evidence, level: float) -> bool:
    """The mean reward is at least `level`; never without rewards. Source: arXiv 2412.20993, section B.1."""
    mean = evidence.reward_mean
    return mean is not None and mean >= level


def best(evidence: Evidence, level: float) -> bool:
    """The best reward is at least `level`; never without rewards. Source: arXiv 2412.20993, section B.1 (Rebase)."""
    best = evidence.reward_max
    return best is not None and best >= level


def confidence(evidence: Evidence, level: float) -> bool:
    """The leading answer has a share of at least `level` of the votes, each weighted by its branch's confidence.

    From `warmup_branches` votes on. Source: DeepConf, arXiv 2508.15260, section 3.3 (adaptive sampling).
    """
    cap = len(evidence.recent) + evidence.num_left
    return evidence.num_votes >= warmup_branches(cap) and evidence.leader_share >= level


def trials(evidence: Evidence, level: float) -> bool:
    """The leading answer has kept a share of at least `level` of all chains, asked while they think, for as long as the client
    says (chains.py)."""
    return evidence.standing.is_held and evidence.standing.share >= level


def mixture(evidence: Evidence, level: float) -> bool:
    """The mixed answer distribution of three or more branches has an entropy as low as certaindex `level` asks of five votes.

    Branches that have said their answer count before they have finished. Somebody must have voted, and a branch of the leading
    answer must be among them (`Program.evidence`).
    """
    return _is_mixed(evidence) and evidence.mixture.entropy <= (1 - level) * log(5)


def disagreement(evidence: Evidence, level: float) -> bool:
    """The answer distributions of three or more branches differ by at most `level` nats, each branch's own doubt left out."""
    return _is_mixed(evidence) and evidence.disagreement <= level


def doubt(evidence: Evidence, level: float) -> bool:
    """Three or more branches doubt their answers by at most `level` nats, on average."""
    return _is_mixed(evidence) and evidence.answer_entropy <= level


def _is_mixed(evidence: Evidence) -> bool:
    return evidence.num_votes > 0 and evidence.mixture.num_branches >= 3


def never(evidence: Evidence, level: float) -> bool:
    """Use the whole cap."""
    return False


class Rule(NamedTuple):
    """A rule with its default level and the levels allowed."""

    stops: Callable[[Evidence, float], bool]
    default: float
    low: float
    high: float
    excludes_low: bool = False  # the least level is not allowed itself

    def allows(self, level: float) -> bool:
        return self.low <= level <= self.high and not (self.excludes_low and level == self.low)

    @property
    def levels(self) -> str:
        return f"{'(' if self.excludes_low else '['}{self.low:g}, {self.high:g}]"


RULES = {
    "predictive": Rule(predictive, LEVELS[CAREFUL], 0.0, 0.5),
    "entropy": Rule(entropy, 0.7, 0.0, 1.0),
    "window": Rule(window, 5, 2, 64),
    "beta": Rule(beta, 0.95, 0.5, 1.0),
    "margin": Rule(margin, 0, 0, 0),
    "confidence": Rule(confidence, 0.95, 0.5, 1.0),
    "mixture": Rule(mixture, 0.9, 0.0, 1.0),
    "disagreement": Rule(disagreement, 0.1, 0.0, 10.0),
    "answer_entropy": Rule(doubt, 0.1, 0.0, 10.0),
    "trials": Rule(trials, 0.8, 0.5, 1.0, excludes_low=True),
    "reward": Rule(reward, 0.8, 0.0, 1.0),
    "best": Rule(best, 0.95, 0.0, 1.0),
    "never": Rule(never, 0, 0, 0),
}
# Rules that judge the vote: a tie never stops, nor an answer that leads by number but not by weight.
_VOTE_RULES = frozenset(RULES) - {"reward", "best", "never", "trials"}
# Rules of which a lower level asks for more.
_LOW_IS_STRICT = frozenset({"predictive", "disagreement", "answer_entropy"})
# Rules that read the logits of running branches (engine/statistics.py).
_ANSWER_RULES = frozenset({"mixture", "disagreement", "answer_entropy"})  # where a mark tells that their answer begins
_LOGIT_RULES = _ANSWER_RULES | {"confidence"}


@dataclass(frozen=True, slots=True)
class StopRule:
    """One rule or several, all or any of which must hold; or a function of the author's own (`own_rule`)."""

    text: str
    parts: tuple[tuple[str, float], ...]
    needs_all: bool
    function: Callable[[Evidence], bool] | None = None

    @property
    def needs_statistics(self) -> bool:
        return any(name in _LOGIT_RULES for name, _ in self.parts)

    @property
    def reads_answers(self) -> bool:
        """Whether it asks what running branches say in their answers."""
        return any(name in _ANSWER_RULES for name, _ in self.parts)

    def uses(self, rule: str) -> bool:
        return self.level_of(rule) is not None

    def level_of(self, rule: str) -> float | None:
        """The level that decides, of a rule other than `window`; None: it is no part of this."""
        return next((level for name, level in self.parts if name == rule), None)

    def stops(self, evidence: Evidence) -> bool:
        """Whether a program with this evidence may end now. A tie of votes never stops, nor a contested lead; but what all chains
        say may.

        An author's own function is asked whatever the votes are.

        Raises:
            FieldError: the author's function returned something else than a bool.
        """
        if self.function is not None:
            return self._ask(self.function, evidence)
        parts = self.parts
        if (evidence.lead == 0 or evidence.is_contested) and any(name in _VOTE_RULES for name, _ in parts):
            parts = () if self.needs_all else tuple(part for part in parts if part[0] == "trials")
        held = (RULES[name].stops(evidence, level) for name, level in parts)
        return bool(parts) and all(held) if self.needs_all else any(held)

    def _ask(self, function: Callable[[Evidence], Any], evidence: Evidence) -> bool:
        held = function(evidence)
        if isinstance(held, bool | np.bool_):
            return bool(held)
        raise FieldError(
            f"stop={self.text} returned {held!r}, a {type(held).__name__}; a stopping rule says True or False of the evidence"
        )


def own_rule(function: Callable[[Evidence], bool]) -> StopRule:
    """An author's function of the evidence as a rule.

    It must be pure: it is also asked about votes that have not come, to find how many could decide, and what it said once
    about equal evidence stands. It is asked here about no votes at all, so that what is wrong with it is said at once.

    Raises:
        FieldError: it returned something else than a bool; or whatever it raises itself.
    """
    name = getattr(function, "__name__", type(function).__name__)
    rule = StopRule(name, (), needs_all=True, function=function)
    rule.stops(Evidence((), 0, 1))
    return rule


def parse_stop(text: str) -> StopRule:
    """The rule that `text` writes.

    Raises:
        FieldError: an unknown name, a level outside the rule's range, "and" mixed with "or", or a text longer than
            MAX_STOP_CHARS: every rule is asked after every branch.
    """
    if len(text) > MAX_STOP_CHARS:
        raise FieldError(f"dynasor.stop has {len(text)} characters; at most {MAX_STOP_CHARS} are allowed")
    words = text.split()
    joiners = set(words[1::2])
    if not words or len(words) % 2 == 0 or not joiners <= {"and", "or"} or len(joiners) > 1:
        raise FieldError(
            f"dynasor.stop={quoted(text)} is no rule; write 'NAME', 'NAME:LEVEL' or several joined by only 'and' or only 'or'"
        )
    parts: list[tuple[str, float]] = []
    for word in words[::2]:
        if word in LEVELS:
            parts.append(("predictive", LEVELS[word]))
            continue
        name, sep, level_text = word.partition(":")
        if name not in RULES:
            known = ", ".join((*LEVELS, *RULES))
            raise FieldError(f"dynasor.stop={quoted(text)}: {quoted(name)} is not a rule; use one of {known}")
        rule = RULES[name]
        try:
            level = float(level_text) if sep else rule.default
        except ValueError:
            level = float("nan")
        if not rule.allows(level) or (name == "window" and level != int(level)):
            raise FieldError(
                f"dynasor.stop={quoted(text)}: level {quoted(level_text)} of {quoted(name)} is outside {rule.levels}"
                + (" or no whole number" if name == "window" else "")
            )
        parts.append((name, level))
    needs_all = joiners != {"or"}
    return StopRule(" ".join(words), _deciding(parts, needs_all), needs_all)


def _deciding(parts: list[tuple[str, float]], needs_all: bool) -> tuple[tuple[str, float], ...]:
    """Of several levels of one rule the one that decides, so that each is asked once; but windows of every size."""
    deciding: dict[tuple[str, float], float] = {}
    for name, level in parts:
        key = (name, level if name == "window" else 0.0)
        choose = max if needs_all != (name in _LOW_IS_STRICT) else min
        deciding[key] = choose(level, deciding.get(key, level))
    return tuple((name, level) for (name, _), level in deciding.items())

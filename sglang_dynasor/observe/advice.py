"""What to change, and the counts that it rests on. Nothing is suggested on fewer than FEWEST programs with the same settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import floor
from typing import NamedTuple

from sglang_dynasor.config import LEVELS
from sglang_dynasor.observe.entry import Entry
from sglang_dynasor.observe.spread import Spread
from sglang_dynasor.policy.equal import COMPARERS
from sglang_dynasor.policy.values import MAX_DEADLINE_S

FEWEST = 30  # programs
USED_FRAC = 0.75  # of the cap: more than that is no cap that nobody uses
CAP_FRAC = 0.8  # of programs that used their whole cap, for a rule that does not end them
APART, TOGETHER = 0.5, 0.8  # mean share of the leading answer: they never agree; they agreed long before
DIFFERENT = 0.5  # different answers of a vote: as if no two were ever the same
LATE_FRAC = 0.5  # of programs that their deadline ends
CUT_FRAC = 0.2  # of branches that are cut by their length, as the alert has it
UNREAD_FRAC = 0.3  # of branches whose answer is not found, as the alert has it
ABORTED_FRAC = 0.2
PRICED_FRAC, UNSURE = 0.5, 0.8  # of programs that a price ended; their mean certaindex
_FORMULAS = ("", "auto", "boxed", "hash")  # extractors of what sympy can read
_SETTLES = ("certain", "cap")  # outcomes that a rule and its cap decide


class Kind(NamedTuple):
    """Programs with the same settings."""

    template: str
    algorithm: str
    stop_rule: str
    extractor: str
    equal: str
    cap: int

    @property
    def label(self) -> str:
        parts = (self.template or self.algorithm, f"cap {self.cap}", self.stop_rule, self.extractor, self.equal)
        return ", ".join(filter(None, parts))


class Advice(NamedTuple):
    """A setting to change."""

    kind: Kind
    setting: str
    value: str
    why: str
    num_tokens: int  # that such programs took


@dataclass(slots=True)
class Seen:
    """What is known of the programs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    num_tokens: int = 0
    most_branches: int = 0  # of those that were not cut short by time, money or their client
    shares: Spread = field(default_factory=Spread)  # of the leading answer, where the whole cap was used
    variety: Spread = field(default_factory=Spread)  # different answers by branches, likewise
    num_by_vote: int = 0
    num_own_branches: int = 0  # of programs that were not cut short; as the next three
    num_cut: int = 0
    num_unread: int = 0
    cut_tokens: int = 0
    deadlines: Spread = field(default_factory=Spread)
    late_branches: Spread = field(default_factory=Spread)  # of those that a deadline ended
    num_closed: int = 0  # chains of thought; of such programs, too, as the next three
    num_probes: int = 0
    thought_tokens: Spread = field(default_factory=Spread)
    agree: float = 0.0
    aborted_s: Spread = field(default_factory=Spread)
    price: float = 0.0
    priced: Spread = field(default_factory=Spread)  # certaindex of those that a price ended

    @property
    def num_answered(self) -> int:
        return sum(self.outcomes[name] for name in ("certain", "cap", "deadline", "operator", "budget", "price"))

    @property
    def num_settled(self) -> int:
        return sum(self.outcomes[name] for name in _SETTLES)

    def add(self, entry: Entry) -> None:
        self.outcomes[entry.outcome] += 1
        self.num_tokens += entry.num_tokens
        self.num_by_vote += entry.is_by_vote
        if entry.outcome in _SETTLES:
            self.most_branches = max(self.most_branches, entry.num_branches)
        if entry.outcome == "cap" and entry.num_branches:
            self.shares.add(entry.leader_share)
            self.variety.add(entry.num_answers / entry.num_branches)
        if entry.deadline_s is not None:
            self.deadlines.add(entry.deadline_s)
        if entry.outcome == "deadline":
            self.late_branches.add(entry.num_branches)
        elif entry.outcome in _SETTLES:
            self.num_own_branches += entry.num_branches
            self.num_cut += entry.num_truncated
            self.num_unread += entry.num_unread
            self.cut_tokens = max(self.cut_tokens, entry.cut_tokens)
            self.num_closed += entry.num_chains_closed
            self.num_probes += entry.num_probes
            self.thought_tokens.add(entry.num_tokens / max(1, entry.num_branches))
            self.agree = max(self.agree, entry.agree or 0.0)
        if entry.outcome == "aborted" and entry.took_s is not None:
            self.aborted_s.add(entry.took_s)
        if entry.outcome == "price":
            self.price = max(self.price, entry.price or 0.0)
            self.priced.add(entry.certaindex or 0.0)


def advice(kind: Kind, seen: Seen) -> Iterator[Advice]:
    """What to change for programs like these; nothing where there are too few, or nothing is wrong."""
    for look in (_cap, _agreement, _deadline, _length, _extractor, _thoughts, _patience, _price):
        if (found := look(kind, seen)) is not None:
            yield Advice(kind, *found, seen.num_tokens)


Found = tuple[str, str, str] | None  # a setting, its value, why


def _cap(kind: Kind, seen: Seen) -> Found:
    """A cap that nobody uses: rows are planned for it, and the rule asks for more the more branches could still disagree."""
    num, most = seen.num_settled, max(2, seen.most_branches)
    if num < FEWEST or most > USED_FRAC * kind.cap or kind.stop_rule == "never":
        return None
    why = f"none of {num:,} programs used more than {seen.most_branches} of the {kind.cap} branches allowed"
    return "branches", f"{most}", why


def _agreement(kind: Kind, seen: Seen) -> Found:
    """Nearly all use their whole cap: answers never agree, or agreed long before."""
    num, num_cap = seen.num_settled, seen.outcomes["cap"]
    if num < FEWEST or num_cap < CAP_FRAC * num or kind.cap < 4 or seen.num_by_vote < seen.outcomes.total():
        return None
    share = seen.shares.mean
    said = f"{num_cap:,} of {num:,} programs used all {kind.cap} branches, and the leading answer had {share:.0%} of the votes on average"
    if share >= TOGETHER and (level := _quicker(kind.stop_rule)):
        return "stop", level, f"{said}: a quicker rule would have ended them earlier"
    if share >= APART or seen.num_unread >= UNREAD_FRAC * seen.num_own_branches:
        return None
    if seen.variety.mean >= DIFFERENT and kind.equal.partition(":")[0] not in COMPARERS:
        value = "symbolic" if kind.extractor in _FORMULAS else "model"
        return (
            "equal",
            value,
            f"{said}, with {seen.variety.mean:.2f} different answers a branch: see if they mean the same",
        )
    return "branches", f"{max(2, kind.cap // 2)}", f"{said}: more branches bring no certainty"


def _quicker(rule: str) -> str:
    """The level after this one; empty where there is none."""
    levels = list(LEVELS)
    if rule == "never":
        return levels[0]
    return levels[levels.index(rule) + 1] if rule in levels[:-1] else ""


def _deadline(kind: Kind, seen: Seen) -> Found:
    num, num_late = seen.num_answered, seen.outcomes["deadline"]
    if num < FEWEST or num_late < LATE_FRAC * num or not seen.deadlines.num or seen.deadlines.most >= MAX_DEADLINE_S:
        return None
    value = min(MAX_DEADLINE_S, 2 * seen.deadlines.most)
    why = (
        f"{num_late:,} of {num:,} programs were ended by their deadline of {seen.deadlines.most:g} s at most, with "
        f"{seen.late_branches.mean:.1f} of {kind.cap} branches on average"
    )
    return "deadline_s", f"{value:g}", why


def _length(kind: Kind, seen: Seen) -> Found:
    if seen.num_settled < FEWEST or seen.num_cut < CUT_FRAC * seen.num_own_branches or not seen.cut_tokens:
        return None
    why = f"{seen.num_cut:,} of {seen.num_own_branches:,} branches were cut by their length, at up to {seen.cut_tokens:,} tokens"
    return "max_new_tokens (max_tokens)", f"{2 * seen.cut_tokens}", why


def _extractor(kind: Kind, seen: Seen) -> Found:
    if seen.num_settled < FEWEST or seen.num_unread < UNREAD_FRAC * seen.num_own_branches:
        return None
    why = f"{seen.num_unread:,} of {seen.num_own_branches:,} branches came to their own end, and no answer was found in them"
    if kind.extractor in ("", "auto"):
        return "answer", "boxed", f"{why}: also ask for it in the prompt, by a template's `after`"
    return "answer", "auto", f"{why} by {kind.extractor!r}"


def _thoughts(kind: Kind, seen: Seen) -> Found:
    if kind.algorithm != "long_cot" or seen.num_settled < FEWEST or seen.num_closed or seen.outcomes["certain"]:
        return None
    tokens = seen.thought_tokens.mean
    if not seen.num_probes:
        why = f"no thought of {seen.num_settled:,} programs was ever asked: they have {tokens:,.0f} tokens on average"
        return "min_tokens", f"{floor(tokens / 2)}", why
    why = f"no thought of {seen.num_settled:,} programs was closed early, and {seen.num_probes:,} probes were made"
    return ("effort", "low", why) if seen.agree != 1 else ("exit", "trial:0.9", why)


def _patience(kind: Kind, seen: Seen) -> Found:
    """Clients that give up get nothing; before a deadline of their own they get the best so far."""
    num, num_aborted, soon = seen.outcomes.total(), seen.outcomes["aborted"], seen.aborted_s.quantile(0.1)
    is_bounded = seen.deadlines.num > 0 and seen.deadlines.most <= soon
    if num < FEWEST or num_aborted < ABORTED_FRAC * num or soon < 1 or is_bounded:
        return None
    why = f"{num_aborted:,} of {num:,} programs were given up by their clients, 9 of 10 of these after {soon:.0f} s or more"
    return "deadline_s", f"{0.9 * soon:.3g}", f"{why}: with a deadline they would get the best answer so far"


def _price(kind: Kind, seen: Seen) -> Found:
    num, num_priced, sure = seen.num_settled + seen.outcomes["price"], seen.outcomes["price"], seen.priced.mean
    if num < FEWEST or num_priced < PRICED_FRAC * num or sure >= UNSURE or not seen.price:
        return None
    why = f"{num_priced:,} of {num:,} programs ended because a branch cost up to {seen.price:g}, with a certaindex of {sure:.2f} on average"
    return "--dynasor-max-price, max_price", f"{seen.price / 2:.2g}", why

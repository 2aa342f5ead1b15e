"""What was measured as one table: a line for each way, compared with stock sampling, paired by question."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import numpy as np

from sglang_dynasor.bench.intervals import NUM_DRAWS, Change, mean_of, p90_of, percent, points, share
from sglang_dynasor.bench.replay import replayed
from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.ways import GREEDY, STOCK, Asking, Sample, Solved

WIDE, NARROW = "wide", "narrow"
NUM_VOTES = 100  # second votes that are drawn for each question


Replays = dict[tuple[str, str, str], Solved]  # by question, rule and width


class Way(NamedTuple):
    """A way as a line of the table."""

    way: str  # GREEDY, STOCK, or the rule of a program
    name: str
    width: str = ""  # of a replay: WIDE, all branches at once, or NARROW, as few as could decide

    @property
    def is_replayed(self) -> bool:
        return bool(self.width)

    @property
    def is_program(self) -> bool:
        return self.way not in (GREEDY, STOCK)


@dataclass(frozen=True, slots=True)
class Line:
    """What one way came to. Changes are against stock; None: not known, or of stock itself."""

    way: Way
    hits: Change | None  # percent: right answers, or those that agree with the full vote
    hits_change: Change | None  # points
    tokens: float  # of a question, mean
    tokens_change: Change | None  # percent
    mean_s: float | None
    mean_change: Change | None
    p90_s: float | None
    p90_change: Change | None
    num_branches: float
    num_requests: float
    each_tokens: tuple[float, ...]  # of each question


@dataclass(frozen=True, slots=True)
class Table:
    """The lines, and what they are about."""

    lines: tuple[Line, ...]
    ids: tuple[str, ...]  # of the questions in it
    has_gold: bool  # hits are right answers; else those that agree with the full vote
    num_hits: int  # questions of which hits are known
    vote_shares: tuple[
        float, ...
    ]  # of each question, the full vote's leading share of its samples; empty without stock

    def line(self, way: str) -> Line | None:
        return next((line for line in self.lines if line.way.way == way), None)

    @property
    def programs(self) -> list[Line]:
        return [line for line in self.lines if line.way.is_program]

    @property
    def is_replayed(self) -> bool:
        return any(line.way.is_replayed for line in self.lines)


def make_table(
    measured: Measured, asking: Asking, replays: Sequence[str], use_gold: bool, num_draws: int = NUM_DRAWS,
    made: Replays | None = None,
) -> Table | None:  # fmt: skip
    """The table of what is there; None where nothing is.

    Args:
        replays: rules of which it is replayed what they would have made of stock's samples.
        use_gold: count right answers, where golds are given.
        num_draws: of each resampled interval.
        made: replays that were made before, and are not made again though the server's mean length has moved since.
    """
    names, ids = measured.shared()
    if not ids:
        return None
    columns = {Way(way, _name(way, asking)): [measured.solved[id][way] for id in ids] for way in names}
    stock = [measured.solved[id][STOCK] for id in ids] if STOCK in names else None
    if stock is not None:
        columns |= _replays(measured, asking, replays, ids, stock, {} if made is None else made)
    right = [asking.gold_key(measured.questions[id]) for id in ids]
    known = [place for place, key in enumerate(right) if key is not None] if use_gold else []
    has_gold = bool(known)
    again: list[float] = []
    if stock is not None and not has_gold:
        known, right = list(range(len(ids))), [solved.keys[0] for solved in stock]
        again = [second_vote(solved.samples, id) for solved, id in zip(stock, ids, strict=True)]
    lines: list[Line] = []
    for way, column in columns.items():
        hits, base = [column[place].share(right[place]) for place in known], list[float]()
        if stock is not None:
            base = [stock[place].share(right[place]) for place in known]
        if again and not way.is_replayed:  # that has other samples: so has a second vote
            base, hits = again, again if way.way == STOCK else hits
        lines.append(_line(way, hits, base, column, stock, num_draws))
    shares = () if stock is None else tuple(leader_share(solved.samples) for solved in stock)
    return Table(tuple(lines), tuple(ids), has_gold, len(known), shares)


def _name(way: str, asking: Asking) -> str:
    return f"{STOCK}, n={asking.cap}" if way == STOCK else way


def _replays(
    measured: Measured,
    asking: Asking,
    rules: Sequence[str],
    ids: Sequence[str],
    stock: Sequence[Solved],
    made: Replays,
) -> dict[Way, list[Solved]]:
    """Each rule with all branches at once, and with as few as could decide: the scheduler goes between the two with the load."""
    usual_tokens = mean(sample.num_tokens for solved in stock for sample in solved.samples)
    columns: dict[Way, list[Solved]] = {}
    for width, most in ((WIDE, asking.cap), (NARROW, 1)):
        for rule in rules:
            for id, solved in zip(ids, stock, strict=True):
                if (id, rule, width) not in made:
                    spec = asking.spec(measured.questions[id], rule)
                    made[id, rule, width] = replayed(solved, spec, most, usual_tokens)
            columns[Way(rule, f"{rule}, {width}, replayed", width)] = [made[id, rule, width] for id in ids]
    return columns


def _line(
    way: Way, hits: Sequence[float], base_hits: Sequence[float], column: Sequence[Solved], stock: Sequence[Solved] | None, num_draws: int
) -> Line:  # fmt: skip
    tokens = [solved.num_tokens for solved in column]
    latencies = [solved.latency_s for solved in column if solved.latency_s is not None]
    base = stock if way.way != STOCK else None
    base_s = [solved.latency_s for solved in base or () if solved.latency_s is not None]
    has_base = bool(latencies) and len(latencies) == len(base_s)
    return Line(
        way,
        share(hits) if hits else None,
        points(hits, base_hits) if base is not None and hits else None,
        mean(tokens),
        None if base is None else percent(tokens, [solved.num_tokens for solved in base], num_draws=num_draws),
        mean(latencies) if latencies else None,
        percent(latencies, base_s, mean_of, num_draws) if has_base else None,
        float(p90_of(np.asarray(latencies))) if latencies else None,
        percent(latencies, base_s, p90_of, num_draws) if has_base else None,
        mean(solved.num_branches for solved in column),
        mean(solved.num_requests for solved in column),
        tuple(tokens),
    )


def leader_share(samples: Sequence[Sample]) -> float:
    """The share of the samples that gave the leading answer; 0 where none has one."""
    votes = Counter(sample.key for sample in samples if sample.key is not None)
    return max(votes.values(), default=0) / len(samples)


def second_vote(samples: Sequence[Sample], seed: str) -> float:
    """How often as many samples drawn from these, with replacement, would vote as these do. A tie counts its share."""
    keys = [sample.key for sample in samples]
    first, rng, agreed = _leaders(keys), random.Random(f"again:{seed}"), 0.0
    for _ in range(NUM_VOTES):
        again = _leaders(rng.choices(keys, k=len(keys)))
        agreed += len(set(first) & set(again)) / max(1, len(first) * len(again)) if first or again else 1.0
    return agreed / NUM_VOTES


def _leaders(keys: Sequence[str | None]) -> list[str]:
    votes = Counter(key for key in keys if key is not None)
    most = max(votes.values(), default=0)
    return [key for key, num in votes.items() if num == most]


def shown(table: Table) -> list[dict[str, str]]:
    """The table to read: figures, in brackets what they are against stock, with 95 % intervals."""
    return [
        {
            "way": line.way.name,
            "right %" if table.has_gold else "agrees %": _hits(line, table.has_gold),
            "tokens": f"{line.tokens:,.0f}{_bracket(line.tokens_change, ' %')}",
            "mean s": _seconds(line, line.mean_s) + _bracket(line.mean_change, " %"),
            "p90 s": _seconds(line, line.p90_s) + _bracket(line.p90_change, " %"),
            "branches": f"{line.num_branches:.1f}",
            "requests": f"{line.num_requests:.3g}",
        }
        for line in table.lines
    ]


def _hits(line: Line, has_gold: bool) -> str:
    if line.hits is None:
        return "-"
    if line.hits_change is not None:
        return f"{line.hits.value:.1f}{_bracket(line.hits_change)}"
    return f"{line.hits.value:.1f} (± {line.hits.half:.1f})" if has_gold else f"~{line.hits.value:.1f}"


def _seconds(line: Line, value: float | None) -> str:
    return "-" if value is None else f"{'~' if line.way.is_replayed else ''}{value:.3g}"


def _bracket(change: Change | None, unit: str = "") -> str:
    return "" if change is None else f" ({change.shown(unit)})"

"""Replay stopping rules, ours and others', on recorded samples of real models.

    python benchmarks/replay_rules.py --traces DIR [--csv FILE] [--sets-csv FILE] [--orders 10]

Samples are drawn in random orders; so many run at once as `width` says, each for as many steps as it has tokens, and a
branch that finishes undecided is replaced: short ones finish first. Every rule sees the same branches finish.

saved: tokens not spent, of the whole cap's. latency: steps until the end, against all samples at once on a machine where rows cost
nothing. branches: finished until then. accuracy: of the vote, a tie counting its share. against full: points of accuracy
gained or lost to the vote of the whole cap, with the 95 % interval paired by question. stopped: programs that the rule ended
early. stated: the mean risk at which it ended them. observed: how many of these answer otherwise than the full vote (a tie of
k counts as 1 - 1/k).
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from recorded import Question, Recorded, Sample, read_sets
from rows import write_rows

from sglang_dynasor.policy.certaindex import overtake_risk
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mean import cheapness
from sglang_dynasor.policy.rules import parse_stop

WIDTHS = (1, 4, 8, 0)  # 0: the cap
NUM_ORDERS = 10
AGREE_FRAC = 0.75  # of its_hub's doubling


def untempered(level: float) -> Callable[[Evidence], bool]:
    """The rule before votes were tempered and priced: from three votes on, whatever is in flight."""

    def stops(evidence: Evidence) -> bool:
        return evidence.num_votes >= 3 and evidence.lead > 0 and full_risk(evidence) <= level

    return stops


def full_risk(evidence: Evidence) -> float:
    """The risk where every vote counts in full."""
    return overtake_risk(evidence.counts, evidence.abstentions, evidence.num_left)


class Way(NamedTuple):
    """A rule, and the risk that it states."""

    stops: Callable[[Evidence], bool]
    risk: Callable[[Evidence], float] = lambda evidence: evidence.risk


WAYS = {
    **{name: Way(parse_stop(name).stops) for name in ("careful", "balanced", "fast")},
    "untempered:0.02": Way(untempered(0.02), full_risk),
    "untempered:0.05": Way(untempered(0.05), full_risk),
    "untempered:0.1": Way(untempered(0.1), full_risk),
    **{name: Way(parse_stop(name).stops) for name in ("beta", "window", "entropy", "margin")},
}
# Peers that are not one of our rules under one of the widths above: samples in waves, and whether the votes of all waves, or
# of the last one, end it.
DOUBLING, WINDOWS = "its_hub doubling", "ESC, windows of five"
PEERS = {("beta", 1): "Adaptive-Consistency, one by one", ("beta", 0): "its_hub beta"}


class Finish(NamedTuple):
    """One sample comes to its end."""

    place: int  # of the sample, in the order in which they start
    num_in_flight: int  # others that have started
    step: int  # steps since the first started
    spent_tokens: int  # by all until then


def finishes(tokens: Sequence[int], width: int) -> Iterator[Finish]:
    """Samples in the order in which they finish, where `width` run at once and the next starts when one ends."""
    running = [(num, place) for place, num in enumerate(tokens[:width])]  # when each ends, and which
    heapq.heapify(running)
    starts = dict.fromkeys(range(len(running)), 0)
    next_place, finished_tokens = len(running), 0
    while running:
        step, place = heapq.heappop(running)
        finished_tokens += tokens[place]
        under_way = sum(step - starts[other] for _, other in running)
        yield Finish(place, len(running), step, finished_tokens + under_way)
        if next_place < len(tokens):
            starts[next_place] = step
            heapq.heappush(running, (step + tokens[next_place], next_place))
            next_place += 1


class End(NamedTuple):
    """How one way of ending one order came out."""

    spent_tokens: int
    steps: int
    num_finished: int
    accuracy: float
    leaders: list[str]
    risk: float | None = None  # stated; None: it used the whole cap


@dataclass(slots=True)
class Vote:
    """Votes so far, in the order in which samples finished."""

    by_key: dict[str, int] = field(default_factory=dict[str, int])
    is_right: dict[str, bool] = field(default_factory=dict[str, bool])  # of an answer's first sample
    recent: list[str | None] = field(default_factory=list[str | None])
    lengths: list[int] = field(default_factory=list[int])

    def cast(self, sample: Sample) -> None:
        self.recent.append(sample.key)
        self.lengths.append(sample.num_tokens)
        if sample.key is not None:
            self.by_key[sample.key] = self.by_key.get(sample.key, 0) + 1
            self.is_right.setdefault(sample.key, sample.is_correct)

    @property
    def leaders(self) -> list[str]:
        most = max(self.by_key.values(), default=0)
        return [key for key, votes in self.by_key.items() if votes == most]

    @property
    def accuracy(self) -> float:
        """A tie counts its share; 0 for no votes."""
        leaders = self.leaders
        return mean(self.is_right[key] for key in leaders) if leaders else 0.0

    def evidence(self, cap: int, num_in_flight: int, usual_tokens: float) -> Evidence:
        counts = tuple(sorted(self.by_key.values(), reverse=True))
        num = len(self.recent)
        return Evidence(
            counts, num - sum(counts), cap - num, tuple(self.recent),
            num_in_flight=num_in_flight, cheapness=cheapness(self.lengths, usual_tokens),
        )  # fmt: skip

    def end(self, spent_tokens: int, steps: int, risk: float | None = None) -> End:
        return End(spent_tokens, steps, len(self.recent), self.accuracy, self.leaders, risk)


def run_order(order: Sequence[Sample], width: int, usual_tokens: float) -> dict[str, End]:
    """Where each rule ends, of samples that start in this order."""
    vote, going, ends = Vote(), dict(WAYS), dict[str, End]()
    for finish in finishes([sample.num_tokens for sample in order], width):
        vote.cast(order[finish.place])
        if len(vote.recent) == len(order):
            return ends | dict.fromkeys(going, vote.end(finish.spent_tokens, finish.step))
        evidence = vote.evidence(len(order), finish.num_in_flight, usual_tokens)
        for name in [name for name, way in going.items() if way.stops(evidence)]:
            risk = going.pop(name).risk(evidence)
            ends[name] = vote.end(finish.spent_tokens, finish.step, risk)
        if not going:
            break
    return ends


def doubled(num: int) -> Iterator[int]:
    """The sizes of doubling waves: 2, 4, 8, ... samples in all."""
    so_far = 0
    while so_far < num:
        size = min(max(2, so_far), num - so_far)
        so_far += size
        yield size


def fives(num: int) -> Iterator[int]:
    yield from (min(5, num - so_far) for so_far in range(0, num, 5))


def run_waves(
    order: Sequence[Sample], sizes: Iterator[int], stops: Callable[[Vote, int], bool], usual_tokens: float
) -> End:
    """A peer that waits for each wave."""
    vote, spent, steps, num = Vote(), 0, 0, 0
    for size in sizes:
        wave = order[num : num + size]
        num += size
        for sample in wave:
            vote.cast(sample)
        spent += sum(sample.num_tokens for sample in wave)
        steps += max(sample.num_tokens for sample in wave)
        if num < len(order) and stops(vote, size):
            return vote.end(spent, steps, vote.evidence(len(order), 0, usual_tokens).risk)
    return vote.end(spent, steps)


def agrees(vote: Vote, size: int) -> bool:
    """its_hub: the leader has three quarters of the votes cast."""
    most = max(vote.by_key.values(), default=0)
    return most > 0 and most >= AGREE_FRAC * sum(vote.by_key.values())


def is_unanimous(vote: Vote, size: int) -> bool:
    """ESC: the last full window is of one answer."""
    last = vote.recent[-size:]
    return size == 5 and last[0] is not None and len(set(last)) == 1


@dataclass(slots=True)
class Tally:
    """What one way came to on one set; sums by question."""

    spent: int = 0
    total: int = 0
    steps: int = 0
    whole_steps: int = 0
    num: int = 0
    num_finished: int = 0
    num_stopped: int = 0
    stated: float = 0.0
    changed: float = 0.0
    accuracy: list[float] = field(default_factory=list[float])
    against: dict[str, list[float]] = field(default_factory=lambda: defaultdict[str, list[float]](list))

    def add(self, id: str, end: End, whole: End, whole_steps: int) -> None:
        self.spent, self.total = self.spent + end.spent_tokens, self.total + whole.spent_tokens
        self.steps, self.whole_steps, self.num = self.steps + end.steps, self.whole_steps + whole_steps, self.num + 1
        self.num_finished += end.num_finished
        self.accuracy.append(end.accuracy)
        self.against[id].append(end.accuracy - whole.accuracy)
        if end.risk is not None:
            self.num_stopped += 1
            self.stated += end.risk
            same = end.leaders[0] in whole.leaders if end.leaders else False
            self.changed += 1 - same / max(1, len(whole.leaders))

    @property
    def figures(self) -> dict[str, float]:
        """In percent and points; `variance` is that of the mean loss, over questions."""
        each = [mean(differences) for differences in self.against.values()]
        return {
            "saved": 100 * (1 - self.spent / self.total),
            "latency": self.steps / self.whole_steps,
            "finished": self.num_finished / self.num,
            "accuracy": 100 * mean(self.accuracy),
            "against full": 100 * mean(each),
            "variance": 1e4 * stdev(each) ** 2 / len(each) if len(each) > 1 else 0.0,
            "stopped": 100 * self.num_stopped / self.num,
            "stated": 100 * self.stated / max(1, self.num_stopped),
            "observed": 100 * self.changed / max(1, self.num_stopped),
        }


def orders_of(question: Question, cap: int, num: int, rng: random.Random) -> Iterator[list[Sample]]:
    for _ in range(num):
        yield rng.sample(question.samples, len(question.samples))[:cap]


def replay(
    recorded: Recorded, cap: int, widths: Sequence[int] = WIDTHS, num_orders: int = NUM_ORDERS, seed: int = 0
) -> dict[tuple[str, int], dict[str, float]]:
    """Figures by rule and width (0: the cap; -1: waves) of one set at one cap; the same orders for all."""
    rng, usual_tokens = random.Random(seed), recorded.mean_tokens
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    for question in recorded.questions:
        for order in orders_of(question, cap, num_orders, rng):
            full = Vote()
            for sample in order:
                full.cast(sample)
            lengths = [sample.num_tokens for sample in order]
            whole = full.end(sum(lengths), max(lengths))
            ends = {("never", 0): whole}
            for width in widths if recorded.has_lengths else [w for w in widths if w == 1]:
                found = run_order(order, width or len(order), usual_tokens)
                ends |= {(name, width): end for name, end in found.items()}
            ends[DOUBLING, -1] = run_waves(order, doubled(len(order)), agrees, usual_tokens)
            ends[WINDOWS, -1] = run_waves(order, fives(len(order)), is_unanimous, usual_tokens)
            for key, end in ends.items():
                tallies[key].add(question.id, end, whole, whole.steps)
    return {key: tally.figures for key, tally in tallies.items()}


def row_of(name: str, width: int, figures: dict[str, float]) -> dict[str, Any]:
    shown = PEERS.get((name, width), name)
    return {
        "width": {0: "cap", -1: "waves"}.get(width, width),
        "rule": shown,
        "saved %": f"{figures['saved']:.1f}",
        "latency": f"{figures['latency']:.2f}x",
        "branches": f"{figures['finished']:.1f}",
        "accuracy %": f"{figures['accuracy']:.2f}",
        "against full": f"{figures['against full']:+.2f} ± {1.96 * sqrt(figures['variance']):.2f}",
        "stopped %": f"{figures['stopped']:.1f}",
        "stated %": f"{figures['stated']:.2f}",
        "observed %": f"{figures['observed']:.2f}",
    }


def macro(found: list[dict[tuple[str, int], dict[str, float]]]) -> Iterator[tuple[str, int, dict[str, float]]]:
    """The mean over sets, each counting the same."""
    for key in sorted({key for figures in found for key in figures}, key=place):
        sets = [figures[key] for figures in found if key in figures]
        means = {name: mean(figures[name] for figures in sets) for name in sets[0]}
        means["variance"] /= len(sets)
        yield *key, means


def place(key: tuple[str, int]) -> tuple[int, int]:
    """Where a row stands: by width, then in the order in which the rules are written above."""
    names = ["never", *WAYS, DOUBLING, WINDOWS]
    return [1, 4, 8, 0, -1].index(key[1]), names.index(key[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=NUM_ORDERS)
    parser.add_argument("--csv", type=Path, help="means over the sets")
    parser.add_argument("--sets-csv", type=Path, help="each set by itself")
    args = parser.parse_args()
    found: list[dict[tuple[str, int], dict[str, float]]] = []
    rows: list[dict[str, Any]] = []
    for recorded in read_sets(args.traces):
        for cap in recorded.caps:
            figures = replay(recorded, cap, num_orders=args.orders)
            if recorded.has_lengths:
                found.append(figures)
            about = {"set": recorded.name, "questions": len(recorded.questions), "cap": cap, "orders": args.orders}
            rows += [about | row_of(*key, figures[key]) for key in sorted(figures, key=place)]
            print(recorded.name, cap, flush=True)
    means = [{"sets": len(found), "orders": args.orders} | row_of(*made) for made in macro(found)]
    for row in means:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.csv:
        write_rows(args.csv, means)
    if args.sets_csv:
        write_rows(args.sets_csv, rows)


if __name__ == "__main__":
    main()

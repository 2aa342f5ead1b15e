"""Replay a budget over many questions on recorded samples: the same share for each, or each branch where it is worth most.

    python benchmarks/replay_budget.py --traces DIR [--csv FILE] [--orders 10]

The budget is a share of what the whole cap of every question takes. `uniform` samples one branch of every question in turn
until it is spent. `worth` samples the branch that is worth most (policy/budget.py). `uniform until careful` is `uniform`, and a
question is left alone once the rule would end it. The first is told in percent of right answers, the others in points over it, with
the 95 % interval paired by question.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from recorded import Recorded, Sample, read_sets
from replay_rules import Vote
from rows import write_rows

from sglang_dynasor.policy.budget import Budget
from sglang_dynasor.policy.mean import expected_tokens
from sglang_dynasor.policy.rules import parse_stop

SHARES = (0.15, 0.2, 0.25)
NUM_ORDERS = 10
CAREFUL = parse_stop("careful")


def uniform(orders: Sequence[Sequence[Sample]], budget_tokens: float, usual_tokens: float) -> list[Vote]:
    """One branch of each in turn."""
    return _in_turn(orders, budget_tokens, lambda vote, cap: False)


def uniform_until_careful(orders: Sequence[Sequence[Sample]], budget_tokens: float, usual_tokens: float) -> list[Vote]:
    """The same, of those that are not decided."""
    return _in_turn(
        orders, budget_tokens, lambda vote, cap: CAREFUL.stops(vote.evidence(cap, 0, usual_tokens))
    )  # fmt: skip


def _in_turn(
    orders: Sequence[Sequence[Sample]], budget_tokens: float, is_done: Callable[[Vote, int], bool]
) -> list[Vote]:
    votes, left = [Vote() for _ in orders], budget_tokens
    for turn in range(max(map(len, orders))):
        for vote, order in zip(votes, orders, strict=True):
            if turn < len(order) and left > 0 and not is_done(vote, len(order)):
                vote.cast(order[turn])
                left -= order[turn].num_tokens
    return votes


def worth(orders: Sequence[Sequence[Sample]], budget_tokens: float, usual_tokens: float) -> list[Vote]:
    """Each branch where it is worth most."""
    votes, budget = [Vote() for _ in orders], Budget(budget_tokens)

    def offer(number: int) -> None:
        vote = votes[number]
        if len(vote.recent) < len(orders[number]):
            expected = expected_tokens(vote.lengths, usual_tokens)
            budget.offer(number, vote.evidence(len(orders[number]), 0, usual_tokens), expected)

    for number in range(len(orders)):
        offer(number)
    while (number := budget.take()) is not None:
        vote = votes[number]
        sample = orders[number][len(vote.recent)]
        vote.cast(sample)
        budget.settle(number, sample.num_tokens)
        offer(number)
    return votes


WAYS = {"uniform": uniform, "uniform until careful": uniform_until_careful, "worth": worth}


class Spent(NamedTuple):
    """What one way brought on one set."""

    spent: float  # percent of all tokens
    accuracy: float  # percent
    gain: float  # points over `uniform`
    error: float  # half of its 95 % interval, paired by question


def replay(recorded: Recorded, cap: int, share: float, num_orders: int = NUM_ORDERS) -> dict[str, Spent]:
    """What each way brings for `share` of all tokens; the same orders for all."""
    rng, usual_tokens = random.Random(0), recorded.mean_tokens
    spent: dict[str, list[float]] = defaultdict(list)
    right: dict[str, list[list[float]]] = {name: [[] for _ in recorded.questions] for name in WAYS}
    for _ in range(num_orders):
        orders = [rng.sample(q.samples, len(q.samples))[:cap] for q in recorded.questions]
        total = sum(sample.num_tokens for order in orders for sample in order)
        for name, way in WAYS.items():
            votes = way(orders, share * total, usual_tokens)
            spent[name].append(sum(sum(vote.lengths) for vote in votes) / total)
            for each, vote in zip(right[name], votes, strict=True):
                each.append(vote.accuracy)
    found: dict[str, Spent] = {}
    for name in WAYS:
        by_question: dict[str, list[float]] = defaultdict(list)
        for question, mine, others in zip(recorded.questions, right[name], right["uniform"], strict=True):
            by_question[question.id].append(mean(mine) - mean(others))
        gains = [mean(each) for each in by_question.values()]
        found[name] = Spent(
            100 * mean(spent[name]), 100 * mean(mean(each) for each in right[name]),
            100 * mean(gains), 196 * stdev(gains) / sqrt(len(gains)),
        )  # fmt: skip
    return found


def row_of(recorded: Recorded, cap: int, num_orders: int) -> dict[str, Any]:
    row: dict[str, Any] = {"set": recorded.name, "questions": len(recorded.questions), "cap": cap, "orders": num_orders}
    for share in SHARES:
        found = replay(recorded, cap, share, num_orders)
        row[f"uniform, {share:.0%}"] = f"{found['uniform'].accuracy:.1f}"
        for name in WAYS:
            if name != "uniform":
                row[f"{name}, {share:.0%}"] = f"{found[name].gain:+.1f} ± {found[name].error:.1f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=NUM_ORDERS)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for recorded in read_sets(args.traces):
        rows.append(row_of(recorded, recorded.caps[-1], args.orders))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

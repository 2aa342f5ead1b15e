"""What solving a set of questions gave and cost, and what one way saved against another."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any


@dataclass(frozen=True, slots=True)
class Solved:
    """One question's outcome."""

    answer: str | None
    is_right: bool
    num_tokens: int
    num_branches: int
    latency_s: float
    certaindex: float | None  # None for stock sampling, which does not know


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way of solving the whole set."""

    name: str
    solved: list[Solved]
    wall_s: float

    @property
    def accuracy(self) -> float:
        return mean(s.is_right for s in self.solved)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.solved)

    @property
    def mean_latency_s(self) -> float:
        return mean(s.latency_s for s in self.solved)

    @property
    def mean_branches(self) -> float:
        return mean(s.num_branches for s in self.solved)


def saved_percent(base: float, other: float) -> float:
    """What `other` saves of `base`, in percent; below 0 where it costs more, 0 for a base of 0."""
    return 100 * (1 - other / base) if base else 0.0


def savings(stock: Outcome, program: Outcome) -> str:
    """What of tokens and wall-clock was saved; it says so where nothing was."""
    amounts = {
        "tokens": saved_percent(stock.num_tokens, program.num_tokens),
        "wall-clock": saved_percent(stock.wall_s, program.wall_s),
    }
    won = [f"{percent:.0f} % of the {name}" for name, percent in amounts.items() if percent >= 0.5]
    lost = [f"{name} {-percent:.0f} % above stock" for name, percent in amounts.items() if percent < 0.5]
    what = f"saved {' and '.join(won)}" if won else "nothing was saved"
    return f"{what} ({', '.join(lost)})" if lost else what


def accuracies(greedy: Outcome, stock: Outcome, program: Outcome) -> str:
    """How many answers are right each way, and what one question weighs."""
    num_questions = len(stock.solved)
    return (
        f"{100 * program.accuracy:.1f} % of the answers right, {100 * stock.accuracy:.1f} % with stock, {100 * greedy.accuracy:.1f} % greedy "
        f"(of {num_questions} questions; one is {100 / num_questions:.1f} points)"
    )


def comparison(greedy: Outcome, stock: Outcome, program: Outcome) -> list[dict[str, str]]:
    """A table to read: one row per way, and what the program saves against stock."""
    table = [
        {
            "": way.name,
            "right": f"{100 * way.accuracy:.1f} %",
            "tokens": f"{way.num_tokens:,}",
            "wall-clock": f"{way.wall_s:.1f} s",
            "mean latency": f"{way.mean_latency_s:.1f} s",
            "branches each": f"{way.mean_branches:.1f}",
        }
        for way in (greedy, stock, program)
    ]
    saved = {
        "tokens": (stock.num_tokens, program.num_tokens),
        "wall-clock": (stock.wall_s, program.wall_s),
        "mean latency": (stock.mean_latency_s, program.mean_latency_s),
        "branches each": (stock.mean_branches, program.mean_branches),
    }
    percents = {name: f"{saved_percent(*pair):.0f} %" for name, pair in saved.items()}
    return [*table, {"": "saved", "right": "", **percents}]


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


def rows(greedy: Outcome, stock: Outcome, program: Outcome) -> list[dict[str, Any]]:
    """One row per way, for a CSV file; savings against stock."""
    return [
        {
            "way": way.name,
            "accuracy_percent": round(100 * way.accuracy, 1),
            "tokens": way.num_tokens,
            "tokens_saved_percent": round(saved_percent(stock.num_tokens, way.num_tokens), 1),
            "wall_s": round(way.wall_s, 1),
            "wall_saved_percent": round(saved_percent(stock.wall_s, way.wall_s), 1),
            "mean_latency_s": round(way.mean_latency_s, 3),
            "branches_per_question": round(way.mean_branches, 1),
        }
        for way in (greedy, stock, program)
    ]


def cheapest(stock: Outcome, program: Outcome) -> list[int]:
    """The questions, by index, from the one whose program took the smallest part of stock's tokens."""
    return sorted(
        range(len(program.solved)), key=lambda i: program.solved[i].num_tokens / max(1, stock.solved[i].num_tokens)
    )


def hardest(program: Outcome) -> list[int]:
    """The questions, by index, from the one whose program ended least certain; of equal ones the dearest first."""
    return sorted(
        range(len(program.solved)),
        key=lambda i: (program.solved[i].certaindex or 0.0, -program.solved[i].num_tokens),
    )

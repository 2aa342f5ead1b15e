"""The demo's picture: what was saved, on which questions, at what accuracy."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from sglang_dynasor.outcome import Outcome, Solved, accuracies, saved_percent, savings

FORMATS = (".png", ".pdf", ".svg")
STOCK, PROGRAM, WRONG, GREEDY = "#c3cad3", "#1f7a8c", "#d1495b", "#e0a030"


def draw(steps: list[int], greedy: Outcome, stock: Outcome, program: Outcome, picture: Path) -> None:
    """Write the picture.

    Args:
        steps: of each question, how many steps its solution takes.
        greedy: what one greedy answer gave, in the same order.
        stock: what sampling gave.
        program: what programs gave.
        picture: the file, of a type in `FORMATS`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11.5, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1), height_ratios=(2.6, 1))
    tokens = figure.add_subplot(grid[0, 0])
    accuracy = figure.add_subplot(grid[1, 0], sharex=tokens)
    branches = figure.add_subplot(grid[:, 1])
    draw_tokens(tokens, steps, stock, program)
    draw_accuracy(accuracy, steps, greedy, stock, program)
    draw_branches(branches, program, cap=max(s.num_branches for s in stock.solved))
    for axis in (tokens, accuracy, branches):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{savings(stock, program).capitalize()}\n{accuracies(greedy, stock, program)}", fontsize=13, x=0.01, ha="left"
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def by_steps(steps: list[int], outcome: Outcome) -> dict[int, list[Solved]]:
    """The outcomes of the questions of each number of steps, ascending."""
    return {n: [s for s, m in zip(outcome.solved, steps, strict=True) if m == n] for n in sorted(set(steps))}


def draw_tokens(axis: Any, steps: list[int], stock: Outcome, program: Outcome) -> None:
    """Tokens per question: the program's bar in front of stock's, and what lies between in percent."""
    for outcome, color in ((stock, STOCK), (program, PROGRAM)):
        means = {n: mean(s.num_tokens for s in group) for n, group in by_steps(steps, outcome).items()}
        axis.bar(list(means), list(means.values()), width=0.72, color=color, label=outcome.name)
    of_program = by_steps(steps, program)
    for n, group in by_steps(steps, stock).items():
        took, would = sum(s.num_tokens for s in of_program[n]), sum(s.num_tokens for s in group)
        axis.text(
            n, max(took, would) / len(group), f"{-saved_percent(would, took):+.0f} %".replace("-", "\u2212"),
            ha="center", va="bottom", fontsize=10, color=PROGRAM,
        )  # fmt: skip
    axis.set_title("Tokens per question", loc="left")
    axis.legend(frameon=False, loc="upper left")
    axis.tick_params(labelbottom=False)


def draw_accuracy(axis: Any, steps: list[int], greedy: Outcome, stock: Outcome, program: Outcome) -> None:
    """Right answers of each number of steps, in percent, with the number of questions below."""
    groups = by_steps(steps, program)
    lowest = 100.0
    for outcome, color, size in ((greedy, GREEDY, 5), (stock, STOCK, 11), (program, PROGRAM, 5)):
        shares = {n: 100 * mean(s.is_right for s in group) for n, group in by_steps(steps, outcome).items()}
        axis.plot(list(shares), list(shares.values()), marker="o", markersize=size, color=color, label=outcome.name)
        lowest = min(lowest, *shares.values())
    axis.set_title("Right answers, %", loc="left")
    axis.legend(frameon=False, loc="lower left", ncols=3, fontsize=8)
    axis.set_ylim(max(0, 10 * (lowest // 10) - 10), 104)
    axis.set_xticks(list(groups), [f"{n}\n({len(group)})" for n, group in groups.items()])
    axis.set_xlabel("steps in the question (number of questions)")


def draw_branches(axis: Any, program: Outcome, cap: int) -> None:
    """How many questions took how many branches, and of those the ones answered wrong. Stock takes `cap` for each."""
    numbers = list(range(1, cap + 1))
    below = [0] * cap
    for is_right, color, label in ((True, PROGRAM, "answered right"), (False, WRONG, "answered wrong")):
        counts = [sum(s.num_branches == n and s.is_right is is_right for s in program.solved) for n in numbers]
        axis.bar(numbers, counts, bottom=below, width=0.8, color=color, label=label)
        below = [a + b for a, b in zip(below, counts, strict=True)]
    axis.set_ylim(0, 1.08 * max(below))
    axis.axvline(cap + 0.6, color="#8b95a1", linestyle="--", linewidth=1.2, label=f"stock: always {cap}")
    axis.set_title("Branches used: how many questions", loc="left")
    axis.set_xlabel("branches of the program")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, loc="upper center")

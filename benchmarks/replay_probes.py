"""Replay the exit rules of long chains on recorded probes of a real model: share of the thought used, and accuracy.

    python benchmarks/replay_probes.py --traces DIR [--csv FILE]

The trace has, for each thought, what the model would have answered after every tenth of it, and how likely that was. Probes
a tenth apart are far fewer than the engine makes, so shares are upper bounds of what a rule uses; which rule loses answers
shows all the same. Tokens of the probes themselves are not in the trace.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from recorded import read_questions
from rows import write_rows

from sglang_dynasor.demo import show
from sglang_dynasor.policy.thought import Trial, is_settled
from sglang_dynasor.policy.thought_spec import ThoughtSpec

AGREE, LEVELS = (1, 2, 3, 5), (0.0, 0.9, 0.99)
CHOSEN = ("full", "matched_controls")  # the others were picked for answers that change, and are few


def thoughts_of(question: dict[str, Any]) -> list[list[Trial]]:
    """The trials of each recorded thought, the last at its end."""
    return [
        [Trial(answer, answer, probability, num_tokens) for _, num_tokens, answer, _, probability, *_ in probes]
        for probes in (sorted(seed) for seed in question["seeds"].values())
    ]


def exit_of(trials: list[Trial], thought: ThoughtSpec) -> Trial:
    """The trial at which the thought is closed; the last if it never is."""
    found = (
        trials[i] for i in range(1, len(trials)) if is_settled(trials[1 : i + 1], thought)
    )  # 0 is before any thought
    return next(found, trials[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    by_dataset: dict[str, list[tuple[str, list[Trial]]]] = {}
    for question in read_questions(args.traces / "gemma4_12b_probes.jsonl.zst"):
        if not question["dataset"].endswith(CHOSEN):
            continue
        pairs = [(question["gold"], trials) for trials in thoughts_of(question) if trials[-1].num_tokens]
        by_dataset.setdefault(question["dataset"], []).extend(pairs)
    rows: list[dict[str, Any]] = []
    for dataset, pairs in by_dataset.items():
        whole = 100 * mean(trials[-1].answer == gold for gold, trials in pairs)
        for agree in AGREE:
            for level in LEVELS:
                exits = [(gold, trials, exit_of(trials, ThoughtSpec(agree, level, 0, 1))) for gold, trials in pairs]
                used = sum(end.num_tokens for *_, end in exits) / sum(trials[-1].num_tokens for _, trials in pairs)
                accuracy = 100 * mean(end.answer == gold for gold, _, end in exits)
                rows.append(
                    {
                        "dataset": dataset,
                        "thoughts": len(pairs),
                        "agree": agree,
                        "probability": level,
                        "saved %": round(100 * (1 - used), 1),
                        "accuracy %": round(accuracy, 1),
                        "against the whole thought": f"{accuracy - whole:+.1f}",
                    }
                )
    show(rows)
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()

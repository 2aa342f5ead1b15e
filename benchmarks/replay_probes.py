"""Replay what ends thoughts on recorded probes of a real model: tokens saved, time and accuracy, one chain and several.

    python benchmarks/replay_probes.py --traces DIR [--results DIR]

The trace has, for each thought, what the model would have answered after every tenth of it, and how likely that was. A tenth
apart there are far fewer probes than the engine makes: a rule acts later here than it would. Tokens that probes compute are not
in the savings; how many there would be is told by the last table, for probes of PROBE_TOKENS each.

The questions were chosen for answers that change from chain to chain, so that these are hard cases. Of those with ten chains
every second one tunes, and the others report. Intervals are of 95 %, over questions drawn anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from intervals import NUM_DRAWS, inside
from leader_odds import fit, run_odds
from recorded_probes import (
    Asked,
    Outcome,
    Thought,
    all_to_their_ends,
    by_likelihood,
    every,
    key_of,
    likely,
    read_asked,
    run_confident,
    run_program,
    run_share,
    spread,
    steady,
)
from rows import write_rows
from waves import PROBE_TOKENS, run_waves

from sglang_dynasor.demo import show
from sglang_dynasor.policy.rules import parse_stop
from sglang_dynasor.policy.spec import ProgramSpec, parse_field
from sglang_dynasor.policy.thought import Trial, is_settled
from sglang_dynasor.policy.thought_spec import EFFORTS, ThoughtSpec

SINGLE = {
    "GPQA, representative": "gemma4_12b_gpqa_diamond_full",
    "MMLU-Pro, unstable": "gemma4_12b_mmlu_pro_matched_controls",
    "GPQA, unstable": "gemma4_12b_gpqa_diamond_matched_controls",
}
SEVERAL = {"MMLU-Pro": SINGLE["MMLU-Pro, unstable"], "GPQA": SINGLE["GPQA, unstable"]}
RERUNS = ("gemma4_12b_mmlu_pro_candidate_reruns", "gemma4_12b_gpqa_diamond_candidate_reruns")
NUM_CHAINS = 10
NEVER_SETTLES = 64  # of `agree`: more trials than a recorded thought has
SHARES, HOLDS = (0.6, 0.7, 0.8, 0.9), (256, 512, 1024)

Rule = Callable[[Asked], Outcome]


def spec_of(stop: str, *, settles: bool = False, branches: int = NUM_CHAINS, **field: Any) -> ProgramSpec:
    """A program of several thoughts. `settles`: whether each may also be closed by its own trials, as a single one is."""
    field = {"algorithm": "long_cot", "answer": "choice", "stop": stop, "branches": branches, **field}
    if settles:
        field["exit"] = "trial:0.99"
    elif "trials" not in stop:
        field["agree"] = NEVER_SETTLES
    return parse_field(field, 64)


def program(stop: str, *, first: int | None = None, later: int = 0, **field: Any) -> Rule:
    return partial(run_program, spec=spec_of(stop, **field), first=first, later=later)


def read_as(asked: Asked, rule: Rule, among: str) -> Outcome:
    """What a rule makes of it where a trial's likelihood is that among all `tokens`, or among the letters that are `listed`.

    Most are surer among few and less sure among many than among all letters: as a model might be, and the text that asks it.
    """
    return rule(Asked(asked.id, asked.gold, tuple(_read_as(thought, among) for thought in asked.thoughts)))


def _read_as(thought: Thought, among: str) -> Thought:
    trials = [
        replace(
            trial,
            probability=trial.probability * mass if among == "tokens" else letters.get(key_of(trial), 1.0),
        )
        for trial, letters, mass in zip(*thought, strict=True)
    ]
    return thought._replace(trials=tuple(trials))


DEFAULT = "careful or trials:0.8"


def rules_of(others: Sequence[Asked]) -> dict[str, Rule]:
    """Every rule by name; what has to be fitted is fitted on `others`."""
    odds = fit(others, likely)
    before = partial(run_confident, stop=parse_stop("careful"), probability=0.99)
    return {
        "all chains to their ends": all_to_their_ends,
        "`careful`: finished votes only": program("careful"),
        **named("`careful`, each chain may settle", program("careful", settles=True)),
        **named("before: trials of 0.99 are votes, `careful`", before),
        **named("`trials:0.8` alone", program("trials:0.8")),
        **{f"`careful or trials:{share}`": program(f"careful or trials:{share}") for share in (0.6, 0.7, 0.9)},
        **named("**the default**: `careful or trials:0.8`", program(DEFAULT)),
        **{f"the default, held for {hold} tokens": program(DEFAULT, hold_tokens=hold) for hold in (1, 256, 1024)},
        **named("the default, and each may settle", program(DEFAULT, settles=True)),
        "`trials:0.8` alone, every trial a unit": partial(run_share, weigh=every, share=0.8, hold_tokens=512),
        "`trials:0.8` alone, units by likelihood": partial(run_share, weigh=by_likelihood, share=0.8, hold_tokens=512),
        "`trials:0.8` alone, units spread over all answers": partial(
            run_share, weigh=spread, share=0.8, hold_tokens=512
        ),
        "`trials:0.6` alone, units by the last three trials": partial(
            run_share, weigh=steady, share=0.6, hold_tokens=1
        ),
        **{
            f"odds of {p} that the leader stands": partial(run_odds, weigh=likely, coefficients=odds, probability=p)
            for p in (0.8, 0.9)
        },
        "the default, 5 chains": program(DEFAULT, branches=5),
        "the default, 8 chains": program(DEFAULT, branches=8),
        "the default, 4 chains, 10 from 1,024 tokens on": program(DEFAULT, first=4, later=1024),
    }


def named(name: str, rule: Rule) -> dict[str, Rule]:
    """A rule that looks at likelihoods, as it reads them and as it would if they were others."""
    return {
        name: rule,
        f"{name}; trials too sure": partial(read_as, rule=rule, among="listed"),
        f"{name}; trials unsure": partial(read_as, rule=rule, among="tokens"),
    }


class Figures:
    """What a rule saved, how long it took, and what it cost in accuracy, over some questions."""

    def __init__(self, questions: Sequence[Asked], rule: Rule):
        outcomes = [rule(asked) for asked in questions]
        both = list(zip(questions, outcomes, strict=True))
        self.tokens = np.array([outcome.tokens for outcome in outcomes], float)
        self.whole = np.array([asked.num_tokens for asked in questions], float)
        self.points = np.array([(out.answer == asked.gold) - (asked.vote == asked.gold) for asked, out in both], float)
        self.changed = 100 * mean(out.answer != asked.vote for asked, out in both)
        self.time = mean(out.time / asked.longest_tokens for asked, out in both)

    @property
    def saved(self) -> float:
        return 100 * float(1 - self.tokens.sum() / self.whole.sum())

    @property
    def accuracy(self) -> float:
        return 100 * float(self.points.mean())

    def drawn(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The intervals of what was saved and of accuracy."""
        picked = np.random.default_rng(0).integers(0, len(self.points), (NUM_DRAWS, len(self.points)))
        saved = 100 * (1 - self.tokens[picked].sum(axis=1) / self.whole[picked].sum(axis=1))
        return inside(saved), inside(100 * self.points[picked].mean(axis=1))

    def told(self, name: str) -> dict[str, str]:
        """For a table, the columns named after the data."""
        (few, much), (low, high) = self.drawn()
        return {
            f"{name} saved %": f"{self.saved:.1f} ({few:.0f} to {much:.0f})",
            f"{name} accuracy": f"{self.accuracy:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{name} changed %": f"{self.changed:.1f}",
            f"{name} time": f"{self.time:.2f}",
        }


def several(found: dict[str, list[Asked]]) -> Iterator[dict[str, str]]:
    """Every rule on all questions of the two sets, and on those that were run again, some of which are among the first."""
    sets = {name: found[dataset] for name, dataset in SEVERAL.items()}
    first, second = sets.values()
    reruns = [asked for dataset in RERUNS for asked in found[dataset]]
    by_name = {"MMLU-Pro": rules_of(second), "GPQA": rules_of(first), "reruns": rules_of([*first, *second])}
    for rule in by_name["GPQA"]:
        told = {"rule": rule}
        for name, questions in (*sets.items(), ("reruns", reruns)):
            columns = Figures(questions, by_name[name][rule]).told(name)
            if name == "reruns":
                del columns["reruns changed %"], columns["reruns time"]
            told |= columns
        yield told


def halves(found: dict[str, list[Asked]]) -> Iterator[dict[str, str]]:
    """The rule that a half of the questions chooses, on that half and on the other; and the default on both."""
    grid = {
        f"`careful or trials:{share}`, held for {hold}{', each may settle' if settles else ''}": program(
            f"careful or trials:{share}", settles=settles, hold_tokens=hold
        )
        for settles, share, hold in product((False, True), SHARES, HOLDS)
    }
    for names in (("even", "odd"), ("odd", "even")):
        parts = [{name: found[dataset][start::2] for name, dataset in SEVERAL.items()} for start in map(is_odd, names)]
        tuned, reported = parts
        chosen = max(grid, key=lambda rule: worth(grid[rule], list(tuned.values())))
        for title, rule in (("chosen", chosen), ("default", f"`{DEFAULT}`, held for 512")):
            for what, part in (("tunes", tuned), ("reports", reported)):
                told = {"questions": f"{names[part is reported]}, {what}", "rule": f"{title}: {rule}"}
                for name, questions in part.items():
                    told |= Figures(questions, grid[rule]).told(name)
                yield told


def is_odd(name: str) -> int:
    return int(name == "odd")


def worth(rule: Rule, sets: list[list[Asked]]) -> tuple[bool, float]:
    """By which rules are chosen: that no set lost more than one question, however likelihoods are read; then what was saved."""
    figures = [Figures(questions, read) for questions in sets for read in named("", rule).values()]
    return all(one.points.sum() >= -1 for one in figures), mean(one.saved for one in figures)


def single(found: dict[str, list[Asked]]) -> Iterator[dict[str, str]]:
    """The exit rules of one chain, each recorded chain a program of its own; intervals over questions."""
    rules = {
        **{
            f"effort `{name}`{', the default' if name == 'medium' else ''}": ThoughtSpec(agree, level, min_tokens, None)
            for name, (agree, level, min_tokens) in EFFORTS.items()
        },
        "three agree, however likely": ThoughtSpec(3, 0.0, 0, None),
        "five agree, however likely": ThoughtSpec(5, 0.0, 0, None),
        "two agree, 0.9 likely": ThoughtSpec(2, 0.9, 512, None),
    }
    for name, dataset in SINGLE.items():
        alone = [
            Asked(f"{asked.id}/{i}", asked.gold, (thought,))
            for asked in found[dataset]
            for i, thought in enumerate(asked.thoughts)
        ]
        for title, thought in rules.items():
            ends = [exit_of(asked.thoughts[0].trials, thought) for asked in alone]
            by_question: dict[str, list[tuple[int, int, int]]] = {}
            for asked, end in zip(alone, ends, strict=True):
                gain = (end.key == asked.gold) - (asked.vote == asked.gold)
                by_question.setdefault(asked.id.rpartition("/")[0], []).append((gain, end.num_tokens, asked.num_tokens))
            sums = np.array([[*np.sum(rows, axis=0), len(rows)] for rows in by_question.values()], float)
            picked = np.random.default_rng(0).integers(0, len(sums), (NUM_DRAWS, len(sums)))
            drawn = sums[picked].sum(axis=1)
            low, high = inside(100 * drawn[:, 0] / drawn[:, 3])
            gains, used, whole, num = sums.sum(axis=0)
            yield {
                "data": name,
                "thoughts": str(len(alone)),
                "rule": title,
                "saved %": f"{100 * (1 - used / whole):.1f}",
                "accuracy %": f"{100 * mean(end.key == asked.gold for asked, end in zip(alone, ends, strict=True)):.1f}",
                "against the whole thought": f"{100 * gains / num:+.1f} ({low:+.1f} to {high:+.1f})",
            }


def exit_of(trials: Sequence[Trial], thought: ThoughtSpec) -> Trial:
    """The trial at which the thought is closed; the last if it never is."""
    asked = [trial for trial in trials if trial.num_tokens >= thought.min_tokens]
    found = (asked[i - 1] for i in range(1, len(asked) + 1) if is_settled(asked[:i], thought))
    return next(found, trials[-1])


def waves(found: dict[str, list[Asked]]) -> Iterator[dict[str, str]]:
    """How many probes a question takes, by when chains come to their turn."""
    for title, options in (
        ("each at its own price", {"grows": False, "waits": False}),
        ("and at least 5 % longer", {"grows": True, "waits": False}),
        ("and half as often far from an end", {"grows": True, "waits": True}),
    ):
        told = {"a chain is asked": title}
        for name, dataset in SEVERAL.items():
            runs = [run_waves(asked, spec_of(DEFAULT), **options) for asked in found[dataset]]
            tokens = sum(run.outcome.tokens for run in runs)
            whole = sum(asked.num_tokens for asked in found[dataset])
            told |= {
                f"{name} probes": f"{mean(run.num_probes for run in runs):.0f}",
                f"{name} passes": f"{mean(run.num_waves for run in runs):.1f}",
                f"{name} probe tokens %": f"{100 * PROBE_TOKENS * sum(run.num_probes for run in runs) / tokens:.2f}",
                f"{name} saved %": f"{100 * (1 - tokens / whole):.1f}",
            }
        yield told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="a folder for the tables as CSV")
    args = parser.parse_args()
    found = read_asked(args.traces)
    tables = {"probes": single, "probes_rules": several, "probes_halves": halves, "probes_waves": waves}
    for name, make in tables.items():
        rows = list(make(found))
        show(rows)
        print()
        if args.results:
            write_rows(args.results / f"{name}.csv", rows)


if __name__ == "__main__":
    main()

"""What the table says in one sentence, and what its reader must know beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sglang_dynasor.bench.intervals import Change
from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.table import WIDE, Line, Table
from sglang_dynasor.bench.ways import GREEDY, STOCK, Asking, Solved
from sglang_dynasor.policy.quantity import as_number

FIRST = 20  # questions on which it is found out whether golds and answers are of one form
LEAST_FORMS = 5  # answered ones, below which nothing is said of it
MOST_ALIKE = 0.2  # of those, where forms differ
MOST_CUT = 0.1  # of the samples, above which it is said
MOST_SILENT = 0.3  # of the samples, above which it is said
FEW = 30  # questions, below which intervals are rough
SURE_POINTS = 3.0  # half an interval, up to which two shares are called the same
EVEN_POINTS = 1.0  # by which greedy may be behind stock and still be as good


class Pair(NamedTuple):
    """What is right, and what stock answered."""

    gold: str
    answer: str | None  # None: there is none
    is_right: bool


def form(answer: str) -> str:
    """What kind of answer it is."""
    text = answer.strip()
    if len(text) == 1 and text.isalpha():
        return "letter"
    return "text" if as_number(text) is None else "number"


def pairs_of(measured: Measured, asking: Asking) -> list[Pair]:
    """Of the questions that have a gold and that stock answered, the first `FIRST`."""
    pairs: list[Pair] = []
    for id, by_way in measured.solved.items():
        question = measured.questions[id]
        if question.gold is not None and STOCK in by_way and len(pairs) < FIRST:
            stock = by_way[STOCK]
            pairs.append(Pair(question.gold, _written(stock), bool(stock.share(asking.gold_key(question)))))
    return pairs


def _written(stock: Solved) -> str | None:
    voted = stock.keys[0]
    return next((sample.answer for sample in stock.samples if voted is not None and sample.key == voted), None)


def gold_mismatch(pairs: Sequence[Pair]) -> str | None:
    """What is wrong where golds and answers are not of one form; None where nothing is, or too few have an answer.

    A model that is wrong still gives answers of the gold's form. Where forms differ, none is right and hardly one is alike.
    """
    answered = [(pair.gold, pair.answer) for pair in pairs if pair.answer is not None]
    if len(answered) < LEAST_FORMS or any(pair.is_right for pair in pairs):
        return None
    forms = [(form(gold), form(answer)) for gold, answer in answered]
    if sum(gold == answer for gold, answer in forms) > MOST_ALIKE * len(answered):
        return None
    usual = Counter(forms).most_common(1)[0][0]
    gold, answer = answered[forms.index(usual)]
    if usual[0] == "letter":
        remedy = "give the choices in the file, so that the model sees their letters"
    else:
        remedy = f"correct the golds, or have answers read otherwise (--answer {'number' if usual[0] == 'number' else 'NAME'})"
    return (
        f"golds are {usual[0]}s such as {gold[:40]!r} and answers {usual[1]}s such as {answer[:40]!r}: of the first {len(answered)} "
        f"none is right, so agreement with the full vote is shown; {remedy}"
    )


def verdict(table: Table, cap: int) -> str:
    """One sentence: whether branches pay on these questions, and which level of program to take."""
    stock, greedy = table.line(STOCK), table.line(GREEDY)
    num = len(table.ids)
    few = f"only {num} question{'s' * (num != 1)}, so intervals are rough: " if num < FEW else ""
    if stock is None or stock.hits is None:
        return f"{few}stock sampling was not measured, so there is nothing to compare with"
    if greedy is not None and greedy.hits_change is not None and table.has_gold:
        change = greedy.hits_change
        if change.value >= 0 or change.low > -EVEN_POINTS:
            return (
                f"{few}one greedy sample is as often right as a vote of {cap} ({change.shown()} points) at "
                f"{100 * greedy.tokens / max(1.0, stock.tokens):.0f} % of the tokens: these questions need no branches on this model"
            )
    best = best_program(table.programs)
    if best is None:
        return f"{few}no program was measured, so there is nothing to compare with"
    assert best.hits_change is not None
    assert best.tokens_change is not None
    costs = f"takes {_than(best.tokens_change, 'tokens', 'fewer')}"
    if best.way.is_replayed:
        wide = next(line for line in table.programs if line.way.way == best.way.way and line.way.width == WIDE)
        assert wide.tokens_change is not None
        costs = f"would take {_than(best.tokens_change, 'tokens', 'fewer')} where the server is busy and {_than(wide.tokens_change, 'tokens', 'fewer')} where all branches start at once"
    elif best.mean_change is not None:
        costs += f" and {_than(best.mean_change, 'mean latency', 'less')}"
    points = best.hits_change.shown()
    return f"{few}{best.way.way} {_kept(best, table.has_gold)} ({points} points) and {costs}, against stock n={cap}"


def _kept(line: Line, has_gold: bool) -> str:
    """What became of the answers."""
    change = line.hits_change
    assert change is not None
    is_lost = change.high < 0
    is_sure = change.half is not None and change.half <= SURE_POINTS
    if has_gold:
        if is_lost:
            return "is less often right"
        return "is as often right" if is_sure else "is not shown to be less often right"
    if line.way.is_replayed:
        return "gives other answers than the full vote" if is_lost else "gives the full vote's answers"
    than = "with the full vote than another vote would"
    return f"agrees less often {than}" if is_lost else f"is not shown to agree less often {than}"


def best_program(programs: Iterable[Line]) -> Line | None:
    """Of those that are not shown to lose, the one with the fewest tokens; else the one that loses least.

    Of programs that are replayed the narrow ones: that is how a busy server runs them.
    """
    known = [line for line in programs if line.hits_change is not None and line.tokens_change is not None]
    known = [line for line in known if line.way.width != WIDE]
    kept = [line for line in known if line.hits_change is not None and line.hits_change.high >= 0]
    if kept:
        return min(kept, key=lambda line: line.tokens)
    return max(known, key=lambda line: line.hits_change.value if line.hits_change else 0.0, default=None)


def _than(change: Change, what: str, less: str) -> str:
    more = "more" if change.value > 0 else less
    half = "" if change.half is None else f" ± {change.half:.0f}"
    return f"{abs(change.value):.0f}{half} % {more} {what}"


def notes(measured: Measured, table: Table, asking: Asking, num_questions: int) -> list[str]:
    """What a reader must know beside the table, one fact a line."""
    num, names = len(table.ids), {line.way.way for line in table.lines}
    said = [
        f"{num} of {num_questions} questions, in {measured.elapsed_s / 60:.1f} minutes; 95 % intervals, paired by question"
    ]
    if table.has_gold and table.num_hits < num:
        said.append(f"{table.num_hits} of them have a gold: right answers are those of these")
    if measured.ended:
        said.append(f"ended early: {measured.ended}")
    if left_out := [way for way in measured.ways if way not in names]:
        said.append(f"not in the table, as it was not measured: {', '.join(left_out)}")
    if num_partial := sum(id not in measured.refused for id in measured.solved) - num:
        said.append(f"{num_partial} more questions were answered in some ways only, and are left out")
    if measured.refused:
        said.append(
            f"{len(measured.refused)} questions were refused and are left out: {next(iter(measured.refused.values()))}"
        )
    stock = [measured.solved[id][STOCK] for id in table.ids] if STOCK in names else []
    samples = [sample for solved in stock for sample in solved.samples]
    if samples and (cut := sum(sample.is_cut for sample in samples) / len(samples)) > MOST_CUT:
        said.append(
            f"{100 * cut:.0f} % of the samples were cut at {asking.max_tokens} tokens; --max-tokens allows more"
        )
    if samples and (silent := sum(sample.key is None for sample in samples) / len(samples)) > MOST_SILENT:
        said.append(
            f"{100 * silent:.0f} % of the samples have no answer that is read; docs/answers.md says what --answer reads"
        )
    if stock and not table.has_gold:
        said.append(
            "agrees: with stock's full vote; its own line says how often a second such vote would, by drawing its samples again"
        )
    if table.is_replayed:
        said.append(
            "replayed: the server has no --scheduler dynasor, so its policy was run on stock's samples; wide starts all branches at once, "
            "narrow as few as could decide, and the scheduler goes between the two with the load; seconds are stock's for as many steps"
        )
    if any(solved.is_estimated for solved in stock):
        said.append(
            "the server says tokens of all samples together: those of each are estimated from the lengths of the texts"
        )
    return said

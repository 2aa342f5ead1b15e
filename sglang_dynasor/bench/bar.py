"""The progress bar, with an early estimate of what will come out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from tqdm import tqdm

from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.table import make_table
from sglang_dynasor.bench.verdict import FIRST, best_program, gold_mismatch, pairs_of
from sglang_dynasor.bench.ways import Asking

EVERY_S = 2.0  # an estimate
NUM_DRAWS = 100  # of its intervals
FORM = "{percentage:3.0f} %|{bar:20}| {desc}"


class Bar:
    """What is done of the questions or of the time, whichever is more."""

    def __init__(self, measured: Measured, asking: Asking, replays: Sequence[str], num_questions: int, limit_s: float):
        self.measured, self.asking, self.replays = measured, asking, replays
        self.num_questions, self.limit_s = num_questions, limit_s
        self.began_s = self.estimated_s = time.monotonic()
        self.estimate = ""
        self.is_checked = False
        self.bar: Any = tqdm(total=1.0, bar_format=FORM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self) -> None:
        """Show what has been answered by now; say once, after the first questions, if golds and answers differ in form."""
        now_s = time.monotonic()
        _, done = self.measured.shared()
        if not self.is_checked and len(done) >= FIRST:
            self.is_checked = True
            if mismatch := gold_mismatch(pairs_of(self.measured, self.asking)):
                self.bar.write(f"warning: {mismatch}", file=sys.stderr)
        if now_s - self.estimated_s >= EVERY_S:
            self.estimated_s, self.estimate = now_s, self._estimate()
        elapsed_s = now_s - self.began_s
        self.bar.n = min(1.0, max(len(done) / self.num_questions, elapsed_s / self.limit_s))
        told = f"{len(done)} of {self.num_questions} questions, {_clock(elapsed_s)} of {_clock(self.limit_s)}"
        self.bar.set_description_str(told + self.estimate)

    def _estimate(self) -> str:
        use_gold = gold_mismatch(pairs_of(self.measured, self.asking)) is None
        table = make_table(self.measured, self.asking, self.replays, use_gold, NUM_DRAWS)
        best = None if table is None else best_program(table.programs)
        if table is None or best is None or best.tokens_change is None or best.hits_change is None:
            return ""
        what = "right" if table.has_gold else "agrees"
        return f"; {best.way.name}: tokens {best.tokens_change.shown(' %')}, {what} {best.hits_change.shown()} points"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

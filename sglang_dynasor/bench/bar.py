"""The progress bar, with an early estimate of what will come out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from tqdm import tqdm

from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.table import Replays, make_table
from sglang_dynasor.bench.verdict import FIRST, best_program, gold_mismatch, pairs_of
from sglang_dynasor.bench.ways import Asking

EVERY_S = 5.0  # an estimate
MOST_FRAC = 0.05  # of the time, that estimates take
LOG_S = 15.0  # a line, where nobody looks at a screen
NUM_DRAWS = 100  # of an estimate's intervals
FORM = "{percentage:3.0f} %|{bar:20}| {desc}"


class Bar:
    """What is done of the questions or of the time, whichever is more."""

    def __init__(self, measured: Measured, asking: Asking, replays: Sequence[str], num_questions: int, limit_s: float):
        self.measured, self.asking, self.replays = measured, asking, replays
        self.num_questions, self.limit_s = num_questions, limit_s
        self.began_s = time.monotonic()
        self.next_s = self.began_s + EVERY_S
        self.num_done = 0
        self.estimate = ""
        self.is_checked = False
        self.known: Replays = {}
        every_s = 0.2 if sys.stderr.isatty() else LOG_S
        self.bar: Any = tqdm(total=1.0, bar_format=FORM, mininterval=every_s, maxinterval=every_s, miniters=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self) -> None:
        """Show how far it is."""
        elapsed_s = time.monotonic() - self.began_s
        told = f"{self.num_done} of {self.num_questions} questions, {_clock(elapsed_s)} of {_clock(self.limit_s)}"
        self.bar.set_description_str(told + self.estimate, refresh=False)
        share = min(1.0, max(self.num_done / self.num_questions, elapsed_s / self.limit_s))
        self.bar.update(share - self.bar.n)

    def rest(self) -> None:
        """Look at what has been measured, while no request is under way that this would hold up.

        After the first questions it says once if golds and answers differ in form.
        """
        self.num_done = len(self.measured.shared()[1])
        if not self.is_checked and self.num_done >= FIRST:
            self.is_checked = True
            if mismatch := gold_mismatch(pairs_of(self.measured, self.asking)):
                self.bar.write(f"warning: {mismatch}", file=sys.stderr)
        began_s = time.monotonic()
        if began_s >= self.next_s:
            self.estimate = self._estimate()
            now_s = time.monotonic()
            self.next_s = now_s + max(EVERY_S, (now_s - began_s) / MOST_FRAC)
        self.update()

    def _estimate(self) -> str:
        use_gold = gold_mismatch(pairs_of(self.measured, self.asking)) is None
        table = make_table(self.measured, self.asking, self.replays, use_gold, NUM_DRAWS, self.known)
        best = None if table is None else best_program(table.programs)
        if table is None or best is None or best.tokens_change is None or best.hits_change is None:
            return ""
        what = "right" if table.has_gold else "agrees"
        return f"; {best.way.name}: tokens {best.tokens_change.shown(' %')}, {what} {best.hits_change.shown()} points"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

"""What each step of an engine took, written down by its scheduler: for fits of the simulator's costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def logged_steps(path: Path) -> Iterator[None]:
    """Engines forked meanwhile write a row per step: kind, rows, tokens, seconds (`sglang_dynasor.sim.costs.read_steps`).

    A step is one iteration of the scheduler's loop that ran a batch, whatever else it did in that iteration.
    """
    from sglang.srt.managers.scheduler import Scheduler

    choose = Scheduler.get_next_batch_to_run
    began = [0.0]  # of the iteration under way
    sizes: list[tuple[str, int, int] | None] = [None]  # of its batch

    def choosing(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.perf_counter()
        if sizes[0] is not None:
            with path.open("a") as file:  # the process may be killed at any time
                print(*sizes[0], f"{now - began[0]:.7f}", sep=",", file=file)
        began[0], sizes[0] = now, None
        plan = choose(self, *args, **kwargs)
        batch = plan.batch_to_run
        if batch and batch.forward_mode.is_extend():
            sizes[0] = ("prefill", len(batch.reqs), batch.extend_num_tokens)
        elif batch:
            read = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
            sizes[0] = ("decode", len(batch.reqs), read)
        return plan

    path.write_text("kind,rows,tokens,seconds\n")
    Scheduler.get_next_batch_to_run = choosing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scheduler.get_next_batch_to_run = choose  # type: ignore[method-assign]

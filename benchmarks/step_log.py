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

    A step lasts from the end of the one before, or from when work was found, to the end of its own results, so that the
    scheduler's own work counts. For engines without overlap, as SGLang's are on a CPU.
    """
    from sglang.srt.managers.scheduler import Scheduler

    choose, process = Scheduler.get_next_batch_to_run, Scheduler.process_batch_result
    began = [0.0]  # of the step under way
    sizes = [("", 0, 0)]

    def choosing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not began[0]:
            began[0] = time.perf_counter()
        plan = choose(self, *args, **kwargs)
        batch = plan.batch_to_run
        if not batch:
            began[0] = 0.0
        elif batch.forward_mode.is_extend():
            sizes[0] = ("prefill", len(batch.reqs), batch.extend_num_tokens)
        else:
            read = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
            sizes[0] = ("decode", len(batch.reqs), read)
        return plan

    def processing(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = process(self, *args, **kwargs)
        now = time.perf_counter()
        with path.open("a") as file:  # the process may be killed at any time
            print(*sizes[0], f"{now - began[0]:.7f}", sep=",", file=file)
        began[0] = now
        return result

    path.write_text("kind,rows,tokens,seconds\n")
    Scheduler.get_next_batch_to_run, Scheduler.process_batch_result = choosing, processing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scheduler.get_next_batch_to_run, Scheduler.process_batch_result = choose, process  # type: ignore[method-assign]

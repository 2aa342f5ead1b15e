"""What SGLang tells others of its load and measures of requests: waiting programs count, and branches are no requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.load_snapshot import LoadSnapshot
from sglang.srt.managers.scheduler_components.load_inquirer import SchedulerLoadInquirer

from sglang_dynasor.engine.fence import override
from sglang_dynasor.policy.line import Need

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def told_load(inquirer: SchedulerLoadInquirer, scheduler: Any) -> SchedulerLoadInquirer:
    """SGLang's inquirer, which also counts what waits outside its queue, as if it stood there."""

    def loads(original: Callable[..., LoadSnapshot], inquirer: Any) -> LoadSnapshot:
        load = original(inquirer)
        if scheduler._dynasor is not None:
            need: Need = scheduler._dynasor.admission.queued
            load.num_waiting_reqs += need.num_branches
            load.num_waiting_uncached_tokens += need.new_tokens
            load.num_total_tokens += need.prompt_tokens
            load.num_active_tokens += need.prompt_tokens
            if load.queues is not None:
                load.queues.waiting += need.num_branches
        return load

    class ProgramLoadInquirer(type(inquirer)):
        get_loads = override(type(inquirer).get_loads, loads)

    return ProgramLoadInquirer(**{field.name: getattr(inquirer, field.name) for field in fields(inquirer)})


def note_start(parent: Req, branch: Req) -> None:
    """A branch has its first token, and so has its program's own request: what it waited is measured, once."""
    times: Any = parent.time_stats
    first: Any = branch.time_stats
    if not times.forward_entry_time and first.prefill_finished_time:
        times.set_forward_entry_time(first.forward_entry_time)
        times.set_prefill_finished_time(first.prefill_finished_time)

"""The hooks in the scheduler process. Each returns at once where `--scheduler dynasor` was not given.

Each is behind a guard (fence.py): where it raises, SGLang does what it does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import NextBatchPlan
from sglang.srt.observability import trace
from sglang.srt.runtime_context import get_schedule, get_serving
from sglang.utils import TypeBasedDispatcher

from sglang_dynasor import __version__
from sglang_dynasor.engine import aside
from sglang_dynasor.engine.adapters import let_go
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.fence import FENCE
from sglang_dynasor.engine.flag import config_of, is_off, serves_programs
from sglang_dynasor.engine.intake import field_of
from sglang_dynasor.engine.load import told_load
from sglang_dynasor.engine.messages import Answer, Ask, Told
from sglang_dynasor.engine.req import turn_away
from sglang_dynasor.engine.retraction import retract_whole, youngest_last
from sglang_dynasor.engine.room import adder_class
from sglang_dynasor.engine.spans import Spans
from sglang_dynasor.engine.statistics import HostStatistics, Observer
from sglang_dynasor.engine.streamer import streamer_class
from sglang_dynasor.errors import PatchError


def controller_of(scheduler: Any) -> Controller | None:
    return getattr(scheduler, "_dynasor", None)


def init_request_dispatcher(result: None, scheduler: Any) -> None:
    """SGLang hands each request over by its type; ours go to the controller."""
    if off := is_off(scheduler.server_args):
        scheduler._request_dispatcher += TypeBasedDispatcher([(Ask, lambda ask: Answer(found={"off": off}))])
    elif config_of(scheduler.server_args).is_on:
        scheduler._request_dispatcher += TypeBasedDispatcher(
            [
                (Told, lambda told: aside.hear(scheduler, told)),
                (Ask, lambda ask: aside.answer(scheduler, ask)),
            ]
        )


def init_schedule_policy(result: None, scheduler: Any) -> None:
    """By now SGLang has its model, its pools and its queue, and has not taken a request."""
    config = config_of(scheduler.server_args)
    FENCE.begin(config.dynasor_strict)  # also in stock SGLang's: what it was forked from may have counted
    if not serves_programs(scheduler.server_args):
        return
    from sglang_dynasor_patches.install import require_live

    require_live(("scheduler",))
    controller = scheduler._dynasor = scheduler.policy._dynasor = Controller(scheduler, config, FENCE)
    observe(scheduler.tp_worker.model_runner, controller.observer)
    reporter = scheduler.metrics_reporter
    if reporter.current_scheduler_metrics_enabled:
        scheduler.metrics_collector._dynasor_of = scheduler
        if reporter.is_stats_logging_rank:
            controller.measure(scheduler.metrics_collector)
    if trace.get_global_tracing_enabled() and reporter.is_stats_logging_rank:
        controller.ends.spans = Spans(trace.tracer, get_serving().served_model_name)


def observe(runner: Any, observer: Observer) -> None:
    """Show `observer` the logits of every step.

    Raises:
        PatchError: another plugin's observer is there.
    """
    if runner.sampling_observer is not None:
        raise PatchError(
            f"--scheduler dynasor: another plugin's sampling observer ({type(runner.sampling_observer).__name__}) is there, "
            "and SGLang has room for one; leave out one of the two plugins"
        )
    runner.sampling_observer = observer
    if (device := torch.device(runner.device)).type != "cpu":
        observer.warm_up(device)


def load_inquirer(result: None, scheduler: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        scheduler.load_inquirer = told_load(scheduler.load_inquirer, scheduler)


def log_stats(collector: Any, stats: Any) -> None:
    controller = controller_of(getattr(collector, "_dynasor_of", None))
    if controller is not None:
        controller.report(stats)
    elif FENCE.meter is not None:
        FENCE.meter.report(aside.status())


def run_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        controller.observer.watched = None  # if the next line fails: rows of another step are nobody's
        controller.observer.watch(batch)


def consume(original: Callable[..., None], cls: type, batch: Any, output: Any, starts: list[int]) -> None:
    if isinstance(output, HostStatistics):
        output.read(starts)
    else:
        original(cls, batch, output, starts)


def enqueue(original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    controller = controller_of(scheduler)
    if FENCE.orphans and req in FENCE.orphans:
        aside.drop(scheduler, req)
    elif controller is not None:
        controller.take(partial(original, scheduler), req, is_retracted)
    elif FENCE.is_aside and aside.is_program(req, is_retracted):
        turn_away(scheduler, req, aside.REFUSAL)
    elif (off := is_off(scheduler.server_args)) and not is_retracted and field_of(req) is not None:
        # Here, because SGLang loads no plugins in further tokenizer workers.
        turn_away(scheduler, req, off, HTTPStatus.BAD_REQUEST)
    else:
        original(scheduler, req, is_retracted)


@aside.settles_first
def next_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    controller = controller_of(scheduler)
    if controller is None or controller.is_idle:
        return original(scheduler, running_batch)
    controller.admit(running_batch)
    if controller.holds_back:
        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    plan = original(scheduler, running_batch)
    controller.front.note_admitted(plan.batch_to_run)
    return plan


def order_queue(original: Callable[..., None], policy: Any, waiting_queue: Any, *args: Any, **kwargs: Any) -> None:
    controller = getattr(policy, "_dynasor", None)
    if controller is None or controller.is_idle:
        original(policy, waiting_queue, *args, **kwargs)
    else:
        controller.front.sort(partial(original, policy), waiting_queue, *args, **kwargs)


def prefill_adder(result: type, scheduler: Any) -> type | None:
    controller = controller_of(scheduler)
    if controller is None or controller.is_idle:
        return None
    return adder_class(result, controller.room, controller.admission)


@aside.tells_to_leave
def timeouts(result: list[Any], scheduler: Any) -> list[Any] | None:
    controller = controller_of(scheduler)
    return None if controller is None or controller.is_idle else result + controller.due()


def retraction_order(original: Callable[..., list[int]], reqs: list[Any]) -> list[int]:
    order = original(reqs)
    return order if get_schedule().retraction_policy == "priority" else youngest_last(order, reqs)


def retract(original: Callable[..., Any], batch: Any) -> Any:
    return retract_whole(batch, *original(batch))


def output_streamer(result: type, scheduler: Any) -> type | None:
    controller = controller_of(scheduler)
    return None if controller is None else streamer_class(result, scheduler)


def abort_request(scheduler: Any, recv_req: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        controller.abort(recv_req)


def send_abort_output(original: Callable[..., None], scheduler: Any, abort_req: Any, req: Any) -> None:
    controller = controller_of(scheduler)
    if FENCE.orphans and req in FENCE.orphans:
        del FENCE.orphans[req]
    elif controller is None or not controller.on_aborted(abort_req, req):
        original(scheduler, abort_req, req)


def unload_lora(scheduler: Any, recv_req: Any) -> None:
    if controller_of(scheduler) is not None or FENCE.orphans:
        let_go(aside.held_by_sglang(scheduler, scheduler.running_batch), recv_req.lora_id)


def init_info(result: dict[str, Any], scheduler: Any) -> dict[str, Any] | None:
    return {**result, "dynasor": __version__} if config_of(scheduler.server_args).is_on else None


def internal_state(result: Any, scheduler: Any, recv_req: Any) -> None:
    controller = controller_of(scheduler)
    if FENCE.is_aside:
        result.internal_state["dynasor"] = aside.status()
    elif controller is not None:
        result.internal_state["dynasor"] = aside.counts()  # if the next line fails
        result.internal_state["dynasor"] = controller.status()
    elif off := is_off(scheduler.server_args):
        result.internal_state["dynasor"] = {"off": off}

"""The hooks in the scheduler process. Each returns at once where `--scheduler dynasor` was not given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import NextBatchPlan

from sglang_dynasor import __version__
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.retraction import retract_whole, youngest_last
from sglang_dynasor.engine.room import adder_class
from sglang_dynasor.engine.statistics import HostStatistics, Observer
from sglang_dynasor.engine.streamer import streamer_class
from sglang_dynasor.errors import PatchError


def controller_of(scheduler: Any) -> Controller | None:
    return getattr(scheduler, "_dynasor", None)


def init_schedule_policy(result: None, scheduler: Any) -> None:
    """By now SGLang has its model, its pools and its queue, and has not taken a request."""
    config = config_of(scheduler.server_args)
    if not config.is_on:
        return
    from sglang_dynasor_patches.install import require_live

    require_live(("scheduler",))
    controller = scheduler._dynasor = scheduler.policy._dynasor = Controller(scheduler, config)
    observe(scheduler.tp_worker.model_runner, controller.observer)


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
        observer.warm_up(runner.model_config.vocab_size, device)


def run_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        controller.observer.watch(batch)


def consume(original: Callable[..., None], cls: type, batch: Any, output: Any, starts: list[int]) -> None:
    if isinstance(output, HostStatistics):
        output.read(starts)
    else:
        original(cls, batch, output, starts)


def enqueue(original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    controller = controller_of(scheduler)
    if controller is None:
        original(scheduler, req, is_retracted)
    else:
        controller.take(partial(original, scheduler), req, is_retracted)


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


def timeouts(result: list[Any], scheduler: Any) -> list[Any] | None:
    controller = controller_of(scheduler)
    return None if controller is None or controller.is_idle else result + controller.due()


def retraction_order(original: Callable[..., list[int]], reqs: list[Any]) -> list[int]:
    return youngest_last(original(reqs), reqs)


def retract(original: Callable[..., Any], batch: Any) -> Any:
    return retract_whole(batch, *original(batch))


def output_streamer(result: type, scheduler: Any) -> type | None:
    controller = controller_of(scheduler)
    return None if controller is None else streamer_class(result, controller)


def abort_request(scheduler: Any, recv_req: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        controller.abort(recv_req)


def send_abort_output(original: Callable[..., None], scheduler: Any, abort_req: Any, req: Any) -> None:
    controller = controller_of(scheduler)
    if controller is None or not controller.on_aborted(abort_req, req):
        original(scheduler, abort_req, req)


def init_info(result: dict[str, Any], scheduler: Any) -> dict[str, Any] | None:
    return None if controller_of(scheduler) is None else {**result, "dynasor": __version__}


def internal_state(result: Any, scheduler: Any, recv_req: Any) -> None:
    controller = controller_of(scheduler)
    if controller is not None:
        result.internal_state["dynasor"] = controller.status()

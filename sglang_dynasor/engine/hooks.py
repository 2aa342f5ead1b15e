"""The hooks in the scheduler process. Each returns at once where `--scheduler dynasor` was not given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_dynasor import __version__
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.streamer import streamer_class


def controller_of(scheduler: Any) -> Controller | None:
    return getattr(scheduler, "_dynasor", None)


def init_scheduler(scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    config = config_of(server_args)
    if config.is_on:
        from sglang_dynasor_patches.install import require_live

        require_live(("scheduler",))
        scheduler._dynasor = Controller(scheduler, config)


def enqueue(original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    controller = controller_of(scheduler)
    if controller is None:
        original(scheduler, req, is_retracted)
    else:
        controller.intake(partial(original, scheduler), req, is_retracted)


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

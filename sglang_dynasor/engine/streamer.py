"""The output streamer that keeps branches to itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_dynasor.engine import aside
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.fence import FENCE, override
from sglang_dynasor.engine.flag import has_many_fronts
from sglang_dynasor.engine.live import record_of


def streamer_class(base: type[SchedulerOutputStreamer], scheduler: Any) -> type[SchedulerOutputStreamer]:
    """A subclass of SGLang's streamer that shows each step's requests to the controller of `scheduler` first."""

    def stream(
        original: Callable[..., None], streamer: Any, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        controller: Controller | None = scheduler._dynasor
        if FENCE.orphans:
            reqs = aside.show(reqs)
        if controller is not None and not controller.is_idle:
            told = controller.ends.told = []  # one message to the detokenizer for all of them
            reqs = controller.on_output([req for req in reqs if req is not skip_req])
            controller.ends.told = None
            if told and has_many_fronts(scheduler.server_args) and controller.ends.emit is not None:
                # By themselves: in one message with others, SGLang would tell those of records, too, and no hook of ours is there.
                controller.ends.emit(told, any(req.return_logprob for req in told))
                told = []
            return_logprob = return_logprob or any(req.return_logprob for req in told)
            reqs += told
        original(streamer, reqs, return_logprob, skip_req)

    def stream_plain(
        original: Callable[..., None], streamer: Any, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Where that fails: clients' requests, and what programs were answered before it did."""
        reqs = aside.show_plain(aside.show(reqs), scheduler._dynasor)
        original(streamer, reqs, return_logprob or any(req.return_logprob for req in reqs), skip_req)

    def records(original: Callable[..., dict[str, list[Any]]], streamer: Any, reqs: list[Req]) -> dict[str, list[Any]]:
        info = original(streamer, reqs)
        found = [record_of(req) for req in reqs]
        if any(found):
            info["dynasor"] = [[] if record is None else [record] for record in found]
        return info

    class ProgramStreamer(base):
        has_additional_customized_info = True
        stream_output = override(base.stream_output, stream, stream_plain)
        build_additional_customized_info = override(base.build_additional_customized_info, records)

        def __post_init__(self) -> None:
            super().__post_init__()
            scheduler._dynasor.ends.emit = partial(base.stream_output, self)

    return ProgramStreamer

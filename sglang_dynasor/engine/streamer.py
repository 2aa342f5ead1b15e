"""The output streamer that keeps branches to itself."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_dynasor.engine.controller import Controller


def streamer_class(base: type[SchedulerOutputStreamer], controller: Controller) -> type[SchedulerOutputStreamer]:
    """A subclass of SGLang's streamer that shows each step's requests to `controller` first."""

    class ProgramStreamer(base):
        def __post_init__(self) -> None:
            super().__post_init__()
            controller.emit = super().stream_output

        def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
            if not controller.is_idle:
                mine = [req for req in reqs if req is not skip_req]
                reqs = controller.on_output(mine)
            super().stream_output(reqs, return_logprob, skip_req)

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == "dynasor" or super().is_request_level_customized_info_key(key)

    return ProgramStreamer

"""The output streamer that keeps branches to itself."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.live import record_of


def streamer_class(base: type[SchedulerOutputStreamer], controller: Controller) -> type[SchedulerOutputStreamer]:
    """A subclass of SGLang's streamer that shows each step's requests to `controller` first."""

    class ProgramStreamer(base):
        has_additional_customized_info = True

        def __post_init__(self) -> None:
            super().__post_init__()
            controller.ends.emit = super().stream_output

        def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
            if not controller.is_idle:
                told = controller.ends.told = []  # one message to the detokenizer for all of them
                try:
                    reqs = controller.on_output([req for req in reqs if req is not skip_req])
                finally:
                    controller.ends.told = None
                return_logprob = return_logprob or any(req.return_logprob for req in told)
                reqs += told
            super().stream_output(reqs, return_logprob, skip_req)

        def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
            info = super().build_additional_customized_info(reqs)
            records = [record_of(req) for req in reqs]
            if any(records):
                info["dynasor"] = [[] if record is None else [record] for record in records]
            return info

    return ProgramStreamer

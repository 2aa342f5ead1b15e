"""A program as OpenTelemetry spans, its branches as children: in SGLang's own trace of the request, with --enable-trace.

Names are those of the GenAI semantic conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/), ours begin with `dynasor.`
No text goes in, and no answer.
"""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.observability.req_time_stats import convert_time_to_realtime_ns

from sglang_dynasor.engine.fence import guarded
from sglang_dynasor.engine.live import LiveProgram

# Of a record, as they are called there.
TOLD = (
    "stop_rule",
    "stop_reason",
    "certaindex",
    "risk",
    "num_branches",
    "cap",
    "gang",
    "num_tokens",
    "overtaken_tokens",
)


class Spans:
    """Made when a program is over: what it did until then costs nothing but the times of its branches.

    Args:
        tracer: SGLang's.
    """

    def __init__(self, tracer: Any, model: str):
        self.tracer = tracer
        self.model = model

    @guarded("spans")
    def count(self, live: LiveProgram, outcome: str, record: dict[str, Any] | None = None) -> None:
        """Tell of a program that is over, if SGLang traces its request. Nothing of this may keep its client from an answer."""
        if live.is_traced:
            self._tell(live, outcome, live.program.record() if record is None else record)

    def _tell(self, live: LiveProgram, outcome: str, record: dict[str, Any]) -> None:
        parent: Any = live.parent
        now, times = time.perf_counter(), parent.time_stats
        attributes = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.workflow.name": record["algorithm"],
            "gen_ai.provider.name": "sglang",
            "gen_ai.request.model": self.model,
            "gen_ai.usage.input_tokens": len(parent.origin_input_ids),
            "gen_ai.usage.output_tokens": record["num_tokens"],
            "dynasor.program": record["program"],
            "dynasor.outcome": outcome,
            **{f"dynasor.{key}": record[key] for key in TOLD if record[key] is not None},
        }
        name = f"invoke_workflow {record['algorithm']}"
        program = self._start(name, times.trace_ctx.root_span_context, times.scheduler_recv_time, attributes)
        if times.forward_entry_time:
            program.add_event("gang started", timestamp=convert_time_to_realtime_ns(times.forward_entry_time))
        within = self._within(program)
        for index, branch in live.times.items():
            self._tell_branch(index, branch, record, within, now, len(parent.origin_input_ids))
        program.end(convert_time_to_realtime_ns(now))

    def _tell_branch(
        self, index: int, times: Any, record: dict[str, Any], within: Any, now: float, prompt_tokens: int
    ) -> None:  # fmt: skip
        attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "sglang",
            "gen_ai.request.model": self.model,
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": record["branch_tokens"][index],
            "gen_ai.response.finish_reasons": [record["finish_reasons"][index] or "ended"],
            "dynasor.branch": index,
            "dynasor.is_winner": index == record["branch"],
        }
        span = self._start(f"text_completion {self.model}", within, times.queued, attributes)
        if times.first_token:
            span.add_event("first token", timestamp=convert_time_to_realtime_ns(times.first_token))
        span.end(convert_time_to_realtime_ns(times.ended or now))

    def _start(self, name: str, within: Any, at: float, attributes: dict[str, Any]) -> Any:
        return self.tracer.start_span(
            name, context=within, start_time=convert_time_to_realtime_ns(at), attributes=attributes
        )  # fmt: skip

    def _within(self, span: Any) -> Any:
        from opentelemetry.trace import set_span_in_context  # SGLang's own tracing needs it: it is there

        return set_span_in_context(span)

"""What a program's branches have in common: SGLang makes the first Req, the others are copies of it as it was then."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from copy import copy
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ReqLogprob
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams


def _again(value: Any) -> Any:
    """Another with the same attributes. Not `copy`: time stats tell it what to leave out, as for another process."""
    other = object.__new__(type(value))
    vars(other).update(vars(value))
    return other


_UNCHANGING = frozenset({int, float, bool, str, bytes, tuple, frozenset, type(None), DisaggregationMode})
# How another is made of what a Req changes in place, by type.
_ANOTHER: dict[type, Callable[[Any], Any]] = {
    list: copy,
    array: copy,
    SamplingParams: copy,
    SchedulerReqTimeStats: _again,
    ReqKvInfo: lambda kv: ReqKvInfo(),
    ReqLogprob: lambda asked: ReqLogprob(
        top_logprobs_num=asked.top_logprobs_num, token_ids_logprob=asked.token_ids_logprob
    ),
    CacheRequestHandle: lambda handle: handle,  # of its rid: made with that
}


class Mould:
    """A Req as SGLang has just made it. What is `parent`'s, the client's own Req, is only read, and shared."""

    def __init__(self, req: Req, parent: Req):
        theirs = vars(parent)
        self._shared = vars(req).copy()
        self._own: list[tuple[str, Callable[[Any], Any], Any]] = []
        self.is_usable = not parent.return_logprob and parent.custom_logit_processor is None
        for name, value in vars(req).items():
            if type(value) in _UNCHANGING or value is theirs.get(name):
                continue
            another = _ANOTHER.get(type(value))
            if another is None or (another is _again and value.trace_ctx.tracing_enable):
                self.is_usable = False  # nobody knows how; or it is traced under a name of its own
                return
            self._own.append((name, another, another(value)))

    def cast(self, rid: str) -> Req:
        """Another Req, as SGLang would make it now. Only of a mould that is usable."""
        req = object.__new__(Req)
        fields = vars(req)
        fields.update(self._shared)
        for name, another, value in self._own:
            fields[name] = another(value)
        req.rid, req.cache_request_handle = rid, CacheRequestHandle(rid, 0)
        req.time_stats.set_scheduler_recv_time()
        return req

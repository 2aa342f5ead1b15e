"""Internal Reqs: made after the client's own, and how they end before their time."""

from __future__ import annotations

import copy
from array import array
from functools import partial
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import BaseFinishReason, Req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dynasor.engine import media
from sglang_dynasor.engine.live import BranchTag, Tag, internal_tag_of, set_tag
from sglang_dynasor.engine.mould import Mould

_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: far apart for neighbouring indices
_DEFAULT_SEED = 42  # what SGLang gives a request without one


class FINISH_ENDED(BaseFinishReason):
    """The program no longer needs this branch. A normal stop to the client: text so far, no error."""

    # `matched` must be None: SGLang trims the text by a string and the ids by an int. No function of ours, because SGLang calls
    # it where no guard is (fence.py).
    to_json = staticmethod(partial(dict[str, Any], type="stop", matched=None))  # pyright: ignore[reportAssignmentType]


def branch_seed(seed: int | None, index: int) -> int:
    """The sampling seed of branch `index`; branch 0 has the request's own.

    SGLang reads seeds under --enable-deterministic-inference only.
    """
    base = _DEFAULT_SEED if seed is None else seed
    return (base + index * _SEED_STEP) % 2**63 if index else base


def make_branch(scheduler: Any, parent: Any, rid: str, tag: BranchTag) -> Req:
    """An internal Req that samples the same prompt as `parent` under a seed of its own."""
    live = tag.live
    if live.mould is not None and live.mould.is_usable:
        req = live.mould.cast(rid)
    else:
        req = _from_sglang(scheduler, parent, rid)
        live.mould = live.mould or Mould(req, parent)
    params = req.sampling_params
    params.sampling_seed = branch_seed(params.sampling_seed, tag.index)
    if parent.grammar is not None:
        req.grammar = parent.grammar.copy()
        req.grammar_key = parent.grammar_key
    media.give(req, parent)
    set_tag(req, tag)
    return req


def _from_sglang(scheduler: Any, parent: Any, rid: str) -> Req:
    """A Req for the prompt of `parent`, made by SGLang."""
    req = Req(
        rid,
        "",
        parent.origin_input_ids,
        copy.copy(parent.sampling_params),
        origin_input_ids_unpadded=parent.origin_input_ids_unpadded,
        return_logprob=parent.return_logprob,
        top_logprobs_num=parent.logprob.top_logprobs_num,
        token_ids_logprob=parent.logprob.token_ids_logprob,
        custom_logit_processor=parent.custom_logit_processor,
        require_reasoning=parent.require_reasoning,
        return_hidden_states=parent.return_hidden_states,
        return_sampling_mask=parent.return_sampling_mask,
        sampling_logprobs_mode=parent.sampling_logprobs_mode,
        return_flat_raw_top_logprobs=parent.return_flat_raw_top_logprobs,
        return_routed_experts=parent.return_routed_experts,
        routed_experts_start_len=parent.routed_experts_start_len,
        return_indexer_topk=parent.return_indexer_topk,
        eos_token_ids=parent.eos_token_ids,
        vocab_size=parent.vocab_size,
        priority=parent.priority,
        routing_key=parent.routing_key,
        extra_key=parent.extra_key,
        cache_salt=parent.cache_salt,
        disagg_mode=scheduler.disaggregation_mode,
    )  # without the parent's time stats and their collector: a branch is no request to SGLang's histograms
    req.tokenizer = parent.tokenizer
    req.lora_id = parent.lora_id  # not given above: SGLang would add it to the parent's key of the cache once more
    req.logprob_start_len = parent.logprob_start_len
    return req


def go_on_from(req: Req, given: array[int]) -> None:
    """Let a fresh branch begin with `given`, a thought that is closed, as if it had sampled that itself."""
    req.output_ids = given
    media.reach(req)
    params = req.sampling_params
    params.min_new_tokens = max(0, params.min_new_tokens - len(given))  # SGLang counts from where the Req begins
    if req.require_reasoning:
        req.reasoning_tokens, req._is_reasoning_over = len(given), True
    grammar: Any = req.grammar
    if grammar is not None:  # that of strict thinking: others are refused
        for token in given:
            grammar.accept_token(token)


def make_side(scheduler: Any, branch: Any, ids: list[int], rid: str, tag: Tag, max_new_tokens: int) -> Req | None:
    """An internal greedy Req over `ids` that asks something about `branch`; None where they are too many for the model."""
    if len(ids) + max_new_tokens >= scheduler.max_req_input_len:
        return None
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    params.normalize(scheduler.tokenizer)
    req = Req(
        rid,
        "",
        array("q", ids),
        params,
        eos_token_ids=branch.eos_token_ids,
        vocab_size=branch.vocab_size,
        priority=branch.priority,
        extra_key=branch.extra_key,
        cache_salt=branch.cache_salt,
        disagg_mode=scheduler.disaggregation_mode,
    )
    req.tokenizer = scheduler.tokenizer
    req.lora_id = branch.lora_id
    req.logprob_start_len = -1
    scheduler.init_req_max_new_tokens(req)
    set_tag(req, tag)
    return req


def stand_in(parent: Any, speaker: Req) -> Req:
    """Another Req that says to the client of `parent` what `speaker`, which may be running still, has said so far."""
    told = object.__new__(Req)
    vars(told).update(vars(speaker))
    told.output_ids = speaker.output_ids[:]
    told.surr_offset = told.read_offset = None  # nothing of it has been shown
    told.rid, told.http_worker_ipc, told.stream = parent.rid, parent.http_worker_ipc, parent.stream
    told.finished_output = None
    return told


def refusal(message: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE) -> dict[str, Any]:
    """The finish reason of a request that is refused, by default for lack of room or time."""
    return {"type": "abort", "status_code": status.value, "message": message}


def turn_away(scheduler: Any, req: Req, message: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE) -> None:
    """Refuse a request before it is queued, as SGLang does beyond --max-queued-requests: what it holds for it is given back."""
    if req.to_finish is None:  # else SGLang refuses it itself, and the turn under way in its session is another's
        scheduler._release_aborted_request(req)
    scheduler.beam_coordinator.retire_group(req)
    scheduler.send_abort_output(AbortReq(rid=req.rid, finished_reason=refusal(message, status)), req)


def queue_time(scheduler: Any, req: Req) -> None:
    """What SGLang does to a request besides appending it to the waiting_queue."""
    scheduler._prefetch_kvcache(req)
    req.time_stats.set_wait_queue_entry_time()
    req.arrival_processed_tokens = scheduler.processed_tokens_counter


def end_branch(scheduler: Any, req: Req) -> int:
    """Let a branch end normally with what it has; return the tokens it will have cost.

    A queued (or retracted) branch leaves the queue at once; a running one leaves with the step under way, and what
    that step samples is cut off (`finished_len`). One of ours in the middle of its prompt leaves after the chunk under
    way, as SGLang aborts it: nobody needs the rest. Idempotent for a branch that already ends.
    """
    if req.finished() or req.to_finish is not None:
        return len(req.output_ids)
    req.finished_len = len(req.output_ids)
    if not req.kv.holds_kv and req in scheduler.waiting_queue:
        scheduler.waiting_queue.remove(req)
        scheduler._release_aborted_request(req)
        if req.kv.holds_mamba:
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        req.finished_reason = FINISH_ENDED()
        return len(req.output_ids)
    req.to_finish = FINISH_ENDED()
    if (
        req is scheduler.chunked_req
        and internal_tag_of(req) is not None
        and scheduler._pending_chunked_abort_req is None
    ):
        scheduler._pending_chunked_abort_req = req
    return len(req.output_ids) + 1  # the step under way samples one more token

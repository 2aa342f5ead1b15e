"""LoRA adapters: SGLang takes only so many different ones into a batch, the base model counting as one, and unloads those nobody needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

Adapter = str | None  # its id; None: the base model


def fit_together(scheduler: Any, adapters: set[Adapter]) -> bool:
    """Whether SGLang would take them into one batch."""
    return scheduler.tp_worker.model_runner.lora_manager.validate_lora_batch(adapters)


def is_any_kept_out(scheduler: Any, running: Iterable[Adapter], queued: Iterable[Adapter]) -> bool:
    """Whether SGLang, which passes over a request whose adapter the batch has no place for, would pass over one of `queued`."""
    there = set(running)
    for adapter in queued:
        if adapter not in there:
            there.add(adapter)
            if not fit_together(scheduler, there):
                return True
    return False


def let_go(reqs: Iterable[Req], adapter: str) -> None:
    """SGLang is about to unload an adapter, because no client waits for it any more.

    A program's siblings may still have a step to go when it is answered. They take it without: what it computes is cut off, and
    here it is kept out of the cache too.
    """
    for req in reqs:
        if req.lora_id == adapter and req.to_finish is not None:
            req.lora_id, req.skip_radix_cache_insert = None, True

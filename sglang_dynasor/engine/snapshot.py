"""What is in flight in one scheduler, for who looks: nothing here runs in a step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.live import LiveProgram, generated_tokens
from sglang_dynasor.engine.texts import known
from sglang_dynasor.policy.answers import shown
from sglang_dynasor.policy.branch import Branch, BranchState

if TYPE_CHECKING:
    from sglang_dynasor.engine.controller import Controller

MAX_TEXT_TOKENS = 4096  # of one branch, its end: what a person still reads
MAX_TRIALS = 50  # of one branch, the newest


def snapshot(controller: Controller, most: int | None = None) -> dict[str, Any]:
    """Programs in flight in order of arrival, with rows and KV tokens in use; JSON (docs/operations.md says what each is).

    Args:
        most: programs to tell of, the first to arrive; None: all.
    """
    scheduler = controller.scheduler
    queued = {id(req) for req in scheduler.waiting_queue}
    now = time.perf_counter()
    sent = [live for live in controller.programs.sent.values() if live.program.num_in_flight]
    lives = [*controller.programs.held.values(), *sent]
    whole = controller.room.whole
    return {
        "step": scheduler.forward_ct,
        "rows": {"used": scheduler.running_batch.batch_size(), "of": whole.rows},
        "kv_tokens": {"used": whole.tokens - _free_tokens(scheduler), "of": whole.tokens},
        "num_queued": len(queued),
        "programs": [program_state(live, queued, now) for live in lives[:most]],
        "num_programs_left": max(0, len(lives) - (len(lives) if most is None else most)),
    }


def _free_tokens(scheduler: Any) -> int:
    """Free, or held by the radix cache for nobody who runs."""
    return scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()


def program_state(live: LiveProgram, queued: set[int], now: float) -> dict[str, Any]:
    """One program in flight.

    Args:
        queued: ids of the Reqs in SGLang's queue.
        now: of `time.perf_counter`, as SGLang times requests.
    """
    program, parent = live.program, live.parent
    branches = [_branch_state(live, index, branch, queued) for index, branch in enumerate(program.branches)]
    return {
        "id": program.id,
        "algorithm": program.spec.algorithm,
        "tenant": program.spec.tenant or None,
        "owner": program.spec.owner or None,
        "state": "running" if program.branches else "waiting",
        "age_s": None if parent is None else max(0.0, now - parent.time_stats.wait_queue_entry_time),
        "cap": program.spec.branches,
        "width": program.spec.width,
        "gang": program.gang,
        "stop_rule": program.spec.stop.text,
        "num_tokens": sum(branch["num_tokens"] for branch in branches),
        "num_probe_tokens": program.num_probe_tokens,
        "certaindex": program.certaindex,
        "risk": program.risk,
        "price": program.price,
        "votes": _votes(live),
        "branches": branches,
    }


def _votes(live: LiveProgram) -> list[tuple[str | None, float]]:
    """Answers as written with what they weigh, the leading one first."""
    votes, branches = live.program.votes, live.program.branches
    return [(shown(branches[who[0]].answer), votes.weight(who)) for who in votes.ranking]


def _branch_state(live: LiveProgram, index: int, branch: Branch, queued: set[int]) -> dict[str, Any]:
    req = live.reqs.get(index)
    is_running = branch.state is BranchState.IN_FLIGHT
    num_tokens = generated_tokens(req, len(req.output_ids)) if is_running and req is not None else branch.num_tokens
    return {
        "state": _word(live, index, branch, req is not None and id(req) in queued),
        "num_tokens": num_tokens,
        "answer": None if branch.answer is None else shown(branch.answer),
        "finish_reason": branch.finish_reason,
        "reward": branch.reward,
        "trials": [[trial.num_tokens, shown(trial.answer), trial.probability] for trial in branch.trials[-MAX_TRIALS:]],
    }


def _word(live: LiveProgram, index: int, branch: Branch, is_queued: bool) -> str:
    """What a branch does now, or how it ended."""
    if index in live.judges:
        return "judged"
    if index in live.comparisons:
        return "compared"
    if branch.state is not BranchState.IN_FLIGHT:
        return str(branch.state)
    if index in live.probes:
        return "probed"
    return "queued" if is_queued else "running"


def tokens(live: LiveProgram) -> dict[str, Any]:
    """Those of the prompt, and what each branch has written so far, each cut to the last MAX_TEXT_TOKENS. To decode them is not this loop's work."""
    first = live.parent or next(iter(live.reqs.values()), None)
    return {
        "prompt": None if first is None else known(first, first.origin_input_ids[-MAX_TEXT_TOKENS:]),
        "branches": {str(index): list(req.output_ids[-MAX_TEXT_TOKENS:]) for index, req in live.reqs.items()},
    }

"""Decisions of the controller that only rare moments of the engine reach: our own logic, on stand-ins for SGLang's parts."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import controller as controller_module
from sglang_dynasor.engine.admission import Admission, computes_prompt
from sglang_dynasor.engine.branch import FINISH_ENDED, BranchTag, end_branch, go_on_from, set_tag, tag_of
from sglang_dynasor.engine.controller import WAVE_STEPS, Controller, LiveProgram
from sglang_dynasor.engine.retraction import retract_whole
from sglang_dynasor.engine.teller import TOLD_RID
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import Trial


class Stand(SimpleNamespace):
    """A stand-in that is one of its kind, as a Req is."""

    __hash__ = object.__hash__


def request(num_output_tokens: int = 0, **fields: Any) -> Any:
    given: dict[str, Any] = {"rid": "r",
        "output_ids": array("q", range(num_output_tokens)), "finished_reason": None, "to_finish": None, "finished_len": None,
        "kv": SimpleNamespace(holds_kv=True), "return_logprob": False, "logprob_start_len": -1,
        "origin_input_ids": array("q", range(100)), "sampling_params": SimpleNamespace(max_new_tokens=50),
    }  # fmt: skip
    req = Stand(**{**given, **fields})
    req.finished = lambda: req.finished_reason is not None
    return req


def live_program(**field: Any) -> LiveProgram:
    return LiveProgram(Program("p", parse_field(field, 64)), parent=request())


def branch(live: LiveProgram, *, is_internal: bool = True, num_output_tokens: int = 0) -> Any:
    req = request(num_output_tokens)
    set_tag(req, BranchTag(live, live.program.start_branch(), is_internal=is_internal))
    return req


# A branch in the middle of its prompt


@pytest.mark.parametrize(
    ("is_chunked", "is_internal", "pending", "is_dropped"),
    [(True, True, None, True), (False, True, None, False), (True, False, None, False), (True, True, "other", False)],
)
def test_the_rest_of_a_prompt_is_dropped(is_chunked: bool, is_internal: bool, pending: Any, is_dropped: bool) -> None:
    """Only of one of ours that is being computed in chunks now; a client's branch ends as a normal stop."""
    req = branch(live_program(), is_internal=is_internal)
    scheduler = SimpleNamespace(
        chunked_req=req if is_chunked else None, _pending_chunked_abort_req=pending, waiting_queue=[]
    )
    end_branch(scheduler, req)
    assert isinstance(req.to_finish, FINISH_ENDED)
    assert (scheduler._pending_chunked_abort_req is req) is is_dropped


# What comes back from a retraction


@pytest.mark.parametrize("is_ending", [True, False])
def test_a_retracted_branch_that_was_ending_is_not_computed_again(is_ending: bool) -> None:
    """It leaves as if its last step had been read; any other waits in front."""
    req = branch(live_program(), num_output_tokens=7)
    req.to_finish = FINISH_ENDED() if is_ending else None
    req.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
    happened: list[Any] = []
    controller: Any = SimpleNamespace(
        scheduler=SimpleNamespace(
            _release_aborted_request=lambda req: happened.append("released"),
            _prefetch_kvcache=lambda req: None,
            processed_tokens_counter=0,
        ),
        on_output=lambda reqs: happened.append(("left", reqs[0].finished_reason)),
        admission=SimpleNamespace(put_in_front=lambda req: happened.append("queued")),
        _end_probe=lambda live, index: None,
    )
    Controller._take_back(controller, req)
    if is_ending:
        (released, (left, reason)) = happened
        assert (released, left, req.to_finish) == ("released", "left", None)
        assert isinstance(reason, FINISH_ENDED)
    else:
        assert happened == ["queued"]


@pytest.mark.parametrize("is_probe", [True, False])
def test_what_asks_a_thought_does_not_come_back(is_probe: bool) -> None:
    """Neither a probe that was retracted nor that of a branch that was: what it was to read may be gone."""
    live = live_program()
    req = branch(live, num_output_tokens=7)
    probe = request()
    set_tag(probe, BranchTag(live, 0, is_internal=True, is_probe=True))
    live.probes[0] = probe
    for each in (req, probe):
        each.kv, each.cached_tokens = SimpleNamespace(holds_kv=False, holds_mamba=False), 0
        each.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
    queued: list[Any] = []
    left: list[Any] = []
    controller: Any = SimpleNamespace(
        scheduler=SimpleNamespace(
            waiting_queue=[], chunked_req=None, _release_aborted_request=lambda req: None,
            _prefetch_kvcache=lambda req: None, processed_tokens_counter=0,
        ),
        on_output=left.extend, admission=SimpleNamespace(put_in_front=queued.append),
    )  # fmt: skip
    controller._generated = lambda req, num: num
    controller._end = lambda req: Controller._end(controller, req)
    controller._end_probe = lambda live, index: Controller._end_probe(controller, live, index)
    Controller._take_back(controller, probe if is_probe else req)
    assert not live.probes
    if is_probe:
        assert left == [probe]
        assert not queued
    else:
        assert queued == [req]
        assert isinstance(probe.to_finish, FINISH_ENDED)  # it leaves with the step under way


@pytest.mark.parametrize("is_aside", [True, False])
def test_a_probe_that_is_retracted_does_not_take_its_program_along(is_aside: bool) -> None:
    """A branch does: the siblings would hold memory and come to no decision."""
    live, plain = live_program(), request()
    chain, sibling, probe = branch(live), branch(live), request()
    set_tag(probe, BranchTag(live, 0, is_internal=True, is_probe=True))
    released: list[int] = []

    def keep(keep_indices: list[int]) -> None:
        batch.reqs = [batch.reqs[i] for i in keep_indices]

    batch = SimpleNamespace(release_req=lambda index, num: released.append(index) or True, filter_batch=keep)
    if is_aside:
        batch.reqs, gone = [plain, chain, sibling], probe
    else:
        batch.reqs, gone = [plain, chain, probe], sibling
    retracted, _, _ = retract_whole(batch, [gone], 0.5, [])
    assert retracted == ([probe] if is_aside else [sibling, chain, probe])
    assert batch.reqs == ([plain, chain, sibling] if is_aside else [plain])


# Probes


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_thought_that_has_ended_by_itself_is_not_closed(has_ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its trial was computed: it is writing its answer."""
    live = live_program(algorithm="long_cot", think_end="end", agree=1, exit="trial:0.9")
    chain, probe = branch(live, num_output_tokens=30), request(2)
    aside = BranchTag(live, 0, is_internal=True, is_probe=True, num_thought_tokens=20)
    set_tag(probe, aside)
    live.reqs[0], live.probes[0] = chain, probe
    probe.cached_tokens = 100
    tag = tag_of(chain)
    assert tag is not None
    tag.probe_at = 25
    monkeypatch.setattr(controller_module, "has_ended", lambda req, tokens, since: has_ended and since == 20)
    monkeypatch.setattr(controller_module, "read_trial", lambda *args: Trial("7", "7", 0.99, 20))
    closed: list[int] = []
    controller: Any = SimpleNamespace(
        num_probe_tokens_read=0, num_probe_tokens_cached=0, admission=SimpleNamespace(num_thoughts=1),
        holds=lambda live: True, _next_probe=lambda live, tag: 40, _end_rest=lambda live, spared: None,
        _thought_tokens=lambda live: SimpleNamespace(new_line=(), end=(0,)),
        _close=lambda live, index, chain, num_tokens: closed.append(num_tokens),
    )  # fmt: skip
    controller._stop_asking = lambda tag: Controller._stop_asking(controller, tag)
    Controller._settle_probe(controller, live, 0, probe)
    assert closed == ([] if has_ended else [20])
    assert (tag.probe_at, controller.admission.num_thoughts) == ((0, 0) if has_ended else (40, 1))


# The line


def admission(*, has_cache: bool = True) -> tuple[Admission, list[int]]:
    started: list[int] = []
    scheduler = SimpleNamespace(
        max_total_num_tokens=10_000, max_running_requests=64, page_size=1, waiting_queue=[],
        tree_cache=SimpleNamespace(disable=not has_cache),
    )  # fmt: skip
    made = Admission(scheduler, DynasorConfig(scheduler="dynasor"), lambda live, num: started.append(num))
    return made, started


@pytest.mark.parametrize(
    ("has_cache", "num_in_flight", "expected"), [(True, 0, [1]), (True, 1, [4]), (False, 0, [4]), (False, 1, [4])]
)
def test_a_leader_goes_first_whenever_nobody_holds_the_prompt(
    has_cache: bool, num_in_flight: int, expected: list[int]
) -> None:
    """Also in a program's later goes: its prompt may have been evicted since. Not where a sibling holds it, nor without a cache."""
    made, started = admission(has_cache=has_cache)
    live = live_program()
    live.is_prompt_cached = True
    live.ticket = made.arrive(live)
    for _ in range(num_in_flight):
        live.program.start_branch()
    made._admit(live, 4)
    assert started == expected
    assert made.promised.get(live, 0) == 4 - expected[0]
    assert live.is_prompt_cached is (expected == [4])


@pytest.mark.parametrize(
    ("agree", "num_thoughts", "is_prefill_next", "num_steps"),
    [
        (2, 8, False, WAVE_STEPS),  # whatever it answers, the thought goes on
        (1, 8, False, 2),  # it could close the thought
        (1, 64, False, WAVE_STEPS),
        (2, 8, True, 1),  # a pass comes anyway
        (2, 1, False, 1),  # it holds up nobody
    ],
)
def test_a_probe_waits_for_others(agree: int, num_thoughts: int, is_prefill_next: bool, num_steps: int) -> None:
    """As long as that costs less than a prefill pass of its own."""
    live = live_program(algorithm="long_cot", think_end="end", agree=agree)
    probe, tag = request(), BranchTag(live, live.program.start_branch(), is_internal=True, is_probe=True)
    live.probes[0] = probe
    sent: list[Any] = []
    controller: Any = SimpleNamespace(
        admission=SimpleNamespace(num_thoughts=num_thoughts, num_probes=0, is_pass_due=is_prefill_next),
        asked=[(probe, tag)], num_steps_asked=0, num_probe_waves=0,
        _put_inside=lambda req, tag: sent.append(req),
    )  # fmt: skip
    for _ in range(num_steps - 1):
        Controller._send_probes(controller)
        assert not sent
    Controller._send_probes(controller)
    assert sent == [probe]
    assert (controller.asked, controller.num_steps_asked, controller.num_probe_waves) == ([], 0, 1)


def test_a_probe_that_nobody_waits_for_is_not_sent() -> None:
    """Its program has ended, or its thought was retracted."""
    live = live_program(algorithm="long_cot", think_end="end")
    tag = BranchTag(live, live.program.start_branch(), is_internal=True, is_probe=True)
    sent: list[Any] = []
    controller: Any = SimpleNamespace(
        admission=SimpleNamespace(num_thoughts=1, num_probes=0, is_pass_due=True),
        asked=[(request(), tag)], num_steps_asked=3, num_probe_waves=0, _put_inside=lambda req, tag: sent.append(req),
    )  # fmt: skip
    Controller._send_probes(controller)
    assert (sent, controller.asked, controller.num_steps_asked, controller.num_probe_waves) == ([], [], 0, 0)


def test_a_pass_is_due_for_what_is_new() -> None:
    """Or for the rest of a prompt; not for a branch that did not fit when SGLang looked."""
    made, _ = admission()
    made.scheduler.chunked_req = None
    assert not made.is_pass_due
    made.put_in_front(branch(live_program()))
    assert made.is_pass_due
    made.open_batch(SimpleNamespace(batch_is_full=False))  # type: ignore[arg-type]
    assert not made.is_pass_due
    made.scheduler.chunked_req = request()
    assert made.is_pass_due


def test_probes_go_before_branches() -> None:
    """A branch that does not fit would hold them up, and with them what gives memory back."""
    made, _ = admission()
    live = live_program()
    first, second, probe = branch(live), branch(live), request()
    set_tag(probe, BranchTag(live, 0, is_internal=True, is_probe=True))
    for req in (first, second, probe):
        made.put_in_front(req)
    assert made.scheduler.waiting_queue == [probe, first, second]


def test_the_queue_is_opened_once_for_what_is_new_in_front() -> None:
    """Where ours do not fit either, SGLang waits until something leaves instead of trying in every step."""
    made, _ = admission()
    batch: Any = SimpleNamespace(batch_is_full=True)
    made.open_batch(batch)
    assert batch.batch_is_full  # nothing of ours is there
    queued = branch(live_program())
    made.put_in_front(queued)
    made.open_batch(batch)
    assert not batch.batch_is_full
    batch.batch_is_full = True  # it did not fit
    made.open_batch(batch)
    assert batch.batch_is_full
    assert queued in made.front


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"is_plain_due": True}, False),  # they may start
        ({"chunked_req": "one"}, False),  # its next chunk must go on
        ({"front": True}, False),  # one of ours is there
        ({"has_grammar": True}, False),  # SGLang queues those that are ready
        ({"prefill_delayer": "one"}, False),  # it counts passes
    ],
)
def test_sglang_does_not_look_for_what_may_not_start(changed: dict[str, Any], expected: bool) -> None:
    """Its look through the queue grows with the queue, and would come again in each step."""
    made, _ = admission()
    made.is_plain_due = bool(changed.get("is_plain_due"))
    made.scheduler.chunked_req = changed.get("chunked_req")
    made.scheduler.prefill_delayer = changed.get("prefill_delayer")
    made.scheduler.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: bool(changed.get("has_grammar")))
    if changed.get("front"):
        made.put_in_front(branch(live_program()))
    assert made.holds_back(SimpleNamespace(reqs=[])) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("min_new_tokens", "expected"), [(0, 0), (3, 0), (10, 5)])
def test_a_closed_thought_counts_as_sampled(min_new_tokens: int, expected: int) -> None:
    """Its tokens are reasoning tokens, the grammar of strict thinking has seen them, and fewer are to come at least."""
    seen: list[int] = []
    req = request(require_reasoning=True, grammar=SimpleNamespace(accept_token=seen.append))
    req.sampling_params.min_new_tokens = min_new_tokens
    go_on_from(req, array("q", range(5)))
    assert (list(req.output_ids), seen) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert (req.reasoning_tokens, req._is_reasoning_over) == (5, True)
    assert req.sampling_params.min_new_tokens == expected


@pytest.mark.parametrize("is_only_one", [False, True])
def test_who_cannot_speak_is_not_chosen_at_the_deadline(is_only_one: bool) -> None:
    """A branch that is computed again in chunks is aborted by SGLang; a shorter one that runs gives the text."""
    live = live_program(branches=4)
    reqs = [branch(live, num_output_tokens=9), branch(live, num_output_tokens=5)][: 1 if is_only_one else 2]
    live.reqs = dict(enumerate(reqs))
    spared: list[int] = []
    controller: Any = SimpleNamespace(
        scheduler=SimpleNamespace(chunked_req=reqs[0]),
        admission=SimpleNamespace(leave=lambda live: None),
        _end_judges=lambda live: None,
        _end_rest=lambda live, spared: spared_add(spared),
        _end=lambda req: None,
    )
    spared_add = spared.append
    Controller._expire(controller, live)
    assert spared == [0 if is_only_one else 1]


@pytest.mark.parametrize(
    ("return_logprob", "start", "expected"), [(False, 0, False), (True, -1, False), (True, 99, False), (True, 0, True)]
)
def test_logprobs_of_a_prompt_are_no_cache_hit(return_logprob: bool, start: int, expected: bool) -> None:
    """Then every sibling computes it, and room must be there for all."""
    req = request(return_logprob=return_logprob, logprob_start_len=start)
    assert computes_prompt(req) is expected
    made, _ = admission()
    live = live_program()
    live.parent, live.is_prompt_cached = req, True
    live.program.start_branch()
    cost = made._gang_cost(live)
    assert (cost.branch_tokens > 100) is expected


def test_a_program_that_has_started_all_needs_ever_less() -> None:
    """Its share of the rows falls with every branch that ends, so that others get more."""
    made, _ = admission()
    live = live_program(branches=4, stop="never", answer="hash")
    live.ticket = made.arrive(live)
    seen: list[int] = []
    for index in [live.program.start_branch() for _ in range(4)]:
        made.expect(live)
        seen.append(made.num_expected)
        live.program.finish(index, f"#### {index}", 5)
    assert seen == [4, 3, 2, 1]


def test_who_leaves_unseen_is_charged_and_looked_after() -> None:
    """A plain request that SGLang gave up was served all the same, and has left room."""
    made, _ = admission()
    made.arrive(live_program())  # somebody to compare with
    req = request(5)
    made.note_arrival(req)
    made._is_stale = False
    before = made.order.line("").counter
    made.note_loss(req)
    assert made.order.line("").counter == before + 105
    assert made._is_stale


# What is told


def test_what_nobody_has_told_is_ignored() -> None:
    """A client may abort any rid it can think of: that is counted, and the scheduler goes on."""
    for strict in (False, True):
        controller = Controller(SimpleNamespace(), DynasorConfig(scheduler="dynasor", dynasor_strict=strict))
        for rid in (TOLD_RID, f"{TOLD_RID}deadline:x", f"{TOLD_RID}reward:1"):
            abort: Any = SimpleNamespace(rid=rid, abort_all=False)
            if strict:
                with pytest.raises((ValueError, IndexError)):
                    controller.abort(abort)
            else:
                controller.abort(abort)
        assert controller.totals.num_policy_errors == 3


@pytest.mark.parametrize(
    ("is_off", "has_mamba", "expected"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_a_thought_is_probed_where_its_kv_can_be_shared(is_off: bool, has_mamba: bool, expected: bool) -> None:
    """Not without a radix cache, nor where a state stands beside the KV: there it is thought to its end."""
    tree_cache = SimpleNamespace(disable=is_off, supports_mamba=lambda: has_mamba)
    controller = Controller(SimpleNamespace(tree_cache=tree_cache), DynasorConfig(scheduler="dynasor"))
    assert controller._may_probe is expected

"""Decisions of the controller that only rare moments of the engine reach: our own logic, on stand-ins for SGLang's parts."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR
from sglang.srt.utils.weight_versions import (
    WeightVersionEvent,
    compute_weight_version_spans,
    record_weight_version_events,
)

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import aside, fence, hooks, messages
from sglang_dynasor.engine import branches as branches_module
from sglang_dynasor.engine import controller as controller_module
from sglang_dynasor.engine import live as live_module
from sglang_dynasor.engine import programs as programs_module
from sglang_dynasor.engine import teller as teller_module
from sglang_dynasor.engine import thoughts as thoughts_module
from sglang_dynasor.engine.branches import SentBranches
from sglang_dynasor.engine.controller import Controller
from sglang_dynasor.engine.fence import Fence
from sglang_dynasor.engine.live import (
    Asking,
    BranchTag,
    LiveProgram,
    ProbeTag,
    SentTag,
    Times,
    branch_tag_of,
    record_of,
    set_arrival,
    set_tag,
    tag_of,
)
from sglang_dynasor.engine.messages import Told
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.readings import Readings
from sglang_dynasor.engine.req import FINISH_ENDED, end_branch, go_on_from
from sglang_dynasor.engine.retraction import retract_whole
from sglang_dynasor.engine.room import SchedulerRoom, computes_prompt
from sglang_dynasor.engine.slots import Slots
from sglang_dynasor.engine.spans import Spans
from sglang_dynasor.engine.streamer import streamer_class
from sglang_dynasor.engine.teller import FEWEST_SWEPT
from sglang_dynasor.engine.thoughts import Thoughts
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.observe.metrics import FALLBACK
from sglang_dynasor.policy.admission import Admission, Gang
from sglang_dynasor.policy.gang import Cost
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.reading import STEP_CHARS, reading_chars
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.thought import WAVE_STEPS, Trial

TEXTS: Any = SimpleNamespace(said=lambda req, lead: "#### 7", lead=lambda req: "")
KEEPER: Any = SimpleNamespace(has_left=lambda tag: None)


class Stand(SimpleNamespace):
    """A stand-in that is one of its kind, as a Req is."""

    __hash__ = object.__hash__


def request(num_output_tokens: int = 0, **fields: Any) -> Any:
    given: dict[str, Any] = {"rid": "r", "cached_tokens": 0, "http_worker_ipc": None, "stream": False,
        "require_reasoning": False,
        "time_stats": SimpleNamespace(
            forward_entry_time=0.0, prefill_finished_time=0.0, set_wait_queue_entry_time=lambda: None, trace_ctx=SimpleNamespace(tracing_enable=False)
        ),
        "output_ids": array("q", range(num_output_tokens)), "finished_reason": None, "to_finish": None, "finished_len": None, "finished_output": None,
        "kv": SimpleNamespace(holds_kv=True), "return_logprob": False, "logprob_start_len": -1,
        "origin_input_ids": array("q", range(100)), "sampling_params": SimpleNamespace(max_new_tokens=50),
        "multimodal_inputs": None, "is_retracted": False, "weight_version_events": [],
    }  # fmt: skip
    req = Stand(**{**given, **fields})
    req.finished = lambda: req.finished_reason is not None
    return req


def live_program(**field: Any) -> LiveProgram:
    program = Program("p", parse_field(field, 64))
    live = LiveProgram(program, parent=request())
    live.gang = Gang(program, 100, Cost(100, 52), live)
    return live


def branch(live: LiveProgram, *, kind: type[BranchTag] = BranchTag, num_output_tokens: int = 0) -> Any:
    req = request(num_output_tokens)
    set_tag(req, kind(live, live.program.start_branch(), KEEPER))
    return req


def probe_of(live: LiveProgram, index: int = 0, num_thought_tokens: int = 0, num_output_tokens: int = 0) -> Any:
    req = request(num_output_tokens)
    set_tag(req, ProbeTag(live, index, KEEPER, num_thought_tokens=num_thought_tokens))
    return req


def scheduler_of(**fields: Any) -> Any:
    """As much of SGLang's scheduler as a controller reads when it is made."""
    given: dict[str, Any] = {
        "max_total_num_tokens": 10_000, "max_running_requests": 64, "page_size": 1, "waiting_queue": [],
        "chunked_req": None, "tokenizer": None, "tree_cache": SimpleNamespace(disable=False, supports_mamba=lambda: False),
        "_release_aborted_request": lambda req: None, "_prefetch_kvcache": lambda req: None, "processed_tokens_counter": 0,
        "_pending_chunked_abort_req": None, "enable_lora": False, "enable_priority_scheduling": False,
        "_set_or_validate_priority": lambda req: True, "server_args": SimpleNamespace(tokenizer_worker_num=1),
        "model_config": SimpleNamespace(vocab_size=512), "beam_coordinator": SimpleNamespace(retire_group=lambda req: None),
        "_engine_paused": False, "forward_ct": 0, "max_queued_requests": None, "last_batch": None, "policy": SimpleNamespace(priority_sign=-1),
        "tp_worker": SimpleNamespace(model_runner=SimpleNamespace(sampling_observer=None)),
    }  # fmt: skip
    return SimpleNamespace(**{**given, **fields})


@pytest.fixture
def make_controller(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Controller]:
    """A controller on a scheduler that does nothing, on the first of one rank."""
    parallel = SimpleNamespace(pp_rank=0, attn_tp_rank=0, attn_cp_rank=0)
    monkeypatch.setattr(controller_module, "get_parallel", lambda: parallel)
    monkeypatch.setattr(controller_module, "get_device", lambda: SimpleNamespace(sleep_on_idle=False))
    monkeypatch.setattr(live_module, "get_serving", lambda: SimpleNamespace(weight_version="first"))

    def make(*, strict: bool = True, **fields: Any) -> Controller:
        config = DynasorConfig(scheduler="dynasor", dynasor_strict=strict)
        scheduler = scheduler_of(**fields)
        scheduler._dynasor = Controller(scheduler, config, Fence(strict))
        return scheduler._dynasor

    return make


def test_a_vocabulary_that_does_not_fit_is_refused_at_the_start(make_controller: Callable[..., Controller]) -> None:
    """With the number that is needed; the least that fits is served."""
    with pytest.raises(ConfigError, match=r"--dynasor-statistics-mib=64 holds 1 distributions .* give at least 115$"):
        make_controller(model_config=SimpleNamespace(vocab_size=10_000_000))
    assert make_controller(model_config=SimpleNamespace(vocab_size=5_592_405)).status()["num_answer_slots"] == 0


# A branch in the middle of its prompt


@pytest.mark.parametrize(
    ("is_chunked", "kind", "pending", "is_dropped"),
    [
        (True, BranchTag, None, True),
        (False, BranchTag, None, False),
        (True, SentTag, None, False),
        (True, BranchTag, "other", False),
    ],
)
def test_the_rest_of_a_prompt_is_dropped(is_chunked: bool, kind: Any, pending: Any, is_dropped: bool) -> None:
    """Only of one of ours that is being computed in chunks now; a client's branch ends as a normal stop."""
    req = branch(live_program(), kind=kind)
    scheduler = SimpleNamespace(
        chunked_req=req if is_chunked else None, _pending_chunked_abort_req=pending, waiting_queue=[]
    )
    end_branch(scheduler, req)
    assert isinstance(req.to_finish, FINISH_ENDED)
    assert (scheduler._pending_chunked_abort_req is req) is is_dropped


# What comes back from a retraction


@pytest.mark.parametrize("is_ending", [True, False])
def test_a_retracted_branch_that_was_ending_is_not_computed_again(
    is_ending: bool, make_controller: Callable[..., Controller]
) -> None:
    """It leaves as if its last step had been read; any other waits in front."""
    released: list[Any] = []
    controller = make_controller(_release_aborted_request=released.append)
    live = live_program()
    req = branch(live, num_output_tokens=7)
    req.to_finish = FINISH_ENDED() if is_ending else None
    req.finished_output, req.time_stats = None, SimpleNamespace(set_wait_queue_entry_time=lambda: None)
    controller.admission.arrive(live.gang)
    controller.inside.enter(tag_of(req))  # type: ignore[arg-type]
    ended: list[Any] = []
    branch_tag_of(req).keeper = SimpleNamespace(has_left=lambda tag: None, has_ended=lambda req, tag: ended.append(req))  # type: ignore[assignment]
    controller.take(lambda req, is_retracted: None, req, is_retracted=True)
    if is_ending:
        assert (released, ended, req.to_finish) == ([req], [req], None)
        assert isinstance(req.finished_reason, FINISH_ENDED)
        assert controller.scheduler.waiting_queue == []
    else:
        assert (released, ended, controller.scheduler.waiting_queue) == ([], [], [req])


@pytest.mark.parametrize("is_probe", [True, False])
def test_what_asks_a_thought_does_not_come_back(is_probe: bool, make_controller: Callable[..., Controller]) -> None:
    """Neither a probe that was retracted nor that of a branch that was: what it was to read may be gone."""
    controller = make_controller()
    live = live_program()
    req, probe = branch(live, num_output_tokens=7), probe_of(live)
    live.probes[0] = probe
    controller.admission.arrive(live.gang)
    for each in (req, probe):
        each.kv, each.cached_tokens = SimpleNamespace(holds_kv=False, holds_mamba=False), 0
        each.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
        controller.inside.enter(tag_of(each))  # type: ignore[arg-type]
    comes_back = controller.intake.take_back(probe if is_probe else req)
    assert not live.probes
    if is_probe:
        assert not comes_back
        assert controller.scheduler.waiting_queue == []
    else:
        assert comes_back
        assert controller.scheduler.waiting_queue == [req]
        assert isinstance(probe.to_finish, FINISH_ENDED)  # it leaves with the step under way


@pytest.mark.parametrize(("num_output_tokens", "costs"), [(3, [10, 13]), (0, [10])])
def test_what_a_retraction_has_ended_has_its_price(
    num_output_tokens: int,
    costs: list[int],
    make_controller: Callable[..., Controller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A probe that was computed in part is paid for before the thought is asked again; not one that was not begun."""
    controller = make_controller()
    live = live_program(algorithm="long_cot", think_end="end", answer="boxed")
    req, probe = branch(live, num_output_tokens=700), probe_of(live, num_output_tokens=num_output_tokens)
    tag = branch_tag_of(req)
    live.reqs[0], live.probes[0] = req, probe
    tag.asking = Asking(at_tokens=720, num_tokens=690, costs=[10])
    controller.admission.arrive(live.gang)
    for each in (req, probe):
        each.kv, each.cached_tokens = SimpleNamespace(holds_kv=False, holds_mamba=False), 90
        each.time_stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None)
        controller.inside.enter(tag_of(each))  # type: ignore[arg-type]
    assert controller.intake.take_back(req)
    assert tag.asking.costs == costs
    assert live.program.num_probe_tokens == sum(costs) - 10
    thoughts = controller.branches.thoughts
    monkeypatch.setattr(thoughts, "_tokens", lambda live: SimpleNamespace(suffix=(0, 0), word_ends=()))
    monkeypatch.setattr(thoughts, "_line_ends", frozenset)
    thoughts.note_output(req, tag)
    # (10 + 13 and as much as they on average) / 3 %, where the price has changed
    assert tag.asking.at_tokens == (1150 if num_output_tokens else 720)


@pytest.mark.parametrize("is_aside", [True, False])
def test_a_probe_that_is_retracted_does_not_take_its_program_along(is_aside: bool) -> None:
    """A branch does: the siblings would hold memory and come to no decision."""
    live, plain = live_program(), request()
    chain, sibling, probe = branch(live), branch(live), probe_of(live)
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


# Stepping aside


def test_who_has_stepped_aside_goes_on_telling(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that it ends are counted, and gauges show what is there: nothing. As long as it serves it reports for itself."""
    fence = Fence()
    for module in (aside, hooks):
        monkeypatch.setattr(module, "FENCE", fence)
    counted: list[tuple[LiveProgram, str]] = []
    reports: list[dict[str, Any]] = []
    controller = make_controller()
    meter: Any = SimpleNamespace(report=reports.append, count=lambda live, why, record: counted.append((live, why)))
    scheduler, live, stats = controller.scheduler, live_program(), SimpleNamespace(num_queue_reqs=SimpleNamespace())
    collector = SimpleNamespace(_dynasor_of=scheduler)
    controller.ends.meter, controller.ends.enqueue = meter, lambda req, is_retracted: None
    controller.ends.totals.num_programs = 3
    controller.programs.held[live.program.id] = live
    hooks.log_stats(collector, stats)
    assert (reports[-1]["num_held_programs"], reports[-1]["is_aside"], counted) == (1, 0, [])
    fence.is_leaving = True
    aside.settle(scheduler, None)
    hooks.log_stats(collector, stats)
    assert counted == [(live, FALLBACK)]
    assert (reports[-1]["num_held_programs"], reports[-1]["is_aside"], reports[-1]["num_programs"]) == (0, 1, 3)


# Probes


def thoughts_of(**admission: Any) -> tuple[Thoughts, list[Any], list[Any]]:
    """A keeper of probes; what it puts into SGLang, and the thoughts that it closes."""
    put: list[Any] = []
    closed: list[Any] = []
    given = {"num_thoughts": 1, "num_probes": 0, **admission}
    inside: Any = SimpleNamespace(
        admission=SimpleNamespace(**given), front=SimpleNamespace(is_pass_due=False),
        put=lambda req, tag: put.append(req), end=lambda req: 0, end_probe=lambda live, index: live.probes.pop(index, None),
    )  # fmt: skip
    ends: Any = SimpleNamespace(
        programs=SimpleNamespace(holds=lambda live: True), end_rest=lambda live, spared: put.append(("spared", spared)),
        answer=lambda live: put.append("answered"),
    )  # fmt: skip
    tree_cache = SimpleNamespace(disable=False, supports_mamba=lambda: False)
    scheduler = SimpleNamespace(tree_cache=tree_cache, tokenizer=None)
    readings = Readings(lambda live, step: step(live))
    made = Thoughts(
        scheduler, inside, ends, readings, frozenset, lambda live, index, given, spent: closed.append(list(given))
    )
    return made, put, closed


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_thought_that_has_ended_by_itself_is_not_closed(has_ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its trial was computed: it is writing its answer."""
    live = live_program(algorithm="long_cot", think_end="end", agree=1, exit="trial:0.9")
    chain, probe = branch(live, num_output_tokens=30), probe_of(live, num_thought_tokens=20, num_output_tokens=2)
    live.reqs[0], live.probes[0] = chain, probe
    probe.cached_tokens = 100
    tag = branch_tag_of(chain)
    tag.asking = Asking(at_tokens=25, num_tokens=20)
    thoughts, _, closed = thoughts_of()
    monkeypatch.setattr(thoughts_module, "is_over", lambda req, tokens, since: has_ended and since == 20)
    monkeypatch.setattr(thoughts_module, "read_trial", lambda *args: Trial("7", "7", 0.99, 20))
    monkeypatch.setattr(thoughts_module, "closed", lambda thought, tokens, is_line_end: thought)
    monkeypatch.setattr(thoughts, "_next", lambda live, asking: 40)
    monkeypatch.setattr(thoughts, "_tokens", lambda live: SimpleNamespace(new_line=(), end=(0,), suffix=(0, 0)))
    thoughts.has_ended(probe, tag_of(probe))  # type: ignore[arg-type]
    assert closed == ([] if has_ended else [list(range(20))])
    assert thoughts.admission.num_thoughts == (0 if has_ended else 1)
    assert (tag.asking and tag.asking.at_tokens) == (None if has_ended else 40)


@pytest.mark.parametrize(("num_left", "is_closed"), [(1 + 2 + 24, True), (1 + 2 + 23, False)])
def test_a_thought_is_closed_where_there_is_room(
    num_left: int, is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its end, for what asks, and for an answer: what is closed and then cut answers nothing."""
    live = live_program(algorithm="long_cot", think_end="end", agree=1, exit="trial:0.9")
    chain, probe = branch(live, num_output_tokens=30), probe_of(live, num_thought_tokens=20, num_output_tokens=2)
    live.reqs[0], live.probes[0] = chain, probe
    chain.sampling_params.max_new_tokens = 20 + num_left
    thoughts, _, closed = thoughts_of()
    monkeypatch.setattr(thoughts_module, "is_over", lambda req, tokens, since: False)
    monkeypatch.setattr(thoughts_module, "read_trial", lambda *args: Trial("7", "7", 0.99, 20))
    monkeypatch.setattr(thoughts_module, "closed", lambda thought, tokens, is_line_end: thought)
    monkeypatch.setattr(thoughts, "_tokens", lambda live: SimpleNamespace(new_line=(), end=(0,), suffix=(0, 0)))
    thoughts.has_ended(probe, tag_of(probe))  # type: ignore[arg-type]
    assert closed == ([list(range(20))] if is_closed else [])
    assert live.program.branches[0].closed_at == (20 if is_closed else None)


@pytest.mark.parametrize("has_vote", [False, True])
def test_chains_that_have_decided_let_one_speak(has_vote: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that had thought most, which need not be the one that was asked last; nobody, where one has finished with that."""
    live = live_program(algorithm="long_cot", think_end="end", agree=9, branches=3, stop="trials:0.8", hold_tokens=8)
    probes: list[Any] = []
    for index in range(3):
        live.reqs[index] = branch(live, num_output_tokens=40)
        live.reqs[index].sampling_params.max_new_tokens = 100
        branch_tag_of(live.reqs[index]).index = index
        probes.append(probe_of(live, num_thought_tokens=30, num_output_tokens=2))
        probes[-1].cached_tokens = 100
        probes[-1].dynasor_tag.index = index
    thoughts, told, closed = thoughts_of()
    monkeypatch.setattr(thoughts_module, "is_over", lambda req, tokens, since: False)
    lengths = {0: 30, 1: 35, 2: 30}
    monkeypatch.setattr(thoughts_module, "read_trial", lambda req, tag, *args: Trial("7", "7", 0.9, lengths[tag.index]))
    monkeypatch.setattr(thoughts_module, "closed", lambda thought, tokens, is_line_end: thought)
    monkeypatch.setattr(thoughts, "_next", lambda live, asking: 90)
    monkeypatch.setattr(thoughts, "_tokens", lambda live: SimpleNamespace(new_line=(), end=(0,), suffix=(0, 0)))
    for index in range(3):
        live.program.see_trial(index, Trial("7", "7", 0.9, 20))
    if has_vote:
        live.program.finish(0, "...end #### 7", 21)
    for index in (1, 2):
        live.probes[index] = probes[index]
        thoughts.has_ended(probes[index], tag_of(probes[index]))  # type: ignore[arg-type]
        if told:
            break
    if has_vote:
        assert (told, closed, live.program.winner) == (["answered"], [], 0)
    else:
        assert (told, closed, live.program.speaker) == ([("spared", 1)], [list(range(35))], 1)


def chains_of(num_ready: int, **field: Any) -> tuple[LiveProgram, list[BranchTag]]:
    """Five chains of 30 tokens, at the end of a line; so many have come to their turn."""
    field = {"algorithm": "long_cot", "think_end": "end", "probe_tokens": 16, "stop": "trials:0.8", **field}
    live = live_program(branches=5, **field)
    for index in range(5):
        live.reqs[index] = branch(live, num_output_tokens=30)
        at_tokens = 20 if index < num_ready else 40
        branch_tag_of(live.reqs[index]).asking = Asking(at_tokens=at_tokens, num_tokens=10)
    return live, [branch_tag_of(req) for req in live.reqs.values()]


def asked_in_a_step(live: LiveProgram, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chains whose probes are made; a line ends with any token that divides by 10 and leaves 9."""
    thoughts, _, _ = thoughts_of()
    given = {
        "assert_same": lambda *args: None,
        "is_over": lambda *args: False,
        "make_probe": lambda *args, **more: request(),
    }
    for name, value in given.items():
        monkeypatch.setattr(thoughts_module, name, value)
    monkeypatch.setattr(thoughts, "_next", lambda live, asking: 60)
    monkeypatch.setattr(thoughts, "_tokens", lambda live: SimpleNamespace())
    monkeypatch.setattr(thoughts, "_line_ends", lambda: range(9, 1000, 10))
    monkeypatch.setattr(thoughts.ends, "guarded", lambda live, step: step(live), raising=False)
    monkeypatch.setattr(thoughts.inside, "new_rid", lambda: "", raising=False)
    for req in live.reqs.values():
        thoughts.note_output(req, branch_tag_of(req))
    thoughts.make_due()
    return [tag.index for _, tag in thoughts.made]


@pytest.mark.parametrize(
    ("num_ready", "field", "expected"),
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (4, {}, [0, 1, 2, 3]),
        (3, {}, []),
        (3, {"stop": "careful"}, [0, 1, 2]),  # what they say together ends nothing
    ],
)
def test_chains_are_asked_together(
    num_ready: int, field: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once four of five have come to their turn; and each once."""
    live, tags = chains_of(num_ready, **field)
    assert asked_in_a_step(live, monkeypatch) == expected
    assert asked_in_a_step(live, monkeypatch) == []
    assert not any(tag.asking is not None and tag.asking.is_called for tag in tags)


def test_each_waits_for_the_end_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has waited long for the others, and they are asked before it."""
    live, tags = chains_of(5)
    live.reqs[2].output_ids = array("q", range(125))  # more than 64 tokens beyond its turn
    assert asked_in_a_step(live, monkeypatch) == [0, 1, 3, 4]
    live.reqs[2].output_ids.extend(range(125, 129))
    assert asked_in_a_step(live, monkeypatch) == []
    live.reqs[2].output_ids.append(129)
    assert asked_in_a_step(live, monkeypatch) == [2]
    assert tags[2].asking == Asking(at_tokens=60, num_tokens=130)


@pytest.mark.parametrize("how", ["retracted", "ended", "ending", "answering"])
def test_nobody_waits_for_a_chain_that_is_not_asked(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of five have come to their turn; of the other two one cannot be asked."""
    live, tags = chains_of(3)
    assert asked_in_a_step(live, monkeypatch) == []
    req, other = cast("list[Any]", [live.reqs[4], live.reqs[3]])
    if how == "retracted":
        req.kv = SimpleNamespace(holds_kv=False)
    elif how == "ended":
        req.finished_reason = FINISH_ENDED()
    elif how == "ending":
        req.to_finish = FINISH_ENDED()
    else:
        tags[4].asking = None
    assert asked_in_a_step(live, monkeypatch) == []  # three of four
    other.kv = SimpleNamespace(holds_kv=False)
    assert asked_in_a_step(live, monkeypatch) == [0, 1, 2]


# The line


def room_of(*, has_cache: bool = True) -> tuple[SchedulerRoom, list[int]]:
    started: list[int] = []
    tree_cache = SimpleNamespace(disable=not has_cache)
    scheduler = scheduler_of(tree_cache=tree_cache)
    return SchedulerRoom(scheduler, Front(scheduler), lambda live, num: started.append(num)), started


def admission(*, has_cache: bool = True) -> tuple[Admission, list[int]]:
    room, started = room_of(has_cache=has_cache)
    return Admission(room, room.whole.tokens, {}), started


@pytest.mark.parametrize(
    ("has_cache", "num_in_flight", "expected"), [(True, 0, [1]), (True, 1, [4]), (False, 0, [4]), (False, 1, [4])]
)
def test_a_leader_goes_first_whenever_nobody_holds_the_prompt(
    has_cache: bool, num_in_flight: int, expected: list[int]
) -> None:
    """Also in a program's later goes: its prompt may have been evicted since. Not where a sibling holds it, nor without a cache."""
    made, started = admission(has_cache=has_cache)
    live = live_program()
    made.arrive(live.gang)
    live.gang.is_prompt_cached = True
    for _ in range(num_in_flight):
        live.program.start_branch()
    made._admit(live.gang, 4)
    assert started == expected
    assert made.promised.get(live.gang, 0) == 4 - expected[0]
    assert live.gang.is_prompt_cached is (expected == [4])


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
    live.program.start_branch()
    probe = live.probes[0] = probe_of(live)
    thoughts, sent, _ = thoughts_of(num_thoughts=num_thoughts)
    thoughts.inside.front.is_pass_due = is_prefill_next  # type: ignore[misc]
    thoughts.made = [(probe, tag_of(probe))]  # type: ignore[list-item]
    for _ in range(num_steps - 1):
        thoughts.send()
        assert not sent
    thoughts.send()
    assert sent == [probe]
    assert (thoughts.made, thoughts._num_steps, thoughts.num_waves) == ([], 0, 1)
    assert thoughts.admission.num_probes == 1


def test_a_probe_that_nobody_waits_for_is_not_sent() -> None:
    """Its program has ended, or its thought was retracted."""
    live = live_program(algorithm="long_cot", think_end="end")
    live.program.start_branch()
    probe = probe_of(live)
    thoughts, sent, _ = thoughts_of()
    thoughts.inside.front.is_pass_due = True  # type: ignore[misc]
    thoughts.made, thoughts._num_steps = [(probe, tag_of(probe))], 3  # type: ignore[list-item]
    thoughts.send()
    assert (sent, thoughts.made, thoughts._num_steps, thoughts.num_waves) == ([], [], 0, 0)


def test_a_pass_is_due_for_what_is_new() -> None:
    """Or for the rest of a prompt; not for a branch that did not fit when SGLang looked."""
    front = room_of()[0].front
    assert not front.is_pass_due
    front.put(branch(live_program()))
    assert front.is_pass_due
    front.open_batch(SimpleNamespace(batch_is_full=False))  # type: ignore[arg-type]
    assert not front.is_pass_due
    front.scheduler.chunked_req = request()
    assert front.is_pass_due


def test_probes_go_before_branches() -> None:
    """A branch that does not fit would hold them up, and with them what gives memory back."""
    front = room_of()[0].front
    live = live_program()
    first, second, probe = branch(live), branch(live), probe_of(live)
    for req in (first, second, probe):
        front.put(req)
    assert front.scheduler.waiting_queue == [probe, first, second]


def test_the_queue_is_opened_once_for_what_is_new_in_front() -> None:
    """Where ours do not fit either, SGLang waits until something leaves instead of trying in every step."""
    front = room_of()[0].front
    batch: Any = SimpleNamespace(batch_is_full=True)
    front.open_batch(batch)
    assert batch.batch_is_full  # nothing of ours is there
    queued = branch(live_program())
    front.put(queued)
    front.open_batch(batch)
    assert not batch.batch_is_full
    batch.batch_is_full = True  # it did not fit
    front.open_batch(batch)
    assert batch.batch_is_full
    assert queued in front.reqs


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
    room, _ = room_of()
    made = Admission(room, room.whole.tokens, {})
    made.is_plain_due = bool(changed.get("is_plain_due"))
    room.scheduler.chunked_req = changed.get("chunked_req")
    room.scheduler.prefill_delayer = changed.get("prefill_delayer")
    room.scheduler.grammar_manager = SimpleNamespace(has_waiting_grammars=lambda: bool(changed.get("has_grammar")))
    if changed.get("front"):
        room.front.put(branch(live_program()))
    assert room.holds_back(made) is expected


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


@pytest.mark.parametrize("is_chunked", [False, True])
def test_who_speaks_for_chains_is_heard_at_the_deadline(
    is_chunked: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they decided is the best so far, though another has finished; unless it cannot speak."""
    live = live_program(
        algorithm="long_cot", think_end="end", answer="hash", branches=5, stop="trials:0.8", hold_tokens=8
    )
    live.reqs = {index: branch(live, num_output_tokens=9) for index in range(5)}
    live.program.count(0, "8", 9)
    for num_tokens in (600, 700):
        for index in range(1, 5):
            live.program.see_trial(index, Trial("7", "7", 0.9, num_tokens))
    speaker = live.program.speaker
    assert speaker is not None
    controller = make_controller(chunked_req=live.reqs[speaker] if is_chunked else None)
    controller.admission.arrive(live.gang)
    seen: list[Any] = []
    monkeypatch.setattr(controller.ends, "end_rest", lambda live, spared: seen.append(spared))
    monkeypatch.setattr(controller.ends, "answer", lambda live: seen.append("answered"))
    controller.ends.close(live, StopReason.DEADLINE)
    assert seen == (["answered"] if is_chunked else [speaker])


@pytest.mark.parametrize("is_only_one", [False, True])
def test_who_cannot_speak_is_not_chosen_at_the_deadline(
    is_only_one: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that is computed again in chunks is aborted by SGLang; a shorter one that runs gives the text."""
    live = live_program(branches=4)
    reqs = [branch(live, num_output_tokens=9), branch(live, num_output_tokens=5)][: 1 if is_only_one else 2]
    live.reqs = dict(enumerate(reqs))
    controller = make_controller(chunked_req=reqs[0])
    controller.admission.arrive(live.gang)
    spared: list[int | None] = []
    monkeypatch.setattr(controller.ends, "end_rest", lambda live, spared: spared_add(spared))
    spared_add = spared.append
    controller.ends.close(live, StopReason.DEADLINE)
    assert spared == [0 if is_only_one else 1]
    controller.ends.close(live, StopReason.DEADLINE)  # told again
    assert len(spared) == 1


@pytest.mark.parametrize(
    ("has_finished", "lengths", "why", "tokens", "message"),
    [
        (False, [4, 9, 6], None, 9, "Aborted: 0 of 4 branches had finished"),
        (True, [4, 9, 6], None, 4, "Aborted: 1 of 4 branches had finished"),
        (False, [], None, 0, "Aborted while it waited to start"),
        (False, [3], {"message": "Request waiting timeout reached.", "status_code": 503}, 3, "Request waiting timeout reached."),
    ],
)  # fmt: skip
def test_who_is_given_up_is_told_what_there_is(
    has_finished: bool,
    lengths: list[int],
    why: Any,
    tokens: int,
    message: str,
    make_controller: Callable[..., Controller],
) -> None:
    """The text of who would have spoken, else the longest; its record, and a reason that is true. A branch goes on to its end unseen."""
    live = live_program(branches=4, answer="hash")
    controller = make_controller()
    controller.branches.voting.texts = TEXTS
    live.reqs = dict(enumerate(branch(live, num_output_tokens=n) for n in lengths))
    controller.admission.arrive(live.gang)
    controller.programs.hold(live)
    if has_finished:
        live.reqs[0].finished_reason, live.reqs[0].output_ids_through_stop = (
            FINISH_MATCHED_STR("x"),
            live.reqs[0].output_ids,
        )
        controller.branches.voting.finish(live, 0, live.reqs[0])
    reqs, sent = list(live.reqs.values()), cast("list[Any]", [])
    controller.ends.emit = lambda reqs, return_logprob: sent.extend(reqs)
    controller.abort(SimpleNamespace(rid="r", abort_all=False, finished_reason=why))  # type: ignore[arg-type]
    (told,) = sent
    assert told.rid == "r"
    assert len(told.output_ids) == tokens
    assert told.finished_reason.to_json() == {
        "type": "abort", "message": message, "status_code": why and why["status_code"], "err_type": None,
    }  # fmt: skip
    assert record_of(told)["stop_reason"] == "aborted"
    assert record_of(told)["finish_reasons"] == [
        "stop" if has_finished and i == 0 else "ended" for i in range(len(lengths))
    ]
    assert told not in reqs
    assert all(isinstance(req.to_finish, FINISH_ENDED) for req in reqs[has_finished:])
    assert controller.ends.totals.num_aborted == 1
    assert not controller.programs.held


def test_who_is_given_up_is_answered_whatever_fails(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SGLang tells it, if its record cannot be made. One that was decided before keeps its reason."""
    told: list[Any] = []
    controller = make_controller(strict=False, send_abort_output=lambda abort, req: told.append(abort))
    live = live_program(branches=4)
    live.program.reason = StopReason.CAP
    controller.admission.arrive(live.gang)
    controller.programs.hold(live)
    monkeypatch.setattr("sglang_dynasor.policy.program.record_of", lambda program: 1 / 0)
    controller.abort(SimpleNamespace(rid="r", abort_all=False, finished_reason=None))  # type: ignore[arg-type]
    assert [abort.finished_reason for abort in told] == [
        {"type": "abort", "message": "Aborted while it waited to start"}
    ]
    assert controller.fence.num == 1
    assert live.program.reason is StopReason.CAP
    assert not controller.programs.held


@pytest.mark.parametrize(
    ("return_logprob", "start", "expected"), [(False, 0, False), (True, -1, False), (True, 99, False), (True, 0, True)]
)
def test_logprobs_of_a_prompt_are_no_cache_hit(return_logprob: bool, start: int, expected: bool) -> None:
    """Then every sibling computes it, and room must be there for all."""
    req = request(return_logprob=return_logprob, logprob_start_len=start)
    assert computes_prompt(req) is expected
    cost = room_of()[0].gang_cost(req)
    assert (cost.branch_tokens > 100, cost.prompt_tokens == 0) == (expected, expected)


def test_who_leaves_unseen_is_charged_and_looked_after() -> None:
    """A plain request that SGLang gave up was served all the same, and has left room."""
    made, _ = admission()
    made.arrive(live_program().gang)  # somebody to compare with
    arrival = made.note_arrival()
    made._is_stale = False
    before = made.order.line("").counter
    made.note_departure(arrival, 105)
    assert made.order.line("").counter == before + 105
    assert made._is_stale


@pytest.mark.parametrize(
    ("num_output_tokens", "num_chunks", "charged"), [(0, 0, 0), (0, 1, 100), (5, 1, 105), (5, 0, 105)]
)
def test_who_never_ran_is_charged_nothing(
    make_controller: Callable[..., Controller], num_output_tokens: int, num_chunks: int, charged: int
) -> None:
    """A plain request of a full queue, or that waited too long, took nobody's place; one that was retracted did."""
    controller = make_controller()
    controller.admission.arrive(live_program().gang)
    req = request(num_output_tokens, extend_batch_idx=num_chunks)
    set_arrival(req, controller.admission.note_arrival())
    line = controller.admission.order.line("")
    before = line.counter
    assert not controller.on_aborted(SimpleNamespace(rid="r"), req)  # type: ignore[arg-type]
    assert line.counter == before + charged


# What is told


def test_what_is_told_wrongly_is_counted(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scheduler goes on (fence.py); of a program that has gone nothing is said."""
    wrong = (Told(what="deadline"), Told(what="fixed_rows", parts=(1, 2)))
    for strict in (False, True):
        controller = make_controller()
        monkeypatch.setattr(fence, "FENCE", Fence(strict))
        for told in wrong:
            if strict:
                with pytest.raises(ValueError, match="unpack"):
                    aside.hear(controller.scheduler, told)
            else:
                aside.hear(controller.scheduler, told)
        assert fence.FENCE.num == len(wrong)
        for told in (
            Told(what="deadline", parts=(7,)),
            Told(what="reward", parts=(7, 0, 0.5)),
            Told(what="same", parts=(7, 0, None, None)),
        ):
            controller.hear(told)
        assert fence.FENCE.num == len(wrong)


def test_deadlines_of_programs_that_are_over_are_dropped(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not kept for a day each; and whoever is there is told at its time, the first first."""
    now = [0.0]
    monkeypatch.setattr(teller_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    teller = make_controller(forward_ct=0).teller
    held = {5, 700, 998, 999}
    for number in range(1000):
        teller.date(number, 86_400 - number)
        assert not list(teller.due((held | {number}).__contains__, 1))
        assert len(teller._deadlines) <= FEWEST_SWEPT
    now[0] = 86_400 - 998.5
    assert [told.parts for told in teller.due(held.__contains__, 1)] == [(999,)]
    now[0] = 90_000.0
    assert [told.parts for told in teller.due((held - {999}).__contains__, 1)] == [(998,), (700,), (5,)]
    many = range(1000, 1000 + 10 * FEWEST_SWEPT)
    for number in many:
        teller.date(number, 1.0)
    now[0] += 2
    assert [told.parts for told in teller.due(many.__contains__, 1)] == []  # dated by this look
    now[0] += 2
    assert [told.parts for told in teller.due(many.__contains__, 1)] == [(number,) for number in many]


def test_nobody_outside_can_send_what_the_first_rank_tells() -> None:
    """No channel between processes decodes it; what an operator asks for comes through."""
    messages.register()
    with pytest.raises(msgspec.ValidationError):
        io_struct.msgpack_decode(io_struct.msgpack_encode(Told(what="deadline", parts=(1,))))
    ask = messages.Ask(what="finish", arguments={"id": "x"})
    assert io_struct.msgpack_decode(io_struct.msgpack_encode(ask)) == ask


@pytest.mark.parametrize(
    ("is_off", "has_mamba", "expected"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_a_thought_is_probed_where_its_kv_can_be_shared(is_off: bool, has_mamba: bool, expected: bool) -> None:
    """Not without a radix cache, nor where a state stands beside the KV: there it is thought to its end."""
    thoughts, _, _ = thoughts_of()
    thoughts.scheduler.tree_cache = SimpleNamespace(disable=is_off, supports_mamba=lambda: has_mamba)
    assert thoughts.may_ask is expected


# Kinds


def test_who_comes_by_again_while_it_is_to_speak_is_not_hidden(make_controller: Callable[..., Controller]) -> None:
    """With overlap the winner, which ended a step before, may stand behind the branch that decides: its answer was lost."""
    controller = make_controller()
    live = live_program(branches=2, answer="hash")
    seen: list[Any] = []
    keeper: Any = SimpleNamespace(has_ended=lambda req, tag: seen.append(req), has_left=lambda tag: None)
    winner = request(9, finished_reason=FINISH_MATCHED_STR("x"))
    controller.admission.arrive(live.gang)
    set_tag(winner, BranchTag(live, live.program.start_branch(), keeper))
    live.reqs[0] = winner
    controller.on_output([winner])
    assert (winner.finished_output, seen) == (True, [winner])
    winner.finished_output = None  # as `Ends._speak` leaves it until the step's output goes out
    controller.on_output([winner])
    assert (winner.finished_output, seen) == (None, [winner])


def test_the_end_of_a_branch_that_another_goes_on_for_passes_unread(make_controller: Callable[..., Controller]) -> None:
    """The one that goes on is read, when it ends."""
    controller = make_controller()
    controller.branches.voting.texts = TEXTS
    live = live_program(branches=4, answer="hash")
    controller.admission.arrive(live.gang)
    old = branch(live, num_output_tokens=9)
    new = request(5)
    set_tag(new, BranchTag(live, 0, controller.branches, given_tokens=4, spent_tokens=9))
    live.reqs[0] = new
    for req in (old, new):
        req.finished_reason, req.output_ids_through_stop = FINISH_MATCHED_STR("x"), req.output_ids
        controller.branches.has_ended(req, branch_tag_of(req))
        assert live.program.num_in_flight == (1 if req is old else 0)
    assert live.program.branches[0].answer == "7"
    assert live.program.branches[0].num_tokens == 9 + 5 - 4


def test_a_program_of_a_client_s_branches_ends_the_others(make_controller: Callable[..., Controller]) -> None:
    """By its rule; not while it is undecided."""
    controller = make_controller()
    controller.branches.voting.texts = TEXTS
    live = LiveProgram(
        Program("p", parse_field({"branches": 8, "answer": "hash", "stop": "margin", "program": "p"}, 64)), None
    )
    keeper = SentBranches(controller.ends, controller.branches.voting, controller.branches.readings, controller.slots)
    reqs = [branch(live, kind=SentTag, num_output_tokens=3) for _ in range(8)]
    live.reqs = dict(enumerate(reqs))
    for number, req in enumerate(reqs[:5]):
        req.finished_reason, req.output_ids_through_stop = FINISH_MATCHED_STR("x"), req.output_ids
        keeper.has_ended(req, tag_of(req))  # type: ignore[arg-type]
        assert (reqs[7].to_finish is not None) is (number == 4)


@pytest.mark.parametrize(("answers", "is_certain"), [("77", True), ("78", False)])
def test_a_client_s_branch_that_is_lost_may_end_the_others(
    answers: str, is_certain: bool, make_controller: Callable[..., Controller]
) -> None:
    """When the next step begins: SGLang may be going through its queue, out of which they would be taken."""
    controller = make_controller()
    field = {"branches": 4, "answer": "hash", "stop": "margin", "program": "p"}
    live = LiveProgram(Program("p", parse_field(field, 64)), None)
    readings = controller.branches.readings
    keeper = SentBranches(controller.ends, controller.branches.voting, readings, controller.slots)
    reqs = [branch(live, kind=SentTag, num_output_tokens=3) for _ in range(4)]
    live.reqs = dict(enumerate(reqs))
    for index, answer in enumerate(answers):
        live.program.count(index, answer, 3)
    keeper.is_lost(reqs[2], tag_of(reqs[2]), io_struct.AbortReq(rid="r"))  # type: ignore[arg-type]
    assert (live.program.reason is StopReason.CERTAIN) is is_certain
    assert reqs[3].to_finish is None
    readings.open_step()
    assert (reqs[3].to_finish is not None) is is_certain


# What is read in one step


def test_a_step_reads_so_much_and_no_more() -> None:
    """What does not fit waits its turn, and nothing overtakes it; a step reads one text of any size."""
    live, done, late = live_program(), [], []
    readings = Readings(lambda live, step: late.append(True) or step(live))
    sizes = [STEP_CHARS // 2, STEP_CHARS // 2, 1, 2 * STEP_CHARS, 0]
    for number, num_chars in enumerate(sizes):
        was_read = readings.add(live, num_chars, lambda live, number=number: done.append(number))
        assert was_read is (number < 2)
    assert (done, len(readings), late) == ([0, 1], 3, [])
    readings.open_step()
    assert (done, len(late)) == ([0, 1, 2], 1)
    readings.open_step()
    assert (done, len(readings)) == ([0, 1, 2, 3, 4][:4], 1)
    readings.open_step()
    assert (done, len(readings), len(late)) == ([0, 1, 2, 3, 4], 0, 3)


def test_an_engine_that_would_sleep_reads_all() -> None:
    """Without a bound a step reads whatever waits."""
    done: list[int] = []
    readings = Readings(lambda live, step: step(live))
    for number in range(9):
        readings.add(live_program(), STEP_CHARS, lambda live, number=number: done.append(number))
    readings.open_step(has_bound=False)
    assert done == list(range(9))


@pytest.mark.parametrize("is_first_rank", [True, False])
@pytest.mark.parametrize(
    ("sleeps", "is_empty", "has_bound"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_every_rank_reads_as_far_as_the_one_that_would_sleep(
    is_first_rank: bool, sleeps: bool, is_empty: bool, has_bound: bool,
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SGLang gives the first rank alone what sleeps. Another that read less would decide otherwise, and the ranks part."""
    monkeypatch.setattr(controller_module, "get_device", lambda: SimpleNamespace(sleep_on_idle=sleeps))
    controller = make_controller(idle_sleeper="one" if is_first_rank and sleeps else None)
    opened: list[bool] = []
    monkeypatch.setattr(controller.branches.readings, "open_step", lambda has_bound: opened.append(has_bound))
    ended = [[live_program().gang], [live_program().gang], []]  # by a budget, as many as a look may end
    monkeypatch.setattr(controller.admission, "share_out", lambda: ended.pop(0))
    monkeypatch.setattr(controller.ends, "guarded", lambda live, act: None)
    controller.admit(SimpleNamespace(is_empty=lambda: is_empty, reqs=[], batch_is_full=False))
    assert opened == [has_bound]
    assert len(ended) == (2 if has_bound else 0)


@pytest.mark.parametrize(
    ("answer", "num_tokens", "num_chars"),
    [
        ("hash", 100, 400),
        ("hash", 5000, 4096),
        ("json", 5000, 16_384),
        ("regex:[0-9]+", 100, 400),
        ("regex:(?s)(?:a|b)*a(?:a|b){60}ж|.", 100, 1600),  # of so many instructions
        ("regex:(?s)(?:a|b)*a(?:a|b){60}ж|.", 5000, 4096),
    ],
)
def test_what_reading_is_worth(answer: str, num_tokens: int, num_chars: int) -> None:
    """Its characters, of a large pattern more, and of a large program its vote."""
    for branches in (16, 64):
        spec = parse_field({"answer": answer, "branches": branches}, 64)
        assert reading_chars(spec, num_tokens) == num_chars + 8 * branches


def test_branches_that_end_together_vote_in_turn(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the steps that follow, none lost; a program decided meanwhile reads no more, and its deadline waits for what is unread."""
    controller = make_controller()
    live = live_program(branches=64, answer="hash", stop="margin")
    controller.admission.arrive(live.gang)
    controller.programs.hold(live)
    read: list[int] = []

    def finish(live: LiveProgram, index: int, req: Any, reward: float | None = None) -> None:
        read.append(index)
        live.program.count(index, "7" if index % 2 else None, 9, reward)

    monkeypatch.setattr(controller.branches.voting, "finish", finish)
    monkeypatch.setattr(controller.branches, "advance", lambda live: None)
    expired: list[int] = []
    monkeypatch.setattr(controller.ends, "close", lambda live, why: expired.append(len(read)))
    reqs = [branch(live, num_output_tokens=1024) for _ in range(64)]
    live.reqs = dict(enumerate(reqs))
    for req in reqs[:60]:
        req.finished_reason, req.output_ids_through_stop = FINISH_ENDED(), req.output_ids
        controller.branches.has_ended(req, branch_tag_of(req))
    assert (read, len(controller.branches.readings)) == ([0, 1], 58)
    assert not controller.is_idle
    controller.branches.close(live, StopReason.DEADLINE)
    assert expired == []
    while controller.branches.readings:
        num_read = len(read)
        controller.branches.readings.open_step()
        assert len(read) - num_read <= 2
        if len(read) == 40:
            live.program.end(59, 9)
    assert read == list(range(59))
    assert expired == [59]


@pytest.mark.parametrize("is_paused", [True, False])
def test_what_waits_is_read_in_a_pause(
    is_paused: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step comes that would read. A deadline that is told again and again is heard once, after what had finished before."""
    controller = make_controller(_engine_paused=is_paused)
    live = controller.programs.number(live_program().program, request())
    live.gang = Gang(live.program, 100, Cost(100, 52), live)
    controller.admission.arrive(live.gang)
    controller.programs.hold(live)
    done: list[Any] = []
    monkeypatch.setattr(controller.ends, "close", lambda live, why: done.append(why))
    readings = controller.branches.readings
    for number in range(4):
        readings.add(live, STEP_CHARS + 1, lambda live, number=number: done.append(number))
    controller.teller.date(live.number, 0.0)
    for num_polls in range(1, 6):
        for told in controller.due():
            controller.hear(cast("Told", told))
        assert done == ([0, 1, 2, 3, StopReason.DEADLINE] if is_paused else [0])[: num_polls + 1]
        assert len(readings) == (max(0, 4 - num_polls) if is_paused else 4)


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_client_s_branch_that_is_read_late_is_told_once(
    is_broken: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden until then; and told even where reading fails: somebody waits for it."""
    controller = make_controller(strict=False)
    spec = parse_field({"branches": 8, "answer": "hash", "stop": "never", "program": "p"}, 64)
    live = LiveProgram(Program("p", spec), None)
    keeper = SentBranches(controller.ends, controller.branches.voting, controller.branches.readings, controller.slots)
    sent: list[Any] = []
    controller.ends.emit = lambda reqs, return_logprob: sent.extend(reqs)

    def finish(live: LiveProgram, index: int, req: Any) -> None:
        if is_broken and index > 1:
            raise RuntimeError("injected")
        live.program.count(index, "7", 9)

    monkeypatch.setattr(controller.branches.voting, "finish", finish)
    reqs = [branch(live, kind=SentTag, num_output_tokens=4000) for _ in range(4)]
    live.reqs = dict(enumerate(reqs))
    for req in reqs:
        req.finished_reason, req.output_ids_through_stop, req.finished_output = FINISH_ENDED(), req.output_ids, None
        keeper.has_ended(req, tag_of(req))  # type: ignore[arg-type]
    assert [bool(req.finished_output) for req in reqs] == [False, False, True, True]
    assert sent == []
    controller.branches.readings.open_step()
    assert sent == reqs[2:]
    assert not any(req.finished_output for req in reqs)


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_thought_that_cannot_be_made_keeps_no_row_for_probes(
    is_broken: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else rows would be kept for ever for thoughts that nobody thinks; its client's request runs as stock."""
    controller = make_controller(strict=False)
    live = live_program(algorithm="long_cot", think_end="end")
    controller.admission.arrive(live.gang)
    controller.programs.hold(live)
    stock: list[Any] = []
    controller.ends.enqueue = lambda req, is_retracted: stock.append(req)

    def make(*args: Any) -> Any:
        if is_broken:
            raise RuntimeError("injected")
        return request(time_stats=SimpleNamespace(set_wait_queue_entry_time=lambda: None))

    monkeypatch.setattr(branches_module, "make_branch", make)
    monkeypatch.setattr(controller.branches.thoughts, "_next", lambda live, asking: 40)
    controller.branches.start(live, 1)
    assert controller.admission.num_thoughts == (0 if is_broken else 1)
    assert stock == ([live.parent] if is_broken else [])
    assert controller.fence.num == is_broken


def test_what_is_held_is_whole(make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that cannot be taken in is not held (it runs as stock: fence.py), and an abort of everything finds nothing of ours."""
    controller = make_controller(strict=False, max_queued_requests=None)
    monkeypatch.setattr(controller.room, "gang_cost", lambda req: 1 / 0)
    params = SimpleNamespace(custom_params={"dynasor": {"answer": "hash"}}, max_new_tokens=9)
    stock: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        controller.take(
            lambda req, is_retracted: stock.append(req), request(sampling_params=params), is_retracted=False
        )
    assert (stock, controller.programs.held, controller.is_idle) == ([], {}, True)
    controller.abort(SimpleNamespace(rid="", abort_all=True, finished_reason=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("has_logprobs", [False, True])
def test_answers_go_out_with_the_output_of_their_step(
    has_logprobs: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message for all; what is answered between two steps does not wait for the next."""
    controller = make_controller()
    sent: list[tuple[list[Any], bool]] = []

    class Stock:
        def __post_init__(self) -> None: ...

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, Any]: ...

        def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
            sent.append((reqs, return_logprob))

    streamer: Any = streamer_class(Stock, controller.scheduler)()  # type: ignore[arg-type]
    streamer.__post_init__()
    plain, winner = request(), request(return_logprob=has_logprobs)

    def answers(reqs: list[Any]) -> list[Any]:
        controller.ends.send(winner)
        return reqs

    monkeypatch.setattr(controller, "on_output", answers)
    controller.inside.num_reqs = 1
    streamer.stream_output([plain], False)
    assert sent == [([plain, winner], has_logprobs)]
    controller.ends.send(winner)
    assert sent[1:] == [([winner], has_logprobs)]
    controller.inside.num_reqs = 0
    streamer.stream_output([plain], False)  # nothing of ours is there
    assert sent[2:] == [([plain], False)]


# Weights that are updated


def spans_of(req: Any, version: str) -> list[tuple[str, int, int]]:
    """As SGLang tells the client, at a time when the weights are of this version."""
    spans = compute_weight_version_spans(req.weight_version_events, version, len(req.output_ids))
    return [(span.version, span.start, span.end) for span in spans]


@pytest.mark.parametrize("is_sent", [True, False])
def test_who_speaks_later_tells_its_own_weights(
    is_sent: bool, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it was sampled by, though they have changed since it ended; and those before, which SGLang has noted."""
    controller = make_controller()
    sent: list[Any] = []
    controller.ends.emit = lambda reqs, return_logprob: sent.extend(reqs)
    monkeypatch.setattr(controller.branches.voting, "finish", lambda live, index, *_: live.program.count(index, "7", 9))
    monkeypatch.setattr(controller.branches, "advance", lambda live: None)
    live = live_program(branches=4, answer="hash", stop="never")
    req = branch(live, kind=SentTag if is_sent else BranchTag, num_output_tokens=9)
    live.reqs[0] = req
    req.weight_version_events.append(WeightVersionEvent("before", 4))
    req.finished_reason, req.output_ids_through_stop = FINISH_MATCHED_STR("x"), req.output_ids
    controller.branches.readings.add(live, STEP_CHARS, lambda live: None)  # the step is full
    (controller.intake.sent if is_sent else controller.branches).has_ended(req, tag_of(req))  # type: ignore[arg-type]
    monkeypatch.setattr(live_module, "get_serving", lambda: SimpleNamespace(weight_version="second"))
    controller.branches.readings.open_step()
    if not is_sent:
        controller.ends._speak(live, req, {})
    assert sent == [req]
    assert spans_of(req, "second") == [("before", 0, 4), ("first", 4, 9)]
    assert spans_of(req, "first") == [("before", 0, 4), ("first", 4, 9)]


def test_who_goes_on_for_a_thought_tells_its_weights(
    make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with tokens that another Req has sampled, by weights that SGLang has noted there."""
    controller = make_controller()
    live = live_program(algorithm="long_cot", think_end="end")
    controller.admission.arrive(live.gang)
    live.reqs[0] = chain = branch(live, num_output_tokens=9)
    record_weight_version_events([chain], "before")
    monkeypatch.setattr(branches_module, "make_branch", lambda *args: request())
    monkeypatch.setattr(branches_module, "go_on_from", lambda req, given: setattr(req, "output_ids", given))
    controller.branches._replace(live, 0, array("q", range(12)), 9)
    record_weight_version_events([chain], "first")  # it ends with the step under way
    assert live.reqs[0] is not chain
    assert spans_of(live.reqs[0], "first") == [("before", 0, 9), ("first", 9, 12)]


# Spans


class Span:
    """What a tracer was told of one."""

    def __init__(self, name: str, context: Any, start_time: int, attributes: dict[str, Any]):
        self.name, self.within, self.start, self.attributes = name, context, start_time, attributes
        self.events: list[str] = []
        self.end_time = 0

    def add_event(self, name: str, timestamp: int) -> None:
        assert self.start <= timestamp
        self.events.append(name)

    def end(self, end_time: int) -> None:
        self.end_time = end_time


@pytest.mark.parametrize("is_traced", [True, False])
def test_a_program_is_a_span_and_its_branches_are_children(is_traced: bool) -> None:
    """In SGLang's trace of its request, in time order; where that is not traced, nothing is told."""
    spans: list[Span] = []
    tracer = SimpleNamespace(start_span=lambda *args, **more: spans.append(Span(*args, **more)) or spans[-1])
    live = live_program(branches=4)
    times: Any = live.parent.time_stats  # type: ignore[union-attr]
    times.trace_ctx = SimpleNamespace(tracing_enable=is_traced, root_span_context="request")
    times.scheduler_recv_time, times.forward_entry_time = 1.0, 2.0
    for index, ended in enumerate([5.0, 0.0]):
        live.program.start_branch()
        live.times[index] = Times(1.5, 3.0, ended)
    live.program.finish(0, "#### 4", 7)
    live.program.end(1, 3)
    made = Spans(tracer, "m")
    made._within = lambda span: span
    made.count(live, "certain")
    if not is_traced:
        assert spans == []
        return
    program, first, second = spans
    assert (program.name, program.within, program.events) == (
        "invoke_workflow self_consistency",
        "request",
        ["gang started"],
    )
    assert program.attributes["gen_ai.usage.output_tokens"] == 10
    assert program.attributes["dynasor.outcome"] == "certain"
    assert [span.name for span in (first, second)] == ["text_completion m"] * 2
    assert first.within is second.within is program
    assert [span.attributes["gen_ai.usage.output_tokens"] for span in (first, second)] == [7, 3]
    assert [span.attributes["gen_ai.response.finish_reasons"] for span in (first, second)] == [["stop"], ["ended"]]
    assert [span.attributes["dynasor.is_winner"] for span in (first, second)] == [True, False]
    assert program.start < first.start < first.end_time < second.end_time == program.end_time


@pytest.mark.parametrize("tenant", ["acme", ""])
def test_a_program_that_fell_back_has_its_tenant_in_its_record(
    make_controller: Callable[..., Controller], tenant: str
) -> None:
    """Its client may try again under the same rid, and others may not; whether it fell back alone or with all."""
    controller = make_controller(strict=False)
    told: list[Any] = []
    controller.ends.emit = lambda reqs, return_logprob: told.extend(reqs)
    for falls_alone in (True, False):
        live = live_program(branches=2, **({"tenant": tenant} if tenant else {}))
        req = branch(live)
        live.reqs[0], req.finished_reason = req, FINISH_MATCHED_STR("x")
        live.program.finish(0, "#### 1", 5)
        controller.programs.hold(live)
        controller.ends.inside.admission.arrive(live.gang)
        if falls_alone:
            controller.ends.surrender(live, ValueError("ours"))
        else:
            assert aside._answer(controller, live, live.parent)
    expected = {"program": "p", "stop_reason": "failed", **({"tenant": tenant} if tenant else {})}
    assert [record_of(req) for req in told] == [expected, expected]


def test_programs_that_clients_send_are_forgotten_the_longest_unused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that is in flight; what was too many then goes as soon as it is over."""
    monkeypatch.setattr(programs_module, "MAX_CLIENT_PROGRAMS", 3)
    programs = Programs(Slots(2))

    def join(name: str) -> Program:
        live = programs.join(Program(name, parse_field({"program": name}, 64)))
        return live.program

    first = join("0")
    first.start_branch()
    for i in range(1, 6):
        join(str(i))
    assert {id for _, id in programs.sent} == {"0", "4", "5"}
    for name in ("6", "7", "8"):
        join(name).start_branch()
    assert {id for _, id in programs.sent} == {"0", "6", "7", "8"}
    first.finish(0, "#### 1", 3)
    programs.forget_unused()
    assert {id for _, id in programs.sent} == {"6", "7", "8"}


# Who is refused


class Books:
    """What SGLang's scheduler is told of requests that it does not serve."""

    def __init__(self) -> None:
        self.released: list[Any] = []  # what it holds for them
        self.retired: list[Any] = []  # their beams
        self.told: list[tuple[Any, dict[str, Any]]] = []

    def fields(self, **fields: Any) -> dict[str, Any]:
        coordinator = SimpleNamespace(retire_group=self.retired.append)
        return {
            "_release_aborted_request": self.released.append, "beam_coordinator": coordinator,
            "send_abort_output": lambda abort, req: self.told.append((req, abort.finished_reason)), **fields,
        }  # fmt: skip


def asks(field: Any, **more: Any) -> Any:
    params = {"max_new_tokens": 9, "n": 1, "top_k": -1, "temperature": 1.0, **more.pop("params", {})}
    return request(
        sampling_params=SimpleNamespace(custom_params={"dynasor": field}, **params),
        **{"multimodal_inputs": None, "session": None, "beam_group": None, "priority": None, **more},
    )


MANY = SimpleNamespace(tokenizer_worker_num=2)


@pytest.mark.parametrize(
    ("given", "fields", "status", "message"),
    [
        ({"branches": 0}, {}, 400, "dynasor.branches"),
        ({}, {"max_queued_requests": 0}, 503, "The request queue is full."),
        ({}, {"server_args": MANY, "session": "one"}, 400, "session_params with dynasor is not supported"),
        ({}, {"server_args": MANY, "rid": "\0r"}, 400, "begins with a NUL"),
        ({}, {"server_args": MANY, "params": {"max_new_tokens": 0}}, 400, "leaves no room for an answer"),
    ],
)
def test_who_is_refused_leaves_nothing_with_sglang(
    given: Any, fields: dict[str, Any], status: int, message: str, make_controller: Callable[..., Controller]
) -> None:
    """Neither a session's turn, which nobody could follow, nor images, nor beams."""
    books = Books()
    of_req = {key: fields[key] for key in fields if key in ("session", "rid", "params")}
    controller = make_controller(**books.fields(**{key: fields[key] for key in fields if key not in of_req}))
    req = asks(given, **of_req)
    controller.take(lambda req, is_retracted: books.told.append((req, {})), req, is_retracted=False)
    ((told, reason),) = books.told
    assert (told, reason["status_code"], message in reason["message"]) == (req, status, True)
    assert books.released == books.retired == [req]
    assert controller.is_idle


@pytest.mark.parametrize("state", ["off", "aside", "on"])
@pytest.mark.parametrize("is_wrong_already", [False, True])
def test_a_server_without_programs_keeps_nothing_of_who_it_refuses(
    state: str, is_wrong_already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But of one that SGLang refuses itself the session's turn is not given back: it is another's, which goes on."""
    books, own = Books(), Fence()
    own.is_aside = state == "aside"
    monkeypatch.setattr(hooks, "FENCE", own)
    server_args = SimpleNamespace(_dynasor_off="This server takes no programs" if state == "off" else "")
    scheduler, stock = scheduler_of(**books.fields(server_args=server_args)), list[Any]()
    req = asks({}, to_finish="an error" if is_wrong_already else None)
    hooks.enqueue(lambda scheduler, req, is_retracted: stock.append(req), scheduler, req)
    if state == "on":  # the flag was not given: stock SGLang
        assert (stock, books.told, books.released) == ([req], [], [])
        return
    assert [req for req, _ in books.told] == books.retired == [req]
    assert books.released == ([] if is_wrong_already else [req])
    assert stock == []


@pytest.mark.parametrize("is_decided", [True, False])
def test_a_client_s_branch_that_comes_late_leaves_nothing_with_sglang(
    is_decided: bool, make_controller: Callable[..., Controller]
) -> None:
    """Nobody needs it, so it never enters the cache, by which its session would hear of its end. One that is needed is queued."""
    books = Books()
    controller, sent, stock = make_controller(**books.fields()), list[Any](), list[Any]()
    controller.ends.emit = lambda reqs, return_logprob: sent.extend(reqs)
    field = {"program": "p", "branches": 2, "answer": "hash"}
    live = controller.programs.join(Program("p", parse_field(field, 64)))
    live.program.reason = StopReason.CERTAIN if is_decided else None
    req = asks(field, session=SimpleNamespace(streaming=True))
    controller.take(lambda req, is_retracted: stock.append(req), req, is_retracted=False)
    assert (books.released, sent, stock) == (([req], [req], []) if is_decided else ([], [], [req]))


@pytest.mark.parametrize("state", ["on", "aside"])
def test_what_a_pause_retracts_is_no_new_program(
    state: str, make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fell back to a plain request has its field still; and it came when it came. SGLang tells by the request alone."""
    books, own, stock = Books(), Fence(), list[Any]()
    own.is_aside = state == "aside"
    monkeypatch.setattr(hooks, "FENCE", own)
    controller = make_controller(**books.fields())
    scheduler = controller.scheduler
    if own.is_aside:
        scheduler._dynasor = None
    waits = live_program()
    controller.admission.arrive(waits.gang)  # from now on arrivals are counted
    plain = request(is_retracted=True, sampling_params=SimpleNamespace(custom_params=None))
    for req in (asks({}, is_retracted=True), plain):
        hooks.enqueue(lambda scheduler, *given: stock.append(given), scheduler, req)
        assert stock.pop() == (req, False)
        assert not hasattr(req, "dynasor_arrival")
    assert (books.told, controller.programs.held) == ([], {})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_rid_at_two_workers_is_refused(num_workers: int, make_controller: Callable[..., Controller]) -> None:
    """Neither worker knows of the other's, whose client would wait for ever. One front process knows that nobody waits any more."""
    books = Books()
    controller = make_controller(
        **books.fields(server_args=SimpleNamespace(tokenizer_worker_num=num_workers), running_batch=None)
    )
    controller.room.gang_cost = lambda req: Cost(100, 52)  # type: ignore[method-assign]
    first, second, other = (asks({}, rid=rid) for rid in ("same", "same", "other"))
    for req in (first, second, other):
        controller.take(lambda req, is_retracted: None, req, is_retracted=False)
    parents = [live.parent for live in controller.programs.held.values()]
    if num_workers == 1:
        assert (parents, books.told) == ([second, other], [])
    else:
        assert parents == [first, other]
        ((told, reason),) = books.told
        assert (told, reason["status_code"]) == (second, 400)
        assert reason["message"] == "rid='same' is that of a program that is served; send another, or none"


# When what we hold cannot be trusted


@pytest.fixture
def broken(make_controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A controller with three programs, the first of which has finished a branch, of which something is found wrong."""
    books, own = Books(), Fence()
    for module in (fence, aside):
        monkeypatch.setattr(module, "FENCE", own)
    monkeypatch.setattr(aside, "_look", lambda controller, there: ["something is wrong"])
    controller = make_controller(strict=False, **books.fields())
    for number in range(3):
        live = live_program(branches=2)
        live.parent.rid, live.number = f"r{number}", number + 1  # type: ignore[union-attr]
        controller.admission.arrive(live.gang)
        controller.programs.hold(live)
    live = controller.programs.held["r0"]
    live.reqs[0] = branch(live, num_output_tokens=3)
    live.program.finish(0, "#### 7", 3)
    stock, emitted = list[Any](), list[Any]()
    controller.ends.enqueue = lambda req, is_retracted: stock.append(req)
    controller.ends.emit = lambda reqs, return_logprob: emitted.extend(reqs)
    return SimpleNamespace(
        scheduler=controller.scheduler, controller=controller, fence=own, books=books, stock=stock, emitted=emitted
    )


def settle(broken: Any) -> Any:
    """Settle, and once more as in the next step; the controller that is there then."""
    for _ in range(2):
        broken.fence.is_in_doubt = True
        aside.settle(broken.scheduler, None)
    return broken.scheduler._dynasor


def test_every_client_is_answered_once(broken: Any) -> None:
    """By what a branch has finished, or as stock; and what is told late of the old ones is told to nobody."""
    old, lives = broken.controller, list(broken.controller.programs.held.values())
    sums = old.observer._sums_on(torch.device("cpu"))
    fresh = settle(broken)
    assert [req.rid for req in broken.emitted] == ["r0"]
    assert [req.rid for req in broken.stock] == ["r1", "r2"]
    assert broken.books.told == []
    assert fresh is not old
    assert broken.scheduler.tp_worker.model_runner.sampling_observer is fresh.observer
    assert fresh.observer._sums is sums  # a device may not have as much memory again
    assert not any(old.programs.holds(live) for live in lives)
    old.branches.go_on(lives[1])  # the step under way may still show its rows to the old ones
    assert (len(broken.emitted), len(broken.stock)) == (1, 2)


@pytest.mark.parametrize("is_leaving", [True, False])
def test_one_that_cannot_be_answered_keeps_nobody_from_it(broken: Any, is_leaving: bool) -> None:
    """It is told so, once; the others are answered, once; and the old ones go, or all do."""
    broken.controller.programs.held["r1"].parent = None  # it was answered before
    broken.controller.programs.held["r0"].program = None
    broken.fence.is_leaving = is_leaving
    old = broken.controller
    now = settle(broken)
    assert [req.rid for req in broken.stock] == ["r2"]
    assert broken.emitted == []
    ((told, reason),) = broken.books.told
    assert (told.rid, reason["status_code"], reason["message"]) == ("r0", 503, aside.LOST)
    assert (now is None, broken.fence.is_aside, broken.fence.is_leaving) == (is_leaving, is_leaving, False)
    assert now is not old


def test_one_that_cannot_be_ended_runs_on_unseen(broken: Any) -> None:
    """And is of no program any more."""
    req = branch(broken.controller.programs.held["r1"])
    del req.finished
    broken.scheduler.waiting_queue.append(req)
    aside.settle(broken.scheduler, None)
    assert list(broken.fence.orphans) == [req]
    assert tag_of(req) is None
    assert [req.rid for req in broken.stock] == ["r1", "r2"]


def test_whatever_fails_nobody_goes_through_it_twice(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we fail outside of all guards we step aside."""
    monkeypatch.setattr(aside, "_end_all", lambda scheduler, controller, there: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aside.settle(broken.scheduler, None)
    assert (broken.scheduler._dynasor, broken.fence.is_aside) == (None, True)
    assert settle(broken) is None


def test_a_new_line_counts_arrivals_anew(broken: Any) -> None:
    """Who waited before is before all that come now, whatever number the old line gave it."""
    plain = request(dynasor_arrival=9)
    broken.scheduler.waiting_queue.append(plain)
    aside.settle(broken.scheduler, None)
    assert plain.dynasor_arrival == 0
    assert broken.scheduler.waiting_queue == [plain]


@pytest.mark.parametrize("has_controller", [True, False])
def test_a_scheduler_without_programs_is_not_told_to_leave(
    has_controller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some hooks run there, too, and may fail; nobody there would know what is said. Nor is there anything to settle."""
    own = Fence()
    for module in (fence, aside):
        monkeypatch.setattr(module, "FENCE", own)
    for _ in range(fence.MOST_IN_A_ROW):
        own.fall_back("a", RuntimeError())
    scheduler: Any = SimpleNamespace()
    if has_controller:
        scheduler._dynasor = SimpleNamespace(is_idle=True)
    assert (hooks.timeouts([], scheduler) or []) == ([Told(what="leave")] if has_controller else [])
    if not has_controller:
        aside.settle(scheduler, None)
        assert not own.is_in_doubt
        assert own.num == fence.MOST_IN_A_ROW

"""`--enable-priority-scheduling` without preemption: the most urgent go first, programs and plain requests alike, then the line's order."""

from __future__ import annotations

import asyncio
import json
from math import inf
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from engines import arrived, assert_nothing_left, filled
from hypothesis import given
from hypothesis import strategies as st
from questions import held_out, prompt
from sglang.srt.managers import scheduler

from sglang_dynasor.engine.live import tag_of
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.room import SchedulerRoom
from sglang_dynasor.policy.line import Ticket
from sglang_dynasor.policy.order import Order, Plain

PROMPTS = [prompt(question.text) for question in held_out(12)]


def waiting(order: Order, rank: int, remaining: int = 10, tenant: str = "") -> Ticket:
    ticket = order.arrive(tenant, None, rank)
    order.wait(ticket, remaining)
    return ticket


def test_nobody_goes_while_a_more_urgent_one_waits() -> None:
    """Who is admitted makes room for the next rank; within a rank the shortest goes first, and others may try where one does not fit."""
    order = Order(1000)
    low, long, short = waiting(order, 0, 1), waiting(order, -5, 9), waiting(order, -5, 5)
    assert list(order.candidates()) == [short, long]
    assert order.urgent_rank == -5
    left: list[Any] = []
    for ticket in order.candidates():
        left.append(ticket)
        assert ticket is not None
        order.stop_waiting(ticket)
    assert left == [short, long, low]
    assert order.urgent_rank == inf


@pytest.mark.parametrize(("rank", "place"), [(-9, 0), (-5, 0), (-1, 2), (0, 2), (3, 3)])
def test_plain_requests_stand_among_them(rank: int, place: int) -> None:
    """Those of the same rank as programs of their tenant that have not started go before them, as without priorities."""
    order = Order(1000)
    tickets = [waiting(order, -5, 1), waiting(order, -5, 2), waiting(order, 0)]
    plain = Plain(order.line("", rank), 5, 10)
    seen: list[Any] = []
    for ticket in order.candidates(plain):
        seen.append(ticket)
        if ticket is not None:
            order.stop_waiting(ticket)
    expected: list[Any] = [*tickets]
    expected.insert(place, None)
    assert seen == expected


def test_each_rank_has_its_own_shares() -> None:
    """What a tenant was served at one priority does not count at another, nor where an idle one starts there."""
    order = Order(1000)
    a, b = waiting(order, -1, tenant="a"), waiting(order, 0, tenant="b")
    order.charge(a, 500)
    list(order.candidates())
    assert order.line("a", 0).counter == order.line("c", 0).counter == 0
    assert order.line("c", -1).counter == 500
    assert order.saves_room(b) is False


@given(st.integers(0, 10_000))
def test_ranks_in_any_order_stay_sound(seed: int) -> None:
    """Whatever comes and goes: counts and heaps hold, the order is that of ranks, and no arrival's number is given twice to a line."""
    chance, order, tickets = Random(seed), Order(100), list[Ticket]()
    numbers: dict[tuple[int, str], int] = {}
    for _ in range(200):
        if chance.random() < 0.5 or not tickets:
            ticket = waiting(order, chance.randrange(-40, 40), chance.randrange(100), chance.choice(["", "a", "b"]))
            key = ticket.line.rank, ticket.line.tenant
            assert ticket.arrival > numbers.get(key, 0)
            numbers[key] = ticket.arrival
            tickets.append(ticket)
        else:
            ticket = tickets.pop(chance.randrange(len(tickets)))
            order.charge(ticket, chance.randrange(300))
            order.end(ticket)
        ranks = [ticket.line.rank for ticket in order.candidates() if ticket is not None]
        assert set(ranks) <= {min((ticket.line.rank for ticket in tickets), default=0)}
        assert order.is_sound()


# SGLang's queue


class Counted(int):
    """A priority that counts how often it is compared."""

    num = 0

    def __lt__(self, other: int) -> bool:
        Counted.num += 1
        return int(self) < int(other)

    def __gt__(self, other: int) -> bool:
        Counted.num += 1
        return int(self) > int(other)


class Stand(SimpleNamespace):
    __hash__ = object.__hash__


def queued(name: str, priority: int, kind: Any = None) -> Any:
    """A request of SGLang's, or of ours."""
    params = SimpleNamespace(max_new_tokens=9)
    req = Stand(
        name=name, priority=priority, sampling_params=params, origin_input_ids=[0], output_ids=[], dynasor_arrival=3
    )
    req.lora_id, req.finished = None, lambda: False
    if kind is not None:
        req.dynasor_tag = Stand(live=Stand(gang=Stand(is_prompt_cached=True)))
    return req


def scheduler_of(sign: int = -1, **fields: Any) -> Any:
    given: dict[str, Any] = {
        "enable_priority_scheduling": True, "policy": SimpleNamespace(priority_sign=sign), "waiting_queue": [], "page_size": 1,
        "max_running_requests": 8, "max_total_num_tokens": 1000, "tree_cache": SimpleNamespace(disable=False), "chunked_req": None,
        "enable_lora": False,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **fields})


def room_of(scheduler: Any) -> SchedulerRoom:
    return SchedulerRoom(scheduler, Front(scheduler), lambda live, num: None)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_of_a_long_queue_are_found_without_sorting_it(sign: int) -> None:
    """Those that SGLang would take first, in its order: among the equally urgent who came first."""
    chance = Random(3)
    room = room_of(scheduler_of(sign))
    room.scheduler.waiting_queue = [queued(str(i), Counted(chance.randrange(100))) for i in range(4096)]
    room.front.put(queued("ours", 7, "branch"))
    Counted.num = 0
    list(room.waiting(1))
    assert Counted.num <= 4096
    Counted.num = 0
    asked = list(room.waiting(8))
    assert Counted.num < 3 * 4096
    in_order = sorted(room.scheduler.waiting_queue[1:], key=room.rank)
    assert [found.rank for found in asked] == [room.rank(req) for req in in_order[:8]]
    assert list(room.waiting(0)) == []


@pytest.mark.parametrize(
    ("has_priorities", "is_running", "expected"),
    [
        (True, True, ["new", "plain-9", "plain-5", "back-3", "back-3'", "plain-3", "plain-1"]),
        (True, False, ["back-3", "back-3'", "new", "plain-9", "plain-5", "plain-3", "plain-1"]),
        (False, True, ["back-3", "back-3'", "new", "plain-1", "plain-9", "plain-3", "plain-5"]),
    ],
)
def test_who_was_retracted_lets_the_more_urgent_pass(
    has_priorities: bool, is_running: bool, expected: list[str]
) -> None:
    """As SGLang has it for its own, while it looks; then ours are in front again. Not where nothing runs, nor without priorities.

    What is new in front was let in with regard to who is more urgent.
    """
    front = Front(scheduler := scheduler_of(enable_priority_scheduling=has_priorities))
    scheduler.waiting_queue = [queued(f"plain-{number}", number) for number in (1, 9, 3, 5)]
    for name in ("back-3", "back-3'"):
        front.put(queued(name, 3, "branch"), is_retracted=True)
    front.put(queued("new", 3, "branch"))

    def names() -> list[str]:
        return [req.name for req in scheduler.waiting_queue]

    def sort_plain(waiting_queue: list[Any], running_batch: Any, processed_tokens: int) -> None:
        if has_priorities:
            waiting_queue.sort(key=front.rank)

    before = names()[:3]
    batch: Any = SimpleNamespace(is_empty=lambda: not is_running)
    front.sort(sort_plain, scheduler.waiting_queue, batch, processed_tokens=0)
    assert names() == expected
    taken = scheduler.waiting_queue[:3]
    scheduler.waiting_queue = scheduler.waiting_queue[3:]  # a new list, as SGLang makes one
    front.note_admitted(SimpleNamespace(reqs=taken))  # type: ignore[arg-type]
    left = [name for name in before if name not in expected[:3]]
    assert names() == left + [name for name in expected[3:] if name not in left]
    assert len(front) == len(left)


@pytest.mark.parametrize(
    ("back", "expected"), [(3, ["back", "plain-3"]), (9, ["back", "plain-3"]), (1, ["plain-3", "back"])]
)
def test_who_is_no_less_urgent_comes_back_first(back: int, expected: list[str]) -> None:
    front = Front(scheduler := scheduler_of(waiting_queue=[queued("plain-3", 3)]))
    front.put(queued("back", back, "branch"), is_retracted=True)
    front.sort(lambda *args: None, scheduler.waiting_queue, SimpleNamespace(is_empty=lambda: False))  # type: ignore[arg-type]
    assert [req.name for req in scheduler.waiting_queue] == expected
    front.note_admitted(None)
    assert [req.name for req in scheduler.waiting_queue] == ["back", "plain-3"]


@pytest.mark.parametrize(("most", "expected"), [(2, inf), (1, -3)])
def test_a_place_for_an_adapter_is_left_to_ours_by_who_is_no_more_urgent(most: int, expected: float) -> None:
    """Where places are left, nobody leaves any."""
    lora = SimpleNamespace(validate_lora_batch=lambda adapters: len(adapters) <= most)
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=lora))
    room = room_of(scheduler_of(enable_lora=True, tp_worker=worker))
    running, ours = queued("running", 0), queued("ours", 3, "branch")
    running.lora_id, ours.lora_id = "a", "b"
    room.running_batch = SimpleNamespace(reqs=[running])  # type: ignore[assignment]
    assert room.kept_out_rank == inf
    room.front.put(ours)
    assert room.kept_out_rank == expected
    running.finished = lambda: True  # it stays in the batch while prompts are computed, and SGLang does not count it
    assert room.kept_out_rank == inf


# In the real engine


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Who has started in engines that start after this, in order."""
    log = tmp_path / "started.jsonl"
    log.touch()
    note = Front.note_admitted

    def noting(self: Front, batch: Any) -> None:
        for req in [] if batch is None else batch.reqs:
            tag = tag_of(req)
            with log.open("a") as out:
                out.write(json.dumps(tag.live.program.id if tag else req.rid) + "\n")
        note(self, batch)

    monkeypatch.setattr(Front, "note_admitted", noting)  # schedulers fork from here
    return lambda: list(dict.fromkeys(json.loads(line) for line in log.read_text().splitlines()))


@pytest.mark.engine
def test_the_most_urgent_go_first(start_engine: Any, started: Any) -> None:
    """Programs and plain requests of five priorities behind one that fills the engine; plain texts are those without the flag."""
    options = {"enable_priority_scheduling": True, "disable_priority_preemption": True, "max_running_requests": 3}
    greedy = {"temperature": 0, "max_new_tokens": 40}
    field = {"answer": "hash", "branches": 3, "stop": "never"}
    program = {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True, "custom_params": {"dynasor": field}}

    def plain(engine: Any) -> list[str]:
        async def send() -> Any:
            order = enumerate((0, 3, 1, 2, None, -1))
            return await asyncio.gather(*(engine.async_generate(PROMPTS[i], greedy, priority=p) for i, p in order))

        return [out["text"] for out in engine.loop.run_until_complete(send())]

    stock = plain(start_engine(**options))
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=3, **options)
    assert plain(engine) == stock

    async def send() -> Any:
        waits: dict[str, tuple[dict[str, Any], int | None]] = {
            "plain-none": (greedy, None), "program-0": (program, 0), "plain-low": (greedy, 3), "program-high": (program, 5),
            "plain-high": (greedy, 9),
        }  # fmt: skip
        long = {**program, "max_new_tokens": 900}
        calls = {"first": asyncio.ensure_future(engine.async_generate(PROMPTS[0], long, rid="first"))}
        await filled(engine, 3)
        for i, (rid, (params, priority)) in enumerate(waits.items()):
            call = engine.async_generate(PROMPTS[i + 1], params, rid=rid, priority=priority)
            calls[rid] = asyncio.ensure_future(call)
        await arrived(engine, calls)
        engine.tokenizer_manager.abort_request("first")
        return await asyncio.gather(*calls.values(), return_exceptions=True)

    outs = engine.loop.run_until_complete(send())
    assert [out["text"] for out in (outs[1], outs[3])] == [stock[1], stock[3]]
    assert [name for name in started() if name[0] in "pf"] == [
        "first", "plain-high", "program-high", "plain-low", "program-0", "plain-none"
    ]  # fmt: skip
    assert_nothing_left(engine)


@pytest.mark.engine
def test_the_urgent_go_before_those_that_were_retracted(
    start_engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By SGLang's forced retraction of a program that is less urgent; after each of its looks ours are in front again, and all end."""
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 12)
    log = tmp_path / "passed"
    log.touch()
    note = Front.note_admitted

    def noting(self: Front, batch: Any) -> None:
        has_stepped_back = bool(self._stood)
        note(self, batch)
        assert self.scheduler.waiting_queue[: len(self)] == [
            req for req in self.scheduler.waiting_queue if req in self.reqs
        ]
        if has_stepped_back and batch is not None:
            with log.open("a") as out:
                out.writelines(f"{'ours' if tag_of(req) else req.rid}\n" for req in batch.reqs)

    monkeypatch.setattr(Front, "note_admitted", noting)  # schedulers fork from here
    options = {"enable_priority_scheduling": True, "disable_priority_preemption": True, "max_running_requests": 8}
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=4, **options)
    field = {"answer": "hash", "branches": 4, "stop": "never"}
    program = {"temperature": 1.0, "max_new_tokens": 300, "ignore_eos": True, "custom_params": {"dynasor": field}}

    async def send() -> Any:
        asked = [engine.async_generate(PROMPTS[i], program, rid=f"program-{i}", priority=0) for i in range(2)]
        calls = [asyncio.ensure_future(one) for one in asked]
        await filled(engine, 8)
        params = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
        for i in range(200):  # until one came while those that were retracted waited
            await asyncio.sleep(0.02)
            one = engine.async_generate(PROMPTS[i % 12], params, rid=f"plain-{i}", priority=5)
            calls.append(asyncio.ensure_future(one))
            if i >= 11 and "plain" in log.read_text():
                break
        return await asyncio.gather(*calls)

    outs = engine.loop.run_until_complete(send())
    assert all(out["meta_info"]["dynasor"]["num_branches"] == 4 for out in outs[:2])
    assert all(len(out["output_ids"]) == 30 for out in outs[2:])
    assert "plain" in log.read_text()
    assert_nothing_left(engine)

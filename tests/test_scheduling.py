"""Order, gangs, deadlines and tenants in the real engine, seen through what its scheduler admits."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import arrived, assert_nothing_left, filled, settled, status_of
from fastapi import HTTPException
from questions import held_out, prompt
from sglang.srt.managers import scheduler

from sglang_dynasor.engine.fence import MOST_IN_A_ROW
from sglang_dynasor.engine.live import tag_of
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.policy.admission import Admission

pytestmark = pytest.mark.engine
QUESTIONS = held_out(40)
Batches = list[list[tuple[str, int]]]  # per prefill batch: (program's rid, branch), or (plain rid, -1)


def params(max_new_tokens: int = 60, **field: Any) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "max_new_tokens": max_new_tokens,
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }


@pytest.fixture
def admitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Batches]:
    """What engines started after this admit, prefill batch by prefill batch."""
    log = tmp_path / "admitted.jsonl"
    log.touch()
    note = Front.note_admitted

    def noting(self: Front, batch: Any) -> None:
        if batch is not None:
            running = batch.decoding_reqs or []  # with mixed chunks they come along
            tags = [(tag_of(req), req) for req in batch.reqs if req not in running]
            rows = [(tag.live.program.id, tag.index) if tag else (req.rid, -1) for tag, req in tags]
            with log.open("a") as out:
                out.write(json.dumps(rows) + "\n")
        note(self, batch)

    monkeypatch.setattr(Front, "note_admitted", noting)  # schedulers fork from here
    return lambda: [[tuple(row) for row in json.loads(line)] for line in log.read_text().splitlines()]


def first_seen(batches: Batches) -> list[str]:
    """Programs and plain requests in the order in which they started."""
    return list(dict.fromkeys(name for batch in batches for name, _ in batch))


def run(
    engine: Any,
    requests: list[tuple[str, dict[str, Any]]],
    text: str | None = None,
    num_first: int = 0,
    num_rows: int = 0,
    ends_first: bool = True,
) -> list[dict[str, Any]]:
    """Send all at once, by rid; answers in the order of the requests, exceptions among them.

    Args:
        num_first: of them that are sent earlier, and fill so many rows before the others are sent.
        num_rows: of the engine.
        ends_first: end those that were first when all have come.
    """

    async def send() -> list[Any]:
        prompts = [prompt(q.text) for q in QUESTIONS]
        calls: dict[str, asyncio.Future[Any]] = {}
        for i, (rid, sampling_params) in enumerate(requests):
            if i == num_first > 0:
                await filled(engine, num_rows)
            call = engine.async_generate(text or prompts[i % len(prompts)], sampling_params, rid=rid)
            calls[rid] = asyncio.ensure_future(call)
        if num_first:
            await arrived(engine, calls)
        for rid, _ in requests[: num_first if ends_first else 0]:
            engine.tokenizer_manager.abort_request(rid)
        return await asyncio.gather(*calls.values(), return_exceptions=True)

    return engine.loop.run_until_complete(send())


def filler(num_rows: int, max_new_tokens: int = 900, **field: Any) -> tuple[str, dict[str, Any]]:
    """What takes all rows, and has no vote, until it is ended."""
    field = {"branches": num_rows, "width": num_rows, "stop": "never", "answer": "boxed", **field}
    return "filler", {**params(max_new_tokens, **field), "ignore_eos": True}


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines started after this wait a hundredth of a second in each step, so that none is through too early."""
    note = Front.note_admitted

    def noting(self: Front, batch: Any) -> None:
        time.sleep(0.01)
        note(self, batch)

    monkeypatch.setattr(Front, "note_admitted", noting)  # schedulers fork from here


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"disable_overlap_schedule": True},
        {"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True},
        {"schedule_policy": "lpm"},
    ],
    ids=["overlap", "no overlap", "pages, chunks, mixed", "lpm"],
)
def test_a_gang_is_admitted_whole(start_engine: Any, admitted: Any, extra: dict[str, Any]) -> None:
    """Six rows, gangs of four: one leader computes the prompt, its three siblings follow together; no half gangs."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=6, **extra
    )  # fmt: skip
    requests = [(f"p{i}", {**params(60, branches=4, stop="never"), "ignore_eos": True}) for i in range(6)]
    outs = run(engine, [filler(4), *requests], num_first=1, num_rows=4)
    assert all(out["meta_info"]["dynasor"]["gang"] == 4 for out in outs[1:])
    batches = admitted()
    for i in range(6):
        parts = [[branch for name, branch in batch if name == f"p{i}"] for batch in batches]
        parts = [part for part in parts if part]
        # A chunked prompt shows its leader once per chunk.
        assert all(part == [0] for part in parts[:-1])
        assert parts[-1] == [1, 2, 3]
    # All or nothing: with six rows the next gang of four starts only when the one before has ended.
    assert first_seen(batches) == ["filler", *(f"p{i}" for i in range(6))]
    assert_nothing_left(engine)


def test_siblings_cost_no_second_prompt(start_engine: Any) -> None:
    """Also where the pool decides: the shared prompt is computed once, nothing is retracted."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_total_tokens=900, max_running_requests=32
    )
    outs = run(engine, [(f"p{i}", params(branches=4, stop="never")) for i in range(6)])
    for out in outs:
        record, prompt_tokens = out["meta_info"]["dynasor"], out["meta_info"]["prompt_tokens"] // 4
        assert record["num_cached_tokens"] >= 3 * (prompt_tokens - 1)
    assert_nothing_left(engine)


@pytest.mark.parametrize(
    ("extra", "most"),
    [({"max_running_requests": 2}, 2), ({"max_total_tokens": 400, "max_running_requests": 32}, 3)],
    ids=["rows", "tokens"],
)
def test_a_gang_that_can_never_fit_shrinks(start_engine: Any, extra: dict[str, Any], most: int) -> None:
    """Sixteen at once are asked for on an engine that holds a few: the width shrinks, and the record says so."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=16, **extra)
    outs = run(engine, [(f"p{i}", params(100, stop="margin")) for i in range(3)])
    for out in outs:
        record = out["meta_info"]["dynasor"]
        assert 1 <= record["gang"] <= most
        assert record["stop_reason"] in ("certain", "cap")
    assert_nothing_left(engine)


def test_wide_when_idle_narrow_when_loaded(start_engine: Any) -> None:
    """Alone a program starts most at once on an engine whose rows are not known to be dear; among sixty few more than could decide."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    (alone,) = run(engine, [("alone", params())])
    assert alone["meta_info"]["dynasor"]["gang"] >= 10
    requests = [(f"p{i}", params(stop="beta")) for i in range(60)]
    _, *crowd = run(engine, [filler(64, 250), *requests], num_first=1, num_rows=64)
    gangs = Counter(out["meta_info"]["dynasor"]["gang"] for out in crowd)
    assert sum(num for gang, num in gangs.items() if 4 <= gang <= 6) >= 40, gangs
    narrow = [out["meta_info"]["dynasor"] for out in run(engine, [("narrow", params(width=3))])]
    assert narrow[0]["gang"] == 3


@pytest.mark.parametrize(("stop", "is_whole"), [("never", True), ("predictive:0.02", False)])
def test_load_narrows_only_what_can_stop_early(start_engine: Any, admitted: Any, stop: str, is_whole: bool) -> None:
    """A program that needs its whole cap takes the rows as they come free, before later ones; one that may not does not."""
    requests = [filler(16), ("first", {**params(100, branches=12, stop=stop), "ignore_eos": True})]
    requests += [(f"later{i}", params(100, branches=12)) for i in range(20)]
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, max_running_requests=16, dynasor_patience_tokens=0)
    run(engine, requests, num_first=1, num_rows=16)
    names = [name for batch in admitted() for name, branch in batch if name != "filler" and branch]  # without leaders
    before = names[: next(i for i, name in enumerate(names) if name != "first")]
    assert (len(before) == 11) == is_whole, names[:24]
    assert_nothing_left(engine)


def test_a_price_ends_programs_under_load_only(start_engine: Any) -> None:
    """A crowd that waits for eight rows ends sooner than one program does, which goes on to its cap."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_max_price=0.05, dynasor_width=2, max_running_requests=8
    )
    agreeing = {**params(100, stop="never", branches=8), "temperature": 0.01}  # all of a program's say the same
    (alone,) = run(engine, [("alone", agreeing)])
    record = alone["meta_info"]["dynasor"]
    assert (record["stop_reason"], record["num_branches"], record["price"]) == ("cap", 8, 0.0)
    fillers = [(f"filler{i}", filler(2)[1]) for i in range(4)]  # two branches each, as the operator has it
    requests = [(f"p{i}", agreeing) for i in range(24)]
    crowd = run(engine, [*fillers, *requests], num_first=4, num_rows=8)[4:]
    records = [out["meta_info"]["dynasor"] for out in crowd]
    dear = [record for record in records if record["stop_reason"] == "price"]
    assert len(dear) >= 8
    assert all(0 < record["price"] < 0.05 for record in dear)
    assert status_of(engine)["num_priced_out"] == len(dear)
    assert_nothing_left(engine)


def test_shortest_remaining_first_and_patience(start_engine: Any, admitted: Any) -> None:
    """While a long program fills the engine, a short one that came last goes first; with no patience it does not."""
    requests = [
        filler(4),
        ("long", params(branches=64, stop="never", width=4)),
        ("short", params(branches=4, stop="never")),
    ]
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=4)
    outs = run(engine, requests, num_first=1, num_rows=4)
    assert first_seen(admitted()) == ["filler", "short", "long"]
    assert outs[1]["meta_info"]["dynasor"]["overtaken_tokens"] > 0
    assert outs[2]["meta_info"]["dynasor"]["overtaken_tokens"] == 0
    num_before = len(admitted())
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=4, dynasor_patience_tokens=0
    )
    run(engine, requests, num_first=1, num_rows=4)
    assert first_seen(admitted()[num_before:]) == ["filler", "long", "short"]
    assert status_of(engine)["max_overtaken_tokens"] == 0


def test_plain_requests_go_before_programs_that_came_with_them(start_engine: Any, admitted: Any) -> None:
    """A plain request is the shortest of programs: it waits for rows, never for the line; its own order is SGLang's."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=4)
    plain = {"temperature": 0, "max_new_tokens": 20}
    requests = [filler(4)]
    requests += [(f"p{i}", params(branches=4, stop="never")) for i in range(3)]
    requests += [(f"plain{i}", plain) for i in range(6)]
    run(engine, requests, num_first=1, num_rows=4)
    order = first_seen(admitted())
    assert order == ["filler", *(f"plain{i}" for i in range(6)), "p0", "p1", "p2"]
    assert_nothing_left(engine)


def test_a_waiting_program_is_not_starved_by_plain_requests(start_engine: Any, admitted: Any) -> None:
    """Once later plain requests got what patience allows, room is saved for the program, and it starts before them."""
    plain = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    requests = [filler(4)]
    requests += [("program", params(branches=4, stop="never"))]
    requests += [(f"plain{i}", plain) for i in range(40)]
    options = {"scheduler": "dynasor", "dynasor_strict": True, "dynasor_width": 4, "max_running_requests": 4}
    patience, num_rows = 900, 4
    engine = start_engine(**options, dynasor_patience_tokens=patience)
    outs = run(engine, requests, num_first=1, num_rows=num_rows)
    cost = {rid: out["meta_info"]["prompt_tokens"] + 30 for (rid, _), out in zip(requests[2:], outs[2:], strict=True)}
    before = first_seen(admitted())
    before = before[1 : before.index("program")]
    # What patience allows is served before it, and those that were under way by then finish; no more.
    assert patience - num_rows * max(cost.values()) <= sum(cost[rid] for rid in before)
    assert sum(cost[rid] for rid in before) <= patience + num_rows * max(cost.values())
    assert outs[1]["meta_info"]["dynasor"]["overtaken_tokens"] >= patience
    seen = len(admitted())
    engine = start_engine(**options, dynasor_patience_tokens=10**9)  # without the bound all forty go first
    run(engine, requests, num_first=1, num_rows=num_rows)
    assert first_seen(admitted()[seen:]).index("program") == 41


@pytest.mark.parametrize("is_opened", [True, False])
def test_siblings_follow_though_the_batch_was_full_for_others(
    start_engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_opened: bool
) -> None:
    """SGLang stops reading its queue once a request did not fit. Room for siblings is kept, so they follow at once; they
    would not if the batch were left closed."""
    log = tmp_path / "steps"
    note, real = Front.note_admitted, Front.open_batch

    def noting(self: Front, batch: Any) -> None:
        note(self, batch)
        if batch is not None:
            with log.open("a") as out:
                out.write(f"{self.scheduler.forward_ct} {len(batch.reqs)}\n")

    def opening(self: Front, running_batch: Any) -> None:
        running_batch.batch_is_full = not running_batch.is_empty()  # as after a request that did not fit
        if is_opened:
            real(self, running_batch)

    monkeypatch.setattr(Front, "note_admitted", noting)
    monkeypatch.setattr(Front, "open_batch", opening)
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=4)
    run(engine, [("p", {**params(60, branches=4, stop="beta"), "ignore_eos": True})])
    (first, _), (second, num_siblings) = (map(int, line.split()) for line in log.read_text().splitlines()[:2])
    assert num_siblings == 3
    assert (second - first <= 3) is is_opened


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("patience", [300, 10**9])
def test_room_is_saved_for_a_tenant_that_lags(start_engine: Any, admitted: Any, patience: int) -> None:
    """A gang of one tenant among single branches of another: it starts once its tenant is behind by patience. Without
    the bound it waits for the end of the stream."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=4,
        dynasor_patience_tokens=patience,
    )  # fmt: skip
    single = {**params(30, branches=1, tenant="many"), "ignore_eos": True}
    # Those that run until all have come end one by one, and so do those in their places: rows free one by one.
    requests = [(f"s{i}", {**single, "max_new_tokens": 300 + 7 * i}) for i in range(4)]
    requests += [("gang", params(40, branches=4, stop="beta", tenant="few"))]
    requests += [(f"s{i}", single) for i in range(4, 40)]
    run(engine, requests, num_first=4, num_rows=4, ends_first=False)
    place = first_seen(admitted()).index("gang")
    assert (place < 30) is (patience == 300), place
    assert_nothing_left(engine)


def test_tenants_share_by_weight(start_engine: Any, admitted: Any) -> None:
    """Two tenants with work for the whole run: service follows the weights, whoever came first."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_width=4, max_running_requests=8,
        dynasor_tenant_weights="gold=3",
    )  # fmt: skip
    text = prompt(QUESTIONS[0].text)
    equal = [{**params(40, branches=4, stop="never", tenant=name), "ignore_eos": True} for name in ("free", "gold")]
    free, gold = ([(f"{name}{i}", one) for i in range(30)] for name, one in zip(("free", "gold"), equal, strict=True))
    fillers = [(f"filler{i}", filler(4, tenant="filler")[1]) for i in range(2)]
    run(engine, [*fillers, *free, *gold], text, num_first=2, num_rows=8)
    order = first_seen(admitted())
    started = order[2:30]
    num_gold = sum(name.startswith("gold") for name in started)
    assert 18 <= num_gold <= 24, started
    assert_nothing_left(engine)


@pytest.mark.usefixtures("slow_steps")
def test_deadlines(start_engine: Any) -> None:
    """At the deadline a program answers with its best so far, or the text there is, or none if it never started."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, max_running_requests=8, dynasor_width=8)
    run(engine, [("first", params(4, branches=1))])  # which takes longer than later ones
    endless = {**params(900, branches=8, stop="never", answer="boxed", deadline_s=2.0), "ignore_eos": True}
    (out,) = run(engine, [("endless", endless)])
    record = out["meta_info"]["dynasor"]
    assert record["stop_reason"] == "deadline"
    assert record["answer"] is None
    assert record["certaindex"] == 0.0
    assert out["text"]
    assert out["meta_info"]["finish_reason"]["type"] == "stop"

    outs = run(engine, [("blocker", endless), ("waiting", params(branches=32, stop="never", deadline_s=0.5))])
    assert outs[1]["meta_info"]["dynasor"]["stop_reason"] == "deadline"
    assert outs[1]["meta_info"]["dynasor"]["num_branches"] == 0
    assert outs[1]["text"] == ""

    for num_tries, deadline_s in enumerate((2.0, 6.0, 30.0), 1):  # longer where a slow machine has no vote by then
        (out,) = run(
            engine, [(f"voting{num_tries}", params(branches=64, stop="never", width=1, deadline_s=deadline_s))]
        )
        record = out["meta_info"]["dynasor"]
        assert record["stop_reason"] == "deadline"
        if record["votes"]:
            break
    assert 0 < sum(vote["votes"] for vote in record["votes"]) < 64
    assert record["answer"] is not None
    assert record["answer"] in out["text"]

    (out,) = run(engine, [("in time", params(deadline_s=600))])
    assert out["meta_info"]["dynasor"]["stop_reason"] in ("certain", "cap")
    assert status_of(engine)["num_expired"] == 3 + num_tries
    assert_nothing_left(engine)


def test_a_deadline_is_told_until_it_is_heard(start_engine: Any) -> None:
    """SGLang polls only now and then and drops what was told in between: the deadline holds all the same."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, scheduler_recv_interval=7)
    endless = {**params(900, branches=4, stop="never", deadline_s=0.5), "ignore_eos": True}
    outs = run(engine, [(f"endless{i}", endless) for i in range(5)])
    assert all(out["meta_info"]["dynasor"]["stop_reason"] == "deadline" for out in outs)
    assert_nothing_left(engine)


def test_a_client_cannot_speak_as_the_first_rank(start_engine: Any) -> None:
    """Rids like the server's own are refused, with and without the field; nothing is disturbed."""
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    for rid in ("\0", "\0dynasor-fixed-rows-x", "\0dynasor-deadline-1"):
        outs = run(engine, [(rid, params()), (rid + "2", {"temperature": 0, "max_new_tokens": 8})])
        assert all(isinstance(out, ValueError) and "NUL" in str(out) for out in outs), outs
        assert (
            rid not in engine.tokenizer_manager.rid_to_state
        )  # an abort of it would reach the scheduler, and all of ours
    (out,) = run(engine, [("fine", params())])
    assert out["meta_info"]["dynasor"]["answer"]
    assert_nothing_left(engine)


def test_without_a_radix_cache(start_engine: Any) -> None:
    """Siblings cannot share the prompt's KV: they start together, each with its own, and are counted so."""
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, disable_radix_cache=True, max_total_tokens=2000, dynasor_width=4
    )
    outs = run(engine, [(f"p{i}", params(60, branches=4, stop="never")) for i in range(8)])
    assert all(out["meta_info"]["dynasor"]["gang"] == 4 for out in outs)
    assert all(out["meta_info"]["dynasor"]["num_cached_tokens"] == 0 for out in outs)
    assert_nothing_left(engine)


@pytest.mark.usefixtures("slow_steps")
def test_a_waiting_time_out_holds_for_programs_in_line(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own waiting time-out: a program that has not started is refused, those that run are not."""
    monkeypatch.setenv("SGLANG_REQ_WAITING_TIMEOUT", "2.0")
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, max_running_requests=4)
    run(engine, [("first", params(4, branches=1))])  # which takes longer than later ones
    long = {**params(400, branches=4, stop="never"), "ignore_eos": True}
    outs = run(engine, [("runs", long), ("waits", params())])
    assert outs[0]["meta_info"]["dynasor"]["num_branches"] == 4
    assert isinstance(outs[1], HTTPException)
    assert "waiting timeout" in str(outs[1].detail)
    assert_nothing_left(engine)


@pytest.mark.usefixtures("slow_steps")
def test_retraction_takes_the_youngest_program_whole(
    start_engine: Any, admitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's forced retraction: the victims are the youngest program, all of it, never the plain request; all end."""
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 12)
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, dynasor_width=4)
    requests = [("plain", {"temperature": 0, "max_new_tokens": 120, "ignore_eos": True})]
    long = {
        **params(120, branches=4, stop="never"),
        "ignore_eos": True,
    }  # nobody is through before the first retraction
    requests += [(f"p{i}", long) for i in range(3)]
    outs = run(engine, requests)
    assert all(out["meta_info"]["dynasor"]["num_branches"] == 4 for out in outs[1:])
    times = Counter(row for batch in admitted() for row in batch)
    again = {row for row, num in times.items() if num > 1}
    assert again, "nothing was retracted: the test does not test"
    assert ("plain", -1) not in again
    assert Counter(name for name, _ in again)["p2"] == 4
    assert_nothing_left(engine)


def test_we_step_aside_where_admission_fails_again_and_again(
    start_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look at the line succeeds: what waits is served as stock, what comes is refused with HTTP 503, and plain requests are served."""

    is_broken = False

    def broken(admission: Admission) -> None:
        nonlocal is_broken
        is_broken |= admission.order.num_waiting == 12  # all have come
        if is_broken:
            raise RuntimeError("injected")

    monkeypatch.setattr(Admission, "look", broken)
    engine = start_engine(scheduler="dynasor")
    outs = run(engine, [(f"p{i}", params()) for i in range(12)])
    assert all(out["text"] and "dynasor" not in out["meta_info"] for out in outs)
    status = settled(engine)
    assert status["num_policy_errors"] == MOST_IN_A_ROW
    assert status["is_aside"] == 1
    assert status["num_held_programs"] == status["num_branches_inside"] == 0
    with pytest.raises(HTTPException, match="stepped aside") as refused:
        engine.generate(prompt(QUESTIONS[0].text), params())
    assert refused.value.status_code == 503
    assert engine.generate(prompt(QUESTIONS[0].text), {"max_new_tokens": 4})["text"]

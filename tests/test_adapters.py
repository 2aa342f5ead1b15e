"""LoRA adapters: branches have their program's, wait for a place in the batch in turn, and do not keep one loaded."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapter import make_adapter
from engines import assert_nothing_left, settled
from forked import processes
from questions import held_out, prompt

from sglang_dynasor.engine import hooks
from sglang_dynasor.engine.adapters import is_any_kept_out, let_go
from sglang_dynasor.engine.ends import Ends
from sglang_dynasor.engine.live import LiveProgram, tag_of
from sglang_dynasor.engine.queue import Front
from sglang_dynasor.engine.req import branch_seed
from sglang_dynasor.engine.room import SchedulerRoom

PROMPTS = [prompt(question.text) for question in held_out(30)]


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: str(make_adapter(folder / name, seed)) for seed, name in enumerate("ab")}


def params(max_new_tokens: int = 60, seed: int | None = None, **field: Any) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "sampling_seed": seed}
    return {**sampling, "custom_params": {"dynasor": {"answer": "hash", **field}}} if field else sampling


def run(engine: Any, requests: list[tuple[str, dict[str, Any], str | None]]) -> list[dict[str, Any]]:
    """Send all at once, each a rid, sampling parameters and an adapter's name; answers in their order.

    The scheduler is stopped until all are sent, or who comes first and who finds whom running would be the machine's word.
    """

    manager, num_sent = engine.tokenizer_manager, 0
    send_one = manager._send_one_request

    async def count(*args: Any) -> Any:
        nonlocal num_sent
        await send_one(*args)
        num_sent += 1

    async def send() -> list[Any]:
        calls = [
            asyncio.ensure_future(
                engine.async_generate(PROMPTS[(i + 7) % len(PROMPTS)], sampling, rid=rid, lora_path=adapter)
            )
            for i, (rid, sampling, adapter) in enumerate(requests)
        ]
        while num_sent < len(calls) and not any(call.done() for call in calls):
            await asyncio.sleep(0.01)
        for process in processes(engine):
            os.kill(process.pid, signal.SIGCONT)
        return await asyncio.gather(*calls)

    for process in processes(engine):
        os.kill(process.pid, signal.SIGSTOP)
    manager._send_one_request = count
    try:
        return engine.loop.run_until_complete(send())
    finally:
        del manager._send_one_request


def users_of(engine: Any) -> dict[str, int]:
    """Requests that hold each adapter in the front process."""
    registry = engine.tokenizer_manager.lora_registry
    return {ref.lora_name: registry._counters[ref.lora_id].value() for ref in registry.get_all_adapters().values()}


# Without an engine


def manager(most: int) -> Any:
    lora = SimpleNamespace(validate_lora_batch=lambda adapters: len(adapters) <= most)
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=lora)))


@pytest.mark.parametrize(
    ("running", "queued", "is_kept_out"),
    [
        ([], [], False),
        (["a", "b"], ["a", "b", "a"], False),
        (["a"], ["b", "b"], False),
        (["a", "b"], [None], True),
        ([], ["a", "b", None], True),
        (["a", "a"], ["a", None, "b"], True),
    ],
)
def test_who_is_kept_out(running: list[Any], queued: list[Any], is_kept_out: bool) -> None:
    """By SGLang's own check, in the order in which it goes through its queue; the base model takes a place, too."""
    assert is_any_kept_out(manager(2), running, queued) is is_kept_out


def test_only_what_ends_gives_its_adapter_up() -> None:
    def one(adapter: str | None, to_finish: object) -> Any:
        return SimpleNamespace(lora_id=adapter, to_finish=to_finish, skip_radix_cache_insert=False)

    reqs = [one("a", "ended"), one("a", None), one("b", "ended"), one(None, "ended")]
    let_go(reqs, "a")
    assert [(req.lora_id, req.skip_radix_cache_insert) for req in reqs] == [
        (None, True), ("a", False), ("b", False), (None, False)
    ]  # fmt: skip


# In the real engine


@pytest.mark.engine
def test_branches_have_the_adapter_of_their_program(shared_engine: Any, paths: dict[str, str]) -> None:
    """Each says what a plain request with that adapter and its seed says; its prompt is in the cache under that adapter."""
    engine = shared_engine(scheduler="dynasor", dynasor_strict=True, lora_paths=paths, max_loras_per_batch=2)
    judge = {"judge": "self", "judge_suffix": "\nGood:", "judge_good": "1", "judge_bad": "0"}
    for field in ({}, {"vote": "best", **judge}):
        field = {"branches": 3, "stop": "never", **field}
        outs = {a: run(engine, [(f"p{a}", params(seed=7, **field), a)])[0] for a in ("a", "b", None)}
        plain = {
            a: {run(engine, [(f"{a}{i}", params(seed=branch_seed(7, i)), a)])[0]["text"] for i in range(3)}
            for a in outs
        }
        assert all(out["text"] in plain[adapter] for adapter, out in outs.items())
        assert plain["a"] != plain["b"] != plain[None] != plain["a"]  # an adapter does something here
        for out in outs.values():
            record, prompt_tokens = out["meta_info"]["dynasor"], out["meta_info"]["prompt_tokens"] // 3
            assert record["num_cached_tokens"] >= 2 * (prompt_tokens - 1)
            assert ("num_judge_tokens" in record) is ("judge" in field)
    assert users_of(engine) == {"a": 0, "b": 0}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What engines started after this take into prefill batches, whom they find no adapter's place for, and who gives one up."""
    log = tmp_path / "seen.jsonl"
    log.touch()

    def tell(*line: Any) -> None:
        with log.open("a") as out:
            out.write(json.dumps(line) + "\n")

    note, has_room, answer = Front.note_admitted, SchedulerRoom.has_adapter_room, Ends.answer

    def noting(self: Front, batch: Any) -> None:
        for req in [] if batch is None else batch.reqs:
            tag = tag_of(req)
            tell("in", tag.live.program.id if tag else req.rid)
        note(self, batch)

    def asking(self: SchedulerRoom, gang: Any) -> bool:
        if not (found := has_room(self, gang)):
            tell("kept out", gang.program.id)
        return found

    def answering(self: Ends, live: LiveProgram) -> None:
        parent, is_over = live.parent, live.program.id.startswith("unload")
        answer(self, live)
        if is_over and parent is not None and not self.programs.holds(live):  # its client unloads it at once
            result = self.scheduler.unload_lora_adapter(SimpleNamespace(lora_id=parent.lora_id, lora_name="b", to_ref=lambda: SimpleNamespace(lora_id=parent.lora_id, lora_name="b", lora_path="", pinned=False)))  # fmt: skip
            tell("unloaded", parent.lora_id, result.success)

    def letting(reqs: Any, adapter: str) -> None:
        let_go(there := list(reqs), adapter)
        tell("let go", sum(req.to_finish is not None and req.lora_id is None for req in there))

    monkeypatch.setattr(Front, "note_admitted", noting)  # schedulers fork from here
    monkeypatch.setattr(SchedulerRoom, "has_adapter_room", asking)
    monkeypatch.setattr(Ends, "answer", answering)
    monkeypatch.setattr(hooks, "let_go", letting)

    def lines() -> list[list[Any]]:
        found = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("")
        return found

    return lines


@pytest.mark.engine
def test_places_for_adapters_go_in_turn(start_engine: Any, seen: Any, paths: dict[str, str]) -> None:
    """A stream of plain requests that keeps both places taken does not keep a program out; who needs no place waits for none.

    And an adapter may be unloaded as soon as its program is answered, while siblings still have a step to go.
    """
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, dynasor_patience_tokens=500, lora_paths=paths, max_loras_per_batch=2,
        max_running_requests=8,
    )  # fmt: skip

    def flood(adapter: str | None) -> list[str]:
        """Who started when a program with this adapter came after the first of many plain requests with the others."""
        stream = [(f"plain-{i}", {**params(20 + i % 7), "ignore_eos": True}, "ab"[i % 2]) for i in range(60)]
        program = ("program", params(20, branches=4, stop="never"), adapter)
        outs = run(engine, [*stream[:16], program, *stream[16:]])
        assert outs[16]["meta_info"]["dynasor"]["num_branches"] == 4
        assert all(out["meta_info"]["completion_tokens"] >= 20 for out in outs[:16] + outs[17:])
        assert_nothing_left(engine)
        return [f"{what}: {name}" for what, name in seen()]

    started = flood(None)
    assert "kept out: program" in started
    # Of those that came later some start before it, as patience has it, and not all: what is started once it is over is not seen.
    assert 8 < sum(line.startswith("in: plain") for line in started[: started.index("in: program")]) < 45
    assert "kept out: program" not in flood("a")

    stock = engine.generate(PROMPTS[7:11], {"temperature": 0, "max_new_tokens": 60})
    requests = [(f"plain-{i}", {"temperature": 0, "max_new_tokens": 60}, None) for i in range(4)]
    outs = run(engine, [*requests, ("unload", params(60, branches=4, width=4, stop="beta:0.5"), "b")])
    assert [out["text"] for out in outs[:4]] == [out["text"] for out in stock]
    lines = [line for line in seen() if line[0] in ("let go", "unloaded")]
    assert [line[0] for line in lines] == ["let go", "unloaded"]
    assert lines[0][1] > 0  # siblings had a step to go
    assert lines[1][2]
    assert settled(engine)["num_branches_inside"] == 0
    assert [out["text"] for out in engine.generate(PROMPTS[7:11], {"temperature": 0, "max_new_tokens": 60})] == [
        out["text"] for out in stock
    ]
    assert_nothing_left(engine)

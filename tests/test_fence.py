"""Nothing of ours ends an engine: every function that SGLang reaches is made to raise, once and always."""

from __future__ import annotations

import asyncio
import inspect
import sys
import uuid
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import walk
from engines import GIVEN_BACK, settled
from fastapi import HTTPException
from questions import held_out, prompt
from sglang.srt.managers import scheduler

from sglang_dynasor.engine import comparing, fence, hooks
from sglang_dynasor.engine.fence import FENCE, MOST_IN_A_ROW, Fence
from sglang_dynasor.engine.live import Keeper
from sglang_dynasor.engine.room import SchedulerRoom
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy import admission
from sglang_dynasor_patches.records import PATCHES

pytestmark = pytest.mark.engine
QUESTIONS = [prompt(question.text) for question in held_out(12)]
END = "</think>\n####"
THOUGHT = {"algorithm": "long_cot", "think_end": END, "probe_suffix": END, "probe_tokens": 8, "min_tokens": 8}
SOON_S = 0.02
JUDGED = {"vote": "reward", "judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
# What brings into play all that a scheduler has of ours.
FIELDS: tuple[dict[str, Any], ...] = (
    {"branches": 6, "width": 3},
    {"branches": 3, "tenant": "a", "deadline_s": 60},
    {"branches": 2, **JUDGED},
    {"branches": 3, "equal": "model:0.5"},
    {"branches": 3, "equal": "symbolic"},
    {"branches": 4, "budget_tokens": 300},
    {"branches": 3, "vote": "confidence", "weak_frac": 0.5},
    {**THOUGHT, "branches": 3, "stop": "trials:0.8"},
    {**THOUGHT},
    {"branches": 4, "deadline_s": 0.05},
    {"branches": 4, "deadline_s": SOON_S},
)
NUM_SENT = 3  # branches of a client's own
# What makes the scheduler end where a row or a KV token is lost.
MEMORY_CHECKS = (
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS", "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK",
)  # fmt: skip


class Guests:
    """Who is served while something raises: plain requests, and programs of every kind."""

    def __init__(self, engine: Any):
        self.engine = engine

    def served(self) -> tuple[list[str], list[Any]]:
        """The greedy texts of plain requests, and what the clients of programs got: answers or refusals, nothing else."""
        return self.engine.loop.run_until_complete(asyncio.wait_for(self._serve(), 200))

    def looked_at(self, audit: Callable[[], list[str]]) -> list[str]:
        """What is found wrong while they are served."""

        async def look() -> list[str]:
            serving = asyncio.ensure_future(self._serve())
            found: list[str] = []
            while not serving.done():
                found += await asyncio.to_thread(audit)
                await asyncio.sleep(0.003)
            await serving
            return found

        return self.engine.loop.run_until_complete(asyncio.wait_for(look(), 200))

    def left(self) -> dict[str, int]:
        """What is not given back."""
        status = settled(self.engine)
        return {key: status[key] for key in status if key in GIVEN_BACK and status[key]}

    def ask_wrongly(self) -> None:
        self.engine.generate("Q", {"custom_params": {"dynasor": {"branches": "many"}}})

    async def _serve(self) -> tuple[list[str], list[Any]]:
        name = uuid.uuid4().hex
        fields = [*FIELDS, *[{"branches": NUM_SENT, "program": name}] * NUM_SENT]
        asked = [self._plain(question) for question in QUESTIONS[:3]]
        asked += [self._program(i, field, f"{name}-{i}") for i, field in enumerate(fields)]
        asked += [self._aborted(f"{name}-aborted"), self.engine.tokenizer_manager.get_internal_state()]
        *outs, _, _ = await asyncio.gather(*asked, return_exceptions=True)
        for out in outs[3:]:
            if not isinstance(out, dict) and not (isinstance(out, HTTPException) and out.status_code == 503):
                raise AssertionError(f"a client got {out!r}")
        return [out["text"] if isinstance(out, dict) else repr(out) for out in outs[:3]], outs[3:]

    def _plain(self, question: str) -> Any:
        return self.engine.async_generate(question, {"temperature": 0, "max_new_tokens": 24})

    def _program(self, number: int, field: dict[str, Any], rid: str, **more: Any) -> Any:
        question = QUESTIONS[number % 12] + ("<think>\n" if "algorithm" in field else "")
        if field.get("deadline_s") == SOON_S:
            question = "x " * 450  # its time is up in the middle of the prompt
        custom = {"dynasor": {"answer": "hash", **field}}
        params = {"temperature": 1, "max_new_tokens": 24, "custom_params": custom, **more}
        return self.engine.async_generate(question, params, rid=rid)

    async def _aborted(self, rid: str) -> None:
        task = asyncio.ensure_future(self._program(11, {"stop": "never"}, rid, max_new_tokens=150, ignore_eos=True))
        await asyncio.sleep(0.03)
        self.engine.tokenizer_manager.abort_request(rid)
        await asyncio.gather(task, return_exceptions=True)


def entries() -> set[walk.Name]:
    """What SGLang calls of ours by name, or has policy call: the hooks, what admission asks of an engine, the keepers of requests."""
    hooks = [patch.hook.rpartition(".") for patch in PATCHES if patch.role == "scheduler" and patch.is_fenced]
    found = {(module, name) for module, _, name in hooks}
    asked = [name for name in _methods(admission.Engine) if hasattr(SchedulerRoom, name)]  # others are attributes
    found |= {("sglang_dynasor.engine.room", f"SchedulerRoom.{name}") for name in asked}
    for module in [name for name in sys.modules if name.startswith("sglang_dynasor.engine.")]:
        for name, value in inspect.getmembers(sys.modules[module], inspect.isclass):
            keeps = value.__module__ == module and all(hasattr(value, method) for method in _methods(Keeper))
            if keeps and not getattr(value, "_is_protocol", False):
                found |= {(module, f"{name}.{method}") for method in _methods(Keeper)}
    return found


def _methods(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch, start_engine: Any) -> Iterator[tuple[Guests, walk.Remote]]:
    for name in MEMORY_CHECKS:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(comparing, "LABELS", ((" good", " bad"),))  # words of this model
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 23)
    with walk.remote(monkeypatch) as faults:
        yield (
            Guests(
                start_engine(
                    scheduler="dynasor", chunked_prefill_size=64, max_total_tokens=4000, max_running_requests=24
                )
            ),
            faults,
        )


@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=pytest.mark.deep)])
def test_whatever_raises(walked: tuple[Guests, walk.Remote], stride: int) -> None:
    """Neighbours get what they got before, every client is answered, nothing is left, and the engine lives."""
    guests, faults = walked
    faults("renew")
    plain, _ = guests.served()
    faults("watch")
    for _ in range(3):
        assert guests.served()[0] == plain
    seen = faults("seen")
    # Where nothing has failed, nothing is found wrong.
    assert [guests.looked_at(lambda: faults("audit")) for _ in range(3)] == [[], [], []]
    asked = entries()
    hooks = sorted(name for name in asked if name[0].endswith(".hooks"))
    assert (
        len(set(hooks) - set(seen)) <= 3
    )  # one takes metrics, one a request that is turned away, one unloads an adapter
    # What leaves something half done where it raises: programs begin anew.
    halves = [("sglang_dynasor.engine.inside", f"Inside.{name}") for name in ("put", "leave")]
    assert set(halves) <= set(seen)
    names = [*hooks, *halves, *sorted({*seen, *asked} - {*hooks, *halves})[::stride]]
    num_raised, num_aside, wrong = 0, 0, list[Any]()
    for name, always in product(names, (False, True)):
        print(*name, always, flush=True)  # to tell who it was, should somebody not be answered
        faults("arm", name, always=always)
        texts, _ = guests.served()
        num_raised += faults("disarm") > 0
        num_aside += faults("renew")
        left = guests.left()
        if texts != plain or left:
            wrong.append((name, always, texts, left))
    assert wrong == []
    assert num_raised > 0.8 * 2 * len(names)
    assert num_aside > 0
    assert settled(guests.engine)["num_fresh_starts"] > 0
    _, outs = guests.served()  # programs are served as before
    assert all("dynasor" in out["meta_info"] for out in outs)


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.deep)])
def test_whatever_raises_in_the_front_process(walked: tuple[Guests, walk.Remote], stride: int) -> None:
    """Requests go on as SGLang takes them, and a wrong field is an HTTP 400 as soon as it can be seen that it is wrong."""
    guests, _ = walked
    plain, _ = guests.served()
    here = walk.Faults()

    def seen() -> set[walk.Name]:
        here.watch()
        guests.served()
        return set(here.seen())

    always_seen = sorted(seen() & seen() & seen())
    assert ("sglang_dynasor.engine.validation", "validate") in always_seen
    assert ("sglang_dynasor.engine.front", "add_record") in always_seen
    names, num_before, num_raised, wrong = always_seen[::stride], FENCE.num, 0, list[Any]()
    for name, always in product(names, (False, True)):
        print(*name, always, flush=True)
        here.arm(name, always=always)
        texts, _ = guests.served()
        num_raised += here.disarm() > 0
        left = guests.left()
        if texts != plain or left:
            wrong.append((name, always, texts, left))
    assert wrong == []
    assert num_raised > 0.8 * 2 * len(names)
    assert FENCE.num - num_before >= num_raised - 2
    with pytest.raises(FieldError):
        guests.ask_wrongly()


# The guard by itself


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Fence:
    made = Fence()
    monkeypatch.setattr(fence, "FENCE", made)
    return made


@pytest.mark.parametrize(("place", "num_calls", "num_faults"), [("", 1, 0), ("before", 1, 1), ("after", 1, 1)])
def test_a_function_of_sglang_s_runs_once(own: Fence, place: str, num_calls: int, num_faults: int) -> None:
    """Wherever the hook around it raises; and what it gave stays."""
    calls: list[int] = []

    def original(number: int) -> int:
        calls.append(number)
        return number + 1

    @fence.around("hook")
    def hook(original: Any, number: int) -> int:
        if place == "before":
            raise RuntimeError("injected")
        found = original(number)
        if place == "after":
            raise RuntimeError("injected")
        return found

    assert hook(original, 7) == 8
    assert (len(calls), own.num, own.is_in_doubt) == (num_calls, num_faults, num_faults > 0)


def test_what_sglang_raises_is_not_ours(own: Fence) -> None:
    """It passes as it came, and is not counted."""
    with pytest.raises(ZeroDivisionError):
        fence.around("hook")(lambda original: original())(lambda: 1 / 0)
    assert own.num == 0


@pytest.mark.parametrize("kind", ["before", "after", "around"])
def test_what_is_raised_on_purpose_passes(own: Fence, kind: str) -> None:
    """In the front process a wrong field; elsewhere nothing does."""

    def wrong(*args: Any) -> None:
        raise FieldError("no")

    given = [lambda: 7] if kind == "around" else []
    with pytest.raises(FieldError):
        fence.hook(kind, wrong, FieldError)(*given)
    assert own.num == 0
    assert fence.hook(kind, wrong)(*given) == (7 if given else None)
    assert own.num == 1


def test_we_leave_after_so_many_of_one_kind_in_a_row(own: Fence) -> None:
    """Not after as many of two kinds, nor with a program answered in between, nor where only a branch abstains."""
    for number in range(2 * MOST_IN_A_ROW - 2):
        own.fall_back("ab"[number % 2], RuntimeError())
        own.fall_back("vote", RuntimeError(), is_contained=True)
    assert not own.is_to_leave
    own.note_answer()
    own.fall_back("a", RuntimeError())
    assert not own.is_to_leave
    for _ in range(MOST_IN_A_ROW - 1):
        assert not own.is_to_leave
        own.fall_back("a", RuntimeError())
    assert own.is_to_leave
    own.is_aside = True
    assert not own.is_to_leave


def test_a_strict_guard_lets_all_through() -> None:
    """For tests and soaks."""
    with pytest.raises(RuntimeError):
        Fence(is_strict=True).fall_back("a", RuntimeError())


def test_a_scheduler_counts_from_nothing(own: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forked from a process that may have faults of its own; also one of stock SGLang, which knows no word of ours."""
    monkeypatch.setattr(hooks, "FENCE", own)
    for _ in range(MOST_IN_A_ROW):
        own.fall_back("a", RuntimeError())
    assert own.is_to_leave
    hooks.init_schedule_policy(None, SimpleNamespace(server_args=SimpleNamespace()))
    assert not own.is_to_leave
    assert not own.is_in_doubt

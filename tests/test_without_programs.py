"""Options that programs do not work with: the server starts, serves plain requests as stock SGLang, and refuses the field with a reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engines import status_of
from questions import held_out, prompt

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.flag import WITHOUT_PROGRAMS, serves_programs, why_off

PROMPTS = [prompt(question.text) for question in held_out(4)]
GREEDY = {"temperature": 0, "max_new_tokens": 40}
OTHERS = {
    "speculative_algorithm": "NGRAM",
    "pp_size": 2,
    "attn_dp_size": 2,
    "disaggregation_mode": "prefill",
}


@pytest.mark.parametrize(("name", "fine", "why"), WITHOUT_PROGRAMS)
def test_each_option_is_named(name: str, fine: tuple[Any, ...], why: str) -> None:
    """With its value and why; with the values that are fine there are programs."""
    usual: dict[str, Any] = {option: values[0] for option, values, _ in WITHOUT_PROGRAMS}
    usual |= {"enable_priority_scheduling": False, "disable_priority_preemption": False}
    for value in fine:
        assert why_off(SimpleNamespace(**{**usual, name: value})) == ""
    off = why_off(SimpleNamespace(**{**usual, name: OTHERS.get(name, True)}))
    assert off.startswith(f"This server takes no programs: --{name.replace('_', '-')}={OTHERS.get(name, True)!r} ")
    assert why in off
    for scheduler, reason, serves in (("dynasor", "", True), ("dynasor", off, False), (None, "", False)):
        args = SimpleNamespace(_dynasor=DynasorConfig(scheduler), _dynasor_off=reason)
        assert serves_programs(args) is serves


@pytest.mark.parametrize(
    ("has_priorities", "has_no_preemption", "is_off"),
    [(False, False, False), (False, True, False), (True, True, False), (True, False, True)],
)
def test_priorities_work_where_nobody_is_preempted(has_priorities: bool, has_no_preemption: bool, is_off: bool) -> None:
    args = SimpleNamespace(enable_priority_scheduling=has_priorities, disable_priority_preemption=has_no_preemption)
    assert why_off(args).startswith("This server takes no programs: --enable-priority-scheduling ") is is_off


@pytest.mark.engine
def test_plain_requests_are_served_and_programs_refused(start_engine: Any) -> None:
    """The texts are those of the same engine without the flag. A session goes on after a turn that was refused."""
    options = {"enable_priority_scheduling": True, "enable_streaming_session": True}
    stock = [out["text"] for out in start_engine(**options).generate(PROMPTS, GREEDY)]
    engine = start_engine(scheduler="dynasor", dynasor_strict=True, **options)
    assert [out["text"] for out in engine.generate(PROMPTS, GREEDY)] == stock
    for field in ({"algorithm": "self_consistency"}, "self_consistency", {"branches": -1}):
        params = {"temperature": 1.0, "max_new_tokens": 40, "custom_params": {"dynasor": field}}
        with pytest.raises(ValueError, match="takes no programs: --enable-priority-scheduling "):
            engine.generate(PROMPTS[0], params)
    assert [out["text"] for out in engine.generate(PROMPTS, {**GREEDY, "custom_params": {"mine": 1}})] == stock
    session = {"id": engine.open_session(2000, streaming=True)}
    params = {**GREEDY, "custom_params": {"dynasor": {}}}
    with pytest.raises(ValueError, match="takes no programs: "):
        engine.generate(PROMPTS[0], params, session_params=session)
    assert engine.generate(PROMPTS[0], GREEDY, session_params=session)["text"] == stock[0]
    assert "--enable-priority-scheduling" in status_of(engine)["off"]

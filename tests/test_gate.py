"""Requests of tokenizer workers, in which SGLang loads no plugins: the scheduler says what is wrong with them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from engines import assert_nothing_left
from questions import held_out, prompt

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import claims, flag, gate, place, streamer, validation
from sglang_dynasor.errors import ConfigError, FieldError

PROMPTS = [prompt(question.text) for question in held_out(4)]
GREEDY = {"temperature": 0, "max_new_tokens": 40}
SAMPLED = {"temperature": 1.0, "max_new_tokens": 40}


@pytest.mark.parametrize("option", ["dynasor_templates", "dynasor_default", "dynasor_log", "dynasor_owner_header"])
def test_what_takes_a_front_process_is_refused_at_the_start(option: str, tmp_path: Any, monkeypatch: Any) -> None:
    """And not where there is one."""
    from types import SimpleNamespace

    monkeypatch.setattr("sglang_dynasor_patches.install.require_live", lambda roles: None)
    file = tmp_path / "file"
    file.touch()
    values = {"dynasor_default": "self_consistency", "dynasor_owner_header": "x-user"}
    given: dict[str, Any] = {option: values.get(option, str(file))}
    config = DynasorConfig(scheduler="dynasor", **given)
    priorities = {"enable_priority_scheduling": False, "disable_priority_preemption": False}
    one: Any = SimpleNamespace(tokenizer_worker_num=1, **priorities)
    assert flag.serves_programs(flag.attach(one, config))
    two: Any = SimpleNamespace(tokenizer_worker_num=2, **priorities)
    with pytest.raises(ConfigError, match=r"does not work with --tokenizer-worker-num above 1"):
        flag.attach(two, config)
    assert flag.serves_programs(flag.attach(two, DynasorConfig(scheduler="dynasor")))


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"branchs": 3}, SAMPLED, "dynasor.branchs is not a key of the field"),
    ({"branches": 0}, SAMPLED, "dynasor.branches"),
    ({"answer": "hash"}, GREEDY, "greedy branches would all be the same"),
    ({"answer": "hash"}, {**SAMPLED, "top_k": 1}, "greedy branches would all be the same"),
    ({"program": "p"}, SAMPLED, "whose workers know only their own"),
    ({"budget_tokens": 100}, SAMPLED, "whose workers know only their own"),
    ({"answer": "hash"}, {**SAMPLED, "n": 2}, "n=2 with dynasor"),
    ({"answer": "hash"}, {**SAMPLED, "max_new_tokens": 0}, "leaves no room for an answer"),
    ({"judge": "self", "judge_suffix": "?", "judge_good": "hello world", "judge_bad": "b"}, SAMPLED, "tokens of this model"),
    ({"equal": "embedding"}, SAMPLED, "without an embedding server"),
    ({"algorithm": "long_cot", "answer": "hash"}, {**SAMPLED, "regex": "a+"}, "regex with dynasor.algorithm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "why"),
    [([0, 511], ""), ([7], ""), ([3, 512], r"input_ids has 512, outside \[0, 512\)"), ([-1, 3], "input_ids has -1,"), ([], "no tokens")],
)  # fmt: skip
def test_what_a_scheduler_dies_of_is_seen(ids: list[int], why: str) -> None:
    """At either end of the vocabulary, in a front process (a list) and in a scheduler (an array), whose loop waits for it."""
    for given in (ids, array("q", ids) * 100_000):
        with pytest.raises(FieldError, match=why) if why else nullcontext():
            validation.check_harmless(given, {}, 512)
    validation.check_harmless(None, {}, 512)


def test_a_scheduler_looks_at_a_long_prompt_without_a_walk() -> None:
    """A loop over its tokens took fifty times as long."""
    long = array("q", range(512)) * 2000

    def took(look: Callable[[], Any]) -> float:
        before = time.process_time()
        look()
        return time.process_time() - before

    walk = min(took(lambda: all(0 <= token < 512 for token in long)) for _ in range(3))
    assert min(took(lambda: validation.check_harmless(long, {}, 512)) for _ in range(3)) < walk / 5


@pytest.mark.engine
def test_the_scheduler_refuses_what_is_wrong(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with HTTP 400 and the reason; a right field is served, and plain requests as ever."""
    for module in (validation, place, claims):  # as if no plugin were in the front process
        monkeypatch.setattr(module, "serves_programs", lambda server_args: False)
    for module in (gate, streamer):  # schedulers fork from here
        monkeypatch.setattr(module, "has_many_fronts", lambda server_args: True)
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    stock = [out["text"] for out in engine.generate(PROMPTS, GREEDY)]
    for field, sampling, why in WRONG:
        with pytest.raises(ValueError, match=why):
            engine.generate(PROMPTS[0], {**sampling, "custom_params": {"dynasor": field}})
    params = {**SAMPLED, "custom_params": {"dynasor": {"answer": "hash", "branches": 3, "stop": "never"}}}
    with pytest.raises(ValueError, match="begins with a NUL"):
        engine.generate(PROMPTS[0], GREEDY, rid="\0dynasor-")
    outs = engine.generate(PROMPTS + PROMPTS, [params] * 4 + [GREEDY] * 4)
    assert [out["meta_info"]["dynasor"]["num_branches"] for out in outs[:4]] == [3] * 4
    assert [out["text"] for out in outs[4:]] == stock
    assert not any("dynasor" in out["meta_info"] for out in outs[4:])
    one = engine.generate(PROMPTS[0], {**GREEDY, "custom_params": {"dynasor": {"branches": 1}}})
    assert one["text"] == stock[0]  # greedy is fine where nothing else would be the same
    assert_nothing_left(engine)

"""Requests without the field are served as by stock SGLang."""

from __future__ import annotations

from typing import Any

import pytest
from questions import held_out, prompt

pytestmark = pytest.mark.engine
QUESTIONS = held_out(48)


def outputs(engine: Any) -> list[tuple[str, int, Any]]:
    outs = engine.generate([prompt(q.text) for q in QUESTIONS], {"temperature": 0, "max_new_tokens": 120})
    return [(o["text"], o["meta_info"]["completion_tokens"], o["meta_info"]["finish_reason"]) for o in outs]


def test_plain_requests_have_the_outputs_of_stock(start_engine: Any) -> None:
    """Greedy: the same texts, lengths and finish reasons, also with programs running beside them."""
    stock = outputs(start_engine())
    engine = start_engine(scheduler="dynasor", dynasor_strict=True)
    assert outputs(engine) == stock
    # One batch of both: programs first, plain requests behind them.
    field = {"temperature": 1.0, "max_new_tokens": 120, "custom_params": {"dynasor": {"answer": "hash"}}}
    prompts = [prompt(q.text) for q in QUESTIONS]
    mixed = engine.generate(
        prompts[:16] + prompts, [field] * 16 + [{"temperature": 0, "max_new_tokens": 120}] * len(prompts)
    )
    assert [o["text"] for o in mixed[16:]] == [text for text, _, _ in stock]
    assert all("dynasor" in o["meta_info"] for o in mixed[:16])
    assert all("dynasor" not in o["meta_info"] for o in mixed[16:])


def test_without_the_flag_nothing_of_ours_runs(start_engine: Any) -> None:
    """The plugin is installed, the flag is not given: the field is ignored as stock SGLang ignores it."""
    engine = start_engine()
    out = engine.generate(prompt(QUESTIONS[0].text), {"temperature": 0, "custom_params": {"dynasor": {"nonsense": 1}}})
    assert "dynasor" not in out["meta_info"]
    assert "dynasor" not in engine.get_server_info()["internal_states"][0]

"""What a type checker sees of the public API. `make lint` has pyright read this file; nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Generator
from typing import Any, assert_type

import sglang_dynasor
from sglang_dynasor import solve
from sglang_dynasor.errors import ConfigError, DynasorError, FieldError
from sglang_dynasor.frontend import Branch, Endpoint, LocalEngine, Reasoning, reason
from sglang_dynasor.offline import Result, Results
from sglang_dynasor.policy.evidence import Evidence


def length_reward(question: str, text: str) -> float | None:
    return min(1.0, len(text) / len(question)) if question else None


def batches(engine: Any) -> None:
    assert_type(sglang_dynasor.__version__, str)
    results = solve(
        engine, ["one", "two"], "rebase", branches=16, reward=length_reward, sampling={"max_new_tokens": 200}
    )
    assert_type(results, Results)
    assert_type(len(results), int)
    assert_type(results.wall_s, float)
    assert_type(results.num_tokens, int)
    assert_type(results.rows(), list[dict[str, Any]])
    assert_type(results.table(), str)
    for result in results:
        assert_type(result, Result)
    first = results[0]
    assert_type(first.answer, str | None)
    assert_type(first.certaindex, float)
    assert_type(first.num_branches, int)
    assert_type(first.stop_reason, str)
    assert_type(first.record, dict[str, Any])
    solve(engine, (text for text in ["one"]), max_tokens=200)
    solve(engine, [[{"role": "user", "content": "one"}], "two"])
    solve(engine, 3)  # pyright: ignore[reportArgumentType]
    solve(engine, ["one"], reward=len)  # pyright: ignore[reportArgumentType]
    first.answer = "19"  # pyright: ignore[reportAttributeAccessIssue]


def backends(engine: Any) -> None:
    assert_type(Endpoint("http://127.0.0.1:30000", rows=8), Endpoint)
    Endpoint(30000)  # pyright: ignore[reportArgumentType]
    with LocalEngine(engine, chat_template="chatml") as backend:
        assert_type(backend, LocalEngine)
        solve(backend, ["one"])


def programs(state: Any) -> None:
    def agreed(evidence: Evidence) -> bool:
        return evidence.num_votes > 3

    with reason(state, branches=16, answer="hash", stop=agreed, seed=1) as p:
        assert_type(p, Reasoning)
        for branch in p.fork():
            assert_type(branch, Branch)
        assert_type(p.as_completed(), Generator[Branch])
        p.report(0, reward=0.5)
        p.report(0, reward="good")  # pyright: ignore[reportArgumentType]
    assert_type(p.answer, str | None)
    assert_type(p.certaindex, float)
    assert_type(p.votes, dict[str, int])
    assert_type(p.stop_reason, str | None)
    assert_type(p.stopped, bool)
    assert_type(p.saved, int)
    assert_type(p.num_tokens, int)
    assert_type(p.record, dict[str, Any])
    assert_type(p.winner, Branch | None)
    assert_type(p.branches[0].output, str)
    assert_type(p.branches[0].ended, bool)
    assert_type(p.branches[0].reward, float | None)
    with reason(state, "mcts", branches=16) as p:
        p.gen("steps", max_tokens=200)
    reason(state, 3)  # pyright: ignore[reportArgumentType]


def errors(error: FieldError | ConfigError) -> None:
    base: DynasorError = error
    value: ValueError = error
    print(base, value)

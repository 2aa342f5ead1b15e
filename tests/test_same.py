"""Answers compared symbolically in the author's own process: searches, plain SGLang, branches of the author's own."""

from __future__ import annotations

import logging
import threading
import time
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from test_driver import Script

from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend import counting as counting_module
from sglang_dynasor.frontend import same
from sglang_dynasor.frontend.counting import Counting
from sglang_dynasor.frontend.driver import Driver
from sglang_dynasor.frontend.plan import parse_plan
from sglang_dynasor.frontend.same import AnswerKeys
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import parse_field

WRITINGS = ("2k+2", "7", "2+2k", "2(k+1)", "Paris", "paris")


def run(**field: Any) -> dict[str, Any]:
    """A program on plain SGLang, whose samples are the writings in turn."""
    numbers = count()
    driver = Driver(Script(lambda data: f"so\n#### {WRITINGS[next(numbers) % len(WRITINGS)]}"), rows=1)
    plan = parse_plan({"answer": "hash", "branches": 6, "stop": "never", **field}, has_reward=False)
    try:
        return driver.run("Q", plan, {"temperature": 1.0, "max_new_tokens": 40}).record
    finally:
        driver.close()


def test_a_search_counts_what_is_the_same_as_one() -> None:
    """Three ways to write a sum are one answer; each merge is in the record. By `math` they are three."""
    record = run(equal="symbolic")
    assert [(vote["answer"], vote["votes"]) for vote in record["votes"]][:1] == [("2k+2", 3)]
    assert sorted(vote["votes"] for vote in record["votes"]) == [1, 2, 3]
    assert {(merge["answer"], merge["into"]) for merge in record["merges"]} == {("2+2k", "2k+2"), ("2(k+1)", "2k+2")}
    assert record["num_comparisons"] == 3
    apart = run(equal="math")
    assert sorted(vote["votes"] for vote in apart["votes"]) == [1, 1, 1, 1, 2]
    assert "merges" not in apart
    assert len(run(equal="text")["votes"]) == len(WRITINGS)


def test_a_search_ends_earlier() -> None:
    """The rule is asked of the merged votes."""
    assert run(equal="symbolic", stop="window:2", width=1)["num_branches"] > 2
    numbers = [run(equal=equal, stop="beta:0.8")["num_branches"] for equal in ("symbolic", "math")]
    assert numbers[0] < numbers[1]


def test_keys_of_one_search() -> None:
    """That of the first that was the same; words are never asked about."""
    keys = AnswerKeys(parse_field({"equal": "symbolic"}, 64))
    assert [keys.key(text) for text in ("2k+2", "listen", "2+2k", "silent", "$2k+2$")] == [
        "2k+2",
        "listen",
        "2k+2",
        "silent",
        "2k+2",
    ]
    assert keys.record()["num_comparisons"] == 1


def counted(monkeypatch: pytest.MonkeyPatch, find: Any, *texts: str, wait_s: float = 60.0, **field: Any) -> Counting:
    """A program whose branches the author forks, counted here."""
    if find is not None:
        monkeypatch.setattr(counting_module, "find_same", find)
    monkeypatch.setattr(counting_module, "FINDINGS_S", wait_s)
    spec = parse_field({"answer": "hash", "branches": 4, "stop": "never", "equal": "symbolic", **field}, 64)
    counting = Counting(Script(lambda data: None), {}, spec, is_server_s=True, final=None, reports=False, seed=None)
    assert counting.is_here  # a server would not compare what it answers at once
    for number, text in enumerate(texts):
        branch: Any = SimpleNamespace(
            index=counting._program.start_branch(), number=number, num_tokens=0, is_answering=True, ended=False, is_finished=False,
            is_counted=False, reward=None, lead="", said="", ending=Ending(), served_index=None, rid="r", is_under_way=False,
        )  # fmt: skip
        counting.branches.append(branch)
        counting.take(branch, f"#### {text}", {"finish_reason": {"type": "stop", "matched": 1}, "completion_tokens": 5})
    return counting


def test_branches_of_the_author_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their votes merge, and the end waits for that."""
    counting = counted(monkeypatch, None, "2k+2", "7", "2+2k", "7")
    counting.close()
    assert counting.reason is StopReason.CAP
    assert sorted(vote["votes"] for vote in counting.record["votes"]) == [2, 2]
    assert counting.record["merges"] == [{"answer": "2+2k", "into": "2k+2", "by": "symbolic", "score": None}]
    assert counting.record["branch"] == 0


def test_the_end_waits_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that does not come back leaves answers apart; nothing is waited for where none is under way."""
    for texts, wait_s in ((("2k+2", "7", "2+2k", "7"), 0.3), (("7", "7", "7", "7"), 60.0)):
        is_over = threading.Event()

        def find(form: str, known: dict[int, str], is_over: threading.Event = is_over) -> None:
            is_over.wait(120)

        counting = counted(monkeypatch, find, *texts, wait_s=wait_s)
        started = time.monotonic()
        counting.close()
        took_s = time.monotonic() - started
        is_over.set()
        assert took_s < 50
        assert took_s >= 0.3 or wait_s > 0.3
        assert counting.reason is StopReason.CAP
        assert counting.record["merges"] == []


def test_an_author_s_rule_that_fails_on_a_merge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a finding has had it asked."""
    counting = counted(monkeypatch, lambda form, known: 0, "2k+2")
    monkeypatch.setattr(Program, "settle", lambda self, index, into: 1 / 0)
    counting._find(1, "2+2k", {0: "2k+2"})
    with pytest.raises(ZeroDivisionError):
        counting.close()


def test_a_worker_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Answers stay apart."""

    def first_same(form: str, others: list[str]) -> int | None:
        raise TimeoutError("too long")

    monkeypatch.setattr(same, "shared_worker", lambda: SimpleNamespace(first_same=first_same))
    monkeypatch.setattr(same, "_logged", set())
    with caplog.at_level(logging.WARNING):
        assert len(run(equal="symbolic")["votes"]) == 5
    assert [record.message.count("stay apart") for record in caplog.records] == [1]


@pytest.mark.parametrize("equal", ["model", "embedding:0.8"])
def test_what_only_a_server_compares(equal: str) -> None:
    """It says what else there is."""
    with pytest.raises(FieldError, match="use symbolic, math or text"):
        parse_plan({"equal": equal}, has_reward=False)
    assert parse_plan({"equal": "symbolic"}, has_reward=False).spec.comparer == "symbolic"

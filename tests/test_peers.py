"""What peers decide, as their library does it; how runs over the same questions are compared."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_peers import OURS, RIVALS, STOCK, WAYS, Book, Load, Run, check_tokens, decoded, plan, tables
from clients import Hub, projection
from intervals import Runs, behind, best_level, changes, figures, inside, told

from sglang_dynasor.sim.peers import PEERS

CAP = 16


class Scripted:
    """A language model that says what a script says, in the order in which it is asked, each at once."""

    def __init__(self, answers: list[str | None]):
        self.answers = answers
        self.num_asked = 0

    async def agenerate_single(self, messages: Any, **_: Any) -> dict[str, str]:
        answer = self.answers[self.num_asked]
        self.num_asked += 1
        number = self.num_asked
        for _ in range(3 * number):  # they finish in that order
            await asyncio.sleep(0)
        return {"role": "assistant", "content": f"no answer {number}" if answer is None else f"#### {answer}"}


def asked_by_library(algorithm: Any, answers: list[str | None]) -> int:
    """How many samples its_hub takes of a script, or has when it cancels."""
    result: Any = asyncio.run(algorithm.ainfer(Scripted(answers), "?", CAP, return_response_only=False))
    return len(result.responses)


def asked_by_rule(name: str, answers: list[str | None]) -> int:
    """How many samples our form of the same rule takes: waves are there whole, others one by one."""
    num_there = num_asked = 0
    while (more := PEERS[name].more(answers[:num_there], num_asked, CAP)) is not None:
        num_asked += more
        num_there = num_there + 1 if name == "beta" else num_asked
    return num_there


@pytest.mark.parametrize("name", ["doubling", "beta"])
def test_our_form_of_a_rule_stops_where_its_library_does(name: str) -> None:
    """On 200 scripts from sure to hopeless, with samples that have no answer."""
    pytest.importorskip("its_hub", reason="pip install -e '.[bench]'")
    rng, algorithm = random.Random(1), Hub("http://nowhere", CAP).algorithms[name]
    for _ in range(200):
        share = rng.random()
        script = [
            None if rng.random() < 0.05 else "1" if rng.random() < share else rng.choice("2345") for _ in range(CAP)
        ]
        assert asked_by_library(algorithm, script) == asked_by_rule(name, script), script


def test_texts_without_an_answer_do_not_agree() -> None:
    """Answers agree by what we count as the same."""
    assert projection("#### 7") == projection("so\n#### 7.0")
    assert projection("nothing") != projection("nothing else")


# Figures


def runs(latency_s: list[list[float]], tokens: float = 100, is_right: float = 1) -> Runs:
    values = np.array(latency_s, float)
    return Runs(np.full_like(values, is_right), np.full_like(values, tokens), values)


def test_what_two_ways_share_falls_out_of_their_difference() -> None:
    """Hard questions are as hard for both: the difference of two noisy means is exact, and is seen."""
    latencies = [[float(place % 10) for place in range(100)]]
    slow, fast = figures(runs(latencies)), figures(runs([[0.9 * one for one in latencies[0]]]))
    low, high = inside(slow["mean"].draws)
    assert high - low > 0.8
    change = changes(fast, slow)["mean"]
    assert (change.value, change.low, change.high) == pytest.approx((-10, -10, -10))
    assert not change.is_noise


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    """1.96 standard errors either way; a wider one where one question decides."""
    values = np.random.default_rng(3).normal(5, 2, (1, 400))
    low, high = inside(figures(Runs(values, values, values))["tokens"].draws)
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)


def test_repeats_of_one_question_are_drawn_together() -> None:
    """Two repeats that say the same tell no more than one."""
    one = figures(runs([[float(place) for place in range(50)]]))
    two = figures(runs([[float(place) for place in range(50)]] * 2))
    assert inside(one["mean"].draws) == inside(two["mean"].draws)


def test_where_ours_is_behind_is_told_with_noise_in_brackets() -> None:
    """Equal is not behind; of levels that are behind in as little the fastest is taken."""
    theirs = figures(runs([[1.0, 2.0, 3.0, 4.0]], tokens=100))
    same = changes(theirs, theirs)
    assert (behind(same), told(same)) == ([], "-")
    dear = figures(runs([[1.0, 2.0, 3.0, 4.0]], tokens=101))
    slower = figures(runs([[1.5, 2.0, 3.0, 3.5]], tokens=100))  # of one more, of one less: equal in the mean
    assert told(changes(dear, theirs)) == "tokens"
    slightly = figures(runs([[1.6, 2.0, 3.0, 3.5]], tokens=100))
    assert told(changes(slightly, theirs)) == "(mean)"
    fast = figures(runs([[0.5, 1.0, 1.5, 2.0]], tokens=101))
    assert best_level({"careful": dear, "balanced": fast, "fast": slower}, theirs)[0] == "balanced" or not behind(
        changes(slower, theirs)
    )


# The benchmark


def record(load: Load, way: str, repeat: int, latency_s: float = 1.0) -> dict[str, Any]:
    return {
        **Run(load, way, repeat).key, "wall_s": 4.0, "engine_tokens": 80, "requests": 4,
        "is_right": [1, 1, 0, 1], "tokens": [10, 20, 30, 20], "latency_s": [latency_s] * 4,
    }  # fmt: skip


def test_every_way_is_run_in_each_repeat_before_the_next() -> None:
    """In another order each time, so that a slow hour falls on all."""
    runs = list(plan([Load(at_once=1), Load(rate=2.0)], list(WAYS), 2))
    assert len(runs) == len(set(runs)) == 2 * 2 * len(WAYS)
    assert [run.repeat for run in runs] == sorted(run.repeat for run in runs)
    first, again = (next(run.way for run in runs if run.repeat == repeat) for repeat in (0, 1))
    assert first != again


def test_a_benchmark_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Runs in the file are not repeated; those of other settings are refused by name."""
    path, load = tmp_path / "runs.jsonl", Load(at_once=16)
    book = Book(path, {"cap": 16})
    book.add(record(load, STOCK, 0))
    again = Book(path, {"cap": 16})
    assert again.has(Run(load, STOCK, 0))
    assert not again.has(Run(load, STOCK, 1))
    assert not again.has(Run(Load(at_once=1), STOCK, 0))
    with pytest.raises(SystemExit, match=r"line 1, has cap=16, and this run has 8"):
        Book(path, {"cap": 8})
    assert len(path.read_text().splitlines()) == 1
    assert json.loads(path.read_text())["cap"] == 16


def test_a_table_has_only_repeats_of_all_ways() -> None:
    """A load that one way has not been through is left out; a repeat that was cut, too."""
    book, whole, part = Book(None, {}), Load(at_once=1), Load(at_once=16)
    for way in WAYS:
        book.add(record(whole, way, 0, latency_s=0.5 if way in OURS else 1.0))
    book.add(record(whole, STOCK, 1, latency_s=9.0))
    book.add(record(part, STOCK, 0))
    rows, pairs = tables(book, [whole, part], list(WAYS))
    assert [row["way"] for row in rows] == list(WAYS)
    assert {row["load"] for row in rows} == {"1 at once"}
    assert {row["mean s"].split()[0] for row in rows if row["way"] == STOCK} == {"1.00"}
    assert [pair["peer"] for pair in pairs] == list(RIVALS)
    assert {pair["behind in"] for pair in pairs} == {"-"}
    assert pairs[0]["mean latency %"] == "-50.0 (-50.0 to -50.0)"


def test_the_two_counts_of_tokens_must_agree() -> None:
    """But for who cancels: it is told of fewer, and never of more."""
    check_tokens(STOCK, 1000, 1010)
    check_tokens("its_hub 1.2.0 beta", 600, 1000)
    with pytest.raises(RuntimeError, match="told of 900 tokens, and SGLang decoded 1000"):
        check_tokens(STOCK, 900, 1000)
    with pytest.raises(RuntimeError, match="decoded 1000"):
        check_tokens("its_hub 1.2.0 beta", 1100, 1000)


def test_sglangs_counter_is_read_off_its_metrics() -> None:
    """All ranks together, decode steps only."""
    lines = [
        "# TYPE sglang:realtime_tokens_total counter",
        'sglang:realtime_tokens_total{mode="prefill_compute",tp_rank="0"} 7.0',
        'sglang:realtime_tokens_total{mode="decode",tp_rank="0"} 1.2e+03',
        'sglang:realtime_tokens_total{mode="decode",tp_rank="0",dp_rank="1"} 3.0',
        'sglang:generation_tokens_total{model_name="x"} 5.0',
    ]
    assert decoded("\n".join(lines)) == 1203
    assert decoded("") == 0

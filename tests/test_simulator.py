"""The simulator: arithmetic, determinism, nothing lost, and the policy's own bounds; no engine is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_dynasor.cli import main
from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.sim.costs import CURVES, OVERLAPS, Costs, Step, fit, read_costs, read_steps, write_costs
from sglang_dynasor.sim.engine import Engine
from sglang_dynasor.sim.peers import PEERS
from sglang_dynasor.sim.pool import Pool
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.run import Load, Run, parse_way, simulate
from sglang_dynasor.sim.samples import Question, Sample, read_samples

CONFIG = DynasorConfig()
COSTS = Costs(0.01, 0.001, 1e-6, 0.02, 0.002, 1e-4, 0.003, "off", "made up")
SIZE = Size(rows=8, pool_tokens=10_000, pass_tokens=512, max_new_tokens=200)
WAYS = [*(name for name in PEERS if name != "greedy"), "program", "program stop=never", "program stop=margin width=2"]


def question(name: str, prompt_tokens: int, *samples: tuple[str | None, int]) -> Question:
    return Question(name, prompt_tokens, tuple(Sample(answer, num, answer == "1") for answer, num in samples))


def run(
    way: str, *questions: Question, at_once: int = 0, size: Size = SIZE, costs: Costs = COSTS,
    config: DynasorConfig = CONFIG, **load: Any,
) -> Run:  # fmt: skip
    how = parse_way(way, len(questions[0].samples), config)
    when = Load(num_at_once=at_once) if at_once else Load(**load or {"times_s": (0.0,) * len(questions)})
    return simulate(how, questions, when, size, costs, config)


def decode_s(num_rows: int, kv_tokens: int, num_steps: int) -> float:
    """Of so many steps of equal rows, which read so many tokens in the first."""
    return sum(COSTS.decode(num_rows, kv_tokens + step * num_rows) for step in range(num_steps))


# What arithmetic says


@pytest.mark.parametrize("way", ["single", "program"])
def test_one_branch_alone_takes_its_prompt_and_its_steps(way: str) -> None:
    """The prefill pass gives the first token, each step one more; the network twice."""
    solved = run(way, question("q", 100, ("1", 50))).solved[0]
    assert solved.latency_s == pytest.approx(COSTS.prefill(1, 100) + decode_s(1, 100, 49) + 2 * COSTS.request_s)
    assert (solved.num_tokens, solved.num_branches, solved.is_right) == (50, 1, True)


def test_a_gang_computes_its_prompt_once_and_then_follows() -> None:
    """A leader's pass, a pass of its siblings over a token each, then steps of four rows, and fewer as they end."""
    done = run("program stop=never", question("q", 100, ("1", 10), ("1", 20), ("2", 20), ("1", 30)))
    seconds = COSTS.prefill(1, 100) + COSTS.prefill(3, 3)
    kv_tokens = 4 * 100
    # The siblings had their first token in their pass, as the leader in its own: 9 steps until it ends.
    for num_rows, num_steps, ending in ((4, 9, 1), (3, 10, 2), (1, 10, 1)):
        seconds += decode_s(num_rows, kv_tokens, num_steps)
        own = (kv_tokens + num_rows * num_steps) // num_rows
        kv_tokens = own * (num_rows - ending)
    assert done.solved[0].latency_s == pytest.approx(seconds + 2 * COSTS.request_s)
    assert (done.num_passes, done.num_computed, done.num_wasted) == (2, 103, 0)


def test_stock_samples_wait_for_their_prompt() -> None:
    """SGLang computes the prompt of n > 1 by itself, then all samples in one pass; no network between."""
    done = run("stock", question("q", 100, ("1", 10), ("2", 10)))
    seconds = COSTS.prefill(1, 100) + COSTS.prefill(2, 2) + decode_s(2, 200, 9)
    assert done.solved[0].latency_s == pytest.approx(seconds + 2 * COSTS.request_s)


def test_a_prefill_pass_holds_up_who_decodes() -> None:
    """A question that comes in the middle costs the first exactly its pass, and one row in the steps that they share."""
    first, second = question("a", 10, ("1", 100)), question("b", 300, ("1", 5))
    alone = run("single", first).solved[0].latency_s
    both = run("single", first, second, times_s=(0.0, 0.3)).solved[0].latency_s
    shared = sum(COSTS.row_s + COSTS.kv_token_s * (300 + step) for step in range(4))
    assert both - alone == pytest.approx(COSTS.prefill(1, 300) + shared)


def test_samples_that_come_together_compute_the_same_prompt_each() -> None:
    """As SGLang's fcfs does for single requests; the next wave finds it."""
    done = run("doubling", question("q", 100, ("1", 10), ("2", 10), ("1", 10), ("1", 10)))
    assert done.num_computed == 2 * 100 + 2


def test_a_long_prompt_comes_in_chunks() -> None:
    """Each at most a pass; steps of others do not go between, as SGLang prefers prefill."""
    done = run("single", question("q", 1200, ("1", 2)))
    assert (done.num_passes, done.num_computed) == (3, 1200)
    passes = 2 * COSTS.prefill(1, 512) + COSTS.prefill(1, 1200 - 1024)
    assert done.solved[0].latency_s == pytest.approx(passes + decode_s(1, 1200, 1) + 2 * COSTS.request_s)


def test_ended_siblings_cost_one_step_more() -> None:
    """Three votes decide; the sibling that runs is counted until then, and holds its row for the step under way."""
    done = run("program", question("q", 10, ("1", 10), ("1", 10), ("1", 10), ("2", 150)))
    solved = done.solved[0]
    assert (solved.answer, solved.num_tokens, done.num_wasted) == ("1", 40, 1)
    assert done.num_generated == 41


@pytest.mark.parametrize(("overlap", "num_late", "num_wasted"), [("off", 0, 1), ("device", 0, 2), ("host", 1, 2)])
def test_with_overlap_the_scheduler_sees_a_step_late(overlap: str, num_late: int, num_wasted: int) -> None:
    """What has ended rides along once more; on a CPU its client also waits for that. An ended sibling rides along twice."""
    costs = replace(COSTS, overlap=overlap)
    alone = run("single", question("q", 100, ("1", 50)), costs=costs)
    seconds = COSTS.prefill(1, 100) + decode_s(1, 100, 49 + num_late) + 2 * COSTS.request_s
    assert alone.solved[0].latency_s == pytest.approx(seconds)
    assert alone.num_wasted == (overlap != "off")
    gang = run("beta", question("q", 10, *[("1", 20)] * 4, ("2", 150)), costs=replace(costs, request_s=0))
    assert gang.num_wasted == num_wasted + 4 * (overlap != "off")


# Nothing is lost, and the same is the same

SAMPLES = st.tuples(st.sampled_from(["1", "1", "2", "3", None]), st.integers(1, 60))
QUESTIONS = st.lists(st.tuples(st.integers(1, 90), st.lists(SAMPLES, min_size=6, max_size=6)), min_size=1, max_size=8)


@settings(suppress_health_check=list(HealthCheck))
@given(
    QUESTIONS,
    st.sampled_from(WAYS),
    st.integers(1, 9),
    st.integers(160, 400),
    st.sampled_from([16, 64, 512]),
    st.booleans(),
    st.sampled_from(OVERLAPS),
)
def test_tokens_are_conserved_and_the_pool_is_empty_at_the_end(
    made: list[tuple[int, list[tuple[str | None, int]]]],
    way: str,
    rows: int,
    pool: int,
    chunk: int,
    is_open: bool,
    overlap: str,
) -> None:
    """Whatever is generated is counted for a question, or came after an end; also where the pool is far too small."""
    questions = [question(f"q{number}", prompt, *samples) for number, (prompt, samples) in enumerate(made)]
    size, costs = Size(rows, pool, chunk, max_new_tokens=60), replace(COSTS, overlap=overlap)
    if is_open:
        done = run(
            way, *questions, size=size, costs=costs, times_s=tuple(0.2 * number for number in range(len(questions)))
        )
    else:
        done = run(way, *questions, size=size, costs=costs, at_once=2)
    assert done.num_generated - done.num_wasted == sum(solved.num_tokens for solved in done.solved)
    assert done.kv_left_tokens == 0
    assert done.most_kv_tokens <= pool
    assert all(solved.latency_s > 0 for solved in done.solved)
    if way in ("stock", "program stop=never"):
        assert all(
            solved.num_tokens == sum(num for _, num in samples)
            for solved, (_, samples) in zip(done.solved, made, strict=True)
        )


def test_a_pool_that_runs_out_takes_the_youngest_program_whole() -> None:
    """A third program comes when SGLang has become bold; it gives back both branches, goes on later, and nothing is lost."""
    questions = [question(name, 10, ("1", 600), ("1", 600)) for name in "abc"]
    times_s = (0.0, 0.0, 2.9)
    small, large = (Size(rows=8, pool_tokens=num, max_new_tokens=600) for num in (2900, 9000))
    done = run("program stop=never", *questions, size=small, times_s=times_s)
    plenty = run("program stop=never", *questions, size=large, times_s=times_s)
    assert (done.num_retracted, plenty.num_retracted) == (2, 0)
    assert done.num_generated == plenty.num_generated == 3600
    assert done.solved[2].latency_s > plenty.solved[2].latency_s
    assert done.solved[0].latency_s < plenty.solved[0].latency_s


def test_a_gang_that_fills_the_pool_to_the_last_token_runs() -> None:
    """Also when its prompt is in the cache and nothing else can be given up for it."""
    size = Size(rows=2, pool_tokens=37 + 2 * 62, pass_tokens=16, max_new_tokens=60)
    done = run("program", question("q", 37, *[(None, 2)] * 2, ("2", 3), ("1", 1), (None, 23), (None, 1)), size=size)
    assert done.solved[0].num_branches == 6


def test_a_promise_does_not_hold_back_who_is_before_it_on_an_empty_engine() -> None:
    """A branch whose prompt was given up needs more than was set aside for it; the gang behind it has not begun: nothing runs,
    and nothing would leave. Found by random loads."""
    made = [
        (66, "1 52, 1 23, 3 1, 1 2, 3 51, 2 1"), (84, "3 1, 2 1, 3 1, 2 3, - 1, 3 1"), (11, "1 3, - 2, 3 3, 1 1, 3 3, 3 1"),
        (33, "- 3, 1 1, 1 2, 1 6, 1 3, - 1"), (70, "2 3, 2 1, 1 1, 2 39, 1 3, - 42"), (66, "1 1, 1 2, - 3, 3 3, - 59, 1 1"),
        (84, "1 1, 1 3, 2 1, 2 1, 1 2, 1 5"),
    ]  # fmt: skip
    pairs = [(prompt, [sample.split() for sample in samples.split(", ")]) for prompt, samples in made]
    questions = [
        question(f"q{number}", prompt, *((None if answer == "-" else answer, int(num)) for answer, num in samples))
        for number, (prompt, samples) in enumerate(pairs)
    ]
    size, costs = Size(6, 268, 64, max_new_tokens=60), replace(COSTS, overlap="device")
    done = run("program", *questions, size=size, costs=costs, times_s=tuple(0.2 * number for number in range(7)))
    assert len(done.solved) == 7


def test_a_request_that_never_fits_is_named() -> None:
    """Instead of waiting for ever."""
    with pytest.raises(ConfigError, match="100 prompt tokens"):
        run("single", question("q", 100, ("1", 5)), size=Size(4, 90, 512, 20))


def lines(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    rows = [
        {
            "qid": number,
            "question": "how many?" * 9,
            "samples": [
                {"answer": str(number * place % 3), "n_tokens": 9 + number * place % 40, "correct": not number * place % 3}
                for place in range(8)
            ],
        }
        for number in range(9)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_same_seed_gives_the_same_table_in_every_process(tmp_path: Path) -> None:
    """Whatever the order of sets there; another seed gives another."""
    command = [sys.executable, "-m", "sglang_dynasor.cli", "simulate", "--samples", str(lines(tmp_path)), "--cap", "6", "--rates", "3", "--repeats", "2"]  # fmt: skip

    def output(seed: int, hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run([*command, "--seed", str(seed)], env=environment, capture_output=True, text=True, check=True).stdout  # fmt: skip

    assert output(0, "1") == output(0, "2") != output(1, "1")


@settings(suppress_health_check=list(HealthCheck))
@given(QUESTIONS, st.sampled_from(WAYS), st.integers(1, 9), st.sampled_from(OVERLAPS), st.sampled_from([0.05, 0.2]))
def test_steps_run_at_once_are_the_same_steps(
    made: list[tuple[int, list[tuple[str | None, int]]]], way: str, rows: int, overlap: str, gap_s: float
) -> None:
    """To the last digit, whatever comes between."""
    questions = [question(f"q{number}", prompt, *samples) for number, (prompt, samples) in enumerate(made)]
    size, costs = Size(rows, 400, 64, max_new_tokens=60), replace(COSTS, overlap=overlap)
    times_s = tuple(gap_s * number for number in range(len(questions)))
    fast = run(way, *questions, size=size, costs=costs, times_s=times_s)
    with patch.object(Engine, "_decode_on"):
        assert run(way, *questions, size=size, costs=costs, times_s=times_s) == fast


# The policy's own bound


@pytest.mark.parametrize(("patience", "is_bounded"), [(200, True), (10**9, False)])
def test_a_hard_program_is_overtaken_within_the_bound(patience: int, is_bounded: bool) -> None:
    """Later arrivals get at most patience + R * L; a stream of easy ones goes on overtaking where nobody has patience."""
    size = Size(rows=4, pool_tokens=10_000, pass_tokens=512, max_new_tokens=200)
    hard = question("hard", 10, *[(str(number), 190) for number in range(4)])
    easy = [question(f"easy{number}", 10, *[("1", 20)] * 4) for number in range(120)]
    config = DynasorConfig(dynasor_patience_tokens=patience)
    times_s = (0.0,) * 5 + tuple(0.25 * number for number in range(116))
    done = run("program", *easy[:4], hard, *easy[4:], size=size, config=config, times_s=times_s)
    bound = 200 + 4 * (10 + 200)
    assert (done.max_overtaken_tokens <= bound) is is_bounded


# Clients


@pytest.mark.parametrize(
    ("peer", "answers", "num_asked", "expected"),
    [
        ("doubling", [], 0, 2),
        ("doubling", ["a"], 2, 0),  # a wave is waited for
        ("doubling", ["a", "a"], 2, None),
        ("doubling", ["a", "b"], 2, 2),
        ("doubling", ["a", "a", "b", "a"], 4, None),  # exactly 75 %
        ("doubling", ["a", None, "a", None], 4, 4),  # those without an answer agree with none
        ("doubling", ["a", "b"] * 8, 16, None),
        ("beta", [], 0, 16),
        ("beta", ["a"] * 3, 16, 0),
        ("beta", ["a"] * 4, 16, None),
        ("adaptive", ["a"] * 3, 3, 1),
        ("adaptive", ["a"] * 3, 4, 0),
        ("adaptive", [*"aaaaaa", "b"], 7, None),
        ("adaptive", [*"aaaaa", "b"], 6, 1),
        ("windows", [], 0, 5),
        ("windows", ["a"] * 4, 5, 0),
        ("windows", ["a"] * 5, 5, None),
        ("windows", [None] * 5, 5, 5),
        ("windows", ["a", "b"] * 7 + ["a"], 15, 1),
        ("stock", [], 0, 16),
        ("stock", ["a"] * 15, 16, 0),
        ("stock", ["a"] * 16, 16, None),
        ("single", [], 0, 1),
        ("single", [None], 1, None),
    ],
)
def test_clients_ask_for_as_many_as_they_do(
    peer: str, answers: list[str | None], num_asked: int, expected: int | None
) -> None:
    """By what came so far, with a cap of 16; None: done."""
    assert PEERS[peer].more(answers, num_asked, 16) == expected


def test_a_client_that_is_done_cancels_the_rest() -> None:
    """Beta is sure after four; the others are ended once the server knows, and their tokens count."""
    done = run("beta", question("q", 10, *[("1", 20)] * 4, *[("2", 150)] * 2))
    solved = done.solved[0]
    assert (solved.num_branches, done.num_wasted) == (6, 2)
    assert 4 * 20 + 2 * 20 < solved.num_tokens < 4 * 20 + 2 * 25


def test_a_greedy_way_takes_the_greedy_sample() -> None:
    """And needs one."""
    made = question("q", 10, ("2", 9))
    assert run("greedy", replace(made, greedy=Sample("1", 5, True))).solved[0].is_right
    with pytest.raises(ConfigError, match="no greedy sample"):
        run("greedy", made)


# The pool


def test_what_was_used_longest_ago_is_given_up_first() -> None:
    """Prompts in use stay; of the others the oldest go when there is no room."""
    pool = Pool(100)
    for prompt in "ab":
        pool.hold(prompt, 30)
        pool.let_go(prompt)
    pool.touch("a")
    pool.hold("c", 50)
    assert (pool.holds("a"), pool.holds("b"), pool.holds("c")) == (True, False, True)
    pool.hold("c", 50)
    pool.take(40)
    assert (pool.available, pool.used, pool.holds("a")) == (10, 90, False)
    pool.give_back(40, is_kept=True)
    assert (pool.available, pool.spare) == (50, 40)


# Files


def test_samples_are_read_as_recorded(tmp_path: Path) -> None:
    """Prompts from tokens, from a text, or as the command line says; datasets by a part of their name."""
    path = tmp_path / "s.jsonl"
    rows = [
        {"qid": "a", "dataset": "x/1", "prompt_tokens": 7, "samples": [{"answer": None, "n_tokens": 3, "correct": False}]},
        {"qid": "a", "dataset": "x/2", "question": "12345678", "samples": [{"answer": 4, "n_tokens": 3.0}]},
        {"qid": "b", "model": "m", "samples": [{"answer": "4", "n_tokens": 3, "in_tokens": 5}]},
        {"qid": "c", "samples": [{"answer": "4", "n_tokens": 3}]},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = read_samples(path, None, 99)
    assert [q.prompt_tokens for q in questions] == [7, 2, 5, 99]
    assert len({q.id for q in questions}) == 4
    assert questions[1].samples == (Sample("4", 3, None),)
    assert [q.id for q in read_samples(path, "x/", 1)] == ["a", "a@2"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"samples": [{"answer": "1", "n_tokens": null}]}', r"line 1, sample 0: n_tokens=None"),
        ('{"samples": [{"answer": "1"}]}', r"n_tokens=None"),
        ('{"samples": [{"n_tokens": 0}]}', r"n_tokens=0"),
        ('{"samples": []}', r"line 1: no samples"),
        ("[]", r"line 1 is no JSON object"),
        ('{"samples": [{"n_tokens": 1}]}\n{"samples": ', r"line 2, column 13 is no JSON"),
        ("", r"has no questions"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, named: str) -> None:
    """In one line."""
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_samples(path, None, 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cap", "9"], "has 8 samples; --cap=9"),
        (["--ways", "fastest"], "'fastest' is no way"),
        (["--ways", "program stop=soon"], "'soon' is not a rule"),
        (["--ways", "program width"], "'width' is no KEY=VALUE"),
        (["--ways", "program deadline_s=3"], "a deadline, which the simulator does not model"),
        (["--at-once", "0"], "--at-once=0"),
        (["--rates", "nan"], "--rates nan"),
        (["--arrivals", "a.csv"], "without --rates"),
        (["--costs", "tpu"], "--costs='tpu'"),
        (["--rows", "0"], "rows=0"),
        (["--max-new-tokens", "10"], "below the longest sample"),
        (["--dataset", "zz"], "contains 'zz'"),
        (["--plot", "out.xyz"], "out.xyz is no picture"),
    ],
)
def test_a_wrong_option_is_named(
    tmp_path: Path, options: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before anything is simulated."""
    monkeypatch.setattr(sys, "argv", ["sglang-dynasor", "simulate", "--samples", str(lines(tmp_path)), "--cap", "8", *options])  # fmt: skip
    with pytest.raises(SystemExit, match=named):
        main()


def test_the_command_prints_a_table_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row per load and way; the CSV has the engine's counters too."""
    out, picture = tmp_path / "out.csv", tmp_path / "out.png"
    options = ["--cap", "6", "--at-once", "1", "4", "--num-questions", "12", "--csv", str(out), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["sglang-dynasor", "simulate", "--samples", str(lines(tmp_path)), *options])
    main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * 7
    header, *rows = out.read_text().splitlines()
    assert len(rows) == 2 * 7
    assert "most overtaken tokens" in header
    assert picture.read_bytes().startswith(b"\x89PNG")


# Costs


def test_a_curve_is_found_from_its_own_steps(tmp_path: Path) -> None:
    """Exactly; outliers do not move it; what would be below 0 is left out; too few steps are refused."""
    path = tmp_path / "steps.csv"
    made = [Step(True, n, 100 * n + n * n, COSTS.decode(n, 100 * n + n * n)) for n in range(1, 65)]
    made += [Step(False, n % 5 + 1, 37 * n, COSTS.prefill(n % 5 + 1, 37 * n)) for n in range(1, 65)]
    made += [Step(True, 5, 500, 9.0)]
    path.write_text("kind,rows,tokens,seconds\n" + "\n".join(f"{'decode' if s.is_decode else 'prefill'},{s.num_rows},{s.num_tokens},{s.seconds}" for s in made))  # fmt: skip
    found = fit(read_steps(path), "made up", "off", COSTS.request_s)
    for name in ("decode_s", "row_s", "kv_token_s", "prefill_s", "prefill_row_s", "prefill_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-3), name
    falling = [Step(kind, n, 7 * n, 1 - 0.001 * n) for kind in (True, False) for n in range(1, 65)]
    assert fit(falling, "", "off").row_s == 0
    with pytest.raises(ConfigError, match="too few"):
        fit(falling[:70], "", "off")
    path.write_text("kind,rows\ndecode,3\n")
    with pytest.raises(ConfigError, match="no CSV of steps"):
        read_steps(path)


def test_a_curve_is_written_as_it_is_read(tmp_path: Path) -> None:
    """By name or from a file; a file with something else is refused."""
    path = tmp_path / "costs.json"
    write_costs(COSTS, path)
    assert read_costs(str(path)) == COSTS
    assert read_costs("gpu") is CURVES["gpu"]
    path.write_text('{"decode_s": 1}')
    with pytest.raises(ConfigError, match="keys"):
        read_costs(str(path))
    with pytest.raises(ConfigError, match="overlap='some'"):
        replace(COSTS, overlap="some")
    with pytest.raises(ConfigError, match="row_s=-1"):
        replace(COSTS, row_s=-1)

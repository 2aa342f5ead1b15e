"""`sglang-dynasor bench`: files as they are published, intervals, the replay, and whole runs against a server of the tests' own.

tests/test_http.py and tests/test_chat_model.py run it against SGLang.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest
from engines import ROOT
from others import OtherServer

from sglang_dynasor.bench import chat, run
from sglang_dynasor.bench.chat import Chat, read_reply, shared
from sglang_dynasor.bench.command import EARLY, Report, add_bench_options, run_bench
from sglang_dynasor.bench.intervals import percent, points, share
from sglang_dynasor.bench.questions import Question, read_questions
from sglang_dynasor.bench.replay import replay, replayed
from sglang_dynasor.bench.run import Measured, blocks
from sglang_dynasor.bench.table import make_table, second_vote
from sglang_dynasor.bench.verdict import Pair, form, gold_mismatch, verdict
from sglang_dynasor.bench.ways import GREEDY, STOCK, Asking, Sample, Solved, read_samples
from sglang_dynasor.cli import make_parser
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.answers import read_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.sim.samples import read_samples as read_recorded

# Files


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def only(path: Path) -> Question:
    (question,) = read_questions(path, 0)
    return question


GPQA_HEADER = (
    "Pre-Revision Question,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Explanation"
)


@pytest.mark.parametrize(
    ("row", "text", "gold"),
    [
        ({"question": "How many?", "answer": "She has 16 - 3 = <<16-3=13>>13.\n#### 1,018"}, "How many?", "1,018"),  # GSM8K
        ({"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": r"So $x = \boxed{\frac{1}{2}}$."}, "Find $x$.", r"\frac{1}{2}"),  # MATH
        ({"problem": "Find $x$.", "solution": "no box", "answer": r"\left( 3, \frac{\pi}{2} \right)", "unique_id": "a"}, "Find $x$.", r"\left( 3, \frac{\pi}{2} \right)"),  # MATH-500
        ({"prompt": "Q: what\nA:\n", "question": "what", "answer": 62, "num_steps": 1}, "what", "62"),  # the tiny reasoner's
        ({"question": "Why?"}, "Why?", None),
        ({"question": "Why?", "answer": None, "gold": ""}, "Why?", None),
        ({"Question": "Why?\u2028Tell.", "Answer": 0.5}, "Why?\u2028Tell.", "0.5"),
    ],
)  # fmt: skip
def test_published_jsonl_is_read(row: dict[str, Any], text: str, gold: str | None, tmp_path: Path) -> None:
    """GSM8K, MATH, MATH-500 and a file without golds, as they are downloaded."""
    question = only(written(tmp_path, "a.jsonl", "\ufeff" + lines(row) + "\n"))
    assert (question.text, question.gold, question.choices) == (text, gold, ())


def test_published_gpqa_is_read(tmp_path: Path) -> None:
    """Cells with quotes, commas and line ends; choices in an order of the seed's, of which the gold is the letter."""
    rows = f'{GPQA_HEADER}\r\nold,"Which of ""these"",\nof four?",right,wrong 1,"wrong, 2","wrong\n3",why\r\n\r\n'
    rows += "old,Second?,yes,no,,,why"
    path = written(tmp_path, "gpqa.csv", rows)
    seen: set[str] = set()
    for seed in range(20):
        first, second = sorted(read_questions(path, seed), key=lambda question: question.text, reverse=True)
        assert first.text == 'Which of "these",\nof four?'
        assert sorted(first.choices) == ["right", "wrong\n3", "wrong 1", "wrong, 2"]
        assert first.choices["ABCD".index(first.gold or "")] == "right"
        assert second.choices["AB".index(second.gold or "")] == "yes"
        seen.add(first.gold or "")
        assert read_questions(path, seed) == read_questions(path, seed)
    assert seen == set("ABCD")


@pytest.mark.parametrize(
    ("gold", "letter"), [(1, "B"), ("blue", "B"), ("b", "B"), ("C", "C"), ("2", "C"), (0, "A"), (None, None)]
)
def test_choices_of_one_s_own(gold: object, letter: str | None, tmp_path: Path) -> None:
    """By place, by text and by letter; a text that is a choice is no place."""
    question = only(
        written(tmp_path, "a.jsonl", lines({"question": "Which?", "choices": ["red", "blue", 2], "gold": gold}))
    )
    assert question.choices == ("red", "blue", "2")
    assert question.gold == letter
    assert question.prompt("Choose.") == "Which?\n\nA) red\nB) blue\nC) 2\n\nChoose."


def test_questions_come_in_an_order_of_the_seed(tmp_path: Path) -> None:
    """So that those for which there is time are a sample of all, and the same for every run."""
    path = written(tmp_path, "a.jsonl", lines(*({"question": str(i)} for i in range(50))))
    texts = [question.text for question in read_questions(path, 1)]
    assert texts == [question.text for question in read_questions(path, 1)]
    assert sorted(texts, key=int) == [str(i) for i in range(50)] != texts
    assert texts != [question.text for question in read_questions(path, 2)]


GOOD = '{"question": "a", "answer": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", GOOD + '{"question": "a", answer: 1}\n', "a.jsonl, line 2, column 19 is no JSON: .*; write one object a line"),
        ("a.jsonl", GOOD + '  ["a"]\n', "a.jsonl, line 2, column 3 is no JSON object"),
        ("a.jsonl", GOOD + '{"answer": 1, "text": "a"}\n', "a.jsonl, line 2, column 1: no question; name it .*It has answer, text"),
        ("a.jsonl", GOOD + '{"answer": 1, "question": ["a"]}', r"a.jsonl, line 2, column 15: 'question' is \['a'\]"),
        ("a.jsonl", GOOD + '{"question": "a", "answer": [1]}', r"a.jsonl, line 2, column 19: 'answer' is \[1\]; give"),
        ("a.jsonl", '{"question": "a", "answer": true}', "line 1, column 19: 'answer' is True; give"),
        ("a.jsonl", '{"problem": "a", "solution": "b"}', r"line 1, column 18: 'solution' has no \\boxed"),
        ("a.jsonl", '{"question": "a", "choices": ["x", "y"], "gold": "z"}', "line 1, column 42: 'gold' is 'z', which is none of the 2"),
        ("a.jsonl", '{"question": "a", "choices": ["x", "y"], "gold": 2}', "line 1, column 42: 'gold' is 2, which is none of the 2"),
        ("a.jsonl", '{"question": "a", "choices": ["x"]}', r"line 1, column 19: 'choices' is \['x'\]; give a list of 2 to 10"),
        ("a.jsonl", "\n\n", "--questions=.*a.jsonl has no questions"),
        ("a.csv", "Question,Answer\na,1\n" + 'b,"2\n3\n', "a.csv, line 3, column 3: the quote that opens here is never closed"),
        ("a.csv", "Question,Answer\n" + '"a ""b""" c,1\n', "a.csv, line 2, column 10: a quoted cell goes on after its closing quote"),
        ("a.csv", 'Question,Answer\n"a\nb",1,2\n', "a.csv, line 3, column 4: this record has 3 cells, the header has 2"),
        ("a.csv", "Question,Answer\na\n", "a.csv, line 2, column 1: this record has 1 cells, the header has 2"),
        ("a.csv", "Frage,Answer\na,1\n", "a.csv, line 2, column 1: no question; .*It has Frage, Answer"),
        ("a.csv", f"{GPQA_HEADER}\nold,a, ,x,y,z,why\n", "a.csv, line 2, column 7: 'Correct Answer' is ' '; write a text"),
        ("a.csv", "", "--questions=.*a.csv has no questions"),
        ("a.txt", GOOD, "a.txt is neither JSONL nor CSV; let its name end with .jsonl or .csv"),
    ],
)  # fmt: skip
def test_a_malformed_file_names_line_and_column(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_questions(written(tmp_path, name, text), 0)


def test_a_file_in_another_encoding_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + '{"question": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2, column 15 is no UTF-8; save"):
        read_questions(path, 0)
    with pytest.raises(ConfigError, match=r"--questions=.*none.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl", 0)


# Intervals


def test_intervals_hold_what_they_say() -> None:
    """Of 300 draws with a known answer the intervals miss it in about 5 %."""
    rng = random.Random(0)
    missed = {"points": 0, "percent": 0, "share": 0}
    num = 300
    for _ in range(num):
        hard = [rng.random() for _ in range(60)]
        stock = [float(rng.random() < p) for p in hard]
        ours = [float(rng.random() < p) for p in hard]
        change = points(ours, stock)
        missed["points"] += not change.low <= 0 <= change.high
        base = [rng.expovariate(1 / 100) + 10 for _ in range(60)]
        saved = percent([0.6 * tokens * rng.uniform(0.7, 1.3) for tokens in base], base, num_draws=200)
        missed["percent"] += not saved.low <= -40 <= saved.high
        whole = share(stock)
        missed["share"] += not whole.low <= 50 <= whole.high
    assert all(0.01 <= times / num <= 0.09 for times in missed.values()), missed


def test_intervals_of_little() -> None:
    """No difference yet is not none for sure; of fewer than five questions nothing is said; of a base of nothing, no change."""
    assert points([1.0] * 20, [1.0] * 20).value == 0
    assert 5 < (points([1.0] * 20, [1.0] * 20).half or 0) < 15
    assert (share([1.0] * 20).half or 0) > 5
    assert percent([1.0] * 4, [2.0] * 4) == (-50, None)
    assert percent([1.0] * 9, [0.0] * 9) == (0, None)
    assert points([0.5, 1.0], [0.5, 0.5]).value == 25
    assert points([1.0], [0.0]).shown() == "+100.0 ± 84.3"
    assert percent([1.0] * 4, [2.0] * 4).shown(" %") == "-50 %"


# What comes back


def completion(
    texts: Sequence[str], tokens: Sequence[int] | None = None, total: int | None = None, **more: Any
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for i, text in enumerate(texts)
    ]  # fmt: skip
    for choice, num in zip(choices, tokens or (), strict=False):
        choice["meta_info"] = {"completion_tokens": num}
    return {"choices": choices, "usage": {"completion_tokens": sum(tokens or ()) if total is None else total}, **more}


def test_tokens_of_each_choice_are_the_server_s_or_estimated() -> None:
    """From the lengths of texts, thoughts that are kept apart among them; their sum is the server's."""
    told = read_reply(completion(["a", "b"], [5, 7]), 1.0)
    assert [choice.num_tokens for choice in told.choices] == [5, 7]
    assert (told.num_tokens, told.is_estimated) == (12, False)
    reply = completion(["a" * 9, "b" * 4], total=100)
    reply["choices"][1]["message"]["reasoning_content"] = "c" * 25
    guessed = read_reply(reply, 1.0)
    assert [choice.num_tokens for choice in guessed.choices] == [25, 75]
    assert guessed.is_estimated
    assert not read_reply(completion(["a"], total=3), 1.0).is_estimated
    for total, sizes in ((10, [1, 1, 1]), (0, [3, 4]), (7, [0, 0]), (1, [5, 5, 5])):
        assert sum(shared(total, sizes)) == (total if any(sizes) else 0)
    for wrong, missing in (({"usage": {}, "choices": [{}]}, "usage.completion_tokens"), ({"error": "x"}, "choices")):
        with pytest.raises(ConfigError, match=f"has no {missing}"):
            read_reply(wrong, 1.0)


def test_a_thought_that_the_template_opened_is_none_s_answer() -> None:
    """One sample closes what it did not open: so those that never close theirs were thinking, whatever numbers they say."""
    texts = ["so 3?\n</think>\n\\boxed{4}", "it is \\boxed{5}, wait", ""]
    told = read_samples(read_reply(completion(texts, [1, 1, 1]), 1.0).choices, "auto")
    assert [sample.answer for sample in told] == ["4", None, None]
    plain = read_samples(read_reply(completion(texts[1:], [1, 1]), 1.0).choices, "auto")
    assert [sample.answer for sample in plain] == ["5", None]


# The replay

TEXTS = [
    f"so \\boxed{{{answer}}}" if answer else "hm" for answer in (7, 7, 3, 7, None, 7, 7, 3, 7, 7, 7, 5, 7, 7, 3, 7)
]
TOKENS = [40, 12, 33, 25, 60, 18, 51, 9, 44, 37, 22, 70, 31, 15, 28, 19]


def samples() -> tuple[Sample, ...]:
    return read_samples(read_reply(completion(TEXTS, TOKENS), 1.0).choices, "auto")


def by_hand(stop: str, usual_tokens: float) -> tuple[Program, int]:
    """A program whose branches all start at once, told of each text as an engine would tell it."""
    program = Program("hand", parse_field({"branches": 16, "stop": stop}, 64), usual_tokens=Mean(usual_tokens))
    for _ in TEXTS:
        program.start_branch()
    for step in range(1, 100):
        for index, num in enumerate(TOKENS):
            if num == step and program.reason is None:
                program.finish(index, TEXTS[index], num)
        if program.reason is not None:
            return program, step
    raise AssertionError


@pytest.mark.parametrize("stop", ["careful", "balanced", "fast", "beta", "window:5", "never"])
def test_the_replay_decides_as_a_program_does(stop: str) -> None:
    """Told of the same texts in the same order it ends in the same step, with the same answer, votes and tokens."""
    spec = Asking(cap=16).spec(Question("1", "?"), stop)
    there, step = by_hand(stop, 30.0)
    found = replay(samples(), spec, 16, 30.0)
    assert found.num_steps == step
    program = found.program
    assert program.reason == there.reason
    assert program.votes.recent == there.votes.recent
    assert program.winner == there.winner
    spent = [min(num, step) for num in TOKENS]
    assert [branch.num_tokens for branch in program.branches] == spent
    assert (step == max(TOKENS)) == (stop in ("never", "window:5"))  # no five in a row agree


def test_a_narrow_replay_starts_what_could_decide() -> None:
    """Branches that were never started cost nothing; each that starts does so when another has ended."""
    spec = Asking(cap=16).spec(Question("1", "?"), "careful")
    found = replay(samples(), spec, 1, 30.0)
    first = Program("fresh", spec).num_to_start(1)[0]
    assert 2 <= first < 16
    assert first <= len(found.program.branches) <= 16
    wide = replay(samples(), spec, 16, 30.0)
    assert sum(branch.num_tokens for branch in found.program.branches) < sum(
        branch.num_tokens for branch in wide.program.branches
    )
    assert found.num_steps >= wide.num_steps


def stock_of(told: Sequence[Sample], latency_s: float = 2.0) -> Solved:
    voted = answer_key(max((s.key for s in told if s.key), key=[s.key for s in told].count))
    return Solved((voted,), float(sum(s.num_tokens for s in told)), latency_s, float(len(told)), 1, tuple(told))


def test_a_replay_never_stopped_is_stock() -> None:
    """Same answer, tokens and seconds; a rule that stops is in between, and of a narrow one seconds are not known."""
    asking = Asking(cap=16)
    stock = stock_of(samples())
    never = replayed(stock, asking.spec(Question("1", "?"), "never"), 16, 30.0)
    assert set(never.keys) == set(stock.keys)
    assert (never.num_tokens, never.latency_s, never.num_branches) == (stock.num_tokens, stock.latency_s, 16)
    fast = replayed(stock, asking.spec(Question("1", "?"), "fast"), 16, 30.0)
    assert fast.num_tokens < stock.num_tokens
    assert 0 < (fast.latency_s or 0) < 2.0
    assert replayed(stock, asking.spec(Question("1", "?"), "fast"), 1, 30.0).latency_s is None


# Table, verdict, warnings


def measured_of(
    rights: dict[str, Sequence[bool]], tokens: dict[str, float], golds: bool = True
) -> tuple[Measured, Asking]:
    """A run in which each way is right where `rights` says so."""
    asking = Asking(cap=4, stops=tuple(way for way in rights if way not in (GREEDY, STOCK)))
    measured = Measured(tuple(rights))
    for way, hits in rights.items():
        for place, hit in enumerate(hits):
            question = Question(f"line {place}", "?", "7" if golds else None)
            key = "7" if hit else "3"
            votes = tuple(Sample(key, key, int(tokens[way] / 4)) for _ in range(4)) if way == STOCK else ()
            measured.keep(question, way, Solved((key,), tokens[way], tokens[way] / 100, 4.0, 1, votes))
    return measured, asking


def told_by(rights: dict[str, Sequence[bool]], tokens: dict[str, float], golds: bool = True) -> str:
    measured, asking = measured_of(rights, tokens, golds)
    table = make_table(measured, asking, (), True)
    assert table is not None
    return verdict(table, 4)


ALL, HALF = [True] * 200, [True, False] * 100
COST = {GREEDY: 100.0, STOCK: 400.0, "careful": 300.0, "fast": 200.0}


def test_the_verdict_names_the_cheapest_level_that_keeps_the_answers() -> None:
    said = told_by({GREEDY: HALF, STOCK: ALL, "careful": ALL, "fast": ALL}, COST)
    assert (
        said
        == "fast is as often right (+0.0 ± 1.0 points) and takes 50 ± 0 % fewer tokens and 50 ± 0 % less mean latency, against stock n=4"
    )
    lossy = told_by({GREEDY: HALF, STOCK: ALL, "careful": ALL, "fast": HALF}, COST)
    assert lossy.startswith("careful is as often right (+0.0 ± 1.0 points) and takes 25 ± 0 % fewer tokens")
    lost = told_by({GREEDY: HALF, STOCK: ALL, "fast": [*HALF[:50], *ALL[50:]]}, COST)
    assert lost.startswith("fast is less often right (-12.5 ±")
    few = told_by({GREEDY: HALF[:10], STOCK: ALL[:10], "fast": ALL[:10]}, COST)
    assert few.startswith("only 10 questions, so intervals are rough: fast is not shown to be less often right (+0.0 ±")


def test_the_verdict_says_where_branches_bring_nothing() -> None:
    """Greedy as good as the vote; a program that costs more; no stock; and without golds greedy is not asked about."""
    said = told_by({GREEDY: ALL, STOCK: ALL, "careful": ALL}, COST)
    assert (
        said
        == "one greedy sample is as often right as a vote of 4 (+0.0 ± 1.0 points) at 25 % of the tokens: these questions need no branches on this model"
    )
    dear = told_by({GREEDY: HALF, STOCK: ALL, "careful": ALL}, {**COST, "careful": 500.0})
    assert "takes 25 ± 0 % more tokens and 25 ± 0 % more mean latency" in dear
    assert "stock sampling was not measured" in told_by({GREEDY: HALF}, COST)
    assert "no program was measured" in told_by({GREEDY: HALF, STOCK: ALL}, COST)
    blind = told_by({GREEDY: ALL, STOCK: ALL, "careful": ALL}, COST, golds=False)
    assert blind.startswith(
        "careful is not shown to agree less often with the full vote than another vote would (+0.0 ±"
    )


def test_only_questions_that_all_ways_answered_are_compared() -> None:
    """And ways that have none are left out, so that what is there is shown."""
    measured, asking = measured_of({GREEDY: ALL[:9], STOCK: ALL[:8], "careful": ALL[:5]}, COST)
    assert measured.shared() == ((GREEDY, STOCK, "careful"), [f"line {i}" for i in range(5)])
    del measured.solved["line 1"][GREEDY]
    assert measured.shared()[1] == ["line 0", "line 2", "line 3", "line 4"]
    for id in measured.solved:
        measured.solved[id].pop("careful", None)
    ways, ids = measured.shared()
    assert (ways, len(ids)) == ((GREEDY, STOCK), 7)
    table = make_table(measured, asking, (), True)
    assert table is not None
    assert [line.way.name for line in table.lines] == [GREEDY, "stock, n=4"]
    assert Measured((GREEDY,)).shared() == ((), [])
    assert make_table(Measured((GREEDY,)), asking, (), True) is None


def test_a_second_vote_agrees_the_more_the_first_was_of_one_mind() -> None:
    """It is certain where all agree; where two answers tie half of the time."""
    told = [Sample(key, key, 1) for key in "aaaaaaaabbbbbbbb"]
    assert second_vote(told[:8], "x") == 1.0
    assert second_vote([Sample(None, None, 1)] * 4, "x") == 1.0
    assert 0.3 < second_vote(told, "x") < 0.7
    assert 0.8 < second_vote([*told[:8], *told[:4], *told[8:10]], "x") <= 1.0


@pytest.mark.parametrize(
    ("text", "kind"), [("B", "letter"), ("1,018", "number"), (r"\frac{1}{2}", "number"), ("x^2", "text"), ("apple", "text"), ("7", "number")]
)  # fmt: skip
def test_forms(text: str, kind: str) -> None:
    assert form(text) == kind


def test_golds_of_another_form_are_found_out() -> None:
    """Letters against numbers. A model that is only wrong, one that is once right, or too few answers are not told off."""
    letters = [Pair("B", str(i), False) for i in range(20)]
    said = gold_mismatch(letters)
    assert said is not None
    assert said.startswith(
        "golds are letters such as 'B' and answers numbers such as '0': of the first 20 none is right"
    )
    assert "give the choices" in said
    prose = gold_mismatch([Pair("18", "Tom has a few", False) for _ in range(20)])
    assert prose is not None
    assert "golds are numbers such as '18' and answers texts" in prose
    assert "--answer number" in prose
    assert gold_mismatch([Pair("18", str(i), False) for i in range(20)]) is None
    assert gold_mismatch([Pair("B", "C", False) for i in range(20)]) is None
    assert gold_mismatch([*letters[:19], Pair("B", "B", True)]) is None
    assert gold_mismatch([*letters[:12], *[Pair("B", "C", False)] * 8]) is None
    assert gold_mismatch([Pair("B", None, False)] * 20) is None
    assert gold_mismatch(letters[:4]) is None
    assert gold_mismatch([]) is None


# Runs


class Model(BaseHTTPRequestHandler):
    """A chat endpoint that adds two numbers, rightly in some of its samples."""

    def do_GET(self) -> None:
        is_there = self.path == "/v1/models" and self.server.models is not None  # type: ignore[attr-defined]
        self.answer(*((200, self.server.models) if is_there else (404, {"error": "no such path"})))  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        status, reply = self.server.reply(len(self.server.bodies), body)  # type: ignore[attr-defined]
        self.answer(status, reply)

    def answer(self, status: int, reply: dict[str, Any]) -> None:
        if status == 0:  # gone in the middle of a request
            self.close_connection = True
            return
        data = json.dumps(reply).encode()
        with suppress(OSError):  # nobody waits for it any more
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def adds(body: dict[str, Any], *, right: float = 0.7, n: int | None = None) -> tuple[int, dict[str, Any]]:
    """Its samples, of 10 to 60 tokens; greedy it is right for even sums only."""
    asked = body["messages"][0]["content"]
    first, second = map(int, re.findall(r"(\d+) \+ (\d+)", asked)[0])
    rng = random.Random(f"{asked}{body['temperature']}")
    num = body.get("n", 1) if n is None else n
    hit = [rng.random() < right if body["temperature"] else (first + second) % 2 == 0 for _ in range(num)]
    texts = [f"\\boxed{{{first + second if is_right else rng.randrange(90, 95)}}}" for is_right in hit]
    return 200, completion(texts, total=sum(rng.randrange(10, 60) for _ in range(num)))


@contextmanager
def serving(reply: Any) -> Iterator[OtherServer]:
    server = OtherServer(("127.0.0.1", 0), Model)
    server.reply, server.bodies = reply, []  # type: ignore[attr-defined]
    server.models = {"data": [{"id": "adder", "owned_by": "somebody"}]}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def sums(folder: Path, num: int = 40, **more: Any) -> Path:
    rows = ({"question": f"What is {i} + {i * i % 7}?", "gold": i + i * i % 7, **more} for i in range(num))
    return written(folder, "sums.jsonl", lines(*rows))


def bench(folder: Path, server: OtherServer, questions: Path, *options: str) -> Report:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    page = folder / "bench.html"
    args = make_parser().parse_args(
        ["bench", "--url", url, "--questions", str(questions), "--cap", "8", "--html", str(page), *options]
    )
    return run_bench(args)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PAUSES_S", (0.01, 0.01))


def test_any_chat_endpoint_is_measured_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the flag: greedy and stock live, programs replayed, all said; a page; samples that the simulator reads."""
    recorded = tmp_path / "samples.jsonl"
    with serving(lambda number, body: adds(body)) as server:
        report = bench(
            tmp_path, server, sums(tmp_path), "--samples", str(recorded), "--concurrency", "3", "--api-key", "secret"
        )
        bodies: list[dict[str, Any]] = server.bodies  # type: ignore[attr-defined]
    assert report.exit_code == 0
    assert [row["way"] for row in report.rows] == [
        "greedy", "stock, n=8", *(f"{level}, {width}, replayed" for width in ("wide", "narrow") for level in ("careful", "balanced", "fast"))
    ]  # fmt: skip
    assert len(bodies) == 2 + 2 * 40
    assert {body["model"] for body in bodies} == {"adder"}
    assert all("return_meta_info" not in body and "custom_params" not in body for body in bodies)
    assert all(body["messages"][0]["content"].endswith("\\boxed{}.") for body in bodies)
    stock = report.rows[1]
    greedy_right = float(report.rows[0]["right %"].split()[0])
    assert float(stock["right %"].split()[0]) > greedy_right
    assert all(
        re.fullmatch(r"[\d.]+ \([+-][\d.]+ ± [\d.]+\)", row["right %"]) for row in report.rows if row is not stock
    )
    assert all("-" in row["tokens"] for row in report.rows if row is not stock)
    assert report.rows[5]["mean s"] == "-"
    assert report.rows[2]["mean s"].startswith("~")
    text = "\n".join(report.lines)
    assert "40 of 40 questions" in text
    assert "replayed: the server has no --scheduler dynasor" in text
    assert "estimated from the lengths" in text
    assert "would take" in report.lines[-1]
    assert "where all branches start at once" in report.lines[-1]
    html = (tmp_path / "bench.html").read_text()
    assert html.count("<svg") == 3
    assert "secret" not in html
    assert not re.search(r"(?:src|href)=", html)
    found = read_recorded(recorded, None, 1)
    assert len(found) == 40
    assert all(len(question.samples) == 8 and question.greedy is not None for question in found)
    right = mean(sample.is_correct or False for question in found for sample in question.samples)
    assert 0.6 < right < 0.8
    assert re.search(r"\d+ of 40 questions, \d:\d\d of 10:00", capsys.readouterr().err)


def test_without_golds_agreement_is_shown(tmp_path: Path) -> None:
    questions = written(tmp_path, "a.csv", "Question\n" + "\n".join(f"What is {i} + 2?" for i in range(12)) + "\n")
    with serving(lambda number, body: adds(body)) as server:
        report = bench(tmp_path, server, questions)
    assert report.rows[1]["agrees %"].startswith("~")
    assert "right %" not in report.rows[0]
    assert any("how often a second such vote would" in line for line in report.lines)
    assert "full vote" in report.lines[-1]


def test_golds_of_another_form_are_said_during_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After twenty questions, while others follow; then agreement takes the place of accuracy."""
    with serving(lambda number, body: adds(body)) as server:
        report = bench(tmp_path, server, sums(tmp_path, gold="B"))
    assert "warning: golds are letters such as 'B' and answers numbers" in capsys.readouterr().err
    assert report.lines[0].startswith("- golds are letters such as 'B' and answers numbers")
    assert "agrees %" in report.rows[0]
    assert report.exit_code == 0


@pytest.mark.parametrize("status", [0, 503])
def test_a_server_that_goes_away_keeps_what_was_measured(status: int, tmp_path: Path) -> None:
    """It dies at the 26th request: of three ways of 8 + ... questions those that both ways answered are there; the exit code says so."""
    with serving(
        lambda number, body: adds(body) if number < 26 else (status, {"error": {"message": "overloaded"}})
    ) as server:
        report = bench(tmp_path, server, sums(tmp_path))
        assert len(server.bodies) == 25 + 3  # type: ignore[attr-defined]
    assert report.exit_code == EARLY
    text = "\n".join(report.lines)
    assert "11 of 40 questions" in text
    assert "ended early: the server is gone" in text
    assert "1 more questions were answered in some ways only" in text
    assert (tmp_path / "bench.html").exists()


def test_a_request_that_fails_once_is_sent_again(tmp_path: Path) -> None:
    """And counted; the run goes on."""
    with serving(lambda number, body: (500, {}) if number in (5, 9) else adds(body)) as server:
        report = bench(tmp_path, server, sums(tmp_path, 10))
    assert report.exit_code == 0
    assert sum(float(row["requests"]) for row in report.rows[:2]) == pytest.approx(2.2)


def test_a_question_that_is_refused_is_left_out(tmp_path: Path) -> None:
    """A prompt too long is no reason to stop; that all are refused is."""

    def reply(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_long = "What is 3 +" in body["messages"][0]["content"] and body["max_tokens"] > 16
        return (400, {"error": {"message": "too long"}}) if is_long else adds(body)

    with serving(reply) as server:
        report = bench(tmp_path, server, sums(tmp_path, 10))
    assert report.exit_code == 0
    assert any("1 questions were refused and are left out: HTTP 400: too long" in line for line in report.lines)
    with (
        serving(lambda number, body: adds(body) if number < 3 else (400, {"message": "no"})) as server,
        pytest.raises(ConfigError, match="nothing was measured: the server refuses: HTTP 400: no"),
    ):
        bench(tmp_path, server, sums(tmp_path, 10))
    with serving(lambda number, body: adds(body) if number < 13 else (429, {"message": "slowly"})) as server:
        report = bench(tmp_path, server, sums(tmp_path, 10))
    assert report.exit_code == EARLY
    assert any("ended early: the server refuses: HTTP 429: slowly" in line for line in report.lines)


def test_time_that_is_up_ends_the_run(tmp_path: Path) -> None:
    """With what there is, and exit code 0; a hanging server cannot hold it, and where nothing was done it says so."""
    is_over = threading.Event()

    def hangs_from(first: int, number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if number >= first:
            is_over.wait(120)
        return adds(body)

    try:
        with serving(lambda number, body: hangs_from(12, number, body)) as server:
            report = bench(tmp_path, server, sums(tmp_path), "--minutes", "0.1")  # enough for one question anywhere
        assert report.exit_code == 0
        assert any(re.match(r"- [1-4] of 40 questions, in 0\.\d minutes", line) for line in report.lines), report.lines
        with (
            serving(lambda number, body: hangs_from(3, number, body)) as server,
            pytest.raises(
                ConfigError,
                match=r"nothing was measured: 4 questions were not done in 0.01 minutes; give more, or fewer at once",
            ),
        ):
            bench(tmp_path, server, sums(tmp_path, 5), "--minutes", "0.01", "--concurrency", "2")
    finally:
        is_over.set()


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run._ask_all

    async def interrupted(measured: Measured, *more: Any) -> None:
        if len(measured.solved) == 6:
            raise KeyboardInterrupt
        await asked(measured, *more)

    monkeypatch.setattr(run, "_ask_all", interrupted)
    with serving(lambda number, body: adds(body)) as server:
        report = bench(tmp_path, server, sums(tmp_path))
    assert report.exit_code == EARLY
    assert any("ended early: it was interrupted" in line for line in report.lines)


def test_what_cannot_be_measured_is_said_first(tmp_path: Path) -> None:
    """A server without `n`, one that counts nothing, one that asks for a key, none at all."""
    questions = sums(tmp_path, 5)
    with (
        serving(lambda number, body: adds(body, n=1)) as server,
        pytest.raises(ConfigError, match="returned 1 of 8 choices: its"),
    ):
        bench(tmp_path, server, questions)
    with serving(lambda number, body: (200, {"choices": [{}]})) as server, pytest.raises(ConfigError, match="no usage"):
        bench(tmp_path, server, questions)
    with (
        serving(lambda number, body: (401, {"error": {"message": "who are you"}})) as server,
        pytest.raises(ConfigError, match="does not answer 'greedy': HTTP 401: who are you"),
    ):
        bench(tmp_path, server, questions)
    with serving(lambda number, body: adds(body)) as server:
        gone = server
    with pytest.raises(ConfigError, match=r"--url=http://127.0.0.1:\d+ does not answer: .*; give http://HOST:PORT"):
        bench(tmp_path, gone, questions)


def test_a_server_that_lists_no_models(tmp_path: Path) -> None:
    """It is measured where the name is given; else it is said that this is missing."""
    with serving(lambda number, body: adds(body)) as server:
        server.models = None  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"its /v1/models says HTTP 404, .*; if it is one, give --model"):
            bench(tmp_path, server, sums(tmp_path, 5))
        assert bench(tmp_path, server, sums(tmp_path, 5), "--model", "adder").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], r"--minutes=0 is outside \[0.01, 10080\]; choose"),
        (["--minutes", "nan"], "--minutes=nan is outside"),
        (["--cap", "1"], r"--cap=1 is outside \[2, 256\]; choose"),
        (["--cap", "257"], "--cap=257 is outside"),
        (["--concurrency", "0"], "--concurrency=0 is outside"),
        (["--temperature", "0"], r"--temperature=0 is outside \[0.001, 2\]"),
        (["--max-tokens", "0"], "--max-tokens=0 is outside"),
        (["--stop", "sloppy"], "--stop: dynasor.stop='sloppy': 'sloppy' is not a rule"),
        (["--stop", "greedy"], "--stop greedy is measured anyway; leave it out"),
        (["--stop", "mixture"], "--stop: dynasor.stop='mixture'|--stop mixture reads logits"),
        (["--answer", "haiku"], "--answer: dynasor.answer='haiku' is not an extractor"),
        (["--html", "nowhere/a.html"], "--html=nowhere/a.html cannot be written; choose"),
    ],
)
def test_options_out_of_range_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with serving(lambda number, body: adds(body)) as server, pytest.raises(ConfigError, match=message):
        bench(tmp_path, server, sums(tmp_path, 5), *options)


def test_the_url_may_end_with_v1(tmp_path: Path) -> None:
    with serving(lambda number, body: adds(body)) as server:
        for end in ("", "/", "/v1", "/v1/"):

            async def connected(end: str = end) -> Chat:
                async with httpx.AsyncClient() as client:
                    return await Chat.connect(client, f"http://127.0.0.1:{server.server_address[1]}{end}", None)

            found = asyncio.run(connected())
            assert (found.model, found.is_sglang, found.has_scheduler) == ("adder", False, False)


def test_blocks() -> None:
    """One question at a time where one is under way; else so many that what runs beside it is asked in its way, too."""
    asked = [Question(str(i), "?") for i in range(10)]
    assert [len(block) for block in blocks(asked, 1)] == [1] * 10
    assert [len(block) for block in blocks(asked, 2)] == [4, 4, 2]
    assert [question for block in blocks(asked, 4) for question in block] == asked


def test_what_is_sent() -> None:
    """Choices by letter and what to do; programs by the one field, with the extractor that reads stock's samples."""
    asking = Asking(cap=4, max_tokens=50)
    choice = Question("1", "Which?", "A", ("x", "y"))
    assert asking.body(STOCK, choice)["n"] == 4
    assert asking.body(GREEDY, choice)["temperature"] == 0
    program = asking.body("fast", choice)
    assert program["custom_params"] == {"dynasor": {"branches": 4, "stop": "fast", "answer": "choice"}}
    assert "n" not in program
    assert program["messages"][0]["content"].startswith("Which?\n\nA) x\nB) y\n\nThink")
    assert read_answer("", "The answer is \\boxed{B}", asking.extractor(choice)) == "B"
    assert Asking(instruction="").body(GREEDY, Question("1", "Q?"))["messages"][0]["content"] == "Q?"


def test_every_option_is_explained() -> None:
    """In docs/bench.md; and nothing is explained that is not there."""
    parser = argparse.ArgumentParser()
    add_bench_options(parser)
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    text = (ROOT / "docs" / "bench.md").read_text()
    table = text.partition("## Options")[2].partition("## How")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", table.replace(" simulate", ""))) == options

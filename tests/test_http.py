"""The server as an operator starts it and clients call it: the docs' own snippets, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import chromium, needs_chromium
from engines import REASONER, ROOT
from questions import held_out, prompt
from server import Server
from warm import run_python

from sglang_dynasor import solve
from sglang_dynasor.frontend import Endpoint
from sglang_dynasor.observe.ledger import STATUS_HELP

pytestmark = pytest.mark.engine
README, SERVING, FRONTEND, LONG_COT = (
    (ROOT / name).read_text() for name in ("README.md", "docs/serving.md", "docs/frontend.md", "docs/long_cot.md")
)
QUESTION = held_out(12)[8]


def generate(server: Server, **field: Any) -> httpx.Response:
    body = {
        "text": prompt(QUESTION.text),
        "sampling_params": {"max_new_tokens": 200, "custom_params": {"dynasor": {"answer": "hash", **field}}},
    }
    return httpx.post(f"{server.url}/generate", json=body, timeout=120)


TEMPLATES = """
["vote@1"]
branches = 3
answer = "hash"

["vote@2"]
branches = 4
answer = "hash"

["asked@1"]
branches = 2
answer = "hash"
before = "Q: "
after = "\\nA:\\n"

["told@1"]
branches = 2
answer = "hash"
before = """
# Of requests without a field; other tests send other models, and these endpoints only where a field is refused or not.
DEFAULTS = """
[[default]]
endpoint = "/v1/responses"
template = "vote"

[[default]]
model = "voter"
template = "vote@1"
"""


def templates(more: str = "") -> str:
    """The operator's file; `told` puts the whole question before a chat's own words, which are none then."""
    return f"{TEMPLATES}{json.dumps(QUESTION.text)}\n{more}\n{DEFAULTS}"


@pytest.fixture(scope="module")
def template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("templates") / "t.toml"
    file.write_text(templates())
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, template_file: Path) -> Iterator[Server]:
    running = Server(
        tmp_path_factory.mktemp("server") / "log", "--scheduler", "dynasor", "--enable-metrics", "--dynasor-templates", str(template_file),
        "--dynasor-owner-header", "x-user",
    )  # fmt: skip
    try:
        running.wait(480)  # three processes import SGLang, where other tests run
        yield running
    finally:
        running.stop()


def block(text: str, language: str, containing: str) -> str:
    (found,) = (b for b in re.findall(rf"```{language}\n(.*?)```", text, re.S) if containing in b)
    return found


def run_script(path: Path, text: str) -> str:
    """What a script prints."""
    path.write_text(text)
    done = run_python([str(path)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_s_client_works(server: Server, tmp_path: Path) -> None:
    """The first thing a reader copies, and what it says below that this printed."""
    script = block(README, "python", "openai").replace("127.0.0.1:30000", f"127.0.0.1:{server.port}")
    printed = run_script(tmp_path / "client.py", script)
    told, _, _ = README.partition("it printed:\n\n```\n")[2].partition("```")
    text, record = told.split("program: ")
    said = printed.partition("program: ")[0]
    assert said in (text, text.splitlines(keepends=True)[-1])  # now and then the model writes the answer alone
    assert re.findall(r"^(\w+): ", printed, re.M) == re.findall(r"^(\w+): ", f"program: {record}", re.M)
    for line in ("answer: 19", "cap: 16", "width: 4", "gang: 4", "stop_reason: certain"):
        assert line in told
        assert line in printed


def test_bench_compares_the_levels(server: Server, tmp_path: Path) -> None:
    """From the command line: greedy, stock and programs on one server, paired, with a table, a verdict and a page."""
    page, file = tmp_path / "bench.html", tmp_path / "held_out.jsonl"
    file.write_text("\n".join((REASONER / "held_out.jsonl").read_text().splitlines()[:8]))
    options = ["--cap", "8", "--temperature", "1.0", "--max-tokens", "200", "--instruction", "", "--concurrency", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "sglang_dynasor.cli", "bench", "--url", server.url, "--questions", str(file), "--html", str(page), *options],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    ways = [re.split(r"  +", line.strip()) for line in lines[1:6]]
    assert [way[0] for way in ways] == ["greedy", "stock, n=8", "careful", "balanced", "fast"]
    tokens = {way[0]: float(way[2].split()[0].replace(",", "")) for way in ways}
    branches = {way[0]: float(way[5]) for way in ways}
    assert tokens["greedy"] < tokens["fast"] <= tokens["stock, n=8"] * 1.5
    assert branches["greedy"] == 1
    assert branches["stock, n=8"] == 8
    assert all(2 <= branches[level] <= 8 for level in ("careful", "balanced", "fast"))
    assert "- 8 of 8 questions" in done.stdout
    assert "replayed" not in done.stdout
    assert "estimated" not in done.stdout  # SGLang says the tokens of each sample
    assert lines[-1].startswith("only 8 questions")
    assert page.read_text().count("<svg") == 3


def test_every_counter_is_explained(server: Server) -> None:
    """In the reference; and nothing is explained that is not there."""
    assert set(server.status()) == set(STATUS_HELP)


def test_the_guide_s_curl_works(server: Server) -> None:
    """docs/serving.md, without a client library."""
    out = curled(server, '"algorithm"')
    assert out["meta_info"]["dynasor"]["answer"] == "19"
    assert out["meta_info"]["finish_reason"]["type"] == "stop"
    records = [out["meta_info"]["dynasor"] for out in curled(server, '"budget_tokens"')]
    assert [record["answer"] for record in records] == ["19", "5"]


def curled(server: Server, containing: str) -> Any:
    """What the guide's command that contains this brings."""
    command = block(SERVING, "bash", containing).replace("127.0.0.1:30000", f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=400, check=True)
    return json.loads(done.stdout)


def test_the_guide_s_openai_client_works(server: Server) -> None:
    """docs/serving.md: the OpenAI client sends one field more and finds the record by the response's id."""
    script = block(SERVING, "python", "openai").replace("127.0.0.1:30000", f"127.0.0.1:{server.port}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "#### 19" in done.stdout
    assert "certaindex" in done.stdout


def test_the_readme_s_frontend_program_works(server: Server, tmp_path: Path) -> None:
    """As an author copies it, with a backend and a question."""
    printed = run_script(
        tmp_path / "author.py",
        block(README, "python", "reason(s, branches=16")
        + f"\n\nsgl.set_default_backend(Endpoint('{server.url}'))\np = solve.run({QUESTION.text!r}).ret_value\n"
        + "print(p.answer, p.certaindex, p.stop_reason)\n",
    )
    assert re.match(rf"{QUESTION.answer} [01]\.\d+ (certain|cap)", printed)


def test_the_guide_s_program_works(server: Server, tmp_path: Path) -> None:
    """docs/frontend.md, its first program, whole."""
    program = block(FRONTEND, "python", "sgl.set_default_backend").replace("http://127.0.0.1:30000", server.url)
    assert re.match(r"19 [01]\.\d+ \{'19': \d+", run_script(tmp_path / "author.py", program))


@pytest.mark.parametrize("containing", ["reports=True", '"rebase"'])
def test_the_guide_s_parts_work(server: Server, tmp_path: Path, containing: str) -> None:
    """Those that stand in a function of the author's."""
    part = block(FRONTEND, "python", containing)
    printed = run_script(
        tmp_path / "author.py",
        "import sglang as sgl\nfrom sglang_dynasor.frontend import Endpoint, reason\n\n"
        + f"def run_tests(text):\n    return float('#### {QUESTION.answer}' in text)\n\n"
        + f"@sgl.function\ndef solve(s):\n    s += {prompt(QUESTION.text)!r}\n"
        + "".join(f"    {line}\n" for line in part.splitlines())
        + f"    return p\n\nsgl.set_default_backend(Endpoint('{server.url}'))\np = solve.run().ret_value\n"
        + "print(p.answer, p.stop_reason, len(p.branches))\n",
    )
    answer, reason, _ = printed.split()
    assert answer.isdigit()
    assert reason in ("certain", "cap")
    if containing == "reports=True":  # the rule is that one passes
        assert (answer, reason) == (str(QUESTION.answer), "certain")


def test_the_guide_s_batch_works(server: Server, tmp_path: Path) -> None:
    """An address stands for an engine, as the snippet says."""
    given = f"engine, prompts = {server.url!r}, [{prompt(QUESTION.text)!r}] * 3\n"
    printed = run_script(tmp_path / "batch.py", given + block(FRONTEND, "python", "results.table()"))
    assert len(re.findall(rf"^{QUESTION.answer} [01]\.\d+ \d+ certain$", printed, re.M)) >= 2


def test_chats_are_solved_through_an_address(server: Server) -> None:
    """By the chat template of the server's model."""
    chat = [{"role": "user", "content": QUESTION.text}]
    with closing(Endpoint(server.url)) as backend:
        assert backend.render(chat) == prompt(QUESTION.text)
        (result,) = solve(backend, iter([chat]), max_tokens=200, answer="hash", branches=3, progress=False)
    assert result.question == QUESTION.text
    assert result.num_tokens > 0


def test_the_guide_s_own_rule_works(server: Server, tmp_path: Path) -> None:
    """Three votes ahead are enough, says the author; the default rule asks for four."""
    given = f"import sglang_dynasor\n\nengine, prompts = {server.url!r}, [{prompt(QUESTION.text)!r}]\n"
    rule = block(FRONTEND, "python", "stop=lambda")
    printed = run_script(
        tmp_path / "rule.py", given + rule + "print(results[0].record['votes'], results[0].stop_reason)\n"
    )
    assert re.search(rf"'answer': '{QUESTION.answer}', 'votes': [3-9]", printed)
    assert printed.rstrip().endswith("certain")


def test_the_field_of_long_thoughts_is_taken(server: Server) -> None:
    """docs/long_cot.md: any question of any model that has an end of thought."""
    response = generate(server, **json.loads(block(LONG_COT, "json", "long_cot")))
    assert response.status_code == 200, response.text
    assert response.json()["meta_info"]["dynasor"]["closed_at_tokens"] == [None]  # too short to be asked


def test_openai_completions_and_streaming(server: Server) -> None:
    """/v1/completions takes the field too; a stream brings the answer in one piece and says what it used."""
    body = {
        "model": "any", "prompt": prompt(QUESTION.text), "max_tokens": 200, "stream": True,
        "stream_options": {"include_usage": True}, "custom_params": {"dynasor": {"answer": "hash"}},
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    texts = [c["choices"][0]["text"] for c in chunks if c["choices"] and c["choices"][0]["text"]]
    assert len(texts) == 1
    assert "####" in texts[0]
    record = httpx.get(f"{server.url}/dynasor/programs/{chunks[0]['id']}", timeout=30).json()
    assert chunks[-1]["usage"]["completion_tokens"] == record["num_tokens"]


def test_chat_returns_the_record_on_request(server: Server) -> None:
    """With return_meta_info the record comes in the response itself."""
    body = {
        "model": "any", "messages": [{"role": "user", "content": QUESTION.text}], "max_tokens": 200,
        "return_meta_info": True, "custom_params": {"dynasor": {"answer": "hash"}},
    }  # fmt: skip
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["meta_info"]["dynasor"]["num_branches"] >= 3


def test_metadata_carries_the_field(server: Server) -> None:
    """What a client or a router has no other place for, as text or as it is; the record is in a chat's answer, else by the response's id."""
    asks = {"branches": 3, "answer": "hash"}
    chat = {"model": "any", "messages": [{"role": "user", "content": QUESTION.text}], "max_tokens": 200}
    text = {"model": "any", "prompt": prompt(QUESTION.text), "max_tokens": 200}
    served = plain_body(server, "/v1/responses")["model"]
    for path, body, field in (
        ("/v1/chat/completions", chat, json.dumps(asks)),
        ("/v1/chat/completions", chat, asks),
        ("/v1/completions", text, json.dumps(asks)),
        ("/v1/responses", {"model": served, "input": QUESTION.text, "max_output_tokens": 200, "temperature": 1}, json.dumps(asks)),
        ("/v1/messages", {**chat, "temperature": 1}, json.dumps(asks)),
        ("/v1/chat/completions", chat, "vote@1"),
    ):  # fmt: skip
        metadata = {"dynasor": field, "user_id": "u"}
        response = httpx.post(server.url + path, json={**body, "metadata": metadata}, timeout=120)
        assert response.status_code == 200, response.text
        answer = response.json()
        record = newest(server)
        assert (record["cap"], record.get("template")) == (3, "vote@1" if field == "vote@1" else None), path
        if path == "/v1/chat/completions":
            told = answer["choices"][0]["meta_info"]["dynasor"]
            assert {key: record[key] for key in told} == told
        if path != "/v1/messages":
            kept = httpx.get(f"{server.url}/dynasor/programs/{answer['id']}", timeout=30).json()
            assert kept["program"] == record["program"]
    streamed = {**chat, "stream": True, "metadata": {"dynasor": "vote@2"}}
    chunks = httpx.post(f"{server.url}/v1/chat/completions", json=streamed, timeout=120).text.split("data: ")[1:-1]
    kept = httpx.get(f"{server.url}/dynasor/programs/{json.loads(chunks[0])['id']}", timeout=30).json()
    assert kept["template"] == "vote@2"
    plain = {**chat, "model": "voter", "max_tokens": 4, "metadata": {"dynasor": "plain"}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=plain, timeout=120).json()
    assert httpx.get(f"{server.url}/dynasor/programs/{answer['id']}", timeout=30).status_code == 404


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_prompt_of_one_request_has_its_record(server: Server, is_streamed: bool) -> None:
    """A response of completions names the first program only; the others' ids end in their choice's number."""
    body = {
        "model": "any", "prompt": [prompt(QUESTION.text)] * 3, "max_tokens": 200, "stream": is_streamed,
        "custom_params": {"dynasor": {"branches": 2, "answer": "hash"}},
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    if is_streamed:
        chunks = [json.loads(chunk) for chunk in response.text.split("data: ")[1:-1]]
        ids = {choice["index"]: chunk["id"] for chunk in chunks for choice in chunk["choices"]}
    else:
        ids = {0: response.json()["id"]}
    name = ids[0].removesuffix("_0")
    records = [httpx.get(f"{server.url}/dynasor/programs/{name}_{i}", timeout=30).json() for i in range(3)]
    assert [record["program"] for record in records] == [f"{name}_{i}" for i in range(3)]
    assert all(record["num_branches"] == 2 for record in records)
    assert all(ids[i] == f"{name}_{i}" for i in ids)
    if not is_streamed:
        spent = response.json()["usage"]["completion_tokens"]
        assert spent == sum(record["num_tokens"] for record in records)


@pytest.mark.parametrize(
    ("effort", "field", "agree"),
    [("high", {}, 3), ("minimal", {}, 1), (None, {}, 2), ("none", {}, 2), ("high", {"effort": "low"}, 1)],
)
def test_reasoning_effort_says_how_soon_a_thought_may_close(
    server: Server, effort: str | None, field: dict[str, Any], agree: int
) -> None:
    """OpenAI's own key reaches the field; the field's own `effort` wins, and "none" changes nothing."""
    body = {
        "model": "any", "messages": [{"role": "user", "content": QUESTION.text}], "max_tokens": 300,
        "chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": effort,
        "return_meta_info": True, "custom_params": {"dynasor": {"algorithm": "long_cot", "answer": "hash", **field}},
    }  # fmt: skip
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["meta_info"]["dynasor"]["exit"].startswith(f"{agree} agreeing trials")


def test_n_chat_choices_end_early_together(server: Server) -> None:
    """Every choice comes back with a finish_reason of the API; those not needed cost less."""
    body = {
        "model": "any", "messages": [{"role": "user", "content": QUESTION.text}], "max_tokens": 300, "n": 16,
        "temperature": 1.0, "return_meta_info": True, "chat_template_kwargs": {"enable_thinking": True}, "custom_params": {"dynasor": {"answer": "hash"}},
    }  # fmt: skip
    choices = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()["choices"]
    assert len(choices) == 16
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert len({choice["meta_info"]["dynasor"]["program"] for choice in choices}) == 1
    assert any("####" not in (choice["message"]["content"] or "") for choice in choices)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"branches": 1000}, "dynasor.branches=1000 is outside [1, 64]"),
        ({"widht": 2}, "dynasor.widht is not a key"),
        ({"stop": "later"}, "dynasor.stop='later'"),
        ({"branches": 2.5}, "dynasor.branches=2.5 is a float"),
    ],
)
def test_a_wrong_field_is_a_400(server: Server, field: dict[str, Any], message: str) -> None:
    """The error names the field and what is allowed, and nothing is enqueued."""
    before = wait_until_idle(server)
    response = generate(server, **field)
    assert response.status_code == 400
    assert message in response.text
    assert server.status() == before


def plain_body(server: Server, path: str) -> dict[str, Any]:
    """A request of a few tokens that asks for no program."""
    model = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["id"]  # /v1/responses takes no other
    chat = {"model": "any", "messages": [{"role": "user", "content": "Q"}], "max_tokens": 1}
    return {
        "/generate": {"text": "Q", "sampling_params": {"max_new_tokens": 1}},
        "/v1/completions": {"model": "any", "prompt": "Q", "max_tokens": 1},
        "/v1/responses": {"model": model, "input": "Q", "max_output_tokens": 8},
        "/api/chat": {**chat, "options": {"num_predict": 1}},
        "/api/generate": {"model": "any", "prompt": "Q", "options": {"num_predict": 1}},
    }.get(path, chat)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("/generate", {"dynasor": {"answer": "hash"}}, "dynasor is not read by /generate"),
        ("/generate", {"sampling_params": {"dynasor": {}}}, "sampling_params.dynasor is not read by /generate"),
        ("/generate", {"custom_params": {"dynasor": {}}}, "custom_params.dynasor is not read by /generate"),
        ("/v1/completions", {"dynasor": {"answer": "hash"}}, "send the field as custom_params.dynasor"),
        ("/v1/chat/completions", {"dynasor": {}}, "dynasor is not read by /v1/chat/completions"),
        ("/v1/chat/completions", {"extra_body": {"custom_params": {"dynasor": {}}}}, "argument of the OpenAI Python client"),
        ("/v1/chat/completions", {"custom_params": {"dynasour": {}}}, "custom_params.dynasour is not read"),
        ("/v1/chat/completions", {"custom_param": {"dynasor": {}}}, "custom_param.dynasor is not read"),
        ("/v1/responses", {"custom_params": {"dynasor": {}}}, "send the field as metadata.dynasor"),
        ("/v1/messages", {"dynasor": {}}, "send the field as metadata.dynasor"),
        ("/generate", {"metadata": {"dynasor": "{}"}}, "metadata.dynasor is not read by /generate"),
        ("/v1/chat/completions", {"metadata": {"dynasor": "{"}}, "metadata.dynasor='{' is neither a name nor the JSON"),
        ("/v1/completions", {"metadata": {"dynasor": "{"}}, "metadata.dynasor='{' is neither a name nor the JSON"),
        ("/v1/responses", {"metadata": {"dynasor": "{"}}, "metadata.dynasor='{' is neither a name nor the JSON"),
        ("/v1/messages", {"metadata": {"dynasor": "{"}}, "is neither a name nor the JSON"),
        ("/v1/chat/completions", {"metadata": {"dynasor": "nobody"}}, "dynasor.template='nobody' is not known"),
        ("/v1/completions", {"metadata": {"dynasor": '{"branches": 1000}'}}, "dynasor.branches=1000 is outside [1, 64]"),
        ("/v1/chat/completions", {"metadata": {"dynasor": "{}"}, "custom_params": {"dynasor": {}}}, "are both there"),
        ("/v1/chat/completions", {"metadata": {"dynasor": "{"}, "stream": True}, "is neither a name nor the JSON"),
        ("/api/chat", {"dynasor": {}}, "/api/chat, which takes no dynasor field"),
        ("/api/generate", {"options": {"dynasor": {}}, "stream": False}, "/api/generate, which takes no dynasor field"),
    ],
)  # fmt: skip
def test_a_field_at_the_wrong_place_is_a_400(server: Server, path: str, more: dict[str, Any], message: str) -> None:
    """SGLang would drop it, and answer with one plain sample; nothing is enqueued."""
    before = wait_until_idle(server)
    response = httpx.post(server.url + path, json=plain_body(server, path) | more, timeout=60)
    assert response.status_code == 400, response.text
    assert message in response.text
    assert server.status() == before


@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
    ],
)
def test_a_plain_request_with_keys_of_its_own_is_served(server: Server, path: str) -> None:
    """Those that SGLang drops, and those that only sound like ours."""
    more: dict[str, Any] = {
        "extra_body": {"top_k": 3},
        "labels": {"dynasor": "x"},
        "dynamo": {},
        "custom_params": {"dynamo": 1},
    }
    if path != "/generate":
        more["metadata"] = {"user_id": "dynasor", "note": "dynasor"}
    response = httpx.post(server.url + path, json=plain_body(server, path) | more, timeout=60)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ({"text": ""}, {}, "the prompt has no tokens"),
        ({"input_ids": [5, 10**6]}, {}, "input_ids has 1000000, outside [0, "),
        ({"input_ids": [-5]}, {}, "input_ids has -5, outside [0, "),
        ({"text": "Q", "input_ids": [[5], [6]]}, {}, "input_ids has [5], outside [0, "),
        ({"text": "Q"}, {"top_k": 2**31}, "top_k=2147483648 is above 2147483647"),
        ({"text": "Q", "positional_embed_overrides": 1.0}, {}, "positional_embed_overrides=1.0 is no PositionalEmbeds"),
        ({"text": "Q", "lora_id": []}, {}, "lora_id=[] is SGLang's own"),
        ({"text": "Q", "lora_id": "x", "extra_key": "k"}, {}, "send the adapter's name as lora_path"),
    ],
)
def test_what_ends_sglang_by_itself_is_a_400(
    server: Server, prompt: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    """Where the field is there, also of a client's own branch. Nobody beside it is disturbed."""
    for field in ("self_consistency", {"program": "ends", "branches": 2}):
        params = {**sampling, "custom_params": {"dynasor": field}}
        response = httpx.post(f"{server.url}/generate", json={**prompt, "sampling_params": params}, timeout=60)
        assert response.status_code == 400
        assert message in response.text
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200


def test_tokens_of_the_vocabulary_are_served(server: Server) -> None:
    body = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 4, "top_k": 2**31 - 1, "custom_params": {"dynasor": {"branches": 2}}},
    }
    assert httpx.post(f"{server.url}/generate", json=body, timeout=60).status_code == 200


def test_a_beam_search_of_sglang_s_own_is_a_400(server: Server) -> None:
    """SGLang drops the field from it."""
    body = {"text": "Q", "sampling_params": {"beam_width": 2, "custom_params": {"dynasor": "self_consistency"}}}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "beam_width=2 with dynasor is not supported" in response.text


def test_greedy_branches_are_a_400(server: Server) -> None:
    """Sixteen times the same answer would be no evidence."""
    body = {"text": "Q", "sampling_params": {"temperature": 0, "custom_params": {"dynasor": "self_consistency"}}}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "greedy" in response.text


def newest(server: Server) -> dict[str, Any]:
    """The newest record."""
    return httpx.get(f"{server.url}/dynasor/programs?state=done&limit=1", timeout=30).json()[0]


def test_a_template_is_asked_for_by_its_name(server: Server) -> None:
    """The newest version, one by number, one with a key of the client's; text goes around the prompt. The record says which."""
    for asked, name, cap in (
        ("vote", "vote@2", 4),
        ("vote@1", "vote@1", 3),
        ({"template": "vote", "branches": 2}, "vote@2", 2),
    ):
        body = {
            "text": prompt(QUESTION.text),
            "sampling_params": {"max_new_tokens": 200, "custom_params": {"dynasor": asked}},
        }
        record = httpx.post(f"{server.url}/generate", json=body, timeout=120).json()["meta_info"]["dynasor"]
        assert (record["template"], record["cap"]) == (name, cap)
    body = {"text": QUESTION.text, "return_prompt_token_ids": True, "sampling_params": {"max_new_tokens": 200}}
    plain, asked, wrapped = (
        httpx.post(f"{server.url}/generate", json=each, timeout=120).json()
        for each in (
            {**body, "text": prompt(QUESTION.text)},
            {**body, "sampling_params": {"max_new_tokens": 200, "custom_params": {"dynasor": "plain"}}},
            {**body, "sampling_params": {"max_new_tokens": 200, "custom_params": {"dynasor": "asked"}}},
        )
    )
    assert wrapped["prompt_token_ids"] == plain["prompt_token_ids"] != asked["prompt_token_ids"]
    assert wrapped["meta_info"]["dynasor"]["template"] == "asked@1"
    assert "dynasor" not in asked["meta_info"]
    wrong = generate(server, template="nobody")
    assert wrong.status_code == 400
    assert "the templates are vote, asked, told" in wrong.text


def test_a_chat_has_its_template_around_it(server: Server) -> None:
    """The question is the template's; the answer and the tokens are those of a chat that asks it itself."""
    body = {"model": "any", "max_tokens": 200, "return_meta_info": True}
    answers = [
        httpx.post(f"{server.url}/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": text}], "custom_params": {"dynasor": field}}, timeout=120).json()
        for text, field in ((QUESTION.text, {"branches": 2, "answer": "hash"}), ("", "told"))
    ]  # fmt: skip
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]
    assert answers[1]["choices"][0]["meta_info"]["dynasor"]["template"] == "told@1"


def test_clients_that_cannot_send_a_field_have_programs(server: Server) -> None:
    """Responses, Messages, Ollama, a router that drops it: by endpoint and model, where the request can be one."""
    chat = {"model": "voter", "messages": [{"role": "user", "content": QUESTION.text}], "stream": False}
    served = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["id"]
    text = {"prompt": prompt(QUESTION.text), "model": "voter", "stream": False}
    bodies: dict[str, Any] = {
        "/v1/responses": {"model": served, "input": QUESTION.text, "max_output_tokens": 200, "temperature": 1},
        "/v1/messages": {**chat, "max_tokens": 200, "temperature": 1},
        "/v1/chat/completions": {**chat, "max_tokens": 200},
        "/v1/completions": {**text, "max_tokens": 200},
        "/api/chat": {**chat, "options": {"num_predict": 200}},
        "/api/generate": {**text, "options": {"num_predict": 200}},
    }

    def counted() -> list[tuple[int, int]]:
        rows = httpx.get(f"{server.url}/dynasor/templates", timeout=30).json()["defaults"]
        return [(row["num_given"], row["num_plain"]) for row in rows]

    before, rows = server.status()["num_programs"], counted()
    for number, (path, body) in enumerate(bodies.items(), 1):
        response = httpx.post(server.url + path, json=body, timeout=120)
        assert response.status_code == 200, response.text
        assert "####" in response.text, path
        assert server.status()["num_programs"] == before + number, path
        assert newest(server)["template"] == ("vote@2" if path == "/v1/responses" else "vote@1")
    for path, body in (
        ("/v1/chat/completions", {**chat, "max_tokens": 9, "temperature": 0}),
        ("/v1/chat/completions", {**chat, "max_tokens": 9, "n": 2}),
        ("/v1/completions", {**text, "max_tokens": 9, "custom_params": {"dynasor": "plain"}}),
        ("/api/chat", {**chat, "options": {"num_predict": 9, "temperature": 0}}),
        ("/generate", {"text": "Q", "sampling_params": {"max_new_tokens": 1}}),
        ("/v1/chat/completions", {**chat, "model": "other", "max_tokens": 9}),
    ):
        assert httpx.post(server.url + path, json=body, timeout=60).status_code == 200
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200
    assert server.status()["num_programs"] == before + len(bodies)
    given = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(counted(), rows, strict=True)]
    assert given == [(1, 0), (5, 3)]


def test_templates_are_read_again_while_the_server_runs(server: Server, template_file: Path) -> None:
    """A new version is the newest from then on; a wrong file is a 400 with its line, and changes nothing."""
    reload = f"{server.url}/dynasor/templates/reload"
    template_file.write_text(templates('["vote@3"]\nbranches = 1000\n'))
    refused = httpx.post(reload, timeout=30)
    line = templates('["vote@3"]').split("\n").index('["vote@3"]') + 2
    assert refused.status_code == 400
    assert f"t.toml:{line}: vote@3: dynasor.branches=1000 is outside" in refused.json()["error"]
    template_file.write_text(templates('["vote@3"]\nbranches = 2\nanswer = "hash"\n'))
    listed = httpx.post(reload, timeout=30).json()["templates"]
    assert [t["template"] for t in listed if t["is_newest"]] == ["asked@1", "told@1", "vote@3"]
    assert generate(server, template="vote").json()["meta_info"]["dynasor"]["template"] == "vote@3"
    template_file.write_text(templates())
    assert httpx.post(reload, timeout=30).json()["templates"][-1]["removed_at"]


def test_a_record_is_its_tenant_s(server: Server) -> None:
    """Another's request with the same rid is refused; its own is a rerun. What was refused has claimed no id."""
    body = {"text": prompt(QUESTION.text), "rid": "theirs", "sampling_params": {"max_new_tokens": 50}}

    def send(field: dict[str, Any], **params: Any) -> httpx.Response:
        sampling = {**body["sampling_params"], "custom_params": {"dynasor": field}, **params}
        return httpx.post(f"{server.url}/generate", json={**body, "sampling_params": sampling}, timeout=120)

    assert send({"branches": 2, "tenant": "a"}).json()["meta_info"]["dynasor"]["tenant"] == "a"
    refused = send({"branches": 2, "tenant": "b"})
    assert refused.status_code == 400
    assert "rid='theirs' is another tenant's" in refused.text
    assert httpx.get(f"{server.url}/dynasor/programs/theirs", timeout=30).json()["tenant"] == "a"
    assert send({"branches": 3, "tenant": "a"}).json()["meta_info"]["dynasor"]["cap"] == 3
    body["rid"] = "first"
    assert send({"branches": 2, "program": "claimed", "tenant": "b"}, temperature=-1).status_code == 400  # by SGLang
    assert send({"branches": 2, "program": "claimed", "tenant": "a"}).status_code == 200


# A gateway says who sends each request; without its header all is one owner's, as in the other tests


def seen_by(server: Server, user: str, path: str) -> httpx.Response:
    return httpx.get(
        f"{server.url}/dynasor/{path}", headers={"x-user": user, "Authorization": "Bearer s3cret"}, timeout=30
    )


def send_as(server: Server, user: str, path: str, body: dict[str, Any], field: Any, **more: Any) -> httpx.Response:
    custom = {"custom_params": {"dynasor": field, **more}}
    params = {"max_new_tokens": 60, **body.pop("sampling_params", {}), **custom}
    body |= {"sampling_params": params} if path == "/generate" else custom
    headers = {"x-user": user, "Authorization": "Bearer s3cret"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=120)


def test_a_record_is_its_owner_s(server: Server) -> None:
    """To others it is as if it had never been; the operator sees all. Two who use the same id do not mix."""
    caps = {"alice": 2, "bob": 3}
    for user, cap in caps.items():
        body = {"text": prompt(QUESTION.text), "rid": "owned"}
        assert send_as(server, user, "/generate", body, {"branches": cap}).json()["meta_info"]["dynasor"]["cap"] == cap
        unknown = seen_by(server, "bob", "programs/unknown")
        if user == "alice":
            for other in ("bob", "", "alice,bob"):
                hidden = seen_by(server, other, "programs/owned")
                assert hidden.status_code == 404
                assert hidden.json()["error"] == unknown.json()["error"].replace("unknown", "owned")
    assert {user: seen_by(server, user, "programs/owned").json()["cap"] for user in caps} == caps
    listed = httpx.get(f"{server.url}/dynasor/programs?state=done&limit=2", timeout=30).json()
    assert [(program["id"], program["cap"]) for program in listed] == [("owned", 3), ("owned", 2)]
    bob, alice = (program["owner"] for program in listed)
    assert seen_by(server, "bob", f"programs/owned?owner={alice}").json()["cap"] == 3  # no client says who it is
    several = seen_by(server, "", "opened?id=owned")
    assert several.status_code == 409
    assert "2 owners" in several.json()["error"]
    assert [seen_by(server, "", f"opened?id=owned&owner={owner}").json()["cap"] for owner in (alice, bob)] == [2, 3]
    forged = {"text": prompt(QUESTION.text), "rid": "forged"}
    assert send_as(server, "bob", "/generate", forged, {"branches": 2}, dynasor_owner=alice).status_code == 200
    assert seen_by(server, "alice", "programs/forged").status_code == 404
    assert seen_by(server, "bob", "programs/forged").status_code == 200
    assert "s3cret" not in server.log.read_text() + json.dumps(listed)


def test_a_program_in_flight_is_its_owner_s(server: Server) -> None:
    """Alike; two who send branches of the same id have a program each."""
    params = {"ignore_eos": True, "max_new_tokens": 900}

    def crowd() -> httpx.Response:
        """What makes steps long, so that the branches do not come to their ends while they are looked at."""
        body = {"text": prompt(QUESTION.text), "rid": "crowd", "sampling_params": params}
        return send_as(server, "dora", "/generate", body, {"branches": 64, "width": 64, "stop": "never"})

    def branch(user: str, rid: str) -> httpx.Response:
        body = {"text": prompt(QUESTION.text), "rid": rid, "sampling_params": params}
        return send_as(server, user, "/generate", body, {"program": "flying", "branches": 2, "stop": "never"})

    with ThreadPoolExecutor(5) as pool:
        beside = pool.submit(crowd)
        wait_until_under_way(server, "crowd")
        sent = {user: [pool.submit(branch, user, f"{user}-{i}") for i in range(2)] for user in ("alice", "bob")}
        for _ in range(600):
            flying = httpx.get(f"{server.url}/dynasor/programs?state=running", timeout=30).json()
            if [len(program["branches"]) for program in flying if program["id"] == "flying"] == [2, 2]:
                break
            time.sleep(0.05)
        owners = [program["owner"] for program in flying if program["id"] == "flying"]
        assert len(set(owners)) == 2
        for user in sent:
            seen = seen_by(server, user, "programs/flying").json()
            assert (seen["id"], len(seen["branches"])) == ("flying", 2)
        assert seen_by(server, "carol", "programs/flying").status_code == 404
        assert seen_by(server, "", "programs/flying").status_code == 404
        ask = f"{server.url}/dynasor/programs/flying/finish"
        assert httpx.post(ask, timeout=30).status_code == 409
        assert httpx.post(f"{ask}?owner=nobody", timeout=30).status_code == 404
        assert not any(one.done() for both in sent.values() for one in both)
        for owner in owners:
            assert httpx.post(f"{ask}?owner={owner}", timeout=30).status_code == 200
        assert httpx.post(f"{server.url}/dynasor/programs/crowd/finish", timeout=30).status_code == 200
        assert beside.result(60).status_code == 200
        for user, both in sent.items():
            records = [one.result(60).json()["meta_info"]["dynasor"] for one in both]
            assert max(record["num_branches"] for record in records) == 2
            assert seen_by(server, user, "programs/flying").json()["stop_reason"] == "operator"


def test_every_way_in_has_its_owner(server: Server) -> None:
    """Chats, completions of several prompts, choices, templates, and what the operator gives unasked."""
    text, chat = prompt(QUESTION.text), {"model": "m", "messages": [{"role": "user", "content": QUESTION.text}]}
    generate, completions, chats = "/generate", "/v1/completions", "/v1/chat/completions"
    for path, body, field, num in (
        (generate, {"text": [text, text]}, {"branches": 2}, 2),
        (generate, {"text": text, "sampling_params": {"n": 2}}, {"answer": "hash"}, 1),
        (completions, {"model": "m", "prompt": [text, text], "max_tokens": 60}, {"branches": 2}, 2),
        (chats, {**chat, "max_tokens": 60, "n": 2}, {"answer": "hash"}, 1),
        (chats, {**chat, "max_tokens": 60}, "asked", 1),
    ):
        assert send_as(server, "dora", path, dict(body), field).status_code == 200
        listed = httpx.get(f"{server.url}/dynasor/programs?state=done&limit={num + 1}", timeout=30).json()
        programs, before = listed[:num], listed[num]
        assert len({program["owner"] for program in programs}) == 1, (path, field)
        for program in programs:
            assert program["id"] != before["id"]
            assert seen_by(server, "dora", f"programs/{program['id']}").status_code == 200, (path, field)
            assert seen_by(server, "bob", f"programs/{program['id']}").status_code == 404, (path, field)
    body = {"model": "voter", "prompt": text, "max_tokens": 60}
    response = httpx.post(server.url + completions, json=body, headers={"x-user": "dora"}, timeout=120)
    assert seen_by(server, "dora", f"programs/{response.json()['id']}").json()["template"] == "vote@1"
    assert seen_by(server, "bob", f"programs/{response.json()['id']}").status_code == 404


def test_a_budget_is_its_owner_s(server: Server) -> None:
    """Another's of the same id has tokens of its own."""
    for user, tokens in (("alice", 5000), ("bob", 6000)):
        body = {"text": prompt(QUESTION.text)}
        field = {"branches": 2, "budget": "purse", "budget_programs": 2, "budget_tokens": tokens}
        assert (
            send_as(server, user, "/generate", dict(body), field).json()["meta_info"]["dynasor"]["budget_tokens"]
            == tokens
        )
        refused = send_as(server, user, "/generate", dict(body), field | {"budget_tokens": 7000})
        assert refused.status_code == 400
        assert f"was declared with budget_tokens={tokens}" in refused.text


def test_a_client_forges_no_line_of_the_log(server: Server) -> None:
    """What is refused is logged by SGLang: on one line, and not whole."""
    forged = "x\n[2026-01-01] ERROR forged line"
    for field in (
        {forged: 1},
        {"stop": forged},
        {"answer": f"regex:({forged}"},
        {"program": forged},
        {"y" * 1_000_000: 1},
    ):
        response = generate(server, **field)
        assert response.status_code == 400
        assert len(response.text) < 2_000
    log = server.log.read_text()
    assert "forged line" in log
    assert not re.search(r"^\[2026-01-01\] ERROR forged", log, re.M)
    assert "y" * 200 not in log


def test_an_unknown_program_is_a_404(server: Server) -> None:
    """With the reason."""
    response = httpx.get(f"{server.url}/dynasor/programs/nobody", timeout=30)
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]


def wait_until_under_way(server: Server, program: str) -> None:
    """Until several branches of it have some tokens each."""
    for _ in range(1200):
        for found in httpx.get(f"{server.url}/dynasor/programs?state=running", timeout=30).json():
            if found["id"] == program and found["num_tokens"] > 3 * len(found["branches"]) > 3:
                return
        time.sleep(0.05)
    raise AssertionError(server.status())


def wait_until_idle(server: Server) -> dict[str, Any]:
    for _ in range(600):
        status = server.status()
        if status["num_held_programs"] == 0 and status["num_branches_inside"] == 0:
            return status
        time.sleep(0.1)
    raise AssertionError(server.status())


def test_a_disconnect_frees_every_branch(server: Server) -> None:
    """A client that hangs up leaves nothing behind but its record."""
    before = wait_until_idle(server)
    body = {
        "text": prompt(QUESTION.text),
        "rid": "hung-up",
        "sampling_params": {
            "max_new_tokens": 900,
            "ignore_eos": True,
            "custom_params": {"dynasor": {"branches": 64, "width": 16}},
        },
    }

    async def hang_up() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            sent = asyncio.create_task(client.post(f"{server.url}/generate", json=body))
            await asyncio.to_thread(wait_until_under_way, server, "hung-up")
            sent.cancel()
            await asyncio.wait([sent])
            assert sent.cancelled()

    asyncio.run(hang_up())
    for _ in range(600):
        after = wait_until_idle(server)
        if after["num_aborted"] > before["num_aborted"]:  # SGLang looks now and then whether a client is still there
            break
        time.sleep(0.1)
    assert after["num_aborted"] == before["num_aborted"] + 1
    assert after["num_programs"] == before["num_programs"]
    record = httpx.get(f"{server.url}/dynasor/programs/hung-up", timeout=30).json()
    assert record["stop_reason"] == "aborted"
    assert record["num_tokens"] > record["num_branches"] > 1
    assert generate(server).status_code == 200


def test_an_abort_answers_the_client_with_what_there_is(server: Server) -> None:
    """/abort_request by the client's own rid ends all branches; the client is told so, with the text and the record so far."""
    import threading

    answers: list[httpx.Response] = []
    body = {
        "text": prompt(QUESTION.text), "rid": "to-abort",
        "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "custom_params": {"dynasor": {"branches": 64}}},
    }  # fmt: skip
    sender = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/generate", json=body, timeout=120))
    )
    sender.start()
    wait_until_under_way(server, "to-abort")
    httpx.post(f"{server.url}/abort_request", json={"rid": "to-abort"}, timeout=30)
    sender.join(60)
    out, record = answers[0].json(), answers[0].json()["meta_info"]["dynasor"]
    assert answers[0].status_code == 200
    assert out["text"]
    assert out["meta_info"]["finish_reason"]["type"] == "abort"
    assert out["meta_info"]["finish_reason"]["message"] == "Aborted: 0 of 64 branches had finished"
    assert record["stop_reason"] == "aborted"
    assert out["meta_info"]["completion_tokens"] == record["num_tokens"] > record["num_branches"]
    assert httpx.get(f"{server.url}/dynasor/programs/to-abort", timeout=30).json() == record
    wait_until_idle(server)


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Name and value of what a stream of the live page brings."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_who_watches_sees_a_program_come_and_go(server: Server) -> None:
    """Its branches while it runs, then its record; what a client called it comes as it was sent."""
    wait_until_idle(server)
    name = '<script>alert("1")</script>\n\ndata: {}'
    body = {
        "text": prompt(QUESTION.text), "rid": name,
        "sampling_params": {
            "max_new_tokens": 400, "ignore_eos": True, "custom_params": {"dynasor": {"branches": 6, "width": 3, "answer": "hash", "tenant": "watched"}},
        },
    }  # fmt: skip
    with (
        ThreadPoolExecutor() as pool,
        httpx.stream("GET", f"{server.url}/dynasor/events", timeout=60) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = events(response)
        kind, hello = next(stream)
        assert (kind, hello["has_texts"]) == ("hello", False)
        sent = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=300)
        states: list[dict[str, Any]] = []
        for kind, value in islice(stream, 1200):  # minutes
            if kind == "state":
                (scheduler,) = value["schedulers"]
                states += [program for program in scheduler["programs"] if program["id"] == name]
                assert scheduler["rows"]["of"] > 0
            elif kind == "finished" and (found := [row for row in value if row["program"] == name]):
                break
        record = sent.result().json()["meta_info"]["dynasor"]
    assert states
    assert states[-1]["tenant"] == "watched"
    assert any(
        branch["state"] == "running" and branch["num_tokens"] > 0 for state in states for branch in state["branches"]
    )
    (row,) = found
    assert {key: row[key] for key in record} == record
    assert row["latency_s"] > 0
    (sums,) = [line for line in value_of(server)["sums"] if line["tenant"] == "watched"]
    assert sums["num_tokens"] == record["num_tokens"]


def value_of(server: Server) -> dict[str, Any]:
    """What a look finds now."""
    with httpx.stream("GET", f"{server.url}/dynasor/events", timeout=60) as response:
        return next(value for kind, value in events(response) if kind == "state")


@needs_chromium
def test_who_watches_in_a_browser_sees_a_program_come_and_go(server: Server) -> None:
    """Its lanes while it runs, then its row; with nothing that the page complained of."""
    body = {
        "text": prompt(QUESTION.text), "rid": "in-a-browser",
        "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "custom_params": {"dynasor": {"branches": 64, "width": 5, "answer": "hash", "stop": "never"}}},
    }  # fmt: skip

    async def watch() -> None:
        async with chromium() as tab, httpx.AsyncClient(timeout=120) as client:
            await tab.look_like(1280, 800)
            await tab.go(f"{server.url}/dynasor")
            await tab.until("document.getElementById('dot').classList.contains('on')")
            sent = asyncio.create_task(client.post(f"{server.url}/generate", json=body))
            await tab.until("document.querySelector('#flight-table .open')?.textContent === 'in-a-browser'", 60)
            await tab.until(
                "document.querySelector('#flight-table .lanes')?.getAttribute('aria-label')?.includes(' running')", 60
            )
            await client.post(f"{server.url}/dynasor/programs/in-a-browser/finish")
            record = (await sent).json()["meta_info"]["dynasor"]
            row = "[...document.querySelectorAll('#finished-table tr')].find((tr) => tr.innerText.includes('in-a-browser'))"
            await tab.until(f"Boolean({row})", 60)
            shown = await tab.ask(f"{row}.innerText")
            assert f"{record['num_branches']} of 64" in shown
            assert f"{record['num_tokens']:,}" in shown
            assert tab.problems == []

    asyncio.run(watch())


def test_looking_costs_nothing_where_nobody_looks(server: Server) -> None:
    """Five viewers are one look, twice a second; after the last of them there is none."""
    with ExitStack() as stack:
        streams = [
            events(stack.enter_context(httpx.stream("GET", f"{server.url}/dynasor/events", timeout=60)))
            for _ in range(5)
        ]
        for stream in streams:
            next(value for kind, value in stream if kind == "state")
        began_s, before = time.monotonic(), server.status()["num_looks"]
        for _ in range(60):  # a machine that stalls looks less often
            time.sleep(1)
            num = server.status()["num_looks"] - before
            if num >= 4:
                break
        assert 4 <= num <= 2 + 2 * (time.monotonic() - began_s)
    before = -1
    for _ in range(30):  # the server hears of those who have left when it comes to that
        now = server.status()["num_looks"]
        if now == before:
            break
        before = now
        time.sleep(2)
    assert now == before


def test_the_page_is_served_with_its_policy(server: Server) -> None:
    response = httpx.get(f"{server.url}/dynasor", timeout=30)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert httpx.get(f"{server.url}/dynasor/page/page.js", timeout=30).status_code == 200
    assert httpx.get(f"{server.url}/dynasor/page/nothing.js", timeout=30).status_code == 404


def test_nothing_of_a_branch_leaks(server: Server) -> None:
    """No branch ever reached the front process, nothing failed, and the scheduler's own memory checks held."""
    wait_until_idle(server)
    log = server.log.read_text()
    assert "state was deleted" not in log
    assert "Traceback" not in log
    assert "memory leak" not in log.lower()

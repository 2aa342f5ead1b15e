"""The server as an operator starts it and clients call it: the docs' own snippets, errors, disconnects."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log", "--scheduler", "dynasor", "--enable-metrics")
    try:
        running.wait()
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
    assert printed.startswith(text)
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
        capture_output=True, text=True, timeout=300, check=False,
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
    before = server.status()
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
        ("/v1/responses", {"custom_params": {"dynasor": {}}}, "/v1/responses, which takes no dynasor field"),
        ("/v1/messages", {"dynasor": {}}, "/v1/messages, which takes no dynasor field"),
    ],
)  # fmt: skip
def test_a_field_at_the_wrong_place_is_a_400(server: Server, path: str, more: dict[str, Any], message: str) -> None:
    """SGLang would drop it, and answer with one plain sample; nothing is enqueued."""
    before = server.status()
    response = httpx.post(server.url + path, json=plain_body(server, path) | more, timeout=60)
    assert response.status_code == 400, response.text
    assert message in response.text
    assert server.status() == before


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]
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
        more["metadata"] = {"user_id": "dynasor", "dynasor": "v1"}
    response = httpx.post(server.url + path, json=plain_body(server, path) | more, timeout=60)
    assert response.status_code == 200, response.text


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


def test_an_unknown_program_is_a_404(server: Server) -> None:
    """With the reason."""
    response = httpx.get(f"{server.url}/dynasor/programs/nobody", timeout=30)
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]


def wait_until_idle(server: Server) -> dict[str, Any]:
    for _ in range(100):
        status = server.status()
        if status["num_held_programs"] == 0 and status["num_branches_inside"] == 0:
            return status
        time.sleep(0.1)
    raise AssertionError(server.status())


def test_a_disconnect_frees_every_branch(server: Server) -> None:
    """A client that hangs up leaves nothing behind."""
    before = wait_until_idle(server)
    body = {
        "text": prompt(QUESTION.text),
        "sampling_params": {
            "max_new_tokens": 900,
            "ignore_eos": True,
            "custom_params": {"dynasor": {"branches": 64, "width": 16}},
        },
    }
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/generate", json=body, timeout=httpx.Timeout(60, read=1.5))
    for _ in range(100):
        after = wait_until_idle(server)
        if after["num_aborted"] > before["num_aborted"]:  # SGLang looks now and then whether a client is still there
            break
        time.sleep(0.1)
    assert after["num_aborted"] == before["num_aborted"] + 1
    assert after["num_programs"] == before["num_programs"]
    assert generate(server).status_code == 200


def test_an_abort_answers_the_client_and_frees_every_branch(server: Server) -> None:
    """/abort_request by the client's own rid ends all branches; the client is told it was aborted."""
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
    for _ in range(100):
        if server.status()["num_held_programs"]:
            break
        time.sleep(0.05)
    httpx.post(f"{server.url}/abort_request", json={"rid": "to-abort"}, timeout=30)
    sender.join(60)
    assert "abort" in answers[0].text.lower()
    wait_until_idle(server)


def test_nothing_of_a_branch_leaks(server: Server) -> None:
    """No branch ever reached the front process, nothing failed, and the scheduler's own memory checks held."""
    wait_until_idle(server)
    log = server.log.read_text()
    assert "state was deleted" not in log
    assert "Traceback" not in log
    assert "memory leak" not in log.lower()

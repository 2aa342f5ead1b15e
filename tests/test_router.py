"""Two servers behind SGLang's router: what of the field it hands on, and that a program's own branches reach one server."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import ROOT
from questions import held_out, prompt
from server import free_port
from warm import WarmServer

from sglang_dynasor.policy.answers import extract_answer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang_router") is None,
        reason="SGLang's router is not here; pip install --no-deps sglang-router==0.3.2",
    ),
]
SERVING = (ROOT / "docs" / "serving.md").read_text()
QUESTION = held_out(12)[8].text
FIELD = {"branches": 3, "answer": "hash"}
CHAT = {"model": "any", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200}
TEXT = {"model": "any", "prompt": prompt(QUESTION), "max_tokens": 200}


class Router:
    """SGLang's router before servers, started as docs/serving.md has it. All begin to start at once."""

    def __init__(self, folder: Path, num_servers: int):
        self.servers = [
            WarmServer(folder / f"log{i}", "--scheduler", "dynasor", "--max-total-tokens", "20000")
            for i in range(num_servers)
        ]
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "router"
        options = [
            "--worker-urls", *(server.url for server in self.servers), "--policy", "manual", "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1",
        ]  # fmt: skip
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sglang_router.launch_router", *options], stdout=out, stderr=subprocess.STDOUT
            )

    def wait(self, timeout_s: float = 240) -> None:
        """Return once it sends requests to every server.

        Raises:
            RuntimeError: it ended instead.
            TimeoutError: it does not know them.
        """
        for server in self.servers:
            server.wait(500)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the router ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
            try:
                known = httpx.get(f"{self.url}/workers", timeout=10).json()["workers"]
                if sum(worker["is_healthy"] for worker in known) == len(self.servers):
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-2000:])

    def stop(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(WarmServer.stop, self.servers))
        if self.process.poll() is None:
            self.process.kill()  # asked to, it would wait for its clients first
            self.process.wait(30)

    def post(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        headers = {"X-SMG-Routing-Key": key} if key else {}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=120)

    def records(self, program: str) -> list[dict[str, Any]]:
        """A program's record at each server that knows it."""
        found = [httpx.get(f"{server.url}/dynasor/programs/{program}", timeout=30) for server in self.servers]
        return [response.json() for response in found if response.status_code == 200]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    running = Router(tmp_path_factory.mktemp("router"), num_servers=2)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_metadata_brings_a_chat_its_program(router: Router) -> None:
    """As text; the record is in the answer, and of a stream at the server that had it."""
    body = {**CHAT, "metadata": {"dynasor": json.dumps(FIELD), "user_id": "u"}}
    answer = router.post("/v1/chat/completions", body).json()
    told = answer["choices"][0]["meta_info"]["dynasor"]
    assert told["cap"] == 3
    (kept,) = router.records(answer["id"])
    assert {key: kept[key] for key in told} == told
    chunks = router.post("/v1/chat/completions", {**body, "stream": True}).text.split("data: ")[1:-1]
    (kept,) = router.records(json.loads(chunks[0])["id"])
    assert kept["cap"] == 3
    for text, message in (("{", "neither a name nor the JSON"), ("nobody", "is not known"), ('{"branches": 1000}', "outside")):  # fmt: skip
        refused = router.post("/v1/chat/completions", {**CHAT, "metadata": {"dynasor": text}})
        assert refused.status_code == 400
        assert message in refused.text


@pytest.mark.parametrize("place", ["custom_params", "metadata"])
def test_completions_come_through_as_they_are(router: Router, place: str) -> None:
    """The field, in either place, and several prompts, whose records have ids that follow from the response's."""
    field = FIELD if place == "custom_params" else json.dumps(FIELD)
    body = {**TEXT, "prompt": [TEXT["prompt"]] * 2, place: {"dynasor": field}}
    answer = router.post("/v1/completions", body).json()
    name = answer["id"].removesuffix("_0")
    records = [record for i in range(2) for record in router.records(f"{name}_{i}")]
    assert [record["cap"] for record in records] == [3, 3]
    assert answer["usage"]["completion_tokens"] == sum(record["num_tokens"] for record in records)


@pytest.mark.parametrize(("containing", "cap"), [('"metadata"', 8), ("X-SMG-Routing-Key", 8)])
def test_the_guide_s_commands_work(router: Router, containing: str, cap: int) -> None:
    """docs/serving.md: the field in metadata, and a branch of one's own."""
    (command,) = (b for b in re.findall(r"```bash\n(.*?)```", SERVING, re.S) if containing in b)
    command = command.replace("http://127.0.0.1:30000", router.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    (record,) = router.records("my-program" if containing == "X-SMG-Routing-Key" else answer["id"])
    assert record["cap"] == cap
    if containing == '"metadata"':
        assert extract_answer(answer["choices"][0]["message"]["content"], "hash") == record["answer"] is not None


def test_responses_come_through_with_metadata(router: Router) -> None:
    """If they say whether they stream: where they do not, this router sends null, which SGLang refuses."""
    served = httpx.get(f"{router.servers[0].url}/v1/models", timeout=30).json()["data"][0]["id"]
    body = {
        "model": served,
        "input": QUESTION,
        "max_output_tokens": 200,
        "stream": False,
        "metadata": {"dynasor": json.dumps(FIELD)},
    }
    response = router.post("/v1/responses", body)
    assert response.status_code == 200, response.text
    (kept,) = router.records(response.json()["id"])
    assert kept["cap"] == 3


def test_what_the_router_drops(router: Router) -> None:
    """What docs/serving.md says does not reach a server; a router that hands it on may be written there as one that does."""
    params = {"max_new_tokens": 4, "custom_params": {"dynasor": FIELD}}
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "max_tokens": 4, "custom_params": {"dynasor": FIELD}}),
        ("/generate", {"text": "Q", "sampling_params": params, "metadata": {"dynasor": json.dumps(FIELD)}}),
    ):
        before = [server.status()["num_programs"] for server in router.servers]
        assert router.post(path, body).status_code == 200
        assert [server.status()["num_programs"] for server in router.servers] == before
    refused = router.post("/v1/chat/completions", {**CHAT, "metadata": {"dynasor": FIELD}})
    assert refused.status_code == 400
    assert "expected a string" in refused.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_branches_of_one_key_reach_one_server(router: Router, path: str) -> None:
    """All of a program's, sent at once: one server has its record, and every branch counts in it."""
    num_branches, names = 5, [f"own-{path[4:8]}-{i}" for i in range(3)]

    def send(name: str) -> httpx.Response:
        field = {"program": name, "branches": num_branches, "stop": "never", "answer": "hash"}
        if path == "/v1/completions":
            return router.post(path, {**TEXT, "temperature": 1.0, "custom_params": {"dynasor": field}}, name)
        return router.post(path, {**CHAT, "temperature": 1.0, "metadata": {"dynasor": json.dumps(field)}}, name)

    with ThreadPoolExecutor(num_branches * len(names)) as pool:
        responses = list(pool.map(send, names * num_branches))
    assert {response.status_code for response in responses} == {200}
    for name in names:
        (record,) = router.records(name)
        assert record["num_branches"] == num_branches

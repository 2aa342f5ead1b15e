"""What goes wrong around a server: clients that leave, that are slow, that send nonsense; memory that runs out; others that stop answering.

One server for all, with SGLang's memory checks in every step. After each test nothing may be left in it, and a neighbour's greedy text is what it was.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from bodies import Drawn
from engines import CHECKPOINT, GIVEN_BACK, ROOT
from faulty import HELD, STAGES, FaultyServer
from others import OtherServer
from questions import held_out, prompt
from warm import WarmServer

from sglang_dynasor.engine.programs import MAX_CLIENT_PROGRAMS

pytestmark = pytest.mark.engine
PACKAGE = ROOT / "sglang_dynasor"
QUESTIONS = [question.text for question in held_out(24)]
END = "</think>\n####"
THOUGHT = {"algorithm": "long_cot", "think_end": END, "probe_suffix": END, "probe_tokens": 8, "min_tokens": 8}
OWN_JUDGE = {"vote": "reward", "judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
JUDGE = {"vote": "reward", "judge": "model"}
# Programs of every kind.
KINDS: tuple[dict[str, Any], ...] = (
    {"branches": 4}, {"branches": 3, **OWN_JUDGE}, {"branches": 2, **JUDGE}, {"branches": 3, "equal": "model:0.5"}, {"branches": 3, "equal": "embedding"},
    {"branches": 3, "equal": "symbolic"}, {"branches": 3, "budget_tokens": 300}, {"branches": 3, "vote": "confidence", "weak_frac": 0.5},
    {**THOUGHT}, {**THOUGHT, "branches": 3, "stop": "trials:0.8"},
)  # fmt: skip
MEMORY_CHECKS = dict.fromkeys(
    (
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS", "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK",
    ), "1",
)  # fmt: skip
SLOW_S, TIMEOUT_S = 120.0, 12.0  # a busy machine answers in time
ENDLESS = {"ignore_eos": True, "max_new_tokens": 700}
LONG = {
    "branches": 5,
    "width": 5,
    "stop": "never",
    "deadline_s": 1.5,
}  # of endless branches: they are there to be found


class Asked:
    """A reward model and an embedding server in one, which answers as it is told."""

    def __init__(self) -> None:
        self.way = "right"
        self.port = 0
        self.num = 0
        self._server: OtherServer | None = None

    def start(self) -> None:
        asked = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.num += 1
                if asked.way == "slow":
                    time.sleep(SLOW_S)
                answer = asked.answer(self.path, body)
                with suppress(OSError):  # the client may have hung up
                    self.send_response(500 if asked.way == "failing" else 200)
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = OtherServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str, body: dict[str, Any]) -> bytes:
        if self.way == "wrong":
            return b'{"data": "x", "embedding": []}'
        if path == "/classify":
            return json.dumps([{"embedding": [2.0]} for _ in body["text"]]).encode()
        rows = [{"index": i, "embedding": [1.0, float(len(text))]} for i, text in enumerate(body["input"])]
        return json.dumps({"data": rows}).encode()


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    made = Asked()
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, asked: Asked) -> Iterator[FaultyServer]:
    url, folder = f"http://127.0.0.1:{asked.port}", tmp_path_factory.mktemp("faulty")
    running = FaultyServer(
        folder / "log", "--scheduler", "dynasor", "--dtype", "float32", "--log-level", "error",
        # Little of everything: prompts come in chunks, and branches are retracted.
        "--max-running-requests", "24", "--max-total-tokens", "1500", "--schedule-conservativeness", "0.05", "--chunked-prefill-size", "32",
        "--dynasor-reward-url", url, "--dynasor-embedding-url", url, "--dynasor-reward-timeout-s", str(TIMEOUT_S), "--dynasor-equal-timeout-s", str(TIMEOUT_S),
        "--dynasor-log", str(folder / "records"),
        environment=MEMORY_CHECKS,
    )  # fmt: skip
    try:
        running.wait()
        (folder / "records").unlink(missing_ok=True)
        (folder / "records").symlink_to("/dev/full")
        yield running
    finally:
        running.stop()


def body_of(number: int = 0, rid: str = "", params: dict[str, Any] | None = None, **field: Any) -> dict[str, Any]:
    """A request for a program."""
    text = prompt(QUESTIONS[number % len(QUESTIONS)], think="algorithm" in field)
    sampling = {
        "max_new_tokens": 60,
        "temperature": 1.0,
        **(params or {}),
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }
    return {"text": text, "sampling_params": sampling, **({"rid": rid} if rid else {})}


def post(server: WarmServer, path: str, body: Any, timeout_s: float = 300) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=timeout_s)


def generate(server: WarmServer, body: dict[str, Any]) -> httpx.Response:
    return post(server, "/generate", body)


def greedy(server: WarmServer) -> str:
    """What a neighbour gets, who asks for no program."""
    params = {"temperature": 0, "max_new_tokens": 32}
    return generate(server, {"text": prompt(QUESTIONS[3]), "sampling_params": params}).json()["text"]


@pytest.fixture(scope="module")
def before(server: FaultyServer) -> str:
    """A neighbour's text before anything has gone wrong."""
    return greedy(server)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever the test did to the server of this module: it holds nothing afterwards, and serves as before."""
    if "server" not in request.fixturenames:
        yield
        return
    server, text = request.getfixturevalue("server"), request.getfixturevalue("before")
    yield
    assert_empty(server)
    assert greedy(server) == text


def assert_empty(server: WarmServer) -> None:
    for _ in range(600):
        status = server.status()
        left = {key: status[key] for key in GIVEN_BACK if status[key]}
        if not left:
            break
        time.sleep(0.05)
    assert left == {}
    assert (status["num_policy_errors"], status["num_fresh_starts"], status["is_aside"]) == (0, 0, 0)
    assert httpx.post(f"{server.url}/flush_cache", params={"timeout": 60}, timeout=90).status_code == 200
    assert "fell back" not in server.log.read_text()  # nor in the front process


@contextmanager
def sending(server: WarmServer, bodies: list[dict[str, Any]]) -> Iterator[list[Future[httpx.Response]]]:
    """Requests under way."""
    with ThreadPoolExecutor(max(1, len(bodies))) as pool:
        yield [pool.submit(generate, server, body) for body in bodies]


def every_kind(prefix: str, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A program of each kind, and a plain request."""
    bodies = [body_of(i, f"{prefix}-{i}.", params, **field) for i, field in enumerate(KINDS)]
    plain = {"text": prompt(QUESTIONS[3]), "sampling_params": {"temperature": 0, "max_new_tokens": 32}}
    return [*bodies, plain]


def until(what: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(what: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """What many clients at once do."""

    async def all_of() -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            return await what(client)

    return asyncio.run(all_of())


# Clients that leave

AT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "waiting": ({}, {"branches": 4}),
    "prefill": ({}, {"branches": 4}),
    "running": (ENDLESS, {"branches": 4, "width": 4}),
    "thought": (ENDLESS, {**THOUGHT, "branches": 2, "stop": "never"}),
    "probed": (ENDLESS, {**THOUGHT, "branches": 2, "stop": "never"}),
    "judged by the model": ({}, {"branches": 4, "stop": "never", **OWN_JUDGE}),
    "judged by a server": ({}, {"branches": 4, "stop": "never", **JUDGE}),
    "compared by the model": ({}, {"branches": 16, "stop": "never", "equal": "model:0.999"}),
    "compared by a server": ({}, {"branches": 16, "stop": "never", "equal": "embedding:1"}),
}
assert AT.keys() == STAGES.keys()


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("stage", AT)
def test_a_client_is_gone(server: FaultyServer, asked: Asked, stage: str, is_streamed: bool) -> None:
    """Its program ends at that very stage; the record says so."""
    asked.way = "slow"  # or it may have answered before the scheduler's next step
    try:
        leave(server, stage, is_streamed)
    finally:
        asked.way = "right"


def leave(server: FaultyServer, stage: str, is_streamed: bool) -> None:
    params, field = AT[stage]
    rid = f"{HELD}{stage.replace(' ', '-')}-{is_streamed}"
    body = {**body_of(4, rid, params, **field), "stream": is_streamed}  # to a question with many answers
    if stage == "prefill":
        body["text"] = "x " * 300
    num_before = server.status()["num_aborted"]
    server.hold_at(stage)
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + content)
        server.wait_until("held")
    server.wait_until("let go")  # by its abort: nothing else is sent
    until(lambda: server.status()["num_held_programs"] == 0)
    assert server.status()["num_aborted"] == num_before + 1
    if not is_streamed:  # of a stream SGLang forgets its client before there is anything to tell
        until(
            lambda: httpx.get(f"{server.url}/dynasor/programs/{rid}", timeout=30).json().get("stop_reason") == "aborted"
        )


NUM_SLOW = 250  # tokens: together more than a kernel takes in for a connection


def test_slow_readers_hold_nobody_up(server: FaultyServer) -> None:
    """They take nothing of their streams while others are served, and then read all there is."""
    params = {"max_new_tokens": NUM_SLOW, "ignore_eos": True, "temperature": 0}
    more = {
        "return_logprob": True,
        "top_logprobs_num": 3,
        "stream": True,
    }  # each piece of these streams is longer than the last
    plain = {"text": prompt(QUESTIONS[1]), "sampling_params": params, **more}
    sent = {**body_of(1, params={**params, "temperature": 1.0}, program="slow", branches=2, stop="never"), **more}
    text = generate(server, {**plain, "stream": False}).json()["text"]
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read_late, server, body) for body in (plain, plain, sent, sent)]
        until(lambda: server.status()["num_client_programs"] > 0)
        quick = [generate(server, body_of(i, branches=3)).json() for i in range(4)]
        assert all("dynasor" in out["meta_info"] for out in quick)
        assert not any(reader.done() for reader in readers)
        until(lambda: load_of(server)["num_running_reqs"] == 0)
        (server.folder / "read").touch()
        streams = [reader.result(300) for reader in readers]
    last = [json.loads(pieces[-1]) for pieces in streams]
    assert [out["text"] for out in last[:2]] == [text, text]
    assert [out["meta_info"]["dynasor"]["program"] for out in last[2:]] == ["slow", "slow"]
    assert all(len(pieces) < NUM_SLOW for pieces in streams)  # what they did not take was put together


def read_late(server: FaultyServer, body: dict[str, Any]) -> list[str]:
    """The pieces of a stream that is read when the file `read` is there."""
    (server.folder / "read").unlink(missing_ok=True)
    content = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        head = f"POST /generate HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        until((server.folder / "read").exists, 300)
        read = b""
        while piece := client.recv(65536):
            read += piece
    pieces = [line.removeprefix("data: ") for line in read.decode().splitlines() if line.startswith("data: ")]
    assert pieces.pop() == "[DONE]"
    return pieces


def load_of(server: WarmServer) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]


def test_an_abort_storm(server: FaultyServer) -> None:
    """Each program is aborted several times, before it is there and after it is gone, by its id, by a part of it, by nobody's, with all others."""
    bodies = [body_of(i, f"storm-{i}.", ENDLESS, **field) for i, field in enumerate(KINDS * 2)]
    aborts = [{"rid": rid} for body in bodies for rid in (body["rid"], body["rid"][:-1], "storm-1", "nobody", "")]

    async def everybody(client: httpx.AsyncClient) -> list[httpx.Response]:
        sent = [asyncio.ensure_future(client.post(f"{server.url}/generate", json=body)) for body in bodies]
        for number, abort in enumerate(aborts):
            await client.post(f"{server.url}/abort_request", json=abort)
            if number % 20 == 0:
                await asyncio.sleep(0.02)
        while not all(one.done() for one in sent):
            await client.post(f"{server.url}/abort_request", json={"abort_all": True})
            await asyncio.sleep(0.1)
        return [one.result() for one in sent]

    answers = run(everybody)
    assert {answer.status_code for answer in answers} == {200}
    reasons = Counter(answer.json()["meta_info"]["finish_reason"]["type"] for answer in answers)
    assert reasons["abort"] > len(bodies) / 2
    assert all(answer.json()["meta_info"]["dynasor"] for answer in answers)


# Memory, and what an operator does


GROWS = {"max_new_tokens": 200, "min_new_tokens": 200, "temperature": 0}  # longer than SGLang takes it for


def test_memory_runs_out(server: FaultyServer) -> None:
    """Plain requests grow. Branches are retracted, and each is answered whole; so is each plain request."""
    num_rounds, grows = 0, {"text": prompt(QUESTIONS[2]), "sampling_params": GROWS}
    fields = ({**THOUGHT, "branches": 4, "stop": "never"}, {"branches": 4, "stop": "never", **OWN_JUDGE})
    while not num_rounds or "BranchTag" not in server.retracted():
        assert num_rounds < 8, server.retracted()
        params = {"max_new_tokens": 80, "min_new_tokens": 80}
        bodies = [body_of(num_rounds + i, params=params, **fields[i % 2]) for i in range(4)]
        with sending(server, [*bodies, *[grows] * 8]) as sent:
            outs = [one.result().json() for one in sent]
        assert {whole(out) for out in outs[:4]} == {(4, 0, "cap")}
        assert len({out["text"] for out in outs[4:]}) == 1
        num_rounds += 1


def whole(out: dict[str, Any]) -> tuple[int, int, str]:
    record = out["meta_info"]["dynasor"]
    return record["num_branches"], record["num_failed"], record["stop_reason"]


@pytest.mark.parametrize("kind", ["BranchTag", "thought", "ProbeTag"])
def test_memory_runs_out_in_the_very_step(server: FaultyServer, kind: str) -> None:
    """In which a branch, a thought, or what asks it is there: its program is retracted whole, comes back and is answered.

    What judges a branch has a row for the step of its prompt alone; test_fence.py has it retracted by force.
    """
    field = (
        {"branches": 4, "stop": "never", "width": 4}
        if kind == "BranchTag"
        else {**THOUGHT, "branches": 4, "stop": "never"}
    )
    server.squeeze_at(kind)
    plain = {"text": prompt(QUESTIONS[2]), "sampling_params": GROWS}
    with sending(server, [plain]) as longest:
        # What has generated least is retracted: not this one.
        until(lambda: load_of(server)["num_running_reqs"] > 0 or longest[0].done())
        out = generate(server, body_of(7, params=ENDLESS | {"max_new_tokens": 60}, **field)).json()
        text = longest[0].result().json()
    assert kind in server.retracted()
    assert whole(out) == (4, 0, "cap")
    assert text["text"] == generate(server, plain).json()["text"]


def test_the_cache_is_flushed(server: FaultyServer) -> None:
    """While a program waits, and whenever SGLang lets it while programs run."""
    server.hold_at("waiting")
    with sending(server, [body_of(2, f"{HELD}flush", branches=3)]) as sent:
        server.wait_until("held")
        assert httpx.post(f"{server.url}/flush_cache", timeout=30).status_code == 200
        assert sent[0].result().json()["meta_info"]["dynasor"]["stop_reason"] in ("certain", "cap")
    with sending(server, every_kind("flush")) as sent:
        codes = set()
        while not all(one.done() for one in sent):
            codes.add(httpx.post(f"{server.url}/flush_cache", timeout=30).status_code)
        assert 400 in codes
        assert_all_answered(sent)


def assert_all_answered(sent: list[Future[httpx.Response]], *, may_abort: bool = False) -> None:
    """All but the last, which is a plain one, by a program."""
    answers = [one.result(300) for one in sent]
    assert {answer.status_code for answer in answers} == {200}
    infos = [answer.json()["meta_info"] for answer in answers]
    kinds = {"stop", "length", "abort"} if may_abort else {"stop", "length"}
    assert {info["finish_reason"]["type"] for info in infos} <= kinds
    assert ["dynasor" in info for info in infos] == [True] * (len(infos) - 1) + [False]


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_generation_is_paused(server: FaultyServer, mode: str) -> None:
    """With programs of every kind under way, deadlines among them; who comes meanwhile is served afterwards."""
    bodies = [
        body_of(9, f"{mode}-late.", ENDLESS, branches=2, stop="never", deadline_s=0.3),
        body_of(9, f"{mode}-long.", ENDLESS, **LONG),
        *every_kind(mode),
    ]
    with sending(server, bodies) as sent, ThreadPoolExecutor(1) as pool:
        until(lambda: server.status()["num_branches_inside"] > 4)
        assert post(server, "/pause_generation", {"mode": mode}).status_code == 200
        late = pool.submit(generate, server, body_of(4, branches=2))
        post(server, "/abort_request", {"rid": f"{mode}-0."})
        if mode == "abort":
            until(lambda: server.status()["num_branches_inside"] == 0)
        time.sleep(0.5)
        assert not late.done()
        assert post(server, "/continue_generation", {}).status_code == 200
        assert late.result(300).json()["meta_info"]["dynasor"]["stop_reason"] in ("certain", "cap")
        assert_all_answered(sent, may_abort=True)
        if mode != "abort":
            reasons = [one.result().json()["meta_info"]["dynasor"]["stop_reason"] for one in sent[:-1]]
            assert reasons[:2] == ["deadline", "deadline"]
            assert "aborted" not in reasons[3:]


WEIGHTS = {"model_path": str(CHECKPOINT), "load_format": "auto"}


@pytest.mark.parametrize("way", ["waits", "aborts", "retracts", "in place"])
def test_weights_are_updated(server: FaultyServer, way: str) -> None:
    """While programs of every kind are under way: after they are answered, after they are aborted, or between two of their steps."""
    mode = {"retracts": "retract", "in place": "in_place"}.get(way)
    prefix = way.replace(" ", "-")
    with sending(server, [body_of(9, f"{prefix}-long.", ENDLESS, **LONG), *every_kind(prefix)]) as sent:
        until(lambda: server.status()["num_branches_inside"] > 4)
        if mode is not None:
            post(server, "/pause_generation", {"mode": mode})
        updated = post(server, "/update_weights_from_disk", WEIGHTS | {"abort_all_requests": way == "aborts"}).json()
        # What runs keeps its KV, of the old weights, and SGLang says so. Siblings end a step or two after the last answer.
        is_flushed = "cache was not flushed" not in updated["message"]
        assert updated["success"] is is_flushed, updated
        assert is_flushed or way != "retracts"
        assert not (is_flushed and way == "in place")
        if mode is not None:
            post(server, "/continue_generation", {})
        assert_all_answered(sent, may_abort=way == "aborts")


WAYS = ("right", "slow", "wrong", "failing", "gone")


@pytest.mark.parametrize("way", WAYS)
def test_other_servers_fail(server: FaultyServer, asked: Asked, way: str) -> None:
    """The reward model and the embedding server: programs do without them, in time."""
    before = server.status()
    if way == "gone":
        asked.stop()
    else:
        asked.way = way
    try:
        # Ends of texts, of another length each time: vectors of answers that came before are remembered.
        close = {"equal": "embedding", "answer": f"regex:(.{{{3 + WAYS.index(way)}}})$"}
        bodies = [body_of(i, branches=4, stop="never", **field) for i, field in enumerate((JUDGE, close) * 3)]
        started = time.monotonic()
        with sending(server, bodies) as sent:
            records = [one.result().json()["meta_info"]["dynasor"] for one in sent]
        took_s = time.monotonic() - started
    finally:
        asked.way = "right"
        if way == "gone":
            asked.start()
    after = server.status()
    rewards = [reward for record in records[::2] for reward in record["rewards"]]
    assert len(rewards) == 12
    assert all((reward is None) is (way != "right") for reward in rewards)
    assert (after["num_reward_errors"] - before["num_reward_errors"]) == (0 if way == "right" else 12)
    # Of comparisons only those are waited for, and counted, that could change the answer: test_findings.py.
    assert after["num_comparison_errors"] == before["num_comparison_errors"] or way != "right"
    assert way == "right" or not any(record["merges"] for record in records[1::2])
    assert {record["stop_reason"] for record in records} == {"cap"}
    assert took_s < SLOW_S


def test_the_clock_is_stepped(server: FaultyServer) -> None:
    """By a day, forth and back, while deadlines run and rewards are awaited: nothing changes but the time that is shown."""
    near = [body_of(i, f"near-{i}.", ENDLESS, branches=2, stop="never", deadline_s=0.6) for i in range(2)]
    far = [
        body_of(
            i,
            f"far-{i}.",
            {"max_new_tokens": 300, "ignore_eos": True},
            branches=2,
            stop="never",
            deadline_s=600,
            **JUDGE,
        )
        for i in range(2)
    ]
    try:
        with sending(server, near + far) as sent:
            for by_s in (86_400.0, -86_400.0, 1e9, -1e9, 86_400.0):
                server.step_clock(by_s)
                time.sleep(0.1)
            assert shown_time(server) > time.time() + 80_000
            answers = [one.result() for one in sent]
    finally:
        server.step_clock(0.0)
    records = [answer.json()["meta_info"]["dynasor"] for answer in answers]
    assert [record["stop_reason"] for record in records] == ["deadline", "deadline", "cap", "cap"]
    assert all(0.5 < answer.elapsed.total_seconds() < 100 for answer in answers[:2])
    assert None not in [reward for record in records[2:] for reward in record["rewards"]]
    assert shown_time(server) < time.time() + 1


def test_time_of_day_is_shown_and_decides_nothing() -> None:
    """It is read in the front process alone, for the log, the live page and the list of templates, and a report writes dates; all else
    counts monotonic seconds."""
    found = {
        str(path.relative_to(PACKAGE)): num
        for path in sorted(PACKAGE.rglob("*.py"))
        if (
            num := len(
                re.findall(
                    r"\btime\.time\b|\bdatetime\b|from time import|\btime_ns\b|\bgmtime|\blocaltime", path.read_text()
                )
            )
        )
    }
    assert found == {"engine/logged.py": 1, "engine/page.py": 2, "engine/templates.py": 1, "observe/report_page.py": 3}


def shown_time(server: FaultyServer) -> float:
    """What the live page shows."""
    with httpx.stream("GET", f"{server.url}/dynasor/events", timeout=30) as response:
        return next(json.loads(line[6:])["time_s"] for line in response.iter_lines() if '"time_s"' in line)


# Very many


def generate_all(
    server: FaultyServer, texts: list[str], params: list[dict[str, Any]], num_requests: int
) -> list[dict[str, Any]]:
    """All at once, in so many requests."""
    size = len(texts) // num_requests
    bodies = [
        {"text": texts[i : i + size], "sampling_params": params[i : i + size]} for i in range(0, len(texts), size)
    ]
    with sending(server, bodies) as sent:
        return [out for one in sent for out in one.result().json()]


@pytest.mark.parametrize("num", [400, pytest.param(2000, marks=pytest.mark.deep)])
def test_very_many_programs_at_once(server: FaultyServer, num: int) -> None:
    """Each is answered."""
    before = server.status()["num_programs"]
    params = [body_of(params={"max_new_tokens": 2}, branches=2)["sampling_params"]] * num
    outs = generate_all(server, [prompt(QUESTIONS[i % 24]) for i in range(num)], params, 8)
    assert len(outs) == num
    assert {out["meta_info"]["dynasor"]["num_branches"] for out in outs} == {2}
    assert server.status()["num_programs"] == before + num


@pytest.mark.parametrize("num", [1000, pytest.param(5000, marks=pytest.mark.deep)])
def test_very_many_program_ids(server: FaultyServer, num: int) -> None:
    """Of clients that send the branches: the longest unused are forgotten."""
    fields = [{"program": f"id-{num}-{i}", "branches": 1} for i in range(num)]
    params = [body_of(params={"max_new_tokens": 1}, **field)["sampling_params"] for field in fields]
    outs = generate_all(server, ["Q"] * num, params, 8)
    assert [out["meta_info"]["dynasor"]["program"] for out in outs] == [field["program"] for field in fields]
    assert min(num, MAX_CLIENT_PROGRAMS) <= server.status()["num_client_programs"] <= MAX_CLIENT_PROGRAMS


def test_deadlines_of_a_nanosecond(server: FaultyServer) -> None:
    bodies = [body_of(i, branches=4, deadline_s=1e-9) for i in range(12)]
    with sending(server, bodies) as sent:
        answers = [one.result() for one in sent]
    assert {answer.json()["meta_info"]["dynasor"]["stop_reason"] for answer in answers} == {"deadline"}


# Nonsense


@pytest.mark.parametrize(
    "numbers", [range(150), pytest.param(range(150, 10_000), marks=pytest.mark.deep)], ids=["150", "10,000"]
)
def test_whatever_clients_send(server: FaultyServer, before: str, numbers: range) -> None:
    """Each is served, or told that it is wrong by us or as SGLang tells it without the field; neighbours are served meanwhile."""
    codes, wrong = Counter[int](), list[Any]()

    def send(number: int) -> None:
        drawn = Drawn(number)
        response = said(server, drawn.path, drawn.content)
        codes[response.status_code] += 1
        if (
            response.status_code not in (200, 400)
            and said(server, drawn.path, drawn.plain).status_code != response.status_code
        ):
            wrong.append((number, response.status_code, drawn.content, response.text))
        if response.text.startswith("data:") and not response.text.rstrip().endswith("[DONE]"):
            wrong.append((number, "cut", drawn.content, response.text))

    with ThreadPoolExecutor(8) as pool:
        for first in range(0, len(numbers), 100):
            sent = [pool.submit(send, number) for number in numbers[first : first + 100]]
            assert greedy(server) == before
            for one in sent:
                one.result()
    assert wrong == []
    assert codes[200] > 0.3 * len(numbers)
    assert codes[400] > 0.2 * len(numbers)
    assert codes[200] + codes[400] > 0.95 * len(numbers)


def said(server: FaultyServer, path: str, content: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=300)


def test_the_disk_was_full_all_the_while(server: FaultyServer) -> None:
    """The log goes to /dev/full: each record was lost and counted, and nobody waited."""

    def num_lost() -> int:
        return httpx.get(f"{server.url}/dynasor/settings", timeout=30).json()["log"]["num_lost"]

    before = num_lost()
    generate(server, body_of(branches=2))
    until(lambda: num_lost() > before)
    until(lambda: "could not be written" in server.log.read_text())
    assert server.log.read_text().count("could not be written") == 1


# Processes that die: each with a server of its own

STOCK = pytest.param((), marks=pytest.mark.deep, id="stock")  # it dies no sooner
OURS = pytest.param(("--scheduler", "dynasor"), id="dynasor")


@pytest.mark.parametrize("options", [OURS, STOCK])
@pytest.mark.parametrize("process", ["scheduler", "detokenizer", "second rank"])
def test_a_process_is_killed(tmp_path: Path, process: str, options: tuple[str, ...]) -> None:
    """The server ends as stock SGLang does, at once, and nothing of ours outlives it."""
    two_ranks = ("--tp-size", "2", "--max-total-tokens", "6000") if process == "second rank" else ()
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if two_ranks else {}
    options = (*options, "--dtype", "float32", "--log-level", "error", *two_ranks)
    running = FaultyServer(tmp_path / "log", *options, environment=binding)
    with ThreadPoolExecutor() as pool:
        try:
            running.wait()
            bodies = [body_of(i, params=ENDLESS, branches=4, stop="never") for i in range(3)]
            bodies += [body_of(i, branches=8, stop="never", equal="symbolic") for i in range(6)]
            sent = [pool.submit(generate, running, body) for body in bodies]
            if "dynasor" in options:
                sent.append(pool.submit(watch, running))
                until(lambda: any(compares(one) for one in family(running)))
            processes = family(running)
            os.kill(running.pid_of(process), signal.SIGKILL)
            running.process.wait(100)
            assert running.process.poll() != 0
            until(lambda: not any(lives(one) for one in processes), 100)
            for one in sent:
                with suppress(httpx.HTTPError):
                    one.result(100)
        finally:
            running.stop()


def watch(server: WarmServer) -> Any:
    with httpx.stream("GET", f"{server.url}/dynasor/events", timeout=60) as response:
        for _ in response.iter_lines():
            pass


def family(server: WarmServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


# Also of a process that ends while it is looked at.


def compares(process: psutil.Process) -> bool:
    try:
        return "sglang_dynasor.symbolic" in process.cmdline()
    except psutil.Error:
        return False


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

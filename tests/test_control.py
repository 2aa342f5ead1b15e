"""What an operator sees and does while a server runs: programs listed, finished, cancelled, settings changed, records logged."""

from __future__ import annotations

import asyncio
import curses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from engines import GIVEN_BACK
from questions import held_out, prompt
from server import Server

from sglang_dynasor import top
from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import routes
from sglang_dynasor.engine.routes import check_query, check_settings
from sglang_dynasor.errors import ConfigError, DynasorError, FieldError
from sglang_dynasor.frontend.backend import abort_all
from sglang_dynasor.frontend.endpoint import Endpoint
from sglang_dynasor.observe.entry import ANSWERED, entry_of
from sglang_dynasor.observe.ledger import RecordBook
from sglang_dynasor.observe.line import LINE_HELP, VERSION
from sglang_dynasor.observe.report import Report, lines_of
from sglang_dynasor.top import row

QUESTION = prompt(held_out(1)[0].text)
KEY, ADMIN = "key", "admin"


# What is asked for wrongly


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"width": -1}, "width=-1 is outside"), ({"width": True}, "width=True is outside"), ({"width": "4"}, "width='4' is outside"),
        ({"level": "sure"}, "level='sure' is not known"), ({"level": ["fast"]}, "level=\\['fast'\\] is not known"),
        ({"max_price": 2}, "max_price=2 is no price"), ({"drain": "yes"}, "drain='yes' is neither"), ({"log": 1}, "log=1 is neither"),
        ({"speed": 1}, "'speed' is no setting"), ({"x" * 1000: 1}, "^'x{80}... is no"), ({"level": "x" * 1000}, "level='x{80}... is not"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told(body: dict[str, Any], says: str) -> None:
    with pytest.raises(DynasorError, match=says):
        check_settings(body)


def test_a_right_setting_is_not() -> None:
    for body in ({}, {"width": 0, "level": "fast", "max_price": 0.5, "drain": False, "log": True}):
        assert check_settings(body) == body


@pytest.mark.parametrize(
    ("state", "limit"), [("ended", "1"), ("", "0"), ("", "x"), ("", "-1"), ("", "10001"), ("", "٣"), ("", "9" * 5000)]
)
def test_a_wrong_query_is_told(state: str, limit: str) -> None:
    with pytest.raises(FieldError, match="is not known" if state else "outside"):
        check_query(state, limit)
    check_query("done", "10000")


# The book of records


def test_each_program_is_listed_once() -> None:
    """The newest first; of a client's own branches the latest record."""
    book = RecordBook()
    for rid, program, num in (
        ("a", "a", 1),
        ("x-0", "x", 1),
        ("x", "x", 1),
        ("b", "b", 1),
        ("x-1", "x", 2),
        ("x", "x", 2),
    ):
        book.keep(rid, {"program": program, "num": num})
    assert [(r["program"], r["num"]) for _, r in book.newest()] == [("x", 2), ("b", 1), ("a", 1)]


# In a terminal

PROGRAM: dict[str, Any] = {
    "id": "p", "algorithm": "self_consistency", "tenant": None, "owner": None, "state": "running", "age_s": 1.25, "cap": 16, "num_tokens": 1234,
    "certaindex": 0.876, "votes": [["19", 2.0], ["7", 1.0]],
    "branches": [{"state": state} for state in ("finished", "compared", "running", "judged", "queued")],
}  # fmt: skip


def test_a_program_is_one_line_of_a_terminal() -> None:
    """Nothing that a client sent steers it."""
    assert row(PROGRAM).split() == [
        "p",
        "self_consistency",
        "running",
        "1.2",
        "s",
        "2+3",
        "of",
        "16",
        "1,234",
        "0.88",
        "19",
    ]
    evil = {**PROGRAM, "id": "\x1b[2J" + "x" * 100, "tenant": "\n", "votes": [["\x07\u202e", 1.0]], "age_s": None}
    assert row(evil).isprintable()
    assert len(row(evil)) < 130
    assert row({**PROGRAM, "votes": []}).endswith("0.88")


def test_a_key_meant_for_a_program_that_has_ended_is_no_other_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is marked until a key does it, and when the marked one has ended nobody is again."""
    window = SimpleNamespace(
        erase=lambda: None, getmaxyx=lambda: (30, 160), addnstr=lambda *args: None, timeout=lambda ms: None
    )
    there, posted = [("a", "x"), ("b", None)], list[str]()
    state = [{"programs": []}]
    monkeypatch.setattr(top, "state_of", lambda operator: state)
    monkeypatch.setattr(top, "summary", lambda state: [])
    monkeypatch.setattr(
        top, "programs_of", lambda state: [{**PROGRAM, "id": id, "owner": owner} for id, owner in there]
    )
    screen = top._Screen(SimpleNamespace(post=posted.append))  # type: ignore[arg-type]

    def press(key: str) -> bool:
        return screen._obey(ord(key), list(map(top._name, screen._draw(window))))

    assert all(press(key) for key in "cfk")
    assert screen.marked == ("a", "x")
    assert all(press(key) for key in "jc")
    there.pop()
    assert all(press(key) for key in "cf")
    assert posted == ["/dynasor/programs/b/cancel?owner="]
    assert not press("q")


@pytest.mark.parametrize("word", ["off", "error"])
def test_a_terminal_is_told_why_a_scheduler_shows_nothing(word: str) -> None:
    """One that has stepped aside, or failed; and an address that is none."""
    asked = SimpleNamespace(url="http://a", get=lambda path: [{"programs": []}, {word: "it has stepped aside"}])
    with pytest.raises(ConfigError, match="--url=http://a: it has stepped aside"):
        top.state_of(asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--url=foo does not answer"):
        top.run_top("foo", "", once=True)


def test_a_letter_that_does_not_fit_ends_no_terminal() -> None:
    """Of those that are two wide the last may stand over the edge."""

    def full(*args: Any) -> None:
        raise curses.error("ERR")

    top._put(SimpleNamespace(getmaxyx=lambda: (1, 9), addnstr=full), 0, "\u4e2d" * 9)


# A scheduler that has stepped aside


@pytest.mark.parametrize("answer", [{"off": "it has stepped aside"}, {"error": "RuntimeError in the scheduler"}])
def test_who_has_stepped_aside_knows_no_programs(answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is told why, a client what it is always told; a record that is there is found."""

    async def asked(*args: Any, **arguments: Any) -> list[dict[str, Any]]:
        return [{} if args[1] == "whose" else answer]

    book = RecordBook()
    book.keep("mine", {"program": "mine", "index": 0})
    monkeypatch.setattr(
        routes,
        "manager",
        lambda: SimpleNamespace(server_args=SimpleNamespace(_dynasor=DynasorConfig(dynasor_show_texts=True))),
    )
    monkeypatch.setattr(routes, "records_of", lambda manager: book)
    monkeypatch.setattr(routes, "ask", asked)
    assert asyncio.run(routes._one("x", "", is_opened=True)).status_code == 503
    assert asyncio.run(routes._one("x", "")).status_code == 404
    assert asyncio.run(routes._one("mine", "")).status_code == 200


engine = pytest.mark.engine


# On a running server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(
        folder / "log", "--scheduler", "dynasor", "--dynasor-log", str(folder / "records"), "--dynasor-show-texts",
        "--api-key", KEY, "--admin-api-key", ADMIN, "--max-running-requests", "8",
    )  # fmt: skip
    try:
        running.wait(500)  # it begins in a Python of its own, on a machine that others load
        yield running
    finally:
        running.stop()


def call(server: Server, method: str, path: str, key: str = ADMIN, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, f"{server.url}{path}", headers=headers, timeout=120, **more)


def send(server: Server, rid: str, params: dict[str, Any] | None = None, **field: Any) -> httpx.Response:
    sampling = {
        "max_new_tokens": 200,
        "temperature": 1.0,
        **(params or {}),
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }
    return call(server, "POST", "/generate", KEY, json={"text": QUESTION, "rid": rid, "sampling_params": sampling})


@engine
@pytest.mark.parametrize(("admin", "num"), [(None, 1), (ADMIN, 0)])
def test_who_searches_needs_the_admin_key_to_end_requests(
    server: Server, caplog: pytest.LogCaptureFixture, admin: str | None, num: int
) -> None:
    """SGLang wants it where there is one. Without it all runs on, and the author is told, once."""
    with closing(Endpoint(server.url, api_key=KEY, admin_api_key=admin)) as backend:
        assert backend.has_scheduler
        abort_all(backend, ["nobody", "nobody else"])
    told = [record.message for record in caplog.records if "was not ended" in record.message]
    assert len(told) == num
    assert all("HTTP 401" in message and "admin_api_key" in message for message in told)


ENDLESS = {"ignore_eos": True, "max_new_tokens": 900}


def until(server: Server, query: str, num: int) -> list[dict[str, Any]]:
    """Programs listed, once there are so many that are not over."""
    for _ in range(600):
        found = [p for p in call(server, "GET", f"/dynasor/programs?{query}").json() if p["state"] != "done"]
        if len(found) >= num:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


@pytest.fixture
def sent(server: Server) -> Iterator[list[Future[httpx.Response]]]:
    """Three programs that do not end by themselves on eight rows: two run, four branches at once, and one waits."""
    with ThreadPoolExecutor(4) as pool:
        futures = []
        for i in range(3):
            field = {"branches": 64, "width": 4, "stop": "never", "tenant": f"t{i}"}
            futures.append(pool.submit(send, server, f"endless-{i}", ENDLESS, **field))
            until(server, "", i + 1)
        yield futures
        for i in range(3):
            call(server, "POST", f"/dynasor/programs/endless-{i}/cancel")
    # Answered; the next test's have the same names.
    while any(call(server, "GET", f"/dynasor/programs?state={state}").json() for state in ("running", "waiting")):
        time.sleep(0.05)


@engine
def test_programs_are_seen_finished_and_cancelled(server: Server, sent: list[Future[httpx.Response]]) -> None:
    """Each by its id, while others go on undisturbed."""
    for _ in range(600):
        states = {p["id"]: p["state"] for p in call(server, "GET", "/dynasor/programs?limit=3").json()}
        if list(states.values()) == ["running", "running", "waiting"]:
            break
        time.sleep(0.05)
    assert states == {"endless-0": "running", "endless-1": "running", "endless-2": "waiting"}
    (waiting,) = call(server, "GET", "/dynasor/programs?state=waiting").json()
    assert (waiting["tenant"], waiting["branches"], waiting["rank"]) == ("t2", [], 0)
    for _ in range(600):
        (found,) = call(server, "GET", "/dynasor/programs?tenant=t1").json()
        running = [branch for branch in found["branches"] if branch["state"] == "running"]
        if len(running) == 4 and found["num_tokens"]:
            break
        time.sleep(0.05)
    assert found["id"] == "endless-1"
    assert len(running) == 4
    assert found["num_tokens"] == sum(branch["num_tokens"] for branch in found["branches"]) > 0
    assert found["age_s"] > 0
    assert call(server, "GET", "/dynasor/programs?algorithm=long_cot&state=running").json() == []

    seen = call(server, "GET", "/dynasor/programs/endless-0", KEY).json()
    assert (seen["state"], seen["stop_reason"]) == ("running", None)
    assert len(seen["branches"]) >= 4
    assert "texts" not in seen

    assert call(server, "POST", "/dynasor/programs/endless-0/finish").json() == {"id": "endless-0", "finish": True}
    finished = sent[0].result(120)
    record = finished.json()["meta_info"]["dynasor"]
    assert record["stop_reason"] == "operator"
    assert finished.json()["text"]  # of a branch that was running
    assert call(server, "POST", "/dynasor/programs/endless-0/finish").status_code == 409

    assert call(server, "POST", "/dynasor/programs/endless-1/cancel").json() == {"id": "endless-1", "cancel": True}
    cancelled = sent[1].result(120)
    assert cancelled.status_code == 503
    assert "operator cancelled" in cancelled.text
    assert not sent[2].done()  # it runs now
    assert call(server, "POST", "/dynasor/programs/endless-9/cancel").status_code == 404
    (done,) = call(server, "GET", "/dynasor/programs?state=done&limit=1").json()
    assert (done["id"], done["state"]) == ("endless-1", "done")


@engine
def test_a_terminal_shows_and_ends_them(server: Server, sent: list[Future[httpx.Response]]) -> None:
    """The commands as a person calls them: printed once; on a screen, where `c` cancels the one that is marked."""
    command = [sys.executable, "-m", "sglang_dynasor.cli", "top", "--url", server.url]
    environment = {**os.environ, "DYNASOR_API_KEY": ADMIN, "TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    printed = subprocess.run(
        [*command, "--once"], capture_output=True, text=True, env=environment, timeout=120, check=True
    ).stdout
    assert [line.split()[0] for line in printed.splitlines()[3:]] == ["endless-0", "endless-1", "endless-2"]
    assert "programs 3" in printed
    outer, inner = pty.openpty()
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment, close_fds=True) as top:
        try:
            seen = ""
            while "endless-0" not in seen:
                seen += os.read(outer, 65536).decode(errors="replace")
            os.write(outer, b"jc")
            assert sent[0].result(120).status_code == 503
            assert not sent[1].done()
            os.write(outer, b"q")
            assert top.wait(60) == 0
        finally:
            top.kill()
    refused = subprocess.run(
        [*command, "--once"],
        capture_output=True,
        text=True,
        env={**environment, "DYNASOR_API_KEY": ""},
        timeout=120,
        check=False,
    )
    assert refused.returncode == 1
    assert "gave 401" in refused.stderr


@engine
def test_the_operator_s_routes_want_the_operator_s_key(server: Server) -> None:
    """Where there is one; a client's key reads a record whose id it knows."""
    record = send(server, "mine", branches=2).json()["meta_info"]["dynasor"]
    for method, path in (
        ("GET", "/dynasor/programs"), ("GET", "/dynasor/settings"), ("POST", "/dynasor/settings"),
        ("POST", "/dynasor/programs/mine/finish"), ("POST", "/dynasor/programs/mine/cancel"),
    ):  # fmt: skip
        assert call(server, method, path, KEY).status_code == 401, path
        assert call(server, method, path, "").status_code == 401, path
        assert call(server, method, path).status_code in (200, 409), path
    assert call(server, "GET", "/dynasor/programs/mine", "").status_code == 401
    assert call(server, "GET", "/dynasor/programs/mine", KEY).json() == record
    assert call(server, "GET", "/dynasor/opened?id=mine").json() == record


@engine
@pytest.mark.usefixtures("sent")
def test_texts_are_the_operator_s(server: Server) -> None:
    """A client's key reads none by an id, its own or another's."""
    refused = call(server, "GET", "/dynasor/programs/endless-0?texts=true", KEY)
    assert refused.status_code == 403
    assert QUESTION.strip() not in refused.text
    assert "/dynasor/opened?id=" in refused.json()["error"]
    assert call(server, "GET", "/dynasor/opened?id=endless-0", KEY).status_code == 401


@engine
def test_the_live_page_opens_without_a_key_and_shows_nothing_without_the_operator_s(server: Server) -> None:
    """A browser that opens an address sends none; what it then asks for holds everybody's programs."""
    assert call(server, "GET", "/dynasor", "").headers["content-type"].startswith("text/html")
    assert call(server, "GET", "/dynasor/page/page.js", "").status_code == 200
    for path in (
        "/dynasor/events",
        "/dynasor/opened?id=endless-0",
        "/dynasor/programs",
        "/dynasor/page/../programs",
        "/dynasor/page/x",
    ):
        assert call(server, "GET", path, "").status_code == 401, path
    for path in ("/dynasor/events", "/dynasor/opened?id=endless-0"):
        assert call(server, "GET", path, KEY).status_code == 401, path
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.stream("GET", f"{server.url}/dynasor/events", headers=headers, timeout=30) as response:
        assert next(line for line in response.iter_lines() if line.startswith("data: ")).endswith('"has_texts":true}')


@engine
@pytest.mark.usefixtures("sent")
def test_a_program_that_is_opened_shows_its_texts(server: Server) -> None:
    """On a server that was started so; of one that waits the prompt."""
    until(server, "state=running", 2)
    for _ in range(600):
        found = call(server, "GET", "/dynasor/opened?id=endless-0").json()
        if len(found["texts"]["branches"]) >= 4 and any(found["texts"]["branches"].values()):
            break
        time.sleep(0.05)
    assert found["id"] == "endless-0"
    assert found["texts"]["prompt"] == QUESTION
    assert any(found["texts"]["branches"].values())
    assert call(server, "GET", "/dynasor/opened?id=endless-2").json()["texts"] == {"prompt": QUESTION, "branches": {}}
    assert len(found["texts"]["branches"]) >= 4
    gone = call(server, "GET", "/dynasor/opened?id=nobody")
    assert gone.status_code == 404
    assert gone.json()["error"].startswith("program 'nobody' is not known")


@engine
def test_an_id_may_be_any_text(server: Server) -> None:
    """A slash in it, and what else an address gives a meaning to; but for half of a letter, by which no list could be read."""
    rid = "a/b/finish?c=%2F#ä𝕏"
    path = f"/dynasor/programs/{quote(rid, safe='')}"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, server, rid, ENDLESS, branches=64, width=2, stop="never")
        until(server, "state=running", 1)
        assert call(server, "GET", path, KEY).json()["id"] == rid
        assert call(server, "POST", f"{path}/cancel", KEY).status_code == 401
        assert call(server, "POST", f"{path}/cancel").json() == {"id": rid, "cancel": True}
        assert running.result(120).status_code == 503
    assert call(server, "POST", f"{path}/finish").status_code == 409
    assert call(server, "GET", path, KEY).json()["stop_reason"] == "aborted"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    custom = {"custom_params": {"dynasor": {"branches": 1}}}
    for path, body in (
        ("/generate", {"text": "Q", "sampling_params": {"max_new_tokens": 1, **custom}}),
        ("/v1/completions", {"model": "m", "prompt": "Q", "max_tokens": 1, **custom}),
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "Q"}], "max_tokens": 1, **custom},
        ),
    ):
        content = json.dumps({**body, "rid": "\ud800x"})
        refused = httpx.post(server.url + path, content=content, headers=headers, timeout=30)
        assert refused.status_code == 400, (path, refused.text)
    assert call(server, "GET", "/dynasor/programs").status_code == 200


@engine
def test_settings_change_while_it_runs(server: Server) -> None:
    """Width, level and price, for programs that come; a wrong one is told and changes none."""
    before = call(server, "GET", "/dynasor/settings").json()
    assert before == {**before, "width": 0, "level": "careful", "max_price": 0.0, "drain": False}
    changed = call(server, "POST", "/dynasor/settings", json={"width": 3, "level": "fast", "max_price": 0.01}).json()
    assert changed == {**before, "width": 3, "level": "fast", "max_price": 0.01}
    record = send(server, "wide", branches=8).json()["meta_info"]["dynasor"]
    assert record["gang"] == 3
    assert record["stop_rule"] == "fast"
    assert "price" in record
    for body in ({"width": 2, "level": "sure"}, {"speed": 1}):
        assert call(server, "POST", "/dynasor/settings", json=body).status_code == 400
    assert call(server, "POST", "/dynasor/settings", content=b"{").status_code == 400
    assert call(server, "GET", "/dynasor/settings").json()["width"] == 3
    back = {key: before[key] for key in ("width", "level", "max_price")}
    assert call(server, "POST", "/dynasor/settings", json=back).json()["level"] == "careful"
    record = send(server, "as-before", branches=8).json()["meta_info"]["dynasor"]
    assert record["stop_rule"] == "careful"
    assert "price" not in record


@engine
def test_a_server_that_drains_takes_no_programs(server: Server) -> None:
    """It serves those that it has, and plain requests."""
    assert send(server, "early-0", program="early", branches=2).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, server, "before", ENDLESS, branches=2, stop="never")
        until(server, "state=running", 1)
        assert call(server, "POST", "/dynasor/settings", json={"drain": True}).json()["drain"] is True
        try:
            for params, field in (({}, {}), ({}, {"program": "sent", "branches": 2}), ({"n": 2}, {})):
                refused = send(server, "after", params, **field)
                assert refused.status_code == 503, field
                assert "drains" in refused.text
            # One that it has is served, whoever sends its branches.
            assert send(server, "early-1", program="early", branches=2).status_code == 200
            plain = call(
                server,
                "POST",
                "/generate",
                KEY,
                json={"text": QUESTION, "sampling_params": {"max_new_tokens": 4, "temperature": 0}},
            )
            assert plain.status_code == 200
            assert running.result(120).status_code == 200
        finally:
            assert call(server, "POST", "/dynasor/settings", json={"drain": False}).json()["drain"] is False
    assert send(server, "again").status_code == 200
    # What was refused has claimed nothing: other settings, another tenant.
    assert send(server, "after", program="sent", branches=3, tenant="t").json()["meta_info"]["dynasor"]["cap"] == 3
    assert send(server, "late", program="early", branches=3).status_code == 400


@engine
def test_records_are_logged(server: Server) -> None:
    """One line each, while the log is on."""
    response = send(server, "logged", branches=2).json()["meta_info"]
    call(server, "POST", "/dynasor/settings", json={"log": False})
    send(server, "unlogged", branches=2)
    log = call(server, "POST", "/dynasor/settings", json={"log": True}).json()["log"]
    assert log["is_on"] is True
    assert log["num_lost"] == 0
    lines = logged(server, "id", "logged")
    ids = [line["id"] for line in lines]
    assert ids.count("logged") == 1
    assert "unlogged" not in ids
    assert all(set(line) == set(LINE_HELP) and line["v"] == VERSION for line in lines)  # the server shows texts
    line = lines[ids.index("logged")]
    assert line["record"]["cap"] == 2
    assert line["settings"] == {
        "answer": "hash",
        "equal": "math",
        "vote": "majority",
        "max_new_tokens": 200,
        "temperature": 1.0,
    }
    assert (line["endpoint"], line["prompt"]) == ("/generate", QUESTION)
    assert line["model"] == call(server, "GET", "/v1/models", KEY).json()["data"][0]["id"]
    assert 0 < line["took_s"] < 600
    assert line["at"] - line["arrived_at"] == pytest.approx(line["took_s"], abs=0.01)
    assert time.time() - 600 < line["arrived_at"] < time.time()
    assert (line["prompt_tokens"], line["output_tokens"] in line["record"]["branch_tokens"]) == (
        response["prompt_tokens"] // line["record"]["num_branches"],
        True,
    )


def logged(server: Server, key: str, value: str, num: int = 1) -> list[dict[str, Any]]:
    """The lines of the server's log, once there are so many with this value."""
    path = server.log.parent / "records"
    for _ in range(600):
        text = path.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # one may be half written
        log = call(server, "GET", "/dynasor/settings").json()["log"]
        if len(lines) == log["num_written"] and sum(line[key] == value for line in lines) >= num:
            return lines
        time.sleep(0.05)
    raise AssertionError(log)


@engine
def test_a_report_of_the_log_says_what_the_server_counted(server: Server, tmp_path: Path) -> None:
    """Programs by how they ended, branches, tokens, and what was saved; each prompt of a batch is one, by its endpoint."""
    body = {
        "model": "m", "prompt": [QUESTION] * 2, "max_tokens": 200, "temperature": 1.0,
        "custom_params": {"dynasor": {"answer": "hash", "tenant": "acme", "deadline_s": 50}},
    }  # fmt: skip
    # One that is sure long before its cap: at this temperature all branches say the same.
    assert send(server, "sure", {"temperature": 0.01}, width=2).status_code == 200
    assert call(server, "POST", "/v1/completions", KEY, json=body).status_code == 200
    # Programs whose branches clients send are not in the status.
    lines = [line for line in logged(server, "endpoint", "/v1/completions", 2) if "index" not in line["record"]]
    path = tmp_path / "records"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    theirs = [line for line in lines if line["endpoint"] == "/v1/completions"]
    assert [(line["record"]["tenant"], line["settings"]["deadline_s"], line["prompt"]) for line in theirs] == [
        ("acme", 50, QUESTION)
    ] * 2
    report = Report()
    report.read(lines_of(path))
    unlogged = call(server, "GET", "/dynasor/programs/unlogged", KEY)  # of the test before
    if unlogged.status_code == 200:
        report.add(entry_of({"id": "unlogged", "record": unlogged.json()}))
    report.close()
    status, sums = call(server, "GET", "/dynasor/status", KEY).json()[0], report.all
    outcomes = dict(
        zip(
            ANSWERED,
            ("num_certain", "", "num_expired", "num_finished_early", "num_used_up", "num_priced_out"),
            strict=True,
        )
    )
    assert {key: sums.outcomes[name] for name, key in outcomes.items() if key} == {
        key: status[key] for key in outcomes.values() if key
    }
    assert sum(sums.outcomes[name] for name in ANSWERED) == status["num_programs"]
    assert sums.outcomes["aborted"] == status["num_aborted"]
    assert sum(sums.tokens[name] for name in ANSWERED) == status["num_tokens"] > 0
    assert sums.num_branches_saved == status["num_branches_saved"] > 0
    assert (report.num_unreadable, report.num_unknown) == (0, 0)
    made = subprocess.run(
        [sys.executable, "-m", "sglang_dynasor.cli", "report", str(path), "--html", str(tmp_path / "page.html")],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert f"programs: {len(lines)} (" in made.stdout
    html = (tmp_path / "page.html").read_text()
    logged_tokens = sum(line["record"]["num_tokens"] for line in lines)
    assert f"<b>{len(lines):,}</b>" in html
    assert f"<b>{logged_tokens:,}</b>" in html
    acme = sum(line["record"]["num_tokens"] for line in lines if line["record"].get("tenant") == "acme")
    assert f'<td class="text">acme</td><td>{acme:,}</td>' in html


@engine
def test_nothing_is_left_inside(server: Server) -> None:
    for _ in range(600):
        status = call(server, "GET", "/dynasor/status", KEY).json()[0]
        if not any(status[key] for key in GIVEN_BACK):
            break
        time.sleep(0.05)
    assert {key: status[key] for key in GIVEN_BACK if status[key]} == {}
    assert status["num_policy_errors"] == 0
    assert status["num_finished_early"] == 1


@engine
def test_who_watches_does_not_keep_a_server_that_stops(server: Server) -> None:
    """Its stream ends when the server is told to end; the last test, for that."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.stream("GET", f"{server.url}/dynasor/events", headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(line for line in lines if line == "event: state")
        os.kill(server.process.pid, signal.SIGTERM)
        for _ in lines:
            pass
        # By now it may listen no more, or close what has just come: neither keeps anybody waiting.
        with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
            assert httpx.get(f"{server.url}/dynasor/events", headers=headers, timeout=30).status_code == 503
        server.process.wait(60)

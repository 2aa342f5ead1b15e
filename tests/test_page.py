"""The live page without an engine: what it costs, who is dropped, what is kept, and the dashboard of several servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from page_feed import Feed, feed_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sglang_dynasor.errors import ConfigError
from sglang_dynasor.observe.recent import MOST_TENANTS, OTHERS, Recent
from sglang_dynasor.observe.savings import saved_tokens
from sglang_dynasor.page import watching
from sglang_dynasor.page.dashboard import dashboard_app, merged, run_dashboard, servers_of
from sglang_dynasor.page.files import FOLDER, HEADERS, PAGE, OpenPage, page_files
from sglang_dynasor.page.stream import EventStream, event
from sglang_dynasor.page.watching import EVERY_S, LONGEST_S, MOST_VIEWERS, Watching, pause_s

LOCAL = "http://127.0.0.1"


def data_of(part: bytes) -> Any:
    """The JSON value of the first event."""
    return json.loads(re.search(rb"^data: (.*)$", part, re.M)[1])  # type: ignore[index]


# What is kept of finished programs


def record(program: str, **keys: Any) -> dict[str, Any]:
    return {
        "program": program, "algorithm": "self_consistency", "answer": "4", "stop_reason": "certain", "cap": 16, "num_branches": 4,
        "num_tokens": 40, "branch_tokens": [10] * 4, **keys,
    }  # fmt: skip


def test_the_newest_are_told_once_and_the_oldest_forgotten() -> None:
    """To each viewer by where that one is."""
    recent = Recent(size=3)
    for program in "abcd":
        recent.add(record(program), time_s=1.0, latency_s=2.0)
    newest, rows = recent.since(0)
    assert [row["program"] for row in rows] == ["b", "c", "d"]
    assert (rows[0]["latency_s"], rows[0]["num_saved_tokens"]) == (2.0, 120)
    assert recent.since(newest) == (newest, [])
    recent.add(record("e"), time_s=1.0, latency_s=2.0)
    assert [row["program"] for row in recent.since(newest)[1]] == ["e"]


def test_a_client_s_own_program_is_one_row_and_in_no_sum() -> None:
    """Each of its branches tells of it anew; the totals of the schedulers leave it out, too."""
    recent = Recent()
    for index in range(3):
        recent.add(record("own", index=index, num_branches=index + 1), time_s=1.0, latency_s=1.0)
    assert [row["num_branches"] for row in recent.since(0)[1]] == [3]
    assert recent.sums() == []


def test_sums_are_of_a_bounded_number_of_tenants() -> None:
    """Whatever clients call themselves; nothing is lost of the whole."""
    recent = Recent(size=2)
    for number in range(MOST_TENANTS + 50):
        recent.add(record(str(number), tenant=f"t{number}"), time_s=1.0, latency_s=1.0)
    recent.add(record("again", tenant="t1"), time_s=1.0, latency_s=1.0)
    sums = {line["tenant"]: line for line in recent.sums()}
    assert len(sums) == MOST_TENANTS + 1
    assert sums[OTHERS]["num_programs"] == 50
    assert sums["t1"]["num_tokens"] == 80
    assert sum(line["num_programs"] for line in sums.values()) == MOST_TENANTS + 51


def test_what_was_given_up_was_spent_all_the_same() -> None:
    recent = Recent()
    recent.add(record("a", stop_reason="aborted"), time_s=1.0, latency_s=1.0)
    (line,) = recent.sums()
    assert (line["num_programs"], line["num_tokens"], line["num_saved_tokens"]) == (0, 40, 0)


def test_only_who_was_sure_has_saved() -> None:
    """A program that was cut spent less, and saved nothing; one that failed has no tokens at all."""
    assert saved_tokens(record("a")) == 120
    assert saved_tokens(record("a", stop_reason="price")) == 120
    assert saved_tokens(record("a", cap=4)) == 0
    for reason in ("cap", "deadline", "budget", "operator", None):
        assert saved_tokens(record("a", stop_reason=reason)) == 0
    failed = {"program": "a", "stop_reason": "failed"}
    assert saved_tokens(failed) == 0
    recent = Recent()
    recent.add(failed, time_s=1.0, latency_s=1.0)
    assert len(recent.since(0)[1]) == 1
    assert recent.sums() == []


def test_what_grows_with_the_tokens_is_cut() -> None:
    recent = Recent()
    recent.add(record("a", trials=list(range(500)), asked_at_tokens=[[1] * 500]), time_s=1.0, latency_s=1.0)
    (row,) = recent.since(0)[1]
    assert row["trials"] == list(range(450, 500))
    assert "asked_at_tokens" not in row


# Events


@pytest.mark.parametrize("text", ["a\nb", "\r\n\r\ndata: {}", "\ud800", "\0", "</script>", " "])
def test_an_event_is_one_whatever_it_holds(text: str) -> None:
    """Nothing in a text ends it, and half a surrogate pair does not stop the page."""
    part = event("state", {"id": text})
    assert part.endswith(b"\n\n")
    assert part.count(b"\n\n") == 1
    assert part.count(b"\n") == 3
    assert b"\r" not in part
    assert data_of(part) == {"id": text}


# Who watches


class Looks:
    """Counts the looks."""

    def __init__(self, error: Exception | None = None):
        self.num, self.error = 0, error

    async def look(self) -> tuple[bytes, float]:
        self.num += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return event("state", self.num), 0.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks every hundredth of a second."""
    monkeypatch.setattr(watching, "EVERY_S", 0.01)
    monkeypatch.setattr(watching, "LEAST_PAUSE_S", 0.005)


async def comes(what: Callable[[], Any]) -> None:
    """Return once it is so, however slow the machine is: half a minute at most."""
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("quick")
def test_nothing_runs_while_nobody_watches() -> None:
    """Before the first viewer, and after the last; one look serves all between."""

    async def run() -> None:
        looks = Looks()
        page = Watching(looks.look)
        await asyncio.sleep(0.05)
        assert looks.num == 0
        assert page.poller is None
        streams = [page.frames() for _ in range(5)]
        seen = [data_of(await anext(stream)) for stream in streams]
        assert seen == [1] * 5
        assert page.num_viewers == 5
        for stream in streams[1:]:
            await stream.aclose()
        assert data_of(await anext(streams[0])) >= 2
        await streams[0].aclose()
        assert page.num_viewers == 0
        await comes(lambda: page.poller is None)
        num = looks.num
        await asyncio.sleep(0.05)
        assert looks.num == num
        async with aclosing(page.frames()) as frames:  # and who comes then sees what is then
            assert data_of(await anext(frames)) == num + 1

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_who_is_late_skips() -> None:
    """A viewer is given the newest frame, never those between."""

    async def run() -> None:
        looks = Looks()
        async with aclosing(Watching(looks.look).frames()) as frames:
            assert data_of(await anext(frames)) == 1
            await comes(lambda: looks.num >= 4)
            assert data_of(await anext(frames)) in (looks.num - 1, looks.num)  # one may be under way

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_a_look_that_fails_is_told_and_tried_again() -> None:
    async def run() -> None:
        looks = Looks(RuntimeError("secret"))
        async with aclosing(Watching(looks.look).frames()) as frames:
            part = await anext(frames)
            assert b"trouble" in part
            assert b"RuntimeError" in part
            assert b"secret" not in part
            looks.error = None
            while b"trouble" in part:
                part = await asyncio.wait_for(anext(frames), 30)
            assert data_of(part) >= 2

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_a_look_under_way_is_not_cut_off() -> None:
    """SGLang's channel would wait for the answer for ever."""

    async def run() -> None:
        is_asked, may_answer, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def look() -> tuple[bytes, float]:
            is_asked.set()
            await may_answer.wait()
            answered.set()
            return b"", 0.0

        page = Watching(look)
        viewer = asyncio.ensure_future(anext(page.frames()))
        await is_asked.wait()
        viewer.cancel()
        await asyncio.gather(viewer, return_exceptions=True)
        assert page.num_viewers == 0
        may_answer.set()
        await asyncio.wait_for(answered.wait(), 30)

    asyncio.run(run())


@pytest.mark.usefixtures("quick")
def test_streams_end_with_the_server() -> None:
    """It would wait for its viewers."""

    async def run() -> None:
        is_over = False
        frames = Watching(Looks().look, lambda: is_over).frames()
        await anext(frames)
        is_over = True
        assert [part async for part in frames] == []

    asyncio.run(run())


def test_a_silent_server_says_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENT_S", 0.02)

    async def run() -> None:
        never = asyncio.Event()

        async def look() -> tuple[bytes, float]:
            await never.wait()
            return event("state", 1), 0.0

        async with aclosing(Watching(look).frames()) as frames:
            assert await anext(frames) == watching.STILL_HERE
            never.set()
            while (part := await anext(frames)) == watching.STILL_HERE:
                pass
            assert data_of(part) == 1

    asyncio.run(run())


def test_looks_take_no_more_than_their_share() -> None:
    """Twice a second where a look is cheap; with thousands of programs less often, and never not at all."""
    assert pause_s(0.0) == pause_s(0.0025) == EVERY_S
    assert pause_s(0.01) == pytest.approx(2.0)
    assert pause_s(10.0) == LONGEST_S


def test_viewers_are_bounded() -> None:
    page = Watching(Looks().look)
    assert not page.is_full
    page.num_viewers = MOST_VIEWERS
    assert page.is_full


# Viewers who are slow, stuck, or gone


class Viewer:
    """The other end of a response."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        if message["type"] == "http.response.body" and message["body"]:
            self.parts.append(message["body"])


async def numbers(closed: list[str]) -> AsyncGenerator[bytes]:
    try:
        for number in range(10**6):
            yield b"%d" % number
            await asyncio.sleep(0)
    finally:
        closed.append("closed")


@pytest.mark.parametrize("ends", ["stuck", "gone"])
def test_who_takes_nothing_is_asked_for_nothing_and_dropped(ends: str) -> None:
    """A viewer who is stuck holds one part, not a queue; then, or when it disconnects, all of it is freed."""

    async def run() -> None:
        viewer, closed = Viewer(), list[str]()
        response = EventStream(numbers(closed), stuck_s=0.1 if ends == "stuck" else 60)
        serving = asyncio.ensure_future(response({"type": "http"}, viewer.receive, viewer.send))
        await comes(lambda: viewer.parts)
        viewer.takes.clear()
        held, began = len(viewer.parts), time.monotonic()
        if ends == "gone":
            await asyncio.sleep(0.04)
            assert not closed
            viewer.leaves.set()
        await asyncio.wait_for(serving, 30)
        assert closed == ["closed"]
        assert len(viewer.parts) == held
        assert ends == "gone" or time.monotonic() - began > 0.09

    asyncio.run(run())


def test_a_slow_viewer_who_takes_in_time_stays() -> None:
    async def run() -> None:
        viewer, closed = Viewer(), list[str]()
        response = EventStream(numbers(closed), stuck_s=20)
        serving = asyncio.ensure_future(response({"type": "http"}, viewer.receive, viewer.send))
        for _ in range(3):
            viewer.takes.clear()
            await asyncio.sleep(0.02)
            viewer.takes.set()
            await asyncio.sleep(0.02)
        assert not closed
        viewer.leaves.set()
        await asyncio.wait_for(serving, 30)

    asyncio.run(run())


# The files


def test_the_page_brings_all_that_it_needs() -> None:
    """No address of elsewhere, nothing inline, and nothing that makes HTML of a text."""
    found = page_files()
    assert PAGE in found
    for path, (content, _) in found.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), path
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser|setHTML", text
        ), path
    html = found[PAGE][0].decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    for wanted in re.findall(r'(?:src|href)="(dynasor/[^"]+)"', html):
        assert f"/{wanted}" in found
    for path, (content, _) in found.items():
        for wanted in re.findall(r'from "\./([^"]+)"', content.decode()):
            assert FOLDER + wanted in found, path
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def get(app: Any, path: str, **more: Any) -> httpx.Response:
    """One request of an app in this process."""

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client:
            return await client.get(path, **more)

    return asyncio.run(run())


def test_the_files_are_served_with_a_policy() -> None:
    """And nothing else of the folder, or outside it, is."""
    app = feed_app(Feed())
    for path, (content, media_type) in page_files().items():
        response = get(app, path)
        assert response.content == content
        assert response.headers["content-type"].startswith(media_type)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("../files.py", "__init__.py", "..%2ffiles.py", "page.html", "nothing.js"):
        assert get(app, FOLDER + path).status_code == 404


def test_only_the_page_s_own_files_are_open() -> None:
    """What holds data still wants the key."""

    async def locked(request: Request) -> Response:
        return JSONResponse({"error": "Unauthorized"}, 401)

    app = OpenPage(Starlette(routes=[Route("/{path:path}", locked, methods=["GET", "POST"])]))
    for path in page_files():
        assert get(app, path).status_code == 200
    for path in (
        f"{PAGE}/events",
        f"{PAGE}/programs",
        f"{PAGE}/status",
        FOLDER,
        f"{FOLDER}../status",
        "/",
        f"{PAGE}/",
        "/generate",
    ):
        assert get(app, path).status_code == 401, path


# Several servers


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The address of an app on a port of this machine, once it takes in who comes."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await comes(lambda: server.started or serving.done())
        yield f"{LOCAL}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listening.close()


async def until(
    parts: AsyncGenerator[bytes], wanted: set[tuple[str, str]], num: int = 600
) -> dict[tuple[str, str], Any]:
    """The data of the first of each event, by name and server, once all wanted have come."""
    found: dict[tuple[str, str], Any] = {}
    for _ in range(num):
        part = (await asyncio.wait_for(anext(parts), 30)).decode()
        for name, data, id in re.findall(r"event: (\w+)\n(?:id: .*\n)?data: (.*)\n(?:id: (.*)\n)?", part):
            number = id or re.search(r"id: (.*)", part)[1]  # type: ignore[index]
            found.setdefault((name, number), json.loads(data))
        if wanted <= set(found):
            return found
    raise AssertionError(set(found))


def test_several_servers_are_one_page() -> None:
    """Each event says which; one that is not there is told of, and the others go on. What a server says of its number is not believed."""

    async def run() -> None:
        feeds = [Feed(3, seed=1), Feed(5, seed=2)]
        async with served(feed_app(feeds[0])) as first, served(feed_app(feeds[1])) as second:
            servers = servers_of([first, second, f"{LOCAL}:9"], [])
            async with aclosing(merged(servers)) as parts:
                found = await until(parts, {("state", "0"), ("state", "1"), ("hello", "1"), ("trouble", "2")})
            assert found["server", "0"] == {"name": first.removeprefix("http://")}
            assert len(found["state", "0"]["schedulers"][0]["programs"]) == 3
            assert len(found["state", "1"]["schedulers"][0]["programs"]) == 5
            assert "cannot be reached" in found["trouble", "2"]["error"]
            for _ in range(600):
                if not any(feed.watching.num_viewers for feed in feeds):
                    break
                await asyncio.sleep(0.05)
            assert not any(feed.watching.num_viewers for feed in feeds)

    asyncio.run(run())


def test_servers_that_want_a_key_get_theirs_and_the_page_does_not() -> None:
    """A wrong one is told of."""

    async def run() -> None:
        feed = Feed(2)
        inner = feed_app(feed)

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            headers = dict(scope.get("headers", []))
            if scope["type"] == "http" and headers.get(b"authorization") != b"Bearer secret":
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
            else:
                await inner(scope, receive, send)

        async with served(guarded) as url:
            async with aclosing(merged(servers_of([url, url], ["secret", "wrong"]))) as parts:
                found = await until(parts, {("state", "0"), ("trouble", "1")})
            assert "asks for a key" in found["trouble", "1"]["error"]
            app = dashboard_app(servers_of([url], ["secret"]))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client:
                program = await client.get(f"{PAGE}/opened?id=a&server=0")
                assert program.json()["texts"]["prompt"]
                assert (await client.get(f"{PAGE}/opened?id=a&server=7")).status_code == 404
                page = await client.get("/", follow_redirects=True)
            assert b"<title>dynasor</title>" in page.content
            assert b"secret" not in page.content + program.content

    asyncio.run(run())


def test_a_name_that_leads_here_is_no_way_in() -> None:
    """As a page of elsewhere would try whose name is given this machine's address."""
    app = dashboard_app(servers_of([f"{LOCAL}:9"], []))
    assert get(app, PAGE, headers={"Host": "elsewhere.example"}).status_code == 400
    assert get(app, PAGE, headers={"Host": "localhost:30080"}).status_code == 200


@pytest.mark.parametrize(
    ("urls", "keys", "message"),
    [
        (["localhost:30000"], [], "--url='localhost:30000' is no address"),
        (["file:///etc/passwd"], [], "is no address"),
        (["http://h:abc"], [], "--url='http://h:abc' is no address"),
        (["http://[::1"], [], "is no address"),
        (["http://a", "http://b", "http://c"], ["x", "y"], "--api-key is given 2 times for 3 servers"),
    ],
)
def test_wrong_options_are_told(urls: list[str], keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        servers_of(urls, keys)


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are in no printout."""
    monkeypatch.setenv("DYNASOR_API_KEY", "secret")
    servers = servers_of(["http://a/", "http://b"], [])
    assert [(server.url, server.key) for server in servers] == [("http://a", "secret"), ("http://b", "secret")]
    assert "secret" not in repr(servers)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port} cannot be used"):
            run_dashboard(Namespace(url=["http://a"], api_key=[], port=port))
    with pytest.raises(ConfigError, match="--port=70000 cannot be used"):
        run_dashboard(Namespace(url=["http://a"], api_key=[], port=70000))

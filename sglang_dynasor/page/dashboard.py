"""`sglang-dynasor dashboard`: the live page of several servers, on this machine only."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from sglang_dynasor.errors import ConfigError
from sglang_dynasor.page.files import FOLDER, PAGE, serve_file
from sglang_dynasor.page.stream import EventStream, event

HOST = "127.0.0.1"  # the page holds the servers' keys, so nobody else may open it
PORT = 30080
KEY = "DYNASOR_API_KEY"
TIMEOUT = httpx.Timeout(20.0, connect=5.0)  # a server that is there says something every five seconds
LONGEST_WAIT_S = 8.0  # between tries
MOST_BYTES = 64_000_000  # of one event


@dataclass(frozen=True, slots=True)
class Server:
    """One that the page shows."""

    number: int
    url: str
    key: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def add_dashboard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang-dynasor dashboard`."""
    parser.add_argument(
        "--url",
        action="append",
        required=True,
        help="http://HOST:PORT of a server with --scheduler dynasor; once for each",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page on this machine (default {PORT}; 0: any)")
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"sent as a bearer token, the admin key where a server has one: once for all, or once for each --url (default: ${KEY})",
    )  # fmt: skip


def servers_of(urls: list[str], keys: list[str]) -> list[Server]:
    """The servers to show.

    Raises:
        ConfigError: an address is none, or keys and servers do not match.
    """
    keys = keys or [os.environ.get(KEY, "")]
    if len(keys) not in (1, len(urls)):
        raise ConfigError(
            f"--api-key is given {len(keys)} times for {len(urls)} servers; give it once, or once for each"
        )
    for url in urls:
        if not _is_address(url):
            raise ConfigError(f"--url={url!r} is no address; write http://HOST:PORT")
    each = keys * len(urls) if len(keys) == 1 else keys
    return [Server(number, url.rstrip("/"), key) for number, (url, key) in enumerate(zip(urls, each, strict=True))]


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


async def follow(client: httpx.AsyncClient, server: Server, put: Callable[[bytes], Awaitable[None]]) -> None:
    """Pass on what a server sends, for ever; each event ends with the server's number."""
    id, num_tries = str(server.number), 0
    await put(event("server", {"name": server.name}, id))
    while True:
        try:
            async with client.stream("GET", f"{server.url}{PAGE}/events", headers=server.headers) as response:
                if response.status_code == 200:
                    num_tries = 0
                    await _pass_on(response, f"\nid: {id}\n\n".encode(), put)
                    why = "the server ended the stream"
                elif response.status_code in (401, 403):
                    why = f"the server asks for a key; start the dashboard with --api-key, or ${KEY}"
                elif response.status_code == 404:
                    why = "the server has no live page; start it with --scheduler dynasor"
                else:
                    why = f"the server answers {response.status_code}"
        except (httpx.HTTPError, ValueError) as error:
            why = f"the server cannot be reached ({type(error).__name__})"
        await put(event("trouble", {"error": why, "is_gone": True}, id))
        await asyncio.sleep(min(LONGEST_WAIT_S, 2.0**num_tries))
        num_tries = min(num_tries + 1, 8)


async def _pass_on(response: httpx.Response, end: bytes, put: Callable[[bytes], Awaitable[None]]) -> None:
    held = bytearray()
    async for part in response.aiter_bytes():
        held += part
        if b"\n\n" in held[-len(part) - 1 :]:  # what was held before has no end
            *events, rest = bytes(held).split(b"\n\n")
            held = bytearray(rest)
            for each in events:
                await put(each + end)
        if len(held) > MOST_BYTES:
            raise ValueError("an event is too long")


async def merged(servers: list[Server]) -> AsyncGenerator[bytes]:
    """What all servers send, for one viewer. While the viewer takes nothing, nothing is read from the servers."""
    parts: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        following = [asyncio.create_task(follow(client, server, parts.put)) for server in servers]
        try:
            while True:
                yield await parts.get()
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


def dashboard_app(servers: list[Server]) -> Starlette:
    """The page, the merged stream, and one program of one server."""

    async def home(request: Request) -> Response:
        return RedirectResponse(PAGE)

    async def stream(request: Request) -> Response:
        return EventStream(merged(servers))

    async def opened(request: Request) -> Response:
        number = request.query_params.get("server", "")
        server = next((server for server in servers if str(server.number) == number), None)
        if server is None:
            return JSONResponse({"error": f"server={number!r} is none of 0 to {len(servers) - 1}"}, 404)
        asked = {key: request.query_params[key] for key in ("id", "owner") if key in request.query_params}
        try:
            async with httpx.AsyncClient(timeout=TIMEOUT) as client:
                found = await client.get(f"{server.url}{PAGE}/opened", params=asked, headers=server.headers)
        except httpx.HTTPError as error:
            return JSONResponse({"error": f"the server cannot be reached ({type(error).__name__})"}, 502)
        return Response(found.content, found.status_code, media_type="application/json")

    routes = [
        Route("/", home),
        Route(PAGE, serve_file),
        Route(FOLDER + "{name}", serve_file),
        Route(f"{PAGE}/events", stream),
        Route(f"{PAGE}/opened", opened),
    ]
    # A page of elsewhere whose name leads here must not read what the keys open.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]
    return Starlette(routes=routes, middleware=middleware)


def run_dashboard(args: argparse.Namespace) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigError: an option is wrong, or the port is taken.
    """
    app = dashboard_app(servers_of(args.url, args.api_key))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, args.port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port={args.port} cannot be used ({error}); choose another, or 0 for any") from None
    with listening, suppress(KeyboardInterrupt):
        print(f"the live page: http://{HOST}:{listening.getsockname()[1]}{PAGE}", flush=True)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(settings).run(sockets=[listening])

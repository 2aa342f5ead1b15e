"""The live page on SGLang's own server: its routes, and what its stream says."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_dynasor import __version__
from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.messages import ask
from sglang_dynasor.observe.recent import Recent
from sglang_dynasor.page.files import FOLDER, PAGE, OpenPage, serve_file
from sglang_dynasor.page.stream import EventStream, event
from sglang_dynasor.page.watching import MOST_VIEWERS, Watching

MOST_PROGRAMS = 256  # of one scheduler in one frame; what a person can still look at


def recent_of(tokenizer_manager: Any) -> Recent:
    """The newest finished programs that this front process answered."""
    if not hasattr(tokenizer_manager, "_dynasor_recent"):
        tokenizer_manager._dynasor_recent = Recent()
    return tokenizer_manager._dynasor_recent


def note_record(tokenizer_manager: Any, record: dict[str, Any], state: Any, owner: str) -> None:
    """A record went to its client."""
    latency_s = time.perf_counter() - state.time_stats.created_time
    recent_of(tokenizer_manager).add(record, time_s=time.time(), latency_s=latency_s, owner=owner)


async def look(tokenizer_manager: Any) -> tuple[bytes, float]:
    """What is in flight now, of every scheduler, and the sums since the start; and what that took of a scheduler."""
    schedulers: list[dict[str, Any]] = []
    for rank, found in enumerate(await ask(tokenizer_manager, "look", most=MOST_PROGRAMS)):
        if why := found.get("error") or found.get("off"):
            return event("trouble", {"error": why}), 0.0
        schedulers.append({"rank": rank, **found})
    sums = recent_of(tokenizer_manager).sums()
    took_s = max((scheduler["look_s"] for scheduler in schedulers), default=0.0)
    return event("state", {"time_s": time.time(), "schedulers": schedulers, "sums": sums}), took_s


async def events(watching: Watching, tokenizer_manager: Any) -> AsyncGenerator[bytes]:
    """What one viewer is sent: who the server is, and then each frame with the programs that have finished since."""
    has_texts = config_of(tokenizer_manager.server_args).dynasor_show_texts
    yield event("hello", {"version": __version__, "model": tokenizer_manager.served_model_name, "has_texts": has_texts})
    newest = 0
    async with aclosing(watching.frames()) as frames:
        async for frame in frames:
            newest, rows = recent_of(tokenizer_manager).since(newest)
            yield frame + event("finished", rows) if rows else frame


def add_page(app: FastAPI, manager: Callable[[], Any]) -> None:
    """The page and its stream. It shows everybody's programs, so it wants the admin key where there is one.

    Args:
        manager: called for SGLang's tokenizer manager, once there is one.
    """
    watching = Watching(lambda: look(manager()), lambda: manager().gracefully_exit)
    for path in (PAGE, FOLDER + "{name}"):
        app.add_api_route(path, serve_file, methods=["GET"], include_in_schema=False)

    @app.get(f"{PAGE}/events")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def stream() -> Response:
        if watching.is_full or watching.is_over():
            why = "the server goes down" if watching.is_over() else f"{MOST_VIEWERS} viewers watch already"
            return JSONResponse({"error": why}, status_code=503)
        return EventStream(events(watching, manager()))


def open_page(result: None, app: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang asks for a key before every route; the page's own files come before that."""
    if config_of(getattr(app, "server_args", None)).is_on:
        app.add_middleware(OpenPage)

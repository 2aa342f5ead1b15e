"""What is served under /dynasor: programs in flight and answered, counters, and what an operator changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_dynasor.config import LEVELS, check_level, check_price, check_width
from sglang_dynasor.engine.flag import config_of, is_off
from sglang_dynasor.engine.front import log_of, records_of
from sglang_dynasor.engine.messages import ask
from sglang_dynasor.engine.owner import is_operator, owner_of
from sglang_dynasor.engine.page import add_page
from sglang_dynasor.engine.templates import book_of
from sglang_dynasor.errors import DynasorError, FieldError, quoted
from sglang_dynasor.page.files import PAGE

STATES = ("waiting", "running", "done")
MOST_LISTED = 10_000

# Where SGLang has an admin key it is asked for, else the API key if there is one.
operators_only = auth_level(AuthLevel.ADMIN_OPTIONAL)


def add_routes(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before SGLang serves: let its app serve ours."""
    if config_of(server_args).is_on:
        from sglang.srt.entrypoints import http_server

        add_to(http_server.app)
        add_page(http_server.app, manager)


def manager() -> Any:
    """SGLang's tokenizer manager of this process."""
    from sglang.srt.entrypoints import http_server

    return http_server.get_global_state().tokenizer_manager


def refuse(error: DynasorError | str, status_code: int = 400) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=status_code)


def add_to(app: FastAPI) -> None:
    """The routes; what each answers is in docs/operations.md.

    Not by a router that is included: SGLang's check of keys would not find what they ask for.
    """

    @app.get("/dynasor/programs")
    @operators_only
    async def programs(state: str = "", tenant: str = "", algorithm: str = "", limit: str = "100") -> JSONResponse:
        try:
            check_query(state, limit)
        except FieldError as error:
            return refuse(error)
        found = [
            program
            for program in chain(await _in_flight(state), _done(state))
            if (not state or program["state"] == state)
            and (not tenant or program.get("tenant") == tenant)
            and (not algorithm or program.get("algorithm") == algorithm)
        ]
        return JSONResponse(list(islice(found, int(limit))))

    # An id may hold a slash.
    @app.post("/dynasor/programs/{program_id:path}/finish")
    @operators_only
    async def finish(program_id: str, owner: str | None = None) -> JSONResponse:
        return await _do("finish", program_id, owner)

    @app.post("/dynasor/programs/{program_id:path}/cancel")
    @operators_only
    async def cancel(program_id: str, owner: str | None = None) -> JSONResponse:
        return await _do("cancel", program_id, owner)

    @app.get("/dynasor/programs/{program_id:path}")
    async def program(request: Request, program_id: str, texts: bool = False, owner: str | None = None) -> JSONResponse:
        if texts:
            return refuse(
                f"texts=true is not for clients; the operator reads texts at {PAGE}/opened?id=, with --dynasor-show-texts",
                403,
            )
        args = manager().server_args
        own = owner_of(args, request)
        return await _one(program_id, owner if is_operator(args, request) else own, own)

    @app.get(f"{PAGE}/opened")
    @operators_only
    async def opened(id: str, owner: str | None = None) -> JSONResponse:
        return await _one(id, owner, is_opened=True)

    @app.get("/dynasor/state")
    @operators_only
    async def state() -> JSONResponse:
        return JSONResponse(await ask(manager(), "look"))

    @app.get("/dynasor/status")
    async def status() -> JSONResponse:
        states = await manager().get_internal_state()
        return JSONResponse([state.get("dynasor", {}) for state in states])

    @app.get("/dynasor/templates")
    @operators_only
    async def templates() -> JSONResponse:
        return _templates(reads=False)

    @app.post("/dynasor/templates/reload")
    @operators_only
    async def reload() -> JSONResponse:
        return _templates(reads=True)

    @app.get("/dynasor/settings")
    @operators_only
    async def settings() -> JSONResponse:
        return JSONResponse(await _settings({}))

    @app.post("/dynasor/settings")
    @operators_only
    async def change(request: Request) -> JSONResponse:
        try:
            wanted = check_settings(await _body(request))
        except DynasorError as error:
            return refuse(error)
        return JSONResponse(await _settings(wanted))


def check_query(state: str, limit: str) -> None:
    """Raises FieldError for a query of /dynasor/programs that is not understood."""
    if state and state not in STATES:
        raise FieldError(f"state={quoted(state)} is not known; use one of {', '.join(STATES)}, or leave it out for all")
    is_number = limit.isascii() and limit.isdigit() and len(limit) <= len(str(MOST_LISTED))
    if not is_number or not 1 <= int(limit) <= MOST_LISTED:
        raise FieldError(f"limit={quoted(limit)} is outside [1, {MOST_LISTED}]; send a number inside")


async def _in_flight(state: str) -> list[dict[str, Any]]:
    if state == "done":
        return []
    looks = await ask(manager(), "look")
    return [{**program, "rank": rank} for rank, look in enumerate(looks) for program in look.get("programs", [])]


def _done(state: str) -> Iterator[dict[str, Any]]:
    if state in ("", "done"):
        for owner, record in records_of(manager()).newest():
            if record.get("stop_reason") is not None:
                yield {"id": record["program"], "state": "done", "owner": owner or None, **record}


def _templates(*, reads: bool) -> JSONResponse:
    """The templates and defaults, read again before if so wished."""
    if off := is_off(manager().server_args):
        return refuse(off)
    book = book_of(manager())
    try:
        if reads:
            book.reload()
    except DynasorError as error:
        return refuse(error)
    return JSONResponse(book.listing())


async def _one(program_id: str, owner: str | None, own: str | None = None, *, is_opened: bool = False) -> JSONResponse:
    """A program of this owner's: its record, or how far it is.

    Args:
        owner: None: whoever's it is, the caller's own first.
        own: who the caller is; None: nobody who has programs.
        is_opened: by the operator, who sees texts where they are shown, and of an id that was sent again what is in flight.
    """
    try:
        owner = await _whose(program_id, owner, own)
    except FieldError as error:
        return refuse(error, 409)
    record = records_of(manager()).find(program_id, owner)
    if not is_opened and record is not None and record.get("stop_reason") is not None:
        return JSONResponse(record)
    has_texts = is_opened and config_of(manager().server_args).dynasor_show_texts
    for found in await ask(manager(), "program", id=program_id, owner=owner, has_texts=has_texts):
        if why := found.get("off") or found.get("error"):
            if is_opened:
                return refuse(why, 503)
        elif found:
            if has_texts:
                found["texts"] = await asyncio.to_thread(_texts, manager().tokenizer, **found.pop("tokens"))
            return JSONResponse(found)
    return _unknown(program_id) if record is None else JSONResponse(record)


def _texts(tokenizer: Any, prompt: list[int] | None, branches: dict[str, list[int]]) -> dict[str, Any]:
    """The ends of a prompt and of what branches have written."""
    return {
        "prompt": None if prompt is None else tokenizer.decode(prompt),
        "branches": {index: tokenizer.decode(tokens) for index, tokens in branches.items()},
    }


async def _whose(program_id: str, owner: str | None, own: str | None = None) -> str:
    """The owner of a program; where the operator names it by its id alone, who has one, the operator first.

    Raises:
        FieldError: several have.
    """
    if owner is not None:
        return owner
    owners = set(records_of(manager()).owners_of(program_id))
    for answer in await ask(manager(), "whose", id=program_id):
        owners.update(answer.get("owners", []))
    if own in owners:
        return own
    if len(owners) > 1:
        raise FieldError(
            f"program {quoted(program_id)} is there of {len(owners)} owners; add owner=, as /dynasor/programs lists them"
        )
    return owners.pop() if owners else ""


async def _do(what: str, program_id: str, owner: str | None) -> JSONResponse:
    """Let whichever scheduler has the program do it."""
    try:
        owner = await _whose(program_id, owner)
    except FieldError as error:
        return refuse(error, 409)
    answers = await ask(manager(), what, id=program_id, owner=owner)
    if any(answer.get("is_done") for answer in answers):
        return JSONResponse({"id": program_id, what: True})
    if records_of(manager()).find(program_id, owner) is not None:
        return refuse(
            f"program {quoted(program_id)} has been decided already; its record is at /dynasor/programs/", 409
        )
    return _unknown(program_id)


def _unknown(program_id: str) -> JSONResponse:
    return refuse(
        f"program {quoted(program_id)} is not known: never sent, ended without an answer, or older than the newest 10,000",
        404,
    )


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; empty where there is no body.

    Raises:
        FieldError: anything else.
    """
    try:
        body = await request.json() if await request.body() else {}
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise FieldError('the body is no JSON object; send one such as {"level": "fast"}')
    return body


def check_settings(body: dict[str, Any]) -> dict[str, Any]:
    """Settings to change, each in range.

    Raises:
        DynasorError: a key that is none, or a value out of range.
    """
    for key, value in body.items():
        match key:
            case "width":
                check_width(value)
            case "level":
                check_level(value)
            case "max_price":
                check_price(value)
            case "drain" | "log" if isinstance(value, bool):
                pass
            case "drain" | "log":
                raise FieldError(f"{key}={quoted(value)} is neither true nor false; send one of them")
            case _:
                raise FieldError(
                    f"{quoted(key)} is no setting; there are width, level ({', '.join(LEVELS)}), max_price, drain and log"
                )
    return body


async def _settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """Change what is wanted and return how it is then. All schedulers have the same settings."""
    log = log_of(manager())
    if "log" in wanted and log is not None:
        log.is_on = wanted["log"]
    answers = await ask(manager(), "set", **{key: value for key, value in wanted.items() if key != "log"})
    written = None if log is None else {"is_on": log.is_on, "num_written": log.num_written, "num_lost": log.num_lost}
    return {**answers[0], "log": written}

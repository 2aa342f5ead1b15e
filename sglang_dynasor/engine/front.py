"""What the front process answers besides texts: a program's record in the response, and two routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.validation import budgets_of
from sglang_dynasor.errors import PatchError
from sglang_dynasor.observe.ledger import RecordBook


def records_of(tokenizer_manager: Any) -> RecordBook:
    """The newest records of the programs this front process answered."""
    if not hasattr(tokenizer_manager, "_dynasor_records"):
        tokenizer_manager._dynasor_records = RecordBook()
    return tokenizer_manager._dynasor_records


def add_record(
    original: Callable[..., None],
    tokenizer_manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    records = customized_info.get("dynasor")
    if records is not None:
        customized_info = {key: values for key, values in customized_info.items() if key != "dynasor"}
    original(tokenizer_manager, meta_info, state, customized_info, index, finish_reason)
    if not records or not records[index]:
        return
    record = records[index][0]
    meta_info["dynasor"] = record
    book = records_of(tokenizer_manager)
    book.keep(meta_info["id"], record)
    if record["program"] != meta_info["id"]:
        book.keep(record["program"], record)  # branches sent by the client: the latest of them tells the most
    elif "num_tokens" in record:
        meta_info["completion_tokens"] = record["num_tokens"]  # usage is what was generated, not what was shown
        budgets_of(tokenizer_manager).learn(record)


def check_schedulers(result: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    if not config_of(server_args).is_on or server_args.dp_size > 1:
        return  # the data-parallel controller drops what it does not know; each scheduler checks itself
    infos = next((part.scheduler_infos for part in result if hasattr(part, "scheduler_infos")), [])
    if not infos or any("dynasor" not in info for info in infos):
        raise PatchError(
            "--scheduler dynasor: a scheduler process started without the hooks; see its log for the plugin"
        )


def add_routes(server_args: Any, *args: Any, **kwargs: Any) -> None:
    if not config_of(server_args).is_on:
        return
    from sglang.srt.entrypoints import http_server

    router = APIRouter(prefix="/dynasor")

    def manager() -> Any:
        return http_server.get_global_state().tokenizer_manager

    @router.get("/programs/{program_id}")
    async def program(program_id: str) -> JSONResponse:
        """The record of an answered program, by the response's id or the client's program id."""
        record = records_of(manager()).find(program_id)
        if record is not None:
            return JSONResponse(record)
        message = f"program {program_id!r} is not known: not answered yet, never sent, or older than the newest 10,000"
        return JSONResponse({"error": message}, status_code=404)

    @router.get("/status")
    async def status() -> JSONResponse:
        """Counters of each scheduler since it started."""
        states = await manager().get_internal_state()
        return JSONResponse([state.get("dynasor", {}) for state in states])

    http_server.app.include_router(router)

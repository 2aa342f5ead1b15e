"""What the front process adds to SGLang's answers: a program's record, kept for who asks later, and its usage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_dynasor.engine.books import budgets_of, keep_claims
from sglang_dynasor.engine.fence import guarded
from sglang_dynasor.engine.flag import config_of, has_many_fronts, serves_programs
from sglang_dynasor.engine.logged import line_of
from sglang_dynasor.engine.owner import owner_in
from sglang_dynasor.engine.page import note_record
from sglang_dynasor.engine.templates import book_of
from sglang_dynasor.errors import PatchError
from sglang_dynasor.observe.ledger import RecordBook
from sglang_dynasor.observe.log import RecordLog


def records_of(tokenizer_manager: Any) -> RecordBook:
    """The newest records of the programs this front process answered; those of its log, if it has one, from before it started."""
    if not hasattr(tokenizer_manager, "_dynasor_records"):
        book = tokenizer_manager._dynasor_records = RecordBook()
        if (log := log_of(tokenizer_manager)) is not None:
            for line in log.newest(book.size):
                _keep(book, line["id"], line["record"], str(line.get("owner", "")))
    return tokenizer_manager._dynasor_records


def _keep(book: RecordBook, rid: str, record: dict[str, Any], owner: str) -> None:
    """Keep a record under its response's id, and under the program's: of branches sent by a client the latest tells the most."""
    book.keep(rid, record, owner)
    if record["program"] != rid:
        book.keep(record["program"], record, owner)


def log_of(tokenizer_manager: Any) -> RecordLog | None:
    """Where records are written; None without --dynasor-log."""
    if not hasattr(tokenizer_manager, "_dynasor_log"):
        path = config_of(tokenizer_manager.server_args).dynasor_log
        tokenizer_manager._dynasor_log = RecordLog(Path(path)) if path else None
    return tokenizer_manager._dynasor_log


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
    params: dict[str, Any] = state.obj.sampling_params
    custom: Any = params.get("custom_params") or {}  # none where --preferred-sampling-params has the field
    owner = owner_in(custom)
    _keep(records_of(tokenizer_manager), meta_info["id"], record, owner)
    keep_claims(tokenizer_manager, owner, meta_info["id"], record["program"], custom.get("dynasor"))
    note_record(tokenizer_manager, record, state, owner)
    if (log := log_of(tokenizer_manager)) is not None and log.is_on:
        line = guarded("log")(line_of)(
            tokenizer_manager, record, meta_info, state
        )  # by itself: what follows is counted all the same
        if line is not None:
            log.write(line)
    if record["program"] == meta_info["id"] and "num_tokens" in record:
        state.dynasor_usage = usage = usage_of(record, meta_info["prompt_tokens"])
        if details := meta_info.get("cached_tokens_details"):  # siblings find what the first has just computed
            details["device"] = details.get("device", 0) + usage["cached_tokens"] - meta_info["cached_tokens"]
        meta_info.update(usage)
        budgets_of(tokenizer_manager).learn(record)


def usage_of(record: dict[str, Any], prompt_tokens: int) -> dict[str, int]:
    """What a program took, each kind of token of all branches that ran, as SGLang's `meta_info` names them.

    Args:
        prompt_tokens: of its prompt; counted once at least.
    """
    num_prompts = max(1, sum(tokens > 0 for tokens in record["branch_tokens"]))
    return {
        "prompt_tokens": num_prompts * prompt_tokens,
        "completion_tokens": record["num_tokens"],
        "cached_tokens": record["num_cached_tokens"],
        "reasoning_tokens": record.get("num_reasoning_tokens", 0),
    }


def count_usage(tokenizer_manager: Any, state: Any, recv_obj: Any, i: int) -> None:
    """Let SGLang's own counters of tokens see what `usage` says: the answer alone is what was shown, not what was taken."""
    usage: dict[str, int] | None = getattr(state, "dynasor_usage", None)
    if usage is None:
        return
    for kind in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        getattr(recv_obj, kind)[i] = usage[kind]


def check_schedulers(result: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    if not config_of(server_args).is_on:
        return
    # Where requests come in here files are read now, and one that is wrong is told.
    if result[0] is not None and serves_programs(server_args) and not has_many_fronts(server_args):
        book_of(result[0])
        records_of(result[0])
    if server_args.dp_size > 1:
        return  # the data-parallel controller drops what it does not know; each scheduler checks itself
    infos = next((part.scheduler_infos for part in result if hasattr(part, "scheduler_infos")), [])
    if not infos or any("dynasor" not in info for info in infos):
        raise PatchError(
            "--scheduler dynasor: a scheduler process started without the hooks; see its log for the plugin"
        )

"""What the log says of a program besides its record: what the front process knows of the request."""

from __future__ import annotations

import time
from typing import Any

from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.owner import owner_in
from sglang_dynasor.engine.validation import has_field, sampling_of
from sglang_dynasor.errors import FieldError
from sglang_dynasor.observe.line import VERSION, settings_of
from sglang_dynasor.policy.spec import parse_field

MOST_PROMPT_CHARS = 2000
_SAMPLING = ("max_new_tokens", "temperature")


def line_of(tokenizer_manager: Any, record: dict[str, Any], meta_info: dict[str, Any], state: Any) -> dict[str, Any]:
    """The line of a record, as observe/line.py explains it.

    Args:
        meta_info: as SGLang made it, before a program's usage is put into it.
        state: SGLang's, of the request.
    """
    at, took_s = time.time(), time.perf_counter() - state.time_stats.created_time
    line = {
        "v": VERSION,
        "id": meta_info["id"],
        "arrived_at": round(at - took_s, 3),
        "at": round(at, 3),
        "took_s": round(took_s, 6),
        "model": tokenizer_manager.served_model_name,
        "endpoint": getattr(state.obj, "_dynasor_route", ""),
        "prompt_tokens": meta_info["prompt_tokens"],
        "output_tokens": meta_info["completion_tokens"],
        "settings": _settings(tokenizer_manager, record, state.obj),
        "record": record,
    }
    params: dict[str, Any] = state.obj.sampling_params
    if owner := owner_in(params.get("custom_params")):
        line["owner"] = owner
    if config_of(tokenizer_manager.server_args).dynasor_show_texts:
        line["prompt"] = _prompt(tokenizer_manager, state.obj)
    return line


def _settings(tokenizer_manager: Any, record: dict[str, Any], obj: Any) -> dict[str, Any]:
    """Empty where the request has no field any more: a record is told without its settings rather than not at all."""
    config, params = config_of(tokenizer_manager.server_args), obj.sampling_params
    if not has_field(params):
        return {}
    try:
        spec = parse_field(params["custom_params"]["dynasor"], config.dynasor_max_branches, config.dynasor_level)
    except FieldError:
        return {}
    sampling = sampling_of(params, tokenizer_manager)
    given = {key: sampling[key] for key in _SAMPLING if isinstance(sampling.get(key), int | float)}
    return settings_of(spec, record) | given


def _prompt(tokenizer_manager: Any, obj: Any) -> str:
    """How the prompt begins, as far as it is text or can be made text."""
    if isinstance(obj.text, str):
        return obj.text[:MOST_PROMPT_CHARS]
    if not isinstance(obj.input_ids, list) or tokenizer_manager.tokenizer is None:
        return ""
    return tokenizer_manager.tokenizer.decode(obj.input_ids[:MOST_PROMPT_CHARS])[:MOST_PROMPT_CHARS]

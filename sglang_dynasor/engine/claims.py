"""What an accepted request claims: its ids, for its owner and tenant, and its part of a budget."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dynasor.engine.books import budgets_of, ids_of
from sglang_dynasor.engine.flag import config_of, serves_programs
from sglang_dynasor.engine.front import records_of
from sglang_dynasor.engine.owner import owned
from sglang_dynasor.engine.validation import has_field, sampling_of
from sglang_dynasor.policy.spec import parse_field


def claim(result: Any, tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Take note of a request that everybody has accepted (FieldError where an id is somebody else's); SGLang sends it next.

    Before that a request may still be refused, by SGLang or by us, and one that is refused must shut nobody out. A scheduler may
    refuse it yet, or SGLang another prompt of the same request: then what was claimed here no longer holds (observe/claims.py).
    """
    params: Any = getattr(obj, "sampling_params", None)
    config = config_of(tokenizer_manager.server_args)
    if (
        not has_field(params)
        or not serves_programs(tokenizer_manager.server_args)
        or not isinstance(obj, GenerateReqInput)
    ):
        return
    custom, rid = params["custom_params"], str(obj.rid)
    spec = owned(parse_field(custom["dynasor"], config.dynasor_max_branches, config.dynasor_level), custom)
    budgets, most_tokens = budgets_of(tokenizer_manager), sampling_of(params, tokenizer_manager).get("max_new_tokens")
    if spec.budget is not None:
        budgets.check(spec, most_tokens)
    ids_of(tokenizer_manager).claim(rid, spec, records_of(tokenizer_manager))
    if spec.budget is not None:
        budgets.claim(rid, spec, most_tokens)

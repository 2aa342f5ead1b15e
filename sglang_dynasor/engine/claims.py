"""What an accepted request claims: its ids, for its tenant, and its part of a budget."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dynasor.engine.flag import config_of, serves_programs
from sglang_dynasor.engine.front import records_of
from sglang_dynasor.engine.validation import budgets_of, has_field, sampling_of
from sglang_dynasor.observe.ledger import Owners
from sglang_dynasor.policy.spec import parse_field


def owners_of(tokenizer_manager: Any) -> Owners:
    """Whose the ids are that clients name programs by."""
    if not hasattr(tokenizer_manager, "_dynasor_owners"):
        tokenizer_manager._dynasor_owners = Owners()
    return tokenizer_manager._dynasor_owners


def claim(result: Any, tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Take note of a request that everybody has accepted (FieldError where an id is somebody else's); SGLang sends it next.

    Before that a request may still be refused, by SGLang or by us, and one that is refused must shut nobody out.
    """
    params: Any = getattr(obj, "sampling_params", None)
    config = config_of(tokenizer_manager.server_args)
    if (
        not has_field(params)
        or not serves_programs(tokenizer_manager.server_args)
        or not isinstance(obj, GenerateReqInput)
    ):
        return
    spec = parse_field(params["custom_params"]["dynasor"], config.dynasor_max_branches, config.dynasor_level)
    budgets, most_tokens = budgets_of(tokenizer_manager), sampling_of(params, tokenizer_manager).get("max_new_tokens")
    if spec.budget is not None:
        budgets.check(spec, most_tokens)
    owners_of(tokenizer_manager).claim(str(obj.rid), spec, records_of(tokenizer_manager))
    if spec.budget is not None:
        budgets.claim(spec, most_tokens)

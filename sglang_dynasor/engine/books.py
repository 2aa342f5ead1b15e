"""What the front process remembers of what requests have claimed: ids, and budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dynasor.observe.ledger import BudgetBook, IdBook


def ids_of(tokenizer_manager: Any) -> IdBook:
    """The ids that clients name programs by."""
    if not hasattr(tokenizer_manager, "_dynasor_ids"):
        tokenizer_manager._dynasor_ids = IdBook(_under_way(tokenizer_manager))
    return tokenizer_manager._dynasor_ids


def budgets_of(tokenizer_manager: Any) -> BudgetBook:
    """The budgets that were declared, and how long branches are here."""
    if not hasattr(tokenizer_manager, "_dynasor_budgets"):
        tokenizer_manager._dynasor_budgets = BudgetBook(_under_way(tokenizer_manager))
    return tokenizer_manager._dynasor_budgets


def _under_way(tokenizer_manager: Any) -> Callable[[str], Any]:
    """What SGLang holds of a rid's request. It forgets one before it tells its client how it ended."""
    return lambda rid: tokenizer_manager.rid_to_state.get(rid)


def keep_claims(tokenizer_manager: Any, owner: str, rid: str, program_id: str, field: Any) -> None:
    """A record came of a request: what it has claimed stays claimed."""
    ids_of(tokenizer_manager).keep(rid, program_id, owner)
    budget_id: Any = field.get("budget") if isinstance(field, dict) else None
    if isinstance(budget_id, str):
        budgets_of(tokenizer_manager).keep(rid, budget_id, owner)

"""What a client says of a budget, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.values import read_id, read_whole

MOST_BUDGET_PROGRAMS = 1_000_000
MOST_BUDGET_TOKENS = 2**53  # what shares are reckoned in has no larger whole numbers


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """Tokens that programs spend together (policy/shared_budget.py)."""

    tokens: int
    num_programs: int = 1
    id: str = ""  # empty: nobody else shares it


def parse_budget(options: dict[str, Any]) -> BudgetSpec | None:
    """The budget that a field names; None where it names none.

    Raises:
        FieldError: no whole number, fewer tokens than programs, or an id without how many share it.
    """
    if "budget_tokens" not in options:
        if key := next((key for key in ("budget", "budget_programs") if key in options), None):
            raise FieldError(
                f"dynasor.{key}={quoted(options[key])} without dynasor.budget_tokens: send how many tokens are shared too"
            )
        return None
    tokens = options["budget_tokens"]
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise FieldError(
            f"dynasor.budget_tokens={quoted(tokens)} is a {type(tokens).__name__}; send a whole number of tokens, 1 or more"
        )
    if tokens < 1:
        raise FieldError(f"dynasor.budget_tokens={quoted(tokens)} is below 1; send a whole number of tokens, 1 or more")
    if tokens > MOST_BUDGET_TOKENS:
        raise FieldError(
            f"dynasor.budget_tokens={quoted(tokens)} is above {MOST_BUDGET_TOKENS}; send fewer, or none for no bound"
        )
    if ("budget" in options) != ("budget_programs" in options):
        has, lacks = ("budget", "budget_programs") if "budget" in options else ("budget_programs", "budget")
        raise FieldError(
            f"dynasor.{has}={quoted(options[has])} without dynasor.{lacks}: send both, the budget's id and how many programs share it, or neither"
        )
    if "program" in options:
        raise FieldError(
            f"dynasor.budget_tokens={quoted(tokens)} with dynasor.program={quoted(options['program'])}: when branches that you send start is your "
            "business; leave out one of the two"
        )
    num_programs = read_whole(options, "budget_programs", 1, MOST_BUDGET_PROGRAMS, "the limit")
    if tokens < num_programs:
        raise FieldError(
            f"dynasor.budget_tokens={quoted(tokens)} is below one branch per question: {num_programs} programs share it; send more"
        )
    return BudgetSpec(tokens, num_programs, read_id(options, "budget") or "")

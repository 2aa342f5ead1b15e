"""Checks of what an author hands to a search: each error names the key, the value and what is allowed."""

from __future__ import annotations

from typing import Any

from sglang_dynasor.errors import FieldError

VOTES = ("reward", "best", "majority")


def check_vote(vote: str) -> None:
    """Raise FieldError unless `vote` is one of VOTES."""
    if vote not in VOTES:
        raise FieldError(f"dynasor.vote={vote!r} is not known to a search; use one of {', '.join(VOTES)}")


def check_whole(key: str, value: Any, low: int = 1, high: int = 4096) -> None:
    """Raise FieldError unless `value` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a whole number, {low} to {high}")
    if not low <= value <= high:
        raise FieldError(f"dynasor.{key}={value} is outside [{low}, {high}]; send a value inside")


def check_reward(key: str, value: Any) -> None:
    """Raise FieldError unless `value` is None or a number in [0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a number in [0, 1]")
    if not 0 <= value <= 1:  # NaN is outside too
        raise FieldError(f"dynasor.{key}={value!r} is outside [0, 1]; send a number inside")


def check_scale(key: str, value: Any, *, allows_zero: bool = False) -> None:
    """Raise FieldError unless `value` is a number above 0, or 0 where allowed, and below 1000."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1e3 or (allows_zero and value == 0)):
        raise FieldError(f"dynasor.{key}={value!r} is outside its range; send a number such as 0.2 or 1")

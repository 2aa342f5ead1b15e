"""Values of a client's field, by key: each is checked by type and range.

Raises everywhere:
    FieldError: the message names the key, the value and what is allowed.
"""

from __future__ import annotations

import re
from typing import Any

from sglang_dynasor.errors import FieldError, quoted

MAX_DEADLINE_S = 86_400.0
ID_VALUES = "1 to 128 of A-Z a-z 0-9 . _ : -"
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
TEMPLATE_VALUES = "NAME or NAME@VERSION"
TEMPLATE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}(@[1-9][0-9]{0,5})?")


def read_id(options: dict[str, Any], key: str) -> str | None:
    """An id; None where the key is not there."""
    if key not in options:
        return None
    value = options[key]
    if not isinstance(value, str):
        raise FieldError(f"dynasor.{key}={quoted(value)} is a {type(value).__name__}; send a string: {ID_VALUES}")
    if not _ID.fullmatch(value):
        raise FieldError(f"dynasor.{key}={quoted(value)} is not an id; use {ID_VALUES}")
    return value


def read_template(options: dict[str, Any]) -> str:
    """A template's name, with its version if that is there; empty where there is none."""
    value = options.get("template", "")
    if "template" in options and (not isinstance(value, str) or not TEMPLATE_ID.fullmatch(value)):
        raise FieldError(f"dynasor.template={quoted(value)} is no template's name; send {TEMPLATE_VALUES}")
    return value


def read_text(options: dict[str, Any], key: str, default: str, allowed: str) -> str:
    """A string, of which `allowed` says what it may be."""
    value = options.get(key, default)
    if not isinstance(value, str):
        raise FieldError(f"dynasor.{key}={quoted(value)} is a {type(value).__name__}; send a string: {allowed}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FieldError(
            f"dynasor.{key}={quoted(value)} has half a surrogate pair and is no text; send {allowed}"
        ) from None
    return value


def read_seconds(options: dict[str, Any], key: str) -> float:
    """Seconds of a key that is there, above 0 to MAX_DEADLINE_S."""
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(
            f"dynasor.{key}={quoted(value)} is a {type(value).__name__}; send seconds, above 0 to {MAX_DEADLINE_S:g}"
        )
    if not 0 < value <= MAX_DEADLINE_S:
        raise FieldError(f"dynasor.{key}={quoted(value)} is outside (0, {MAX_DEADLINE_S:g}]; send seconds inside")
    return float(value)


def read_frac(options: dict[str, Any], key: str) -> float:
    """A share in [0, 1), 0 where the key is not there."""
    value = options.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise FieldError(f"dynasor.{key}={quoted(value)} is outside [0, 1); send a share such as 0.1")
    return float(value)


def read_flag(options: dict[str, Any], key: str) -> bool:
    """Whether the key is true; it is not where it is not there."""
    value = options.get(key, False)
    if not isinstance(value, bool):
        raise FieldError(f"dynasor.{key}={quoted(value)} is a {type(value).__name__}; send true or false")
    return value


def read_whole(options: dict[str, Any], key: str, default: int, high: int, limit_name: str, low: int = 1) -> int:
    """A whole number from `low` to `high`, which `limit_name` sets."""
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(
            f"dynasor.{key}={quoted(value)} is a {type(value).__name__}; send a whole number, {low} to {high}"
        )
    if not low <= value <= high:
        raise FieldError(
            f"dynasor.{key}={quoted(value)} is outside [{low}, {high}] ({limit_name} is {high}); send a value inside"
        )
    return value

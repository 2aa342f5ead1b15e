"""The field in a request's `metadata`: what SGLang's router hands on of a chat, and OpenAI's API takes, as text."""

from __future__ import annotations

import json
from typing import Any

from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.near_miss import FIELD
from sglang_dynasor.policy.values import TEMPLATE_ID


def field_in(metadata: Any) -> Any:
    """The field that metadata carry, as it would stand in `custom_params`; None where they carry none, or null or false.

    A text is a name, of a template or an algorithm, or JSON of an object.

    Raises:
        FieldError: a text that is neither.
    """
    value: Any = metadata.get(FIELD) if isinstance(metadata, dict) else None
    if value is None or value is False:
        return None
    if not isinstance(value, str) or TEMPLATE_ID.fullmatch(value):
        return value
    try:
        # What SGLang's parser of bodies does not take this does not, either: nobody further on looks for it.
        field = json.loads(value, parse_int=_whole, parse_constant=_whole)
        json.dumps(field, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        field = None
    if not isinstance(field, dict):
        raise FieldError(
            f"metadata.{FIELD}={quoted(value)} is neither a name nor the JSON of an object; send a template's or an algorithm's name, "
            'or a text such as {"branches": 8}'
        )
    return field


def _whole(text: str) -> int:
    """A whole number of 64 bits; ValueError for others, and for what is no number (NaN, Infinity)."""
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(text)
    return int(text)

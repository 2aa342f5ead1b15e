"""A field that was meant for programs and stands where nobody reads it: at the wrong place, or misspelt."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

FIELD = "dynasor"
CLIENT_ARGUMENT = "extrabody"  # of the OpenAI Python client, which sends what is in it at the top of the body
# What a field is put into, where it should be or by mistake. Nothing else is looked into: what clients keep in `metadata`
# or `labels`, and what they call it there, is theirs.
_WRAPPERS = (CLIENT_ARGUMENT, "customparams", "customparameters", "samplingparams", "samplingparameters")
_MOST_KEY_CHARS = 24
_MOST_DEPTH = 4
# One edit, not two: `dynamo` and `dynasty` are words of other people.
_FIELD_EDITS, _WRAPPER_EDITS = 1, 2
_NOT_A_LETTER = re.compile(r"[\W\d_]+")


def near_miss(body: Any, place: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The path of the first field that was meant for programs and does not stand at `place`; None where there is none.

    Args:
        body: a request as its client wrote it, or a part of it.
        place: path at which the field is read; None: nowhere. A list counts as each of its items.

    A field that is null or false asks for nothing and is never one. Takes as long as there are keys in the body and in the few
    objects that could hold the field, whatever else is in it.
    """
    return _look(body, (), place)


def _look(value: Any, path: tuple[str, ...], place: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if isinstance(value, list):
        found = (_look(item, path, place) for item in value if isinstance(item, dict))
        return next(filter(None, found), None)
    for key, inner in value.items() if isinstance(value, dict) else ():
        meant = _meant(key) if isinstance(key, str) and len(key) <= _MOST_KEY_CHARS else None
        if meant is None or inner is None or inner is False:
            continue
        here = (*path, key)
        if meant == "field":
            if here != place:
                return here
        elif len(here) < _MOST_DEPTH and (found := _look(inner, here, place)) is not None:
            return found
    return None


@lru_cache(1024)  # clients send the same few keys again and again
def _meant(key: str) -> Literal["field", "wrapper"] | None:
    word = plain(key)
    if _is_within(word, FIELD, _FIELD_EDITS):
        return "field"
    return "wrapper" if any(_is_within(word, wrapper, _WRAPPER_EDITS) for wrapper in _WRAPPERS) else None


def plain(key: str) -> str:
    """A key's letters, in lower case: what is left of it when its spelling is left out."""
    return _NOT_A_LETTER.sub("", key).lower()


def _is_within(word: str, other: str, most: int) -> bool:
    """Whether `most` letters added, left out, replaced or swapped with their neighbour make one of the other."""
    if abs(len(word) - len(other)) > most:
        return False
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(word, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and word[i - 2] == b:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1] <= most

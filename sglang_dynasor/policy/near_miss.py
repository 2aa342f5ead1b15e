"""A field that was meant for programs and stands where nobody reads it: at the wrong place, or misspelt."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

FIELD = "dynasor"
CLIENT_ARGUMENT = "extrabody"  # of the OpenAI Python client, which sends what is in it at the top of the body
METADATA = "metadata"
# What a field is put into, where it should be or by mistake, and METADATA. Nothing else is looked into: what clients keep in
# `labels`, and what they call it there, is theirs.
_WRAPPERS = (CLIENT_ARGUMENT, "customparams", "customparameters", "samplingparams", "samplingparameters")
MOST_KEYS = 256
_MOST_METADATA = 16  # keys: as many as OpenAI's API takes
_MOST_KEY_CHARS = 24
_MOST_DEPTH = 4
# One edit, not two: `dynamo` and `dynasty` are words of other people.
_FIELD_EDITS, _WRAPPER_EDITS = 1, 2
_NOT_A_LETTER = re.compile(r"[\W\d_]+")


def near_miss(body: Any, *places: tuple[str, ...]) -> tuple[str, ...] | None:
    """The path of the first field that was meant for programs and stands at none of `places`; None where there is none.

    Args:
        body: a request as its client wrote it, or a part of it.
        places: paths at which the field is read. A list counts as each of its items.

    A field that is null or false asks for nothing and is never one. What is looked into are the body and the few objects that
    could hold the field, the nearest first, and of them no more than MOST_KEYS keys, whatever else is there.
    """
    num_left = MOST_KEYS
    found: list[tuple[tuple[str, ...], Any]] = [((), body)]
    for path, value in found:  # which grows meanwhile
        if isinstance(value, list):
            found += [(path, item) for item in value[:num_left] if isinstance(item, dict)]
        most = _MOST_METADATA if path and path[-1] == METADATA else None
        for key, inner in islice(value.items(), most) if isinstance(value, dict) else ():
            num_left -= 1
            if num_left < 0:
                return None
            meant = _meant(key) if isinstance(key, str) and len(key) <= _MOST_KEY_CHARS else None
            if meant is None or inner is None or inner is False:
                continue
            here = (*path, key)
            if meant == "field" and here not in places:
                return here
            if meant == "metadata" and path and plain(path[-1]) != CLIENT_ARGUMENT:
                continue  # of somebody's own settings
            if meant != "field" and len(here) < _MOST_DEPTH:
                found.append((here, inner))
    return None


@lru_cache(1024)  # clients send the same few keys again and again
def _meant(key: str) -> Literal["field", "metadata", "wrapper"] | None:
    word = plain(key)
    if _is_within(word, FIELD, _FIELD_EDITS):
        return "field"
    if key == METADATA:  # as it is written: keys that only resemble it are other people's
        return "metadata"
    return "wrapper" if any(_is_within(word, wrapper, _WRAPPER_EDITS) for wrapper in _WRAPPERS) else None


def plain(key: str) -> str:
    """A key's letters, in lower case: what is left of it when its spelling is left out."""
    return _NOT_A_LETTER.sub("", key).lower()


def _is_within(word: str, other: str, most: int) -> bool:
    """Whether `most` letters added, left out, replaced or swapped with their neighbour make one of the other."""
    if word == other:
        return True
    if most == 0 or abs(len(word) - len(other)) > most:
        return False
    same = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), min(len(word), len(other)))
    a, b = word[same:], other[same:]
    rests = [(a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    if a[:2] == b[1::-1]:
        rests.append((a[2:], b[2:]))
    return any(_is_within(rest, its_rest, most - 1) for rest, its_rest in rests)

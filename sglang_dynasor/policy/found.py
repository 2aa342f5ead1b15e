"""What a reader of answers gives back."""

from __future__ import annotations

from typing import NamedTuple

TAIL_CHARS = 4096  # of a text that are read for an answer; JSON and code have their own


class Found(NamedTuple):
    """An answer as written, and whether something in the text tells that it has come to its end."""

    text: str
    is_whole: bool

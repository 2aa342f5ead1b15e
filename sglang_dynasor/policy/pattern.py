"""A client's own pattern, with bounded work.

RE2 is linear in a text for one match, but each match may look to the end of the text, so all together are quadratic; and its
states take as long to build as the pattern's program is large. So the work is counted in characters times instructions, and
is bounded by what is read, the same on every rank: never by a clock.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import re2

from sglang_dynasor.errors import FieldError, quoted, spelled
from sglang_dynasor.policy.found import TAIL_CHARS, Found

MAX_PATTERN_CHARS = 256
MAX_WORK = 110_000  # characters times instructions, to find the last place that matches: at most about 1.2 ms
MAX_LINE_WORK = 60_000  # of the matches of that line
MIN_READ_CHARS = 256  # a pattern that may not read as much is refused
MAX_LINE_CHARS = 200  # before the last place that matches


class Pattern(NamedTuple):
    """A pattern, and the same behind as much text as possible: that finds the last place where it matches."""

    one: Any
    last: Any
    num_read_chars: int
    num_instructions: int


def check_pattern(pattern: str) -> None:
    """Raise FieldError unless RE2 takes `pattern` and its work is bounded."""
    if not 1 <= len(pattern) <= MAX_PATTERN_CHARS:
        raise FieldError(
            f"dynasor.answer: the pattern has {len(pattern)} characters; 1 to {MAX_PATTERN_CHARS} are allowed"
        )
    try:
        found = _compiled(pattern)
    except re2.error as error:
        raise FieldError(
            f"dynasor.answer={quoted(f'regex:{pattern}')} is no RE2 pattern: {spelled(str(error))}; correct it"
        ) from None
    if found.num_read_chars < MIN_READ_CHARS:
        raise FieldError(
            f"dynasor.answer={quoted(f'regex:{pattern}')} compiles to {found.num_instructions} instructions; at most "
            f"{MAX_WORK // MIN_READ_CHARS} are allowed, as every branch is read inside the scheduler's loop; use smaller "
            "repetitions, such as .* in place of .{0,100}"
        )


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Pattern:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    one = re2.compile(pattern, options)
    last = re2.compile(f"(?s:.*)({pattern})", options)
    size = last._regexp.ProgramSize()  # pyright: ignore[reportPrivateUsage]
    return Pattern(one, last, min(TAIL_CHARS, MAX_WORK // size), size)


def weight(pattern: str) -> int:
    """What a character is worth to this pattern, 1 or more, where a whole text of TAIL_CHARS is the most that any may cost."""
    return -(-_compiled(pattern).num_instructions * TAIL_CHARS // MAX_WORK)


def find_pattern(text: str, pattern: str) -> Found | None:
    """The last match's first group, or the whole match; None where there is none, or the group took no part.

    Of the line in which the pattern matches last, the last match counts. At most TAIL_CHARS characters are read, of a large
    pattern fewer: MAX_WORK by its instructions.
    """
    one, last, num_chars, size = _compiled(pattern)
    tail = text[-num_chars:]
    place = last.match(tail)
    if place is None:
        return None
    start, end = place.span(1)
    line_end = tail.find("\n", end)
    line_end = len(tail) if line_end < 0 else line_end
    line = max(tail.rfind("\n", 0, start) + 1, start - MAX_LINE_CHARS)
    word = max(line, tail.rfind(" ", 0, start) + 1)
    # The last place may be inside a match: "2" of "22". From the start of its line, or of its word, matches come in order.
    for begin in (line, word):
        most = MAX_LINE_WORK // ((line_end - begin + 1) * size)
        found, num_matches = None, 0
        for match in one.finditer(tail, begin, line_end):
            found, num_matches = match, num_matches + 1
            if num_matches > most:
                break
        if found is not None and num_matches <= most:
            return _found(found.group(1 if one.groups else 0), found.end() < len(tail))
    return _found(place.group(2 if one.groups else 1), end < len(tail))


def _found(text: str | None, is_whole: bool) -> Found | None:
    return None if text is None else Found(text, is_whole)

"""What a branch answered: extraction from its text, and the key under which equal answers are counted.

Everything here runs in the scheduler's loop on every finished branch, so the work is bounded: at most TAIL_CHARS
characters are read, patterns run on RE2 (linear time), and numbers are exact rationals of bounded size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import re2

from sglang_dynasor.errors import FieldError

TAIL_CHARS = 4096
MAX_ANSWER_CHARS = 256
MAX_LEAD_CHARS = 256
MAX_PATTERN_CHARS = 256
MAX_DIGITS = 40  # beyond this a number is compared as text

_WHOLE = r"(?:(?<![\d,])\d{1,3}(?:,\d{3})++(?!,?\d)|\d+)"  # commas stand between thousands only: "1,2" is two numbers
_NUMBER = re.compile(rf"[-+]?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,2}}(?!\d))?(?:\s*/\s*{_WHOLE}(?:\.\d+)?)?")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")  # spaces between thousands
_MIXED = re.compile(r"([-+]?)(\d+) +(\d+/\d+)")
_AROUND_SIGN = re.compile(r" *([-+/]) *")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?i:answer)[^A-Za-z0-9]{0,12}(?:(?i:is)\b|:)[^A-Za-z0-9]{0,12}([A-J])\b"
    r"|(?i:choice|option)\b[^A-Za-z0-9]{0,12}(?:(?i:is)\b)?[^A-Za-z0-9]{0,12}([A-J])\b"
    r"|\(([A-Ja-j])\)|\*\*([A-Ja-j])\*\*|^[ \t]*([A-J])[ \t]*[.)]?[ \t]*$",
    re.M,
)


def _boxed(text: str) -> str | None:
    r"""The contents of the last complete `\boxed{...}`, braces balanced."""
    opened: list[int | None] = []  # where each open brace's contents begin; None: of no box
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(None if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) is not None:
            last = max(last or (0, 0), (start, brace.start()))
    return None if last is None else text[slice(*last)]


def _hash(text: str) -> str | None:
    """What follows the last `####`, to the end of its line."""
    _, mark, rest = text.rpartition("####")
    return rest.split("\n", 1)[0] if mark else None


def _choice(text: str) -> str | None:
    """The last letter A to J that stands as a choice: "answer is (B)", "(B)", or alone on a line."""
    letter = None
    for found in _CHOICE.finditer(text):
        letter = found[found.lastindex or 0]
    return letter.upper() if letter else None


def _number(text: str) -> str | None:
    """The last number, commas and fractions included."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = text.rstrip().rsplit("\n", 1)
    return lines[-1]


def _auto(text: str) -> str | None:
    r"""`boxed`, else `hash`, else `last_line`."""
    for extract in (_boxed, _hash, _last_line):
        if (found := extract(text)) is not None:
            return found
    return None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "auto": _auto,
    "hash": _hash,
    "boxed": _boxed,
    "choice": _choice,
    "number": _number,
    "last_line": _last_line,
}


_MARKS = {"hash": ("####",), "boxed": ("\\boxed{",), "auto": ("####", "\\boxed{")}


@lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    return re2.compile(pattern, options)


def check_extractor(extractor: str) -> None:
    """Raise FieldError unless `extractor` is a name in EXTRACTORS or `regex:PATTERN` with a pattern RE2 takes."""
    if extractor in EXTRACTORS:
        return
    kind, sep, pattern = extractor.partition(":")
    if kind != "regex" or not sep:
        raise FieldError(
            f"dynasor.answer={extractor!r} is not an extractor; "
            f"use one of {', '.join(EXTRACTORS)}, or 'regex:PATTERN' (RE2 syntax, the first group is the answer)"
        )
    if not 1 <= len(pattern) <= MAX_PATTERN_CHARS:
        raise FieldError(
            f"dynasor.answer: the pattern has {len(pattern)} characters; 1 to {MAX_PATTERN_CHARS} are allowed"
        )
    try:
        _compile(pattern)
    except re2.error as error:
        raise FieldError(f"dynasor.answer={extractor!r} is no RE2 pattern: {error}; correct it") from None


def answer_marks(extractor: str) -> tuple[str, ...]:
    """What stands right before an answer that `extractor` finds; empty where nothing tells that an answer begins."""
    return _MARKS.get(extractor, ())


def extract_answer(text: str, extractor: str) -> str | None:
    """The answer in `text`, as written; None where there is none (an abstention).

    Args:
        text: what a branch generated; only its last TAIL_CHARS characters are read.
        extractor: a name in EXTRACTORS, or `regex:PATTERN`: the last match's first group, or the whole match.

    Returns:
        The answer without surrounding white space, at most MAX_ANSWER_CHARS long; None if empty or not found.
    """
    tail = text[-TAIL_CHARS:]
    if extractor in EXTRACTORS:
        found = EXTRACTORS[extractor](tail)
    else:
        found = None
        for match in _compile(extractor.partition(":")[2]).finditer(tail):
            found = match.group(1) if match.re.groups else match.group(0)
    found = (found or "").strip()[:MAX_ANSWER_CHARS].strip()
    return found or None


def read_answer(lead: str, text: str, extractor: str) -> str | None:
    r"""The answer in `text`, or else one that begins on the line before it: a prompt may end with `\boxed{`.

    Args:
        lead: what stands before `text`; of it only the end of the last line is read, and no answer of its own counts.
    """
    if extractor == "auto":  # its last line is there in any text
        begun = read_answer(lead, text, "boxed") or read_answer(lead, text, "hash")
        return begun or extract_answer(text, "last_line")
    found = extract_answer(text, extractor)
    begun = lead.rpartition("\n")[2][-MAX_LEAD_CHARS:]
    if found is None and begun:
        whole = extract_answer(begun + text, extractor)
        found = None if whole == extract_answer(begun, extractor) else whole
    return found


def is_complete(lead: str, text: str, extractor: str) -> bool:
    """Whether the answer that `text` gives after `lead` has come to its end: its braces are closed, or its line is over."""
    if extractor == "boxed" or (extractor == "auto" and "\\boxed{" in lead + text):
        return _boxed(lead + text) is not None
    if extractor == "choice":
        return _choice(lead + text) is not None
    return "\n" in text.lstrip()


def as_number(text: str) -> Fraction | None:
    r"""The exact rational that `text` writes; None if it is none, or is several numbers.

    It may have commas or spaces between thousands, a point, an exponent, be a fraction (`-3/4`, `\frac{3}{4}`) or mixed (`3 1/2`).
    """
    text = _AROUND_SIGN.sub(r"\1", _FRAC.sub(r" \1/\2", text).strip())
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if sum(c.isdigit() for c in text) > MAX_DIGITS:
        return None
    sign, whole, text = mixed.groups() if (mixed := _MIXED.fullmatch(text)) else ("", "0", text)
    if not _NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    try:
        value = int(whole) + Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if sign == "-" else value


def answer_key(answer: str) -> str:
    """The string under which an answer is counted; equal answers have equal keys.

    Numbers are equal as exact rationals ("0.5" = "1/2" = "$.50"); anything else is compared without case, white space,
    surrounding punctuation, dollar signs and LaTeX text wrappers. Never symbolic: this runs in the scheduler's loop.
    """
    text = _WRAPPED.sub(r"\1", answer).replace("\\!", "").replace("\\,", "").replace("\\%", "%").replace("\\$", "$")
    text = text.replace("−", "-").strip().strip("$").strip()
    text = text.rstrip(".,;:!").strip()
    percent = text.endswith("%")
    number = as_number(text.removesuffix("%").removeprefix("$").strip())
    if number is not None:
        return f"{number}{'%' if percent else ''}"
    apart = _BETWEEN_DIGITS.sub(",", text.casefold())  # "1 2" is not 12
    return "".join(apart.split()).strip("\"'`*()[]{}") or answer

"""What counts as the same answer: the key under which an answer is counted.

Everything here runs in the scheduler's loop on every finished branch: linear in the answer, nothing symbolic, and the same
on every rank. Where it is in doubt it keeps two answers apart: that costs tokens, a wrong merge costs the answer.
docs/answers.md has the table of what is equal.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache

from sglang_dynasor.policy.latex import Unreadable, braced, signs
from sglang_dynasor.policy.python_code import python_form
from sglang_dynasor.policy.quantity import MATH_SPACE, measure, number_in, plain

COMPARERS = ("symbolic", "model", "embedding")  # new answers are compared beside the loop (comparison.py)
EQUALS = ("math", "text", *COMPARERS)
_CANONICAL = ("math", "symbolic")  # counted by their canonical form; the others as text
MATH_CHARS = 256  # a longer answer is compared as text
MAX_KEY_CHARS = 256  # a longer canonical form is counted by its digest
MAX_PASSES = 6  # until a form must no longer change
KEPT = "\0"  # begins a form that is kept as it is

_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+|[A-Za-z]_\{?\w\}?|[A-Za-z]\([A-Za-z]\))(?:=|\\approx ?)(.+)")
_NAMED = re.compile(r"([^=]*?)(?:=|\\approx)")
_SPLIT = re.compile(r"(\\[{}]|[()\[\],;|])")
_SET = re.compile(
    r"\\\{((?:[^\\()\[\]|:{}\"]|\\[A-Za-z]|(?<=\^|_){[^{}]*})*+)\\\}"
)  # without what has an order of its own
_OR = re.compile(r" ?(?:,|;)? ?\b(?:and|or)\b ?", re.I)
_WORD = re.compile(r"[^\W\d_]{2,}")
_ARTICLE = re.compile(r"(?:the|an?) (?=[^\W\d_]{2})", re.I)
_HYPHEN = re.compile(r"(?<=[^\W\d_]{3})-(?=[^\W\d_]{3})")
_EXCLAIMED = re.compile(r"(?:.*[^\w\\])?(?:[^\W\d_]{3,}|no)!", re.I)
_OPTION = re.compile(r"(?:option|choice|answer):? \(?([A-Z])\)?", re.I)
_LOOSE = re.compile(r" (?![\w.])|(?<![\w.]) |(?<=\d) (?=[^\W\d_])")
_COMMAND_SPACE = re.compile(r"(\\[A-Za-z]+) (?![A-Za-z])")


def answer_key(answer: str, equal: str = "math", extractor: str = "auto") -> str:
    """The string under which an answer is counted; equal answers have equal keys.

    Args:
        answer: as `read_answer` gave it.
        equal: one of EQUALS, with its level if it has one. What is compared beside the loop (comparison.py) has the key by which it
            is counted until then.
        extractor: that gave it. What `json` and `tool_call` give is canonical already; `code:python` is equal where it compiles
            to the same.

    Returns:
        At most MAX_KEY_CHARS characters; a longer form is there by its digest, so that all of it counts. Empty only for "".
    """
    kind = extractor.partition(":")[0]
    if extractor == "code:python":
        return _short(python_form(answer))
    if kind == "code":
        return _short("\n".join(line.rstrip() for line in answer.strip().splitlines()))
    if extractor == "json" or kind == "tool_call":
        return _short(answer)
    return _short(canonical(answer) if equal in _CANONICAL else text_form(answer))


def _short(form: str) -> str:
    if len(form) <= MAX_KEY_CHARS:
        return form
    return f"{form[:32]}...{hashlib.blake2b(form.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def text_form(text: str) -> str:
    """The text with white space of any kind as one space, in Unicode's composed form; nothing else is taken away."""
    return " ".join(unicodedata.normalize("NFC", text).split()) or text


@lru_cache(maxsize=4096)
def canonical(answer: str) -> str:
    """The one form of all answers that `math` takes for the same; a form is its own form."""
    if answer.startswith(KEPT):
        return answer
    if len(answer) > MATH_CHARS:
        return KEPT + text_form(answer)
    form = answer
    try:
        for _ in range(MAX_PASSES):
            before, form = form, _simplify(form) or text_form(form)
            if form == before:
                return form
    except Unreadable:
        pass
    return KEPT + text_form(answer)


def _simplify(text: str) -> str:
    """One pass towards the canonical form."""
    text = plain(braced(plain(signs(text))))
    if (number := measure(text)) is not None:
        return number
    if (parts := _alternatives(text)) is not None:
        return ";".join(parts)
    if option := _OPTION.fullmatch(text):
        return option[1].upper()
    if _EXCLAIMED.fullmatch(text):
        text = text[:-1]
    text = _words(text)
    text = _COMMAND_SPACE.sub(r"\1", _LOOSE.sub("", text))
    text = re.sub(r"(?<=\d)\*(?=[A-Za-z\\(])", "", text).replace("!=", r"\ne ")
    if (name := _NAME.fullmatch(text)) and _is_value(name[1]):
        return name[1]
    return _elements(text)


def _words(text: str) -> str:
    """Words without article and, where the case tells nothing, in small letters."""
    if not any(c.isalpha() for c in text):
        return text
    text = _HYPHEN.sub(" ", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text)
    return _WORD.sub(_small, text)


def _small(found: re.Match[str]) -> str:
    word = found[0]
    if found.start() and found.string[found.start() - 1] == "\\":
        return word
    is_told = (
        (word[1:].islower() and len(word) > 2) or (word.isupper() and len(word) > 4) or word in ("No", "YES", "TRUE")
    )
    return word.casefold() if is_told else word


def _is_value(text: str) -> bool:
    """Whether what `x =` is followed by is an answer by itself: not one more name, nor one more relation."""
    return not re.search(r"[=<>]|\\ne|\\approx|\bor\b|\band\b|,|;", text) and not re.fullmatch(r"[A-Za-z]", text)


def _elements(text: str) -> str:
    """A list, a tuple or a set with each of its elements in its own form; `;` between them."""
    pieces = _SPLIT.split(text)
    if len(pieces) == 1:
        return text
    is_named = len({name[1] for piece in pieces[::2] if (name := _NAMED.match(piece))}) > 1  # x=1,y=2 is no 1,2
    text = "".join(
        ";" if i % 2 and piece in (",", ";") else piece if i % 2 else piece if is_named else _element(piece)
        for i, piece in enumerate(pieces)
    )
    return _SET.sub(_sorted, text)


def _sorted(found: re.Match[str]) -> str:
    return rf"\{{{';'.join(sorted(found[1].split(';')))}\}}"


def _element(text: str) -> str:
    if text.isascii() and (text.isdigit() or text.isalpha()):
        return text
    if not any(c.isdigit() or c == "\\" for c in text):
        return text
    text = text.strip()
    text = text[1:] if re.match(r"\+[\w\\]", text) else text
    number = number_in(text) if not re.match(r"\d* \d", text) else None
    if number is not None and not text.endswith("%"):
        return str(number)
    if (name := _NAME.fullmatch(text)) and _is_value(name[1]):
        return measure(name[1]) or name[1]
    return text


def _alternatives(text: str) -> list[str] | None:
    """The parts of "1 or 2", "x=1 or x=2", "A and C": of numbers and names only."""
    parts = _OR.split(MATH_SPACE.sub(r"\1", text))  # x = 1 or x = 2
    if len(parts) < 2 or any(not part for part in parts):
        return None
    found: list[str] = []
    if len({name[1] for part in parts if (name := _NAMED.match(part.strip()))}) > 1:
        return None
    for part in parts:
        for piece in re.split("[,;]", part):
            value = name[1] if (name := _NAME.fullmatch(piece.strip())) else piece.strip()
            number = measure(value)
            if number is None and not (re.fullmatch("[A-Z]", value) and " or " not in text):
                return None
            found.append(number or value)
    return found

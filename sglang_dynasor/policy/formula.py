"""Formulas that may be compared symbolically: told from words, and taken apart.

A parser of mathematics reads anything: "listen" and "silent" are the same product of letters, `[0,1)` a syntax error. Here is
decided what is a formula, and what of two formulas must be the same as written. Where it is in doubt a text is no formula.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

MAX_FORMULA_CHARS = 128  # of the canonical form; what takes longer to write takes long to simplify

_FUNCTIONS = frozenset(r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \log \ln \exp".split())
_LETTERS = frozenset(
    r"\pi \alpha \beta \gamma \delta \epsilon \varepsilon \theta \lambda \mu \nu \rho \sigma \tau \phi \varphi \omega \Delta \Omega".split()
)
_GROUPED = frozenset(r"\sqrt \frac \binom".split())  # followed by braces
_TOKEN = re.compile(r"\\sqrt\[\d\]|\\[A-Za-z]+ ?|(?:0|[1-9]\d*)(?:\.\d+)?(?!\d)|[A-Za-z]|[-+*/^_!(){}]|\|")
_RELATION = re.compile(r"(>=|<=|\\ne(?![A-Za-z])|>|<|=)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_RANGE = re.compile(r"\d+-\d+")  # or a score: as likely as a difference
_COMMAND = re.compile(r"\\[A-Za-z]+ ?")
_OPEN, _CLOSE = ("(", "[", r"\{"), (")", "]", r"\}")


class Formula(NamedTuple):
    """A formula in parts: two are the same where their frames are, and each part is the same as the other's."""

    frame: str  # brackets, semicolons and relations between the parts
    parts: tuple[str, ...]  # expressions; empty where a relation has nothing on one side


@lru_cache(maxsize=4096)
def read_formula(form: str) -> Formula | None:
    """The formula that a canonical form (`equal.canonical`) writes; None where it is in doubt whether it is one."""
    if len(form) > MAX_FORMULA_CHARS:
        return None
    frame, inner = "", form
    elements = _split(form)
    if elements is None:
        return None
    for one, other in ((a, b) for a in _OPEN for b in _CLOSE):
        within = form[len(one) : -len(other)]
        if form.startswith(one) and form.endswith(other) and (inside := _split(within)) is not None:
            # A pair of round brackets around one expression is no frame, nor one that ends before the end.
            if len(inside) > 1 or one != "(" or other != ")":
                frame, inner, elements = one + other, within, inside
            break
    frame += ";" * (len(elements) - 1)
    parts: list[str] = []
    for element in elements:
        sides = _RELATION.split(element)
        frame += "".join(sides[1::2])
        parts += sides[::2]
    if not any(parts) or not all(part == "" or _is_expression(part) for part in parts):
        return None
    return Formula(frame, tuple(parts)) if inner else None


def _split(form: str) -> list[str] | None:
    """What stands between semicolons, the canonical commas, outside all brackets; None where brackets do not match."""
    depth, parts = 0, [""]
    for piece in re.split(r"(\\[{}]|[()\[\]{};])", form):
        depth += piece in ("(", "[", "{", r"\{")
        depth -= piece in (")", "]", "}", r"\}")
        if depth < 0:
            return None
        if piece == ";" and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts if depth == 0 else None


def _is_expression(text: str) -> bool:
    """Whether a text is an expression that can be read in one way only."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text or _RANGE.fullmatch(text):
        return False
    bare = _COMMAND.sub("\\\\", text)
    for word in _WORD.findall(bare):  # a product of two, next to something that is no letter
        if len(word) > 2 or not word.islower() or bare == word:
            return False
    for i, token in enumerate(tokens):
        name, before = token.rstrip().partition("[")[0], tokens[i - 1].rstrip() if i else ""
        if name.startswith("\\"):
            if name not in _FUNCTIONS | _LETTERS | _GROUPED:
                return False
            if name in _GROUPED and tokens[i + 1 : i + 2] != ["{"]:
                return False
            if name in _FUNCTIONS and not _is_one_atom(tokens, i + 1, is_argument=True):
                return False
            if name == r"\log" and tokens[i + 1 : i + 2] != ["_"]:
                return False  # of which base
        if name[0].isdigit() and (before.isalpha() or before in _LETTERS or before == "!"):
            return False  # x2
        if name == "/" and not _is_one_atom(tokens, i + 1):
            return False
        if (name in ("!", ")", "}") and before in ("(", "{", "")) or (name == before == "!"):
            return False
    return True


def _is_one_atom(tokens: list[str], start: int, *, is_argument: bool = False) -> bool:
    """Whether one number, letter or group follows, and nothing that it might be multiplied by: 1/2x is read in two ways.

    An argument may have a power or a base before it (`\\sin^{2}x`, `\\log_{2}8`) and be a number times a letter.
    """
    i = start
    while is_argument and tokens[i : i + 1] in (["^"], ["_"]):
        i = _after_atom(tokens, i + 1)
    if is_argument and tokens[i : i + 1] and tokens[i][0].isdigit() and _is_letter(tokens[i + 1 : i + 2]):
        i += 1
    end = _after_atom(tokens, i)
    while tokens[end : end + 1] in (["^"], ["_"]):
        end = _after_atom(tokens, end + 1)
    return end > i and not (end < len(tokens) and _begins_atom(tokens[end]))


def _is_letter(tokens: list[str]) -> bool:
    return bool(tokens) and (tokens[0].isalpha() or tokens[0].rstrip() in _LETTERS)


def _begins_atom(token: str) -> bool:
    return token[0].isalnum() or token[0] in "\\({|"


def _after_atom(tokens: list[str], start: int) -> int:
    """Where the number, letter or group that begins at `start` is over; `start` where none does."""
    if start >= len(tokens) or not _begins_atom(tokens[start]) or tokens[start] == "|":
        return start
    if tokens[start].rstrip().partition("[")[0] in _GROUPED:
        end = _after_atom(tokens, start + 1)
        return _after_atom(tokens, end) if tokens[end : end + 1] == ["{"] else end
    if tokens[start] not in ("(", "{"):
        return start if tokens[start].rstrip() in _FUNCTIONS else start + 1
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] in "({") - (tokens[i] in ")}")
        if depth == 0:
            return i + 1
    return start

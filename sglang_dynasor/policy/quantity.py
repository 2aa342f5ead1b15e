"""Numbers that answers are, exact, with or without a currency or a unit."""

from __future__ import annotations

import re
from fractions import Fraction

from sglang_dynasor.policy.latex import Unreadable, braced, signs

MAX_DIGITS = 40  # beyond this a number is compared as text
_UNITS = (
    "degrees?|radians?|dollars?|euros?|pounds?|usd|eur|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|"
    "inch(?:es)?|feet|foot|ft|yards?|miles?|mph|millimeters?|centimeters?|meters?|metres?|kilometers?|kilometres?|mm|cm|dm|km|m|"
    "grams?|kilograms?|kg|g|mg|lbs?|ounces?|oz|liters?|litres?|ml|units?|square units?|cubic units?|"
    "(?:square|cubic) (?:inches|feet|yards|miles|meters|metres|centimeters|kilometers|cm|m|km)|(?:km|m|miles|meters|feet|ft)/(?:h|s|hr|hour|second)|(?:miles|meters|feet|kilometers) per (?:hour|second)"
)
_UNIT = re.compile(rf"(?:{_UNITS})(?:\^\{{[23]\}})?", re.I)
_LETTER_UNIT = re.compile(r"[A-Za-z](?:\^.*)?")  # next to a number it is a variable
_WORD_START = re.compile(r"(?<=[\d .)}])[A-Za-z]")
MAX_UNIT_CHARS = 32
_CURRENCY = re.compile(r"([-+]?) ?(?:US ?)?[$€£¥₹] ?([-+]?[\d.].*)")
_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:_\d{3})+|[1-9]\d{0,2}(?: \d{3})+|0|[1-9]\d*)"
_VALUE = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<mixed>[1-9]\d{{0,39}}) (?=\d+/))?(?P<top>{_VALUE})(?:[eE](?P<e>[-+]?\d{{1,2}})|\*10\^\{{?\(?(?P<power>[-+]?\d{{1,2}})\)?\}}?)?"
    rf"(?:/(?P<bottom>-?{_VALUE}))?(?: ?(?P<scale>thousand|million|billion|trillion))?(?P<percent>%| ?percent)?",
    re.I,
)
_TEN = re.compile(r"(-?)10\^\{?\(?([-+]?\d{1,2})\)?\}?")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MATH_SPACE = re.compile(r" *([-+*/=<>:^]) *")
_TIMES_TEN = re.compile(r"(?<=\d) ?[xX*] ?(?=10\^)")


def as_number(text: str) -> Fraction | None:
    r"""The exact rational that `text` writes; None if it is none, or is several numbers.

    It may have commas, spaces or `_` between thousands, a point, an exponent (`1.5*10^{3}`), a scale ("million"), per cent, be a
    fraction (`-3/4`, `\frac{3}{4}`) or mixed (`3 1/2`). "007" is none: it is a string of digits.
    """
    try:
        return number_in(plain(braced(signs(text))))
    except Unreadable:
        return None


def number_in(text: str) -> Fraction | None:
    """As `as_number`, of a text without LaTeX."""
    if not text or not (text[-1].isalnum() or text[-1] in ")}.%") or len(text) > 4 * MAX_DIGITS:
        return None
    text = _TIMES_TEN.sub("*", MATH_SPACE.sub(r"\1", text.strip()))
    if ten := _TEN.fullmatch(text):
        return _signed(ten[1], Fraction(10) ** int(ten[2])) if abs(int(ten[2])) <= MAX_DIGITS else None
    found = _NUMBER.fullmatch(text)
    if found is None or sum(c.isdigit() for c in text) > MAX_DIGITS:
        return None
    bottom = _decimal(found["bottom"] or "1")
    if not bottom or (found["mixed"] and not (found["bottom"] or "").isdigit()):
        return None
    value = int(found["mixed"] or 0) + _decimal(found["top"]) / bottom
    value *= Fraction(10) ** int(found["e"] or found["power"] or 0) * _SCALES.get((found["scale"] or "").lower(), 1)
    return _signed(found["sign"], value / 100 if found["percent"] else value)


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[, _]", "", text).removesuffix("."))


def plain(text: str) -> str:
    """The text without what only surrounds an answer: marks of emphasis, quotes, `$`, a full stop, one pair of brackets."""
    while True:
        before, text = text, text.strip()
        text = text.replace("$$", "$")
        if len(text) > 1 and text[0] == "$" and (text[-1] == "$" or "$" not in text[1:]):
            text = text[1:].removesuffix("$")
        elif text[-1:] == "$" or (text[-1:] in (".", ",", ";", ":") and text[-2:] != ".." and len(text) > 1):
            text = text[:-1]
        elif (
            len(text) > 2
            and text[0] == text[-1]
            and text[0] in "*_`\"'"
            and (text[0] == "*" or text[0] not in text[1:-1])
        ) or (len(text) > 2 and text[0] == "(" and text[-1] == ")" and not re.search("[(),;]", text[1:-1])):
            text = text[1:-1]
        elif re.match(r"-\((\d[\d./]*)\)$", text):
            text = "-" + text[2:-1]
        if text == before:
            return text


def measure(text: str) -> str | None:
    """A number as an exact rational, without its currency or unit; None where it is none."""
    if not any(c.isdigit() for c in text):
        return None
    if money := _CURRENCY.fullmatch(text):
        text = money[1] + money[2]
    for sign in "$€£¥₹":
        text = text.removesuffix(sign)
    number = number_in(text.strip())
    if number is None:
        bare = text.removesuffix(r"^{\circ}").rstrip()
        unit = _unit_at(bare)
        number = number_in(plain(bare[:unit])) if unit < len(text) else None
    return None if number is None else str(number)


def _unit_at(text: str) -> int:
    """Where a unit at the end begins; the text's length where none is."""
    for found in _WORD_START.finditer(text, max(0, len(text) - MAX_UNIT_CHARS)):
        at = found.start()
        if _UNIT.fullmatch(text, at) and (text[at - 1] == " " or not _LETTER_UNIT.fullmatch(text, at)):
            return at
    return len(text)
